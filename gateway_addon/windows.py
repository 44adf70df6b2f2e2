"""The calendar of caps: when a day, a week or a month began and when it ends, in one zone.

Promises pure arithmetic on unix seconds: nothing is ever "reset", a window is only computed. Windows are keyed by the UTC
second at which they start, so a change of zone changes keys and never mixes two calendars. Knows nothing of money.
"""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Literal, NamedTuple, cast

Window = Literal["day", "week", "month", "ever"]
WINDOWS: tuple[Window, ...] = ("day", "week", "month", "ever")

_FIRST_DAY: dict[Window, Callable[[date], date]] = {
    "day": lambda day: day,
    "week": lambda day: day - timedelta(days=day.weekday()),  # Monday
    "month": lambda day: day.replace(day=1),
}
_NEXT_DAY: dict[Window, Callable[[date], date]] = {
    "day": lambda first: first + timedelta(days=1),
    "week": lambda first: first + timedelta(days=7),
    "month": lambda first: (first + timedelta(days=31)).replace(day=1),
}


class Starts(NamedTuple):
    """The UTC second at which each window holding one instant began. `ever` began at 0."""

    day: int
    week: int
    month: int
    ever: int = 0

    def of(self, window: Window) -> int:
        return cast(int, getattr(self, window))


def starts(at: float, zone: tzinfo = UTC) -> Starts:
    """The windows to which the instant `at` (unix seconds) belongs."""
    return _starts(datetime.fromtimestamp(at, zone).date(), zone)


def next_start(window: Window, at: float, zone: tzinfo = UTC) -> int | None:
    """The unix second at which the window holding `at` gives way to the next one; None for `ever`."""
    return None if window == "ever" else _next_start(window, datetime.fromtimestamp(at, zone).date(), zone)


def shown(at: float, zone: tzinfo) -> str:
    """Write a time for people, to the minute and with its zone: `2026-12-01 09:30 CET`."""
    there = datetime.fromtimestamp(at, zone)
    name = there.tzname() or "UTC"
    return f"{there:%Y-%m-%d %H:%M} {'UTC' * name.startswith(('+', '-'))}{name}"


@lru_cache(maxsize=64)
def _starts(today: date, zone: tzinfo) -> Starts:
    return Starts(*(_midnight(first(today), zone) for first in _FIRST_DAY.values()))


@lru_cache(maxsize=256)
def _next_start(window: Window, today: date, zone: tzinfo) -> int:
    return _midnight(_NEXT_DAY[window](_FIRST_DAY[window](today)), zone)


def _midnight(day: date, zone: tzinfo) -> int:
    """The first instant of a day. Where daylight saving skips midnight, `fold=0` reads it with the offset before the jump: the jump
    itself. Where midnight comes twice, `fold=0` is the first of the two."""
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())
