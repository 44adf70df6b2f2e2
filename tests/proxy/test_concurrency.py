"""Calls beyond an app's concurrency wait in line, through a real mitmproxy, with the SDK's own defaults."""

import asyncio
import sqlite3
from contextlib import closing

import anthropic
import pytest
from gateway import AUTHORITIES, gateway
from ledgers import until

from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("idle_clock")

ASK = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "Tell me a story."}]}
TWO = {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\nrates: {concurrent: 2}\n"}
PIECES = 10


def one(wait: str) -> dict[str, str]:
    return {"app": TWO["app"].replace("concurrent: 2", f"concurrent: 1, wait: {wait}")}


def lasting(seconds: float) -> Behaviour:
    """Answers that take so long."""
    return Behaviour(output_tokens=PIECES, tokens_per_event=1, delay_ms=1_000 * seconds / PIECES)


def rows(folder) -> list[tuple[str, str | None]]:
    with closing(sqlite3.connect(folder / "gateway.db")) as db:
        return db.execute("SELECT state, refusal FROM calls ORDER BY id").fetchall()


@pytest.mark.parametrize("seconds", [0.3, pytest.param(5.0, marks=pytest.mark.soak)])
async def test_eight_parallel_streams_at_two_at_once_all_end_well(tmp_path, seconds):
    """With the SDK's defaults: its timeout, its retries. None is refused, so none is sent twice."""
    most = 0
    async with Simulator(behaviour=lasting(seconds)) as api, gateway(tmp_path, api, TWO) as gw:

        async def stream(client) -> str:
            nonlocal most
            async with client.messages.stream(**ASK) as events:
                async for _ in events.text_stream:
                    most = max(most, len(gw.gateway.streams.running))
                return (await events.get_final_message()).stop_reason

        http = anthropic.DefaultAsyncHttpxClient(verify=AUTHORITIES)
        async with anthropic.AsyncAnthropic(base_url=gw.url, api_key=gw.tokens["app"], http_client=http) as client:
            ends = await asyncio.gather(*(stream(client) for _ in range(8)))
        await gw.quiet()
        assert ends == ["end_turn"] * 8
        assert most == 2
        assert rows(tmp_path) == [("settled", None)] * 8
        assert sum(row.billed_nano for row in api.book.messages()) == await gw.spent_nano()


async def test_a_client_that_leaves_gives_its_place_in_line_away(tmp_path):
    async with Simulator(behaviour=lasting(1.0)) as api, gateway(tmp_path, api, one("20s")) as gw:
        client = gw.client()
        first = asyncio.ensure_future(client.messages.create(**ASK))
        await until(lambda: api.book.in_flight)
        leaver = asyncio.ensure_future(client.messages.create(**ASK))
        await until(lambda: len(gw.addon.flow_states) == 2)
        last = asyncio.ensure_future(client.messages.create(**ASK))
        await until(lambda: len(gw.addon.flow_states) == 3)
        leaver.cancel()
        await until(lambda: len(gw.addon.flow_states) == 2)
        await asyncio.gather(first, last)
        await gw.quiet()
        assert (api.book.requests, await gw.held_nano()) == (2, 0)
        assert [state for state, _ in rows(tmp_path)] == ["settled"] * 2


async def test_a_body_that_waits_in_line_counts_among_those_in_flight(tmp_path):
    large = {**ASK, "messages": [{"role": "user", "content": "x" * 1_600_000}]}
    async with Simulator(behaviour=lasting(1.0)) as api, gateway(tmp_path, api, one("20s"), "bodies_in_flight: 3M") as gw:
        client = gw.client()
        first = asyncio.ensure_future(client.messages.create(**ASK))
        await until(lambda: api.book.in_flight)
        waits = asyncio.ensure_future(client.messages.create(**large))
        await until(lambda: any(each.admitting and each.body_bytes > 1_000_000 for each in gw.addon.flow_states.values()))
        with pytest.raises(anthropic.InternalServerError, match="bodies_in_flight"):
            await client.messages.create(**large)
        await asyncio.gather(first, waits, return_exceptions=True)  # the API finds the large one too long


async def test_a_call_whose_turn_does_not_come_is_told_what_to_expect(tmp_path):
    async with Simulator(behaviour=lasting(0.4)) as api, gateway(tmp_path, api, one("0.7s")) as gw:
        client = gw.client()
        calls = [asyncio.ensure_future(client.messages.create(**ASK)) for _ in range(5)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        refused = [end for end in ends if isinstance(end, anthropic.RateLimitError)]
        assert 1 <= len(refused) <= 4
        for error in refused:
            sentence = error.body["error"]["message"]
            assert sentence.startswith("The app 'app' has 1 call in flight, as many as it may have at once (")
            assert "none ended for this one within 0.7 s (rates.wait)" in sentence
            assert error.response.headers["retry-after"] in ("1", "2", "3")
            assert "x-should-retry" not in error.response.headers
