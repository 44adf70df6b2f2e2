"""kill -9 at any instant: no spend is lost, none is freed, and the cap holds through it."""

import asyncio
import json
import random
import signal

import anthropic
import httpx2
import postgresql
import pytest
from ledgers import until
from processes import ledgered

from gateway_addon.ledger import Ledger, connect
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.ledger.reports import entry_history
from gateway_addon.simulator import Simulator

DOLLAR = 1_000_000_000


def nothing_is_lost(calls, levels, book, cap: float) -> None:
    """No call is booked below its bill, nor all of them together, and the cap was never passed."""
    by_id = {call.request_id: call for call in calls}
    for row in book.messages():
        if row.request_id in by_id:
            assert by_id[row.request_id].spent_nano >= row.billed_nano
    assert sum(call.spent_nano for call in calls) >= book.billed_nano
    assert max(level.nano for level in levels if level.scope == "app:app") <= cap * DOLLAR


async def keep_calling(urls, token, chance, stop):
    simulate = json.dumps({"tokens_per_s": 300, "output_tokens": 150, "tokens_per_event": 10, "after_disconnect_s": 0.2})
    async with anthropic.AsyncAnthropic(api_key=token, max_retries=0, timeout=20) as client:
        while not stop.is_set():
            body = {"model": "claude-haiku-4-5", "max_tokens": chance.randint(200, 2_000), "messages": [{"role": "user", "content": f"simulate: {simulate}"}]}
            messages = client.with_options(base_url=urls[-1]).messages
            try:
                if chance.random() < 0.5:
                    async with messages.stream(**body) as answer:
                        await answer.get_final_message()
                else:
                    await messages.create(**body)
            except (anthropic.APIError, httpx2.HTTPError):
                await asyncio.sleep(0.2)


async def kill(process):
    process.kill()
    await process.wait()
    process._transport.close()


def calls_open(ledger, process):
    with connect.reading(ledger) as db:
        query = "SELECT count(*) AS open FROM calls WHERE state = 'open' AND owner LIKE $1"
        return db.execute(query, (f"%-{process.pid}-%",)).fetchone()["open"]


async def in_flight(ledger, count, process):
    """Wait until `count` calls of this gateway hold a reservation: on a busy machine no delay is long enough to promise it."""
    await until(lambda: calls_open(ledger, process) >= count)


async def kill_in_mid_call(ledger, process):
    """Stop it wherever it is, and kill it there if it holds a call: a kill that hits nothing proves nothing."""
    async with asyncio.timeout(30):
        while True:
            process.send_signal(signal.SIGSTOP)
            if calls_open(ledger, process):
                return await kill(process)
            process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.soak)])
async def test_a_killed_gateway_loses_no_spend_and_frees_none(tmp_path, kills):
    chance = random.Random(kills)
    cap = (3 * kills + 4) // 5  # dollars: what is settled at its hold fills it, and a full one leaves nothing to kill
    async with Simulator() as api:
        app = f"models: {{allow: [claude-haiku-4-5]}}\ncaps: {{day: ${cap}}}\nreserve: progressive\n"
        crashing = ledgered(tmp_path, api.url, {"app": app})
        stop = asyncio.Event()
        process, url = await crashing.serve()
        urls = [url]
        callers = [asyncio.ensure_future(keep_calling(urls, crashing.tokens["app"], chance, stop)) for _ in range(8)]
        for _ in range(kills):
            await in_flight(crashing.ledger, 3, process)
            await asyncio.sleep(chance.uniform(0, 0.2))
            await kill_in_mid_call(crashing.ledger, process)
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
        with connect.reading(crashing.ledger) as db:
            calls, levels, wrong = entry_history.forwarded(db), entry_history.high_water(db), findings(db)
    assert wrong == []
    orphans = [call for call in calls if any("orphan" in flag for flag in call.flags)]
    assert len(orphans) >= kills
    nothing_is_lost(calls, levels, book, cap)
    assert all(call.state != "open" for call in calls)


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.soak)])
async def test_killed_gateways_and_a_crashing_server_pass_no_cap(tmp_path, rounds):
    """In each round, in mid-load: one gateway is killed, the server crashes; the other goes on with it; it crashes again, and that one is
    killed before it is back."""
    chance = random.Random(rounds)
    cap = 2 * rounds
    app = f"models: {{allow: [claude-haiku-4-5]}}\ncaps: {{day: ${cap}}}\n"
    with postgresql.crashing() as server:
        async with Simulator() as api:
            gateways = ledgered(tmp_path, api.url, {"app": app}, ledger=server.ledger())
            home = {"HOME": str(tmp_path)}
            stop = asyncio.Event()
            running = await asyncio.gather(*(gateways.serve(**home) for _ in range(2)))
            urls = [[url] for _, url in running]
            callers = [asyncio.ensure_future(keep_calling(urls[number % 2], gateways.tokens["app"], chance, stop)) for number in range(8)]
            for _ in range(rounds):
                await in_flight(gateways.ledger, 2, running[0][0])
                await kill_in_mid_call(gateways.ledger, running[0][0])
                await asyncio.to_thread(server.stop)
                await asyncio.sleep(chance.uniform(0, 1))
                await asyncio.to_thread(server.start)
                await in_flight(gateways.ledger, 2, running[1][0])
                await asyncio.to_thread(server.stop)
                await asyncio.sleep(chance.uniform(0.6, 1.2))
                await kill(running[1][0])
                await asyncio.to_thread(server.start)
                running = await asyncio.gather(*(gateways.serve(**home) for _ in range(2)))
                for known, (_, url) in zip(urls, running, strict=True):
                    known.append(url)
            await asyncio.sleep(0.5)
            stop.set()
            await asyncio.gather(*callers)
            for process, _ in running:
                process.terminate()
            for process, _ in running:
                await asyncio.wait_for(process.wait(), 30)
                process._transport.close()
            with connect.changing(gateways.ledger) as db:
                db.execute("UPDATE owners SET lease_until = 0")  # the time of a lease passes
            await (await Ledger.open(gateways.ledger.url)).close()
            async with asyncio.timeout(20):
                book = await api.settled()
        with connect.reading(gateways.ledger) as db:
            calls, levels, wrong = entry_history.forwarded(db), entry_history.high_water(db), findings(db)
    assert wrong == []
    assert all(call.state != "open" for call in calls)
    nothing_is_lost(calls, levels, book, cap)
    assert sum("orphan" in call.flags for call in calls) >= rounds
    assert list(tmp_path.glob(".gateway/unwritten/*/*")) == []
