"""Set up what every test stands on: quiet imports, signals as a terminal gives them, and the fast half of the suite."""

import asyncio
import gc
import os
import re
import signal
import warnings
from collections import defaultdict
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

STARTS = re.compile(
    r"^ *(?:from|import) (?:gateway|processes|stages|nginx|browser|sealed|subprocess|mitmproxy|gateway_addon\.proxy|gateway_addon\.simulator)\b",
    re.MULTILINE,
)
"""Imports of the test modules that start processes or gateways, or load mitmproxy."""


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="only modules that start no process and no gateway")


def pytest_configure(config):
    """Import mitmproxy once without warnings: what its own dependencies deprecate is not ours to fix, any other warning is an error.

    Not in the process that only hands tests out to workers.

    A shell that starts the suite in the background has it ignore SIGINT, and whatever it starts would inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    starts_workers = getattr(config.option, "numprocesses", None)
    if hasattr(config, "workerinput") and not config.getoption("--fast"):
        config.args = from_another_start(config.args, int(config.workerinput["workerid"].removeprefix("gw")), config.workerinput["workercount"])
    if not starts_workers:
        gc.disable()  # until all is collected: nothing that is loaded goes away again
    if not starts_workers:
        settings.register_profile("gateway", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("gateway")  # no example by chance, and none too slow: a machine may stand still
    if not config.getoption("--fast") and not starts_workers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mitmproxy.tools.web.master  # noqa: F401


def from_another_start(args, worker, workers):
    """List the test files of these folders, for each worker from another one on.

    In a clean checkout all of them are rewritten and compiled first: what one worker has done, the others load.
    """
    if not all(os.path.isdir(each) for each in args):
        return args
    files = sorted(str(path) for each in args for path in Path(each).rglob("test_*.py"))
    first = len(files) * worker // workers
    return [*files[first:], *files[:first]]


def pytest_ignore_collect(collection_path: Path, config):
    if config.getoption("--fast") and collection_path.suffix == ".py" and STARTS.search(collection_path.read_text()):
        return True
    return None


def pytest_collection_finish(session):
    """Keep the collector from walking through a million objects of modules and tests again and again, which live until the end anyway."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(trylast=True)  # after what `-m` leaves out
def pytest_collection_modifyitems(config, items):
    """In the fast half, leave out what starts a PostgreSQL server. Let what takes longest start first: nothing is waited for at the end."""
    if config.getoption("--fast"):
        items[:] = [each for each in items if "postgresql" not in each.name and ("sqlite" in each.name or "server" not in each.fixturenames)]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda each: each.path)
    items[:] = longest_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def longest_first(items, workers):
    """Put the modules marked `longest` at the heads of the shares that the workers get at the start, each module into one share.

    A share is a run of neighbours, as xdist's worksteal cuts the list.
    """
    long = defaultdict(list)
    for each in items:
        if each.get_closest_marker("longest"):
            long[each.path].append(each)
    heads = [[each for module in list(long.values())[number::workers] for each in module] for number in range(workers)]
    rest = iter([each for each in items if not each.get_closest_marker("longest")])
    left, ordered = len(items), []
    for number, head in enumerate(heads):
        share = left // (workers - number)
        ordered += [*head, *islice(rest, max(0, share - len(head)))]
        left -= share
    return [*ordered, *rest]


@pytest.fixture(params=[True, False], ids=["dispatch", "walk"])
def either_dispatch(request, monkeypatch):
    """Run a test with the gateway's own hook dispatch, and with mitmproxy's, as in a release where that has moved."""
    from gateway_addon.proxy.fastpath import dispatch

    monkeypatch.setattr(dispatch, "FITS", request.param)


@pytest.fixture
async def idle_clock():
    """Let time pass while the loop is idle, for the gateways of the test too: see `idle_clock.py`."""
    import gateway
    from idle_clock import pass_while_idle

    with pytest.MonkeyPatch.context() as patch:  # until the test ends: the loop ends by the real clock
        clocks = pass_while_idle(asyncio.get_running_loop(), patch)
        patch.setattr(gateway, "SYSTEM", clocks)
        yield clocks
