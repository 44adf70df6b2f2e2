"""Cache each day's spending in memory while nothing is booked on it, so that a month takes milliseconds. Read-only.

Promises the same figures as `spending`, which reads every call anew. A day is read again when its balance has moved, when a
person has changed anything (the audit grew), and, while it is young, when a call was added.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway_addon.ledger.reports.spending import DRIFTED
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.sql import Connection, named
from gateway_addon.windows import next_start, starts

type ReadConnection = Connection
"""One moment of the ledger, as `connect.reading` yields it, for modules that only pass it on."""

SETTLED_DOWN_S = 3600  # after its end a day gets no further rows of refused calls
DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Spending:
    """The spending of one app on one model in a day. `served` None: no answer named a model."""

    app: str
    asked: str
    served: str | None
    drifted: bool
    """Settlement found another model than the one asked for: an alias or a dated name is none."""
    calls: int
    spent_nano: int


@dataclass(frozen=True, slots=True)
class Cached:
    """Tokens of a day by the price row that billed them."""

    model: str
    input_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int


@dataclass(frozen=True, slots=True)
class CachedDay:
    start: int
    """Unix seconds of its first instant in the ledger's zone."""
    spending: tuple[Spending, ...] = ()
    cached: tuple[Cached, ...] = ()
    refusals: tuple[tuple[str, int], ...] = ()


_SPENDING = f"""
SELECT app, coalesce(model_asked, '(none)'), model_served, {DRIFTED}, count(DISTINCT calls.id) + coalesce(sum(carried - 1), 0),
  sum(spent_nano)
FROM calls CROSS JOIN entries WHERE entries.call_id = calls.id AND started_at >= $since AND started_at < $until GROUP BY 1, 2, 3, 4
"""
_CACHED = named("""
SELECT model, sum(input_tokens), sum(cache_read_tokens), sum(cache_write_5m_tokens + cache_write_unsplit_tokens), sum(cache_write_1h_tokens)
FROM calls CROSS JOIN usage
WHERE usage.call_id = calls.id AND started_at >= $since AND started_at < $until AND model IS NOT NULL GROUP BY model
""")
_REFUSALS = named("""
SELECT refusal, sum(coalesce(carried, 1)) FROM calls
WHERE state = 'refused' AND started_at >= $since AND started_at < $until GROUP BY refusal
UNION ALL
SELECT reason, sum(calls) FROM noise WHERE minute >= $since AND minute < $until GROUP BY reason
""")
_VERSION = """
SELECT spent_nano, reserved_nano, open, (SELECT max(id) FROM audit) FROM balances
WHERE scope = 'total' AND "window" = 'day' AND window_start = $1
"""
_NEWEST = "SELECT (SELECT max(id) FROM calls), (SELECT coalesce(sum(calls), 0) FROM noise WHERE minute >= $1)"
_APPS = """SELECT substr(scope, 5) FROM balances WHERE scope LIKE 'app:%' AND "window" = 'ever' ORDER BY scope"""


@dataclass(slots=True)
class DayCache:
    """One reader's cache of the days."""

    _kept: dict[int, tuple[object, CachedDay]] = field(default_factory=dict)

    def between(self, db: Connection, since: float, now: float) -> list[CachedDay]:
        """Return every day from the one that holds `since` to today."""
        calendar = zone(db)
        found, start = [], starts(since, calendar).day
        while start <= now:
            end = next_start("day", start, calendar) or start + DAY_S
            found.append(self._day(db, start, end, now))
            start = end
        return found

    def _day(self, db: Connection, start: int, end: int, now: float) -> CachedDay:
        version: list[object] = [end, *(db.execute(_VERSION, (start,)).fetchone() or ())]
        if now < end + SETTLED_DOWN_S:
            version += db.execute(_NEWEST, (start,)).fetchone()
        known = self._kept.get(start)
        if known is not None and known[0] == version:
            return known[1]
        day = _read(db, start, end)
        self._kept[start] = (version, day)
        return day


def apps(db: Connection) -> list[str]:
    """Return every app that ever had a call reserved."""
    return [row[0] for row in db.execute(_APPS).fetchall()]


def refusals(days: Iterable[CachedDay]) -> list[tuple[str, int]]:
    """Count refusals by code, the most frequent first: of calls with a token, and of calls without a valid one."""
    counted: Counter[str] = Counter()
    for day in days:
        counted.update(dict(day.refusals))
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))


def _read(db: Connection, start: int, end: int) -> CachedDay:
    span = {"since": start, "until": end}
    counted: Counter[str] = Counter()
    for code, calls in db.execute(_REFUSALS, span).fetchall():
        counted[code] += calls
    return CachedDay(
        start,
        tuple(Spending(*row) for row in db.execute(named(_SPENDING.format(instr=db.engine.instr)), span).fetchall()),
        tuple(Cached(*row) for row in db.execute(_CACHED, span).fetchall()),
        tuple(counted.items()),
    )
