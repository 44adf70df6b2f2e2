"""Read the range of days that a page is about from its address, and name the range before it. Pure.

Promises whole days of the ledger's calendar, from the first instant of one to the end of another, and that the range before holds as
many days: those just before it or, for a month, the first ones of the month before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta, tzinfo

from gateway_addon.names import PROGRAM
from gateway_addon.windows import next_start, starts

NAMES = {"today": "Today", "7d": "7 days", "30d": "30 days", "month": "This month", "last-month": "Last month"}
USUAL = "30d"
DAYS_MAX = 800
"""Two years, and the days of a comparison."""


@dataclass(frozen=True, slots=True)
class Range:
    """Days from `first` to `last`, and the same in unix seconds. `name`: a key of NAMES, or `` for dates that were typed."""

    name: str
    first: date
    last: date
    since: int
    until: int
    before_since: int
    before_until: int
    before_words: str
    is_running: bool
    """The last day is not over yet."""

    @property
    def words(self) -> str:
        """Return the days as people write them."""
        return _words(self.first, self.last)

    @property
    def query(self) -> dict[str, str]:
        """Return the part of an address that asks for this range."""
        if self.name:
            return {} if self.name == USUAL else {"range": self.name}
        return {"from": str(self.first), "to": str(self.last)}


def read(asked: Mapping[str, str], now: float, zone: tzinfo) -> Range:
    """Return the range that an address asks for. Raises ValueError for dates that are none, or too many."""
    today = datetime.fromtimestamp(now, zone).date()
    typed = asked.get("from", "").strip(), asked.get("to", "").strip()
    if any(typed):
        first, last = (_date(text) if text else other for text, other in zip(typed, (today, today), strict=True))
        return of_days(first, last, now, zone)
    name = asked.get("range") or USUAL
    if name not in NAMES:
        raise ValueError(f"There is no range {name!r}; there are {', '.join(NAMES)}, and from= and to= with dates.")
    this_month = today.replace(day=1)
    if name == "last-month":
        return _range(name, (this_month - timedelta(days=1)).replace(day=1), this_month - timedelta(days=1), now, zone)
    first = {"today": today, "7d": today - timedelta(days=6), "30d": today - timedelta(days=29), "month": this_month}[name]
    return _range(name, first, today, now, zone)


def of_days(first: date, last: date, now: float, zone: tzinfo) -> Range:
    """Return the range from one date to another, both included. Raises ValueError."""
    if last < first:
        raise ValueError(f"The range ends on {last}, before it begins on {first}. Exchange the two dates.")
    if (last - first).days >= DAYS_MAX:
        raise ValueError(f"From {first} to {last} are more than {DAYS_MAX} days. Ask for fewer; {PROGRAM} report sums any period.")
    return _range("", first, last, now, zone)


def _range(name: str, first: date, last: date, now: float, zone: tzinfo) -> Range:
    days = (last - first).days + 1
    if name.endswith("month"):
        before_first = (first - timedelta(days=1)).replace(day=1)
        length = days if name == "month" else (first - before_first).days
        before_last = min(before_first + timedelta(days=length), first) - timedelta(days=1)
    else:
        before_first, before_last = first - timedelta(days=days), first - timedelta(days=1)
    since, until = _start(first, zone), _end(last, zone)
    before_words = _words(before_first, before_last)
    return Range(name, first, last, since, until, _start(before_first, zone), _end(before_last, zone), before_words, since <= now < until)


def _date(text: str) -> date:
    try:
        found = date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no date; write one like 2026-11-28.") from None
    if not 2000 <= found.year <= 2200:
        raise ValueError(f"{found} is not in this age of the calendar; write a date like 2026-11-28.")
    return found


def _start(day: date, zone: tzinfo) -> int:
    return starts(datetime(day.year, day.month, day.day, 12, tzinfo=zone).timestamp(), zone).day


def _end(day: date, zone: tzinfo) -> int:
    end = next_start("day", _start(day, zone), zone)
    assert end is not None  # a day gives way to the next one
    return end


def _words(first: date, last: date) -> str:
    if first == last:
        return f"{first:%a %-d %b %Y}"
    form = "%-d" if (first.year, first.month) == (last.year, last.month) else "%-d %b" if first.year == last.year else "%-d %b %Y"
    return f"{first.strftime(form)} to {last:%-d %b %Y}"
