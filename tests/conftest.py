"""Set up what every test stands on: quiet imports, signals as a terminal gives them, and the fast half of the suite."""

import gc
import re
import signal
import warnings
from pathlib import Path

import pytest

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
    if not config.getoption("--fast") and not starts_workers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mitmproxy.tools.web.master  # noqa: F401


def pytest_ignore_collect(collection_path: Path, config):
    if config.getoption("--fast") and collection_path.suffix == ".py" and STARTS.search(collection_path.read_text()):
        return True
    return None


def pytest_collection_finish(session):
    """Keep the collector from walking through a million objects of modules and tests again and again, which live until the end anyway."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    """In the fast half, leave out what starts a PostgreSQL server."""
    if config.getoption("--fast"):
        items[:] = [each for each in items if "postgresql" not in each.name and ("sqlite" in each.name or "server" not in each.fixturenames)]


@pytest.fixture(params=[True, False], ids=["dispatch", "walk"])
def either_dispatch(request, monkeypatch):
    """Run a test with the gateway's own hook dispatch, and with mitmproxy's, as in a release where that has moved."""
    from gateway_addon.proxy.fastpath import dispatch

    monkeypatch.setattr(dispatch, "FITS", request.param)
