"""Sum the calls of a span of time: one line for each app, token, model, price variant and refusal. Read-only.

The one text of such sums: reports, console and metrics group its lines. A call belongs to the time of its admission. The connection
yields rows by name (`connect.reading`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

from gateway_addon.ledger.sql import Connection, Engine, Statement, named
from gateway_addon.ledger.types import Labels
from gateway_addon.names import LABEL_NAME

FIRST_BYTE_S = (0.5, 1, 2, 5, 10)
WHOLE_S = (1, 2, 5, 15, 60)
"""Limits of the classes in which answers are counted by their time: under the first, ..., at or above the last."""

Key = str
"""The word for what calls are grouped by: a field of a line's key, another of `_COLUMNS`, or `label.NAME`."""
LABEL_KEY = re.compile(rf"label\.({LABEL_NAME})")

DRIFTED = "{instr}(' ' || flags || ' ', ' drift ') > 0"
"""Settlement's word that another model answered, as the index `calls_drifted` spells it."""


class LineKey(NamedTuple):
    """The calls of one line. `served` is empty where no answer named a model, `refusal` where nothing was refused.

    A field that need not be told apart is as it is here.
    """

    day: int = 0
    """The first instant of their day, in unix seconds."""
    app: str = ""
    team: str = ""
    token_id: int = 0
    asked: str = ""
    served: str = ""
    variant: str = ""
    """The rest of what sets the price, where it is not the standard one: ` fast`, ` us`, ` batch`."""
    refusal: str = ""
    drifted: bool = False
    """Settlement found another model than the one asked for: an alias or a dated name is none."""
    more: tuple[object, ...] = ()
    """The values of the further keys that were asked for."""


class CallSums[K](NamedTuple):
    """Sums of calls. `first_N` and `whole_N` count the settled calls whose time falls into class N of FIRST_BYTE_S and WHOLE_S.

    Shares are None where there is nothing to divide by.
    """

    key: K
    calls: int = 0
    settled: int = 0
    refused: int = 0
    estimated: int = 0
    upstream_429: int = 0
    """Calls that the provider refused because the shared key was at one of its limits."""
    spent_nano: int = 0
    held_nano: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    web_searches: int = 0
    max_tokens: int = 0
    limited_output_tokens: int = 0
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
    def mean_nano(self) -> int | None:
        """Return the mean cost of a settled call, to the nearest nano-dollar."""
        return (self.spent_nano + self.settled // 2) // self.settled if self.settled else None

    @property
    def cache_share(self) -> float | None:
        """Return the share of the prompt tokens that were read from the cache."""
        return self.cache_read_tokens / self.prompt_tokens if self.prompt_tokens else None

    @property
    def output_share(self) -> float | None:
        """Return the output tokens' share of the `max_tokens` asked for: a low one means that reservations hold too much."""
        return self.limited_output_tokens / self.max_tokens if self.max_tokens else None


type Line = CallSums[LineKey]

REPORTED = CallSums._fields[: CallSums._fields.index("first_0")]
"""The fields that a report shows."""


class Billed(NamedTuple):
    """Tokens by the price row that billed them. Writes of unreported lifetime are among those of five minutes."""

    model: str
    input_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int


class Noise(NamedTuple):
    """Calls without a valid token, which are of no app."""

    reason: str
    calls: int


class Only(NamedTuple):
    """The calls that are asked about; None, or no labels, asks for nothing. `model`: asked for or served."""

    app: str | None = None
    team: str | None = None
    model: str | None = None
    session: str | None = None
    user: str | None = None
    labels: Labels = ()

    def takes(self, key: LineKey) -> bool:
        """Return whether a line is of these calls, as far as lines tell: not by session, user or label."""
        return self.app in (None, key.app) and self.team in (None, key.team) and self.model in (None, key.asked, key.served)

    @property
    def is_told_by_calls_alone(self) -> bool:
        return bool(self.session is not None or self.user is not None or self.labels)

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
class Day:
    """The sums of a day, or of another span of time, from its first instant to before its end (unix seconds)."""

    start: float
    end: float
    lines: tuple[Line, ...] = ()
    billed: tuple[Billed, ...] = ()
    noise: tuple[Noise, ...] = ()
    folded: tuple[str, ...] = ()
    """Fields of the lines' keys that are not told apart any more."""


_COLUMNS: dict[Key, str] = {
    "day": "day_start",
    "app": "calls.app",
    "team": "coalesce(team, '(none)')",
    "token_id": "token_id",
    "asked": "coalesce(model_asked, '(none)')",
    "served": "coalesce(model_served, '')",
    "variant": """CASE speed WHEN 'fast' THEN ' fast' ELSE '' END || CASE inference_geo WHEN 'us' THEN ' us' ELSE '' END
      || CASE WHEN service_tier IN ('batch', 'priority') THEN ' ' || service_tier ELSE '' END""",
    "refusal": "coalesce(refusal, '')",
    "drifted": DRIFTED,
    "agent": "coalesce(agent_id, session_id, '(none)')",
    "session": "coalesce(session_id, '(none)')",
    "user": "coalesce(user_id, '(none)')",
    "asked_tokens": "CASE WHEN carried IS NULL THEN coalesce(max_tokens, -1) ELSE -1 END",  # of a carry it is a sum
}
"""None is ever NULL, which equals nothing."""
LINE = LineKey._fields[:-1]
FIELDS: dict[Key, tuple[str, ...]] = {
    "app": ("app",), "model": ("asked",), "served": ("served", "variant"), "day": ("day",), "token": ("token_id",), "team": ("team",),
    "month": ("day",),
}  # fmt: skip
"""The words for what lines are grouped by, each with the fields of their keys that it looks at. All others have as many lines as there
are sessions, so they are no field."""


def _classes(name: str, seconds: str, limits: tuple[float, ...]) -> Iterator[str]:
    """Yield a column for each class of a time."""
    for number, (low, high) in enumerate(zip((None, *limits), (*limits, None), strict=True)):
        bounds = [f"{seconds} >= {low}"] * (low is not None) + [f"{seconds} < {high}"] * (high is not None)
        yield f", count(*) FILTER (WHERE state = 'settled' AND {' AND '.join(bounds)}) AS {name}_{number}"


_SECONDS = """,
    CASE WHEN carried IS NULL THEN first_byte_at - started_at END AS first_byte_s,
    CASE WHEN carried IS NULL THEN ended_at - started_at END AS whole_s"""
_TIMES = "".join((*_classes("first", "first_byte_s", FIRST_BYTE_S), *_classes("whole", "whole_s", WHOLE_S)))
_PERIOD = "started_at >= $since AND started_at < $until"
_COUNT = "coalesce(sum(stands_for) FILTER (WHERE {}), 0)"  # a carry stands for many calls (prune.py)
# The range is for a server: for the few thousand calls of half a day its planner reads the whole table, in five times as long.
_ITS_USAGE = "usage.call_id = chosen.id AND usage.call_id BETWEEN (SELECT min(id) FROM chosen) AND (SELECT max(id) FROM chosen)"
# The calls are read once, then each table is summed by key on its own. CROSS JOIN keeps SQLite from turning the joins round: from the
# chosen calls to their entries, by key, never through the whole ledger.
_LINES = f"""
WITH chosen AS MATERIALIZED (
  SELECT id, {{columns}}, state, coalesce(carried, 1) AS stands_for, status, max_tokens, ' ' || flags LIKE '% estimated%' AS is_estimated
    {{seconds}}
  FROM calls WHERE {_PERIOD} {{only}}),
seen AS (
  SELECT {{keys}}, {_COUNT.format("state IN ('open', 'settled', 'voided')")} AS calls,
    {_COUNT.format("state = 'settled'")} AS settled, {_COUNT.format("state = 'refused'")} AS refused,
    {_COUNT.format("is_estimated")} AS estimated, {_COUNT.format("status = 429")} AS upstream_429 {{times}}
  FROM chosen GROUP BY {{keys}}),
money AS (
  SELECT {{keys}}, sum(spent_nano) AS spent_nano, sum(entries.reserved_nano) AS held_nano
  FROM chosen CROSS JOIN entries WHERE entries.call_id = chosen.id GROUP BY {{keys}}),
metered AS (
  SELECT {{keys}}, sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens, sum(cache_read_tokens) AS cache_read_tokens,
    sum(cache_write_5m_tokens + cache_write_1h_tokens + cache_write_unsplit_tokens) AS cache_write_tokens,
    sum(web_search_requests) AS web_searches, sum(max_tokens) FILTER (WHERE part = 0) AS max_tokens,
    sum(output_tokens) FILTER (WHERE max_tokens IS NOT NULL) AS limited_output_tokens
  FROM chosen CROSS JOIN usage WHERE {_ITS_USAGE} GROUP BY {{keys}})
SELECT {{keys}}, {{figures}}
FROM seen LEFT JOIN money USING ({{keys}}) LEFT JOIN metered USING ({{keys}})
"""
_BILLED = named(f"""
WITH chosen AS MATERIALIZED (SELECT id FROM calls WHERE {_PERIOD})
SELECT model, sum(input_tokens), sum(cache_read_tokens), sum(cache_write_5m_tokens + cache_write_unsplit_tokens), sum(cache_write_1h_tokens)
FROM chosen CROSS JOIN usage WHERE {_ITS_USAGE} AND model IS NOT NULL GROUP BY model
""")
_NOISE = named("SELECT reason, sum(calls) FROM noise WHERE minute >= $since AND minute < $until GROUP BY reason")


def label_column(engine: Engine, name: str) -> str:
    """Return the expression for a call's value of a label; NULL where it has none. Raises ValueError for what is no label's name."""
    if re.fullmatch(LABEL_NAME, name) is None:
        raise ValueError(f"{name!r} is not the name of a label; write one like client")
    return f"({engine.labels} ->> '{name}')"


def column(engine: Engine, by: Key) -> str:
    """Return the expression of what calls are grouped by."""
    if label := LABEL_KEY.fullmatch(by):
        return f"coalesce({label_column(engine, label[1])}, '(none)')"
    return _COLUMNS[FIELDS.get(by, (by,))[0]].replace("{instr}", engine.instr)


@cache
def _statement(engine: Engine, by: tuple[Key, ...], only: str) -> Statement:
    found = [f"{column(engine, each)} AS k{number}" for number, each in enumerate(by)]
    keys = ", ".join(f"k{number}" for number in range(len(found)))
    names, times, seconds = (CallSums._fields, _TIMES, _SECONDS) if by == LINE else (REPORTED, "", "")
    figures = ", ".join(f"coalesce({name}, 0)" for name in names[1:])
    return named(_LINES.format(columns=", ".join(found), keys=keys, only=only, times=times, seconds=seconds, figures=figures))


def lines(
    db: Connection, since: float, until: float, fields: Sequence[str] = LINE, more: tuple[Key, ...] = (), only: Only = EVERY
) -> tuple[Line, ...]:
    """Sum the calls admitted from `since` to before `until`, each of them read; by fields of a line's key, and by further keys.

    Refusals are told apart always. Times are counted where all fields are told apart, and no more.
    """
    told = tuple(name for name in LINE if name in (*fields, "refusal"))
    values = only.values | {"since": since, "until": until}
    rows = db.execute(_statement(db.engine, told + more, only.text(db.engine)), values).fetchall()
    return tuple(_line(tuple(row), told, len(told) + len(more)) for row in rows)


def _line(row: tuple[Any, ...], told: tuple[str, ...], end: int) -> Line:
    key = LineKey(**dict(zip(told, row, strict=False)), more=row[len(told) : end])
    return CallSums(key._replace(drifted=bool(key.drifted)), *row[end:])


def summed(db: Connection, since: float, until: float) -> Day:
    """Sum all that happened in a span, from its calls."""
    billed = tuple(Billed(*row) for row in db.execute(_BILLED, {"since": since, "until": until}).fetchall())
    return Day(since, until, lines(db, since, until), billed, noise(db, since, until))


def noise(db: Connection, since: float, until: float) -> tuple[Noise, ...]:
    """Count the calls without a valid token, by reason."""
    return tuple(Noise(*row) for row in db.execute(_NOISE, {"since": since, "until": until}).fetchall())


def merged[Sums: tuple[Any, ...]](rows: Iterable[Sums]) -> tuple[Sums, ...]:
    """Add up the rows of each key, which is their first field."""
    found: dict[Any, list[Sums]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(row)
    return tuple(same[0] if len(same) == 1 else _added(key, same) for key, same in found.items())


def added[K](key: K, sums: Iterable[CallSums[Any]]) -> CallSums[K]:
    """Return the sum of all, under one key."""
    found = [*sums]
    return _added(key, found) if found else CallSums(key)


def _added[Sums: tuple[Any, ...]](key: object, rows: list[Sums]) -> Sums:
    kind: Any = type(rows[0])
    return cast(Sums, kind(key, *map(sum, zip(*(row[1:] for row in rows), strict=True))))


def together(parts: Sequence[Day]) -> Day:
    """Return the parts of a day, which follow each other, as one."""
    return Day(
        parts[0].start,
        parts[-1].end,
        merged(row for part in parts for row in part.lines),
        merged(row for part in parts for row in part.billed),
        merged(row for part in parts for row in part.noise),
    )


def chosen(day: Day, only: Only) -> Day:
    """Return the lines of some calls alone. Calls without a token, and what was billed, are of all."""
    return day if only == EVERY else Day(day.start, day.end, tuple(line for line in day.lines if only.takes(line.key)))


def refusals(days: Iterable[Day]) -> Counter[str]:
    """Count the refused calls by code, the most frequent first."""
    counted: Counter[str] = Counter()
    for day in days:
        for line in day.lines:
            counted[line.key.refusal] += line.refused
        counted.update(dict(day.noise))
    return Counter(dict(sorted((+counted).items(), key=lambda item: (-item[1], item[0]))))
