"""The gateway's own questions to the API: whole answers or an exception, one host, no key in what is said."""

import asyncio
import contextlib

import pytest

from gateway_addon.http_client import Unanswered
from gateway_addon.upstreams.client import ask

KEY = "sk-ant-api03-a-key-that-nobody-should-see"


@contextlib.asynccontextmanager
async def answering(raw: bytes):
    """A server that sends these bytes to whoever asks, and closes; yields its address and what it was asked."""
    asked = []

    async def serve(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(raw)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


def fetched(upstream):
    with ask(upstream, "/v1/messages/batches/msgbatch_1", KEY) as answer:
        pieces = []
        while piece := answer.read(4):
            pieces.append(piece)
        return answer.status, b"".join(pieces)


WHOLE = {
    "by length": b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n0123456789",
    "in chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n",
}
BROKEN = {
    "short of its length": b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n0123456789",
    "without its last chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\na\r\n0123456789\r\n",
    "ended by the connection alone": b"HTTP/1.1 200 OK\r\n\r\n0123456789",
    "no HTTP": b"hello\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("raw", WHOLE.values(), ids=WHOLE)
async def test_a_whole_answer_is_read_with_the_real_key(raw):
    async with answering(raw) as (upstream, asked):
        assert await asyncio.to_thread(fetched, upstream) == (200, b"0123456789")
    [request] = asked
    assert request.startswith(b"GET /v1/messages/batches/msgbatch_1 HTTP/1.1\r\n")
    assert f"x-api-key: {KEY}".encode() in request


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
async def test_what_is_not_known_to_be_whole_is_no_answer(raw):
    async with answering(raw) as (upstream, _):
        with pytest.raises(Unanswered) as raised:
            await asyncio.to_thread(fetched, upstream)
    assert KEY not in f"{raised.value!r} {raised.value.__cause__!r}"


async def test_a_redirect_is_not_followed():
    async with answering(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n") as (upstream, asked):
        assert await asyncio.to_thread(fetched, upstream) == (302, b"")
    assert len(asked) == 1


async def test_an_upstream_that_is_not_there_is_said_in_a_sentence():
    with pytest.raises(Unanswered, match=r"cannot be reached \(ConnectionRefusedError\)"):
        await asyncio.to_thread(fetched, "http://127.0.0.1:9")
