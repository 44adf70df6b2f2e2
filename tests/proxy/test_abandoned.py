"""A call that does not stream and whose client leaves: read to its end and settled exactly, or closed, as the policy says."""

import asyncio
import json
import socket
import struct
from contextlib import asynccontextmanager
from dataclasses import replace

import anthropic
import pytest
from call_rows import calls
from gateway import gateway
from ledgers import until
from rawhttp import split_answer
from upstreams import answer, message, upstream

from gateway_addon.proxy import flows
from gateway_addon.proxy.fastpath import connection, dispatch, relay, whole
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("idle_clock")

MODEL = "claude-haiku-4-5"
ALLOW = f"models: {{allow: [{MODEL}]}}\nendpoints: [messages, count_tokens, batches]\n"
FINISH = {"app": ALLOW + "caps: {day: $5}\n"}
CLOSE = {"app": ALLOW + "caps: {day: $5}\nabandoned: close\n"}
BRIEF = Behaviour(output_tokens=40, tokens_per_s=100, tokens_per_event=4)
RST = struct.pack("ii", 1, 0)


@pytest.fixture(params=[True, False], ids=["short", "long"])
def either_way(request, monkeypatch):
    """Runs a test with the gateway's own faster layers and dispatch, and with mitmproxy's."""
    for part in (connection, dispatch, relay, whole):
        monkeypatch.setattr(part, "FITS", request.param)


def request(gw, *, stream=False, path="/v1/messages", more="", **fields):
    """A call as bytes."""
    body = {"model": MODEL, "max_tokens": 1000, "stream": stream, "messages": [{"role": "user", "content": "Hello"}]} | fields
    sent = json.dumps(body if path == "/v1/messages" else fields).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", f"x-api-key: {gw.tokens['app']}", "anthropic-version: 2023-06-01", f"content-length: {len(sent)}"]
    return "\r\n".join([*lines, *([more] if more else []), "", ""]).encode() + sent


@asynccontextmanager
async def caller(gw, sent):
    """A client that has sent these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(sent)
    try:
        yield reader, writer
    finally:
        writer.close()


def vanish(writer):
    """Leave with a reset instead of an end."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
    writer.transport.abort()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_a_json_call_is_settled_exactly_though_its_client_left(tmp_path, reset, either_way):
    async with Simulator(behaviour=BRIEF) as api, gateway(tmp_path, api, FINISH) as gw:
        async with caller(gw, request(gw)) as (_, writer):
            await until(lambda: api.book.in_flight)
            if reset:
                vanish(writer)
        await gw.quiet()
        [call], [row] = calls(tmp_path), (await api.settled()).messages()
        assert (call.state, call.flags, call.resolutions) == ("settled", [], 1)
        assert (call.spent_nano, row.usage.output_tokens, row.delivered) == (row.billed_nano, 40, True)
        assert call.spent_nano < call.grant_nano
        assert await gw.held_nano() == 0
        await until(lambda: not gw.master.addons.get("proxyserver").connections)


@asynccontextmanager
async def trickling(body, cut):
    """An upstream that sends the answer up to `cut`, and the rest in pieces, once the event is set that this yields beside its URL."""
    go_on = asyncio.Event()

    async def trickle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(200, "application/json", body[:cut], announce=len(body)))
        await go_on.wait()
        for at in range(cut, len(body), 30):
            writer.write(body[at : at + 30])
            await asyncio.sleep(0.005)
        writer.close()

    server = await asyncio.start_server(trickle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", go_on


@pytest.mark.parametrize("cut", [0, 80, 200])
async def test_client_that_leaves_mid_answer_is_settled_exactly(tmp_path, cut, either_way):
    """The first piece that comes after it has left shows mitmproxy that nobody is there."""
    async with trickling(message(), cut) as (url, go_on), gateway(tmp_path, None, FINISH, upstream=url) as gw:
        async with caller(gw, request(gw)) as (_, writer):
            await until(lambda: any(flow.status == 200 for flow in gw.addon.flow_states.values()))
            vanish(writer)
        await asyncio.sleep(0.02)
        go_on.set()
        await gw.quiet()
        [call] = calls(tmp_path)
        assert (call.spent_nano, call.flags) == (9 * 1000 + 2 * 5000, [])


async def test_abandoned_close_leaves_upstream_and_books_the_grant(tmp_path):
    """With `abandoned: close` the upstream is left, and the grant is booked."""
    async with upstream(then="silent") as api, gateway(tmp_path, None, CLOSE, upstream=api.url) as gw:
        async with caller(gw, request(gw)):
            await until(lambda: b"\r\n\r\n" in api.received)
        await until(lambda: api.closed_at)
        await gw.quiet()
        [call] = calls(tmp_path)
        assert (call.reason, call.spent_nano) == ("estimated:no_status", call.grant_nano)


async def test_a_stream_is_never_read_on(tmp_path):
    async with Simulator(behaviour=Behaviour(output_tokens=900, tokens_per_s=100)) as api, gateway(tmp_path, api, FINISH) as gw:
        async with caller(gw, request(gw, stream=True)) as (reader, _):
            await reader.readuntil(b"content_block_delta")
        await gw.quiet()
        [call], [row] = calls(tmp_path), (await api.settled()).messages()
        assert (call.reason, row.delivered) == ("estimated:cut", False)
        assert row.usage.output_tokens < 300


async def test_half_closed_client_gets_its_answer(tmp_path, either_way):
    """A client that closes its side behind its request gets its answer."""
    async with Simulator(behaviour=BRIEF) as api, gateway(tmp_path, api, FINISH) as gw:
        count = request(gw, path="/v1/messages/count_tokens", model=MODEL, messages=[{"role": "user", "content": "Hello"}])
        for sent, field in ((request(gw), "usage"), (count, "input_tokens")):
            async with caller(gw, sent) as (reader, writer):
                writer.write_eof()
                status, _, body = split_answer(await asyncio.wait_for(reader.read(-1), 60))
                assert (status, field in json.loads(body)) == (200, True)
        await gw.quiet()
        assert [call.flags for call in calls(tmp_path) if call.state == "settled"] == [[]]
        assert await gw.spent_nano() == (await api.settled()).billed_nano


async def test_two_requests_before_the_end_get_two_answers(tmp_path):
    async with Simulator(behaviour=BRIEF) as api, gateway(tmp_path, api, FINISH) as gw:
        async with caller(gw, request(gw) + request(gw)) as (reader, writer):
            writer.write_eof()
            assert (await asyncio.wait_for(reader.read(-1), 60)).count(b"HTTP/1.1 200") == 2
        await gw.quiet()
        assert [call.flags for call in calls(tmp_path)] == [[], []]


async def test_half_a_request_before_the_end_is_forgotten(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, FINISH) as gw:
        for sent in (request(gw)[:-5], request(gw) + request(gw)[:-5], request(gw) + b"POST /v1/mess"):
            async with caller(gw, sent) as (reader, writer):
                writer.write_eof()
                await asyncio.wait_for(reader.read(-1), 60)
            await gw.quiet()
        assert len((await api.settled()).messages()) == 2


async def test_a_stream_whose_client_closed_its_side_is_not_begun(tmp_path):
    """It would not be read on, and nobody can tell this client from one that has left."""
    async with Simulator() as api, gateway(tmp_path, api, FINISH) as gw:
        async with caller(gw, request(gw, stream=True)) as (reader, writer):
            writer.write_eof()
            await asyncio.wait_for(reader.read(-1), 60)
        await gw.quiet()
        assert (api.book.requests, await gw.spent_nano(), await gw.held_nano()) == (0, 0, 0)


async def test_an_abandoned_call_keeps_its_concurrent_slot(tmp_path):
    one = {"app": FINISH["app"] + "rates: {concurrent: 1, wait: 0s}\n"}
    async with Simulator(behaviour=replace(BRIEF, tokens_per_s=40)) as api, gateway(tmp_path, api, one) as gw:
        async with caller(gw, request(gw)):
            await until(lambda: api.book.in_flight)
        with pytest.raises(anthropic.RateLimitError, match="as many as it may have at once"):
            await gw.client().messages.create(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "x"}])
        await gw.quiet()
        await gw.client().messages.create(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "x"}])


async def test_a_drain_waits_for_an_abandoned_call(tmp_path):
    async with Simulator(behaviour=BRIEF) as api:
        async with gateway(tmp_path, api, FINISH) as gw:
            async with caller(gw, request(gw)):
                await until(lambda: api.book.in_flight)
        [call], [row] = calls(tmp_path), api.book.messages()
        assert (call.spent_nano, call.flags) == (row.billed_nano, [])


async def test_a_batch_whose_creator_leaves_is_known_all_the_same(tmp_path, monkeypatch):
    asked = {"custom_id": "a", "params": {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}}
    endpoint = Simulator._endpoint

    async def slowly(simulator, exchange, request_id):
        await exchange.pause(0.2)
        await endpoint(simulator, exchange, request_id)

    monkeypatch.setattr(Simulator, "_endpoint", slowly)
    async with Simulator() as api, gateway(tmp_path, api, FINISH) as gw:
        async with caller(gw, request(gw, path="/v1/messages/batches", requests=[asked])):
            await until(lambda: api.book.in_flight)
        await until(lambda: not gw.addon.flow_states)
        assert [batch.id async for batch in gw.client().messages.batches.list()] == list(api.batches.made) != []


async def test_who_leaves_while_waiting_for_budget_is_not_sent(tmp_path, monkeypatch):
    """Whether it left or closed its side only: no place in a queue for somebody who may not be there."""
    monkeypatch.setattr(flows, "HALF_CLOSED_S", 0.05)
    policy = {"app": ALLOW + "caps: {day: $0.008}\n"}
    async with Simulator(behaviour=Behaviour(output_tokens=60, tokens_per_s=60)) as api, gateway(tmp_path, api, policy) as gw:
        async with caller(gw, request(gw)) as (reader, _):
            await until(lambda: api.book.in_flight)
            async with caller(gw, request(gw)):
                await until(lambda: any(flow_state.admitting for flow_state in gw.addon.flow_states.values()))
            await until(lambda: not any(flow_state.admitting for flow_state in gw.addon.flow_states.values()))
            assert api.book.in_flight == 1, "the first one still runs"
            await reader.readuntil(b"usage")
        await gw.quiet()
        assert len((await api.settled()).messages()) == 1
