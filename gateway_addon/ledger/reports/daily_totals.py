"""Keep the reports of closed days, so that a month's report reads its days and not its calls.

Promises that a kept day equals the sum of its calls: a change of a day strikes it off in the same transaction (triggers: a call of that
day, a correction of one), and a day that was struck off is summed again. A day is kept once an hour has passed since its end and no call
of it is open. A process claims a day before it sums it, with the time of the claim; the sums are kept only if that claim still stands.
"""

from collections.abc import Iterator, Sequence
from datetime import tzinfo
from pathlib import Path
from typing import NamedTuple

from gateway_addon.ledger import connect
from gateway_addon.ledger.reports import spending
from gateway_addon.ledger.reports.spending import REFUSAL, ReportLine
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.sql import Connection, numbers
from gateway_addon.ledger.types import ServerAddress
from gateway_addon.windows import next_start, starts

SETTLED_DOWN_S = 3600  # refused calls are written a moment after they came
TURN_S = 300  # a claim that is older is that of a process which died, or was stopped


class Span(NamedTuple):
    """A day by its first instant and its end, summed by `grouping`."""

    start: int
    end: int
    grouping: spending.Grouping


_OLDEST_OPEN = "SELECT min(+started_at) FROM calls WHERE state = 'open'"  # the plus keeps SQLite from seeking it among all calls
_FIRST = "SELECT min(started_at) FROM calls"
_KNOWN = "SELECT day_start, grouping FROM kept_days WHERE ready = 1 AND day_start >= $1 AND day_start < $2"
_AT_WORK = "SELECT 1 FROM kept_days WHERE ready < $1 LIMIT 1"
_CLAIM = """
INSERT INTO kept_days (day_start, day_end, grouping, ready) VALUES ($1, $2, $3, $4)
ON CONFLICT (day_start, grouping) DO UPDATE SET day_end = excluded.day_end, ready = excluded.ready WHERE kept_days.ready <= 0
"""
_CLAIMED = "SELECT day_start, day_end, grouping FROM kept_days WHERE ready = $1 ORDER BY day_start, grouping"
_READY = "UPDATE kept_days SET ready = 1 WHERE day_start = $1 AND day_end = $2 AND grouping = $3 AND ready = $4"
_FORGET = "DELETE FROM kept_lines WHERE day_start = $1 AND grouping = $2"
_LINE = ("day_start", "grouping", *ReportLine.__slots__)
_KEEP = f"INSERT INTO kept_lines ({', '.join(_LINE)}) VALUES ({numbers(len(_LINE))})"


def keep(path: Path | ServerAddress, by: spending.By, *, since: float, until: float, now: float) -> None:
    """Sum and keep the closed days of a period that are not kept yet. Raises LedgerUnavailable."""
    with connect.reading(path) as db:
        wanted = list(missing(db, by, since - (until - since), until, now))
    if not wanted:
        return
    with connect.changing(path) as db:
        claimed = claim(db, wanted, now=now)
    with connect.reading(path) as db:
        summed = [(span, lines(db, span)) for span in claimed]
    with connect.changing(path) as db:
        for span, found in summed:
            put(db, span, found, claimed_at=now)


def missing(db: Connection, by: spending.By, since: float, until: float, now: float) -> Iterator[Span]:
    """Yield the closed days from `since` to `until` that are not kept yet, the newest first."""
    first = db.execute(_FIRST).fetchone()[0]
    if first is None or by == "agent":  # as many lines as sessions: not worth keeping
        return
    known = {tuple(row) for row in db.execute(_KNOWN, (int(since), int(until))).fetchall()}
    calendar = zone(db)
    end = starts(min(until, _closed(db, now)), calendar).day
    while end > first and (start := starts(end - 1, calendar).day) >= since:
        yield from (Span(start, end, grouping) for grouping in (by, REFUSAL) if (start, grouping) not in known)
        end = start


def claim(db: Connection, spans: Sequence[Span], *, now: float, alone: bool = False) -> list[Span]:
    """Claim the days that are still closed and not kept, to sum them. Inside a write transaction on everything.

    A claim replaces another process's, whose sums are then not kept. `alone`: claim none while another process sums.
    """
    if alone and db.execute(_AT_WORK, (_claim(now - TURN_S),)).fetchone() is not None:
        return []
    closed, calendar = _closed(db, now), zone(db)
    sound = [each for each in spans if each.end <= closed and (each.start, each.end) == _day(each.start, calendar)]
    db.executemany(_CLAIM, [(*span, _claim(now)) for span in sound])
    return [Span(*row) for row in db.execute(_CLAIMED, (_claim(now),)).fetchall()]


def lines(db: Connection, span: Span) -> list[ReportLine]:
    """Sum a day's report from its calls."""
    return spending.of_calls(db, span.grouping, span.start, span.end)


def put(db: Connection, span: Span, found: Sequence[ReportLine], *, claimed_at: float) -> bool:
    """Keep a day's sums; False where the claim stands no longer: the day has changed, or another process claimed it."""
    if db.execute(_READY, (*span, _claim(claimed_at))).rowcount == 0:
        return False
    db.execute(_FORGET, (span.start, span.grouping))
    figures = [[getattr(line, name) for name in ReportLine.__slots__] for line in found]
    db.executemany(_KEEP, [(span.start, span.grouping, *each) for each in figures])
    return True


def _claim(at: float) -> int:
    """Return the value of `ready` for a claim of this moment: a younger claim is less, a kept day more."""
    return -int(at * 1_000_000)


def _closed(db: Connection, now: float) -> float:
    """Return the time before which no call is open and none will be added."""
    return min(now - SETTLED_DOWN_S, db.execute(_OLDEST_OPEN).fetchone()[0] or now)


def _day(start: int, calendar: tzinfo) -> tuple[int, int | None]:
    """Return the day that holds an instant, by the present calendar."""
    return starts(start, calendar).day, next_start("day", start, calendar)
