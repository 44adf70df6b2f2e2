"""Forecast what a window will have cost at its end, and the day on which its cap would be reached, from the days that are over.

Promises plain arithmetic that a person can repeat: what is spent so far, the rest of today, and for each later day of the window the
median of its weekday. A day is one of the ledger's calendar; its spending is the balance by which caps are judged. Money held by calls in
flight is not counted. Read-only.
"""

from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta, tzinfo
from typing import NamedTuple

from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.scope import named_in_full
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.types import Standing
from gateway_addon.money import cents
from gateway_addon.windows import Window, starts

CLOSED_DAYS_MAX = 28
CLOSED_DAYS_BY_WEEKDAY = 14
"""With fewer, a weekday was seen once: then every day stands for each."""
CLOSED_DAYS_MIN = 3
AHEAD_DAYS_MAX = 366
"""How far ahead a cap without an end (`ever`) is followed."""


class Projection(NamedTuple):
    """The future by the days that are over. Both None with fewer than three of them."""

    at_end_nano: int | None = None
    """None too in a window without an end."""
    reached_in_days: int | None = None
    """0 is today. None where the cap holds until the window ends, or is reached already."""


class Forecast(NamedTuple):
    """A scope's spending as it will be when a window ends."""

    scope: str
    window: Window
    cap_nano: int | None
    closed_days: int
    """Days that it rests on, 28 at most; fewer than three are too few."""
    at_end_nano: int | None
    reached_on: date | None
    """The day inside the window on which the cap in force now would be reached."""

    @property
    def sentence(self) -> str:
        """Say who would reach which cap when. For a forecast with such a day."""
        within = "in all" if self.window == "ever" else f"of the {self.window.partition(':')[0]}"
        would = f"{named_in_full(self.scope)} would reach the cap {within}, {cents(self.cap_nano or 0)}"
        return f"{would}, on {self.reached_on:%A}, {self.reached_on}, at the pace of the last {self.closed_days} days"


def too_young(names: Iterable[str]) -> str:
    """Say for which apps, teams or total there is no forecast."""
    return f"No forecast yet for {', '.join(names)}: it takes {CLOSED_DAYS_MIN} days that are over since the first call."


def project(closed_nano: Sequence[int], today_nano: int, spent_nano: int, days_left: int | None, cap_nano: int | None) -> Projection:
    """Return what is to come in a window of which `spent_nano` is spent, today's part included, and a cap is `cap_nano`.

    `closed_nano`: the spending of each day that is over, the oldest first, up to yesterday. `days_left`: the window's days after today;
    None: it has no end.
    """
    usual_nano = _usual_days(closed_nano)
    if usual_nano is None:
        return Projection()
    rest_nano = max(0, usual_nano[0] - today_nano)
    followed = AHEAD_DAYS_MAX if days_left is None else days_left
    reached, sum_nano = None, spent_nano
    for ahead in range(followed + 1):
        sum_nano += usual_nano[ahead % 7] if ahead else rest_nano
        if reached is None and cap_nano is not None and spent_nano < cap_nano <= sum_nano:
            reached = ahead
    return Projection(None if days_left is None else sum_nano, reached)


def forecasts(db: Connection, standings: Iterable[Standing], *, now: float) -> tuple[Forecast, ...]:
    """Return the forecast of each standing, in their order."""
    calendar = zone(db)
    today = datetime.fromtimestamp(now, calendar).date()
    days: dict[str, list[int]] = {}
    found = []
    for each in standings:
        if each.scope not in days:
            days[each.scope] = _days_nano(db, each.scope, now, calendar)
        *closed_nano, today_nano = days[each.scope]
        left = None if each.resets_at is None else (datetime.fromtimestamp(each.resets_at, calendar).date() - today).days - 1
        coming = project(closed_nano, today_nano, each.spent_nano, left, each.cap_nano)
        reached_on = None if coming.reached_in_days is None else today + timedelta(days=coming.reached_in_days)
        found.append(Forecast(each.scope, each.window, each.cap_nano, len(closed_nano), coming.at_end_nano, reached_on))
    return tuple(found)


def _usual_days(closed_nano: Sequence[int]) -> tuple[int, ...] | None:
    """Return a usual day's spending for today and each of the six days after it; None where too few days are over."""
    recent = closed_nano[-CLOSED_DAYS_MAX:]
    if len(recent) < CLOSED_DAYS_MIN:
        return None
    if len(recent) < CLOSED_DAYS_BY_WEEKDAY:
        return (_median(recent),) * 7
    return tuple(_median(recent[ahead - 7 :: -7]) for ahead in range(7))  # the last one is yesterday's: -7 is today's weekday


def _median(amounts_nano: Sequence[int]) -> int:
    """Return the median in whole nano-dollars, of two in the middle their mean rounded down: the library's would be a float."""
    ordered = sorted(amounts_nano)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


_DAYS = """
SELECT window_start, spent_nano FROM balances WHERE scope = $1 AND "window" = 'day' AND window_start >= $2
UNION ALL SELECT min(window_start), 0 FROM balances WHERE scope = $1 AND "window" = 'day' AND window_start < $2
"""


def _days_nano(db: Connection, scope: str, now: float, calendar: tzinfo) -> list[int]:
    """Return the spending of a scope's days, the oldest first and today last: 28 before today, or all since its first call."""
    keys = [starts(now, calendar).day]
    while len(keys) <= CLOSED_DAYS_MAX:
        keys.append(starts(keys[-1] - 1, calendar).day)
    keys.reverse()
    rows = db.execute(_DAYS, (scope, keys[0])).fetchall()
    spent = {start: spent_nano for start, spent_nano in rows if start is not None}
    first = min(spent, default=keys[-1])
    return [spent.get(key, 0) for key in keys if key >= first or key == keys[-1]]
