"""kill -9 at any instant: no spend is lost, none is freed, and the cap holds through it."""

import asyncio
import json
import random

import anthropic
import httpx2
import pytest
from processes import ledgered

from gateway_addon.ledger import admin, history
from gateway_addon.ledger.proof import findings
from gateway_addon.simulator import Simulator

DOLLAR = 1_000_000_000


async def keep_calling(urls, token, chance, stop):
    simulate = json.dumps({"tokens_per_s": 300, "output_tokens": 150, "tokens_per_event": 10, "after_disconnect_s": 0.2})
    while not stop.is_set():
        body = {"model": "claude-haiku-4-5", "max_tokens": chance.randint(200, 2_000), "messages": [{"role": "user", "content": f"simulate: {simulate}"}]}
        try:
            async with anthropic.AsyncAnthropic(base_url=urls[-1], api_key=token, max_retries=0, timeout=20) as client:
                if chance.random() < 0.5:
                    async with client.messages.stream(**body) as answer:
                        await answer.get_final_message()
                else:
                    await client.messages.create(**body)
        except (anthropic.APIError, httpx2.HTTPError):
            await asyncio.sleep(0.05)


async def in_flight(ledger, count):
    """Wait until `count` calls hold a reservation: on a busy machine no delay is long enough to promise it."""
    async with asyncio.timeout(30):
        while True:
            with admin.reading(ledger) as db:
                if db.execute("SELECT count(*) AS open FROM calls WHERE state = 'open'").fetchone()["open"] >= count:
                    return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.soak)])
async def test_a_killed_gateway_loses_no_spend_and_frees_none(tmp_path, kills):
    chance = random.Random(kills)
    cap = 3 * kills // 5  # dollars: what is settled at its hold fills it, and a full one leaves nothing to kill
    async with Simulator() as api:
        app = f"models: {{allow: [claude-haiku-4-5]}}\ncaps: {{day: ${cap}}}\nreserve: progressive\n"
        crashing = ledgered(tmp_path, api.url, {"app": app})
        stop = asyncio.Event()
        process, url = await crashing.serve()
        urls = [url]
        callers = [asyncio.ensure_future(keep_calling(urls, crashing.tokens["app"], chance, stop)) for _ in range(8)]
        for _ in range(kills):
            await in_flight(crashing.ledger, 3)
            await asyncio.sleep(chance.uniform(0, 0.2))
            process.kill()
            await process.wait()
            process._transport.close()
            process, url = await crashing.serve()
            urls.append(url)
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*callers)
        process.terminate()
        await asyncio.wait_for(process.wait(), 30)
        process._transport.close()
        async with asyncio.timeout(20):
            book = await api.settled()
        with admin.reading(crashing.ledger) as db:
            calls, levels, wrong = history.forwarded(db), history.high_water(db), findings(db)
    assert wrong == []
    orphans = [call for call in calls if any("orphan" in flag for flag in call.flags)]
    assert len(orphans) >= min(3, kills), "kills that hit nothing prove nothing"
    by_id = {call.request_id: call for call in calls}
    for row in book.messages():
        if row.request_id in by_id:
            assert by_id[row.request_id].spent_nano >= row.billed_nano
    assert sum(call.spent_nano for call in calls) >= book.billed_nano
    assert max(level.nano for level in levels if level.scope == "app:app") <= cap * DOLLAR
    assert all(call.state != "open" for call in calls)
