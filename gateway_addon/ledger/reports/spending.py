"""Report the spending: sums of the entries by which the caps are judged. Read-only; a call belongs to the time of its admission.

Knows nothing of tables on a terminal. The connection yields rows by name (`connect.reading`).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Literal, NamedTuple, cast, get_args

from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.sql import Connection, Engine, Row, named
from gateway_addon.ledger.types import Labels
from gateway_addon.names import LABEL_NAME

By = Literal["app", "model", "served", "day", "token", "agent"]
GROUPINGS: tuple[By, ...] = get_args(By)
"""Those by which the sums of closed days are kept."""
Key = str
"""One of KEYS, or `label.NAME`."""
KEYS: tuple[Key, ...] = (*GROUPINGS, "team", "session", "user", "month")
_LABEL_KEY = re.compile(rf"label\.({LABEL_NAME})")
UNIT = "\x1f"
"""Between the two parts of a line's key where a report has two groupings."""

REFUSAL: Literal["refusal"] = "refusal"
Grouping = Key
"""A grouping of a report, or the refusals that each report ends with."""

_KEY: dict[Grouping, str] = {
    "app": "calls.app",
    "model": "coalesce(model_asked, '(none)')",
    # beside the model, whatever else makes its price another than the standard one
    "served": """coalesce(model_served, '(no answer)') || CASE speed WHEN 'fast' THEN ' fast' ELSE '' END
      || CASE inference_geo WHEN 'us' THEN ' us' ELSE '' END
      || CASE WHEN service_tier IN ('batch', 'priority') THEN ' ' || service_tier ELSE '' END""",
    "day": "day_start",
    "token": "token_id",
    "agent": "coalesce(agent_id, session_id, '(none)')",
    "team": "coalesce(team, '(none)')",
    "session": "coalesce(session_id, '(none)')",
    "user": "coalesce(user_id, '(none)')",
    "month": "month_start",
    "refusal": "coalesce(refusal, '')",
}

# Each table is summed by key on its own: a row per call would have to be kept for the whole period. CROSS JOIN keeps SQLite from
# turning the joins round: from the chosen calls to their entries, by key, never through the whole ledger.
_CHOSEN = "started_at >= $since AND started_at < $until {only} GROUP BY 1"
_REFUSED = "AND state = 'refused'"  # they have no entries: what they are grouped by needs no look at those of the other calls
_COUNT = "coalesce(sum(coalesce(carried, 1)) FILTER (WHERE {}), 0)"  # a carry stands for many calls (prune.py)
_LINES = f"""
WITH seen AS (
  SELECT {{key}} AS key, {_COUNT.format("state IN ('open', 'settled', 'voided')")} AS calls,
    {_COUNT.format("state = 'settled'")} AS settled, {_COUNT.format("state = 'refused'")} AS refused,
    {_COUNT.format("' ' || flags LIKE '% estimated%'")} AS estimated, {_COUNT.format("status = 429")} AS upstream_429
  FROM calls WHERE {_CHOSEN}),
money AS (
  SELECT {{key}} AS key, sum(spent_nano) AS spent_nano, sum(entries.reserved_nano) AS held_nano
  FROM calls CROSS JOIN entries WHERE entries.call_id = calls.id AND {_CHOSEN}),
metered AS (
  SELECT {{key}} AS key, sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens,
    sum(cache_read_tokens) AS cache_read_tokens,
    sum(cache_write_5m_tokens + cache_write_1h_tokens + cache_write_unsplit_tokens) AS cache_write_tokens,
    sum(web_search_requests) AS web_searches, sum(max_tokens) FILTER (WHERE part = 0) AS max_tokens,
    sum(output_tokens) FILTER (WHERE max_tokens IS NOT NULL) AS limited_output_tokens
  FROM calls CROSS JOIN usage WHERE usage.call_id = calls.id AND {_CHOSEN})
SELECT key, calls, settled, refused, estimated, upstream_429, coalesce(spent_nano, 0) AS spent_nano, coalesce(held_nano, 0) AS held_nano,
  coalesce(input_tokens, 0) AS input_tokens, coalesce(output_tokens, 0) AS output_tokens,
  coalesce(cache_read_tokens, 0) AS cache_read_tokens, coalesce(cache_write_tokens, 0) AS cache_write_tokens,
  coalesce(web_searches, 0) AS web_searches, coalesce(max_tokens, 0) AS max_tokens,
  coalesce(limited_output_tokens, 0) AS limited_output_tokens
FROM seen LEFT JOIN money USING (key) LEFT JOIN metered USING (key) ORDER BY {{order}}
"""


def is_key(name: str) -> bool:
    """Return whether a report can be grouped by this."""
    return name in KEYS or _LABEL_KEY.fullmatch(name) is not None


def label_column(engine: Engine, name: str) -> str:
    """Return the expression for a call's value of a label; NULL where it has none. Raises ValueError for what is no label's name."""
    if re.fullmatch(LABEL_NAME, name) is None:
        raise ValueError(f"{name!r} is not the name of a label; write one like client")
    return f"({engine.labels} ->> '{name}')"


def column(engine: Engine, by: Grouping) -> str:
    """Return the expression of a grouping's key."""
    label = _LABEL_KEY.fullmatch(by)
    return f"coalesce({label_column(engine, label[1])}, '(none)')" if label else _KEY[by]


class Only(NamedTuple):
    """The calls that a report is about; None, or no labels, asks for nothing. `model`: asked for or served."""

    app: str | None = None
    team: str | None = None
    model: str | None = None
    session: str | None = None
    user: str | None = None
    labels: Labels = ()

    def text(self, engine: Engine) -> str:
        """Return them as conditions of a statement. Raises ValueError for what is no label's name."""
        said = {
            "app": "calls.app = $app", "team": "team = $team", "model": "$model IN (model_asked, model_served)",
            "session": "session_id = $session", "user": "user_id = $user",
        }  # fmt: skip
        conditions = [said[name] for name in said if getattr(self, name) is not None]
        conditions += [f"{label_column(engine, name)} = $label_{number}" for number, (name, _) in enumerate(self.labels)]
        return "".join(f" AND {condition}" for condition in conditions)

    @property
    def values(self) -> dict[str, object]:
        """Return the values of those conditions."""
        fields: dict[str, object] = {name: value for name, value in self._asdict().items() if name != "labels"}
        return fields | {f"label_{number}": value for number, (_, value) in enumerate(self.labels)}


EVERY = Only()


@dataclass(frozen=True, slots=True)
class ReportLine:
    """One row of a report. Shares are None where there is nothing to divide by."""

    key: str
    calls: int
    settled: int
    refused: int
    estimated: int
    upstream_429: int
    """Calls that the provider refused because the shared key was at one of its limits."""
    spent_nano: int
    held_nano: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    web_searches: int
    max_tokens: int
    limited_output_tokens: int

    @property
    def mean_nano(self) -> int | None:
        """Return the mean cost of a settled call, to the nearest nano-dollar."""
        return (self.spent_nano + self.settled // 2) // self.settled if self.settled else None

    @property
    def cache_hit_share(self) -> float | None:
        """Return the share of the prompt tokens that were read from the cache."""
        prompt_tokens = self.input_tokens + self.cache_read_tokens + self.cache_write_tokens
        return self.cache_read_tokens / prompt_tokens if prompt_tokens else None

    @property
    def output_share(self) -> float | None:
        """Return the output tokens' share of the `max_tokens` asked for: a low one means that reservations hold too much."""
        return self.limited_output_tokens / self.max_tokens if self.max_tokens else None


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
        return _sum("total", self.lines) if self.lines else ReportLine("total", *(0 for _ in _FIGURES))


def report(db: Connection, by: Key, *, since: float, until: float, then: Key | None = None, only: Only = EVERY) -> Report:
    """Sum the calls admitted from `since` to before `until`, by one grouping or two."""

    def found(start: float, end: float) -> list[ReportLine]:
        if then is None and only == EVERY and by in GROUPINGS:
            return _lines(db, by, start, end)
        return of_calls(db, by, start, end, then=then, only=only)

    in_time = by in ("day", "month")
    lines = sorted(found(since, until), key=lambda line: (line.key,) if in_time else (-line.spent_nano, -line.calls, line.key))
    spent_before = {line.key: line.spent_nano for line in found(since - (until - since), since)}
    refusals, observed = _refusals(db, since, until, only), _observed(db, since, until, only)
    return Report(by, since, until, tuple(lines), spent_before, refusals, observed, then)


_NOISE = named("SELECT reason, sum(calls) FROM noise WHERE minute >= $since AND minute < $until GROUP BY reason")
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


def _refusals(db: Connection, since: float, until: float, only: Only) -> tuple[tuple[str, int], ...]:
    """Count the refusals by code, the most frequent first."""
    lines = _lines(db, REFUSAL, since, until) if only == EVERY else of_calls(db, REFUSAL, since, until, only=only)
    counted = Counter({line.key: line.refused for line in lines if line.refused})
    if only == EVERY:  # a call without a valid token is nobody's
        counted.update(dict(db.execute(_NOISE, {"since": since, "until": until}).fetchall()))
    return tuple(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def refused_of(db: Connection, app: str, *, since: float, until: float) -> dict[str, int]:
    """Return how many calls of an app were refused, by code, the most frequent first."""
    counted = """
    SELECT refusal, count(*) AS calls FROM calls WHERE app = $1 AND state = 'refused' AND started_at >= $2 AND started_at < $3
    GROUP BY refusal ORDER BY calls DESC, refusal
    """
    return {row[0]: row[1] for row in db.execute(counted, (app, since, until)).fetchall()}


@dataclass(frozen=True, slots=True)
class DriftLine:
    """A drift: another model answered an app than it asked for; how often in the period, and since when at all."""

    app: str
    asked: str
    served: str
    calls: int
    first_at: float
    last_at: float


DRIFTED = "{instr}(' ' || flags || ' ', ' drift ') > 0"
"""Settlement's word that another model answered, as the index `calls_drifted` spells it."""
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
    asked = "CASE WHEN carried IS NULL THEN max_tokens END"  # of a carry it is a sum
    key = f"calls.app || ' ' || coalesce(CAST({asked} AS TEXT), '-') || ' ' || coalesce(model_asked, '(none)')"
    query = named(_LINES.format(key=key, order="spent_nano DESC", only=""))
    lines = [_line(row, row["key"]) for row in db.execute(query, {"since": since, "until": until}).fetchall()]
    if not lines or lines[0].spent_nano == 0:
        return None
    app, asked_tokens, model = lines[0].key.split(" ", 2)
    rest = Report("app", since, until, tuple(lines[1:]), {}, ()).total
    return Notable(app, model, None if asked_tokens == "-" else int(asked_tokens), lines[0], rest)


def alerts(db: Connection, *, since: float, until: float, most: int = 2**62) -> list[dict[str, object]]:
    """Return the newest alerts of a period, in order, each with its facts."""
    newest = "SELECT * FROM alerts WHERE at >= $1 AND at < $2 ORDER BY at DESC, id DESC LIMIT $3"
    rows = db.execute(newest, (since, until, most)).fetchall()[::-1]
    return [{name: value for name, value in dict(row).items() if name != "facts"} | json.loads(row["facts"]) for row in rows]


_KEPT_DAYS = named("""
SELECT day_start, day_end FROM kept_days
WHERE grouping = $by AND ready = 1 AND day_start >= $since AND day_end <= $until ORDER BY day_start
""")
_FIGURES = tuple(name for name in ReportLine.__slots__ if name != "key")
_KEPT_LINES = named(f"""
SELECT key, {", ".join(f"sum({name}) AS {name}" for name in _FIGURES)} FROM kept_days JOIN kept_lines USING (day_start, grouping)
WHERE grouping = $by AND ready = 1 AND day_start >= $since AND day_end <= $until GROUP BY key
""")


def _lines(db: Connection, by: Grouping, since: float, until: float) -> list[ReportLine]:
    """Return the lines of a period: kept days (daily_totals.py) as they were summed, the rest from the calls."""
    period = {"by": by, "since": since, "until": until}
    parts = [[_line(row, row["key"]) for row in db.execute(_KEPT_LINES, period).fetchall()]]
    at = since
    for start, end in [tuple(row) for row in db.execute(_KEPT_DAYS, period).fetchall()] + [(until, until)]:
        if at < start:
            parts.append(of_calls(db, by, at, start))
        at = end
    merged: dict[str, list[ReportLine]] = {}
    for line in chain.from_iterable(parts):
        merged.setdefault(line.key, []).append(line)
    return [lines[0] if len(lines) == 1 else _sum(key, lines) for key, lines in merged.items()]


def of_calls(db: Connection, by: Grouping, since: float, until: float, *, then: Key | None = None, only: Only = EVERY) -> list[ReportLine]:
    """Sum the calls admitted in a span, each of them read."""
    keys = [column(db.engine, each) for each in (by, then) if each is not None]
    key = keys[0] if len(keys) == 1 else f"CAST({keys[0]} AS TEXT) || '{UNIT}' || CAST({keys[1]} AS TEXT)"
    query = named(_LINES.format(key=key, order="key", only=only.text(db.engine) + (f" {_REFUSED}" if by == REFUSAL else "")))
    rows = db.execute(query, only.values | {"since": since, "until": until}).fetchall()
    return [_line(row, _named(db, by, then, row["key"])) for row in rows]


def _named(db: Connection, by: Grouping, then: Key | None, key: object) -> str:
    if then is None:
        return shown(db, by, key)
    first, _, second = str(key).rpartition(UNIT)
    return f"{shown(db, by, first)}{UNIT}{shown(db, then, second)}"


def _sum(key: str, lines: Iterable[ReportLine]) -> ReportLine:
    return ReportLine(key, *map(sum, zip(*([getattr(line, name) for name in _FIGURES] for line in lines), strict=True)))


def shown(db: Connection, by: Grouping, key: object) -> str:
    """Return a group's name for people. Called once a group: the rows are many."""
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


def _line(row: Row, key: str) -> ReportLine:
    return ReportLine(key, **{name: row[name] for name in _FIGURES})
