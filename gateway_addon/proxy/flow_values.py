"""Turn what mitmproxy holds of a request into the values that the gateway judges, and the gateway's headers into mitmproxy's.

Promises that nothing is lost on the way: a byte that is no UTF-8 differs from every other, and a method is as the client wrote it.
Pure.
"""

from collections.abc import Iterable

from mitmproxy import connection, http

from gateway_addon.messages.request import Request


def request_of(flow: http.HTTPFlow) -> Request:
    """Return the request as the gateway judges it."""
    return Request(method_of(flow.request), flow.request.path, lowered_headers(flow.request.headers), flow.request.raw_content or b"")


def method_of(request: http.Request) -> str:
    """Return the method as it will be sent. (`request.method` is in upper case, even where the client wrote it otherwise.)"""
    return request.data.method.decode("ascii", "backslashreplace")


def body_bytes_announced(headers: Iterable[tuple[str, str]]) -> int | None:
    """Return the length that a request's headers announce for its body; None where they announce none."""
    lengths = [value for name, value in headers if name in ("content-length", "transfer-encoding")]
    length = lengths[0] if lengths else "0"
    return int(length) if len(lengths) < 2 and length.isdecimal() and len(length) < 12 else None


def lowered_headers(headers: http.Headers) -> tuple[tuple[str, str], ...]:
    """Return header names, in lower case, and values, as text that can be turned into the same bytes again."""
    return tuple([
        (name.lower().decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")) for name, value in headers.fields
    ])  # fmt: skip


def base_url_of(client: connection.Client, headers: Iterable[tuple[str, str]]) -> str:
    """Return the base URL of the socket that the client connected to; "" behind a proxy, whose address is not known here.

    (mitmproxy puts the upstream's name in the place of the Host header.)
    """
    if not client.sockname or any(name in ("x-forwarded-for", "forwarded", "via") for name, _ in headers):
        return ""
    host, port = client.sockname[:2]
    return f"{'https' if client.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def encoded_headers(headers: Iterable[tuple[str, str]]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple([(name.encode(), value.encode()) for name, value in headers])
