"""What an upstream's bytes can do to an app, by mitmproxy's parser and by the fast path: nothing but answer its call."""

import asyncio
import json
import logging
from contextlib import asynccontextmanager

import pytest
from call_rows import calls
from gateway import gateway
from rawhttp import send, split_answer
from streamed import ASK, EVENTS, payload, request
from upstreams import answer, chunked, message, upstream

from gateway_addon.proxy import bounded_http1
from gateway_addon.proxy.fastpath import relay, whole
from gateway_addon.simulator import Simulator

pytestmark = pytest.mark.usefixtures("idle_clock")

JSON = answer(200, "application/json", message())
STREAM = chunked(*EVENTS)
LOCATION = "HTTP/1.1 {} Elsewhere\r\nlocation: https://evil.example/v1/messages\r\n"
COSTS = 9 * 1000 + 24 * 5000
HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </x>; rel=preload\r\ntransfer-encoding: x\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PATHS = pytest.mark.parametrize("known", [True, False], ids=["fast", "mitmproxy"])
LONG = 4 * bounded_http1.HEAD_BYTES_MAX


@pytest.fixture
def path(monkeypatch, known):
    monkeypatch.setattr(whole, "FITS", known)
    monkeypatch.setattr(relay, "FITS", known)


async def ask(gw) -> bytes:
    """A whole answer, or what there was of one when the gateway closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(request(gw))
    got = b""
    try:
        async with asyncio.timeout(60):
            while not is_whole(got) and (piece := await reader.read(65_536)):
                got += piece
    finally:
        writer.close()
    return got


def is_whole(got: bytes) -> bool:
    head, blank, body = got.lower().partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head:
        return body.endswith(b"\r\n0\r\n\r\n")
    length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return bool(blank) and len(body) >= int(length or len(body) + 1)


@asynccontextmanager
async def asked(folder, said: bytes | list[bytes], then: str = "silent", piece_bytes: int | None = None):
    """A gateway whose upstream says this, that upstream, and what a client of the gateway got."""
    async with upstream(said, then=then, piece_bytes=piece_bytes) as api, gateway(folder, None, upstream=api.url) as gw:
        got = await ask(gw)
        await gw.quiet()
        yield gw, api, got


REDIRECTS = {
    **{f"{status}": f"{LOCATION.format(status)}content-length: 0\r\n\r\n" for status in (300, 301, 302, 303, 304, 305, 307, 308, 399)},
    "with a body": f"{LOCATION.format(307)}content-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}",
    "with half a body": f"{LOCATION.format(307)}content-length: 200\r\n\r\n<html>",
    "in chunks without an end": f"{LOCATION.format(307)}content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n3\r\n: a\r\n",
    "until it closes": f"{LOCATION.format(308)}\r\n",
}


@PATHS
async def test_a_redirect_never_reaches_the_app(tmp_path, path, caplog):
    """Its SDK would follow with the whole prompt, past policy and ledger."""
    async with asked(tmp_path, [said.encode() for said in REDIRECTS.values()]) as (gw, api, first):
        got = [first, *[await ask(gw) for _ in range(len(REDIRECTS) - 1)]]
        assert api.connections == len(REDIRECTS), "a connection that redirects is not used again"
        await gw.quiet()
        for name, each, call in zip(REDIRECTS, got, calls(tmp_path), strict=True):
            status, headers, body = split_answer(each)
            assert (status, headers["x-gateway-refusal"], headers["x-should-retry"]) == (502, "upstream_redirect", "false"), name
            assert b"redirect" in body
            assert b"evil.example" not in each
            assert (call.state, call.flags, call.spent_nano) == ("voided", ["upstream:redirect"], 0), name
        assert await gw.held_nano() == 0
        told = [record.levelno for record in caplog.records if "answered a call with a redirect" in record.getMessage()]
        assert told
        assert min(told) >= logging.WARNING


INTERIM = {
    "100": CONTINUE,
    "102": b"HTTP/1.1 102 Processing\r\n\r\n",
    "103": HINTS,
    "one that nobody knows": b"HTTP/1.1 199 x\r\ncontent-length: 20\r\n\r\n",
    "many": CONTINUE + HINTS * 20 + CONTINUE,
}


@PATHS
@pytest.mark.parametrize("piece_bytes", [None, 5])
async def test_interim_answers_are_skipped(tmp_path, path, piece_bytes):
    said = [interim + final for interim in INTERIM.values() for final in (JSON, STREAM)]
    async with asked(tmp_path, said, piece_bytes=piece_bytes) as (gw, _, first):
        got = [first, *[await ask(gw) for _ in said[1:]]]
        assert {each[:13] for each in got} == {b"HTTP/1.1 200 "}
        assert {each.partition(b"\r\n\r\n")[2] for each in got[::2]} == {message()}
        assert {payload(each) for each in got[1::2]} == {b"".join(EVENTS)}
        await gw.quiet()
        assert await gw.spent_nano() == len(INTERIM) * (9 * 1000 + 2 * 5000 + COSTS)


@PATHS
async def test_an_interim_answer_is_skipped_wherever_it_is_split(tmp_path, path):
    said, at = HINTS + CONTINUE + JSON, 0

    async def talk(reader, writer):
        nonlocal at
        while await reader.readuntil(b"\r\n\r\n"):
            await reader.readexactly(len(ASK))
            writer.write(said[:at])
            await asyncio.sleep(0.001)
            writer.write(said[at:])

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        async with gateway(tmp_path, None, upstream=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as gw:
            reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
            for at in range(len(HINTS + CONTINUE) + 12):
                writer.write(request(gw))
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
                assert head.startswith(b"HTTP/1.1 200 "), at
                await reader.readexactly(len(message()))
            writer.close()


@PATHS
async def test_a_switch_of_protocols_is_no_answer(tmp_path, path):
    async with asked(tmp_path, b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nxyz") as (_, _, got):
        status, headers, _ = split_answer(got)
        assert (status, headers["x-gateway-refusal"]) == (502, "upstream_unreachable")
        [call] = calls(tmp_path)
        assert (call.state, call.reason) == ("settled", "estimated:usage_unreadable"), "what it did with the prompt nobody knows"


STATUSES = ("000", "-20", "99", "600", "999", "99999999999", "2e2")


@PATHS
async def test_a_status_that_is_none_is_not_handed_on(tmp_path, path):
    said = [f"HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n".encode() for status in STATUSES]
    async with asked(tmp_path, said) as (gw, _, first):
        got = [first, *[await ask(gw) for _ in said[1:]]]
        assert {split_answer(each)[0] for each in got} == {502}
        await gw.quiet()
        assert {call.state for call in calls(tmp_path)} == {"settled"}


TRAILED = b"0\r\nx-checksum: 1\r\nset-cookie: a=b\r\n\r\n"


@PATHS
@pytest.mark.parametrize("piece_bytes", [None, 1, 7])
async def test_trailers_of_an_answer_are_dropped(tmp_path, path, piece_bytes):
    said = chunked(*EVENTS, more="trailer: x-checksum\r\n", end=TRAILED)
    async with asked(tmp_path, said, piece_bytes=piece_bytes) as (gw, _, got):
        assert payload(got) == b"".join(EVENTS)
        assert b"x-checksum" not in got
        assert await gw.spent_nano() == COSTS


@PATHS
async def test_trailers_of_a_request_are_dropped(tmp_path, path):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        asking = json.dumps({"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}).encode()
        lines = ("POST /v1/messages HTTP/1.1", "host: x", f"x-api-key: {gw.tokens['app']}", "anthropic-version: 2023-06-01")
        framing = ("content-type: application/json", "te: trailers", "trailer: x-checksum", "transfer-encoding: chunked", "", "")
        got = await send(gw, "\r\n".join((*lines, *framing)).encode() + b"%x\r\n%b\r\n" % (len(asking), asking) + TRAILED)
        assert got.startswith(b"HTTP/1.1 200 "), got
        [row] = (await api.settled()).all()
        assert {"trailer", "te", "x-checksum", "transfer-encoding"} & set(dict(row.headers)) == set()


ENDLESS = {
    # what never ends: the bytes before it, and those that come again and again
    "a reason phrase": (b"HTTP/1.1 200 ", b"O" * 1000),
    "one header": (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 1000),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 100),
    "hints": (b"", HINTS * 10),
    "the extension of a chunk": (chunked(EVENTS[0], end=b"5;"), b"x" * 1000),
    "trailers": (chunked(*EVENTS, end=b"0\r\n"), b"x: y\r\n" * 100),
}


@PATHS
@pytest.mark.parametrize(("first", "again"), ENDLESS.values(), ids=ENDLESS)
async def test_what_frames_an_answer_takes_bounded_memory(tmp_path, path, first, again):
    """Counted in what the gateway took of it before it closed the connection: not in seconds, nor in what the machine has."""
    sent = 0

    async def talk(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(first)
        try:
            while sent < 64 * LONG and not writer.transport.is_closing():
                writer.write(again)
                sent += len(again)
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0, limit=1000) as server:
        async with gateway(tmp_path, None, upstream=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as gw:
            got = await ask(gw)
            await gw.quiet()
            if first.count(b"\r\n\r\n"):
                assert not got.endswith(b"0\r\n\r\n"), "its end is no end"
            else:
                assert split_answer(got)[0] == 502, got[:300]
                assert b"64 KB" in got
            assert [call.state for call in calls(tmp_path)] == ["settled"]
            assert sent < 64 * LONG, "the connection was closed"


OURS = ("x-gateway-refusal: cap_spent", "X-Gateway-Cap-Day: spent=$0", "x-should-retry: true", "trailer: x", "alt-svc: h3=':443'", "anthropic-ratelimit-unified-status: rejected")


@PATHS
async def test_an_upstream_cannot_speak_as_the_gateway(tmp_path, path):
    more = "".join(f"{line}\r\n" for line in OURS) + "x-odd: a\rset-cookie: b\r\nx-esc: \x1b[31m\r\nx-good: g\r\n"
    said = f"HTTP/1.1 200 O\rK\x1b[2J\x00\r\n{more}content-type: application/json\r\ncontent-length: {len(message())}\r\n\r\n".encode() + message()
    async with asked(tmp_path, said) as (_, _, got):
        top = got.partition(b"\r\n\r\n")[0]
        assert top.startswith(b"HTTP/1.1 200 O K [2J \r\n"), top
        assert not set(top.replace(b"\r\n", b"")) & {0, 10, 13, 27}
        names = [line.partition(b":")[0] for line in top.split(b"\r\n")[1:]]
        assert [name for name in names if b"unified" not in name] == [b"x-good", b"content-type", b"content-length", b"x-gateway-cap-day"]
        assert (top.count(b"unified-status"), b"unified-status: allowed" in top) == (1, True)


@PATHS
async def test_bytes_of_a_broken_answer_are_not_shown(tmp_path, path):
    """An echo of the request would hold the key."""
    async with asked(tmp_path, b"POST /v1/messages x-api-key: sk-secret\r\n\r\n") as (_, _, got):
        assert split_answer(got)[0] == 502
        assert b"secret" not in got


async def test_an_answer_framed_in_two_ways_is_told_without_advice(tmp_path):
    """mitmproxy's own goes on to an option that would let it pass, which the gateway refuses."""
    async with asked(tmp_path, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n") as (_, _, got):
        assert b"content-length headers from server). Try again." in got


@PATHS
async def test_a_request_id_of_any_bytes_costs_no_exact_bill(tmp_path, path):
    said = JSON.replace(b"req_raw", b"req_\xff\xfe\xc3")
    async with asked(tmp_path, said) as (gw, _, got):
        assert got.startswith(b"HTTP/1.1 200 ")
        assert await gw.spent_nano() == 9 * 1000 + 2 * 5000
        assert [call.state for call in calls(tmp_path)] == ["settled"]
