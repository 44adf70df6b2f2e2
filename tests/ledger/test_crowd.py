"""Many callers, several gateways, one cap: it is never passed, and what it allows can be used."""

import asyncio
import json
import random
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager

import anthropic
import httpx2
import postgresql
import pytest
from gateway import AUTHORITIES
from ledgers import rows, until
from part_levels import part_levels, passed, refused_though_they_fit
from processes import Ledgered, buried, children, kill_in_mid_call, ledgered

from gateway_addon.ledger import connect, part_of
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.ledger.reports import entry_history
from gateway_addon.money import dollars
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.longest

DOLLAR = 1_000_000_000
MODEL = "claude-haiku-4-5"


ODD = [
    {"error": "overloaded_error", "error_after_events": 0},
    {"error": "overloaded_error", "error_after_events": 1, "ping_first": True},
    {"edge": 429},
    {"edge": 502},
    {"edge": 520, "delay_headers_s": 2.2},
    {"whole_start": True},
    {"opening_usage": "zeroes"},
    {"closing_zeroes": True},
]
"""The faults of a fifth of the calls: errors first, broken edges (a third of the late ones bill), usage at one end only."""


async def caller(url, token, chance, said: Counter, **named):
    """One call in one of the ways in which apps call, a third of them broken off by the caller."""
    tokens, stream, leaves = chance.randint(50, 2_000), chance.random() < 0.5, chance.random() < 0.3
    odd = chance.choice(ODD) if chance.random() < 0.2 else {}
    simulate = json.dumps({"tokens_per_s": 350, "after_disconnect_s": 0.3, "tokens_per_event": 20, **odd})
    body = {"model": MODEL, "max_tokens": tokens, "messages": [{"role": "user", "content": f"simulate: {simulate}"}], **named}
    http = anthropic.DefaultAsyncHttpxClient(verify=AUTHORITIES)
    async with anthropic.AsyncAnthropic(base_url=url, api_key=token, http_client=http, max_retries=0, timeout=60) as client:
        try:
            async with asyncio.timeout(chance.uniform(0.05, 2.0) if leaves else None):
                if stream:
                    async with client.messages.stream(**body) as answer:
                        await answer.get_final_message()
                else:
                    await client.messages.create(**body)
            said["answered"] += 1
        except TimeoutError:
            said["left"] += 1
        except anthropic.APIStatusError as error:
            said[error.response.headers.get("x-gateway-refusal", f"upstream {error.status_code}")] += 1
        except (anthropic.APIConnectionError, httpx2.HTTPError):
            said["broken"] += 1


CAPPED = ("cap_spent", "cap_held", "quote_over_cap")


async def until_refused(call, said: Counter, count: int):
    """Call on until so many were refused by a cap: on a slow machine fewer of a crowd's calls are answered, and more given up."""
    for _ in range(20 * count):
        if sum(said[code] for code in CAPPED) > count:
            return
        await call()
    raise AssertionError(said)


def crowds(seeds):
    """The seed and the callers: 200 in the soak, by default as many as want half as much again as the cap allows."""
    return pytest.mark.parametrize(("seed", "callers"), [(0, 80), *(pytest.param(seed, 200, marks=pytest.mark.soak) for seed in range(seeds))])


@crowds(50)
async def test_a_crowd_over_many_gateways_never_passes_one_cap(tmp_path, seed, callers):
    await crowd(tmp_path, seed, callers, gateway_count=2 if callers < 200 else 4)


@crowds(20)
async def test_a_crowd_on_one_server_never_passes_one_cap(tmp_path, seed, callers):
    await crowd(tmp_path, seed, callers, gateway_count=2 if callers < 200 else 3 - seed % 2, ledger=postgresql.shared().ledger())


async def crowd(tmp_path, seed, callers, *, gateway_count, ledger=None):
    chance = random.Random(seed)
    cap_nano = DOLLAR * callers // 600
    async with Simulator(behaviour=Behaviour(hostile=True)) as api:
        gateways = ledgered(tmp_path, api.url, {"app": f"models: {{allow: [{MODEL}]}}\ncaps: {{day: {dollars(cap_nano)}}}\n"}, ledger=ledger)
        said: Counter = Counter()
        async with gateways.serving(gateway_count) as urls:

            async def one():
                await caller(chance.choice(urls), gateways.tokens["app"], chance, said)

            await asyncio.gather(*(one() for _ in range(callers)))
            await until_refused(one, said, callers // 10)
            async with asyncio.timeout(60):
                book = await api.settled()
        rows = {row.request_id: row for row in book.messages()}
        with connect.reading(gateways.ledger) as db:
            calls, levels, wrong = entry_history.forwarded(db), entry_history.high_water(db), findings(db)
            refused = db.execute("SELECT refusal, quote_nano FROM calls WHERE state = 'refused'").fetchall()
    assert ledger in (None, gateways.ledger)
    assert wrong == []
    spent_nano = sum(call.spent_nano for call in calls)
    assert book.billed_nano <= spent_nano <= cap_nano
    peak_nano = max(level.nano for level in levels if level.scope == "app:app")
    assert peak_nano <= cap_nano
    assert all(call.state in ("settled", "voided") for call in calls)
    exact = [call for call in calls if not call.estimated and call.request_id in rows]
    assert all(call.spent_nano == rows.pop(call.request_id).billed_nano for call in exact), "whatever is not marked as an estimate is exact"
    estimated = [call for call in calls if call.estimated]
    assert {call.call_id for call in calls if call.spent_nano} <= {call.call_id for call in (*exact, *estimated)}
    assert all(call.spent_nano >= rows[call.request_id].billed_nano for call in estimated if call.request_id in rows)
    # What is left of the API's book are the bills of the estimates (some left before a status, so that no id is known here): between
    # ledger and book there is nothing but their surpluses.
    surplus_nano = sum(call.spent_nano for call in estimated) - sum(row.billed_nano for row in rows.values())
    assert spent_nano - book.billed_nano == surplus_nano
    # Nobody is refused who would fit: what was spent and held left no room, and where the money is said to be spent, it still is.
    assert all(quote_nano > cap_nano - peak_nano for refusal, quote_nano in refused if refusal == "cap_held")
    assert all(quote_nano > cap_nano - spent_nano for refusal, quote_nano in refused if refusal == "cap_spent")
    assert said["answered"] > 5, said


PARTED = f"""
models: {{allow: [{MODEL}]}}
caps: unlimited
labels: {{client: {{values: [acme, beta, cosi]}}}}
each: """


def caps_of_parts(callers: int) -> dict[tuple[str, str], int]:
    """By kind and window, in nano-dollars: all bind somewhere, and none is used up before most have called."""
    each_caller = {"user": 500_000, "label.client": 750_000, "token": 2_100_000, "model": 2_200_000}
    return {("session", "ever"): 12_000_000, **{(kind, "ever"): callers * nano for kind, nano in each_caller.items()}}


@asynccontextmanager
async def two_gateways(gateways: Ledgered):
    """Two gateways on a server: yields their addresses, and how to kill one in mid call and start it again."""
    running = list(await asyncio.gather(*(gateways.serve() for _ in range(2))))
    urls = [url for _, url in running]

    async def kill(number):
        process, url = running[number]
        await kill_in_mid_call(gateways.ledger, process.pid)
        urls.remove(url)
        await buried(process)
        running[number] = await gateways.serve()
        urls.append(running[number][1])

    yield urls, kill
    for process, _ in running:
        process.terminate()
    for process, _ in running:
        await buried(process)


@asynccontextmanager
async def two_workers(gateways: Ledgered):
    """Two workers of one gateway on a file: yields their address, and how to kill one in mid call; their supervisor starts it again."""
    process, url = await gateways.serve("--workers", "2")

    async def kill(number):  # the elder of the two: the other may still be starting
        await until(lambda: len(children(process.pid)) == 2, 60)
        await kill_in_mid_call(gateways.ledger, children(process.pid)[0])

    yield [url], kill
    process.terminate()
    await buried(process)


@pytest.mark.parametrize(
    ("fleet", "seed", "callers", "sessions"),
    [(two_gateways, 0, 30, 8)]
    + [pytest.param(fleet, seed, 200, 50, marks=pytest.mark.soak) for fleet in (two_gateways, two_workers) for seed in range(1, 9)],
)
async def test_a_crowd_of_sessions_users_and_labels_passes_no_cap(tmp_path, fleet, seed, callers, sessions):
    """In the soak each of the two is killed in the middle, once, and is back.

    No part passes its cap, none is refused that fits in all of its own, and the parts of a kind sum to their app.
    """
    chance, said, at_once, kills = random.Random(seed), Counter(), asyncio.Semaphore(50), 0 if callers < 200 else 2
    caps = caps_of_parts(callers)
    app = PARTED + json.dumps({kind: {window: dollars(nano)} for (kind, window), nano in caps.items()})
    async with Simulator(behaviour=Behaviour(hostile=True)) as api, AsyncExitStack() as at_end:
        server = postgresql.shared().ledger() if fleet is two_gateways else None
        gateways = ledgered(tmp_path, api.url, {"app": app}, ledger=server)
        at_end.push_async_callback(gateways.kill)
        async with fleet(gateways) as (urls, kill):

            async def one():
                session, client = f"s{chance.randrange(sessions)}", chance.choice(["acme", "beta", "cosi"])
                headers = {"x-claude-code-session-id": session, "x-gateway-label-client": client}
                async with at_once:
                    user = {"user_id": f"u{chance.randrange(5)}"}
                    await caller(chance.choice(urls), gateways.tokens["app"], chance, said, metadata=user, extra_headers=headers)

            async def some(count, *doomed):
                before, calling = said.total(), asyncio.gather(*(one() for _ in range(count)))
                for number in doomed:
                    await until(lambda: said.total() >= before + count // 4, 120)
                    await kill(number)
                await calling

            await some(callers // 2, *range(kills)[:1])
            await some(callers // 2, *range(kills)[1:])
            await until_refused(one, said, callers // 10)
            async with asyncio.timeout(60):
                await api.settled()
                while rows(gateways.ledger, "SELECT 1 FROM calls WHERE state = 'open'"):  # a server's lease of the dead has to end
                    await asyncio.sleep(0.5)
        with connect.reading(gateways.ledger) as db:
            calls, wrong = entry_history.forwarded(db), findings(db)
        levels = part_levels(gateways.ledger)
        misjudged = refused_though_they_fit(gateways.ledger, levels, caps)
        sums = dict(rows(gateways.ledger, "SELECT scope, spent_nano FROM part_balances"))
    assert wrong == []
    book = {row.request_id: row.billed_nano for row in api.book.messages()}
    assert all(call.spent_nano >= book[call.request_id] for call in calls if call.request_id in book)
    spent_nano = sum(call.spent_nano for call in calls)
    assert spent_nano >= sum(book.values())
    assert sum("orphan" in call.flags for call in calls) >= kills
    assert {(part_of(scope)[0], "ever") for scope in sums} == set(caps)
    assert passed(levels, caps) == []
    assert all(sum(nano for scope, nano in sums.items() if part_of(scope)[0] == kind) == spent_nano for kind, _ in caps)
    assert misjudged == []
    assert said["answered"] > 5, said
    print(f"{fleet.__name__}, seed {seed}: {len(calls)} calls, {len(levels)} levels of {len(sums)} parts; {dict(said)}")


@pytest.mark.parametrize("cap", [0.2, pytest.param(1, marks=pytest.mark.soak)])
async def test_a_budget_is_usable_down_to_the_quote_of_the_next_call(tmp_path, cap):
    """Without anybody leaving, and with calls that cost just what they are quoted, at least 98 % of the cap is spent.

    A call is quoted some $0.0035, a sixtieth of the cap by default.
    """
    async with Simulator(behaviour=Behaviour(hostile=True)) as api:
        gateways = ledgered(tmp_path, api.url, {"app": f"models: {{allow: [{MODEL}]}}\ncaps: {{day: ${cap}}}\n"})
        async with gateways.serving(2) as urls:
            async with anthropic.AsyncAnthropic(base_url=urls[0], api_key=gateways.tokens["app"], max_retries=0) as client:

                async def spend(url):
                    while True:
                        try:
                            await client.with_options(base_url=url).messages.create(
                                model=MODEL, max_tokens=700, messages=[{"role": "user", "content": "x"}]
                            )
                        except anthropic.RateLimitError as error:
                            if error.response.headers["x-gateway-refusal"] == "cap_spent":
                                return

                await asyncio.gather(*(spend(urls[index % 2]) for index in range(16)))
            book = await api.settled()
        with connect.reading(gateways.ledger) as db:
            spent_nano = sum(call.spent_nano for call in entry_history.forwarded(db))
    assert spent_nano == book.billed_nano
    assert 0.98 * cap * DOLLAR <= spent_nano <= cap * DOLLAR
