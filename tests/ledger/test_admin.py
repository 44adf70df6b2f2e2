"""A person's change is audited in the transaction of the change, and in force for the next call."""

import json
import os
import signal
import sqlite3
import threading
import time
from contextlib import closing
from zoneinfo import ZoneInfo

import pytest
from ledgers import CALL, DAY_CAP, ENGINES, NOON, Cap, Part, balance, new_ledger, rows
from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from gateway_addon.ledger import Denied, Ledger, Outcome, Pause, Settlement, admin, connect, reservations
from gateway_addon.ledger.maintenance import backup, invariants
from gateway_addon.ledger.reports import spending
from gateway_addon.ledger.store import migrations, sqlite_files, sqlite_schema
from gateway_addon.money import AMOUNT_NANO_MAX
from gateway_addon.windows import starts


@pytest.fixture
def path(tmp_path):
    return new_ledger(tmp_path)


@pytest.fixture
def db(path):
    with closing(sqlite_files.writer_connection(path)) as connection:
        yield connection


def test_a_long_statement_hears_ctrl_c(path):
    """The driver would come back from it only at its end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()

    def count():
        with connect.reading(path) as db:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            db.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000) SELECT count(*) FROM n").fetchone()

    try:
        with pytest.raises(KeyboardInterrupt):
            count()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 20, "the statement takes minutes"


def spend(db, nano, at=NOON):
    held = reservations.reserve(db, "me", CALL, nano, [Cap("total", "ever", 10**9)], now=at)
    reservations.settle(db, held.call_id, Settlement(nano), now=at)
    return held.call_id


def audit(db):
    found = db.execute("SELECT who, action, subject, before, after, why FROM audit ORDER BY id").fetchall()
    return [(*row[:3], *(value and json.loads(value) for value in row[3:5]), row[5]) for row in found]


def test_every_change_says_who_what_before_after_and_why(db):
    admin.raise_cap(db, "app:reports", "day", 500, until=NOON + 60, who="ann", why="quarter's end", now=NOON)
    admin.pause(db, "app:reports", until=NOON + 9, who="ann", why="bad night", now=NOON)
    admin.resume(db, "app:reports", who="bob", now=NOON)
    call_id = spend(db, 50)
    admin.adjust(db, call_id, 25, who="ann", why="the bill", now=NOON)
    assert audit(db)[1:] == [
        ("ann", "cap raise", "app:reports day", {"raised_nano": 0}, {"raised_nano": 500, "until": NOON + 60}, "quarter's end"),
        ("ann", "pause", "app:reports", None, {"until": NOON + 9, "cut": False}, "bad night"),
        ("bob", "resume", "app:reports", {"since": NOON, "until": NOON + 9, "why": "bad night", "cut": 0}, None, ""),
        ("ann", "adjust", f"call:{call_id}", {"spent_nano": 50}, {"spent_nano": 75}, "the bill"),
    ]


def test_a_change_that_fails_halfway_leaves_no_trace(path):
    def fail():
        with connect.changing(path) as db:
            admin.pause(db, "total", who="ann", now=NOON)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert rows(path, "SELECT * FROM pauses") == []
    assert rows(path, "SELECT count(*) FROM audit") == [(1,)]


def test_a_token_is_kept_as_its_digest_only_and_issued_once(db):
    with pytest.raises(ValueError, match="has this token"):
        admin.issue_token(db, "other", "d1", who="ann", now=NOON)
    admin.issue_token(db, "reports", "d2", label="cron", who="ann", now=NOON)
    assert [(token.app, token.label) for token in admin.tokens(db)] == [("reports", ""), ("reports", "cron")]
    assert "d2" not in json.dumps(audit(db)), "the audit is read by more people than the token table"


def test_rotation_ends_the_old_token_after_its_grace(db):
    new = admin.rotate_token(db, "reports", "d2", keep_old_s=60, who="ann", now=NOON)
    old = admin.tokens(db, "reports")[0]
    assert (old.refusal(NOON + 59), old.refusal(NOON + 60), new.refusal(NOON + 60)) == (None, "token_revoked", None)


@pytest.mark.parametrize(("amount_nano", "until"), [(0, NOON + 1), (-5, NOON + 1), (5, NOON)])
def test_a_raise_is_positive_and_ends_in_the_future(db, amount_nano, until):
    with pytest.raises(ValueError, match="gateway cap limit lowers one"):
        admin.raise_cap(db, "total", "day", amount_nano, until=until, who="ann", now=NOON)


def test_a_raise_is_withdrawn_once_and_others_stay(db):
    first = admin.raise_cap(db, "app:reports", "day", 500, until=NOON + 60, who="ann", why="typo", now=NOON)
    second = admin.raise_cap(db, "app:reports", "day", 5, until=NOON + 60, who="bob", now=NOON)
    assert admin.withdraw_raise(db, first.id, who="bob", why="meant 5", now=NOON) == first
    assert admin.raises(db, now=NOON) == [second]
    admin.withdraw_raise(db, second.id, who="bob", now=NOON)
    assert admin.raise_cap(db, "total", "day", 1, until=NOON + 60, who="bob", now=NOON).id == second.id + 1, "no number means two raises"
    assert audit(db)[3] == ("bob", "cap withdraw", "app:reports day", {**first._asdict()}, None, "meant 5")
    for gone, at in ((first.id, NOON), (second.id, NOON + 60), (99, NOON)):
        with pytest.raises(ValueError, match=f"no raise {gone} is in force; gateway cap list"):
            admin.withdraw_raise(db, gone, who="bob", now=at)


def test_the_audit_of_an_app_is_not_that_of_another_like_it(db):
    """An underscore in a name stands for itself."""
    for scope in ("app:a_b", "app:a_b session:s1", "app:axb", "app:a_bc", "app:axb session:s1"):
        admin.pause(db, scope, who="test", now=NOON)
    assert [row["subject"] for row in admin.audit_trail(db, "a_b", since=0)] == ["app:a_b", "app:a_b session:s1"]


def test_a_limit_is_audited_replaced_and_lifted(db):
    assert admin.limit_cap(db, "total", "day", 500, who="ann", why="quiet", now=NOON) is None
    [first] = admin.limits(db)
    assert admin.limit_cap(db, "total", "day", 300, who="bob", now=NOON + 1) == first
    assert [(each.amount_nano, each.who) for each in admin.limits(db)] == [(300, "bob")]
    assert admin.lift_limit(db, "total", "day", who="bob", now=NOON + 2).amount_nano == 300
    assert admin.lift_limit(db, "total", "day", who="bob", now=NOON + 2) is None
    assert [row[1:3] for row in audit(db)[-3:]] == [("cap limit", "total day"), ("cap limit", "total day"), ("cap limit lift", "total day")]
    with pytest.raises(ValueError, match=r"a limit is \$0 or more"):
        admin.limit_cap(db, "total", "day", -1, who="ann", now=NOON)


def test_adjustments_go_up_and_down_but_never_below_nothing(db, path):
    call_id = spend(db, 50)
    assert admin.adjust(db, call_id, -30, who="ann", why="x", now=NOON) == 20
    with pytest.raises(ValueError, match="cannot be taken off"):
        admin.adjust(db, call_id, -21, who="ann", why="x", now=NOON)
    assert admin.adjust(db, call_id, 100, who="ann", why="x", now=NOON + 40 * 86_400) == 120
    assert rows(path, "SELECT DISTINCT spent_nano FROM balances") == [(120,)], "a correction belongs to the window of its call"


def test_all_adjustments_together_stay_within_64_bits(db, path):
    """Each sum stays within 64 bits: a database refuses a larger one with words of its own."""
    call_id, other = spend(db, 50), spend(db, 50)
    admin.adjust(db, call_id, AMOUNT_NANO_MAX - 200, who="ann", why="x", now=NOON)
    for each in (call_id, other):
        with pytest.raises(ValueError, match=r"more than the ledger can hold \(\$4,611,686,018"):
            admin.adjust(db, each, 101, who="ann", why="x", now=NOON)
    assert admin.adjust(db, other, 100, who="ann", why="x", now=NOON) == 150
    assert rows(path, "SELECT DISTINCT spent_nano FROM balances WHERE scope = 'total'") == [(AMOUNT_NANO_MAX,)]


@pytest.mark.parametrize("state", ["open", "refused", "missing"])
def test_only_a_resolved_call_is_adjusted(db, state):
    reservations.reserve(db, "me", CALL, 5, DAY_CAP, now=NOON) if state == "open" else reservations.refused(db, "me", CALL, "model", now=NOON)
    with pytest.raises(ValueError, match="only a settled or voided call is adjusted"):
        admin.adjust(db, 9 if state == "missing" else 1, 1, who="ann", why="x", now=NOON)


def test_a_change_of_zone_moves_past_calls_and_running_ones(db, path):
    late = NOON + 11.5 * 3600  # 23:30 UTC is tomorrow in Berlin
    spend(db, 100)
    held = reservations.reserve(db, "me", CALL, 70, DAY_CAP, now=late)
    assert admin.align(db, "Europe/Berlin", {"reports": "batch"}, who="gateway", now=late)
    days = rows(path, """SELECT spent_nano, reserved_nano FROM balances WHERE scope = 'total' AND "window" = 'day' ORDER BY window_start""")
    assert days == [(100, 0), (0, 70)]
    reservations.void(db, held.call_id, Outcome(), now=late)
    assert invariants.findings(db) == []
    assert not admin.align(db, "Europe/Berlin", {"reports": "batch"}, who="gateway", now=late), "nothing left to change"


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/Santiago", "America/Havana", "Australia/Lord_Howe", "Asia/Beirut", "Pacific/Apia"])
def test_a_change_of_zone_moves_each_call_to_its_windows(path, zone):
    """Over a year, at odd hours and right at each day's ends, where clocks change too."""
    year = [NOON + 86_400 * day + 3600 * (day % 24) for day in range(366)]
    with connect.changing(path) as db:
        for at in [*year, *(starts(each, ZoneInfo(zone)).day + beside for each in year for beside in (-1, 0, 0.5))]:
            reservations.refused(db, "me", CALL, "model", now=at)
        assert admin.align(db, zone, {}, who="gateway", now=NOON)
    found = rows(path, "SELECT started_at, day_start, week_start, month_start FROM calls")
    assert len(found) == 4 * 366
    assert [row for row in found if row[1:] != tuple(starts(row[0], ZoneInfo(zone))[:3])] == []


def test_a_change_of_team_takes_the_apps_past_along(db, path):
    spend(db, 100)
    assert admin.align(db, "UTC", {"reports": "editors"}, who="gateway", now=NOON)
    assert balance(path, "team:editors") == (100, 0, 0)
    assert balance(path, "team:batch") == (0, 0, 0)
    assert admin.align(db, "UTC", {"reports": None}, who="gateway", now=NOON)
    assert balance(path, "team:editors") == (0, 0, 0)
    assert invariants.findings(db) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_an_app_that_was_only_refused_takes_its_past_along_too(tmp_path, engine):
    ledger = new_ledger(tmp_path, engine)
    with connect.changing(ledger) as db:
        reservations.refused(db, "me", CALL, "model", now=NOON)
    with connect.changing(ledger) as db:
        assert admin.align(db, "UTC", {"reports": "editors"}, who="gateway", now=NOON)
    assert rows(ledger, "SELECT team FROM calls") == [("editors",)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_policy_is_kept_once_with_what_is_different(tmp_path, engine):
    with connect.changing(new_ledger(tmp_path, engine)) as db:
        assert admin.keep_policy(db, "d1", {"gateway.yaml": "caps: {day: $1}\n"}, who="ann", now=NOON)
        assert not admin.keep_policy(db, "d1", {"gateway.yaml": "caps: {day: $1}\n"}, who="the second worker", now=NOON)
        assert admin.keep_policy(db, "d2", {"gateway.yaml": "caps: {day: $2}\n"}, who="bob", now=NOON + 1)
        latest = admin.policy_changes(db, 1)
    assert [(change.at, change.who, change.digest) for change in latest] == [(NOON + 1, "bob", "d2")]
    assert latest[0].diff.splitlines()[3:] == ["-caps: {day: $1}", "+caps: {day: $2}"]


async def test_a_command_holds_for_the_next_call_of_a_running_gateway(path):
    ledger = await Ledger.open(f"sqlite:///{path}", now=NOON)
    with connect.changing(path) as db:
        admin.pause(db, "total", who="ann", why="bad night", now=NOON)
    assert await ledger.reserve(CALL, 1, DAY_CAP, now=NOON) == Denied("paused", pause=Pause("total", int(NOON), None, "bad night"))
    assert [pause.why for pause in await ledger.pauses(now=NOON)] == ["bad night"]
    with connect.changing(path) as db:
        admin.resume(db, "total", who="ann", now=NOON)
    assert await ledger.pauses(now=NOON) == ()
    await ledger.close()


def test_the_first_reader_or_writer_upgrades_an_older_ledger(tmp_path):
    for name, come in (("read", connect.reading), ("written", connect.changing)):
        path = older_ledger(tmp_path / f"{name}.db")
        with come(path):
            pass
        with connect.reading(path) as db:
            assert invariants.findings(db) == []
            assert spending.report(db, "app", since=NOON - 1, until=NOON + 1).spent_nano == 30
    older = older_ledger(tmp_path / "older.db")
    backup.backup(older, tmp_path / "copy.db")
    backup.restore(tmp_path / "copy.db", tmp_path / "back.db", now=NOON)
    with connect.reading(tmp_path / "back.db") as db:
        assert spending.report(db, "app", since=NOON - 1, until=NOON + 1).spent_nano == 30


def older_ledger(path):
    """One as the first version made it, with one call of $0.00000003."""
    first = Migrations("gateway_ledger")
    first(name="m001_ledger")(migrations.runner(sqlite_schema.TABLES))
    with closing(sqlite_files.FileConnection(sqlite3.connect(path, isolation_level=None))) as db:
        first.apply(Database(db.raw))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("INSERT INTO settings VALUES ('zone', 'UTC')")
        db.execute(
            "INSERT INTO calls (id, state, owner, app, token_id, endpoint, stream, day_start, week_start, month_start, started_at, grant_nano)"
            " VALUES (1, 'open', 'me', 'reports', 1, 'messages', 0, 0, 0, 0, $1, 50)",
            (NOON,),
        )
        reservations.settle(db, 1, Settlement(30, (Part(30),)), now=NOON)
    return path
