"""kill -9 at any instant: no spend is lost, none is freed, and the cap holds through it."""

import asyncio
import json
import random
from collections import Counter
from contextlib import AsyncExitStack, suppress
from functools import partial
from uuid import uuid4

import anthropic
import httpx2
import postgresql
import pytest
from ledgers import rows, until
from processes import buried, in_flight, kill_in_mid_call, ledgered

from gateway_addon.ledger import Ledger, connect
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.ledger.reports import entry_history
from gateway_addon.money import dollars
from gateway_addon.simulator import Simulator

pytestmark = pytest.mark.longest

DOLLAR = 1_000_000_000


def nothing_is_lost(calls, levels, book, caps: dict[str, int]) -> None:
    """No call is booked below its bill, nor all of them together, and no cap was ever passed (nano-dollars by scope)."""
    by_id = {call.request_id: call for call in calls}
    for row in book.messages():
        if row.request_id in by_id:
            assert by_id[row.request_id].spent_nano >= row.billed_nano
    assert sum(call.spent_nano for call in calls) >= book.billed_nano
    peaks = Counter({level.scope: level.nano for level in levels})
    assert all(0 < peaks[scope] <= cap_nano for scope, cap_nano in caps.items()), (peaks, caps)


async def keep_calling(urls, token, chance, stop, seen=None):
    """Call until told to stop, each call as a session of its own. `seen` is given the request id of each answer that begins, by session."""
    seen = {} if seen is None else seen
    simulate = json.dumps({"tokens_per_s": 300, "output_tokens": 150, "tokens_per_event": 10, "after_disconnect_s": 0.2})
    async with anthropic.AsyncAnthropic(api_key=token, max_retries=0, timeout=20) as client:
        while not stop.is_set():
            body = {"model": "claude-haiku-4-5", "max_tokens": chance.randint(200, 2_000), "messages": [{"role": "user", "content": f"simulate: {simulate}"}]}
            session = str(uuid4())
            body |= {"metadata": {"user_id": f"u{chance.randrange(3)}"}, "extra_headers": {"x-claude-code-session-id": session}}
            messages = client.with_options(base_url=urls[-1]).messages
            try:
                if chance.random() < 0.5:
                    async with messages.stream(**body) as answer:
                        seen[session] = answer.response.headers["request-id"]
                        await answer.get_final_message()
                else:
                    seen[session] = (await messages.create(**body))._request_id
            except (anthropic.APIError, httpx2.HTTPError):
                await asyncio.sleep(0.2)


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
            await in_flight(crashing.ledger, 3, process.pid)
            await asyncio.sleep(chance.uniform(0, 0.2))
            await kill_in_mid_call(crashing.ledger, process.pid)
            await buried(process)
            process, url = await crashing.serve()
            urls.append(url)
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*callers)
        process.terminate()
        await buried(process)
        async with asyncio.timeout(60):
            book = await api.settled()
        with connect.reading(crashing.ledger) as db:
            calls, levels, wrong = entry_history.forwarded(db), entry_history.high_water(db), findings(db)
    assert wrong == []
    orphans = [call for call in calls if any("orphan" in flag for flag in call.flags)]
    assert len(orphans) >= kills
    nothing_is_lost(calls, levels, book, {"app:app": cap * DOLLAR})
    assert all(call.state != "open" for call in calls)


WAYS = {"killed": postgresql.Postgres.kill, "crash": postgresql.Postgres.stop, "restart": lambda server: server.stop("fast")}
"""How a server goes: its first process killed (its others go on to their end), all at once, or as an operator restarts it."""
SCENES = ("a gateway, then the server", "the server, then a gateway", "the server alone", "all at once")


@pytest.mark.parametrize(
    ("seed", "scenes"), [(0, SCENES[:2]), *(pytest.param(seed, None, marks=pytest.mark.soak) for seed in range(1, 21))]
)
async def test_killed_gateways_and_a_killed_server_pass_no_cap(tmp_path, monkeypatch, seed, scenes):
    """In mid-load, again and again: gateways are killed, and the server goes in one of its ways and is back.

    No cap is passed, an app's or a part's; each call is resolved once; whatever the API answered has a row that pays for it, whatever a
    client saw of it.
    """
    chance = random.Random(seed)
    scenes = scenes or [chance.choice(SCENES) for _ in range(4)]
    caps = {"app:app": 2 * len(scenes) * DOLLAR, **{f"app:app user:u{number}": len(scenes) * DOLLAR * 2 // 3 for number in range(3)}}
    app = f"models: {{allow: [claude-haiku-4-5]}}\ncaps: {{day: {dollars(caps['app:app'])}}}\neach: {{user: {{ever: {dollars(caps['app:app user:u0'])}}}}}\n"
    monkeypatch.setenv("HOME", str(tmp_path))  # the journals' place, also of the gateways
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    journals = tmp_path / ".local/state/gateway/unwritten"
    kept, seen = [], {}
    with postgresql.crashing() as server:

        def journal_of(process):
            return list(journals.glob(f"*/*-{process.pid}-*"))

        async def goes():
            await asyncio.to_thread(WAYS[chance.choice(list(WAYS))], server)
            await asyncio.sleep(chance.uniform(0, 1))

        async with Simulator() as api, AsyncExitStack() as at_end:
            gateways = ledgered(tmp_path, api.url, {"app": app}, ledger=server.ledger())
            at_end.push_async_callback(gateways.kill)
            stop = asyncio.Event()
            running = list(await asyncio.gather(*(gateways.serve() for _ in range(2))))
            urls = [[url] for _, url in running]
            callers = [asyncio.ensure_future(keep_calling(urls[number % 2], gateways.tokens["app"], chance, stop, seen)) for number in range(8)]
            for scene in scenes:
                doomed = [0, 1] if scene == "all at once" else [chance.randrange(2)]
                processes = [running[number][0] for number in doomed]
                for process in processes:
                    await in_flight(gateways.ledger, 2, process.pid)
                if scene == "a gateway, then the server":
                    await kill_in_mid_call(gateways.ledger, processes[0].pid)
                    kept += journal_of(processes[0])  # after an earlier outage it may know how all of its calls ended
                if scene == "all at once":
                    for process in processes:
                        await kill_in_mid_call(gateways.ledger, process.pid)
                await goes()
                if scene == "the server, then a gateway":
                    with suppress(AssertionError):  # no call may have ended meanwhile
                        await until(partial(journal_of, processes[0]), 5)
                    kept += journal_of(processes[0])
                    processes[0].kill()
                await asyncio.to_thread(server.start)
                if scene == "the server alone":
                    await asyncio.gather(*(in_flight(gateways.ledger, 1, process.pid) for process, _ in running))
                    continue
                for number, process in zip(doomed, processes, strict=True):
                    await buried(process)
                    running[number] = await gateways.serve()
                    urls[number].append(running[number][1])
            await asyncio.sleep(0.5)
            stop.set()
            await asyncio.gather(*callers)
            for process, _ in running:
                process.terminate()
            for process, _ in running:
                await buried(process)
            with connect.changing(gateways.ledger) as db:
                db.execute("UPDATE owners SET lease_until = 0")  # the time of a lease passes
            await (await Ledger.open(gateways.ledger.url)).close()
            async with asyncio.timeout(60):
                book = await api.settled()
        with connect.reading(gateways.ledger) as db:
            calls, levels, wrong = entry_history.forwarded(db), entry_history.high_water(db), findings(db)
        ends = rows(gateways.ledger, "SELECT call_id, count(*) FROM entries WHERE kind IN ('settle', 'void') GROUP BY call_id")
        sessions = dict(rows(gateways.ledger, "SELECT session_id, id FROM calls WHERE state IN ('settled', 'voided')"))
        [(forwarded,)] = rows(gateways.ledger, "SELECT count(*) FROM calls WHERE state IN ('settled', 'voided')")
    assert wrong == []
    assert {call.state for call in calls} <= {"settled", "voided"}
    assert dict(ends) == {call.call_id: 1 for call in calls}, "each call is resolved once"
    nothing_is_lost(calls, levels, book, caps)
    assert len(sessions) == forwarded, "no call is in the ledger twice"
    spent_nano = {call.call_id: call.spent_nano for call in calls}
    for row in book.messages():
        session = dict(row.headers)["x-claude-code-session-id"]
        assert spent_nano[sessions[session]] >= row.billed_nano, "whatever was sent to the API has a row that pays for it"
    assert seen
    assert set(seen) <= set(sessions), "no client has seen an answer without a row"
    request_ids = {call.call_id: call.request_id for call in calls if not {"orphan", "unstorable"} & set(call.flags)}
    assert all(request_ids.get(sessions[session], told) == told for session, told in seen.items())
    assert sum("orphan" in call.flags for call in calls) + len(kept) >= sum(scene in (SCENES[0], SCENES[3]) for scene in scenes)
    assert list(journals.glob("*/*")) == []
    print(f"seed {seed}: {', '.join(scenes)}; {len(calls)} calls, {len(seen)} answers seen, {len(kept)} journals left behind")
