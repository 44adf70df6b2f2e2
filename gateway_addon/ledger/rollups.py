"""Reports of closed days, kept, so that a month costs what its days cost and not what its calls do.

Promises that a kept day is what its calls say: whatever changes a day strikes it off in the same transaction (triggers: a call of that
day, a correction of one), and what is struck off is summed again for the next report. A day is kept once an hour has passed since its
end and no call of it is open.
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gateway_addon.ledger import admin, reports
from gateway_addon.ledger.book import zone
from gateway_addon.ledger.reports import REFUSAL, Line
from gateway_addon.ledger.values import Server
from gateway_addon.windows import next_start, starts

SETTLED_DOWN_S = 3600  # refused calls are written a moment after they came


class Span(NamedTuple):
    """A day by its first instant and its end, summed by `grouping`."""

    start: int
    end: int
    grouping: reports.Grouping


_OLDEST_OPEN = "SELECT min(+started_at) FROM calls WHERE state = 'open'"  # the plus keeps SQLite from seeking it among all calls
_FIRST = "SELECT min(started_at) FROM calls"
_KNOWN = "SELECT day_start, grouping FROM kept_days WHERE ready = 1 AND day_start >= ? AND day_start < ?"
_CLAIM = "INSERT INTO kept_days (day_start, day_end, grouping, ready) VALUES (?, ?, ?, 0) ON CONFLICT DO NOTHING"
_STANDS = "SELECT 1 FROM kept_days WHERE day_start = ? AND day_end = ? AND grouping = ? AND ready = 0"
_FORGET = "DELETE FROM kept_lines WHERE day_start = ? AND grouping = ?"
_KEEP = f"INSERT INTO kept_lines (day_start, grouping, {', '.join(Line.__slots__)}) VALUES (?, ?{', ?' * len(Line.__slots__)})"
_READY = "UPDATE kept_days SET ready = 1 WHERE day_start = ? AND grouping = ?"


def keep(path: Path | Server, by: reports.By, *, since: float, until: float, now: float) -> None:
    """Sum the closed days that a report of this period will ask for and that nobody has kept yet. Raises LedgerUnavailable.

    A day is claimed, summed, and kept only if the claim still stands: whatever came between has struck it off.
    """
    with admin.reading(path) as db:
        wanted = _missing(db, by, since - (until - since), until, now)
    if not wanted:
        return
    with admin.changing(path) as db:
        db.executemany(_CLAIM, [(span.start, span.end, span.grouping) for span in wanted])
    with admin.reading(path) as db:
        summed = [(span, reports.of_calls(db, span.grouping, span.start, span.end)) for span in wanted]
    with admin.changing(path) as db:
        for span, lines in summed:
            _keep(db, span, lines)


def _missing(db: sqlite3.Connection, by: reports.By, since: float, until: float, now: float) -> list[Span]:
    calendar = zone(db)
    first = db.execute(_FIRST).fetchone()[0]
    if first is None or by == "agent":  # as many lines as sessions: not worth keeping
        return []
    oldest_open = db.execute(_OLDEST_OPEN).fetchone()[0]
    closed = min(until, now - SETTLED_DOWN_S, oldest_open or now)
    known = {tuple(row) for row in db.execute(_KNOWN, (int(since), int(until))).fetchall()}
    found: list[Span] = []
    start = starts(max(since, first), calendar).day
    while (end := next_start("day", start, calendar) or start) <= closed:
        if start >= since:
            found += [Span(start, end, grouping) for grouping in (by, REFUSAL) if (start, grouping) not in known]
        start = end
    return found


def _keep(db: sqlite3.Connection, span: Span, lines: Sequence[Line]) -> None:
    if db.execute(_STANDS, (span.start, span.end, span.grouping)).fetchone() is None:
        return
    db.execute(_FORGET, (span.start, span.grouping))
    figures = [[getattr(line, name) for name in Line.__slots__] for line in lines]
    db.executemany(_KEEP, [(span.start, span.grouping, *each) for each in figures])
    db.execute(_READY, (span.start, span.grouping))
