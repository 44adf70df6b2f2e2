"""Test the parts of an app: the scopes that a call counts in, caps on them, and what is kept of them for how long."""

import statistics
import time
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledgers import ENGINES, NOON, Cap, Steps, new_ledger, rows, url, writing

from gateway_addon.ledger import (
    Denied,
    Ledger,
    LedgerUnavailable,
    NameLimit,
    NewCall,
    Outcome,
    Reserved,
    Settlement,
    admin,
    connect,
    enclosing,
    part_of,
    part_scope,
    reservations,
)
from gateway_addon.ledger.maintenance import prune
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.windows import cycle

DAY_S = 86_400
CALL = NewCall("reports", "batch", 1, model="claude-haiku-4-5", session_id="s1", agent_id="a1", labels=(("client", "acme"),))
KINDS = ("session", "agent", "model", "token", "label.client")
EVER = frozenset(("reports", kind, "ever") for kind in KINDS)


def keep(db, kept=EVER, cycles=(), *, zone="UTC", now=NOON):
    admin.align(db, zone, {"reports": "batch"}, cycles, kept, who="test", now=now)


def cap(kind, nano, window="ever", value=None):
    value = dict(CALL.parts)[kind] if value is None else value
    return Cap(part_scope("reports", (kind, value)), window, nano)


def hold(db, nano, caps=(), call=CALL, now=NOON, **options):
    return reservations.reserve(db, "me", call, nano, caps, now=now, **options)


def settled(db, nano, call=CALL, now=NOON):
    reservations.settle(db, hold(db, nano, call=call, now=now).call_id, Settlement(nano), now=now)


def part(path, scope, window="ever"):
    found = rows(path, 'SELECT spent_nano, reserved_nano, open FROM part_balances WHERE scope = $1 AND "window" = $2', scope, window)
    return found[-1] if found else None


def folder(parent, name):
    (parent / name).mkdir()
    return parent / name


@pytest.fixture
def db(path):
    with closing(writing(path)) as connection:
        keep(connection)
        yield connection


# names


@pytest.mark.parametrize(
    ("part", "scope"),
    [
        (("session", "3f2a"), "app:coder session:3f2a"),
        (("label.client", "acme"), "app:coder label.client:acme"),
        (("user", "a b:c"), "app:coder user:a b:c"),
    ],
)
def test_a_part_has_a_scope_within_its_app(part, scope):
    assert part_scope("coder", part) == scope
    assert (part_of(scope), enclosing(scope)) == (part, "app:coder")
    assert (part_of("app:coder"), enclosing("team:batch")) == (None, "team:batch")


def test_a_call_belongs_to_the_parts_that_it_names():
    whole = NewCall("coder", None, 7, model_asked="fast", model="claude-haiku-4-5", session_id="3f2a", agent_id="b1")
    assert whole.parts == (("session", "3f2a"), ("agent", "b1"), ("model", "claude-haiku-4-5"), ("token", "7"))
    assert NewCall("coder", None, 7, session_id="").parts == (("token", "7"),)


# caps


@pytest.mark.parametrize("kind", KINDS)
def test_the_cap_of_a_part_holds_on_its_own(db, kind):
    assert isinstance(hold(db, 60, [cap(kind, 100)]), Reserved)
    wide = [cap(other, 10_000) for other in KINDS if other != kind]
    denied = hold(db, 60, [*wide, cap(kind, 100), Cap("app:reports", "day", 10_000)])
    assert isinstance(denied, Denied)
    assert (denied.reason, denied.standing.scope, denied.standing.reserved_nano) == ("cap_held", cap(kind, 0).scope, 60)
    assert isinstance(hold(db, 40, [cap(kind, 100)]), Reserved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_raise_and_a_limit_of_a_part_are_judged_with_its_cap(db, kind):
    """By a reservation and by a top-up; a refusal says how the cap stood."""
    cap_of_part = cap(kind, 100)
    by, scope = {"who": "test", "now": NOON}, cap_of_part.scope
    running = hold(db, 60, [cap_of_part]).call_id
    made = admin.raise_cap(db, scope, "ever", 50, until=NOON + 60, **by)
    assert [reservations.extend(db, running, nano, [cap_of_part], now=NOON) for nano in (91, 80)] == [False, True]
    denied = hold(db, 11, [cap_of_part])
    assert [(each.scope, each.cap_nano, each.raised_nano, each.reserved_nano) for each in denied.standings] == [(scope, 150, 50, 140)]
    assert isinstance(hold(db, 10, [cap_of_part]), Reserved)
    admin.withdraw_raise(db, made.id, **by)
    assert hold(db, 1, [cap_of_part]).standing.cap_nano == 100
    admin.raise_cap(db, scope, "ever", 900, until=NOON + 60, **by)
    admin.limit_cap(db, scope, "ever", 150, **by)
    assert hold(db, 1, [cap_of_part]).standing.is_limited
    admin.lift_limit(db, scope, "ever", **by)
    assert isinstance(hold(db, 850, [cap_of_part]), Reserved)
    assert hold(db, 1, [cap_of_part], now=NOON + 61).standing.cap_nano == 100, "the raise is over"


def test_another_session_has_a_cap_of_its_own(db, path):
    other = replace(CALL, session_id="s2")
    settled(db, 90)
    assert hold(db, 20, [cap("session", 100)]).reason == "cap_spent"
    assert isinstance(hold(db, 20, [cap("session", 100, value="s2")], call=other), Reserved)
    assert (part(path, "app:reports session:s1"), part(path, "app:reports session:s2")) == ((90, 0, 0), (0, 20, 1))


def test_a_cap_needs_the_row_of_its_part_in_the_statement(db, monkeypatch):
    """Take the guard away, and the cap is passed: the statement judges by this row, and nothing else does."""
    frames = reservations._cap_windows
    monkeypatch.setattr(reservations, "_cap_windows", lambda caps, windows: [each for each in frames(caps, windows) if " " not in each[0]])
    settled(db, 90)
    assert isinstance(hold(db, 20, [cap("session", 100)]), Reserved)
    monkeypatch.undo()
    assert isinstance(hold(db, 20, [cap("session", 100)]), Denied)


def test_top_ups_are_judged_by_the_caps_of_parts(db, path):
    running = hold(db, 50, [cap("session", 100)])
    assert reservations.extend(db, running.call_id, 50, [cap("session", 100)], now=NOON)
    assert not reservations.extend(db, running.call_id, 1, [cap("session", 100)], now=NOON)
    reservations.release(db, running.call_id, 70, now=NOON)
    reservations.void(db, running.call_id, Outcome(), now=NOON)
    assert part(path, "app:reports session:s1") == (0, 0, 0)


def test_a_part_without_a_balance_is_refused_and_not_let_pass(db):
    """Another gateway with other policies has come since: what is not kept cannot be judged."""
    running = hold(db, 10, [cap("session", 100)])
    keep(db, EVER - {("reports", "session", "ever")})
    with pytest.raises(LedgerUnavailable, match="keeps no balance of each session of app:reports for the window ever"):
        hold(db, 10, [cap("session", 100)])
    with pytest.raises(LedgerUnavailable, match="keeps no balances for the window 'cycle:17'"):
        hold(db, 10, [Cap("app:reports", "cycle:17", 100)])
    assert not reservations.extend(db, running.call_id, 1, [cap("session", 100)], now=NOON)
    keep(db, EVER, [cycle(5)])
    of_cycle = hold(db, 10, [full := Cap("app:reports", "cycle:5", 100)])
    assert reservations.extend(db, of_cycle.call_id, 1, [full], now=NOON)
    keep(db, EVER)
    assert not reservations.extend(db, of_cycle.call_id, 1, [full], now=NOON)


@pytest.mark.parametrize("window", ["day", "week", "month", "ever", "cycle:5"])
def test_a_part_counts_in_each_window_by_its_calendar(db, path, window):
    keep(db, {("reports", "session", window)}, [cycle(5)])
    settled(db, 90, now=NOON - 40 * DAY_S)
    settled(db, 30)
    left = 10 if window == "ever" else 70
    caps = [cap("session", 130 if window == "ever" else 100, window)]
    assert isinstance(hold(db, left + 1, caps), Denied)
    assert isinstance(hold(db, left, caps), Reserved)
    assert findings(db) == []


async def test_callers_at_once_never_pass_a_parts_cap(path, db):
    """In the group commit of one process, and across the ranks of its operations."""
    ledger = await Ledger.open(url(path), now=NOON)
    try:
        answers = [await ledger.reserve(replace(CALL, session_id=f"s{n % 2}"), 30, [cap("session", 100, value=f"s{n % 2}")], now=NOON) for n in range(12)]
        held = [answer for answer in answers if isinstance(answer, Reserved)]
        assert len(held) == 6
        assert await ledger.extend([(each, 6) for each in held], now=NOON) == [True, True, False, False, False, False]
        assert [standing.scope for standing in held[0].standings] == ["app:reports session:s0"]
    finally:
        await ledger.close()


# a cap of a token's own


def test_a_tokens_own_cap_needs_no_policy(path):
    with connect.changing(path) as db:
        settled(db, 70)
        token = admin.issue_token(db, "reports", "d2", cap_nano=100, who="test", now=NOON)
        mine = replace(CALL, token_id=token.id)
        caps = [cap("token", 100, value=str(token.id))]
        settled(db, 90, mine)
        assert isinstance(hold(db, 11, caps, mine), Denied)
        assert not admin.align(db, "UTC", {}, who="test", now=NOON), "a policy without caps on tokens leaves it alone"
        assert isinstance(hold(db, 10, caps, mine), Reserved)
        assert admin.tokens(db, "reports")[-1].cap_nano == reservations.token(db, token.id, "reports").cap_nano == 100
        assert findings(db) == []


# a cap added at noon


def test_a_cap_that_is_added_at_noon_knows_the_morning(path):
    """What was spent, and what runs; and of a token whose own cap began to count before, all of it."""
    with connect.changing(path) as db:
        settled(db, 500, now=NOON - 2 * DAY_S)
        admin.issue_token(db, "reports", "d2", cap_nano=100, who="test", now=NOON - DAY_S)
        settled(db, 40, now=NOON - 3600)
        running = hold(db, 25, now=NOON - 1800)
        hold(db, 3, call=NewCall("other", None, 1, session_id="s1"))
        keep(db, EVER | {("reports", "session", "day")})
        assert findings(db) == []
    assert part(path, "app:reports session:s1", "day") == (40, 25, 1)
    assert part(path, "app:reports session:s1") == part(path, "app:reports token:1") == (540, 25, 1)
    with connect.changing(path) as db:
        reservations.settle(db, running.call_id, Settlement(20), now=NOON)
        assert not admin.align(db, "UTC", {"reports": "batch"}, (), EVER | {("reports", "session", "day")}, who="test", now=NOON)
        keep(db, set())
    assert part(path, "app:reports session:s1") is None


def test_a_cycle_that_is_added_at_noon_knows_its_calls(path):
    with connect.changing(path) as db:
        settled(db, 500, now=NOON - 9 * DAY_S)
        settled(db, 40, now=NOON - 3 * DAY_S)
        keep(db, {("reports", "session", "cycle:5")}, [cycle(5)])
        assert findings(db) == []
        full = [Cap("app:reports", "cycle:5", 50), Cap("total", "cycle:5", 50)]
        assert [standing.spent_nano for standing in reservations.capped(db, full, now=NOON)] == [40, 40]
        settled(db, 5)
        assert hold(db, 6, full).standing.resets_at == 1_775_347_200  # 5 April 2026
        keep(db, {("reports", "session", "cycle:5")}, [cycle(5), cycle(31)], zone="Asia/Tokyo")
        assert [standing.spent_nano for standing in reservations.capped(db, [Cap("total", "cycle:31", 9)], now=NOON)] == [545]
        assert findings(db) == []
        keep(db, (), ())
        assert findings(db) == []


# names without end


def test_names_beyond_a_days_number_share_one_part(db, path):
    def call(number, **named):
        return replace(CALL, session_id=f"s{number}", names=NameLimit(3, frozenset(("model", "token", "label.client"))), **named)

    def ask(number, now=NOON):
        return hold(db, 60, [cap("session", 100, value=f"s{number}"), cap("model", 9_999)], call(number), now)

    assert all(isinstance(ask(number), Reserved) for number in range(3))
    assert isinstance(ask(3), Reserved), "the first of the others"
    assert ask(4).standing.scope == "app:reports session:others", "which share one cap"
    assert ask(0).standing.scope == "app:reports session:s0", "a known name stays itself"
    running = rows(path, "SELECT id FROM calls WHERE session_id IS NULL OR session_id = 's3'")[0][0]
    assert not reservations.extend(db, running, 41, [cap("session", 100, value="s3")], now=NOON), "top-ups go where the call counts"
    assert reservations.extend(db, running, 40, [cap("session", 100, value="s3")], now=NOON)
    assert isinstance(ask(5, NOON + DAY_S), Reserved), "another day has room for new names"
    assert part(path, "app:reports session:s5") == (0, 60, 1)
    assert findings(db) == []


@pytest.mark.parametrize("window", ["day", "ever"])
async def test_others_are_full_at_midnight_with_calls_in_flight(path, window):
    """By a clock that is told: a call goes on where it was counted, names come back as themselves, each day has its number of new ones.

    A call that waited past midnight takes its name from the new day's number, and does not begin the day anew.
    """
    midnight, of_day = NOON + DAY_S / 2, window == "day"
    with connect.changing(path) as db:
        keep(db, {("reports", "session", window)})
    ledger = await Ledger.open(url(path), now=NOON)

    async def ask(number, now, nano=60, names_max=3):
        call = replace(CALL, session_id=f"s{number}", names=NameLimit(names_max))
        return await ledger.reserve(call, nano, [cap("session", 100, window, f"s{number}")], now=now)

    async def stands(number, now):
        """Where the call of a session counts, and whether it was let in."""
        answer = await ask(number, now)
        [standing] = answer.standings
        return standing.scope.removeprefix("app:reports session:"), isinstance(answer, Reserved)

    try:
        assert [await stands(number, midnight - 1) for number in range(3)] == [(f"s{number}", True) for number in range(3)]
        running = await ask(3, midnight - 1)
        assert await stands(4, midnight - 1) == ("others", False)
        assert [await ledger.extend([(running, nano)], now=midnight) for nano in (41, 40)] == [[False], [True]], "the others of its own day"
        assert await stands(0, midnight) == ("s0", of_day), "a name of yesterday is no new one"
        assert [await stands(number, midnight) for number in (3, 4)] == [("s3", True), ("s4", True)]
        assert await stands(5, midnight - 1) == ("s5", True), "the new day's third name"
        assert await stands(6, midnight) == ("others", of_day), "for ever they are full"
        await ledger.settle(running, Settlement(10), now=midnight + 1)
        assert await stands(7, midnight) == ("others", not of_day)
        lowered, raised = midnight + 3_600, midnight + 7_200
        assert [(await ask(number, lowered, 1, names_max=1)).standings[0].scope for number in (0, 8)] == [
            "app:reports session:s0", "app:reports session:others",
        ]  # fmt: skip
        assert (await ask(8, raised, 1, names_max=4)).standings[0].scope == "app:reports session:s8"
    finally:
        await ledger.close()
    with connect.reading(path) as db:
        assert findings(db) == []
    assert rows(path, "SELECT day_start, names FROM part_names") == [(midnight, 4)]


def test_names_are_bounded_where_their_caps_are_only_observed(db, path):
    """An app in observe mode asks for no cap of its own; its clients' names have balances all the same."""
    names = NameLimit(3, frozenset(("model", "token", "label.client")), frozenset(("session",)))
    for number in range(5):
        assert isinstance(hold(db, 60, [], replace(CALL, session_id=f"s{number}", agent_id=None, names=names)), Reserved)
    assert part(path, "app:reports session:others") == (0, 120, 2)
    assert len(rows(path, "SELECT 1 FROM part_balances WHERE scope LIKE 'app:reports session:%'")) == 4
    assert findings(db) == []


@pytest.mark.parametrize("path", ["sqlite"], indirect=True)
def test_a_reservation_costs_the_same_beside_many_parts(db):
    """Counted in the work of its statements: the trees of ten thousand names are one page deeper, no more."""
    steps, caps = Steps(db), [cap("session", 10**9), cap("agent", 10**9)]
    hold(db, 1, caps)
    few = steps.of(lambda: hold(db, 1, caps))
    insert = "INSERT INTO part_balances VALUES ($1, 'ever', 0, 1, 0, 0, 0)"
    db.executemany(insert, [(f"app:reports session:x{number:06}",) for number in range(10_000)])
    assert steps.of(lambda: hold(db, 1, caps)) <= few * 1.05


@pytest.mark.soak
@pytest.mark.parametrize("engine", ENGINES)
def test_an_admission_beside_a_million_sessions_takes_no_longer(tmp_path, engine):
    """Within 10 % of an empty ledger, by the median of transactions that take turns between the two, each of another session."""

    def admit(db, number):
        call = replace(CALL, session_id=f"x{number * 7_919 % 1_000_000:06}-{number % 2}")  # half of them are new names
        began = time.perf_counter()
        db.execute("BEGIN")
        hold(db, 1, [cap("session", 10**9, value=call.session_id), cap("token", 10**12)], call)
        db.execute("COMMIT")
        return time.perf_counter() - began

    with closing(writing(new_ledger(folder(tmp_path, "few"), engine))) as few, closing(writing(new_ledger(folder(tmp_path, "many"), engine))) as many:
        for db in (few, many):
            keep(db)
        many.execute("BEGIN")
        for first in range(0, 1_000_000, 10_000):
            names = [(f"app:reports session:x{number:06}-0",) for number in range(first, first + 10_000)]
            many.executemany("INSERT INTO part_balances VALUES ($1, 'ever', 0, 1, 0, 0, 0)", names)
        many.execute("COMMIT")
        taken = {few: [], many: []}
        for number in range(3_000):
            for db, seconds in taken.items():
                seconds.append(admit(db, number))
        medians = [statistics.median(taken[db][500:]) for db in (few, many)]
    assert medians[1] <= medians[0] * 1.1, medians


# what is proved and what goes


def test_doctor_finds_a_parts_balance_that_is_wrong(db):
    settled(db, 40)
    assert findings(db) == []
    db.execute("UPDATE part_balances SET spent_nano = 39 WHERE scope = 'app:reports session:s1'")
    assert findings(db) == [
        "balance app:reports session:s1 ever from 0: says spent $0.000000039, held $0.00; the entries say $0.00000004, $0.00"
    ]
    db.execute("DELETE FROM part_balances WHERE scope = 'app:reports session:s1'")
    assert len(findings(db)) == 1


def test_parts_sum_to_their_app(db, path):
    admin.issue_token(db, "reports", "d2", who="test", now=NOON)
    for number in range(6):
        settled(db, 10 + number, replace(CALL, session_id=f"s{number % 3}", token_id=1 + number % 2))  # of two tokens
    [(whole,)] = rows(path, """SELECT spent_nano FROM balances WHERE scope = 'app:reports' AND "window" = 'ever'""")
    for kind in ("session", "token", "model"):
        like = f"app:reports {kind}:%"
        assert rows(path, "SELECT CAST(sum(spent_nano) AS BIGINT) FROM part_balances WHERE scope LIKE $1", like) == [(whole,)]


def test_prune_keeps_parts_spending_and_forgets_idle_sessions(path):
    """A session goes a prune after its last call; what a token, a model or a label has spent for ever stays."""
    with connect.changing(path) as db:
        keep(db, EVER | {("reports", "session", "day")}, now=NOON - 60 * DAY_S)
        settled(db, 40, now=NOON - 50 * DAY_S)
        settled(db, 7, replace(CALL, session_id="s2"), now=NOON - 45 * DAY_S)
        settled(db, 2, replace(CALL, session_id="s2"))
    before = NOON - 30 * DAY_S
    for _ in range(2):
        with connect.changing(path) as db:
            prune.begin(db, before, prune.prunable(db, before), who="test", now=NOON)
            day = prune.next_day(db, 0, before)
            while day is not None:
                prune.carry(db, day.groups, now=NOON)
                day = prune.next_day(db, day.end, before)
            assert findings(db) == []
    assert part(path, "app:reports session:s1") is None
    assert part(path, "app:reports session:s2") == (9, 0, 0)
    assert part(path, "app:reports token:1") == part(path, "app:reports label.client:acme") == (49, 0, 0)
    assert rows(path, """SELECT count(*) FROM part_balances WHERE "window" = 'day'""") == [(1,)]
    with connect.changing(path) as db:
        keep(db, EVER, zone="Asia/Tokyo")
        assert findings(db) == []
    assert part(path, "app:reports token:1") == (49, 0, 0)


@given(steps=st.lists(st.tuples(st.sampled_from(["hold", "top", "end", "keep", "zone"]), st.integers(0, 60), st.integers(0, 3)), max_size=14))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_parts_follow_from_the_entries_whatever_happens(tmp_path_factory, steps):
    with closing(writing(new_ledger(tmp_path_factory.mktemp("parts")))) as db:
        keep(db, {("reports", "session", "day")})
        zone, held = "UTC", []
        for number, (what, nano, which) in enumerate(steps):
            now, caps = NOON + 7_200 * number, [cap("session", 100, "day", f"s{which}")]
            if what == "hold":
                answer = hold(db, nano, caps, replace(CALL, session_id=f"s{which}"), now)
                held += [(answer.call_id, caps)] if isinstance(answer, Reserved) else []
            elif what == "keep":
                keep(db, {("reports", "session", "day"), ("reports", KINDS[which], "ever")}, [cycle(1 + which * 10)], zone=zone, now=now)
            elif what == "zone":
                zone = ("UTC", "Asia/Tokyo", "America/Havana", "UTC")[which]
                keep(db, {("reports", "session", "day")}, zone=zone, now=now)
            elif held:
                call_id, caps = held[which % len(held)]
                if what == "top":
                    reservations.extend(db, call_id, nano, caps, now=now)
                else:
                    reservations.settle(db, call_id, Settlement(nano // 2), now=now)
            assert findings(db) == []
