"""A ledger of many calls costs what one of a single call does: counted in steps of the database's machine, and in the soak by the clock."""

import asyncio
import sqlite3
import statistics
import sys
import time
from contextlib import closing

import month
import pytest
from ledgers import Cap, Part, Steps
from processes import ledgered

from gateway_addon.ledger import Ledger, NewCall, Settlement, admin, connect, reservations
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.reports import daily_totals, spending
from gateway_addon.ledger.store import sqlite_files

APP = month.APPS[4]
CALL = NewCall(APP, "content", 5, model_asked="claude-haiku-4-5", max_tokens=100)
CAPS = [Cap(f"app:{APP}", "day", 10**15), Cap("total", "month", 10**15), Cap("team:content", "ever", 10**15)]
DAY_S = 86_400


def a_call(db, now):
    reservations.settle(db, reservations.reserve(db, "me", CALL, 300, CAPS, now=now).call_id, Settlement(200, (Part(200),)), now=now)


def test_a_call_and_a_kept_month_cost_the_same_in_a_large_ledger(tmp_path):
    """Counted in steps of the database."""
    now = time.time()
    took = {}
    for calls in (1, 20_000):
        path = tmp_path / f"{calls}.db"
        month.make(path, calls, until=now)
        with closing(sqlite_files.writer_connection(path)) as db:
            a_call(db, now)  # the first one makes the balances' rows
            took[calls] = Steps(db).of(lambda db=db: a_call(db, now))
    assert took[20_000] <= took[1] * 1.05
    with closing(sqlite_files.reader_connection(path)) as db:
        db.raw.row_factory = sqlite3.Row
        steps, period = Steps(db), {"since": now - 25 * DAY_S, "until": now}
        by_calls = steps.of(lambda: spending.report(db, "app", **period))
        daily_totals.keep(path, **period, now=now)
        assert steps.of(lambda: spending.report(db, "app", **period)) < by_calls / 5
    with connect.reading(path) as db:
        assert Steps(db).of(lambda: list(daily_totals.missing(db, **period, now=now))) < 500, "it does not look for the days call by call"


def test_a_new_app_comes_into_force_without_a_scan_of_the_ledger(tmp_path):
    month.make(tmp_path / "made.db", 2_000, until=time.time())
    with closing(sqlite_files.writer_connection(tmp_path / "made.db")) as db:
        assert Steps(db).of(lambda: admin.align(db, "UTC", {"new": "content"}, who="test", now=time.time())) < 100
        assert not admin.align(db, "UTC", {"new": "content"}, who="test", now=time.time()), "it is settled"


def test_the_ledgers_made_for_these_tests_are_sound(tmp_path):
    month.make(tmp_path / "made.db", 5_000, until=time.time())
    with connect.reading(tmp_path / "made.db") as db:
        assert invariants.findings(db) == []


async def latencies(path) -> tuple[float, float]:
    """The median and the 99th percentile of 1,600 admissions by eight callers."""
    ledger, taken = await Ledger.open(f"sqlite:///{path}"), []

    async def caller():
        for _ in range(200):
            began = time.perf_counter()
            held = await ledger.reserve(CALL, 300, CAPS, now=time.time())
            taken.append(time.perf_counter() - began)
            ledger.settle(held, Settlement(200, (Part(200),)), now=time.time())

    await asyncio.gather(*(caller() for _ in range(8)))
    await ledger.close()
    return statistics.median(taken), statistics.quantiles(taken, n=100)[98]


async def start_s(gateways) -> float:
    """From the command to its first line."""
    began = time.perf_counter()
    async with gateways.serving(1):
        return time.perf_counter() - began


@pytest.mark.soak
@pytest.mark.parametrize("calls", [10_000_000])
async def test_admission_a_months_report_and_start_up_by_the_clock(tmp_path, calls):
    now, rounds, large, empty = time.time(), {}, tmp_path / "gateway.db", tmp_path / "empty.db"
    for path, made in ((empty, 1), (large, calls)):
        month.make(path, made, until=now, days=365)
    for _ in range(5):
        for path in (empty, large):
            rounds.setdefault(path, []).append(await latencies(path))
    median, slow = (statistics.median(each[part] for each in rounds[large]) / statistics.median(each[part] for each in rounds[empty]) for part in (0, 1))
    gateways = ledgered(tmp_path, "http://127.0.0.1:9", {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\n"})
    started_s = min([await start_s(gateways) for _ in range(3)])
    daily_totals.keep(large, since=now - 30 * DAY_S, until=now, now=now)
    began = time.perf_counter()
    with connect.reading(large) as db:
        spending.report(db, "app", since=now - 30 * DAY_S, until=now)
    report_s = time.perf_counter() - began
    print(f"{calls:,} calls: p50 {median:.2f}x, p99 {slow:.2f}x, started in {started_s:.2f} s, month in {report_s:.2f} s", file=sys.stderr)
    assert median <= 1.25
    assert slow <= 1.25
    assert started_s < 2
    assert report_s < 1
