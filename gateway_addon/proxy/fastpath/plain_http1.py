"""Read and write HTTP/1 messages that are plain to the byte: framed as clients and the API frame theirs, and nothing odd in them.

Promises to take a message only where it has one reading, and to leave every other (None) to mitmproxy's parser; and to write what
mitmproxy would write. Work is linear in the bytes. Pure: no connection, no layer.
"""

import re
import time
from functools import lru_cache

from mitmproxy import http
from mitmproxy.net.http import url

from gateway_addon.proxy.bounded_http1 import HEAD_BYTES_MAX

type RawFields = tuple[tuple[bytes, bytes], ...]

_FIELDS = rb"((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[^\r\n\0]*+\r\n)++)\r\n"
_REQUEST = re.compile(rb"POST (/[!-~]*+) HTTP/1\.1\r\n" + _FIELDS)
_ANSWER = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) ([!-~]++(?: [!-~]++)*+)\r\n" + _FIELDS)
_LENGTH = re.compile(rb"[1-9][0-9]{0,8}")
_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})\r\n")
CHUNKED = (b"transfer-encoding", b"chunked")
LAST_CHUNK = b"0\r\n\r\n"
_BODILESS = (b"204", b"304")
_TELLING = frozenset({b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade", b"trailer"})
"""Headers that say where a message ends, or that it is not a plain one."""
_KEPT = (b"connection", b"keep-alive")


def read_request(data: bytes) -> tuple[http.Request, bytes] | None:
    """Read a POST that these bytes are, whole and plain, and its body; None: let mitmproxy look."""
    head = _REQUEST.match(data)
    if head is None or head.end() > HEAD_BYTES_MAX:
        return None
    framing = _framing(fields := _fields(head[2]))
    if framing == CHUNKED or (content := _content(framing, data, head.end())) is None:
        return None
    return http.Request("", 0, b"POST", b"", b"", head[1], b"HTTP/1.1", headers(fields), None, None, time.time(), None), content


def read_answer(data: bytes) -> tuple[http.Response, bytes] | None:
    """Read an answer that these bytes are, whole and plain, and its body; None: let mitmproxy look."""
    head = read_answer_head(data)
    content = None if head is None else _content(head[1], data, head[2])
    return None if head is None or content is None else (head[0], content)


def read_answer_head(data: bytes) -> tuple[http.Response, tuple[bytes, bytes], int] | None:
    """Read the plain head of an answer that these bytes begin with, how it is framed, and where it ends; None: let mitmproxy look."""
    head = _ANSWER.match(data)
    if head is None or head.end() > HEAD_BYTES_MAX or head[1] in _BODILESS:
        return None
    framing = _framing(fields := _fields(head[3]))
    if framing is None:
        return None
    made = http.Response(b"HTTP/1.1", int(head[1]), head[2], headers(fields), None, None, time.time(), None)
    return made, framing, head.end()


def headers(fields: RawFields) -> http.Headers:
    """Return headers of these fields. (mitmproxy's constructor copies them and looks at the type of each.)"""
    made = http.Headers.__new__(http.Headers)
    made.fields = fields
    return made


@lru_cache(16)
def host_of(address: tuple[str, int], tls: bool) -> bytes:
    """Return the Host header of an upstream."""
    return url.hostport("https" if tls else "http", *address).encode()


def head_bytes(first_line: bytes, fields: RawFields) -> bytes:
    return b"%b\r\n%b\r\n" % (first_line, b"".join([b"%b: %b\r\n" % field for field in fields]))


def answer_head_bytes(data: http.ResponseData) -> bytes:
    return head_bytes(b"%b %d %b" % (data.http_version, data.status_code, data.reason), data.headers.fields)


def _fields(block: bytes) -> RawFields:
    parted = [line.partition(b":") for line in block.split(b"\r\n")[:-1]]
    return tuple([(name, value.strip()) for name, _, value in parted])


def _framing(fields: RawFields) -> tuple[bytes, bytes] | None:
    """Find the header that says where a message ends, in lower case, where no other says it and the connection stays open."""
    told = [(lower, value.lower()) for name, value in fields if (lower := name.lower()) in _TELLING]
    found = [field for field in told if field != _KEPT]
    return found[0] if len(found) == 1 and (found[0] == CHUNKED or found[0][0] == b"content-length") else None


def _content(framing: tuple[bytes, bytes] | None, data: bytes, at: int) -> bytes | None:
    """Read a body that begins at a place and ends with these bytes; None: it does not, or it is empty."""
    if framing is None:
        return None
    if framing == CHUNKED:
        if not data.endswith(LAST_CHUNK):
            return None
        content, end = chunks(data, at)
        return content if content and end + len(LAST_CHUNK) == len(data) else None
    return data[at:] if _LENGTH.fullmatch(framing[1]) and int(framing[1]) == len(data) - at else None


def chunks(data: bytes, at: int) -> tuple[bytes, int]:
    """Read the whole chunks from a place on: their content, and where they end (there, if there is none)."""
    pieces = []
    while (head := _SIZE.match(data, at)) and (size := int(head[1], 16)) and data.startswith(b"\r\n", head.end() + size):
        pieces.append(data[head.end() : head.end() + size])
        at = head.end() + size + 2
    return b"".join(pieces), at


def is_plain(request: http.Request | None) -> bool:
    """Tell whether a request, as it is now, can be passed on whole, and its connection stays open behind it."""
    framing = framing_of(request) if request is not None and request.data.method == b"POST" and not request.data.authority else None
    return framing is not None and framing != CHUNKED


def comes_in_chunks(message: http.Message) -> bool:
    """Tell whether mitmproxy frames a message's body in chunks."""
    fields = message.data.headers.fields
    return any(b"chunked" in value.lower() for name, value in fields if name.lower() == b"transfer-encoding")


def with_host(fields: RawFields, host: bytes) -> RawFields:
    """Return the fields with one Host header, in the place of the first that there was."""
    at = [place for place, (name, _) in enumerate(fields) if name.lower() == b"host"]
    if len(at) != 1:
        made = http.Headers(fields)
        made[b"Host"] = host
        return made.fields
    return (*fields[: at[0]], (fields[at[0]][0], host), *fields[at[0] + 1 :])


def framing_of(message: http.Message) -> tuple[bytes, bytes] | None:
    return _framing(message.data.headers.fields) if message.data.http_version == b"HTTP/1.1" else None
