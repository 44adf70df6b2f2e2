"""A stream's bytes on their short way: the same to the byte as on mitmproxy's long one, however they arrive, and none held back."""

import asyncio
import contextlib
import gzip
import ssl

import h11
import httpx2
import pytest
from gateway import gateway
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer
from sealed import sealed
from streamed import ASK, BLOCK, DELTAS, END, EVENTS, START, payload, read, request
from upstreams import chunked, event, upstream

from gateway_addon.proxy import bounded_http1
from gateway_addon.proxy.fastpath import relay
from gateway_addon.simulator import Behaviour

pytestmark = pytest.mark.usefixtures("idle_clock")

BODIES = {
    "whole": b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n",
    "upper case and leading zeros": b"00A\r\n0123456789\r\n0a\r\n0123456789\r\n0\r\n\r\n",
    "an extension": b"3;name=value\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n",
    "white space": b"3 \r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n",
    "line ends inside": b"8\r\n\r\n1\r\nx\r\n\r\n1\r\n\n\r\n0\r\n\r\n",
    "a trailer": b"3\r\nabc\r\n0\r\nname: value\r\n\r\n",
    "a size that lies": b"3\r\nabcd\r\n0\r\n\r\n",
    "no line end behind a chunk": b"3\r\nabcXY4\r\ndefg\r\n0\r\n\r\n",
    "a trailer like a chunk": b"3\r\nabc\r\n0\r\n4\r\ndefg\r\n\r\n",
    "no size": b"3\r\nabc\r\n\r\n4\r\ndefg\r\n0\r\n\r\n",
    "no number": b"3\r\nabc\r\nxyz\r\ndefg\r\n",
    "a negative size": b"3\r\nabc\r\n-4\r\ndefg\r\n",
    "a huge size": b"3\r\nabc\r\n%s\r\ndefg\r\n" % (b"f" * 21),
    "cut": b"3\r\nabc\r\n4\r\nde",
    "something behind": b"3\r\nabc\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_chunked_body_is_read_as_by_h11_however_it_arrives(body):
    """A chunked body is read as h11 reads it, however its bytes arrive."""
    for first in range(len(body) + 1):
        for second in range(first, len(body) + 1):
            pieces = [piece for piece in (body[:first], body[first:second], body[second:]) if piece]
            assert read(relay.Chunks(), pieces) == read(bounded_http1.BoundedChunks(), pieces), pieces
    single = [body[at : at + 1] for at in range(len(body))]
    assert read(relay.Chunks(), single)[:2] == read(bounded_http1.BoundedChunks(), single)[:2]


def test_whole_chunks_that_are_there_together_are_one_piece():
    buffer, reader = ReceiveBuffer(), relay.Chunks()
    buffer += chunked(*EVENTS).partition(b"\r\n\r\n")[2]
    assert reader(buffer).data == b"".join(EVENTS)
    assert isinstance(reader(buffer), h11.EndOfMessage)


async def call(gw, body: bytes = ASK) -> bytes:
    """The bytes of a whole answer, head and all."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(request(gw, body))
    try:
        async with asyncio.timeout(60):
            return await reader.read(-1)
    finally:
        writer.close()


@pytest.mark.parametrize("known", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("piece_bytes", [None, 1, 7, 150])
async def test_stream_passes_to_the_byte_however_it_arrives(tmp_path, monkeypatch, known, piece_bytes):
    """A stream passes to the byte, and costs the same, however its bytes arrive."""
    monkeypatch.setattr(relay, "FITS", known)
    answer = chunked(*EVENTS, more="connection: close\r\n")
    async with upstream(answer, piece_bytes=piece_bytes) as api, gateway(tmp_path, None, upstream=api.url) as gw:
        assert payload(await call(gw)) == b"".join(EVENTS)
        await gw.quiet()
        assert await gw.spent_nano() == 9 * 1000 + 24 * 5000


HALVES = chunked(START + BLOCK, DELTAS[0][:20], DELTAS[0][20:], *DELTAS[1:], *END).partition(b"\r\n\r\n")[2]
SPLITS = {
    "halves": [HALVES[at : at + 90] for at in range(0, len(HALVES), 90)],
    "a size in two, the second half like a chunk": [b"1", b"3\r\n: a\r\n", b": 0123456789\n\n\r\n", HALVES],
}


@pytest.mark.parametrize("known", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("pieces", SPLITS.values(), ids=SPLITS)
async def test_what_has_arrived_is_not_held_back_for_what_has_not(tmp_path, monkeypatch, known, pieces):
    """Each piece is sent when the one before has been received: whole events, halves of one, halves of a chunk."""
    monkeypatch.setattr(relay, "FITS", known)
    go_on = asyncio.Semaphore(0)

    async def talk(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(chunked(end=b""))
        for piece in pieces:
            await go_on.acquire()
            writer.write(piece)
        await reader.read(-1)
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with gateway(tmp_path, None, upstream=url) as gw, asyncio.timeout(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
            writer.write(request(gw))
            await reader.readuntil(b"\r\n\r\n")
            sent = received = b""
            for piece in pieces:
                sent += piece
                go_on.release()
                await asyncio.sleep(0.02)
                while read(ChunkedReader(), [received])[0] != read(ChunkedReader(), [sent])[0]:
                    received += await reader.read(65_536)
            writer.close()
            await gw.quiet()
            assert await gw.spent_nano() == 9 * 1000 + 24 * 5000


@pytest.mark.parametrize("known", [True, False], ids=["short", "long"])
async def test_a_stream_without_chunks_gets_none(tmp_path, monkeypatch, known):
    monkeypatch.setattr(relay, "FITS", known)
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join(EVENTS)
    async with upstream(answer, piece_bytes=100) as api, gateway(tmp_path, None, upstream=api.url) as gw:
        assert (await call(gw)).partition(b"\r\n\r\n")[2] == b"".join(EVENTS)
        await gw.quiet()
        assert await gw.spent_nano() == 9 * 1000 + 24 * 5000


@pytest.mark.parametrize("known", [True, False], ids=["short", "long"])
async def test_a_tap_that_swallows_a_piece_ends_no_body(tmp_path, monkeypatch, known):
    """An empty chunk would say that the answer is whole."""
    monkeypatch.setattr(relay, "FITS", known)
    seen = []

    def swallow(self, its_life, chunk):
        seen.append(chunk)
        return b"" if len(seen) == 4 else chunk

    monkeypatch.setattr("gateway_addon.proxy.hooks.GatewayAddon._chunk", swallow)
    async with upstream(chunked(*EVENTS, more="connection: close\r\n"), piece_bytes=150) as api:
        async with gateway(tmp_path, None, upstream=api.url) as gw:
            assert payload(await call(gw)) == b"".join(seen[:3] + seen[4:])
            assert len(seen) > 4


class Slow:
    async def responseheaders(self, flow):
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("known", [True, False], ids=["short", "long"])
async def test_a_body_waits_for_its_head(tmp_path, monkeypatch, known):
    """Another addon takes its time over the headers, as mitmweb does while a person looks at a flow; the body arrives meanwhile."""
    monkeypatch.setattr(relay, "FITS", known)
    async with upstream(chunked(*EVENTS, more="connection: close\r\n"), piece_bytes=150) as api:
        async with gateway(tmp_path, None, upstream=api.url, prepare=lambda master: master.addons.add(Slow())) as gw:
            assert payload(await call(gw)) == b"".join(EVENTS)


class MovedReader(ChunkedReader):
    def __init__(self):
        super().__init__()
        self.another = 0


def test_relay_is_used_only_with_known_releases(monkeypatch):
    """The relay is used only where the methods that it relies on are known."""
    assert relay.fits()
    assert not relay.fits(MovedReader)
    monkeypatch.setattr(relay.dispatch, "RELEASES", "12.1.")
    assert not relay.fits()


@pytest.mark.parametrize("known", [True, False], ids=["short", "long"])
async def test_where_the_ground_has_moved_mitmproxys_own_client_stays(tmp_path, monkeypatch, known):
    monkeypatch.setattr(relay, "FITS", known)
    async with upstream(chunked(*EVENTS), then="silent") as api, gateway(tmp_path, None, upstream=api.url) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(request(gw))
        await reader.readuntil(b"0\r\n\r\n")
        [handler] = gw.master.addons.get("proxyserver").connections.values()
        assert (relay.RelayClient in {type(each) for each in handler.layer.connections.values()}) is known
        writer.close()
        await gw.quiet()


async def test_a_compressed_stream_passes_as_it_came(tmp_path):
    packed = gzip.compress(b"".join(EVENTS))
    answer = chunked(packed[:50], packed[50:], more="connection: close\r\ncontent-encoding: gzip\r\n")
    async with upstream(answer, piece_bytes=64) as api, gateway(tmp_path, None, upstream=api.url) as gw:
        assert payload(await call(gw)) == packed
        await gw.quiet()
        assert await gw.spent_nano() == 9 * 1000 + 24 * 5000


@pytest.mark.parametrize("known", [True, False], ids=["short", "long"])
async def test_a_stream_passes_over_tls_on_both_sides(tmp_path, monkeypatch, known):
    monkeypatch.setattr(relay, "FITS", known)
    handed_on, taken = relay.RelayClient._handed_on, []
    monkeypatch.setattr(relay.RelayClient, "_handed_on", lambda self, stream, data: taken.append(data) or handed_on(self, stream, data))
    async with sealed(tmp_path, behaviour=Behaviour(output_tokens=100, delay_ms=30)) as far:
        policy = f"tls: {{cert: {far.ca}, key: {far.ca.with_suffix('.key')}}}\n"
        trusting = {"options": (f"ssl_verify_upstream_trusted_ca={far.ca}",)}
        async with gateway(tmp_path, far.api, upstream=far.url, policy=policy, settings=trusting) as gw:
            async with httpx2.AsyncClient(verify=ssl.create_default_context(cafile=far.ca)) as client:
                headers = {"x-api-key": gw.tokens["app"], "anthropic-version": "2023-06-01"}
                answer = await client.post(f"https://127.0.0.1:{gw.port}/v1/messages", headers=headers, content=ASK)
            await gw.quiet()
            [billed] = (await far.api.settled()).messages()
            assert await gw.spent_nano() == billed.billed_nano
    assert answer.text.count("event: content_block_delta") > 3
    assert answer.text.endswith('data: {"type": "message_stop"}\n\n')
    assert bool(taken) is known
    assert answer.content.endswith(b"".join(taken)), "what arrived with the head went before it"


@pytest.mark.parametrize("known", [True, False], ids=["short", "long"])
async def test_a_client_that_stops_reading_stops_the_upstream(tmp_path, monkeypatch, known):
    """No more is held than some reads, however often the client takes a little and stops again: counted in bytes."""
    monkeypatch.setattr(relay, "FITS", known)
    piece = chunked(event("content_block_delta", index=0, delta={"type": "text_delta", "text": "x" * 32_000})).partition(b"\r\n\r\n")[2][:-5]
    said_bytes = 0

    async def talk(reader, writer):
        nonlocal said_bytes
        await reader.readuntil(b"\r\n\r\n")
        writer.write(chunked(START, BLOCK, end=b""))
        with contextlib.suppress(ConnectionError):
            while said_bytes < 64 << 20:
                writer.write(piece)
                await writer.drain()
                said_bytes += len(piece)
        writer.close()

    async def stalled() -> int:
        """What the gateway holds once the upstream can send no more."""
        before, same = -1, 0
        while same < 5:
            same = same + 1 if said_bytes == before else 0
            before = said_bytes
            await asyncio.sleep(0.02)
        ways = [way for handler in gw.master.addons.get("proxyserver").connections.values() for way in handler.transports.values()]
        return sum(len(way.reader._buffer) + way.writer.transport.get_write_buffer_size() for way in ways)

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with gateway(tmp_path, None, upstream=url) as gw, asyncio.timeout(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", gw.port, limit=1024)
            with contextlib.closing(writer):
                writer.write(request(gw))
                for _ in range(4):
                    assert await stalled() < 512 * 1024
                    stopped_at = said_bytes
                    while said_bytes == stopped_at:  # the kernel's own buffers come first
                        await reader.read(65_536)
            await gw.quiet()
