"""Report the spending: sums of the entries by which the caps are judged. Read-only; a call belongs to the time of its admission.

Knows nothing of tables on a terminal. The connection yields rows by name (`connect.reading`).
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, cast

from gateway_addon.ledger.reports import call_sums, daily_totals
from gateway_addon.ledger.reports.call_sums import (
    DRIFTED,
    EVERY,
    FIELDS,
    REPORTED,
    CallSums,
    Day,
    Key,
    Line,
    LineKey,
    Only,
    added,
    merged,
    refusals,
)
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.sql import Connection, named

KEYS: tuple[Key, ...] = ("app", "model", "served", "day", "token", "agent", "team", "session", "user", "month")
UNIT = "\x1f"
"""Between the two parts of a line's key where a report has two groupings."""

type ReportLine = CallSums[str]
"""One row of a report, without classes of times."""


def is_key(name: str) -> bool:
    """Return whether a report can be grouped by this."""
    return name in KEYS or call_sums.LABEL_KEY.fullmatch(name) is not None


def reads_days(by: Key, then: Key | None, only: Only) -> bool:
    """Return whether a report reads days, which can be kept, and not each call."""
    return not only.is_told_by_calls_alone and all(key in FIELDS for key in (by, then) if key is not None)


@dataclass(frozen=True, slots=True)
class Report:
    by: Key
    since: float
    until: float
    lines: tuple[ReportLine, ...]
    before: dict[str, int]
    """The spending in the period of equal length just before, by key."""
    refusals: tuple[tuple[str, int], ...]
    """Calls with a token that were refused, and calls without a valid one, by code."""
    observed: tuple[tuple[str, int], ...] = ()
    """Calls that an observed rule would have refused, by code."""

    then: Key | None = None
    """A second grouping: each key has two parts."""

    @property
    def spent_nano(self) -> int:
        return sum(line.spent_nano for line in self.lines)

    @property
    def total(self) -> ReportLine:
        """Return the sum of all lines."""
        return added("total", self.lines)


def report(db: Connection, by: Key, *, since: float, until: float, then: Key | None = None, only: Only = EVERY) -> Report:
    """Sum the calls admitted from `since` to before `until`, by one grouping or two."""
    keys = [by] if then is None else [by, then]
    more = tuple(key for key in keys if key not in FIELDS)
    fields = [field for key in keys for field in FIELDS.get(key, ())]
    name = _naming(db, keys, more)

    def read(start: float, end: float) -> list[Day]:
        return list(daily_totals.days(db, start, end, by=fields, more=more, only=only))

    def grouped(days: list[Day]) -> tuple[ReportLine, ...]:
        return merged(_under(name(line.key), line) for day in days for line in day.lines)

    days, in_time = read(since, until), by in ("day", "month")
    before = {line.key: line.spent_nano for line in grouped(read(since - (until - since), since))}
    lines = sorted(grouped(days), key=lambda line: (line.key,) if in_time else (-line.spent_nano, -line.calls, line.key))
    return Report(by, since, until, tuple(lines), before, tuple(refusals(days).items()), _observed(db, since, until, only), then)


def _under(name: str, line: Line) -> ReportLine:
    figures: Sequence[Any] = line[1 : len(REPORTED)]
    return CallSums(name, *figures)


def _naming(db: Connection, keys: Sequence[Key], more: tuple[Key, ...]) -> Callable[[LineKey], str]:
    """Return a function that names a line's group for people; each name is made once, since the lines are many."""

    @cache
    def name(*values: object) -> str:
        return UNIT.join(shown(db, by, value) for by, value in zip(keys, values, strict=True))

    def value(key: LineKey, by: Key) -> object:
        if by == "served":
            return (key.served or "(no answer)") + key.variant
        return getattr(key, FIELDS[by][0]) if by in FIELDS else key.more[more.index(by)]

    def of(key: LineKey) -> str:
        return name(*(value(key, by) for by in keys))

    return of


_OBSERVED = """
SELECT flags, sum(coalesce(carried, 1)) AS calls FROM calls
WHERE started_at >= $since AND started_at < $until AND {instr}(flags, 'observed:') > 0 {only} GROUP BY flags
"""


def _observed(db: Connection, since: float, until: float, only: Only) -> tuple[tuple[str, int], ...]:
    """Count the observed refusals by code, the most frequent first; read from an index of such calls alone."""
    counts: Counter[str] = Counter()
    query = named(_OBSERVED.format(instr=db.engine.instr, only=only.text(db.engine)))
    for row in db.execute(query, only.values | {"since": since, "until": until}).fetchall():
        counts.update({flag.removeprefix("observed:"): int(row["calls"]) for flag in row["flags"].split() if flag.startswith("observed:")})
    return tuple(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def refused_of(db: Connection, app: str, *, since: float, until: float) -> dict[str, int]:
    """Return how many calls of an app were refused, by code, the most frequent first."""
    return refusals(daily_totals.days(db, since, until, only=Only(app=app)))


@dataclass(frozen=True, slots=True)
class DriftLine:
    """A drift: another model answered an app than it asked for; how often in the period, and since when at all."""

    app: str
    asked: str
    served: str
    calls: int
    first_at: float
    last_at: float


_DRIFTS = f"""
SELECT app, model_asked AS asked, model_served AS served,
  sum(coalesce(carried, 1)) FILTER (WHERE started_at >= $since AND started_at < $until) AS calls,
  min(started_at) AS first_at, max(started_at) AS last_at
FROM calls WHERE {DRIFTED} GROUP BY app, model_asked, model_served
HAVING count(*) FILTER (WHERE started_at >= $since AND started_at < $until) > 0 ORDER BY calls DESC, app, asked, served
"""


def drifts(db: Connection, *, since: float, until: float) -> list[DriftLine]:
    """Return the drifts of a period; read from an index of such calls alone, so that `first_at` may lie before `since`."""
    return [
        DriftLine(**dict(row))
        for row in db.execute(named(_DRIFTS.format(instr=db.engine.instr)), {"since": since, "until": until}).fetchall()
    ]


@dataclass(frozen=True, slots=True)
class Notable:
    """One configuration (an app on a model with one `max_tokens`), and the rest of the period."""

    app: str
    model: str
    asked_tokens: int | None
    line: ReportLine
    rest: ReportLine


def notable(db: Connection, *, since: float, until: float) -> Notable | None:
    """Return the configuration that cost most; None where nothing was spent."""
    found = call_sums.lines(db, since, until, ("app", "asked"), ("asked_tokens",))
    groups = merged(CallSums((line.key.app, line.key.asked, cast(int, line.key.more[0])), *line[1:]) for line in found)
    dearest = max(groups, key=lambda group: group.spent_nano, default=None)
    if dearest is None or dearest.spent_nano == 0:
        return None
    rest = added("total", (group for group in groups if group is not dearest))
    app, model, asked_tokens = dearest.key
    is_known = asked_tokens >= 0
    name = f"{app} {asked_tokens if is_known else '-'} {model}"
    return Notable(app, model, asked_tokens if is_known else None, added(name, [dearest]), rest)


def alerts(db: Connection, *, since: float, until: float, most: int = 2**62) -> list[dict[str, object]]:
    """Return the newest alerts of a period, in order, each with its facts."""
    newest = "SELECT * FROM alerts WHERE at >= $1 AND at < $2 ORDER BY at DESC, id DESC LIMIT $3"
    rows = db.execute(newest, (since, until, most)).fetchall()[::-1]
    return [{name: value for name, value in dict(row).items() if name != "facts"} | json.loads(row["facts"]) for row in rows]


def shown(db: Connection, by: Key, key: object) -> str:
    """Return a group's name for people."""
    match by:
        case "day":
            return datetime.fromtimestamp(int(cast(int, key)), zone(db)).strftime("%Y-%m-%d")
        case "month":
            return datetime.fromtimestamp(int(cast(int, key)), zone(db)).strftime("%Y-%m")
        case "token":
            return str((db.execute(_TOKEN, (int(cast(int, key)),)).fetchone() or (f"#{key}",))[0])
        case _:
            return str(key)


_TOKEN = "SELECT app || ' #' || id || coalesce(nullif(' ' || label, ' '), '') FROM tokens WHERE id = $1"
