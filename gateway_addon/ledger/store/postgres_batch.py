"""Take a batch of reservations and settlements to a PostgreSQL server in one statement, by a function that each writer brings along.

Promises the ledger's own rule: the function's body is made from the statements of `reservations.py`, in their order and one after the
other, so each of them sees what those before it wrote, and a cap is judged by the same text as on a file. What is added here is only
what Python does between two of them; `tests/ledger/store/test_postgres_batch.py` holds both ways against each other. The function lives as
long as the connection (`pg_temp`), so gateways of two versions side by side each judge by their own rule.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import tzinfo
from string import Template
from typing import Any, NamedTuple

from psycopg import sql

from gateway_addon.ledger import reservations, state
from gateway_addon.ledger.parts import CountedCall
from gateway_addon.ledger.sql import Engine, Row, Statement
from gateway_addon.ledger.store import engines
from gateway_addon.ledger.store.interface import Asked
from gateway_addon.ledger.store.postgres_session import ServerConnection
from gateway_addon.ledger.types import Denied, Reservation, Reserved, Resolution
from gateway_addon.windows import starts

FENCED = "GW001"
"""The lease of the owner has run out, or a newer gateway has changed the tables."""
MOVED = "GW002"
"""The ledger's calendar is another than the one by which the windows were computed."""

RENEW = """
UPDATE owners SET commits = $1, lease_until = extract(epoch FROM clock_timestamp()) + $2
WHERE id = $3 AND lease_until > extract(epoch FROM clock_timestamp()) AND (SELECT count(*) FROM migrations) <= $4
RETURNING lease_until
"""
PAUSABLE = "scope = ANY (ARRAY(SELECT json_array_elements_text(item.pausable)))"
CAPS = "json_to_recordset(item.caps) AS asked (column1 text, column2 text, column3 bigint, column4 bigint)"

_PART = (
    "part bigint, kind text, model text, input_tokens bigint, output_tokens bigint, cache_read_tokens bigint, cache_write_5m_tokens bigint,"
    " cache_write_1h_tokens bigint, cache_write_unsplit_tokens bigint, web_search_requests bigint, nano bigint, price_row text"
)
_TEXTS = (
    "what", "owner", "app", "team", "endpoint", "model_asked", "session_id", "agent_id", "parent_agent_id", "user_id", "labels",
    "app_parts", "cycles", "app_scope", "kind", "state", "model_served", "stop_reason", "request_id", "price_rows", "flags",
    "service_tier", "speed", "inference_geo",
)  # fmt: skip
_TIMES = ("now", "first_byte_at")
_WHOLES = (
    "token_id", "stream", "max_tokens", "day_start", "week_start", "month_start", "quote_nano", "input_tokens", "grant_nano",
    "own_quantum_nano", "minute", "second", "requests_per_minute", "input_tokens_per_minute", "concurrent", "call_id", "spent_nano",
    "parts_nano", "parts_count", "status", "complete",
)  # fmt: skip
_ITEM = ", ".join(
    [f'"{name}" {kind}' for kind, names in (("text", _TEXTS), ("double precision", _TIMES), ("bigint", _WHOLES)) for name in names]
    + ["caps json", "pausable json", "parts json"]
)


def _of_item(text: str, **other: str) -> str:
    """Return a statement with names as the function runs it: each value is the item's, or another."""

    class Values(dict[str, str]):
        def __missing__(self, name: str) -> str:
            return f'item."{name}"'

    judged = text.replace(reservations.ASKED, CAPS).replace(reservations.ITS_BALANCE, engines.POSTGRESQL.balance_of_cap)
    judged = judged.replace(reservations.PAUSABLE, PAUSABLE)
    return Template(judged).substitute(Values(other)).strip()


def _numbered(text: str, *values: str) -> str:
    for number, value in reversed(list(enumerate(values, start=1))):
        text = text.replace(f"${number}", value)
    return text


def _rows(text: str) -> str:
    return f"(SELECT coalesce(json_agg(row_to_json(its_row)), '[]') FROM ({text.strip()}) AS its_row)"


_ITEM_APP = 'item."app"'
# A generic plan, by key, whatever the statistics say: the planner takes json for a hundred rows, and a table that was empty when the
# function was first called for one that is to be read from end to end.
FUNCTION = f"""
CREATE OR REPLACE FUNCTION pg_temp.gateway_batch(batch json) RETURNS json LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $batch$
DECLARE
  its_scopes text[] := ARRAY(SELECT json_array_elements_text(batch->'scopes'));
  its_turns bigint;
  its_lease double precision;
  item record;
  its_id bigint;
  its_held bigint;
  its_spent bigint;
  its_flags text;
  answers json[] := '{{}}';
BEGIN
  PERFORM 1 FROM turns WHERE scope = ANY(its_scopes) ORDER BY scope FOR UPDATE;
  GET DIAGNOSTICS its_turns = ROW_COUNT;
  IF its_turns < cardinality(its_scopes) THEN
    INSERT INTO turns SELECT unnest(its_scopes) ON CONFLICT DO NOTHING;
    PERFORM 1 FROM turns WHERE scope = ANY(its_scopes) ORDER BY scope FOR UPDATE;
  END IF;
  {_numbered(RENEW, "(batch->>'number')::bigint", "(batch->>'lease_s')::double precision", "batch->>'owner'", "(batch->>'tables')::bigint")}
    INTO its_lease;
  IF its_lease IS NULL THEN RAISE EXCEPTION 'fenced' USING ERRCODE = '{FENCED}'; END IF;
  IF batch->>'calendar' IS DISTINCT FROM (
      SELECT string_agg(what || ' ' || value, ',' ORDER BY (what || ' ' || value) COLLATE "C")
      FROM ({reservations.CALENDAR}) AS kept_calendar (what, value)) THEN
    RAISE EXCEPTION 'moved' USING ERRCODE = '{MOVED}';
  END IF;
  FOR item IN SELECT * FROM json_to_recordset(batch->'items') AS asked_item ({_ITEM}) LOOP
    its_id := NULL; its_held := NULL; its_flags := item.flags;
    IF item.what = 'reserve' THEN
      {_of_item(reservations.RESERVE)} INTO its_id;
      IF its_id IS NOT NULL THEN
        answers := answers || json_build_object('id', its_id, 'standings', {_rows(_of_item(reservations.STANDINGS))});
      ELSE
        answers := answers || json_build_object('standings', {_rows(_of_item(reservations.STANDINGS))},
          'token', {_rows(_numbered(reservations.ITS_TOKEN, "item.token_id", _ITEM_APP))},
          'pauses', {_rows(_numbered(state.PAUSES, 'item."now"'))},
          'open', {_rows(_numbered(reservations.IN_FLIGHT, "item.app_scope"))},
          'counted', {_rows(_numbered(reservations.COUNTED, _ITEM_APP, "item.minute", "(item.minute - 1)"))});
      END IF;
    ELSE
      {_of_item(reservations.RESOLVE.text)} INTO its_held, its_spent;
      IF its_held IS NULL THEN
        IF item.kind = 'settle' AND item.spent_nano IS NOT NULL THEN
          {_of_item(reservations.LATE.text, cost_nano="item.spent_nano")};
        END IF;
        answers := answers || 'null'::json;
      ELSE
        IF item.kind = 'settle' THEN
          IF item.spent_nano IS NULL AND 'estimated' <> ALL (string_to_array(its_flags, ' ')) THEN
            its_flags := ltrim(its_flags || ' estimated');
          END IF;
          IF its_spent > its_held THEN
            its_flags := ltrim(its_flags || ' overrun');
            IF 'late' <> ALL (string_to_array(its_flags, ' ')) THEN
              {_of_item(reservations.OVERRUN.text, over_nano="(its_spent - its_held)")};
            END IF;
          END IF;
          INSERT INTO usage SELECT item.call_id, billed.* FROM json_to_recordset(item.parts) AS billed ({_PART});
          INSERT INTO usage SELECT item.call_id, item.parts_count, 'estimate', NULL, 0, 0, 0, 0, 0, 0, 0, its_spent - item.parts_nano, NULL
            WHERE its_spent <> item.parts_nano;
        END IF;
        {_of_item(reservations.FINISH.text, flags="its_flags")};
        answers := answers || json_build_array(its_held, its_spent);
      END IF;
    END IF;
  END LOOP;
  RETURN json_build_object('lease_until', its_lease, 'answers', array_to_json(answers));
END $batch$
"""


class _Told:
    """Rows that came with a batch's answer, as a connection gives them."""

    engine: Engine = engines.POSTGRESQL

    def __init__(self, rows: Mapping[str, Sequence[Mapping[str, object]]]) -> None:
        self._rows = rows

    def execute(self, statement: str | Statement, values: object = ()) -> "_ToldRows":
        names = {reservations.ITS_TOKEN: "token", state.PAUSES: "pauses", reservations.IN_FLIGHT: "open", reservations.COUNTED: "counted"}
        name = names[statement] if isinstance(statement, str) else "standings"
        return _ToldRows([tuple(row.values()) for row in self._rows[name]])

    def executemany(self, statement: str, rows: object) -> None:
        raise TypeError("what came with an answer can only be read")


class _ToldRows:
    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows
        self.rowcount = len(rows)

    def fetchall(self) -> list[Row]:
        return self._rows

    def fetchone(self) -> Row:
        return self._rows[0] if self._rows else None

    def fetchmany(self, size: int) -> list[Row]:
        return self._rows[:size]

    def __iter__(self) -> Any:
        return iter(self._rows)


class Sender(NamedTuple):
    """The process that sends a batch: its name, the number of its commit, its lease, its version's tables, the calendar as it knows it."""

    owner: str
    number: int
    lease_s: float
    tables: int
    calendar: str


def calendar_text(rows: Iterable[tuple[str, str]]) -> str:
    """Return the rows of a calendar as the function compares them."""
    return ",".join(sorted(f"{what} {value}" for what, value in rows))


def send(db: ServerConnection, scopes: Collection[str], asked: Sequence[Asked], sender: Sender) -> tuple[float, list[object]]:
    """Begin a transaction, take the turns, renew the lease and do all that is asked, in order; the caller commits.

    Returns the lease's end by the server's clock, and the answers. Raises psycopg.Error: nothing of the batch stays.
    """
    calendar = reservations.calendar_of([(what, value) for what, _, value in (row.partition(" ") for row in sender.calendar.split(","))])
    items = [_item(each, sender.owner, calendar) for each in asked]
    batch = {"scopes": sorted(scopes), "items": items, **sender._asdict()}
    text = sql.Literal(json.dumps(batch)).as_string(db.raw)
    cursor = db.raw.execute(f"BEGIN; SELECT pg_temp.gateway_batch({text})".encode(), prepare=False)
    cursor.nextset()
    [(said,)] = cursor.fetchall()
    return said["lease_until"], [_answer(*pair, sender.owner, calendar[0]) for pair in zip(asked, said["answers"], strict=True)]


def _item(asked: Asked, owner: str, calendar: reservations.Calendar) -> dict[str, object]:
    if isinstance(asked, Reservation):
        counted, windows = CountedCall(asked.call.parts, asked.caps), starts(asked.now, *calendar)
        values, caps = reservations.reserving(asked, counted, owner, windows)
        named = [dict(zip(("column1", "column2", "column3", "column4"), cap, strict=True)) for cap in caps]
        return _plain(values) | {"what": "reserve", "caps": named, "pausable": asked.call.pause_scopes}
    cost_nano, parts, outcome = asked.settlement.cost_nano, asked.settlement.parts, asked.settlement.outcome
    is_settled = asked.kind == "settle"
    values = {
        "call_id": asked.call_id,
        "kind": asked.kind,
        "state": "settled" if is_settled else "voided",
        "now": asked.at,
        "spent_nano": cost_nano if is_settled else 0,
        "parts_count": len(parts),
        "parts_nano": sum(part.nano for part in parts),
    }
    explained = reservations.usage_rows(asked.call_id, parts, sum(part.nano for part in parts))
    billed = [_plain(dict(zip(_PART_NAMES, row[1:], strict=True))) for row in explained]
    return _plain(values | reservations.outcome_values(outcome, outcome.flags)) | {"what": "end", "parts": billed}


_PART_NAMES = tuple(column.split()[0] for column in _PART.split(", "))


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    """Return values as json says them so that the function reads numbers."""
    return {name: int(value) if isinstance(value, bool) else value for name, value in values.items() if value is not None}


def _answer(asked: Asked, said: Any, owner: str, zone: tzinfo) -> Reserved | Denied | Resolution:
    if isinstance(asked, Reservation):
        if "id" not in said:
            return reservations.denied(_Told(said), asked, asked.caps, zone)
        return Reserved(said["id"], reservations.capped(_Told(said), asked.caps, now=asked.now, calendar=zone), owner)
    if said is None:
        return Resolution(first=False)
    held_nano, spent_nano = said
    if asked.kind == "void":
        return Resolution(True, 0, held_nano)
    return Resolution(True, spent_nano, held_nano, spent_nano > held_nano)
