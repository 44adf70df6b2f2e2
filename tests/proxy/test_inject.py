"""The key's last gate: which request it goes with, to which connection."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from mitmproxy import connection, http

from gateway_addon.proxy.flows import SendPermission
from gateway_addon.proxy.inject import InjectStream

FIELDS = ((b"anthropic-version", b"2023-06-01"),)
GRANT = SendPermission(("api.test", 443), True, "POST", "/v1/messages", FIELDS, FIELDS, b"{}", ("x-api-key", "the real key"))


def sent(grant=GRANT, address=("api.test", 443), tls=True, established=True, **changes) -> http.Request | None:
    request = http.Request.make("POST", "https://api.test/v1/messages", b"{}", http.Headers(FIELDS))
    request.headers.fields = FIELDS
    for name, value in changes.items():
        setattr(request, name, value)
    server = connection.Server(address=address)
    server.tls, server.timestamp_tls_setup = tls, 1.0 if established else None
    stream = object.__new__(InjectStream)
    stream.state = SimpleNamespace(leaves=lambda: grant, went_out=lambda: None)
    return stream._granted(request, server)


def test_an_admitted_request_leaves_with_the_key_on_its_copy():
    found = sent()
    assert found is not None
    assert found.headers["x-api-key"] == "the real key"
    assert "the real key" not in repr(GRANT)
    assert sent(replace(GRANT, address=("localhost", 80), tls=False), ("localhost", 80), tls=False, established=False) is not None


@pytest.mark.parametrize(
    "differs",
    [
        {"grant": None},
        {"address": ("evil.test", 443)},
        {"address": ("api.test", 80)},
        {"tls": False},
        {"established": False},
        {"method": "PUT"},
        {"path": "/v1/messages?beta=true"},
        {"content": b"[]"},
        {"headers": http.Headers((*FIELDS, (b"x", b"y")))},
    ],
    ids=str,
)
def test_the_key_stays_where_anything_is_not_as_admitted(differs):
    assert sent(**differs) is None
