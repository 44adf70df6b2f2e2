"""Find single calls, and show one with all its bookings. Read-only; the connection yields rows by name (`connect.reading`)."""

from dataclasses import dataclass
from typing import Literal, get_args

from gateway_addon.ledger.sql import Connection, Row, named

State = Literal["open", "settled", "voided", "refused", "free"]
STATES: tuple[State, ...] = get_args(State)
PAGE = 50
NEWEST = 2**62
"""Above every call's number."""


@dataclass(frozen=True, slots=True)
class CallFilter:
    """A filter of calls; an empty field matches all. `text` is a call's number, or a part of any of its labels."""

    app: str = ""
    model: str = ""
    state: str = ""
    text: str = ""
    before: int = NEWEST
    """Only calls older than the one of this number: the next page."""


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
    stop_reason: str | None
    request_id: str | None
    session_id: str | None
    agent_id: str | None
    parent_agent_id: str | None
    user_id: str | None
    labels: str | None
    """A JSON object."""
    flags: str
    token: str
    spent_nano: int
    held_nano: int

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


_LABELS = (
    "calls.app", "model_asked", "model_served", "refusal", "stop_reason", "request_id", "session_id", "agent_id", "user_id", "calls.labels",
    "flags",
)  # fmt: skip
_COLUMNS = """calls.id, state, calls.app, team, endpoint, model_asked, model_served, stream, max_tokens, started_at, first_byte_at,
  ended_at, quote_nano, status, refusal, stop_reason, request_id, session_id, agent_id, parent_agent_id, user_id, calls.labels, flags,
  trim('#' || token_id || ' ' || coalesce(tokens.label, '')) AS token,
  (SELECT coalesce(sum(spent_nano), 0) FROM entries WHERE call_id = calls.id) AS spent_nano,
  (SELECT coalesce(sum(reserved_nano), 0) FROM entries WHERE call_id = calls.id) AS held_nano"""
_SEARCH = f"""
SELECT {_COLUMNS} FROM calls LEFT JOIN tokens ON tokens.id = token_id
WHERE carried IS NULL AND ($app = '' OR calls.app = $app) AND ($model = '' OR $model IN (model_asked, model_served))
  AND ($state = '' OR state = $state)
  AND calls.id < $before
  AND ($text = '' OR CAST(calls.id AS TEXT) = $text OR {" OR ".join(f"{{instr}}(lower({label}), lower($text)) > 0" for label in _LABELS)})
ORDER BY calls.id DESC LIMIT {PAGE + 1}
"""
_ENTRIES = """
SELECT at, kind, reserved_nano, spent_nano, sum(reserved_nano) OVER (ORDER BY id), sum(spent_nano) OVER (ORDER BY id), note
FROM entries WHERE call_id = $1 ORDER BY id
"""
_PARTS = f"SELECT {', '.join(CallPart.__slots__)} FROM usage WHERE call_id = $1 ORDER BY part"


def search(db: Connection, wanted: CallFilter) -> tuple[list[CallRow], bool]:
    """Return the newest matching calls, at most a page, and whether there are older ones."""
    values = {name: getattr(wanted, name) for name in CallFilter.__slots__} | {"text": wanted.text.strip().removeprefix("#")}
    rows = db.execute(named(_SEARCH.format(instr=db.engine.instr)), values).fetchall()
    return [_call(row) for row in rows[:PAGE]], len(rows) > PAGE


def story(db: Connection, call_id: int) -> CallDetail | None:
    """Return everything that the ledger knows of one call; None where there is no such number."""
    row = db.execute(f"SELECT {_COLUMNS} FROM calls LEFT JOIN tokens ON tokens.id = token_id WHERE calls.id = $1", (call_id,)).fetchone()
    if row is None:
        return None
    entries = tuple(CallEntry(*each) for each in db.execute(_ENTRIES, (call_id,)).fetchall())
    return CallDetail(_call(row), entries, tuple(CallPart(*each) for each in db.execute(_PARTS, (call_id,)).fetchall()))


def _call(row: Row) -> CallRow:
    return CallRow(**{name: row[name] for name in CallRow.__slots__} | {"stream": bool(row["stream"])})
