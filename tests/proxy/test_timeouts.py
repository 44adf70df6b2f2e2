"""An upstream that accepts and says nothing: the caller is told in the API's shape, the socket is closed, the money is resolved."""

import asyncio
import socket
from contextlib import closing

import anthropic
import pytest
from call_rows import calls
from gateway import gateway
from upstreams import START, upstream

from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("idle_clock")

ASK = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
APPS = {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\nreserve: full\n"}
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(START), START)


def clock_s() -> float:
    return asyncio.get_running_loop().time()


async def timed_out(gw, *, stream: bool = False) -> tuple[float, anthropic.APIStatusError]:
    """How long a call took to fail, and what the SDK raised."""
    began = clock_s()
    with pytest.raises(anthropic.APIStatusError) as raised:
        await gw.client().messages.create(**ASK, stream=stream)
    error = raised.value
    assert (error.status_code, error.body["error"]["type"]) == (504, "timeout_error")
    assert error.response.headers["x-gateway-refusal"] == "upstream_timeout"
    return clock_s() - began, error


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_no_first_byte_is_a_504_and_is_charged_the_grant(tmp_path, stream):
    async with upstream(then="silent") as api, gateway(tmp_path, None, APPS, "timeouts: {first_byte: 0.3s}", upstream=api.url) as gw:
        took_s, error = await timed_out(gw, stream=stream)
        answered = clock_s()
        assert 0.3 <= took_s < 3
        assert "began no answer within 0.3 s" in error.message
        await gw.quiet()
        [call] = calls(tmp_path)
        assert (call.state, call.reason, call.spent_nano) == ("settled", "estimated:no_status", call.grant_nano)
    assert api.closed_at[0] <= answered + 0.1


async def test_endless_tls_handshake_is_a_504_and_costs_nothing(tmp_path):
    """A TLS handshake that does not end is a 504, and costs nothing."""
    async with upstream(then="silent") as api:
        secure = api.url.replace("http://", "https://")
        async with gateway(tmp_path, None, APPS, "timeouts: {connect: 0.3s}", upstream=secure) as gw:
            took_s, error = await timed_out(gw)
            answered = clock_s()
            assert 0.3 <= took_s < 3
            assert "could not be reached within 0.3 s" in error.message
            await gw.quiet()
            [call] = calls(tmp_path)
            assert (call.state, call.spent_nano, await gw.held_nano()) == ("voided", 0, 0)
            assert b"POST" not in api.received
    assert api.closed_at[0] <= answered + 0.1


async def test_unaccepted_connection_is_a_504_and_costs_nothing(tmp_path):
    """A connection that is never accepted is a 504, and costs nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # fill the queue: further connections are not even refused
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        async with gateway(tmp_path, None, APPS, "timeouts: {connect: 0.3s}", upstream=f"http://127.0.0.1:{address[1]}") as gw:
            _, error = await timed_out(gw)
            assert "could not be reached within 0.3 s" in error.message
            await gw.quiet()
            [call] = calls(tmp_path)
            assert (call.state, call.spent_nano, await gw.held_nano()) == ("voided", 0, 0)
        for each in waiting:
            with closing(each):
                pass


async def _collect(said, received: list[bytes]) -> None:
    async for chunk in said.iter_bytes():
        received.append(chunk)


async def test_silence_in_mid_stream_settles_exact_input_and_grant(tmp_path):
    """Silence in mid-stream ends the call, at its exact input and its grant."""
    async with upstream(STREAM, then="silent") as api, gateway(tmp_path, None, APPS, "timeouts: {silence: 0.3s}", upstream=api.url) as gw:
        received, began = [], clock_s()
        async with gw.client().messages.with_streaming_response.create(**ASK, stream=True) as said:
            with pytest.raises(Exception, match=r"closed|incomplete"):
                await _collect(said, received)
        left = clock_s()
        assert b"".join(received) == START, "a broken answer does not look like a whole one"
        assert 0.3 <= left - began < 3
        await gw.quiet()
        [call] = calls(tmp_path)
        assert (call.state, call.reason) == ("settled", "estimated:cut")
        assert 0 < call.spent_nano < call.grant_nano
    assert api.closed_at[0] <= left + 0.1


async def test_a_stream_that_is_slow_but_not_silent_is_left_alone(tmp_path):
    async with Simulator(behaviour=Behaviour(delay_ms=20, output_tokens=600)) as api:
        async with gateway(tmp_path, api, APPS, "timeouts: {silence: 1s, first_byte: 1s}") as gw:
            began = clock_s()
            async with gw.client().messages.stream(**ASK | {"max_tokens": 1000}) as answer:
                await answer.get_final_message()
            assert clock_s() - began > 1.2, "it takes longer than any silence may"
            await gw.quiet()
            assert await gw.spent_nano() == (await api.settled()).billed_nano
