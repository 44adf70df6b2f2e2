"""The calendar of caps: when a day, a week, a month or a billing cycle began and when it ends, in one zone.

Promises pure arithmetic on unix seconds: nothing is ever "reset", a window is only computed. Windows are keyed by the UTC
second at which they start, so a change of zone changes keys and never mixes two calendars. Knows nothing of money.

A cycle is a month that begins on a day of the operator's choosing: `cycle:17`, and `cycle:31` where a shorter month begins it on its last.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import NamedTuple

type Window = str
"""`day`, `week`, `month`, `ever` or `cycle:DAY`."""

WINDOWS: tuple[Window, ...] = ("day", "week", "month", "ever")
"""The windows of every calendar."""

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
    cycles: tuple[tuple[Window, int], ...] = ()

    def of(self, window: Window) -> int:
        """Return the start of a window. Raises KeyError for a cycle that was not asked for."""
        start: int = dict(self.cycles)[window] if is_cycle(window) else getattr(self, window)
        return start


def cycle(day_of_month: int) -> Window:
    """Return the window of the months that begin on this day, 1 to 31."""
    return f"cycle:{day_of_month}"


def is_cycle(window: Window) -> bool:
    return window.startswith("cycle:")


def starts(at: float, zone: tzinfo = UTC, cycles: Iterable[Window] = ()) -> Starts:
    """Return the windows to which the instant `at` (unix seconds) belongs."""
    return _starts(datetime.fromtimestamp(at, zone).date(), zone, tuple(cycles))


@lru_cache(maxsize=256)
def next_start(window: Window, at: float, zone: tzinfo = UTC) -> int | None:
    """Return the unix second at which the window holding `at` ends and the next begins; None for `ever`.

    Nearly all who ask do so by the window's start, so the answer is remembered.
    """
    if window == "ever":
        return None
    today = datetime.fromtimestamp(at, zone).date()
    if window in _FIRST_DAY:
        return _midnight(_NEXT_DAY[window](_FIRST_DAY[window](today)), zone)
    return _midnight(_begins(window, _NEXT_DAY["month"](_cycle_began(window, today).replace(day=1))), zone)


def per(window: Window) -> str:
    """Return the words for how long an amount is to last: `a day`, `for ever`."""
    return "for ever" if window == "ever" else f"a {window}"


def during(window: Window) -> str:
    """Return the words for a cap's window after "for": `for a day`, `for ever`."""
    return f"for {per(window).removeprefix('for ')}"


def shown(at: float, zone: tzinfo) -> str:
    """Write a time for people, to the minute and with its zone: `2026-12-01 09:30 CET`."""
    there = datetime.fromtimestamp(at, zone)
    name = there.tzname() or "UTC"
    return f"{there:%Y-%m-%d %H:%M} {'UTC' * name.startswith(('+', '-'))}{name}"


@lru_cache(maxsize=64)
def _starts(today: date, zone: tzinfo, cycles: tuple[Window, ...]) -> Starts:
    day, week, month = (_midnight(first(today), zone) for first in _FIRST_DAY.values())
    return Starts(day, week, month, 0, tuple((window, _midnight(_cycle_began(window, today), zone)) for window in cycles))


def _cycle_began(window: Window, today: date) -> date:
    this = _begins(window, today.replace(day=1))
    return this if this <= today else _begins(window, (today.replace(day=1) - timedelta(days=1)).replace(day=1))


def _begins(window: Window, month: date) -> date:
    """Return the day of this month (given by its first) on which a cycle begins."""
    last = _NEXT_DAY["month"](month) - timedelta(days=1)
    return last.replace(day=min(last.day, int(window.removeprefix("cycle:"))))


def _midnight(day: date, zone: tzinfo) -> int:
    """Return the first instant of a day. Where daylight saving skips midnight, `fold=0` reads it with the offset before the jump: the jump
    itself. Where midnight comes twice, `fold=0` is the first of the two."""
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())
