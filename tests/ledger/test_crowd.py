"""Many callers, several gateways, one cap: it is never passed, and what it allows can be used."""

import asyncio
import gc
import json
import random
from collections import Counter
from contextlib import AsyncExitStack

import anthropic
import httpx2
import postgresql
import pytest
from gateway import AUTHORITIES
from ledgers import rows
from processes import ledgered

from gateway_addon.ledger import connect, part_of, part_scope
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.ledger.reports import entry_history
from gateway_addon.money import dollars
from gateway_addon.simulator import Behaviour, Simulator

# The callers' own library drops its socket when it is cancelled in the middle of connecting. That is no news about the gateways, which are
# processes of their own here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DOLLAR = 1_000_000_000
MODEL = "claude-haiku-4-5"


@pytest.fixture(autouse=True)
def collected():
    """Once nothing of the test is left, its loop neither, those sockets go here, where they are passed over: not in the middle of another."""
    yield
    gc.collect()


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
            await asyncio.gather(*(caller(chance.choice(urls), gateways.tokens["app"], chance, said) for _ in range(callers)))
            async with asyncio.timeout(20):
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
    assert said["cap_spent"] + said["cap_held"] + said["quote_over_cap"] > callers // 10, said


EACH = {"session": 0.012, "user": 0.05, "label.client": 0.07, "token": 0.2, "model": 0.2}
PARTED = f"""
models: {{allow: [{MODEL}]}}
caps: unlimited
labels: {{client: {{values: [acme, beta, cosi]}}}}
each: {{{", ".join(f"{kind}: {{ever: ${cap}}}" for kind, cap in EACH.items())}}}
"""


@pytest.mark.parametrize(
    ("seed", "callers", "sessions"), [(0, 30, 8), *(pytest.param(seed, 200, 50, marks=pytest.mark.soak) for seed in range(1, 9))]
)
async def test_a_crowd_of_sessions_users_and_labels_passes_no_cap(tmp_path, seed, callers, sessions):
    """Over two gateways on one server; in the soak one of them is killed in the middle, and the other settles what it held.

    No part passes its cap, none is refused that fits in all of its own, and the parts of a kind sum to their app.
    """
    chance, said, server = random.Random(seed), Counter(), postgresql.shared().ledger()
    async with Simulator(behaviour=Behaviour(hostile=True)) as api:
        gateways = ledgered(tmp_path, api.url, {"app": PARTED}, ledger=server)
        async with gateways.serving(2) as urls, AsyncExitStack() as also:
            if callers >= 200:
                doomed, address = await gateways.serve()
                also.callback(doomed._transport.close)
                urls = [*urls, address]
                asyncio.get_running_loop().call_later(3, doomed.kill)

            async def one():
                await asyncio.sleep(chance.uniform(0, callers / 30))  # as many a second as a busy server takes, whose caps are many
                session, client = f"s{chance.randrange(sessions)}", chance.choice(["acme", "beta", "cosi"])
                headers = {"x-claude-code-session-id": session, "x-gateway-label-client": client}
                user = {"user_id": f"u{chance.randrange(5)}"}
                await caller(chance.choice(urls), gateways.tokens["app"], chance, said, metadata=user, extra_headers=headers)

            await asyncio.gather(*(one() for _ in range(callers)))
            async with asyncio.timeout(30):
                await api.settled()
                while callers >= 200 and rows(server, "SELECT 1 FROM calls WHERE state = 'open'"):
                    await asyncio.sleep(0.5)
        with connect.reading(server) as db:
            levels, wrong = entry_history.high_water(db), findings(db)
        refused = rows(server, "SELECT refusal, quote_nano, session_id, user_id, labels FROM calls WHERE state = 'refused'")
        sums = rows(server, "SELECT scope, CAST(spent_nano AS BIGINT) FROM part_balances")
        [(spent_nano,)] = rows(server, "SELECT CAST(sum(spent_nano) AS BIGINT) FROM entries")
    assert wrong == []
    caps = {kind: round(cap * DOLLAR) for kind, cap in EACH.items()}
    peaks = Counter({level.scope: level.nano for level in levels if part_of(level.scope)})
    assert {part_of(scope)[0] for scope in peaks} == set(EACH)
    assert all(nano <= caps[part_of(scope)[0]] for scope, nano in peaks.items())
    assert all(sum(nano for scope, nano in sums if part_of(scope)[0] == kind) == spent_nano for kind in EACH)
    for refusal, quote_nano, session, user, labels in refused:
        named = {"session": session, "user": user, "label.client": json.loads(labels)["client"], "token": "1", "model": MODEL}
        left_nano = min(caps[kind] - peaks[part_scope("app", (kind, value))] for kind, value in named.items())
        assert quote_nano > left_nano or refusal not in ("cap_held", "cap_spent"), (refusal, quote_nano, named)
    assert said["answered"] > 5, said
    assert said["cap_spent"] + said["cap_held"] + said["quote_over_cap"] > callers // 10, said


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
