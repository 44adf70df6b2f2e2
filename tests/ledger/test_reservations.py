"""The ledger's promises on one process: what is held, what is refused and why, what resolves, what is never done twice."""

import asyncio
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledgers import CALL, DAY_CAP, NOON, Cap, Part, Tokens, balance, new_ledger, rows, until, url, writing

from gateway_addon.ledger import (
    Alert,
    Denied,
    Ledger,
    LedgerUnavailable,
    Outcome,
    Pause,
    RateLimits,
    Reserved,
    Settlement,
    TokenLookup,
    admin,
    connect,
    parts,
    reservations,
)
from gateway_addon.ledger.denials import judge
from gateway_addon.ledger.store import balances
from gateway_addon.windows import WINDOWS


@pytest.fixture
async def ledger(path):
    opened = await Ledger.open(url(path), now=NOON)
    yield opened
    await opened.close()


def hold(db, nano, caps=DAY_CAP, call=CALL, now=NOON, **options):
    return reservations.reserve(db, "me", call, nano, caps, now=now, **options)


# --- reserve, and why not


def test_a_reservation_counts_in_every_scope_and_window(db, path):
    """Whether capped or not."""
    hold(db, 300)
    held = rows(path, 'SELECT scope, "window", reserved_nano FROM balances')
    assert sorted(held) == sorted((scope, window, 300) for scope in ("total", "team:batch", "app:reports") for window in WINDOWS)


def test_a_cap_can_be_used_to_the_last_nano_and_not_beyond(db):
    assert isinstance(hold(db, 999), Reserved)
    assert isinstance(hold(db, 1), Reserved)
    assert hold(db, 1).reason == "cap_held"


@pytest.mark.parametrize("scope", ["total", "team:batch", "app:reports"])
@pytest.mark.parametrize("window", WINDOWS)
def test_each_cap_holds_on_its_own(db, scope, window):
    hold(db, 60, [Cap(scope, window, 100)])
    wide = [Cap(other, window, 10_000) for other in ("total", "team:batch", "app:reports") if other != scope]
    denied = hold(db, 60, [*wide, Cap(scope, window, 100)])
    assert (denied.reason, denied.standing.scope, denied.standing.window) == ("cap_held", scope, window)
    assert (denied.standing.spent_nano, denied.standing.reserved_nano, denied.standing.cap_nano) == (0, 60, 100)


def test_a_spent_cap_refuses_until_its_reset_a_held_one_shortly(db):
    first = hold(db, 900)
    assert hold(db, 200).reason == "cap_held"
    reservations.settle(db, first.call_id, Settlement(900), now=NOON)
    denied = hold(db, 200)
    assert (denied.reason, denied.retry_after_s) == ("cap_spent", 12 * 3600)


def test_the_spent_cap_that_lasts_longest_is_named(db):
    caps = [Cap("app:reports", "day", 100), Cap("app:reports", "month", 100)]
    reservations.settle(db, hold(db, 100, caps).call_id, Settlement(100), now=NOON)
    assert hold(db, 1, caps).standing.window == "month"


def test_a_call_larger_than_a_whole_window_is_told_so(db):
    assert hold(db, 1001).reason == "quote_over_cap"


def test_a_request_cap_is_not_the_ledgers_business(db):
    assert isinstance(hold(db, 500, [Cap("app:reports", "request", 1)]), Reserved)


def test_a_streams_next_quantum_is_free_for_top_ups_alone(db):
    """New calls cannot have it."""
    stream = hold(db, 400, quantum_nano=300)
    assert hold(db, 301).reason == "cap_held"
    other = hold(db, 300)
    assert reservations.extend(db, other.call_id, 300, DAY_CAP, now=NOON)
    assert not reservations.extend(db, stream.call_id, 1, DAY_CAP, now=NOON)
    reservations.settle(db, other.call_id, Settlement(0), now=NOON)
    assert reservations.extend(db, stream.call_id, 600, DAY_CAP, now=NOON)


def test_a_stream_beyond_an_idle_window_gets_no_wait(db):
    assert hold(db, 800, quantum_nano=300).reason == "quote_over_cap"


def test_a_raise_lifts_a_cap_until_its_end(db):
    admin.raise_cap(db, "app:reports", "day", 500, until=NOON + 60, who="ops", now=NOON)
    reserved = hold(db, 1500)
    assert (reserved.standings[0].cap_nano, reserved.standings[0].raised_nano) == (1500, 500)
    reservations.void(db, reserved.call_id, Outcome(), now=NOON)
    assert hold(db, 1500, now=NOON + 60).reason == "quote_over_cap"


@pytest.mark.parametrize("scope", ["total", "team:batch", "app:reports"])
def test_a_limit_binds_below_cap_and_raises(db, scope):
    caps = [Cap(scope, "day", 1000)]
    running = hold(db, 300, caps)
    admin.raise_cap(db, scope, "day", 500, until=NOON + 60, who="ops", now=NOON)
    admin.limit_cap(db, scope, "day", 400, who="ops", now=NOON)
    denied = hold(db, 101, caps)
    assert (denied.reason, denied.standing.cap_nano, denied.standing.limit_nano, denied.standing.is_limited) == ("cap_held", 400, 400, True)
    assert not reservations.extend(db, running.call_id, 101, caps, now=NOON), "a top-up is judged by it too"
    assert isinstance(hold(db, 100, caps), Reserved)
    admin.lift_limit(db, scope, "day", who="ops", now=NOON)
    assert isinstance(hold(db, 1100, caps), Reserved)


def test_a_limit_above_the_cap_changes_nothing(db):
    admin.limit_cap(db, "app:reports", "day", 5000, who="ops", now=NOON)
    assert hold(db, 1001).standing.cap_nano == 1000
    standing = hold(db, 1000).standings[0]
    assert (standing.cap_nano, standing.is_limited) == (1000, False)


async def test_a_limit_in_mid_storm_holds_from_the_next_call(ledger, path):
    """Every call that is asked after the change returned is judged by it, whatever came before: none passes the limit."""
    caps, admitted = [Cap("total", "day", 10_000)], 0

    async def storm(count):
        asked = [ledger.reserve(CALL, 10, caps, now=NOON) for _ in range(count)]
        return sum([isinstance(answer, Reserved) for answer in await asyncio.gather(*asked)])

    before = asyncio.create_task(storm(60))
    await asyncio.sleep(0)
    await ledger.change(lambda db: admin.limit_cap(db, "total", "day", 800, who="ops", now=NOON))
    after = await asyncio.gather(storm(60), storm(60))
    admitted = await before + sum(after)
    assert admitted == 80
    assert balance(path, "total", "day")[:2] == (0, 800)


PARTED = replace(
    CALL, session_id="s%1", agent_id="a_1", parent_agent_id="a_0", user_id="U: 1", labels=(("client", "ac|me"),), model="claude-haiku-4-5"
)  # fmt: skip


@pytest.mark.parametrize("within", ["total", "app:reports"])
@pytest.mark.parametrize("part", ["session:s%1", "agent:a_1", "agent:a_0", "user:U: 1", "label.client:ac|me"])
def test_a_pause_of_a_part_refuses_its_calls_alone(db, within, part):
    """No other value, no value that a pattern would take for it, and no other app's, is refused."""
    admin.pause(db, f"{within} {part}", who="ops", now=NOON)
    assert hold(db, 1, call=PARTED).reason == "paused"
    for other in (CALL, replace(PARTED, session_id="s%12", agent_id="a_", parent_agent_id="A_1", user_id="u: 1", labels=(("client", "ac"),))):
        assert isinstance(hold(db, 1, call=other), Reserved)
    admin.resume(db, f"{within} {part}", who="ops", now=NOON)
    admin.pause(db, f"app:other {part}", who="ops", now=NOON)
    assert isinstance(hold(db, 1, call=PARTED), Reserved)


@pytest.mark.parametrize("scope", ["total", "team:batch", "app:reports"])
def test_a_pause_refuses_until_its_end_or_resume(db, scope):
    admin.pause(db, scope, until=NOON + 60, who="ops", now=NOON)
    assert hold(db, 1) == Denied("paused", pause=Pause(scope, NOON, NOON + 60, ""))
    assert isinstance(hold(db, 1, now=NOON + 60), Reserved)
    admin.pause(db, scope, who="ops", now=NOON)
    assert hold(db, 1, now=NOON + 61).reason == "paused"
    assert admin.resume(db, scope, who="ops", now=NOON)
    assert isinstance(hold(db, 1), Reserved)


def test_the_token_is_judged_again_with_the_money(db):
    expiring = admin.issue_token(db, "reports", "d2", expires_at=NOON + 10, who="ops", now=NOON)
    call = replace(CALL, token_id=expiring.id)
    assert isinstance(hold(db, 1, call=call), Reserved)
    assert hold(db, 1, call=call, now=NOON + 10).reason == "token_expired"
    admin.revoke_tokens(db, "reports", token_id=1, who="ops", now=NOON)
    assert hold(db, 1).reason == "token_revoked"
    assert hold(db, 1, call=replace(CALL, token_id=99)).reason == "token_unknown"
    assert hold(db, 1, call=replace(call, app="other")).reason == "token_unknown"


def test_no_call_is_taken_where_none_may_run(db):
    assert hold(db, 1, rates=RateLimits(concurrent=0)).reason == "concurrency"


def test_the_statement_and_the_pure_judgement_agree(db):
    """SQL enforces, values explain: over random standings and clocks they say the same, on both engines."""
    random, now, running, said = Random(23), NOON, [], Counter()
    tokens = [admin.issue_token(db, "reports", f"t{at}", expires_at=NOON + at, who="ops", now=NOON) for at in (60, 3000)]
    for number in range(150):
        now += random.choice((0, 0, 0.5, 1, 7, 61))
        if running and random.random() < 0.4:
            reservations.settle(db, running.pop(random.randrange(len(running))), Settlement(random.randrange(60)), now=now)
        if number % 30 == 20:
            admin.pause(db, random.choice(("total", "team:batch", "team:other", "app:reports")), until=now + 5, who="ops", now=now)
        if number % 30 == 10:
            admin.raise_cap(db, "app:reports", "day", 100, until=now + 20, who="ops", now=now)
        caps = [Cap(scope, window, random.choice((0, 100, 500, 2000))) for scope in ("total", "app:reports") for window in random.sample(WINDOWS, 2)]
        limits = RateLimits(*(random.choice((None, None, *some)) for some in ((0, 3, 9), (500, 3000), (0, 1, 4))))
        call = replace(CALL, token_id=random.choice((1, 1, 1, 99, *(token.id for token in tokens))), input_tokens=random.randrange(900))
        grant_nano, quantum_nano = random.randrange(120), random.choice((0, 0, 40))
        expected = judge(reservations.facts(db, call, caps, now=now), limits, grant_nano, quantum_nano, call.input_tokens, now)
        answer = hold(db, grant_nano, caps, call, now, quantum_nano=quantum_nano, rates=limits)
        said[expected and expected.reason] += 1
        if isinstance(answer, Reserved):
            assert expected is None
            running.append(answer.call_id)
        else:
            assert answer == expected
    assert len(said) >= 8, f"too little was tried: {said}"


def test_a_running_call_settles_after_its_token_is_revoked(db):
    running = hold(db, 100)
    admin.revoke_tokens(db, "reports", who="ops", now=NOON)
    assert reservations.settle(db, running.call_id, Settlement(70), now=NOON).first


def test_concurrency_counts_open_calls_only(db):
    limits = RateLimits(concurrent=2)
    first = hold(db, 1, rates=limits)
    hold(db, 1, rates=limits)
    assert hold(db, 1, rates=limits) == Denied("concurrency", limit="concurrent", limit_max=2, used=2)
    reservations.settle(db, first.call_id, Settlement(1), now=NOON)
    assert isinstance(hold(db, 1, rates=limits), Reserved)


@pytest.mark.parametrize(
    ("limits", "call"),
    [
        (RateLimits(requests_per_minute=4), CALL),
        (RateLimits(input_tokens_per_minute=4000), replace(CALL, input_tokens=1000)),
    ],
)
def test_a_rate_holds_over_any_minute_and_names_when_to_retry(db, limits, call):
    admitted = []
    now = NOON + 45
    while now < NOON + 600:
        answer = hold(db, 0, call=call, rates=limits, now=now)
        if isinstance(answer, Denied):
            assert (answer.reason, answer.limit_max) == ("rate", getattr(limits, answer.limit))
            waited = hold(db, 0, call=call, rates=limits, now=now + answer.retry_after_s - 1) if answer.retry_after_s > 1 else None
            assert waited is None or isinstance(waited, Denied), "it could have come earlier"
            now += answer.retry_after_s
        else:
            admitted.append(now)
    assert len(admitted) >= 25
    # The sliding count assumes an even spread within the last calendar minute; no sixty seconds see a double burst.
    assert max(sum(start <= each < start + 60 for each in admitted) for start in admitted) <= 6


def test_an_apps_old_minutes_go_by_themselves_some_at_a_time(db, path):
    hold(db, 0)
    db.execute("INSERT INTO minutes SELECT 'reports', day_start / 60, 1, 1 FROM calls")
    db.execute("INSERT INTO minutes SELECT 'other', day_start / 60, 1, 1 FROM calls")
    assert rows(path, "SELECT count(*) FROM minutes WHERE app = 'reports'") == [(2,)]
    for minute in range(150):
        hold(db, 0, now=NOON + 60 + 60 * minute)
        hold(db, 0, now=NOON + 60 + 60 * minute)
    assert rows(path, "SELECT app, count(*) FROM minutes GROUP BY app ORDER BY app") == [("other", 1), ("reports", 61)]


def test_a_call_larger_than_a_rate_never_fits_and_gets_no_wait(db):
    denied = hold(db, 0, call=replace(CALL, input_tokens=5000), rates=RateLimits(input_tokens_per_minute=4000))
    assert (denied.reason, denied.retry_after_s) == ("rate", None)


# --- extend, release, settle, void


def test_a_call_resolves_once(db, path):
    call_id = hold(db, 500).call_id
    assert reservations.settle(db, call_id, Settlement(200, (Part(200),)), now=NOON).first
    assert not reservations.settle(db, call_id, Settlement(900), now=NOON).first, "only an orphan's bill is added later"
    assert not reservations.void(db, call_id, Outcome(), now=NOON).first
    assert not reservations.extend(db, call_id, 1, DAY_CAP, now=NOON)
    assert not reservations.release(db, call_id, 1, now=NOON)
    assert balance(path) == (200, 0, 0)


def test_an_unknown_call_resolves_never(db):
    assert not reservations.settle(db, 77, Settlement(1), now=NOON).first
    assert not reservations.extend(db, 77, 1, DAY_CAP, now=NOON)


def test_a_void_gives_everything_back(db, path):
    call_id = hold(db, 500, quantum_nano=100).call_id
    reservations.extend(db, call_id, 100, DAY_CAP, now=NOON)
    assert reservations.void(db, call_id, Outcome(status=529), now=NOON).held_nano == 600
    assert rows(path, "SELECT DISTINCT spent_nano, reserved_nano, quantum_nano, open FROM balances") == [(0, 0, 0, 0)]


def test_a_cost_that_cannot_be_known_is_what_was_held(db, path):
    call_id = hold(db, 500).call_id
    reservations.release(db, call_id, 100, now=NOON)
    reservations.extend(db, call_id, 50, DAY_CAP, now=NOON)
    assert reservations.settle(db, call_id, Settlement(None), now=NOON).spent_nano == 450
    assert rows(path, "SELECT flags FROM calls") == [("estimated",)]
    assert rows(path, "SELECT kind, nano FROM usage") == [("estimate", 450)]


def test_no_more_is_released_than_is_held(db):
    call_id = hold(db, 500).call_id
    assert not reservations.release(db, call_id, -1, now=NOON)
    assert not reservations.extend(db, call_id, -1, DAY_CAP, now=NOON)
    assert not reservations.release(db, call_id, 501, now=NOON)
    assert reservations.release(db, call_id, 500, now=NOON)
    assert not reservations.release(db, call_id, 1, now=NOON)


def test_a_bill_above_the_grant_is_booked_in_full_and_flagged(db, path):
    """The model is held back: it is reserved in full from then on."""
    call_id = hold(db, 100).call_id
    resolution = reservations.settle(db, call_id, Settlement(1500, (Part(1500),)), now=NOON)
    assert (resolution.overrun, resolution.spent_nano) == (True, 1500)
    assert balance(path) == (1500, 0, 0)
    assert rows(path, "SELECT flags FROM calls") == [("overrun",)]
    assert rows(path, "SELECT model, over_nano FROM overruns") == [("claude-haiku-4-5", 1400)]
    assert hold(db, 1).reason == "cap_spent"
    assert admin.clear_overrun(db, "claude-haiku-4-5", who="ops", now=NOON)
    assert rows(path, "SELECT * FROM overruns") == []


def test_a_bill_above_the_grant_that_came_late_blames_no_model(db, path):
    """The gateway stood still and could not cut: flagged and booked in full, but the model kept its pace."""
    call_id = hold(db, 100).call_id
    assert reservations.settle(db, call_id, Settlement(1500, (Part(1500),), Outcome(flags=("late",))), now=NOON).overrun
    assert balance(path) == (1500, 0, 0)
    assert rows(path, "SELECT flags FROM calls") == [("late overrun",)]
    assert rows(path, "SELECT * FROM overruns") == []


def test_a_call_belongs_to_the_window_of_its_admission(db, path):
    before_midnight = NOON + 12 * 3600 - 1
    call_id = hold(db, 500, now=before_midnight).call_id
    assert hold(db, 1000, now=before_midnight + 2).call_id
    assert reservations.extend(db, call_id, 500, DAY_CAP, now=before_midnight + 2), "yesterday's room is yesterday's"
    reservations.settle(db, call_id, Settlement(900), now=before_midnight + 3600)
    days = rows(path, """SELECT spent_nano, reserved_nano FROM balances WHERE scope = 'total' AND "window" = 'day' ORDER BY window_start""")
    assert days == [(900, 0), (0, 1000)]


def test_a_clock_set_back_finds_the_money_of_its_own_day(db):
    hold(db, 1000, now=NOON + 86_400)
    hold(db, 1000, now=NOON)
    assert hold(db, 1, now=NOON).reason == "cap_held"


def test_amounts_up_to_the_ledgers_limit_stay_exact(db, path):
    cap = [Cap("total", "ever", 2**62)]
    call_id = hold(db, 2**62, cap).call_id
    assert hold(db, 1, cap).reason == "cap_held"
    reservations.settle(db, call_id, Settlement(2**62 - 1), now=NOON)
    assert hold(db, 2, cap).reason == "cap_spent"
    assert isinstance(hold(db, 1, cap), Reserved)


@pytest.mark.parametrize(
    "tampering",
    ["UPDATE entries SET spent_nano = 0", "DELETE FROM entries", "UPDATE audit SET who = 'x'", "DELETE FROM audit"],
)
def test_what_is_booked_cannot_be_changed(db, tampering):
    hold(db, 1)
    with pytest.raises((sqlite3.IntegrityError, psycopg.errors.IntegrityConstraintViolation)):
        db.execute(tampering)


operation = st.one_of(
    st.tuples(st.just("reserve"), st.integers(0, 400), st.integers(0, 100)),
    st.tuples(st.sampled_from(["extend", "release", "settle", "adjust"]), st.integers(0, 9), st.integers(0, 300)),
    st.tuples(st.sampled_from(["void", "estimate"]), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("tick"), st.integers(1, 30), st.just(0)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(operation, max_size=30))
def test_any_sequence_keeps_the_caps_and_the_sums(tmp_path_factory, steps):
    any_sequence(new_ledger(tmp_path_factory.mktemp("any")), steps)


@settings(max_examples=10, deadline=None)
@given(steps=st.lists(operation, min_size=10, max_size=30))
def test_any_sequence_keeps_the_caps_and_the_sums_on_a_server(steps):
    any_sequence(new_ledger(Path(), "postgresql"), steps)


def any_sequence(path, steps):
    """spent + reserved <= cap after each reservation and top-up (while nothing cost more than it held); balances = sums of entries."""
    caps = [Cap("total", "month", 1500), Cap("app:reports", "day", 1000), Cap("team:batch", "ever", 2000)]
    known, now = [], NOON
    with closing(writing(path)) as db:
        for kind, number, nano in steps:
            call_id = known[number % len(known)] if known else 0
            if kind == "tick":
                now += number * 3600
            elif kind == "reserve":
                answer = hold(db, number, caps, now=now, quantum_nano=nano)
                if isinstance(answer, Reserved):
                    known.append(answer.call_id)
                    assert all(each.spent_nano + each.reserved_nano + each.quantum_nano <= each.cap_nano for each in answer.standings)
                else:  # nor is anything refused that would fit
                    assert any(
                        each.spent_nano + each.reserved_nano + each.quantum_nano + number + nano > each.cap_nano
                        for each in reservations.capped(db, caps, now=now)
                    )
            elif kind == "extend":
                if reservations.extend(db, call_id, nano, caps, now=now):
                    assert all(
                        spent + reserved <= cap.amount_nano
                        for cap in caps
                        for spent, reserved in db.execute(
                            """SELECT spent_nano, reserved_nano FROM balances JOIN calls ON calls.id = $1 WHERE scope = $2 AND "window" = $3
                            AND window_start = CASE "window" WHEN 'day' THEN day_start WHEN 'month' THEN month_start ELSE 0 END""",
                            (call_id, cap.scope, cap.window),
                        )
                    )
            elif kind == "release":
                reservations.release(db, call_id, nano, now=now)
            elif kind == "void":
                reservations.void(db, call_id, Outcome(), now=now)
            elif kind == "estimate":
                reservations.settle(db, call_id, Settlement(None), now=now)
            elif kind == "settle":
                [(held,)] = db.execute("SELECT coalesce(sum(reserved_nano), 0) FROM entries WHERE call_id = $1", (call_id,)).fetchall()
                reservations.settle(db, call_id, Settlement(min(nano, held)), now=now)
            elif rows(path, "SELECT 1 FROM calls WHERE id = $1 AND state IN ('settled', 'voided')", call_id):
                admin.adjust(db, call_id, nano, who="test", why="property", now=now)
        kept = db.execute("SELECT * FROM balances ORDER BY 1, 2, 3").fetchall()
        assert kept == db.execute(f"{balances.from_entries(db.engine.json_value)} ORDER BY 1, 2, 3").fetchall()
        held = db.execute("SELECT min(total) FROM (SELECT sum(reserved_nano) AS total FROM entries GROUP BY call_id) AS held").fetchall()
        assert not known or held[0][0] >= 0


# --- no statement of a call's path reads more than it names


def plans(db):
    judging = ("RESERVE", "OBSTACLES", "STANDINGS", "EXTEND")
    hot = {name: reservations._statement(getattr(reservations, name), db.engine, 3, 8).numbered for name in judging}
    hot |= {name: getattr(reservations, name).numbered for name in ("RELEASE", "RESOLVE", "FINISH")}
    hot |= {"token": "SELECT id FROM tokens WHERE digest = $1", "open": reservations.OPEN_OF_OWNER}
    hot["trigger"] = 'SELECT scope, "window", window_start FROM call_frames WHERE call_id = $1'
    hot["parts trigger"] = 'SELECT scope, "window", window_start FROM part_frames WHERE call_id = $1'
    hot["parts"] = parts._look(3)
    for name, sql in hot.items():
        yield name, [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", [1] * 50)]


@pytest.mark.parametrize("path", ["sqlite"], indirect=True)
def test_every_statement_of_a_calls_path_searches_by_key(db):
    for name, steps in plans(db):
        scans = [step for step in steps if step.startswith("SCAN") and "CONSTANT ROW" not in step]
        assert [scan for scan in scans if any(table in scan for table in TABLES)] == [], name
        assert any(step.startswith("SEARCH") for step in steps), name


TABLES = ("calls", "entries", "balances", "part_balances", "part_names", "kept_parts", "tokens", "raises", "pauses", "minutes", "usage", "overruns", "owners")


# --- the asynchronous face


async def test_many_callers_never_pass_a_cap_and_use_it_up(ledger, path):
    answers = await asyncio.gather(*(ledger.reserve(CALL, 30, DAY_CAP, now=NOON) for _ in range(50)))
    admitted = [answer for answer in answers if isinstance(answer, Reserved)]
    assert len(admitted) == 33
    assert balance(path) == (0, 990, 33)
    await asyncio.gather(*(ledger.settle(each, Settlement(10, (Part(10),)), now=NOON) for each in admitted))
    assert balance(path) == (330, 0, 0)


async def test_threads_with_ledgers_of_their_own_share_one_cap(path):
    admitted = []

    def work():
        async def main():
            ledger = await Ledger.open(url(path), now=NOON)
            answers = await asyncio.gather(*(ledger.reserve(CALL, 30, DAY_CAP, now=NOON) for _ in range(20)))
            admitted.extend(answer for answer in answers if isinstance(answer, Reserved))
            await ledger.close()

        asyncio.run(main())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert len(admitted) == 33


async def test_the_answers_of_the_facade_are_those_of_the_book(ledger, path):
    held = await ledger.reserve(CALL, 500, DAY_CAP, now=NOON)
    assert await ledger.extend([(held, 500), (held, 1)], now=NOON) == [True, False]
    assert await ledger.release(held, 700, now=NOON)
    settlement = Settlement(250, (Part(250),), Outcome(status=200, model_served="claude-haiku-4-5-20251001", complete=True))
    assert (await ledger.settle(held, settlement, now=NOON)).held_nano == 300
    assert not (await ledger.void(held, now=NOON)).first
    [standing] = [each for each in await ledger.standing(["app:reports"], DAY_CAP, now=NOON) if each.window == "day"]
    assert (standing.spent_nano, standing.reserved_nano, standing.cap_nano, standing.resets_at) == (250, 0, 1000, NOON + 12 * 3600)
    assert rows(path, "SELECT state, status, model_served, complete FROM calls") == [("settled", 200, "claude-haiku-4-5-20251001", 1)]


async def test_top_ups_go_before_admissions_that_waited_longer(ledger):
    """In one commit, and behind the money that comes back: of 1,000 a stream holds 600 and another call 300."""
    stream, other = [await ledger.reserve(CALL, nano, DAY_CAP, now=NOON) for nano in (600, 300)]
    begun, go_on = threading.Event(), threading.Event()
    writing = asyncio.ensure_future(ledger.write(lambda db: begun.set() or go_on.wait(60)))
    await until(begun.is_set)
    asked = asyncio.gather(ledger.reserve(CALL, 400, DAY_CAP, now=NOON), ledger.extend([(stream, 350)], now=NOON))
    await asyncio.sleep(0)
    voided = ledger.void(other, now=NOON)
    await until(lambda: not ledger._lingering)
    go_on.set()
    admission, top_up = await asked
    assert (top_up, getattr(admission, "reason", None)) == ([True], "cap_held")
    assert (await voided).first
    await writing


async def test_what_only_records_never_waits_and_is_kept(ledger, path):
    ledger.refused(CALL, "cap_spent", now=NOON)
    ledger.free(replace(CALL, endpoint="count_tokens"), Outcome(status=200), now=NOON)
    for _ in range(3):
        ledger.failed_authentication("token_unknown", now=NOON + 59)
    ledger.ratelimits({"anthropic-ratelimit-requests-remaining": "7"}, now=NOON)
    await ledger.change(lambda db: None)
    assert rows(path, "SELECT state, refusal FROM calls") == [("refused", "cap_spent"), ("free", None)]
    assert rows(path, "SELECT * FROM noise") == [(NOON, "token_unknown", 3)]
    assert await ledger.upstream_limits() == {"anthropic-ratelimit-requests-remaining": ("7", NOON)}
    assert balance(path) == (0, 0, 0)


async def test_a_token_is_found_by_its_digest_and_revoked_at_once(ledger, path):
    assert (await ledger.look_up_token("d1", now=NOON)).token.app == "reports"
    assert (await ledger.look_up_token("nobody", now=NOON)).token is None
    with connect.changing(path) as db:
        admin.revoke_tokens(db, "reports", who="ops", now=NOON)
    assert (await ledger.look_up_token("d1", now=NOON)).token.refusal(NOON) == "token_revoked"


async def test_a_lookup_returns_token_pauses_and_models_held_back(ledger, path):
    assert await ledger.look_up_token("nobody", now=NOON) == TokenLookup(None, (), frozenset())
    with connect.changing(path) as db:
        admin.pause(db, "total", who="ops", why="bad night", now=NOON)
        admin.pause(db, "app:reports", who="ops", why="loop", until=NOON + 60, cut=True, now=NOON)
        db.execute("INSERT INTO overruns VALUES ('claude-haiku-4-5', 1, 0, 1), ('claude-opus-5-5', 2, 0, 1)")
    found = await ledger.look_up_token("d1", now=NOON + 59)
    assert (found.token.app, found.token.expires_at, found.token.last_used_at) == ("reports", None, None)
    assert found.pauses == (Pause("app:reports", NOON, NOON + 60, "loop", True), Pause("total", NOON, None, "bad night"))
    assert found.pauses == await ledger.pauses(now=NOON + 59)
    assert found.overruns == await ledger.overruns() == {"claude-haiku-4-5", "claude-opus-5-5"}
    assert [pause.why for pause in (await ledger.look_up_token("nobody", now=NOON + 60)).pauses] == ["bad night"]


async def test_a_caller_that_leaves_while_it_waits_leaves_nothing_held(ledger, path):
    for patience in (0, 0, 0.0005, 0.001, 0.002, 0.004):
        waiting = asyncio.create_task(ledger.reserve(CALL, 100, DAY_CAP, now=NOON))
        await asyncio.sleep(patience)
        waiting.cancel()
        answer = (await asyncio.gather(waiting, return_exceptions=True))[0]
        if isinstance(answer, Reserved):
            ledger.void(answer, now=NOON)
    await ledger.change(lambda db: None)  # behind whatever was on its way
    await until(lambda: balance(path) == (0, 0, 0))


async def test_an_alert_is_given_once_for_all_processes(ledger, path):
    sibling = await Ledger.open(url(path), now=NOON)
    half, most = (Alert("threshold", "app:reports", f"day 0 {percent}", f"{percent} %") for percent in (50, 80))
    assert await ledger.alert_once(half, send=False, now=NOON)
    assert not await sibling.alert_once(half, send=False, now=NOON)
    assert await sibling.alert_once(most, send=False, now=NOON)
    await sibling.close()


async def test_one_bad_operation_fails_alone(ledger, caplog):
    good, bad, other = await asyncio.gather(
        ledger.reserve(CALL, 10, DAY_CAP, now=NOON),
        ledger.reserve(CALL, -10, DAY_CAP, now=NOON),
        ledger.reserve(CALL, 10, DAY_CAP, now=NOON),
        return_exceptions=True,
    )
    assert isinstance(good, Reserved)
    assert isinstance(other, Reserved)
    assert isinstance(bad, ValueError)


async def test_an_unstorable_settlement_books_the_held_amount(ledger, path):
    held = await ledger.reserve(CALL, 400, DAY_CAP, now=NOON)
    monstrous = Part(100, tokens=Tokens(output_tokens=2**70))
    await ledger.settle(held, Settlement(100, (monstrous,)), now=NOON)
    assert balance(path) == (400, 0, 0)
    assert rows(path, "SELECT flags FROM calls") == [("estimated unstorable",)]


async def test_close_writes_what_is_waiting(path):
    ledger = await Ledger.open(url(path), now=NOON)
    held = [await ledger.reserve(CALL, 10, DAY_CAP, now=NOON) for _ in range(5)]
    for each in held:
        ledger.settle(each, Settlement(7), now=NOON)
    await ledger.close()
    assert balance(path) == (35, 0, 0)
    assert rows(path, "SELECT count(*) FROM calls WHERE state = 'open'") == [(0,)]


@pytest.mark.parametrize(("url", "sentence"), [("mysql://x/y", "not supported"), ("sqlite:///", "names no file")])
async def test_an_address_that_is_no_ledger_is_said(url, sentence):
    with pytest.raises(ValueError, match=sentence):
        await Ledger.open(url)


async def test_only_create_makes_a_ledger(tmp_path):
    url = f"sqlite:///{tmp_path / 'new.db'}"
    with pytest.raises(LedgerUnavailable, match="there is no ledger at"):
        await Ledger.open(url)
    assert list(tmp_path.iterdir()) == []
    await (await Ledger.open(url, create=True)).close()
    await (await Ledger.open(url, create=True)).close()


def test_a_part_needs_nothing_but_its_shape(db, path):
    part = SimpleNamespace(kind="compaction", model=None, tokens=Tokens(), web_searches=2, nano=60, price_row=None)
    reservations.settle(db, hold(db, 100).call_id, Settlement(90, (part,)), now=NOON)
    parts = rows(path, "SELECT kind, input_tokens, web_search_requests, nano FROM usage")
    assert parts == [("compaction", 10, 2, 60), ("estimate", 0, 0, 30)]


def test_a_rate_without_reservations_counts_under_its_own_name(db):
    limits = [reservations.admit_request(db, "reports count_tokens", 3, now=NOON) for _ in range(4)]
    assert limits[:3] == [None] * 3
    assert (limits[3].reason, limits[3].limit_max, limits[3].used) == ("rate", 3, 3)
    assert reservations.admit_request(db, "reports count_tokens", 3, now=NOON + limits[3].retry_after_s) is None
    assert isinstance(hold(db, 0, rates=RateLimits(requests_per_minute=1)), Reserved)
