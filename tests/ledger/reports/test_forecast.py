"""Forecasts: the arithmetic, and the same on a ledger's days in its own zone."""

from contextlib import closing
from dataclasses import replace
from datetime import date
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledgers import CALL, ENGINES, NOON, Cap, new_ledger, spend, writing

from gateway_addon.ledger import admin, reservations
from gateway_addon.ledger.reports.forecast import Forecast, Projection, forecasts, project
from gateway_addon.windows import starts

DAY_S = 86_400
DOLLAR = 10**9
WEEK = [1, 2, 3, 4, 5, 60, 70]
"""A week's spending, whose last day is yesterday: today is the first one's weekday."""


@pytest.mark.parametrize(
    ("closed", "today", "spent", "left", "cap", "at_end", "reached"),
    [
        pytest.param([], 5, 5, 9, 6, None, None, id="no day is over"),
        pytest.param([5, 5], 5, 15, 9, 16, None, None, id="two days are too few"),
        pytest.param([5, 5, 5], 0, 15, 2, None, 30, None, id="three days: today and two more"),
        pytest.param([5, 5, 5], 2, 17, 2, None, 30, None, id="the rest of today counts"),
        pytest.param([5, 5, 5], 9, 24, 2, None, 34, None, id="more than usual today counts as it is"),
        pytest.param([1, 1, 100], 0, 102, 1, None, 104, None, id="one wild day changes nothing"),
        pytest.param([2, 4, 6, 8], 0, 20, 0, None, 25, None, id="of two in the middle the mean"),
        pytest.param([2, 3, 3, 4, 3], 0, 0, 0, None, 3, None, id="whole nano-dollars"),
        pytest.param([1, 1, 2, 2], 0, 0, 0, None, 1, None, id="rounded down"),
        pytest.param(WEEK, 0, 0, 5, None, 24, None, id="one week: each day stands for all"),
        pytest.param([9] * 6 + WEEK, 0, 0, 5, None, 54, None, id="thirteen days: each day stands for all"),
        pytest.param(WEEK * 2, 0, 0, 5, None, 1 + 2 + 3 + 4 + 5 + 60, None, id="fourteen days: by weekday"),
        pytest.param(WEEK * 2, 0, 0, 7, None, sum(WEEK) + 1, None, id="the week begins anew"),
        pytest.param([99] * 7 + WEEK * 4, 0, 0, 6, None, sum(WEEK), None, id="what is older than 28 days is forgotten"),
        pytest.param(WEEK * 4, 0, 0, 30, 6, 4 * sum(WEEK) + 1 + 2 + 3, 2, id="the day that reaches the cap"),
        pytest.param(WEEK * 4, 0, 0, 30, 1, 4 * sum(WEEK) + 6, 0, id="today is such a day"),
        pytest.param([5, 5, 5], 5, 15, 3, 30, 30, 3, id="the window's last day is inside it"),
        pytest.param([5, 5, 5], 5, 15, 2, 30, 25, None, id="the day after it is not"),
        pytest.param([5, 5, 5], 5, 30, 3, 30, 45, None, id="a cap that is reached is not to come"),
        pytest.param([5, 5, 5], 5, 15, None, 65, None, 10, id="a cap without an end has a day and no sum"),
        pytest.param([0, 0, 0], 0, 15, None, 65, None, None, id="nothing is spent any more"),
    ],
)
def test_a_projection_is_what_a_person_would_reckon(closed, today, spent, left, cap, at_end, reached):
    assert project(closed, today, spent, left, cap) == Projection(at_end, reached)


AMOUNTS = st.integers(0, 10**15)


@given(st.lists(AMOUNTS, max_size=40), AMOUNTS, AMOUNTS, st.integers(0, 60), st.integers(1, 10**16))
def test_a_projection_agrees_with_the_median_of_each_weekday(closed, today, before, left, cap):
    """Reckoned once more, day by day, with the library's median; and never below what is spent."""
    spent = before + today
    found = project(closed, today, spent, left, cap)
    recent = closed[-28:]
    if len(recent) < 3:
        assert found == Projection()
        return
    sums = [spent]
    for ahead in range(left + 1):
        days = recent if len(recent) < 14 else [nano for ago, nano in enumerate(reversed(recent), 1) if (ago + ahead) % 7 == 0]
        usual = int(sum(sorted(days)[(len(days) - 1) // 2 : len(days) // 2 + 1])) // (2 - len(days) % 2)
        assert abs(usual - median(days)) <= 1
        sums.append(sums[-1] + (usual if ahead else max(0, usual - today)))
    first = next((ahead for ahead, sum_nano in enumerate(sums[1:]) if sum_nano >= cap), None)
    assert found == Projection(sums[-1], first if spent < cap else None)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("zone", "hour_s"), [("UTC", 0), ("Pacific/Auckland", 11.9 * 3600)], ids=["UTC", "a zone in which it is tomorrow"])
def test_a_ledgers_days_are_those_of_its_zone(tmp_path, engine, zone, hour_s):
    """Tuesday, 2026-03-10 in UTC, with dollars spent on each day since Sunday, the first; a day without a call counts as one."""
    path = new_ledger(tmp_path, engine)
    with closing(writing(path)) as db:
        admin.align(db, zone, {"reports": "batch"}, who="test", now=NOON)
        for day in range(1, 10):
            if day != 6:
                spend(db, NOON + (day - 10) * DAY_S + hour_s, 2 * DOLLAR)
        spend(db, NOON + hour_s, 1 * DOLLAR)
        admin.issue_token(db, "drafts", "d2", who="test", now=NOON)
        spend(db, NOON + hour_s, 1 * DOLLAR, replace(CALL, app="drafts", team=None, token_id=2))
        now = NOON + hour_s + 60
        caps = [Cap("app:reports", "month", 40 * DOLLAR), Cap("app:reports", "week", 50 * DOLLAR), Cap("app:drafts", "month", 2 * DOLLAR)]
        caps += [Cap("total", "ever", 50 * DOLLAR)]
        today = date(2026, 3, 10 if zone == "UTC" else 11)
        left = 31 - today.day
        assert forecasts(db, reservations.capped(db, caps, now=now), now=now) == (
            Forecast("app:reports", "month", 40 * DOLLAR, 9, (17 + 1 + 2 * left) * DOLLAR, today.replace(day=today.day + 11)),
            Forecast("app:reports", "week", 50 * DOLLAR, 9, 14 * DOLLAR, None),
            Forecast("app:drafts", "month", 2 * DOLLAR, 0, None, None),
            Forecast("total", "ever", 50 * DOLLAR, 9, None, date(2026, 3, today.day + 16)),
        )


def test_days_without_calls_count_once_the_first_call_was_made(tmp_path):
    """An app that called for a month and then rested for two: 28 days without spending, not the thirty days before them."""
    with closing(writing(new_ledger(tmp_path))) as db:
        for day in range(30):
            spend(db, NOON + day * DAY_S, 3 * DOLLAR)
        now = NOON + 90 * DAY_S
        [month] = forecasts(db, reservations.capped(db, [Cap("app:reports", "month", DOLLAR)], now=now), now=now)
        assert (month.closed_days, month.at_end_nano, month.reached_on) == (28, 0, None)
        assert starts(now).month > NOON + 30 * DAY_S


def test_a_cycle_ends_on_its_own_day(tmp_path):
    """From the 17th: on the 10th seven days are left of it, today with them."""
    with closing(writing(new_ledger(tmp_path))) as db:
        for day in range(4):
            spend(db, NOON - day * DAY_S, 2 * DOLLAR)
        [standing] = reservations.capped(db, [Cap("app:reports", "cycle:17", 20 * DOLLAR)], now=NOON)
        [cycle] = forecasts(db, [standing._replace(spent_nano=8 * DOLLAR)], now=NOON)
    assert (cycle.at_end_nano, cycle.reached_on) == ((8 + 6 * 2) * DOLLAR, date(2026, 3, 16))
    assert cycle.sentence == "app reports would reach the cap of the cycle, $20.00, on Monday, 2026-03-16, at the pace of the last 3 days"
