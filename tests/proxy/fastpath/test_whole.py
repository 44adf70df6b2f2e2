"""Messages that pass mitmproxy's layers as one event: only those that it would read in the same way, and nobody can tell the difference."""

import asyncio
import ssl
import time
import timeit
from asyncio.selector_events import _SelectorSocketTransport
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import h11
import pytest
import pytest_asyncio
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer
from hypothesis import given, settings
from hypothesis import strategies as st
from idle_clock import pass_while_idle
from mitmproxy import http
from mitmproxy.connection import ConnectionState, Server
from mitmproxy.net.http import http1
from mitmproxy.net.http.validate import validate_headers
from mitmproxy.proxy.layers.http import Http1Client, Http1Server, HTTPMode, validate_request
from mitmproxy.proxy.mode_specs import ProxyMode
from sealed import certificate
from stages import HOOKS, beat, length_of, plain, staged, talk
from upstreams import answer, chunked, event, message

from gateway_addon.proxy import inject
from gateway_addon.proxy.fastpath import plain_http1, relay, whole

TOP = b"POST /v1/messages?beta=true HTTP/1.1\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"content-length: 2\r\n"

LENGTHS = (b"", b"0", b"1", b"3", b"2, 2", b"+2", b"-2", b"02", b"2.0", b"0x2", b"2_0", "\u0662".encode(), b"9" * 9_999)
FRAMINGS = (b"Transfer-Encoding: chunked", b"transfer-encoding: keep-alive", b"connection: close", b"connection: keep-alive, close", b"connection:",
            b"connection: keep-alive\r\nconnection: close", b"Expect: 100-continue", b"expect: keep-alive", b"connection: upgrade\r\nupgrade: websocket",
            b"upgrade: keep-alive", b"trailer: a", b"content-length: 2", b"Content-Length: 2")  # fmt: skip
MALFORMED = (b"a: b\r\n c", b" a: b", b"a: b\nc: d", b"a: b\n", b"\na: b", b"a: b\rc: d", b"a: b\0", b"a : b", b"a(b: c", b"\xff: b", b": b", b"a", b"a: b\n\n", b"a: b\r\n")
LEFT = {
    **{f"length {value!r:.9}": b"content-length: " + value + b"\r\n\r\nhi" for value in LENGTHS},
    **{f"framing {line!r}": LENGTH + line + b"\r\n\r\nhi" for line in FRAMINGS},
    **{f"malformed {line!r}": LENGTH + line + b"\r\n\r\nhi" for line in MALFORMED},
    "a length of nothing": b"content-length: 0\r\n\r\n",
    "no length": b"a: b\r\n\r\nhi",
    "no headers": b"\r\nhi",
    "no end": LENGTH,
    "too few bytes": LENGTH + b"\r\nh",
    "too many bytes": LENGTH + b"\r\nhi!",
}
"""What is left to mitmproxy, behind the first line of a request or of an answer."""
TAKEN = {
    "plain": LENGTH + b"\r\nhi",
    "upper case": b"CONTENT-LENGTH: 2\r\nHOST: x\r\n\r\nhi",
    "white space around values, and none": b"content-length:\t 2 \x0b\r\na: \r\nb:\r\nc: d\t e\xff \r\n\r\nhi",
    "a connection that is kept": LENGTH + b"Connection: Keep-Alive\r\nkeep-alive: timeout=9\r\n\r\nhi",
    "colons in a value": LENGTH + b"a::\r\nb: c:d\r\n\r\nhi",
}
CHUNKS = {
    # a chunked body behind its header, and whether an answer with it is taken whole; a request never is
    "one": (b"2\r\nhi\r\n0\r\n\r\n", True), "two": (b"1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", True), "hex, and leading zeros": (b"00A\r\n0123456789\r\n0a\r\n0123456789\r\n0\r\n\r\n", True),
    "a last chunk inside": (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", True), "none": (b"0\r\n\r\n", False), "no last one": (b"2\r\nhi\r\n", False), "half of the last one": (b"2\r\nhi\r\n0\r\n", False),
    "a last one with more zeros": (b"2\r\nhi\r\n00\r\n\r\n", False), "a trailer": (b"2\r\nhi\r\n0\r\na: b\r\n\r\n", False), "a trailer like a last one": (b"2\r\nhi\r\n0\r\n0\r\n\r\n", False),
    "an extension": (b"2;a=b\r\nhi\r\n0\r\n\r\n", False), "white space": (b"2 \r\nhi\r\n0\r\n\r\n", False), "too short": (b"3\r\nhi\r\n0\r\n\r\n", False), "too long": (b"1\r\nhi\r\n0\r\n\r\n", False),
    "bytes behind": (b"2\r\nhi\r\n0\r\n\r\n!", False), "a second end": (b"2\r\nhi\r\n0\r\n\r\n0\r\n\r\n", False), "no number": (b"x\r\nhi\r\n0\r\n\r\n", False), "a negative size": (b"-2\r\nhi\r\n0\r\n\r\n", False),
}  # fmt: skip
IN_CHUNKS = b"transfer-encoding: chunked\r\n"
CODINGS = {
    # headers of an answer in chunks, and whether it is taken whole
    b"TRANSFER-ENCODING:\tChunked \r\n": True, IN_CHUNKS * 2: False, IN_CHUNKS + LENGTH: False, b"transfer-encoding: gzip, chunked\r\n": False, b"transfer-encoding: identity\r\n": False,
    b"transfer-encoding: chunked, chunked\r\n": False, b"content-length: chunked\r\n": False, IN_CHUNKS + b"trailer: a\r\n": False, IN_CHUNKS + b"connection: close\r\n": False,
}  # fmt: skip
TOPS = {
    # whether it is the first line of a request, and whether what follows is taken whole
    b"\r\n" + TOP: (True, False), b"POST * HTTP/1.1\r\n": (True, False), b"POST  / HTTP/1.1\r\n": (True, False), b"POST /\xff HTTP/1.1\r\n": (True, False),
    b"POST / HTTP/1.0\r\n": (True, False), b"POST / HTTP/1.1 \r\n": (True, False), b"post / HTTP/1.1\r\n": (True, False), b"PUT / HTTP/1.1\r\n": (True, False),
    b"POST http://x/ HTTP/1.1\r\n": (True, False), b"CONNECT x:443 HTTP/1.1\r\n": (True, False), TOP[:-2] + b"\n": (True, False), b"POST //x HTTP/1.1\r\n": (True, True),
    b"HTTP/1.1 529 Site is overloaded (x)\r\n": (False, True), b"HTTP/1.1 205 Reset\r\n": (False, True),
    b"HTTP/1.1 200 \r\n": (False, False), b"HTTP/1.1 200\r\n": (False, False), b"HTTP/1.1 200 OK \r\n": (False, False), b"HTTP/1.1 200 \xff\r\n": (False, False),
    b"HTTP/1.1 600 x\r\n": (False, False), b"HTTP/1.1 2000 x\r\n": (False, False), b"HTTP/1.0 200 OK\r\n": (False, False), b"HTTP/2.0 200 OK\r\n": (False, False),
    **{b"HTTP/1.1 %d x\r\n" % code: (False, False) for code in (100, 101, 103, 199, 204, 304)},
}  # fmt: skip
MESSAGES = [
    *[pytest.param(top + rest, is_request, True, id=f"taken-{is_request}-{name}") for top, is_request in ((TOP, True), (OK, False)) for name, rest in TAKEN.items()],
    *[pytest.param(top + rest, is_request, False, id=f"left-{is_request}-{name}") for top, is_request in ((TOP, True), (OK, False)) for name, rest in LEFT.items()],
    *[pytest.param(top + IN_CHUNKS + b"\r\n" + body, is_request, taken and not is_request, id=f"chunks-{is_request}-{name}") for top, is_request in ((TOP, True), (OK, False)) for name, (body, taken) in CHUNKS.items()],
    *[pytest.param(OK + lines + b"\r\n" + CHUNKS["one"][0], False, taken, id=repr(lines)) for lines, taken in CODINGS.items()],
    *[pytest.param(top + TAKEN["plain"], *expected, id=repr(top)) for top, expected in TOPS.items()],
    pytest.param((TOP + TAKEN["plain"]) * 2, True, False, id="another request behind it"),
    pytest.param((OK + TAKEN["plain"]) * 2, False, False, id="another answer behind it"),
]


def as_mitmproxy(data: bytes, is_request: bool) -> Any:
    """The message that these bytes are to mitmproxy, if it is whole and the connection stays open behind it; else None."""
    buffer = ReceiveBuffer()
    buffer += data
    try:
        lines = [bytes(line) for line in buffer.maybe_extract_lines() or ()]
        read = http1.read_request_head if is_request else http1.read_response_head
        made: Any = read(lines) if lines else None
        if made is None or (is_request and validate_request(HTTPMode.transparent, made, True)):
            return None
        validate_headers(made)
        request = made if is_request else http.Request.make("POST", "http://x/")
        size = http1.expected_http_body_size(request, None if is_request else made)
        content, rest = (unchunked(buffer), b"") if size is None else (bytes(buffer)[:size], bytes(buffer)[size:])
    except (ValueError, h11.ProtocolError):
        return None
    closes = http1.connection_close(made.http_version, made.headers) or "100-continue" in made.headers.get("expect", "").lower()
    return None if closes or rest or not content or (size or len(content)) != len(content) else (parts(made), content)


def unchunked(buffer: ReceiveBuffer) -> bytes:
    """The content of a chunked body that ends with the buffer; else nothing."""
    reader, content = ChunkedReader(), b""
    while isinstance(found := reader(buffer), h11.Data):
        content += bytes(found.data)
    return content if isinstance(found, h11.EndOfMessage) and not found.headers and not buffer else b""


def parts(made: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(made.data).items() if name != "timestamp_start"} | {"headers": made.headers.fields}


def taken_whole(data: bytes, is_request: bool) -> Any:
    found = plain_http1.read_request(data) if is_request else plain_http1.read_answer(data)
    return found and (parts(found[0]), found[1])


@pytest.mark.parametrize(("data", "is_request", "taken"), MESSAGES)
def test_what_is_not_plain_is_left_to_mitmproxy(data, is_request, taken):
    found = taken_whole(data, is_request)
    assert (found is not None) is taken
    assert not taken or found == as_mitmproxy(data, is_request)


NAMES = st.sampled_from([b"a", b"Content-Length", b"content-length", b"transfer-encoding", b"connection", b"Expect", b"Upgrade", b"trailer", b" b", b"", b"\xc3"])
VALUES = st.sampled_from([b"2", b"02", b"+2", b"2, 2", b"", b"close", b"Keep-Alive", b"keep-alive", b"keep-alive, close", b"chunked", b"identity", b"100-continue",
                          b"a: b", b"a\tb", b"a\0b", b"a\rb", b"a\nb", b"a\r\n b", b"\xff", b"a\x0b"])  # fmt: skip
SPACE = st.sampled_from([b"", b" ", b" ", b"\t", b"\x0b ", b" \x0c", b"\x85", b"\xa0", b"\r"])
FIELDS = st.builds(b"".join, st.tuples(NAMES, st.sampled_from([b":", b":", b":", b" :", b""]), SPACE, VALUES, SPACE, st.sampled_from([b"\r\n"] * 9 + [b"\n"])))
FIRST = st.sampled_from([TOP, TOP, OK, OK, b"HTTP/1.1 204 x\r\n", b"HTTP/1.1 200\r\n", b"HTTP/1.1 200 a  b\r\n", b"post / HTTP/1.1\r\n", b"POST x HTTP/1.1\r\n",
                         b"POST /\t HTTP/1.1\r\n", b"POST //x HTTP/1.0\r\n", b"CONNECT x:1 HTTP/1.1\r\n", b"POST http://x/ HTTP/1.1\r\n"])  # fmt: skip
FRAMED = st.one_of(st.tuples(st.just(LENGTH), st.sampled_from([b"\r\nhi"] * 9 + [b"\nhi", b"\r\nhi!", b"\r\nh", b"\n\r\nhi"])),
                   st.tuples(st.just(IN_CHUNKS), st.sampled_from([body for body, _ in CHUNKS.values()]).map(lambda body: b"\r\n" + body)))
HEADS = st.builds(lambda top, before, after, framed: top + b"".join(before) + framed[0] + b"".join(after) + framed[1], FIRST, st.lists(FIELDS, max_size=2),
                  st.lists(FIELDS, max_size=3), FRAMED)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(HEADS, st.booleans())
def test_what_is_taken_whole_is_what_mitmproxy_reads(data, is_request):
    found = taken_whole(data, is_request)
    assert found is None or found == as_mitmproxy(data, is_request)


@pytest.mark.parametrize("unit", [b"a:\r\n", b"a", b" ", b"a ", b":", b"\r", b"\n", b"\r\n", b"a:b", b"a: b\r\n c", b"\0", b"content-length:\t", b"\xff"])
@pytest.mark.parametrize("end", [b"", b"\r\n" + LENGTH + b"\r\nhi"])
def test_a_head_of_awkward_bytes_costs_no_more_than_its_length(unit, end):
    junk = unit * (60_000 // len(unit)) + end
    for data in (junk, b"POST /" + junk, TOP + junk, TOP + b"a: " + junk, b"HTTP/1.1 200 " + junk, OK + junk):
        assert min(timeit.repeat(lambda data=data: (plain_http1.read_request(data), plain_http1.read_answer(data)), timer=time.process_time, number=1, repeat=3)) < 0.25


@pytest.mark.parametrize(("size", "taken"), [(plain_http1.HEAD_BYTES_MAX, True), (plain_http1.HEAD_BYTES_MAX + 1, False)])
def test_a_head_over_the_limit_is_not_taken_whole(size, taken):
    rest = TOP + LENGTH + b"a: \r\n\r\n"
    head = TOP + LENGTH + b"a: " + b"x" * (size - len(rest)) + b"\r\n\r\n"
    assert len(head) == size
    assert (plain_http1.read_request(head + b"hi") is not None) is taken


# Through a gateway, in both ways.

ASK = b'{"model": "claude-haiku-4-5", "max_tokens": 64, "messages": [{"role": "user", "content": "Hello"}]}'
SAID = answer(200, "application/json", message())
IN_ONE, IN_TWO = (chunked(*pieces, content_type="application/json") for pieces in ([message()], [message()[:40], message()[40:]]))
HALVES = (IN_ONE[:-5], IN_ONE[-5:])
"""As the API often sends it: the last chunk comes alone."""
STREAM = event("message_start", message={"id": "msg_1", "type": "message", "model": "claude-haiku-4-5", "usage": {"input_tokens": 9, "output_tokens": 1}}) + event(
    "message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 24}) + event("message_stop")  # fmt: skip


def asked(body: bytes = ASK, more: str = "") -> bytes:
    return f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: TOKEN\r\n{more}content-length: {len(body)}\r\n\r\n".encode() + body


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        clocks = pass_while_idle(asyncio.get_running_loop(), patch)
        async with staged(tmp_path_factory.mktemp("stage"), clocks=clocks) as stage:
            yield stage


@pytest.fixture
def taken(monkeypatch):
    """How many requests and answers are taken whole."""
    counts = [0, 0]

    def counting(at, real):
        def received(self, *found):
            counts[at] += 1
            return real(self, *found)
        return received

    for at, end in enumerate((whole.WholeServer, whole.WholeClient)):
        monkeypatch.setattr(end, "_received", counting(at, end._received))
    return counts


def in_chunks(flow):
    said = flow.response or flow.request
    said.headers["transfer-encoding"], said.raw_content = "chunked", b""
    del said.headers["content-length"]


def by_length(flow):
    del flow.response.headers["transfer-encoding"]
    flow.response.content = b"hi"


def elsewhere(flow):
    if b"65" in flow.request.raw_content:
        flow.request.host = "127.0.0.1"


BOTH = (1, 1)
TEAPOT = http.Response.make(418, b"short and stout", {"content-type": "text/plain"})
GET = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-api-key: TOKEN\r\n\r\n"
SCENARIOS: dict[str, tuple[Any, ...]] = {
    # what is said, the upstream's answers, another addon, options, and how many requests and answers are taken whole
    "one call": (talk(asked()), [SAID], (), {}, BOTH),
    "two calls": (talk(asked(), b"", asked()), [SAID, SAID], (), {}, (2, 2)),
    "a second call before the first is answered": (talk(asked(), asked()), [SAID, SAID], (), {}, (1, 2)),
    "two calls at once": (talk(asked() * 2), [SAID, SAID], (), {}, (0, 2)),
    "half of a second call before the first is answered": (talk(asked(), asked()[:40], b"", asked()[40:]), [SAID, SAID], (), {}, (1, 2)),
    "a refused call": (talk(asked(b"{}"), b"", asked()), [SAID], (), {}, (2, 1)),
    "a call that cannot be read": (talk(asked(b"hello")), [], (), {}, (1, 0)),
    "an unknown token": (talk(asked().replace(b"TOKEN", b"sk-none")), [], (), {}, (1, 0)),
    "a body that is edited": (talk(asked(ASK.replace(b"64", b"4096"))), [SAID], (), {}, BOTH),
    "an end that the client asks for": (talk(asked(more="connection: close\r\n")), [SAID], (), {}, (0, 1)),
    "a connection that is kept": (talk(asked(more="Connection: Keep-Alive\r\n"), b"", asked()), [SAID, SAID], (), {}, (2, 2)),
    "an end that the upstream says": (talk(asked()), [SAID.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)], (), {}, (1, 0)),
    "an error": (talk(asked()), [answer(529, "application/json", b'{"type":"error","error":{"type":"overloaded_error","message":"x"}}')], (), {}, BOTH),
    "an upstream that closes": (talk(asked()), [], (), {}, (1, 0)),
    "an upstream that closes a connection that rests": (talk(asked(), b"", asked()), [SAID], (), {}, (2, 1)),
    "an upstream that answers twice": (talk(asked(), b"", asked()), [(SAID, SAID), SAID], (), {}, (2, 2)),
    "an upstream that answers twice at once": (talk(asked(), b"", asked()), [SAID + SAID, SAID], (), {}, (2, 1)),
    "an upstream that talks first": (talk(asked()), [(b"HTTP/1.1 100 Continue\r\n\r\n", SAID)], (), {}, BOTH),
    "a stream that arrives whole": (talk(asked(ASK[:-1] + b', "stream": true}'), b"", asked()), [answer(200, "text/event-stream", STREAM), SAID], (), {}, (2, 2)),
    "a stream in chunks": (talk(asked(ASK[:-1] + b', "stream": true}')), [chunked(STREAM)], (), {}, BOTH),
    "a stream in chunks, in two pieces": (talk(asked(ASK[:-1] + b', "stream": true}')), [(chunked(STREAM)[:-5], b"0\r\n\r\n")], (), {}, (1, 0)),
    "answers in a chunk": (talk(asked(), b"", asked()), [IN_ONE, IN_ONE], (), {}, (2, 2)),
    "answers in two chunks": (talk(asked(), b"", asked()), [IN_TWO, IN_TWO], (), {}, (2, 2)),
    "answers in a chunk and in two pieces": (talk(asked(), b"", asked()), [HALVES, HALVES], (), {}, (2, 0)),
    "an answer in a chunk and another behind it": (talk(asked(), b"", asked()), [IN_ONE + IN_ONE, IN_ONE], (), {}, (2, 1)),
    "an answer in a chunk over the limit": (talk(asked()), [IN_ONE], (), {"body_size_limit": str(len(message()) - 1)}, (1, 0)),
    **{f"an addon that edits an answer in {name}": (talk(asked()), [said], ("response", lambda flow: setattr(flow.response, "text", "hi")), {}, (1, int(said is IN_ONE))) for name, said in (("a chunk", IN_ONE), ("two pieces", HALVES))},
    **{f"an addon that empties an answer in {name}": (talk(asked()), [said], ("response", lambda flow: setattr(flow.response, "content", b"")), {}, (1, int(said is IN_ONE))) for name, said in (("a chunk", IN_ONE), ("two pieces", HALVES))},
    **{f"an addon that waits in {hook} for two pieces": (talk(asked(), b"", asked()), [HALVES, HALVES], (hook, lambda flow: asyncio.sleep(0.03)), {}, (2, 0)) for hook in HOOKS[2:4]},
    **{f"an addon that kills two pieces in {hook}": (talk(asked()), [HALVES], (hook, lambda flow: flow.kill()), {}, (1, 0)) for hook in HOOKS[2:4]},
    "an addon that sends an answer in a chunk by its length": (talk(asked()), [IN_ONE], ("response", by_length), {}, BOTH),
    "a length and an unheard-of encoding": (talk(asked(more="transfer-encoding: keep-alive\r\n")), [], (), {}, (0, 0)),
    "an answer with an unheard-of encoding": (talk(asked()), [SAID.replace(b"\r\n", b"\r\ntransfer-encoding: keep-alive\r\n", 1)], (), {}, (1, 0)),
    **{f"an addon that waits in {hook}": (talk(asked(), b"", asked()), [SAID, SAID], (hook, lambda flow: asyncio.sleep(0.03)), {}, (2, 2)) for hook in HOOKS[:4]},
    **{f"an addon that kills in {hook}": (talk(asked()), [SAID], (hook, lambda flow: flow.kill()), {}, (1, int(at > 1))) for at, hook in enumerate(HOOKS[:4])},
    **{f"an addon that answers in {hook}": (talk(asked(), b"", asked()), [SAID], (hook, lambda flow: setattr(flow, "response", TEAPOT.copy())), {}, (2, int(at > 1))) for at, hook in enumerate(HOOKS[:4])},
    "an addon that edits a request": (talk(asked()), [SAID], ("request", lambda flow: setattr(flow.request, "text", "hi")), {}, (1, 0)),
    "an addon that wants a request passed on as it comes": (talk(asked()), [SAID], ("requestheaders", lambda flow: setattr(flow.request, "stream", True)), {}, BOTH),
    "an addon that kills what is refused": (talk(asked(b"{}")), [], ("responseheaders", lambda flow: flow.kill()), {}, (1, 0)),
    "an addon that asks in chunks": (talk(asked()), [SAID], ("requestheaders", in_chunks), {}, BOTH),
    "an addon that ends the connections": (talk(asked()), [SAID], ("requestheaders", lambda flow: flow.request.headers.add("connection", "close")), {}, BOTH),
    "an addon that asks as HTTP/1.0": (talk(asked()), [SAID], ("request", lambda flow: setattr(flow.request, "http_version", "HTTP/1.0")), {}, (1, 0)),
    "an addon that edits an answer": (talk(asked()), [SAID], ("response", lambda flow: setattr(flow.response, "text", "hi")), {}, BOTH),
    "an addon that empties an answer": (talk(asked()), [SAID], ("response", lambda flow: setattr(flow.response, "content", b"")), {}, BOTH),
    "an addon that empties an answer and sends it in chunks": (talk(asked()), [SAID], ("response", in_chunks), {}, BOTH),
    "an addon that takes the length away": (talk(asked()), [SAID], ("response", lambda flow: flow.response.headers.__delitem__("content-length")), {}, BOTH),
    "an addon that ends the client's connection": (talk(asked()), [SAID], ("response", lambda flow: flow.response.headers.add("connection", "close")), {}, BOTH),
    "an addon that answers as HTTP/1.0": (talk(asked()), [SAID], ("response", lambda flow: setattr(flow.response, "http_version", "HTTP/1.0")), {}, BOTH),
    "a request over the limit": (talk(asked()), [], (), {"body_size_limit": str(len(ASK) - 1)}, (0, 0)),
    "a request at the limit": (talk(asked()), [answer(200, "application/json", b"{}")], (), {"body_size_limit": str(len(ASK))}, BOTH),
    "an answer over the limit": (talk(asked()), [SAID], (), {"body_size_limit": str(len(message()) - 1)}, (1, 0)),
    "a body like a request": (talk(asked(asked())[: -len(asked())], asked()), [], (), {}, (0, 0)),
    "a header like a request": (talk(TOP + b"junk: ", asked()), [SAID], (), {}, (0, 1)),
    "a body like an answer": (talk(asked()), [(answer(200, "application/json", SAID)[: -len(SAID)], SAID)], (), {}, (1, 0)),
    "a header like an answer": (talk(asked()), [(OK + b"junk: ", SAID)], (), {}, (1, 0)),
    "another method": (talk(GET), [answer(200, "application/json", b'{"data": []}')], (), {}, (0, 0)),
    "another method, answered in a chunk": (talk(GET, b"", GET), [chunked(b'{"data": []}', content_type="application/json")] * 2, (), {}, (0, 0)),
    "an addon that sends a call elsewhere": (talk(asked(), b"", asked(ASK.replace(b"64", b"65"))), [SAID, SAID], ("request", elsewhere), {}, (2, 1)),
    "a gateway whose flows are kept": (talk(asked()), [SAID], (), {"store_streamed_bodies": True}, (0, 0)),
}  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("said", "answers", "addon", "options", "expected"), SCENARIOS.values(), ids=SCENARIOS)
async def test_nobody_can_tell_the_difference(stage, taken, monkeypatch, said, answers, addon, options, expected):
    short = await stage.outcome(said, answers, *(addon or ("", None)), options)
    assert tuple(taken) == expected
    monkeypatch.setattr(whole, "FITS", False)
    assert short == await stage.outcome(said, answers, *(addon or ("", None)), options)
    assert tuple(taken) == expected, "none is taken whole where it is not known how"


@pytest.mark.asyncio(loop_scope="module")
async def test_what_arrives_at_once_leaves_in_one_write(stage, monkeypatch):
    """The head of a stream, its events and its end: one call of the system, not one for each."""
    written, write = [], _SelectorSocketTransport.write
    monkeypatch.setattr(_SelectorSocketTransport, "write", lambda self, data: written.append(data) or write(self, data))
    await stage.outcome(talk(asked(ASK[:-1] + b', "stream": true}')), [chunked(STREAM)])
    by_the_api, by_the_gateway = [data for data in written if b"message_stop" in data]
    assert by_the_api == chunked(STREAM)
    assert (by_the_gateway[:12], by_the_gateway[-5:]) == (b"HTTP/1.1 200", b"0\r\n\r\n")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("where", ["admission", "upstream", *HOOKS[:4]])
async def test_a_client_that_leaves_is_dealt_with_as_mitmproxy_does(stage, taken, monkeypatch, where):
    reached, over, admit = asyncio.Event(), asyncio.Event(), stage.gw.gateway.admit

    async def hold(*_):
        reached.set()
        try:
            await asyncio.sleep(0.03)
        finally:
            over.set()
        return b""

    async def held(*arguments):
        await hold()
        return await admit(*arguments)

    async def leave(stage):
        reached.clear()
        over.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", stage.gw.port)
        with closing(writer):
            writer.write(asked().replace(b"TOKEN", stage.gw.tokens["app"].encode()))
            await reached.wait()
        await over.wait()
        return b"", True

    if where == "admission":
        monkeypatch.setattr(stage.gw.gateway, "admit", held)
    answers = [(hold, SAID)] if where == "upstream" else [SAID]
    short = await stage.outcome(leave, list(answers), where, hold)
    monkeypatch.setattr(whole, "FITS", False)
    assert short == await stage.outcome(leave, list(answers), where, hold)
    assert taken[0] == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_message_means_the_same_wherever_it_is_cut(stage, taken):
    asking = asked().replace(b"TOKEN", stage.gw.tokens["app"].encode())
    requests = [(asking[:at], asking[at:]) for at in range(len(asking))]
    answers = [(said[:at], said[at:]) for said in (SAID, IN_TWO) for at in range(0, len(said), 9)]
    stage.api.answers = [(SAID,)] * len(requests) + list(answers)
    heard = set()
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.gw.port)
    with closing(writer):
        for pieces in requests + [(asking,)] * len(answers):
            stage.api.received = b""
            for piece in pieces:
                writer.write(piece)
                await beat()
            head = await reader.readuntil(b"\r\n\r\n")
            rest = await (reader.readexactly(length) if (length := length_of(head)) else reader.readuntil(b"\r\n0\r\n\r\n"))
            heard.add((plain(head + rest), plain(stage.api.received)))
        await stage.gw.quiet()
    assert len(heard) == 2, "one by its length, and one in chunks"
    assert taken == [1 + len(answers), len(requests) + 2], "whatever comes in two pieces is not taken whole"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("owner", "name", "value", "expected"), [(inject, "ApiHttp1Server", Http1Server, [2, 4]), (relay, "FITS", False, [4, 2])])
async def test_side_without_whole_messages_gets_them_in_parts(stage, taken, monkeypatch, owner, name, value, expected):
    """A side that knows no whole messages gets them in parts."""
    usual = await stage.outcome(talk(asked(), b"", asked()), [SAID, SAID])
    monkeypatch.setattr(owner, name, value)
    short = await stage.outcome(talk(asked(), b"", asked()), [SAID, SAID])
    assert (short.received, short.reached) == (usual.received, usual.reached)
    assert taken == expected


async def test_it_is_so_over_tls_too(tmp_path, taken, monkeypatch):
    cert, context = certificate(tmp_path)
    policy = f"tls: {{cert: {cert}, key: {cert.with_suffix('.key')}}}\n"
    trusting = {"options": (f"ssl_verify_upstream_trusted_ca={cert}",)}
    said = talk(asked(), b"", asked(), tls=ssl.create_default_context(cafile=cert))
    async with staged(tmp_path, tls=context, policy=policy, settings=trusting) as stage:
        short = await stage.outcome(said, [SAID, SAID])
        monkeypatch.setattr(whole, "FITS", False)
        assert short == await stage.outcome(said, [SAID, SAID])
    assert taken == [2, 2]


USUAL = {"store_streamed_bodies": False, "stream_large_bodies": None, "keep_host_header": False, "body_size_limit": "1k"}


@pytest.mark.parametrize(("mode", "option", "bytes_max"), [
    ("reverse:http://x", {}, 1024),
    ("reverse:http://x", {"body_size_limit": None}, 1 << 30),
    ("reverse:http://x", {"store_streamed_bodies": True}, 0),
    ("reverse:http://x", {"stream_large_bodies": "1m"}, 0),
    ("reverse:http://x", {"keep_host_header": True}, 0),
    ("regular", {}, 0),
    ("upstream:http://x", {}, 0),
])  # fmt: skip
def test_options_beyond_forwarding_take_no_message_whole(mode, option, bytes_max):
    """No message is taken whole where mitmproxy's options ask for more than forwarding."""
    context: Any = SimpleNamespace(options=SimpleNamespace(**USUAL | option), client=SimpleNamespace(proxy_mode=ProxyMode.parse(mode)))
    assert whole.body_bytes_max(context) == bytes_max


def test_whole_messages_only_with_known_releases(monkeypatch):
    """Messages are taken whole only where the methods that this relies on are known."""
    assert whole.fits()
    for owner, parts in whole.PARTS.items():
        for name in parts:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, lambda self, another, and_another: None)
                assert not whole.fits(), name
    monkeypatch.setattr(whole.dispatch, "RELEASES", "12.1.")
    assert not whole.fits()


def bare(kind, **facts):
    """A layer of this kind with nothing but what is asked of it here."""
    layer = kind.__new__(kind)
    vars(layer).update(facts)
    return layer


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"request_done": False}, False),
        ({"request": None}, False),
        ({"request": http.Request.make("HEAD", "http://x/", headers={"content-length": "2"})}, False),
        ({"request": http.Request.make("POST", "http://x/", headers={"transfer-encoding": "chunked"})}, False),
        ({"whole_bytes_max": 1}, False),
        ({"buf": bytearray(b"HTTP/1.1")}, False),
        ({"state": Http1Client.done}, False),
    ],
)
def test_answer_is_whole_only_behind_a_plain_request_sent(monkeypatch, change, taken):
    """What keeps it so is not reached through a gateway, which forwards nothing else."""
    asked = http.Request.make("POST", "http://x/", b"hi")
    client = bare(whole.WholeClient, request=asked, request_done=True, whole_bytes_max=2, buf=bytearray())
    vars(client).update({"state": client.read_headers} | change)
    monkeypatch.setattr(whole.WholeClient, "_received", lambda self, *found: "whole")
    assert client.read_whole(OK + LENGTH + b"\r\nhi") == ("whole" if taken else None)


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"request_done": False}, False),
        ({"request": None}, False),
        ({"request": http.Request.make("POST", "http://x/", headers={"connection": "close", "content-length": "2"})}, False),
    ],
)
def test_answer_is_sent_whole_only_to_a_client_that_stays(change, plain):
    """An answer is sent whole only to a client that has sent its whole request and stays."""
    server = bare(whole.WholeServer, stream_id=1, **({"request": http.Request.make("POST", "http://x/", b"hi"), "request_done": True} | change))
    assert (server.send_whole(whole.WholeAnswer(1, http.Response.make(200, b"hi"), content=b"hi")) is not None) is plain


@pytest.mark.parametrize(("change", "taken"), [({}, True), ({"error": "broken"}, False), ({"state": ConnectionState.CLOSED}, False), ({"waits": True}, False)])
def test_connection_that_is_not_ready_is_left_to_mitmproxy(change, taken):
    """A listed connection that is not ready is left to mitmproxy."""
    server = Server(address=("x", 80))
    server.state, server.error = change.get("state", ConnectionState.OPEN), change.get("error")
    flow = SimpleNamespace(request=http.Request.make("POST", "http://x/"), server_conn=Server(address=("x", 80)))
    top = SimpleNamespace(connections={server: None}, waiting_for_establishment={server: []} if "waits" in change else {})
    stream = bare(whole.WholeStream, flow=flow, top=top, context=SimpleNamespace(server=None))
    assert (stream._connected(), flow.server_conn is server) == (taken, taken)
