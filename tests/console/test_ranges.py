"""The range of a page: whole days of the ledger's calendar, and as many before them."""

from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import pytest

from gateway_addon.console import ranges

NOW = datetime(2026, 3, 31, 15, 30, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("asked", "days", "before"),
    [
        ({}, ("2026-03-02", "2026-03-31"), ("2026-01-31", "2026-03-01")),
        ({"range": "today"}, ("2026-03-31", "2026-03-31"), ("2026-03-30", "2026-03-30")),
        ({"range": "7d"}, ("2026-03-25", "2026-03-31"), ("2026-03-18", "2026-03-24")),
        ({"range": "month"}, ("2026-03-01", "2026-03-31"), ("2026-02-01", "2026-02-28")),  # February has no more
        ({"range": "last-month"}, ("2026-02-01", "2026-02-28"), ("2026-01-01", "2026-01-31")),  # a whole month beside a whole one
        ({"from": "2026-03-10", "to": "2026-03-12"}, ("2026-03-10", "2026-03-12"), ("2026-03-07", "2026-03-09")),
        ({"from": "2026-03-30", "range": "7d"}, ("2026-03-30", "2026-03-31"), ("2026-03-28", "2026-03-29")),
    ],
)
def test_a_range_is_whole_days_and_so_is_the_one_before(asked, days, before):
    found = ranges.read(asked, NOW, UTC)
    assert (str(found.first), str(found.last)) == days
    assert tuple(f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}" for at in (found.before_since, found.before_until - 1)) == before
    assert ranges.read(found.query, NOW, UTC) == found
    assert found.is_running is (days[1] == "2026-03-31")


def test_a_day_of_a_clock_change_is_one_day():
    berlin = ZoneInfo("Europe/Berlin")
    found = ranges.of_days(date(2026, 3, 29), date(2026, 3, 29), NOW, berlin)
    assert (found.until - found.since, found.since - found.before_since) == (23 * 3600, 24 * 3600)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"range": "century"}, "today, 7d, 30d, month, last-month"),
        ({"from": "yesterday"}, "'yesterday' is no date"),
        ({"from": "2026-03-12", "to": "2026-03-10"}, "before it begins"),
        ({"from": "2020-01-01"}, "more than 800 days"),
        ({"from": "0001-01-01", "to": "0001-01-02"}, "not in this age"),
    ],
)
def test_a_range_that_is_none_is_said_in_a_sentence(asked, words):
    with pytest.raises(ValueError, match=words):
        ranges.read(asked, NOW, UTC)
