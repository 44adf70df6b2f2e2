"""The function that takes a batch to a server: it does what the statements do one by one, all of it or nothing, each by key."""

import asyncio
import json
import random
from contextlib import closing
from dataclasses import replace

import psycopg
import pytest
from ledgers import CALL, DAY_CAP, NOON, Cap, Part, balance, new_ledger, rows, until, url, writing

from gateway_addon.ledger import (
    Ledger,
    LedgerUnavailable,
    NameLimit,
    NewCall,
    Outcome,
    RateLimits,
    Reserved,
    Settlement,
    admin,
    connect,
    part_of,
    part_scope,
    reservations,
)
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.store import postgres, postgres_batch
from gateway_addon.ledger.types import RecordedEnd, Reservation

SEARCH = NewCall("search", None, 2, model_asked="claude-sonnet-5", stream=True, input_tokens=40, session_id="s", labels=(("client", "acme"),))
CYCLE = "cycle:17"
KEPT = [("reports", "session", "ever"), ("reports", "session", CYCLE), ("reports", "model", "day"), ("search", "label.client", "week")]
WRITTEN = {
    "calls": "id, state, app, team, token_id, flags, status, ended_at, model_served, complete, labels, day_start, week_start, month_start",
    "entries": "call_id, at, kind, reserved_nano, spent_nano, quantum_nano, open, note",
    "usage": "*",
    "balances": 'scope, "window", window_start, spent_nano, reserved_nano, quantum_nano, open',
    "part_balances": 'scope, "window", window_start, spent_nano, reserved_nano, quantum_nano, open',
    "part_names": "*",
    "minutes": "*",
    "overruns": "*",
}


@pytest.fixture
def server():
    return new_ledger(None, "postgresql")


@pytest.fixture
def store(server, tmp_path):
    store = postgres.ServerStore(server, 2, tmp_path)
    db = store.connect()
    yield store, db
    db.close()


def prepare(place):
    """A ledger in which a call may meet any obstacle."""
    with connect.changing(place) as db:
        for app in ("search", "old"):
            admin.issue_token(db, app, f"of {app}", who="test", now=NOON)
        admin.revoke_tokens(db, "old", who="test", now=NOON)
        admin.raise_cap(db, "total", "day", 300, until=NOON + 900, who="test", now=NOON)
        admin.limit_cap(db, "app:search", "month", 2_500, who="test", now=NOON)
        admin.raise_cap(db, "app:reports session:s2", "ever", 200, until=NOON + 900, who="test", now=NOON)
        admin.limit_cap(db, "app:reports session:others", "ever", 300, who="test", now=NOON)
        admin.pause(db, "app:search", until=NOON + 40, who="test", why="loops", now=NOON)
        admin.pause(db, "total session:s", until=NOON + 90, who="test", now=NOON)
        admin.align(db, "UTC", {"reports": "batch"}, [CYCLE], KEPT, who="test", now=NOON)


def an_ending(chance, known, now):
    flags = chance.choice(((), (), ("late",), ("estimated",), ("drift", "x")))
    parts = tuple(Part(chance.choice((0, 30, 70)), model=chance.choice(("claude-haiku-4-5", None))) for _ in range(chance.randrange(3)))
    cost = chance.choice((None, sum(part.nano for part in parts), 400))
    outcome = Outcome(chance.choice((200, None)), "claude-haiku-4-5", first_byte_at=now, complete=chance.random() < 0.5, flags=flags)
    return RecordedEnd(chance.choice(("settle", "settle", "void")), chance.choice(known), "me", Settlement(cost, parts, outcome), now)


def a_reservation(chance, now):
    caps = [Cap("total", "day", 2_000), Cap("app:reports", "day", 900), Cap("team:batch", "ever", 4_000), Cap("app:search", "month", 9_000)]
    caps += [Cap("total", CYCLE, 6_000), Cap("app:reports", CYCLE, 3_000)]
    few = NameLimit(new_max=1, kept=frozenset(("session",)) if chance.random() < 0.5 else frozenset())
    ours = replace(CALL, session_id=chance.choice(("s1", "s2", "s3", "s4")), model="claude-haiku-4-5", names=few)
    call = chance.choice((ours, ours, CALL, SEARCH, replace(SEARCH, token_id=9), NewCall("old", None, 3), replace(CALL, input_tokens=70)))
    rates = chance.choice((RateLimits(), RateLimits(12, 300, 4)))
    mine = [cap for cap in caps if cap.scope in call.scopes]
    mine += [Cap(part_scope(app, part), window, 700) for part in call.parts for app, kind, window in KEPT if (app, kind) == (call.app, part[0])]
    mine = [cap for cap in mine if part_of(cap.scope) is None] if chance.random() < 0.2 else mine  # as of an app that observes its caps
    mine += [Cap("app:reports session:s1", "week", 50)] * (chance.random() < 0.02 and call.session_id == "s1")  # which nobody keeps
    return Reservation(call, chance.choice((0, 90, 300, 5_000)), chance.sample(mine, len(mine)), chance.choice((0, 50)), rates, now)


def under_a_new_name(now, session):
    call = replace(CALL, session_id=session, names=NameLimit(new_max=1))
    return Reservation(call, 10, [Cap(part_scope("reports", ("session", session)), "ever", 700)], now=now)


def one_by_one(db, asked):
    try:
        return reservations.write(db, "me", asked) if isinstance(asked, Reservation) else reservations.end(db, asked)
    except LedgerUnavailable as error:
        return str(error)


def plain(answer):
    return replace(answer, owner="me") if isinstance(answer, Reserved) else str(answer) if isinstance(answer, Exception) else answer


def parts_written(place):
    return [json.loads(written or "null") for (written,) in rows(place, "SELECT app_parts FROM calls ORDER BY id")]


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_does_what_its_statements_do_one_by_one(server, store, tmp_path, seed):
    """Random batches on a server, one by one on a file: all answers and all rows are the same."""
    file, chance = new_ledger(tmp_path), random.Random(seed)
    for place in (file, server):
        prepare(place)
    store[0]._calendar = postgres_batch.calendar_now(store[1])
    with closing(writing(file)) as of_file:
        known, now = [999], NOON
        for number in range(1, 20):
            now += chance.choice((0, 1, 25))
            asked = [an_ending(chance, known, now) for _ in range(chance.randrange(4))]
            asked += [a_reservation(chance, now) for _ in range(chance.randrange(5))] if known != [999] else [under_a_new_name(now, "x"), under_a_new_name(now, "y")]
            if number % 5 == 0 and known:  # as a sweep leaves it: a bill that comes late only adds
                for place in (file, server):
                    with connect.changing(place) as db:
                        db.execute("UPDATE calls SET flags = 'estimated orphan' WHERE id = $1 AND state = 'settled'", (known[-1],))
            expected = [one_by_one(of_file, each) for each in asked]
            found = store[0].batch(store[1], {"total", "app:reports", "app:search"}, asked, number) if asked else []
            assert [plain(each) for each in found] == expected
            known += [each.call_id for each in expected if isinstance(each, Reserved)]
    for table, columns in WRITTEN.items():
        of_server, of_file = (sorted(rows(place, f"SELECT {columns} FROM {table}"), key=repr) for place in (server, file))
        assert of_server == of_file, table
    assert parts_written(server) == parts_written(file)
    assert rows(server, "SELECT count(*) > 0 FROM part_balances WHERE scope LIKE '%:others'") == [(True,)]
    assert len(known) > 5
    with connect.reading(server) as db:
        assert invariants.findings(db) == []


def test_no_statement_of_a_batch_reads_a_table_from_end_to_end(store):
    """However few rows there are and whatever the planner takes json for."""
    store, db = store
    caps = [Cap("total", "day", 900), Cap("app:reports", "month", 900)]
    held = store.batch(db, {"app:reports", "total"}, [Reservation(CALL, 100, caps, rates=RateLimits(9, 9, 9), now=NOON)] * 3, 1)
    db.execute("ANALYZE")  # a planner that knows how small the tables are would read each as a whole
    ends = [RecordedEnd("settle", each.call_id, store.owner, Settlement(300, (Part(300),)), NOON) for each in held]
    db.execute("BEGIN")
    asked = [Reservation(CALL, 1_000, caps, rates=rates, now=NOON) for rates in (RateLimits(), RateLimits(9, 9, 9))]
    assert store.batch(db, {"app:reports", "total"}, [*ends, *ends, *asked], 2)
    scanned = "SELECT relname FROM pg_stat_xact_user_tables WHERE seq_tup_read > 0 AND relname NOT IN ('settings', 'migrations', 'kept_cycles')"
    assert db.execute(scanned).fetchall() == []
    db.execute("ROLLBACK")


def test_a_fenced_batch_leaves_nothing_behind(server, store):
    store, db = store
    with closing(psycopg.connect(url(server), autocommit=True)) as shell:
        shell.execute("UPDATE gateway.owners SET lease_until = 0")
    with pytest.raises(LedgerUnavailable, match="out of touch"):
        store.batch(db, {"app:reports"}, [Reservation(CALL, 100, DAY_CAP, now=NOON)], 1)
    assert rows(server, "SELECT count(*) FROM calls") == [(0,)]


async def test_one_value_that_cannot_be_stored_spoils_no_other_call(server):
    """PostgreSQL's text holds no NUL: that call is settled at what it held, its neighbours at their bills."""
    ledger = await Ledger.open(url(server), now=NOON)
    held = [await ledger.reserve(CALL, 100, DAY_CAP, now=NOON) for _ in range(3)]
    ends = [ledger.settle(each, Settlement(10, (), Outcome(stop_reason=said)), now=NOON) for each, said in zip(held, "a\0c", strict=True)]
    assert [(await each).spent_nano for each in ends] == [10, 100, 10]
    await ledger.close()
    assert balance(server) == (120, 0, 0)


async def test_the_next_batch_follows_a_calendar_that_has_moved(server):
    ledger = await Ledger.open(url(server), now=NOON)
    await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)
    with connect.changing(server) as db:
        admin.align(db, "Asia/Tokyo", {"reports": "batch"}, who="test", now=NOON)
    moved = await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)
    await ledger.close()
    assert {start for (start,) in rows(server, "SELECT DISTINCT day_start FROM calls")} == {moved.standings[0].starts_at}
    assert moved.standings[0].reserved_nano == 200


async def test_a_batch_looks_at_balances_after_it_has_its_turn(server, store, tmp_path):
    """It waits for another gateway's commit, and judges by what that one wrote."""
    store, db = store
    other = postgres.ServerStore(server, 2, tmp_path)
    store.batch(db, {"app:reports"}, [Reservation(CALL, 0, DAY_CAP, now=NOON)], 1)  # the scope's first call makes its turn
    with closing(other.connect()) as waiting:
        db.execute("BEGIN")
        [first] = store.batch(db, {"app:reports"}, [Reservation(CALL, 600, DAY_CAP, now=NOON)], 2)
        second = asyncio.create_task(
            asyncio.to_thread(other.batch, waiting, {"app:reports"}, [Reservation(CALL, 600, DAY_CAP, now=NOON)], 1)
        )
        await until(lambda: rows(server, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"))
        db.execute("COMMIT")
        [answer] = await second
    assert (isinstance(first, Reserved), answer.reason) == (True, "cap_held")
    assert balance(server) == (0, 600, 2)


async def test_a_user_who_may_make_no_function_writes_one_by_one(server, monkeypatch, caplog):
    monkeypatch.setattr(postgres_batch, "FUNCTION", "DO $$ BEGIN RAISE insufficient_privilege; END $$")
    ledger = await Ledger.open(url(server), now=NOON)
    held = await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)
    assert (await ledger.settle(held, Settlement(10), now=NOON)).first
    await ledger.close()
    assert "may make no temporary function" in caplog.text
    assert balance(server) == (10, 0, 0)
