"""Old calls become sums: not a nano moves, whatever is pruned when, and the tables refuse every other way to lose an entry."""

import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import psycopg
import pytest
from click.testing import CliRunner
from ledgers import CALL, ENGINES, Part, Tokens, copied, new_ledger, rows, url, writing

from gateway_addon.cli.prune import prune
from gateway_addon.ledger import Outcome, Settlement, admin, batches, connect, reservations
from gateway_addon.ledger.batches import NewBatch, ResultRow
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.maintenance import prune as ledger_prune
from gateway_addon.ledger.reports import daily_totals, provider_comparison, spending
from gateway_addon.ledger.reports.call_sums import REPORTED
from gateway_addon.ledger.reports.day_reader import DayReader
from gateway_addon.ledger.store import engines

NOON = 1_773_144_000.0  # Tuesday 2026-03-10 12:00 UTC
DAY_S = 86_400
OLD = NOON - 120 * DAY_S
UNTIL = NOON - 60 * DAY_S - DAY_S / 2
PART = Part(40, tokens=Tokens(7, 3, 2, 1, 1, 1), web_searches=1)
ANSWER = Outcome(status=200, model_served="claude-haiku-4-5", stop_reason="end_turn", complete=True)
GROUPINGS = ("app", "model", "served", "day", "token")
REFUSED = (sqlite3.IntegrityError, psycopg.errors.IntegrityConstraintViolation)


@pytest.fixture(scope="module", params=ENGINES)
def filled(tmp_path_factory, request):
    found = new_ledger(tmp_path_factory.mktemp("filled"), request.param)
    with connect.changing(found) as db:
        fill(db)
    return found


@pytest.fixture
def path(tmp_path, filled):
    return copied(filled, tmp_path)


def fill(db):
    """Every fate that a call can have, over some hundred days; one of them has no end."""
    for number in range(120):
        now = OLD + number * 0.9 * DAY_S
        call = replace(CALL, team="batch" if number % 3 else None, model_asked=("claude-haiku-4-5", "claude-sonnet-5")[number % 2], max_tokens=50)
        for fate in range(3):
            call_id = reservations.reserve(db, "me", call, 100, [], now=now + fate).call_id
            match (number + fate) % 6:
                case 0:
                    reservations.void(db, call_id, Outcome(status=429), now=now + 5)
                case 1:
                    reservations.settle(db, call_id, Settlement(None, (PART,), replace(ANSWER, complete=False)), now=now + 5)
                    admin.adjust(db, call_id, -30, who="test", why="reconciled", now=now + 9)
                case 2:
                    reservations.settle(db, call_id, Settlement(150, (PART, Part(110, "compaction")), replace(ANSWER, flags=("drift",))), now=now + DAY_S)
                case _:
                    reservations.settle(db, call_id, Settlement(40, (PART,), ANSWER), now=now + 5)
        reservations.refused(db, "me", call, "cap_spent", now=now)
        reservations.free(db, "me", replace(call, endpoint="count_tokens", max_tokens=None), Outcome(status=200), now=now)
        reservations.failed_authentication(db, "token_unknown", now=now)
    reservations.reserve(db, "me", CALL, 77, [], now=OLD + 5)
    batch = reservations.reserve(db, "me", replace(CALL, endpoint="batches.create"), 900, [], now=OLD + 7).call_id
    batches.adopt(db, NewBatch("msgbatch_1", batch, CALL.app, OLD, 2, False, "digest", "{}", "{}", "ended", OLD + 60))
    batches.book_results(db, batch, [ResultRow(each, 0, "message", "claude-haiku-4-5", 10, 5, 0, 0, 0, 0, 0, 30, None, "") for each in ("a", "b")])
    assert batches.close(db, "msgbatch_1", now=OLD + 99).spent_nano == 60


def figures(path):
    """All that a person or a cap can see of the past."""
    spans = [(OLD - DAY_S, NOON), (OLD - DAY_S, UNTIL), (UNTIL, NOON)]
    with connect.reading(path) as db:
        seen = [spending.report(db, by, since=since, until=until) for by in GROUPINGS for since, until in spans]
        told = [spending.drifts(db, since=since, until=until) for since, until in spans]
        metered = [sorted(map(repr, provider_comparison.metered(db, since=since, until=until))) for since, until in spans]
        days = [(day.start, sorted(line[: len(REPORTED)] for line in day.lines), sorted(day.billed), sorted(day.noise)) for day in DayReader().between(db, OLD, NOON, NOON)]
        balances = [tuple(row) for row in db.execute("SELECT * FROM balances ORDER BY 1, 2, 3").fetchall()]
        return seen, told, metered, days, balances


def pruned(path, until=UNTIL, calls_max=7):
    carries = 0
    with connect.changing(path) as db:
        ledger_prune.begin(db, until, ledger_prune.prunable(db, until), who="test", now=NOON)
        since = 0
        while (day := ledger_prune.next_day(db, since, until)) is not None:
            left, since = day.groups, day.end
            while left:
                bundle, left = ledger_prune.bundle(left, calls_max)
                ledger_prune.carry(db, bundle, now=NOON)
                carries += len(bundle)
    return carries


def sound(path):
    with connect.reading(path) as db:
        return invariants.findings(db) == [] and db.execute("SELECT count(*) FROM carries").fetchone()[0] == 0


def test_nothing_that_is_reported_or_judged_changes(path):
    before = figures(path)
    daily_totals.keep(path, since=OLD, until=NOON, now=NOON)
    carries = pruned(path)
    assert figures(path) == before
    assert sound(path)
    left = rows(path, "SELECT count(*), sum(carried) FROM calls WHERE started_at < $1", UNTIL)[0]
    assert left == (carries + 1, 5 * 67 + 1), "the sums, and the call that has no end"
    assert rows(path, "SELECT count(*) FROM noise WHERE minute < $1 AND minute % 86400 <> 0", UNTIL) == [(0,)]
    assert rows(path, "SELECT (SELECT count(*) FROM batches), (SELECT count(*) FROM batch_usage)") == [(0, 0)], "of a batch its sum stays"
    pruned(path)
    pruned(path, UNTIL + 3 * DAY_S)
    assert figures(path) == before
    assert sound(path)


def test_a_carry_still_adds_up_after_a_change_of_zone_and_team(path):
    pruned(path)
    with connect.changing(path) as db:
        admin.align(db, "Asia/Tokyo", {"reports": "nightly"}, who="test", now=NOON)
    assert sound(path)


def test_a_pruned_call_is_not_corrected_and_the_error_says_why(path):
    pruned(path)
    carry_id, calls = rows(path, "SELECT id, carried FROM calls WHERE carried IS NOT NULL AND state = 'settled' LIMIT 1")[0]
    with connect.changing(path) as db:
        with pytest.raises(ValueError, match="call 1 is gone: `gateway prune` made sums of the calls before 2026-01-09"):
            admin.adjust(db, 1, 1, who="test", why="x", now=NOON)
        with pytest.raises(ValueError, match=f"call {carry_id} is the sum of {calls} calls"):
            admin.adjust(db, carry_id, 1, who="test", why="x", now=NOON)
        with pytest.raises(ValueError, match="call 999999 is not in the ledger"):
            admin.adjust(db, 999_999, 1, who="test", why="x", now=NOON)


def test_a_late_bill_of_a_call_that_is_gone_changes_nothing(path):
    pruned(path)
    before = figures(path)
    with connect.changing(path) as db:
        assert not reservations.settle(db, 1, Settlement(500), now=NOON).first
    assert figures(path) == before


@pytest.mark.parametrize(
    ("tampering", "sentence"),
    [
        (("INSERT INTO carries SELECT 1, max(id) FROM calls", "DELETE FROM entries WHERE call_id = 1"), "never removed"),
        (("DELETE FROM entries WHERE call_id = 1",), "never removed"),
        (("INSERT INTO entries (call_id, at, kind, spent_nano) VALUES (1, 0, 'carry', 5)",), "holds the sum"),
        (("INSERT INTO carries VALUES (2, 3)", "INSERT INTO entries (call_id, at, kind, spent_nano) VALUES (3, 0, 'carry', 5)"), "holds the sum"),
        (("INSERT INTO carries VALUES (2, 3)",), "takes no further call"),
        (("INSERT INTO carries VALUES (2, 2)",), "takes no further call"),
    ],
)
def test_the_tables_refuse_what_no_carry_holds(path, tampering, sentence):
    with closing(writing(path)) as db:
        db.execute("BEGIN")
        if len(tampering) > 1:  # with one guard gone the next one stands
            db.execute("DROP TRIGGER carries_before" + ("" if db.engine is engines.SQLITE else " ON carries"))
        for statement in tampering[:-1]:
            db.execute(statement)
        with pytest.raises(REFUSED, match=sentence):
            db.execute(tampering[-1])


def test_only_closed_windows_are_pruned(path):
    with connect.changing(path) as db, pytest.raises(ValueError, match="before this week, this month"):
        ledger_prune.begin(db, NOON - 9.4 * DAY_S, ledger_prune.prunable(db, NOON), who="test", now=NOON)


def test_two_prunes_at_once_do_not_count_a_call_twice(path):
    before = figures(path)
    with connect.changing(path) as db:
        day = ledger_prune.next_day(db, 0, UNTIL)
        ledger_prune.carry(db, day.groups[:2], now=NOON)
    with pytest.raises(Exception, match="another `gateway prune`"), connect.changing(path) as db:
        ledger_prune.carry(db, day.groups, now=NOON)
    assert figures(path) == before
    assert sound(path)


def run(path, *arguments):
    result = CliRunner().invoke(prune, [*arguments, "--ledger", url(path)])
    return result.exit_code, result.output


def test_the_command_prunes_says_so_and_leaves_a_trace(path):
    before = figures(path)
    code, said = run(path, "--before", "2025-11-20", "--dry-run")
    assert (code, said) == (0, "56 calls before 2025-11-20 00:00 UTC would become daily sums; 1 without an end would stay.\n")
    assert rows(path, "SELECT count(*) FROM calls WHERE carried IS NOT NULL") == [(0,)]
    code, said = run(path, "--before", "2025-11-20")
    assert code == 0
    assert re.search(r"56 calls before 2025-11-20 00:00 UTC are \d+ rows now\.", said)
    assert [action for (action,) in rows(path, "SELECT action FROM audit WHERE action = 'prune'")] == ["prune"]
    assert figures(path) == before
    assert sound(path)


KILLED = """
import os, signal
from gateway_addon.cli import main
from gateway_addon.ledger.maintenance import prune

carry, before = prune.carry, iter(range(7))

def dying(*arguments, **options):
    carry(*arguments, **options)
    if next(before, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)

prune.carry = dying
main()
"""


def test_a_prune_that_is_killed_is_taken_up_by_the_next(tmp_path):
    path = new_ledger(tmp_path)
    with connect.changing(path) as db:
        fill(db)
    before = figures(path)
    killed = subprocess.run([sys.executable, "-c", KILLED, "prune", "--before", "2026-01-09", "--ledger", url(path)], stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert rows(path, "SELECT count(*) FROM calls WHERE carried IS NOT NULL")[0][0] > 0, "it was killed in the middle"
    assert figures(path) == before
    assert sound(path)
    assert run(path, "--before", "2026-01-09")[0] == 0
    assert figures(path) == before
    assert sound(path)
    assert rows(path, "SELECT count(*) FROM calls WHERE carried IS NULL AND started_at < $1", UNTIL) == [(1,)]
