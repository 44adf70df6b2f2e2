"""Options: read quicker, and the same as mitmproxy's own."""

import pytest
from mitmproxy import options, optmanager

from gateway_addon.options import Options, made

CHANGES = [{}, {"websocket": False}, {"upstream_cert": False, "listen_port": 7}, {"mode": ["reverse:http://127.0.0.1:1"]}, {"client_certs": "/a"}]


@pytest.mark.parametrize("change", CHANGES)
def test_every_option_reads_as_mitmproxys_own(change):
    ours, theirs = Options(), options.Options()
    for each in (ours, theirs):
        each.update(**change)
    names = sorted(theirs.keys())
    assert [(name, getattr(ours, name)) for name in names] == [(name, getattr(theirs, name)) for name in names]
    for each in (ours, theirs):
        each.reset()
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


def test_a_list_that_was_read_can_be_changed_without_changing_the_option():
    ours = Options()
    ours.mode.append("socks5")
    assert ours.mode == ["regular"]


def test_what_is_no_option_is_said_to_be_none():
    with pytest.raises(AttributeError, match="No such option: nonsense"):
        _ = Options().nonsense


def test_a_mitmproxy_that_keeps_its_options_in_another_way_reads_them_itself(monkeypatch):
    assert type(made()) is Options
    monkeypatch.setattr(optmanager._Option, "__slots__", ("name", "content"))
    assert type(made()) is options.Options
