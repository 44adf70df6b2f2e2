"""Keep the sums of closed days, so that a month's report reads its days and not its calls.

Promises that a kept day equals the sum of its calls: a change of a day strikes it off in the same transaction (triggers: a call of that
day, a correction of one, a call without a token), and a day that was struck off is summed again. A day is kept once an hour has passed
since its end and no call of it is open. A process claims a day before it sums it, with the time of the claim; the sums are kept only if
that claim still stands.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import tzinfo
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

from gateway_addon.ledger import connect
from gateway_addon.ledger.reports import call_sums
from gateway_addon.ledger.reports.call_sums import EVERY, Billed, CallSums, Day, Key, LineKey, Noise, Only, chosen, merged, noise, summed
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.types import ServerAddress
from gateway_addon.windows import next_start, starts

SETTLED_DOWN_S = 3600  # refused calls are written a moment after they came
TURN_S = 300  # a claim that is older is that of a process which died, or was stopped
LINES_MAX = 2_000
"""Lines that a day is kept with, where folding brings it down to them."""
FOLDS: tuple[tuple[str, Callable[[LineKey], LineKey]], ...] = (
    ("token_id", lambda key: key._replace(token_id=0)),
    ("asked", lambda key: key._replace(asked="(many)")),
)
"""Fields of which an app or its clients may make any number, and the key without them, for a day of too many lines."""
DECODED_MAX = 800


class Span(NamedTuple):
    """A day by its first instant and its end."""

    start: int
    end: int


_OLDEST_OPEN = "SELECT min(+started_at) FROM calls WHERE state = 'open'"  # the plus keeps SQLite from seeking it among all calls
_FIRST = "SELECT min(at) FROM (SELECT min(started_at) AS at FROM calls UNION ALL SELECT min(minute) FROM noise) AS firsts"
_KNOWN = "SELECT day_start FROM kept_days WHERE ready = 1 AND day_start >= $1 AND day_start < $2"
_AT_WORK = "SELECT 1 FROM kept_days WHERE ready < $1 LIMIT 1"
_CLAIM = """
INSERT INTO kept_days (day_start, day_end, ready) VALUES ($1, $2, $3)
ON CONFLICT (day_start) DO UPDATE SET day_end = excluded.day_end, ready = excluded.ready WHERE kept_days.ready <= 0
"""
_CLAIMED = "SELECT day_start, day_end FROM kept_days WHERE ready = $1 ORDER BY day_start"
_PUT = "UPDATE kept_days SET ready = 1, sums = $1 WHERE day_start = $2 AND day_end = $3 AND ready = $4"
_KEPT = "SELECT day_start, day_end, sums FROM kept_days WHERE ready = 1 AND day_start >= $1 AND day_end <= $2 ORDER BY day_start"


def keep(path: Path | ServerAddress, *, since: float, until: float, now: float) -> None:
    """Sum and keep the closed days of a period, and of as long a one before, that are not kept yet. Raises LedgerUnavailable."""
    with connect.reading(path) as db:
        wanted = list(missing(db, since - (until - since), until, now))
    if not wanted:
        return
    with connect.changing(path) as db:
        claimed = claim(db, wanted, now=now)
    with connect.reading(path) as db:
        found = [(span, of_calls(db, span)) for span in claimed]
    with connect.changing(path) as db:
        for span, day in found:
            put(db, span, day, claimed_at=now)


def missing(db: Connection, since: float, until: float, now: float) -> Iterator[Span]:
    """Yield the closed days from `since` to `until` that are not kept yet, the newest first."""
    first = first_at(db)
    if first is None:
        return
    known = {start for (start,) in db.execute(_KNOWN, (int(since), int(until))).fetchall()}
    calendar = zone(db)
    end = starts(min(until, _closed(db, now)), calendar).day
    while end > first and (start := starts(end - 1, calendar).day) >= since:
        if start not in known:
            yield Span(start, end)
        end = start


def claim(db: Connection, spans: Sequence[Span], *, now: float, alone: bool = False) -> list[Span]:
    """Claim the days that are still closed and not kept, to sum them. Inside a write transaction on everything.

    A claim replaces another process's, whose sums are then not kept. `alone`: claim none while another process sums.
    """
    if alone and db.execute(_AT_WORK, (_claim(now - TURN_S),)).fetchone() is not None:
        return []
    closed, calendar = _closed(db, now), zone(db)
    sound = [each for each in spans if each.end <= closed and each in calendar_days(each.start, each.end, calendar)]
    db.executemany(_CLAIM, [(*span, _claim(now)) for span in sound])
    return [Span(*row) for row in db.execute(_CLAIMED, (_claim(now),)).fetchall()]


def of_calls(db: Connection, span: Span) -> Day:
    """Sum a day from its calls, as it is kept: with few enough lines."""
    return _folded(summed(db, *span))


def put(db: Connection, span: Span, day: Day, *, claimed_at: float) -> bool:
    """Keep a day's sums; False where the claim stands no longer: the day has changed, or another process claimed it."""
    lines = [(line.key[1:-1], *line[1:]) for line in day.lines]
    parts = (lines, day.billed, day.noise, day.folded)
    return db.execute(_PUT, (json.dumps(parts, separators=(",", ":")), *span, _claim(claimed_at))).rowcount == 1


def kept(db: Connection, since: float, until: float) -> list[Day]:
    """Return the kept days that lie in a period, in order."""
    return [_decoded(*row) for row in db.execute(_KEPT, (since, until)).fetchall()]


def days(
    db: Connection, since: float, until: float, *, by: Sequence[str] = (), more: tuple[Key, ...] = (), only: Only = EVERY
) -> Iterator[Day]:
    """Yield the spans of a period: kept days as they were summed, and what lies between them from its calls, without `billed`.

    `by`: fields of the lines' keys that have to be told apart; `more`: further keys, by which no day is kept.
    """
    from_calls, told = bool(more) or only.is_told_by_calls_alone, {*by, *["asked"] * (only.model is not None)}
    known = [] if from_calls else [day for day in kept(db, since, until) if not told & {*day.folded}]
    at = since
    for day in (*known, Day(until, until)):
        if at < day.start:
            tried = noise(db, at, day.start) if only == EVERY else ()
            yield Day(at, day.start, call_sums.lines(db, at, day.start, by, more, only), noise=tried)
        yield chosen(day, only)
        at = day.end


def calendar_days(since: float, until: float, calendar: tzinfo) -> Iterator[Span]:
    """Yield the days from the one that holds `since` to the one before `until`."""
    start = starts(since, calendar).day
    while start < until:
        end = cast(int, next_start("day", start, calendar))
        yield Span(start, end)
        start = end


def first_at(db: Connection) -> float | None:
    """Return the time of the ledger's first call."""
    return cast(float | None, db.execute(_FIRST).fetchone()[0])


def _claim(at: float) -> int:
    """Return the value of `ready` for a claim of this moment: a younger claim is less, a kept day more."""
    return -int(at * 1_000_000)


def _closed(db: Connection, now: float) -> float:
    """Return the time before which no call is open and none will be added."""
    return min(now - SETTLED_DOWN_S, db.execute(_OLDEST_OPEN).fetchone()[0] or now)


def _folded(day: Day) -> Day:
    """Return a day with at most LINES_MAX lines, if it can be: without what tells its tokens apart, then without its models as asked."""
    found, folded = day.lines, []
    for field, of_all in FOLDS:
        if len(found) <= LINES_MAX:
            break
        found = merged(line._replace(key=of_all(line.key)) for line in found)
        folded.append(field)
    return replace(day, lines=found, folded=tuple(folded))


@lru_cache(maxsize=DECODED_MAX)
def _decoded(start: int, end: int, text: str) -> Day:
    found, billed, tried, folded = json.loads(text)
    return Day(
        start,
        end,
        tuple(CallSums(LineKey(start, *key), *figures) for key, *figures in found),
        tuple(Billed(*each) for each in billed),
        tuple(Noise(*each) for each in tried),
        tuple(folded),
    )
