"""What mitmproxy's own dependencies deprecate as they are imported is not ours to fix; any other warning is an error."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mitmproxy.tools.web.master  # noqa: F401

import pytest

from gateway_addon.proxy.fastpath import dispatch


@pytest.fixture(params=[True, False], ids=["dispatch", "walk"])
def either_dispatch(request, monkeypatch):
    """A test that uses this runs with the gateway's own hook dispatch, and with mitmproxy's, as in a release where that has moved."""
    monkeypatch.setattr(dispatch, "FITS", request.param)
