from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_addon.windows import WINDOWS, cycle, next_start, starts

ZONES = ["UTC", "Europe/Berlin", "America/Havana", "Africa/Cairo", "Australia/Lord_Howe", "Asia/Kathmandu", "Pacific/Apia"]


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def utc(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M")


@pytest.mark.parametrize(
    ("zone", "instant", "window", "start", "end"),
    [
        ("UTC", "2026-03-10T12:00Z", "day", "2026-03-10T00:00", "2026-03-11T00:00"),
        ("UTC", "2026-03-10T00:00Z", "day", "2026-03-10T00:00", "2026-03-11T00:00"),
        ("UTC", "2026-03-09T23:59:59.999Z", "day", "2026-03-09T00:00", "2026-03-10T00:00"),
        ("UTC", "2026-03-15T23:00Z", "week", "2026-03-09T00:00", "2026-03-16T00:00"),  # Sunday belongs to Monday's week
        ("UTC", "2026-03-16T00:00Z", "week", "2026-03-16T00:00", "2026-03-23T00:00"),
        ("UTC", "2026-01-01T05:00Z", "week", "2025-12-29T00:00", "2026-01-05T00:00"),
        ("UTC", "2026-01-31T23:00Z", "month", "2026-01-01T00:00", "2026-02-01T00:00"),
        ("UTC", "2026-02-28T23:00Z", "month", "2026-02-01T00:00", "2026-03-01T00:00"),
        ("UTC", "2028-02-29T12:00Z", "day", "2028-02-29T00:00", "2028-03-01T00:00"),  # leap day
        ("UTC", "2026-12-31T23:59Z", "month", "2026-12-01T00:00", "2027-01-01T00:00"),
        ("Europe/Berlin", "2026-03-29T12:00Z", "day", "2026-03-28T23:00", "2026-03-29T22:00"),  # 23 hours
        ("Europe/Berlin", "2026-10-25T12:00Z", "day", "2026-10-24T22:00", "2026-10-25T23:00"),  # 25 hours
        ("Europe/Berlin", "2026-03-31T21:59Z", "month", "2026-02-28T23:00", "2026-03-31T22:00"),
        ("America/Los_Angeles", "2026-03-10T06:59Z", "day", "2026-03-09T07:00", "2026-03-10T07:00"),
        ("Asia/Kolkata", "2026-03-10T18:30Z", "day", "2026-03-10T18:30", "2026-03-11T18:30"),
        ("Africa/Cairo", "2026-04-24T12:00Z", "day", "2026-04-23T22:00", "2026-04-24T21:00"),  # midnight is skipped
        ("America/Havana", "2026-11-01T04:30Z", "day", "2026-11-01T04:00", "2026-11-02T05:00"),  # midnight comes twice
        ("America/Havana", "2026-11-01T05:30Z", "day", "2026-11-01T04:00", "2026-11-02T05:00"),
        ("Pacific/Apia", "2011-12-30T09:00Z", "day", "2011-12-29T10:00", "2011-12-30T10:00"),  # the 30th did not exist
    ],
)
def test_a_window_is_the_calendar_of_its_zone(zone, instant, window, start, end):
    assert utc(starts(at(instant), ZoneInfo(zone)).of(window)) == start
    assert utc(next_start(window, at(instant), ZoneInfo(zone))) == end


def test_ever_has_no_end():
    assert starts(at("2026-03-10T12:00Z")).of("ever") == 0
    assert next_start("ever", at("2026-03-10T12:00Z")) is None


@pytest.mark.parametrize(
    ("day", "zone", "instant", "start", "end"),
    [
        (17, "UTC", "2026-10-17T00:00Z", "2026-10-17T00:00", "2026-11-17T00:00"),
        (17, "UTC", "2026-10-16T23:59:59.999Z", "2026-09-17T00:00", "2026-10-17T00:00"),
        (1, "UTC", "2026-02-14T12:00Z", "2026-02-01T00:00", "2026-03-01T00:00"),
        (31, "UTC", "2026-02-27T12:00Z", "2026-01-31T00:00", "2026-02-28T00:00"),
        (31, "UTC", "2026-02-28T12:00Z", "2026-02-28T00:00", "2026-03-31T00:00"),
        (30, "UTC", "2028-02-29T12:00Z", "2028-02-29T00:00", "2028-03-30T00:00"),  # leap day
        (31, "UTC", "2026-04-30T00:00Z", "2026-04-30T00:00", "2026-05-31T00:00"),
        (29, "UTC", "2027-01-03T12:00Z", "2026-12-29T00:00", "2027-01-29T00:00"),
        (29, "Europe/Berlin", "2026-03-29T12:00Z", "2026-03-28T23:00", "2026-04-28T22:00"),  # begins on the day of the jump
        (24, "Africa/Cairo", "2026-04-24T12:00Z", "2026-04-23T22:00", "2026-05-23T21:00"),  # midnight is skipped
    ],
)
def test_a_cycle_is_a_month_from_its_day(day, zone, instant, start, end):
    window, place = cycle(day), ZoneInfo(zone)
    assert utc(starts(at(instant), place, [window]).of(window)) == start
    assert utc(next_start(window, at(instant), place)) == end


@given(
    instant=st.floats(at("1999-12-01T00:00Z"), at("2060-01-01T00:00Z")),
    day=st.integers(1, 31), zone=st.sampled_from(ZONES),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_instant_is_in_one_cycle(instant, day, zone):
    """It began at or before the instant, on its day or the month's last, ends after it, and the next begins there."""
    window, place = cycle(day), ZoneInfo(zone)
    start, end = starts(instant, place, [window]).of(window), next_start(window, instant, place)
    assert start <= instant < end
    assert 27 * 86_400 < end - start < 32 * 86_400
    assert starts(start, place, [window]).of(window) == starts(end - 1, place, [window]).of(window) == start
    assert starts(end, place, [window]).of(window) == end
    began = datetime.fromtimestamp(start, place).date()
    assert began.day == day or (began.day < day and (began + timedelta(days=1)).day == 1)


def test_the_cycle_from_the_first_is_the_month():
    window = cycle(1)
    for zone in map(ZoneInfo, ZONES):
        found = starts(at("2026-07-31T23:30Z"), zone, [window])
        assert found.of(window) == found.month


@pytest.mark.parametrize("zone", ZONES[:6])
def test_windows_follow_each_other_without_gap_or_overlap(zone):
    place = ZoneInfo(zone)
    for window in WINDOWS[:3]:
        instant = starts(at("2026-01-01T12:00Z"), place).of(window)
        for _ in range(800 if window == "day" else 60):
            following = next_start(window, instant, place)
            assert following > instant
            assert starts(following, place).of(window) == following
            assert starts(following - 1, place).of(window) == instant
            instant = following
