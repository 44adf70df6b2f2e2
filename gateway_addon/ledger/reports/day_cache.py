"""Sum each day's calls once and keep the sums in memory while nothing is booked on it, so that a month takes milliseconds. Read-only.

Promises the same figures as `spending`, which reads every call anew. A day is summed again when its balance has moved, or when a
person has corrected, pruned or moved calls; while it is young, only the quarters of an hour that may still change are.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway_addon.ledger.reports.daily_totals import SETTLED_DOWN_S
from gateway_addon.ledger.reports.spending import DRIFTED
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.sql import Connection, named
from gateway_addon.windows import next_start, starts

SLICE_S = 900
DAY_S = 86_400
FIRST_BYTE_S = (0.5, 1, 2, 5, 10)
WHOLE_S = (1, 2, 5, 15, 60)
"""Limits of the classes in which answers are counted by their time: under the first, ..., at or above the last."""


class CallSums(NamedTuple):
    """Sums of calls. `first_N` and `whole_N` count the settled calls whose time falls into class N of FIRST_BYTE_S and WHOLE_S."""

    calls: int = 0
    settled: int = 0
    spent_nano: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    first_0: int = 0
    first_1: int = 0
    first_2: int = 0
    first_3: int = 0
    first_4: int = 0
    first_5: int = 0
    whole_0: int = 0
    whole_1: int = 0
    whole_2: int = 0
    whole_3: int = 0
    whole_4: int = 0
    whole_5: int = 0

    @property
    def prompt_tokens(self) -> int:
        return self.input_tokens + self.cache_read_tokens + self.cache_write_tokens

    @property
    def cache_share(self) -> float | None:
        """Return the share of the prompt tokens that were read from the cache; None without any."""
        return self.cache_read_tokens / self.prompt_tokens if self.prompt_tokens else None


def added(figures: Iterable[CallSums]) -> CallSums:
    """Return the sum."""
    return CallSums(*map(sum, zip(*figures, strict=True)))


class DayLine(NamedTuple):
    """The calls of one app with one token on one model in a day. `served` is empty where no answer named a model."""

    app: str
    token_id: int
    asked: str
    served: str
    drifted: bool
    """Settlement found another model than the one asked for: an alias or a dated name is none."""
    figures: CallSums


class Cached(NamedTuple):
    """Tokens of a day by the price row that billed them."""

    model: str
    input_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int


class Refused(NamedTuple):
    """Refused calls of a day by reason. Those without a valid token are of no app."""

    app: str
    asked: str
    code: str
    calls: int


@dataclass(frozen=True, slots=True)
class CachedDay:
    start: int
    """Unix seconds of its first instant in the ledger's zone."""
    lines: tuple[DayLine, ...] = ()
    cached: tuple[Cached, ...] = ()
    refused: tuple[Refused, ...] = ()


def _classes(name: str, seconds: str, limits: tuple[float, ...]) -> Iterator[str]:
    """Yield a column for each class of a time."""
    for number, (low, high) in enumerate(zip((None, *limits), (*limits, None), strict=True)):
        bounds = [f"{seconds} >= {low}"] * (low is not None) + [f"{seconds} < {high}"] * (high is not None)
        yield f"count(*) FILTER (WHERE state = 'settled' AND carried IS NULL AND {' AND '.join(bounds)}) AS {name}_{number}"


_KEY = f"app, token_id, coalesce(model_asked, '(none)') AS asked, coalesce(model_served, '') AS served, {DRIFTED} AS drifted"
_BY = "GROUP BY 1, 2, 3, 4, 5"
_PERIOD = "started_at >= $since AND started_at < $until"
_TIMES = ", ".join(
    (*_classes("first", "(first_byte_at - started_at)", FIRST_BYTE_S), *_classes("whole", "(ended_at - started_at)", WHOLE_S))
)
_LINES = f"""
WITH seen AS (
  SELECT {_KEY}, sum(coalesce(carried, 1)) AS calls,
    sum(CASE WHEN state = 'settled' THEN coalesce(carried, 1) ELSE 0 END) AS settled, {_TIMES}
  FROM calls WHERE {_PERIOD} AND state IN ('open', 'settled', 'voided') {_BY}),
money AS (
  SELECT {_KEY}, sum(spent_nano) AS spent_nano FROM calls CROSS JOIN entries WHERE entries.call_id = calls.id AND {_PERIOD} {_BY}),
metered AS (
  SELECT {_KEY}, sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens, sum(cache_read_tokens) AS cache_read_tokens,
    sum(cache_write_5m_tokens + cache_write_1h_tokens + cache_write_unsplit_tokens) AS cache_write_tokens
  FROM calls CROSS JOIN usage WHERE usage.call_id = calls.id AND {_PERIOD} {_BY})
SELECT app, token_id, asked, served, drifted, {", ".join(f"coalesce({name}, 0) AS {name}" for name in CallSums._fields)}
FROM seen LEFT JOIN money USING (app, token_id, asked, served, drifted) LEFT JOIN metered USING (app, token_id, asked, served, drifted)
"""
_CACHED = named(f"""
SELECT model, sum(input_tokens), sum(cache_read_tokens), sum(cache_write_5m_tokens + cache_write_unsplit_tokens), sum(cache_write_1h_tokens)
FROM calls CROSS JOIN usage WHERE usage.call_id = calls.id AND {_PERIOD} AND model IS NOT NULL GROUP BY model
""")
_REFUSED = named(f"""
SELECT app, coalesce(model_asked, '(none)'), refusal, sum(coalesce(carried, 1)) FROM calls
WHERE state = 'refused' AND {_PERIOD} GROUP BY 1, 2, 3
UNION ALL
SELECT '', '(none)', reason, sum(calls) FROM noise WHERE minute >= $since AND minute < $until GROUP BY reason
""")
_VERSION = """
SELECT spent_nano, reserved_nano, open FROM balances WHERE scope = 'total' AND "window" = 'day' AND window_start = $1
"""
_NEWEST = "SELECT (SELECT max(id) FROM calls), (SELECT coalesce(sum(calls), 0) FROM noise WHERE minute >= $1)"
_CHANGED = "SELECT max(id), max(id) FILTER (WHERE action IN ('adjust', 'prune', 'align')) FROM audit WHERE id > $1"
_OPEN = "SELECT started_at FROM calls WHERE state = 'open'"
_APPS = """SELECT substr(scope, 5) FROM balances WHERE scope LIKE 'app:%' AND "window" = 'ever' ORDER BY scope"""


@dataclass(slots=True)
class DayCache:
    """One reader's cache of the days."""

    _kept: dict[int, tuple[object, CachedDay]] = field(default_factory=dict)
    _slices: dict[int, tuple[object, CachedDay]] = field(default_factory=dict)
    _audited: int = 0
    """The newest row of the audit that was looked at, and the newest that changed calls."""
    _changed: int = 0

    def between(self, db: Connection, since: float, until: float, now: float) -> list[CachedDay]:
        """Return every day from the one that holds `since` to the one before `until`; none that is still to come."""
        calendar = zone(db)
        newest, changed = db.execute(_CHANGED, (self._audited,)).fetchone()
        self._audited, self._changed = newest or self._audited, changed or self._changed
        found, start = [], starts(since, calendar).day
        while start < until and start <= now:
            end = next_start("day", start, calendar) or start + DAY_S
            found.append(self._day(db, start, end, now))
            start = end
        return found

    def _day(self, db: Connection, start: int, end: int, now: float) -> CachedDay:
        is_young = now < end + SETTLED_DOWN_S
        version: list[object] = [end, self._changed, *(db.execute(_VERSION, (start,)).fetchone() or ())]
        if is_young:
            version += db.execute(_NEWEST, (start,)).fetchone()
        known = self._kept.get(start)
        if known is not None and known[0] == version:
            return known[1]
        day = self._of_slices(db, start, end, now) if is_young else _read(db, start, end)
        self._kept[start] = (version, day)
        return day

    def _of_slices(self, db: Connection, start: int, end: int, now: float) -> CachedDay:
        """Sum a young day: quarters of an hour that are over and hold no open call as they were summed, the others anew."""
        running = {int(at - start) // SLICE_S for (at,) in db.execute(_OPEN).fetchall()}
        self._slices = {at: kept for at, kept in self._slices.items() if at >= start - DAY_S}
        parts = []
        for number, at in enumerate(range(start, min(end, int(now) + 1), SLICE_S)):
            until, version = min(end, at + SLICE_S), (end, self._changed)
            known = self._slices.get(at)
            if known is None or known[0] != version:
                known = (version, _read(db, at, until))
                if until + SETTLED_DOWN_S <= now and number not in running:
                    self._slices[at] = known
            parts.append(known[1])
        return _together(start, parts)


def apps(db: Connection) -> list[str]:
    """Return every app that ever had a call reserved."""
    return [row[0] for row in db.execute(_APPS).fetchall()]


def refusals(days: Iterable[CachedDay]) -> list[tuple[str, int]]:
    """Return how many calls were refused, by code, the most frequent first."""
    counted: Counter[str] = Counter()
    for each in (each for day in days for each in day.refused):
        counted[each.code] += each.calls
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))


def _together(start: int, parts: list[CachedDay]) -> CachedDay:
    lines: dict[tuple[str, int, str, str, bool], list[CallSums]] = {}
    cached: dict[str, list[tuple[int, ...]]] = {}
    refused: Counter[tuple[str, str, str]] = Counter()
    for part in parts:
        for app, token_id, asked, served, drifted, figures in part.lines:
            lines.setdefault((app, token_id, asked, served, drifted), []).append(figures)
        for model, *tokens in part.cached:
            cached.setdefault(model, []).append(tuple(tokens))
        for app, asked, code, calls in part.refused:
            refused[app, asked, code] += calls
    return CachedDay(
        start,
        tuple(DayLine(*key, added(found)) for key, found in lines.items()),
        tuple(Cached(model, *map(sum, zip(*found, strict=True))) for model, found in cached.items()),
        tuple(Refused(*key, calls) for key, calls in refused.items()),
    )


def _read(db: Connection, start: int, end: int) -> CachedDay:
    span = {"since": start, "until": end}
    return CachedDay(
        start,
        tuple(_line(*row) for row in db.execute(named(_LINES.format(instr=db.engine.instr)), span).fetchall()),
        tuple(Cached(*row) for row in db.execute(_CACHED, span).fetchall()),
        tuple(Refused(*row) for row in db.execute(_REFUSED, span).fetchall()),
    )


def _line(app: str, token_id: int, asked: str, served: str, drifted: object, *figures: int) -> DayLine:
    return DayLine(app, token_id, asked, served, bool(drifted), CallSums(*figures))
