"""Clients that read slowly or not at all: little of a stream is held for them, and what is generated meanwhile is booked."""

import asyncio
import time

import pytest
from call_rows import calls
from gateway import gateway
from ledgers import until
from mitmproxy.proxy.server import TimeoutWatchdog
from slow import ask, provider, read_slowly

from gateway_addon.proxy.backpressure import SteadyWatchdog
from gateway_addon.proxy.fastpath import connection

HELD_BYTES_MAX = 1_000_000
"""In this process for one stream: mitmproxy reads 64 KB at a time and writes no more once 64 KB wait, asyncio reads 128 KB ahead."""
CAP_NANO = 8_000_000
SLOW = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $0.008}\nreserve: progressive\n"


def held_bytes(gw) -> list[int]:
    """What the gateway holds of each connection's bytes: read and not taken, or written and not sent."""
    handlers = gw.master.addons.get("proxyserver").connections.values()
    return [
        sum(len(io.reader._buffer) + io.writer.transport.get_write_buffer_size() for io in handler.transports.values() if io.writer)
        for handler in handlers
    ]


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_a_step_of_the_clock_is_no_idle_time(monkeypatch, step_s):
    """What mitmproxy compares with its timeout is the time since the last activity, by a clock that never steps."""
    watchdog, now = TimeoutWatchdog(660, lambda: None), time.time
    SteadyWatchdog.take_over(watchdog)
    monkeypatch.setattr(time, "time", lambda: now() + step_s)
    assert 0 <= time.time() - watchdog.last_activity < 60
    watchdog.active_monotonic_s -= 700
    assert 700 <= time.time() - watchdog.last_activity < 760


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "mitmproxy's own"])
async def test_clients_that_stop_reading_make_nothing_grow(tmp_path, monkeypatch, fast):
    """Twenty of them, each in front of a stream that never ends. One that reads again gets it on."""
    monkeypatch.setattr(connection, "FITS", fast)
    async with provider(tokens_per_s=50) as api, gateway(tmp_path, None, upstream=api.url) as gw:
        clients = [ask(gw.port, gw.tokens["app"], str(number)) for number in range(20)]
        before = [-1]
        async with asyncio.timeout(60):
            while len(before) < 20 or before != api.sent_bytes:  # until the provider's own sockets take no more
                before = [*api.sent_bytes]
                await asyncio.sleep(1)
        assert max(held_bytes(gw)) < HELD_BYTES_MAX
        reading = asyncio.ensure_future(read_slowly(clients[0], 1e9))
        await until(lambda: max(api.sent_bytes) > max(before))
        for client in clients:
            client.close()
        await asyncio.wait_for(asyncio.gather(reading, return_exceptions=True), 10)
        await gw.quiet()


async def test_slow_readers_are_booked_at_what_is_generated(tmp_path):
    """The provider generates on while a client keeps the gateway from reading, and its pieces come long after they were generated."""
    speeds = {"crawl": 20_000.0, "walk": 200_000.0, "run": 1_000_000.0}
    async with provider() as api, gateway(tmp_path, None, dict.fromkeys(speeds, SLOW), upstream=api.url, lag_s=0.3) as gw:
        clients = {name: ask(gw.port, gw.tokens[name], name) for name in speeds}
        reading = [asyncio.ensure_future(read_slowly(clients[name], speed)) for name, speed in speeds.items()]
        await until(lambda: len(api.tokens) == len(speeds) and not gw.addon.flow_states)
        for task in reading:  # the slowest would read for minutes what lies in the sockets' buffers
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        await gw.quiet()
        spent = {name: await gw.spent_nano(f"app:{name}") for name in speeds}
        for client in clients.values():
            client.close()
    assert all("cut:budget" in call.flags for call in calls(tmp_path))
    for name in speeds:
        billed_nano = 9 * 1_000 + api.tokens[name] * 5_000
        assert billed_nano <= spent[name] <= CAP_NANO, name
