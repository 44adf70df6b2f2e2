"""Find single calls, and show one with all its bookings. Read-only; the connection yields rows by name (`connect.reading`).

Promises that a search reads a bounded number of rows however large the ledger is, and says how far back it has looked.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from gateway_addon.ledger.sql import Connection, Row, named

State = Literal["open", "settled", "voided", "refused", "free"]
STATES: tuple[State, ...] = get_args(State)
LOOKED_MAX = 1500
FOUND_MAX = 250
"""At most so many calls are looked at, and so many matching ones priced, in one search."""
NEWEST = 2**62
"""Above every call's number."""


@dataclass(frozen=True, slots=True)
class CallFilter:
    """A filter of calls; an empty field matches all. Times are unix seconds.

    `text` is a call's number, or a part of any of its labels. `least_nano`, `most_nano`: what the call has cost.
    """

    app: str = ""
    model: str = ""
    state: str = ""
    refusal: str = ""
    token: int | None = None
    text: str = ""
    since: float = 0.0
    until: float = math.inf
    below: int = 0
    """Calls that began at `until` itself are in the period where their number is lower."""
    least_nano: int | None = None
    most_nano: int | None = None


@dataclass(frozen=True, slots=True)
class CallRow:
    """A call as listed. Times are unix seconds."""

    id: int
    state: State
    app: str
    team: str | None
    endpoint: str
    model_asked: str | None
    model_served: str | None
    stream: bool
    max_tokens: int | None
    started_at: float
    first_byte_at: float | None
    ended_at: float | None
    quote_nano: int
    status: int | None
    refusal: str | None
    refusal_said: str | None
    """The sentence of a refusal by a cap, a rate or a pause: how matters stood then."""
    stop_reason: str | None
    request_id: str | None
    session_id: str | None
    agent_id: str | None
    parent_agent_id: str | None
    user_id: str | None
    labels: str | None
    """A JSON object."""
    flags: str
    token_id: int
    token: str
    spent_nano: int = 0
    held_nano: int = 0

    @property
    def at_most(self) -> bool:
        """Tell whether the amount spent is an upper bound: the cost could not be known, so what was held is booked."""
        return any(flag.startswith("estimated:") for flag in self.flags.split())

    @property
    def took_s(self) -> float | None:
        return None if self.ended_at is None or self.state == "refused" else self.ended_at - self.started_at

    @property
    def first_byte_s(self) -> float | None:
        return None if self.first_byte_at is None else self.first_byte_at - self.started_at

    @property
    def drifted(self) -> bool:
        """Tell whether settlement found another model than the one asked for: an alias or a dated name is none."""
        return "drift" in self.flags.split()


@dataclass(frozen=True, slots=True)
class CallEntry:
    """One booking, and how the call stood after it."""

    at: float
    kind: str
    reserved_nano: int
    spent_nano: int
    held_after_nano: int
    spent_after_nano: int
    note: str | None


@dataclass(frozen=True, slots=True)
class CallPart:
    """One billed part of the answer."""

    kind: str
    model: str | None
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int
    cache_write_unsplit_tokens: int
    web_search_requests: int
    nano: int
    price_row: str | None


@dataclass(frozen=True, slots=True)
class CallDetail:
    call: CallRow
    entries: tuple[CallEntry, ...]
    parts: tuple[CallPart, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The matching calls, the newest first. `looked`: how many calls of the period were held against the filter."""

    calls: tuple[CallRow, ...]
    looked: int
    rest: tuple[float, int] | None
    """`until` and `below` of the calls of the period that were not looked at; None: all were."""


class RefusedLately(NamedTuple):
    """Refusals of the last minutes, by app (empty: no valid token) and reason."""

    app: str
    code: str
    calls: int
    last_at: float


_LABELS = (
    "app", "model_asked", "model_served", "refusal", "stop_reason", "request_id", "session_id", "agent_id", "user_id", "labels", "flags",
)  # fmt: skip
_CALL = tuple(name for name in CallRow.__slots__ if name not in ("token", "spent_nano", "held_nano"))
_CALLS = ", ".join(f"calls.{name}" for name in _CALL)
_TOKEN = "trim('#' || token_id || ' ' || coalesce(tokens.label, '')) AS token"
_SEARCH = f"""
WITH looked AS MATERIALIZED (
  SELECT {_CALLS} FROM calls
  WHERE started_at >= $since AND started_at <= $until AND (started_at < $until OR id < $below) AND carried IS NULL
  ORDER BY started_at DESC, id DESC LIMIT {LOOKED_MAX}),
matching AS MATERIALIZED (
  SELECT * FROM looked
  WHERE ($app = '' OR app = $app) AND ($model = '' OR $model IN (model_asked, model_served)) AND ($state = '' OR state = $state)
    AND ($refusal = '' OR refusal = $refusal) AND (CAST($token AS BIGINT) IS NULL OR token_id = $token)
    AND ($text = '' OR CAST(id AS TEXT) = $text OR {" OR ".join(f"{{instr}}(lower({label}), lower($text)) > 0" for label in _LABELS)})
  ORDER BY started_at DESC, id DESC LIMIT $most)
SELECT seen.looked, oldest.started_at AS oldest_at, oldest.id AS oldest_id, calls.*, {_TOKEN}
FROM (SELECT count(*) AS looked FROM looked) AS seen
LEFT JOIN (SELECT started_at, id FROM looked ORDER BY started_at, id LIMIT 1) AS oldest ON TRUE
LEFT JOIN matching AS calls ON TRUE LEFT JOIN tokens ON tokens.id = token_id ORDER BY calls.started_at DESC, calls.id DESC
"""
_SOME = f"SELECT {_CALLS}, {_TOKEN} FROM calls LEFT JOIN tokens ON tokens.id = token_id WHERE calls.id IN ({{}}) ORDER BY calls.id DESC"
_AMOUNTS = "SELECT call_id, sum(spent_nano), sum(reserved_nano) FROM entries WHERE call_id IN ({}) GROUP BY call_id"
# A refused call for one token is a client's probe (Claude Code's, at its start, to read the headers): nobody misses its answer.
_LATELY = named(f"""
SELECT app, refusal AS code, count(*) AS calls, max(started_at) AS last_at
FROM (SELECT app, refusal, state, started_at, max_tokens FROM calls WHERE started_at >= $since
      ORDER BY started_at DESC LIMIT {LOOKED_MAX}) AS newest
WHERE state = 'refused' AND coalesce(max_tokens, 0) <> 1 GROUP BY app, refusal
UNION ALL
SELECT '', reason, sum(calls), max(minute) FROM noise WHERE minute >= $since GROUP BY reason
ORDER BY calls DESC, app, code
""")
_ENTRIES = """
SELECT at, kind, reserved_nano, spent_nano, sum(reserved_nano) OVER (ORDER BY id), sum(spent_nano) OVER (ORDER BY id), note
FROM entries WHERE call_id = $1 ORDER BY id
"""
_PARTS = f"SELECT {', '.join(CallPart.__slots__)} FROM usage WHERE call_id = $1 ORDER BY part"


def search(db: Connection, wanted: CallFilter, *, most: int = FOUND_MAX) -> Found:
    """Return the newest matching calls of the period, `most` of them, as far back as a bounded look reaches."""
    values = {name: getattr(wanted, name) for name in CallFilter.__slots__ if not name.endswith("_nano")}
    values |= {"most": most, "text": wanted.text.strip().removeprefix("#"), "until": min(wanted.until, float(NEWEST))}
    rows = db.execute(named(_SEARCH.format(instr=db.engine.instr)), values).fetchall()
    looked = rows[0]["looked"]
    calls = _with_amounts(db, [_call(row) for row in rows if row["id"] is not None])
    if len(calls) == most:
        rest: tuple[float, int] | None = (calls[-1].started_at, calls[-1].id)
    else:
        rest = (rows[0]["oldest_at"], rows[0]["oldest_id"]) if looked == LOOKED_MAX else None
    least = -NEWEST if wanted.least_nano is None else wanted.least_nano
    most = NEWEST if wanted.most_nano is None else wanted.most_nano
    priced = tuple(each for each in calls if least <= each.spent_nano <= most)
    return Found(priced, looked, rest)


def every(db: Connection, wanted: CallFilter) -> Iterator[CallRow]:
    """Yield all matching calls, the newest first, read as they are consumed."""
    rest: tuple[float, int] | None = (wanted.until, wanted.below)
    while rest is not None:
        found = search(db, replace(wanted, until=rest[0], below=rest[1]))
        yield from found.calls
        rest = found.rest


def some(db: Connection, numbers: Sequence[int]) -> list[CallRow]:
    """Return the calls of these numbers, the newest first."""
    rows = db.execute(_SOME.format(", ".join(str(each) for each in numbers) or "NULL")).fetchall()
    return _with_amounts(db, [_call(row) for row in rows])


def refused_lately(db: Connection, *, since: float) -> list[RefusedLately]:
    """Return the refusals since a time, those of the newest calls where there are too many to look at."""
    return [RefusedLately(*row) for row in db.execute(_LATELY, {"since": since}).fetchall()]


def story(db: Connection, call_id: int) -> CallDetail | None:
    """Return everything that the ledger knows of one call; None where there is no such number."""
    found = some(db, [call_id])
    if not found:
        return None
    entries = tuple(CallEntry(*each) for each in db.execute(_ENTRIES, (call_id,)).fetchall())
    [call] = found
    return CallDetail(call, entries, tuple(CallPart(*each) for each in db.execute(_PARTS, (call_id,)).fetchall()))


def _with_amounts(db: Connection, calls: list[CallRow]) -> list[CallRow]:
    if not calls:
        return calls
    rows = db.execute(_AMOUNTS.format(", ".join(str(each.id) for each in calls))).fetchall()
    amounts = {call_id: {"spent_nano": spent, "held_nano": held} for call_id, spent, held in rows}
    return [replace(each, **amounts.get(each.id, {})) for each in calls]


def _call(row: Row) -> CallRow:
    return CallRow(**{name: row[name] for name in (*_CALL, "token")} | {"stream": bool(row["stream"])})
