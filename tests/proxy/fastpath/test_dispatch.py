"""Hook dispatch: the same calls as mitmproxy's own walk, and only where that walk is the known one."""

import pytest
from mitmproxy import exceptions, hooks
from mitmproxy.addonmanager import AddonManager
from mitmproxy.options import Options
from mitmproxy.proxy.layers.http import HttpRequestHook
from mitmproxy.test import tflow

from gateway_addon.proxy import server
from gateway_addon.proxy.fastpath import dispatch
from gateway_addon.proxy.fastpath.dispatch import Dispatch, fits


class Moved(AddonManager):
    async def trigger_event(self, event, *, deadline):
        """As another release might have it."""


class Lacking(AddonManager):
    _iter_hooks = None


@pytest.mark.parametrize(
    ("manager", "release", "known"),
    [
        (AddonManager, "12.2.3", True),
        (AddonManager, "12.2.99", True),
        (AddonManager, "12.20.0", False),
        (AddonManager, "13.0.0", False),
        (Moved, "12.2.3", False),
        (Lacking, "12.2.3", False),
    ],
)
def test_the_walk_is_left_out_only_where_it_is_the_known_one(manager, release, known):
    assert fits(manager, release) is known


def test_the_release_in_the_lock_is_a_known_one():
    assert fits()


class Recorder:
    def __init__(self, name, told, raises=None):
        self.name, self.told, self.raises = name, told, raises

    async def request(self, flow):
        self.told.append((self.name, "request"))
        if self.raises:
            raise self.raises

    def update(self, flows):
        self.told.append((self.name, "update"))


@pytest.mark.parametrize("known", [True, False], ids=["dispatch", "walk"])
@pytest.mark.parametrize(
    ("raises", "told"),
    [
        (None, ["first request", "second request", "first update", "second update"]),
        (ValueError("a bug"), ["first request", "second request", "first update", "second update"]),
        (exceptions.AddonHalt(), ["first request", "first update", "second update"]),
    ],
    ids=["fine", "an error", "a halt"],
)
async def test_hooks_are_called_in_the_order_of_the_walk(monkeypatch, known, raises, told):
    monkeypatch.setattr(dispatch, "FITS", known)
    master = server.LeanMaster(Options())
    assert isinstance(master.addons, Dispatch) is known
    seen = []
    master.addons.add(Recorder("first", seen, raises), Recorder("second", seen))
    await master.addons.handle_lifecycle(HttpRequestHook(tflow.tflow()))
    assert [" ".join(each) for each in seen] == told


async def test_an_addon_that_comes_later_is_called_too():
    master, seen = server.LeanMaster(Options()), []
    master.addons.add(Recorder("first", seen))
    await master.addons.trigger_event(hooks.UpdateHook([]))
    second = Recorder("second", seen)
    master.addons.add(second)
    await master.addons.trigger_event(hooks.UpdateHook([]))
    master.addons.remove(second)
    await master.addons.trigger_event(hooks.UpdateHook([]))
    assert [name for name, _ in seen] == ["first", "first", "second", "first"]
