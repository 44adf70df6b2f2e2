"""Reports of closed days are kept, and are what the calls say whatever happens to them afterwards."""

from contextlib import closing
from dataclasses import replace

import pytest
from ledgers import CALL, ENGINES, NOON, copied, new_ledger, rows, spend, writing

from gateway_addon.ledger import Settlement, admin, connect, reservations
from gateway_addon.ledger.maintenance import prune
from gateway_addon.ledger.reports import daily_totals, spending

DAY_S = 86_400
SINCE, UNTIL = NOON - 5 * DAY_S, NOON
GROUPINGS = [by for by in spending.GROUPINGS if by != "agent"]


@pytest.fixture(scope="module", params=ENGINES)
def filled(tmp_path_factory, request):
    found = new_ledger(tmp_path_factory.mktemp("filled"), request.param)
    with connect.changing(found) as db:
        for number in range(60):
            call = replace(CALL, model_asked=("claude-haiku-4-5", "claude-sonnet-5")[number % 2])
            spend(db, NOON - number * DAY_S / 4, 10 + number, call)
            reservations.refused(db, "me", call, ("rate", "cap_spent")[number % 2], now=NOON - number * DAY_S / 4)
    return found


@pytest.fixture
def path(tmp_path, filled):
    return copied(filled, tmp_path)


def told(path):
    with connect.reading(path) as db:
        return [spending.report(db, by, since=SINCE, until=UNTIL) for by in GROUPINGS]


def keep(path, now=NOON):
    for by in GROUPINGS:
        daily_totals.keep(path, by, since=SINCE, until=UNTIL, now=now)


def kept(path):
    return rows(path, "SELECT count(*) FROM kept_days WHERE ready = 1 AND grouping = 'app'")[0][0]


def of_calls(path):
    with closing(writing(path)) as db:
        db.execute("DELETE FROM kept_days")
    return told(path)


def test_a_report_of_kept_days_reads_no_call_and_is_the_same(path):
    before = told(path)
    keep(path)
    assert kept(path) == 9, "the whole days of the period and of the one before"
    assert told(path) == before
    with closing(writing(path)) as db:
        db.execute("UPDATE kept_lines SET spent_nano = spent_nano + 1000 WHERE grouping = 'app'")
    assert told(path)[0].spent_nano == before[0].spent_nano + 4 * 1000


@pytest.mark.parametrize("change", ["a call", "a refusal", "a correction", "a zone", "a prune"])
def test_what_changes_a_day_strikes_it_off(path, change):
    keep(path)
    with connect.changing(path) as db:
        match change:
            case "a call":
                spend(db, NOON - 2 * DAY_S)
            case "a refusal":
                reservations.refused(db, "me", CALL, "rate", now=NOON - 2 * DAY_S)
            case "a correction":
                admin.adjust(db, 9, -3, who="test", why="x", now=NOON)
            case "a zone":
                admin.align(db, "Asia/Tokyo", {}, who="test", now=NOON)
            case "a prune":
                day = prune.next_day(db, NOON - 2.5 * DAY_S, NOON)
                prune.carry(db, day.groups, now=NOON)
    struck = kept(path)
    seen = told(path)
    keep(path)
    assert struck == (0 if change == "a zone" else 8)
    assert kept(path) == 9
    assert told(path) == seen == of_calls(path)


def test_a_day_is_kept_only_when_closed_for_an_hour_and_settled(path):
    """A day with an open call is not kept."""
    with connect.changing(path) as db:
        open_id = reservations.reserve(db, "me", CALL, 100, [], now=NOON - 3 * DAY_S).call_id
    keep(path)
    assert kept(path) == 6
    with connect.changing(path) as db:
        reservations.settle(db, open_id, Settlement(7), now=NOON)
    keep(path, now=NOON - DAY_S / 2 + 3599)
    assert kept(path) == 8
    keep(path, now=NOON - DAY_S / 2 + 3600)
    assert kept(path) == 9
    assert told(path) == of_calls(path)


def test_a_day_that_changes_while_it_is_summed_is_not_kept(path, monkeypatch):
    of_calls_really = spending.of_calls

    def with_a_call_between(db, by, since, until):
        lines = of_calls_really(db, by, since, until)
        if by == "app" and since < NOON - 2 * DAY_S < until:
            with connect.changing(path) as other:
                spend(other, NOON - 2 * DAY_S)
        return lines

    with monkeypatch.context() as patched:
        patched.setattr(spending, "of_calls", with_a_call_between)
        daily_totals.keep(path, "app", since=SINCE, until=UNTIL, now=NOON)
    assert kept(path) == 8
    assert told(path) == of_calls(path)


def claimed(path, now=NOON, **how):
    with connect.reading(path) as db:
        wanted = list(daily_totals.missing(db, "app", 0, NOON, NOON))
    with connect.changing(path) as db:
        return daily_totals.claim(db, wanted, now=now, **how)


def summed(path, spans):
    with connect.reading(path) as db:
        return [(span, daily_totals.lines(db, span)) for span in spans]


def put(path, found, claimed_at):
    with connect.changing(path) as db:
        return [daily_totals.put(db, span, lines, claimed_at=claimed_at) for span, lines in found]


def test_a_replaced_claim_keeps_nothing(path):
    """Not even where the day changed in between."""
    stale = summed(path, claimed(path))
    with connect.changing(path) as db:
        spend(db, NOON - 2 * DAY_S)
    fresh = summed(path, claimed(path, NOON + 1))
    assert put(path, stale, NOON) == [False] * len(stale)
    assert put(path, fresh, NOON + 1) == [True] * len(fresh)
    assert told(path) == of_calls(path)


@pytest.mark.parametrize("change", ["a zone", "an open call"])
def test_what_is_no_closed_day_any_more_is_not_claimed(path, change):
    with connect.reading(path) as db:
        wanted = list(daily_totals.missing(db, "app", 0, NOON, NOON))
    with connect.changing(path) as db:
        if change == "a zone":
            admin.align(db, "Asia/Tokyo", {}, who="test", now=NOON)
        else:
            reservations.reserve(db, "me", CALL, 100, [], now=NOON - 20 * DAY_S)
        assert daily_totals.claim(db, wanted, now=NOON) == []


def test_a_claim_alone_lets_others_finish_unless_they_are_gone(path):
    days = claimed(path)
    assert claimed(path, NOON + daily_totals.TURN_S - 1, alone=True) == []
    assert claimed(path, NOON + daily_totals.TURN_S + 1, alone=True) == days
