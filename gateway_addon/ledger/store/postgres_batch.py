"""Take a batch of reservations and settlements to a PostgreSQL server in one round trip, by a function that each writer brings along.

Promises the ledger's own rule: the function's body is made from the statements of `reservations.py`, in their order and one after the
other, so each of them sees what those before it wrote, and a cap is judged by the same text as on a file. What is added here is only
what Python does between two of them; `tests/ledger/store/test_postgres_batch.py` holds both ways against each other. The function lives as
long as the connection (`pg_temp`), so gateways of two versions side by side each judge by their own rule.

Its call is a transaction of its own: the answer says that it is durable. Where the answer is lost, `found` reads it from what was written.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import tzinfo
from string import Template
from typing import Any, NamedTuple

from gateway_addon.ledger import parts, reservations, state
from gateway_addon.ledger.scope import part_of
from gateway_addon.ledger.sql import Connection, Engine, Row, Statement
from gateway_addon.ledger.store import engines
from gateway_addon.ledger.store.interface import Asked
from gateway_addon.ledger.store.postgres_session import ServerConnection
from gateway_addon.ledger.types import Denied, LedgerUnavailable, Reservation, Reserved, Resolution
from gateway_addon.windows import starts

FENCED = "GW001"
"""The lease of the owner has run out, its commit was given up as lost, or a newer gateway has changed the tables."""
MOVED = "GW002"
"""The ledger's calendar is another than the one by which the windows were computed."""

_RENEW = """
UPDATE owners SET commits = $1, lease_until = extract(epoch FROM clock_timestamp()) + $2
WHERE id = $3 AND commits < $1 AND lease_until > extract(epoch FROM clock_timestamp()) AND (SELECT count(*) FROM migrations) <= $4
""".strip()
RENEW = f"{_RENEW} RETURNING lease_until"
PAUSABLE = "scope = ANY (item.pausable)"
_CAP = "column1 text, column2 text, column3 bigint, column4 bigint"
CAPS = f"json_to_recordset(item.caps) AS asked ({_CAP})"
"""The caps of a reservation. Those of parts have a `kind` too."""

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
    "parts_nano", "parts_count", "status", "complete", "names_max",
)  # fmt: skip
_ITEM = ", ".join(
    [f'"{name}" {kind}' for kind, names in (("text", _TEXTS), ("double precision", _TIMES), ("bigint", _WHOLES)) for name in names]
    + ["caps json", "pausable text[]", "parts json", "named json"]
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
    """Return an expression for all rows of a statement, each as a JSON object."""
    return f"(SELECT coalesce(json_agg(row_to_json(its_row)), '[]') FROM ({text.strip()}) AS its_row)"


_CALENDAR = f"""
(SELECT string_agg(what || ' ' || value, ',' ORDER BY (what || ' ' || value) COLLATE "C")
   FROM ({reservations.CALENDAR}) AS kept_calendar (what, value))
""".strip()
_ITEM_APP = 'item."app"'
_JUDGED = f"({reservations.STANDINGS}) AS standing"
# The standings by which a reservation is judged are read once, and come back with its number: as they are with it.
RESERVE = f"""
WITH judged AS MATERIALIZED ({reservations.STANDINGS})
{reservations.RESERVE.replace(_JUDGED, "judged AS standing").strip()},
  (SELECT json_agg(json_build_array(scope, "window", window_start, cap_nano, raised_nano, spent_nano, reserved_nano + $grant_nano,
    quantum_nano + $own_quantum_nano, open + 1, limit_nano)) FROM judged)
"""
# What `parts.counted` does, for a call with caps on its parts: `names_max` and, in order, the `named` ones whose names clients choose.
COUNTED = f"""
        IF EXISTS (SELECT 1 FROM json_to_recordset(item.caps) AS asked (kind text, column2 text)
            WHERE asked.kind IS NOT NULL AND NOT EXISTS (SELECT 1 FROM kept_parts
              WHERE kept_parts.app = item.app AND kept_parts.kind = asked.kind AND kept_parts."window" = asked.column2)) THEN
          answers := answers || json_build_object('kept', {{kept}});
          CONTINUE;
        END IF;
        its_room := greatest(0, item.names_max - coalesce((
          SELECT names FROM part_names WHERE part_names.app = item.app AND {parts.OF_THE_DAY.format(day="item.day_start")}), 0));
        SELECT least(count(*), its_room), array_agg(kind) FILTER (WHERE nth > its_room) INTO its_new, its_shared
          FROM (SELECT kind, row_number() OVER (ORDER BY place) AS nth
                FROM json_to_recordset(item.named) AS named (place bigint, kind text, scope text)
                WHERE NOT EXISTS (SELECT 1 FROM part_balances WHERE part_balances.scope = named.scope)) AS new_name;
        IF its_shared IS NOT NULL THEN
          item.app_parts := (SELECT json_object_agg(key, CASE WHEN key = ANY (its_shared) THEN '{parts.OTHERS}' ELSE value END)
            FROM json_each_text(item.app_parts::json));
          item.caps := (SELECT json_agg(json_build_object('column2', column2, 'column3', column3, 'column4', column4, 'column1',
              CASE WHEN kind = ANY (its_shared) THEN item.app_scope || ' ' || kind || ':{parts.OTHERS}' ELSE column1 END))
            FROM json_to_recordset(item.caps) AS asked ({_CAP}, kind text));
        END IF;
""".strip().format(kept=_rows(_numbered(parts.KEPT, _ITEM_APP)))
# A generic plan, by key, whatever the statistics say: the planner takes json for a hundred rows, and a table that was empty when the
# function was first called for one that is to be read from end to end.
FUNCTION = f"""
CREATE OR REPLACE FUNCTION pg_temp.gateway_batch(asked_scopes json, its_owner text, its_number bigint, its_lease_s double precision,
  its_tables bigint, its_calendar text, its_items json) RETURNS json LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
SET enable_mergejoin = off AS $batch$
DECLARE
  its_scopes text[] := ARRAY(SELECT json_array_elements_text(asked_scopes));
  its_turns bigint;
  its_lease double precision;
  item record;
  its_id bigint;
  its_standings json;
  its_held bigint;
  its_spent bigint;
  its_flags text;
  its_room bigint;
  its_new bigint;
  its_shared text[];
  answers json[] := '{{}}';
BEGIN
  PERFORM 1 FROM turns WHERE scope = ANY(its_scopes) ORDER BY scope FOR UPDATE;
  GET DIAGNOSTICS its_turns = ROW_COUNT;
  IF its_turns < cardinality(its_scopes) THEN
    INSERT INTO turns SELECT unnest(its_scopes) ON CONFLICT DO NOTHING;
    PERFORM 1 FROM turns WHERE scope = ANY(its_scopes) ORDER BY scope FOR UPDATE;
  END IF;
  {_numbered(_RENEW, "its_number", "its_lease_s", "its_owner", "its_tables")} AND its_calendar = {_CALENDAR}
    RETURNING lease_until INTO its_lease;
  IF its_lease IS NULL THEN
    IF its_calendar IS DISTINCT FROM {_CALENDAR} THEN RAISE EXCEPTION 'moved' USING ERRCODE = '{MOVED}'; END IF;
    RAISE EXCEPTION 'fenced' USING ERRCODE = '{FENCED}';
  END IF;
  FOR item IN SELECT * FROM json_to_recordset(its_items) AS asked_item ({_ITEM}) LOOP
    its_id := NULL; its_held := NULL; its_flags := item.flags; its_new := 0; its_shared := NULL;
    IF item.what = 'reserve' THEN
      IF item.names_max IS NOT NULL THEN
        {COUNTED}
      END IF;
      IF coalesce(item."concurrent", item."requests_per_minute", item."input_tokens_per_minute") IS NULL THEN
        {_of_item(RESERVE.replace(reservations.RATE_OBSTACLES, ""))} INTO its_id, its_standings;
      ELSE
        {_of_item(RESERVE)} INTO its_id, its_standings;
      END IF;
      IF its_id IS NOT NULL THEN
        IF its_new > 0 THEN {_of_item(parts.NAMED.text, names="its_new")}; END IF;
        answers := answers || json_build_object('id', its_id, 'shared', its_shared, 'standings', coalesce(its_standings, '[]'));
      ELSE
        answers := answers || json_build_object('shared', its_shared, 'standings', {_rows(_of_item(reservations.STANDINGS))},
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
          IF its_spent <> item.parts_nano THEN
            INSERT INTO usage VALUES
              (item.call_id, item.parts_count, 'estimate', NULL, 0, 0, 0, 0, 0, 0, 0, its_spent - item.parts_nano, NULL);
          END IF;
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
    """Rows that came with a batch's answer, by name or by position, as a connection gives them."""

    engine: Engine = engines.POSTGRESQL

    def __init__(self, rows: Mapping[str, Sequence[Mapping[str, object] | Sequence[object]]]) -> None:
        self._rows = rows

    def execute(self, statement: str | Statement, values: object = ()) -> "_ToldRows":
        names = {reservations.ITS_TOKEN: "token", state.PAUSES: "pauses", reservations.IN_FLIGHT: "open", reservations.COUNTED: "counted"}
        name = names[statement] if isinstance(statement, str) else "standings"
        return _ToldRows([tuple(row.values() if isinstance(row, dict) else row) for row in self._rows[name]])

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


class SeenCalendar(NamedTuple):
    """The ledger's calendar as it was last seen: to compute windows by, and as the function compares it."""

    of_windows: reservations.Calendar
    text: str


class Sender(NamedTuple):
    """The process that sends a batch: its name, the number of its commit, its lease, its version's tables, the calendar as it knows it."""

    owner: str
    number: int
    lease_s: float
    tables: int
    calendar: SeenCalendar


def calendar_now(db: Connection) -> SeenCalendar:
    rows = db.execute(reservations.CALENDAR).fetchall()
    return SeenCalendar(reservations.calendar_of(rows), ",".join(sorted(f"{what} {value}" for what, value in rows)))


CALL = b"SELECT pg_temp.gateway_batch($1, $2, $3, $4, $5, $6, $7)"


def send(db: ServerConnection, scopes: Collection[str], asked: Sequence[Asked], sender: Sender) -> tuple[float, list[object]]:
    """Take the turns, renew the lease and do all that is asked, in order and in one transaction, which is durable on return.

    Returns the lease's end by the server's clock, and the answers. Raises psycopg.Error: nothing of the batch stays, or `db.in_doubt`.
    """
    owner, number, lease_s, tables, calendar = sender
    items = [_item(each, owner, calendar.of_windows) for each in asked]
    values = (json.dumps(sorted(scopes)), owner, number, lease_s, tables, calendar.text, json.dumps(items))
    [(said,)] = db.raw.execute(CALL, values, prepare=True).fetchall()
    return said["lease_until"], [_answer(*pair, owner, calendar.of_windows[0]) for pair in zip(asked, said["answers"], strict=True)]


def _item(asked: Asked, owner: str, calendar: reservations.Calendar) -> dict[str, object]:
    if isinstance(asked, Reservation):
        return _reservation(asked, owner, calendar)
    cost_nano, billed_parts, outcome = asked.settlement.cost_nano, asked.settlement.parts, asked.settlement.outcome
    is_settled = asked.kind == "settle"
    parts_nano = sum(part.nano for part in billed_parts)
    values = {
        "call_id": asked.call_id,
        "kind": asked.kind,
        "state": "settled" if is_settled else "voided",
        "now": asked.at,
        "spent_nano": cost_nano if is_settled else 0,
        "parts_count": len(billed_parts),
        "parts_nano": parts_nano,
    }
    explained = reservations.usage_rows(asked.call_id, billed_parts, parts_nano)
    billed = [_plain(dict(zip(_PART_NAMES, row[1:], strict=True))) for row in explained]
    return _plain(values | reservations.outcome_values(outcome, outcome.flags)) | {"what": "end", "parts": billed}


_CAP_NAMES = tuple(column.split()[0] for column in _CAP.split(", "))
_PART_NAMES = tuple(column.split()[0] for column in _PART.split(", "))


def _reservation(asked: Reservation, owner: str, calendar: reservations.Calendar) -> dict[str, object]:
    call = asked.call
    counted, windows = parts.CountedCall(call.parts, asked.caps), starts(asked.now, *calendar)
    values, cap_windows = reservations.reserving(asked, counted, owner, windows)
    item = _plain(values) | {"what": "reserve", "pausable": call.pause_scopes}
    item["caps"] = caps = [dict(zip(_CAP_NAMES, each, strict=True)) for each in cap_windows]
    of_parts = {cap["column1"]: part[0] for cap in caps if (part := part_of(str(cap["column1"]))) is not None}
    found = parts.looked_at(call, asked.caps)
    if of_parts or found:
        for cap in caps:
            cap |= {"kind": of_parts[cap["column1"]]} if cap["column1"] in of_parts else {}
        item["names_max"] = call.names.new_max
        item["named"] = [
            {"place": place, "kind": kind, "scope": scope}
            for place, ((kind, _), scope) in enumerate(found.items())
            if kind not in call.names.bounded
        ]
    return item


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    """Return values as json says them so that the function reads numbers."""
    return {name: int(value) if isinstance(value, bool) else value for name, value in values.items() if value is not None}


def _answer(asked: Asked, said: Any, owner: str, zone: tzinfo) -> Reserved | Denied | Resolution | LedgerUnavailable:
    if isinstance(asked, Reservation):
        return _answered(asked, said, owner, zone)
    if said is None:
        return Resolution(first=False)
    held_nano, spent_nano = said
    if asked.kind == "void":
        return Resolution(True, 0, held_nano)
    return Resolution(True, spent_nano, held_nano, spent_nano > held_nano)


def _answered(asked: Reservation, said: Any, owner: str, zone: tzinfo) -> Reserved | Denied | LedgerUnavailable:
    if "kept" in said:
        try:
            parts.must_be_kept(asked.caps, {(kept["kind"], kept["window"]) for kept in said["kept"]})
        except LedgerUnavailable as error:
            return error
    shared = dict.fromkeys(said["shared"] or (), parts.OTHERS)
    caps = parts.placed(asked.call.app, asked.caps, dict(asked.call.parts) | shared)
    if "id" not in said:
        return reservations.denied(_Told(said), asked, caps, zone)
    standings = reservations.standings_of(said["standings"], [(cap.scope, cap.window) for cap in caps], asked.now, zone)
    return Reserved(said["id"], standings, asked.call.app, asked.caps, owner)


# What the transaction that wrote the owner's row wrote besides. No other one touches these rows: nobody knew their calls yet.
_ITS_ROWS = "xmin = (SELECT xmin FROM owners WHERE owners.id = $1)"
WRITTEN_CALLS = f"""
SELECT id, app_parts, app, token_id, endpoint, model_asked, session_id, agent_id, user_id, stream, max_tokens, started_at, quote_nano,
  grant_nano, quantum_nano, input_tokens_quoted FROM calls WHERE owner = $1 AND state = 'open' AND calls.{_ITS_ROWS} ORDER BY id
"""
WRITTEN_ENDS = f"""
SELECT call_id, -reserved_nano, spent_nano FROM entries
WHERE call_id = ANY ($2) AND kind IN ('settle', 'void') AND entries.{_ITS_ROWS}
"""


def found(db: Connection, owner: str, asked: Sequence[Asked]) -> list[object]:
    """Return the answers to the last batch of an owner that took place; None for a reservation that was not written.

    Reservations are written in the order in which they were asked for, so a row that fits the next one is that one's.
    """
    calls = db.execute(WRITTEN_CALLS, (owner,)).fetchall()
    ids = [each.call_id for each in asked if not isinstance(each, Reservation)]
    ends = {call_id: (held, spent) for call_id, held, spent in db.execute(WRITTEN_ENDS, (owner, ids)).fetchall()}
    zone = reservations.zone(db)
    answers: list[object] = []
    for each in asked:
        if not isinstance(each, Reservation):
            answers.append(_answer(each, ends.pop(each.call_id, None), owner, zone))
        elif calls and tuple(calls[0][2:]) == _written(each):
            call_id, app_parts, *_ = calls.pop(0)
            caps = parts.placed(each.call.app, each.caps, json.loads(app_parts or "{}"))
            standings = reservations.capped(db, caps, now=each.now, calendar=zone)
            answers.append(Reserved(call_id, standings, each.call.app, each.caps, owner))
        else:
            answers.append(None)
    return answers


def _written(asked: Reservation) -> tuple[object, ...]:
    """Return what `WRITTEN_CALLS` says of a reservation that was written."""
    call = asked.call
    named = (call.app, call.token_id, call.endpoint, call.model_asked, call.session_id, call.agent_id, call.user_id)
    amounts = (call.quote_nano, asked.grant_nano, asked.quantum_nano, call.input_tokens)
    return (*named, int(call.stream), call.max_tokens, asked.now, *amounts)
