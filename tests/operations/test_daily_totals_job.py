"""Closed days are kept without anybody asking: by one process at a time, once, and at no cost to the calls that are served meanwhile."""

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from dataclasses import replace

import month
import pytest
from ledgers import CALL, DAY_CAP, ENGINES, NOON, Part, Steps, new_ledger, rows, spend, until, url
from processes import ledgered

from gateway_addon.ledger import Ledger, LedgerUnavailable, Settlement, background, connect, reservations
from gateway_addon.ledger.reports import daily_totals, spending
from gateway_addon.ledger.reports.call_sums import Day
from gateway_addon.operations import daily_totals_job, jobs
from gateway_addon.operations.daily_totals_job import DailyTotalsJob
from gateway_addon.proxy.server import assembled
from gateway_addon.simulator import KEY

DAY_S = 86_400
PERIOD = {"since": NOON - 3 * DAY_S, "until": NOON}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    for pause in ("LOOK_EVERY_S", "PAUSE_S", "REST"):
        monkeypatch.setattr(daily_totals_job, pause, 0.01)


@pytest.fixture(params=ENGINES)
def path(tmp_path, request):
    found = new_ledger(tmp_path, request.param)
    with connect.changing(found) as db:
        for number in range(24):
            spend(db, NOON - number * DAY_S / 4, 10 + number)
            reservations.refused(db, "me", CALL, "rate", now=NOON - number * DAY_S / 4)
    return found


@contextlib.asynccontextmanager
async def kept_by(path, now=NOON):
    ledger = await Ledger.open(url(path), now=now)
    try:
        yield DailyTotalsJob(ledger, lambda: now)
    finally:
        await ledger.close()


def kept(path):
    """The kept days, the oldest first."""
    return [int((NOON - start) // DAY_S) for (start,) in rows(path, "SELECT day_start FROM kept_days WHERE ready = 1 ORDER BY 1")]


def told(path):
    with connect.reading(path) as db:
        return spending.report(db, "app", **PERIOD)


async def test_each_closed_day_is_kept_without_a_report_being_asked(path):
    """Each closed day is kept without anybody asking for a report."""
    before = told(path)
    async with kept_by(path) as days:
        async with jobs.running((0.01, "closed days", days.catch_up)):
            await until(lambda: kept(path) == [6, 5, 4, 3, 2, 1])
    assert told(path) == before


async def test_the_newest_day_is_kept_first(path):
    async with kept_by(path) as days:
        for _ in range(3):
            assert await days.keep()
    assert kept(path) == [3, 2, 1]


async def test_a_day_with_an_open_call_is_kept_once_the_call_has_ended(path):
    with connect.changing(path) as db:
        open_id = reservations.reserve(db, "batches", CALL, 100, [], now=NOON - 3 * DAY_S).call_id
    async with kept_by(path) as days:
        await days.catch_up()
        assert kept(path) == [6, 5, 4]
        with connect.changing(path) as db:
            reservations.settle(db, open_id, Settlement(7), now=NOON)
        await days.catch_up()
    assert kept(path) == [6, 5, 4, 3, 2, 1]


async def test_a_day_that_is_struck_off_is_kept_anew(path):
    async with kept_by(path) as days:
        await days.catch_up()
        with connect.changing(path) as db:
            spend(db, NOON - 2 * DAY_S, 500)
        after = told(path)
        assert kept(path) == [6, 5, 4, 3, 1]
        await days.catch_up()
    assert kept(path) == [6, 5, 4, 3, 2, 1]
    assert told(path) == after


async def test_of_several_gateways_one_sums_at_a_time_and_no_day_twice(path, monkeypatch):
    summed, at_work, together = Counter(), [], []

    def slowly(db, span, of_calls=daily_totals.of_calls):
        at_work.append(span)
        together.append(len(at_work))
        time.sleep(0.02)
        at_work.remove(span)
        summed[span] += 1
        return of_calls(db, span)

    monkeypatch.setattr(daily_totals, "of_calls", slowly)
    async with kept_by(path) as one, kept_by(path) as two, kept_by(path) as three:
        async with jobs.running(*((0.01, "closed days", each.catch_up) for each in (one, two, three))):
            await until(lambda: kept(path) == [6, 5, 4, 3, 2, 1])
    assert set(summed.values()) == {1}
    assert (len(summed), max(together)) == (6, 1)


@contextlib.contextmanager
def hanging(monkeypatch):
    """A sum that takes as long as the block."""
    began, may_end = threading.Event(), threading.Event()

    def hang(db, span):
        began.set()
        may_end.wait(60)
        return Day(*span)

    with monkeypatch.context() as patched:
        patched.setattr(daily_totals, "of_calls", hang)
        yield began
        may_end.set()


async def test_calls_are_admitted_and_settled_while_a_day_is_summed(path, monkeypatch):
    with hanging(monkeypatch) as began:
        async with kept_by(path) as days:
            summing = asyncio.ensure_future(days.keep())
            await until(began.is_set)
            for _ in range(3):
                held = await days._ledger.reserve(CALL, 30, DAY_CAP, now=NOON)
                assert (await days._ledger.settle(held, Settlement(10, (Part(10),)), now=NOON)).first
            summing.cancel()


def test_the_end_of_a_gateway_does_not_wait_for_a_sum(path, monkeypatch):
    with hanging(monkeypatch) as began:

        async def serve_for_a_moment():
            async with kept_by(path) as days:
                async with jobs.running((0.01, "closed days", days.catch_up)):
                    await until(began.is_set)

        began_at = time.monotonic()
        asyncio.run(serve_for_a_moment())
        assert time.monotonic() - began_at < 10, "the sum takes twenty seconds"


async def test_a_store_that_fails_is_said_once_and_tried_again(path, monkeypatch, caplog):
    failures, read = [LedgerUnavailable("the disk is slow")] * 5, background.read

    async def failing(*arguments):
        if failures:
            raise failures.pop()
        return await read(*arguments)

    monkeypatch.setattr(background, "read", failing)
    async with kept_by(path) as days:
        async with jobs.running((0.01, "closed days", days.catch_up)):
            await until(lambda: kept(path) == [6, 5, 4, 3, 2, 1])
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["Work on closed days is tried again: the disk is slow"]


async def test_a_day_takes_two_short_turns_however_many_calls_it_had(tmp_path, monkeypatch):
    turns = []

    def counted(work):
        def run(db, *arguments, **named):
            answers = []
            turns[-1].append(Steps(db).of(lambda: answers.append(work(db, *arguments, **named))))
            return answers[0]

        return run

    for name in ("claim", "put"):
        monkeypatch.setattr(daily_totals, name, counted(getattr(daily_totals, name)))
    for calls in (1_000, 20_000):
        month.make(tmp_path / f"{calls}.db", calls, until=NOON, days=3)
        async with kept_by(tmp_path / f"{calls}.db") as days:
            turns.append([])
            writer, given = days._ledger._writer, []
            monkeypatch.setattr(writer, "put", lambda work, put=writer.put, given=given: (given.append(work), put(work)))
            await days.catch_up()
            operations = len(given)
        assert len(turns[-1]) == 2 * 3 == operations, "a claim and its sums, for each day"
    assert max(turns[1]) <= max(turns[0]) * 1.05 < 300, "of ten instructions: some hundredths of a millisecond"


async def test_a_first_report_reads_the_days_that_were_kept_for_it(tmp_path):
    path = tmp_path / "gateway.db"
    month.make(path, 10_000, until=NOON)
    period = {"since": NOON - 10 * DAY_S, "until": NOON}
    with connect.reading(path) as db:
        by_calls = Steps(db).of(lambda: spending.report(db, "app", **period))
    async with kept_by(path) as days:
        await days.catch_up()
    with connect.reading(path) as db:
        assert list(daily_totals.missing(db, 0, NOON, NOON)) == [], "nothing is left for the first report to sum"
        assert Steps(db).of(lambda: spending.report(db, "app", **period)) < by_calls / 5


async def test_a_running_gateway_keeps_days(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMULATED_KEY", KEY)
    place = ledgered(tmp_path, "http://127.0.0.1:9", {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\n"})
    with connect.changing(place.ledger) as db:
        spend(db, time.time() - 2 * DAY_S, call=replace(CALL, app="app"))
    async with assembled(place.folder / "policies", url(place.ledger)):
        await until(lambda: len(kept(place.ledger)) == 1)
