"""The ledger's arithmetic: synchronous functions on a connection inside a transaction that the caller opened.

Promises: a reservation is written by one statement whose WHERE is the judgement, so check and write cannot come apart; why it
said no is judged from values (`denials.judge`) in the same transaction. Each function here is one small group of statements,
all searches by key: their cost does not grow with the ledger. Knows nothing of files, threads, clocks or policies.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import tzinfo
from functools import lru_cache
from itertools import chain
from typing import Any
from zoneinfo import ZoneInfo

from gateway_addon.ledger import parts, state
from gateway_addon.ledger.denials import judge, judge_rate
from gateway_addon.ledger.scope import app_scope
from gateway_addon.ledger.sql import Connection, Engine, Statement, named
from gateway_addon.ledger.types import (
    CallFacts,
    CapShape,
    Denied,
    LedgerUnavailable,
    MinuteCount,
    NewCall,
    Outcome,
    PartShape,
    RateLimits,
    RecordedEnd,
    Reservation,
    Reserved,
    Resolution,
    Settlement,
    Standing,
    Token,
    labels_text,
)
from gateway_addon.names import PROGRAM
from gateway_addon.windows import WINDOWS, Starts, Window, is_cycle, next_start, starts

type CapWindow = tuple[str, str, int, int | None]
"""A scope, its window, the window's start, and the cap's amount where there is one."""

type Calendar = tuple[tzinfo, tuple[Window, ...]]
"""The zone of a ledger's windows, and the billing cycles in which every call counts."""

# Places in a statement (`_statement`): a row of values for each cap asked about (to take them out of JSON, as one value, cost twice as much
# as all the look-ups), and where the engine keeps a cap's balance.
ASKED = "(VALUES caps) AS asked"
ASKED_NOTHING = "(SELECT NULL AS column1, NULL AS column2, NULL AS column3, NULL AS column4 WHERE 1 = 0) AS asked"
ITS_BALANCE = "LEFT JOIN its_balance"

# One row per cap asked about, with what stands against it. In force is min(policy + raises, limit).
STANDINGS = f"""
  SELECT cap.scope, cap."window", cap.window_start,
    CASE WHEN limit_nano < cap.amount_nano + cap.raised_nano THEN limit_nano ELSE cap.amount_nano + cap.raised_nano END AS cap_nano,
    cap.raised_nano, coalesce(balance.spent_nano, part.spent_nano, 0) AS spent_nano,
    coalesce(balance.reserved_nano, part.reserved_nano, 0) AS reserved_nano,
    coalesce(balance.quantum_nano, part.quantum_nano, 0) AS quantum_nano, coalesce(balance.open, part.open, 0) AS open, cap.limit_nano
  FROM (SELECT column1 AS scope, column2 AS "window", CAST(column3 AS BIGINT) AS window_start, CAST(column4 AS BIGINT) AS amount_nano,
          (SELECT coalesce(sum(amount_nano), 0) FROM raises
           WHERE scope = column1 AND "window" = column2 AND until > $now) AS raised_nano,
          (SELECT amount_nano FROM limits WHERE scope = column1 AND "window" = column2) AS limit_nano
        FROM {ASKED}) AS cap
  {ITS_BALANCE}
"""

# What stands in the way of a reservation; no row: nothing does. `denials.judge` asks the same of values, and says what it is.
_RATE = """
  SELECT 1 FROM (SELECT coalesce(sum({count}) FILTER (WHERE minute = $minute), 0) AS recent,
            coalesce(sum({count}) FILTER (WHERE minute < $minute), 0) AS before
          FROM minutes WHERE CAST(${limit} AS BIGINT) IS NOT NULL AND app = $app AND minute IN ($minute, $minute - 1)) AS counted
    WHERE 60 * recent + (60 - $second) * before + 60 * {size} > 60 * ${limit}
"""
PAUSABLE = "scope IN ('its scopes')"
"""Becomes a list of the call's scopes, as long as they are many (`_statement`): each is looked up by key."""
SCOPES_A_STEP = 8  # a call has a few scopes more or less than another, and each length is a statement of its own
RATE_OBSTACLES = f"""
  UNION ALL
  SELECT 1 FROM (SELECT 1) AS caller WHERE CAST($concurrent AS BIGINT) IS NOT NULL AND $concurrent <=
    coalesce((SELECT open FROM balances WHERE scope = $app_scope AND "window" = 'ever' AND window_start = 0), 0)
  UNION ALL
  {_RATE.format(limit="requests_per_minute", count="requests", size="1")}
  UNION ALL
  {_RATE.format(limit="input_tokens_per_minute", count="input_tokens", size="$input_tokens")}
"""
"""Those of an app with a rate or a concurrency. For another they are none, and a server sets them up for nothing."""
OBSTACLES = f"""
  SELECT 1 FROM (SELECT 1) AS caller LEFT JOIN tokens ON id = $token_id AND app = $app
    WHERE id IS NULL OR revoked_at <= $now OR expires_at <= $now
  UNION ALL
  SELECT 1 FROM pauses
    WHERE {PAUSABLE} AND (until IS NULL OR until > $now)
  UNION ALL
  SELECT 1 FROM ({STANDINGS}) AS standing WHERE spent_nano + reserved_nano + quantum_nano + $grant_nano + $own_quantum_nano > cap_nano
  {RATE_OBSTACLES}
"""

ITS_TOKEN = f"SELECT {state.TOKEN} FROM tokens WHERE id = $1 AND app = $2"
IN_FLIGHT = """SELECT open FROM balances WHERE scope = $1 AND "window" = 'ever' AND window_start = 0"""
COUNTED = "SELECT minute, requests, input_tokens FROM minutes WHERE app = $1 AND minute IN ($2, $3)"

ADMITTED = named("""
INSERT INTO minutes (app, minute, requests, input_tokens) VALUES ($app, $minute, 1, 0)
ON CONFLICT (app, minute) DO UPDATE SET requests = minutes.requests + 1
""")

RESERVE = f"""
INSERT INTO calls (state, owner, app, team, token_id, endpoint, model_asked, stream, max_tokens, session_id, agent_id,
  parent_agent_id, user_id, labels, app_parts, day_start, week_start, month_start, cycles, started_at,
  quote_nano, grant_nano, quantum_nano, input_tokens_quoted)
SELECT 'open', $owner, $app, $team, $token_id, $endpoint, $model_asked, $stream, $max_tokens, $session_id, $agent_id,
  $parent_agent_id, $user_id, $labels, $app_parts, $day_start, $week_start, $month_start, $cycles, $now,
  $quote_nano, $grant_nano, $own_quantum_nano, $input_tokens
WHERE NOT EXISTS ({OBSTACLES})
RETURNING id
"""

EXTEND = f"""
INSERT INTO entries (call_id, at, kind, reserved_nano)
SELECT $call_id, $now, 'extend', $more_nano
WHERE EXISTS (SELECT 1 FROM calls WHERE id = $call_id AND state = 'open')
  AND NOT EXISTS (SELECT 1 FROM ({STANDINGS}) AS standing WHERE spent_nano + reserved_nano + $more_nano > cap_nano)
"""

RELEASE = named("""
INSERT INTO entries (call_id, at, kind, reserved_nano)
SELECT $call_id, $now, 'release', -$back_nano
WHERE EXISTS (SELECT 1 FROM calls WHERE id = $call_id AND state = 'open')
  AND $back_nano <= (SELECT sum(reserved_nano) FROM entries WHERE call_id = $call_id)
""")

RESOLVE = named("""
INSERT INTO entries (call_id, at, kind, reserved_nano, spent_nano, quantum_nano, open)
SELECT call_id, $now, $kind, -sum(reserved_nano), coalesce($spent_nano, sum(reserved_nano)), -sum(quantum_nano), -1
FROM entries WHERE call_id = $call_id
GROUP BY call_id
ON CONFLICT DO NOTHING
RETURNING -reserved_nano, spent_nano
""")

# A bill that comes after its call was settled as an orphan: what it adds is booked, once; nothing is taken off.
LATE = named("""
INSERT INTO entries (call_id, at, kind, spent_nano, note)
SELECT call_id, $now, 'adjust', $cost_nano - sum(spent_nano), 'late settlement'
FROM entries JOIN calls ON calls.id = call_id WHERE call_id = $call_id AND ' ' || flags || ' ' LIKE '% orphan %'
GROUP BY call_id HAVING $cost_nano > sum(spent_nano) AND count(*) FILTER (WHERE note = 'late settlement') = 0
""")

FINISH = named("""
UPDATE calls SET state = $state, ended_at = $now, status = $status, model_served = $model_served, stop_reason = $stop_reason,
  request_id = $request_id, first_byte_at = $first_byte_at, complete = $complete, price_rows = $price_rows, flags = $flags,
  service_tier = $service_tier, speed = $speed, inference_geo = $inference_geo
WHERE id = $call_id
""")

ASIDE = named("""
INSERT INTO calls (state, owner, app, team, token_id, endpoint, model_asked, stream, max_tokens, session_id, agent_id,
  parent_agent_id, user_id, labels, day_start, week_start, month_start, started_at, ended_at, quote_nano, input_tokens_quoted, refusal,
  status, model_served, stop_reason, request_id, first_byte_at, complete, price_rows, flags, service_tier, speed, inference_geo,
  refusal_said)
VALUES ($state, $owner, $app, $team, $token_id, $endpoint, $model_asked, $stream, $max_tokens, $session_id, $agent_id,
  $parent_agent_id, $user_id, $labels, $day_start, $week_start, $month_start, $now, $now, $quote_nano, $input_tokens, $refusal,
  $status, $model_served, $stop_reason, $request_id, $first_byte_at, $complete, $price_rows, $flags, $service_tier, $speed, $inference_geo,
  $said)
""")

PART = "INSERT INTO usage VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"

OVERRUN = named("""
INSERT INTO overruns (model, call_id, at, over_nano) SELECT coalesce(model_asked, 'unknown'), id, $now, $over_nano
FROM calls WHERE id = $call_id ON CONFLICT DO NOTHING
""")

CALENDAR = """SELECT 'zone', value FROM settings WHERE name = 'zone' UNION ALL SELECT 'cycle', "window" FROM kept_cycles"""

ZONE = "SELECT value FROM settings WHERE name = 'zone'"
EVER_BOOKED = """SELECT 1 FROM balances WHERE scope = $1 AND "window" = 'ever' AND window_start = 0"""

OPEN_OF_OWNER = "SELECT id FROM calls WHERE owner = $1 AND state = 'open' ORDER BY id LIMIT $2"


def reserve(
    db: Connection,
    owner: str,
    call: NewCall,
    grant_nano: int,
    caps: Sequence[CapShape],
    *,
    quantum_nano: int = 0,
    rates: RateLimits | None = None,
    now: float,
) -> Reserved | Denied:
    """Write an open call and its reservation of `grant_nano` where every cap, rate, token and pause allows it."""
    return write(db, owner, Reservation(call, grant_nano, caps, quantum_nano, rates or RateLimits(), now))


def write(db: Connection, owner: str, asked: Reservation) -> Reserved | Denied:
    """Write a reservation, or return why not."""
    calendar = kept_calendar(db)
    windows = starts(asked.now, *calendar)
    counted = parts.counted(db, asked.call, asked.caps, windows.day)
    values, cap_windows = reserving(asked, counted, owner, windows)
    pausable: tuple[str | None, ...] = asked.call.pause_scopes
    pausable += (None,) * (-len(pausable) % SCOPES_A_STEP)
    values |= _cap_values(cap_windows)
    values.update(zip(_pausable(len(pausable)), pausable, strict=True))
    written = db.execute(_statement(RESERVE, db.engine, len(cap_windows), len(pausable)), values).fetchall()
    if not written:
        return denied(db, asked, counted.caps, calendar[0])
    parts.named_today(db, asked.call, counted.new_names, windows.day)
    return Reserved(written[0][0], _standings(db, cap_windows, asked.now, calendar[0]), asked.call.app, asked.caps, owner)


def counted_now(db: Connection, call: NewCall, caps: Sequence[CapShape], *, now: float) -> NewCall:
    """Return a call with the names under which its parts would count if it came now. Raises LedgerUnavailable as a reservation does."""
    return call.counted_in(parts.counted(db, call, caps, starts(now, zone(db)).day).parts)


def observed(db: Connection, call: NewCall, caps: Sequence[CapShape], *, now: float) -> tuple[Standing, ...]:
    """Return the standing of each cap that a call is only observed by, where it would count if it came now."""
    with suppress(LedgerUnavailable):  # no balance is kept of what they cap: nothing is spent there
        caps = parts.counted(db, call, caps, starts(now, zone(db)).day).caps
    return capped(db, caps, now=now)


def reserving(asked: Reservation, counted: parts.CountedCall, owner: str, windows: Starts) -> tuple[dict[str, Any], list[CapWindow]]:
    """Return the values of a reservation's statement, and the caps that judge it."""
    call, now = asked.call, asked.now
    values = _call_values(call, owner, windows, now)
    values |= {
        "app_parts": parts.written(counted.parts),
        "cycles": written_cycles(windows),
        "app_scope": app_scope(call.app),
        "grant_nano": asked.grant_nano,
        "own_quantum_nano": asked.quantum_nano,
        "minute": int(now) // 60,
        "second": int(now) % 60,
        "requests_per_minute": asked.rates.requests_per_minute,
        "input_tokens_per_minute": asked.rates.input_tokens_per_minute,
        "concurrent": asked.rates.concurrent,
    }
    return values, _cap_windows(counted.caps, windows)


def denied(db: Connection, asked: Reservation, caps: Sequence[CapShape], calendar: tzinfo) -> Denied:
    """Return why a reservation that these caps judged was not written."""
    call, now = asked.call, asked.now
    found = facts(db, call, caps, now=now, calendar=calendar)
    denial = judge(found, asked.rates, asked.grant_nano, asked.quantum_nano, call.input_tokens, now)
    if denial is None:
        raise LedgerUnavailable(f"the ledger did not write a reservation and does not say why: `{PROGRAM} doctor` looks for the fault")
    return replace(denial, standings=found.standings)


def facts(db: Connection, call: NewCall, caps: Sequence[CapShape], *, now: float, calendar: tzinfo | None = None) -> CallFacts:
    """Read all that decides about a call, for `denials.judge`. `calendar`: the ledger's zone, where that has just been read."""
    in_flight = db.execute(IN_FLIGHT, (app_scope(call.app),)).fetchall()
    requests, input_tokens = _counted(db, call.app, now)
    return CallFacts(
        token(db, call.token_id, call.app),
        tuple(pause for pause in state.pauses(db, now) if pause.scope in call.pause_scopes),
        capped(db, caps, now=now, calendar=calendar),
        in_flight[0][0] if in_flight else 0,
        requests,
        input_tokens,
    )


def token(db: Connection, token_id: int, app: str) -> Token | None:
    """Return an app's token by its number, revoked and expired ones too; None where the app has no such token."""
    rows = db.execute(ITS_TOKEN, (token_id, app)).fetchall()
    return state.token_of(rows[0]) if rows else None


def _counted(db: Connection, app: str, now: float) -> tuple[MinuteCount, MinuteCount]:
    """Return what an app was admitted with in this calendar minute and the last: requests, and input tokens."""
    minute = int(now) // 60
    counted = {at: (requests, tokens) for at, requests, tokens in db.execute(COUNTED, (app, minute, minute - 1)).fetchall()}
    recent, before = counted.get(minute, (0, 0)), counted.get(minute - 1, (0, 0))
    return MinuteCount(recent[0], before[0]), MinuteCount(recent[1], before[1])


def admit_request(db: Connection, name: str, per_minute: int, *, now: float) -> Denied | None:
    """Count a request that has a rate and no reservation, under its own name, where the rate allows it."""
    requests, _ = _counted(db, name, now)
    if (denial := judge_rate("requests_per_minute", per_minute, 1, requests, now)) is not None:
        return denial
    db.execute(ADMITTED, {"app": name, "minute": int(now) // 60})
    return None


def extend(db: Connection, call_id: int, more_nano: int, caps: Sequence[CapShape], *, now: float) -> bool:
    """Hold `more_nano` more for a running call; False where a cap does not allow it or the call is resolved.

    `caps` are those of its admission. The quanta that other streams keep free do not count: top-ups come first.
    """
    row = db.execute("SELECT app, app_parts, cycles, day_start, week_start, month_start FROM calls WHERE id = $1", (call_id,)).fetchall()
    if not row or more_nano < 0:
        return False
    app, app_parts, cycles, day, week, month = row[0]
    try:
        placed = parts.placed_again(db, app, caps, app_parts)
        cap_windows = _cap_windows(placed, Starts(day, week, month, cycles=_kept_cycles(db, placed, cycles)))
    except LedgerUnavailable:  # another policy came into force: what is not kept any more cannot be judged, so nothing is granted
        return False
    values = {"call_id": call_id, "more_nano": more_nano, "now": now} | _cap_values(cap_windows)
    return db.execute(_statement(EXTEND, db.engine, len(cap_windows)), values).rowcount == 1


def release(db: Connection, call_id: int, back_nano: int, *, now: float) -> bool:
    """Release a part of a running call's reservation; False where it holds less or is resolved."""
    return back_nano >= 0 and db.execute(RELEASE, {"call_id": call_id, "back_nano": back_nano, "now": now}).rowcount == 1


def settle(db: Connection, call_id: int, settlement: Settlement, *, now: float) -> Resolution:
    """Turn what a call holds into what it cost, in full even where that is more (flagged `overrun`). At most once."""
    held_and_spent = _resolve(db, call_id, "settle", settlement.cost_nano, now)
    if held_and_spent is None:
        if settlement.cost_nano is not None:
            db.execute(LATE, {"call_id": call_id, "cost_nano": settlement.cost_nano, "now": now})
        return Resolution(first=False)
    held_nano, spent_nano = held_and_spent
    overrun = spent_nano > held_nano
    flags = settlement.outcome.flags
    if settlement.cost_nano is None and "estimated" not in flags:
        flags += ("estimated",)
    if overrun:
        flags += ("overrun",)
    if overrun and "late" not in flags:  # else it was the gateway that stood still, and the model kept its pace
        db.execute(OVERRUN, {"call_id": call_id, "now": now, "over_nano": spent_nano - held_nano})
    db.execute(FINISH, {"call_id": call_id, "state": "settled", "now": now} | outcome_values(settlement.outcome, flags))
    for row in usage_rows(call_id, settlement.parts, spent_nano):  # one or two: to a server, `executemany` costs three times as much
        db.execute(PART, row)
    return Resolution(True, spent_nano, held_nano, overrun)


def void(db: Connection, call_id: int, outcome: Outcome, *, now: float) -> Resolution:
    """Give back everything that a call holds: the provider did no work. At most once."""
    held_and_spent = _resolve(db, call_id, "void", 0, now)
    if held_and_spent is None:
        return Resolution(first=False)
    db.execute(FINISH, {"call_id": call_id, "state": "voided", "now": now} | outcome_values(outcome, outcome.flags))
    return Resolution(True, 0, held_and_spent[0])


def end(db: Connection, ending: RecordedEnd) -> Resolution:
    """Settle or void a call. At most once."""
    if ending.kind == "void":
        return void(db, ending.call_id, ending.settlement.outcome, now=ending.at)
    return settle(db, ending.call_id, ending.settlement, now=ending.at)


def refused(db: Connection, owner: str, call: NewCall, code: str, *, said: str | None = None, now: float) -> None:
    """Keep a row for a request that went no further, with the sentence that its caller was told."""
    _aside(db, owner, call, "refused", code, Outcome(), now, said)


def free(db: Connection, owner: str, call: NewCall, outcome: Outcome, *, now: float) -> None:
    """Keep a row for a request that costs nothing and was forwarded without a reservation (token counts, model lists)."""
    _aside(db, owner, call, "free", None, outcome, now)


def failed_authentication(db: Connection, reason: str, *, now: float) -> None:
    """Count a request without a valid token."""
    count = "INSERT INTO noise VALUES ($1, $2, 1) ON CONFLICT (minute, reason) DO UPDATE SET calls = noise.calls + 1"
    db.execute(count, (int(now) // 60 * 60, reason))


def standing(db: Connection, scopes: Iterable[str], caps: Sequence[CapShape], *, now: float) -> tuple[Standing, ...]:
    """Return the standing of every scope in every window, with its cap among `caps`."""
    calendar = zone(db)
    amounts = {(cap.scope, cap.window): cap.amount_nano for cap in caps}
    wanted = {scope: (*WINDOWS, *(window for of, window in amounts if of == scope and is_cycle(window))) for scope in scopes}
    windows = starts(now, calendar, {window for _, window in amounts if is_cycle(window)})
    cap_windows = [(scope, window, windows.of(window), amounts.get((scope, window))) for scope in wanted for window in wanted[scope]]
    return _standings(db, cap_windows, now, calendar)


def capped(db: Connection, caps: Sequence[CapShape], *, now: float, calendar: tzinfo | None = None) -> tuple[Standing, ...]:
    """Return the standing of each of these caps. `calendar`: the ledger's zone, where that has just been read."""
    its_zone = zone(db) if calendar is None else calendar
    return _standings(db, _cap_windows(caps, starts(now, its_zone, {cap.window for cap in caps if is_cycle(cap.window)})), now, its_zone)


def zone(db: Connection) -> tzinfo:
    """Return the zone of the ledger's calendar. It is a row, so that every process on the ledger has the same windows."""
    return calendar_of([("zone", value) for (value,) in db.execute(ZONE).fetchall()])[0]


def kept_calendar(db: Connection) -> Calendar:
    return calendar_of(db.execute(CALENDAR).fetchall())


def calendar_of(rows: Sequence[tuple[str, str]]) -> Calendar:
    """Return the calendar that these rows of `CALENDAR` say."""
    zones = [value for what, value in rows if what == "zone"]
    if not zones:
        raise LedgerUnavailable(f"the ledger has no time zone: it was not made by this program; `{PROGRAM} init` makes one")
    return ZoneInfo(zones[0]), tuple(sorted(value for what, value in rows if what == "cycle"))


def written_cycles(windows: Starts) -> str | None:
    """Return the cycles of a call as its row keeps them."""
    return json.dumps(dict(windows.cycles)) if windows.cycles else None


def _cap_windows(caps: Iterable[CapShape], windows: Starts) -> list[CapWindow]:
    """Return the caps that the ledger keeps, each with the start of its present window. Raises LedgerUnavailable for another cycle."""
    try:
        return [(cap.scope, cap.window, windows.of(cap.window), cap.amount_nano) for cap in caps if cap.window != "request"]
    except KeyError as error:
        raise LedgerUnavailable(
            f"the ledger keeps no balances for the window {error}: another gateway with other policies uses it; give all of them the same,"
            " and reload this one"
        ) from None


def _kept_cycles(db: Connection, caps: Iterable[CapShape], cycles: str | None) -> tuple[tuple[Window, int], ...]:
    """Return the starts of a running call's cycles, as its row says them, where caps ask for any: of those that are still kept."""
    if not any(is_cycle(cap.window) for cap in caps):
        return ()
    kept = kept_calendar(db)[1]
    return tuple((cycle, start) for cycle, start in json.loads(cycles or "{}").items() if cycle in kept)


@lru_cache
def _names(count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{number}" for number in range(count) for name in ("scope", "window", "start", "amount"))


@lru_cache
def _pausable(count: int) -> tuple[str, ...]:
    return tuple(f"pausable_{number}" for number in range(count))


@lru_cache
def _statement(statement: str, engine: Engine, count: int, pausable: int = 0) -> Statement:
    """Return the statement for an engine, so many caps, and so many scopes of pauses."""
    scopes = f"scope IN ({', '.join(f'${name}' for name in _pausable(pausable))})" if pausable else PAUSABLE
    rows = ", ".join(["({}, {}, {}, {})"] * count).format(*(f"${name}" for name in _names(count)))
    asked = f"(VALUES {rows}) AS asked" if count else ASKED_NOTHING
    return named(statement.replace(ASKED, asked).replace(ITS_BALANCE, engine.balance_of_cap).replace(PAUSABLE, scopes))


def _cap_values(cap_windows: Sequence[CapWindow]) -> dict[str, Any]:
    return dict(zip(_names(len(cap_windows)), chain.from_iterable(cap_windows), strict=True))


def _standings(db: Connection, cap_windows: Sequence[CapWindow], now: float, calendar: tzinfo) -> tuple[Standing, ...]:
    if not cap_windows:
        return ()
    rows = db.execute(_statement(STANDINGS, db.engine, len(cap_windows)), _cap_values(cap_windows) | {"now": now}).fetchall()
    return standings_of(rows, [(scope, window) for scope, window, *_ in cap_windows], now, calendar)


def standings_of(rows: Iterable[Sequence[Any]], asked: Sequence[tuple[str, Window]], now: float, calendar: tzinfo) -> tuple[Standing, ...]:
    """Return the rows of `STANDINGS` in the order in which these scopes and windows were asked for: a server's planner has its own."""
    return tuple(
        Standing(scope, window, start, next_start(window, start or now, calendar), *amounts)
        for scope, window, start, *amounts in sorted(rows, key=lambda row: asked.index((row[0], row[1])))
    )


def _resolve(db: Connection, call_id: int, kind: str, spent_nano: int | None, now: float) -> tuple[int, int] | None:
    """Resolve a call; return its held and its booked amount, None where it is unknown or was resolved before."""
    rows = db.execute(RESOLVE, {"call_id": call_id, "kind": kind, "spent_nano": spent_nano, "now": now}).fetchall()
    return rows[0] if rows else None


def _aside(
    db: Connection, owner: str, call: NewCall, state: str, refusal: str | None, outcome: Outcome, now: float, said: str | None = None
) -> None:
    values = _call_values(call, owner, starts(now, zone(db)), now) | outcome_values(outcome, outcome.flags)
    db.execute(ASIDE, values | {"state": state, "refusal": refusal, "said": said})


def _call_values(call: NewCall, owner: str, windows: Starts, now: float) -> dict[str, Any]:
    return {
        "owner": owner,
        "app": call.app,
        "team": call.team,
        "token_id": call.token_id,
        "endpoint": call.endpoint,
        "model_asked": call.model_asked,
        "stream": call.stream,
        "max_tokens": call.max_tokens,
        "session_id": call.session_id,
        "agent_id": call.agent_id,
        "parent_agent_id": call.parent_agent_id,
        "user_id": call.user_id,
        "labels": labels_text(call.labels),
        "day_start": windows.day,
        "week_start": windows.week,
        "month_start": windows.month,
        "quote_nano": call.quote_nano,
        "input_tokens": call.input_tokens,
        "now": now,
    }


def outcome_values(outcome: Outcome, flags: tuple[str, ...]) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "model_served": outcome.model_served,
        "stop_reason": outcome.stop_reason,
        "request_id": outcome.request_id,
        "first_byte_at": outcome.first_byte_at,
        "complete": outcome.complete,
        "price_rows": outcome.price_rows,
        "flags": " ".join(flags),
        "service_tier": outcome.service_tier,
        "speed": outcome.speed,
        "inference_geo": outcome.inference_geo,
    }


def usage_rows(call_id: int, billed: Sequence[PartShape], spent_nano: int) -> list[tuple[object, ...]]:
    """Return the rows of the billed parts, and one for the part of the amount that they do not explain (an estimate's surplus)."""
    rows: list[tuple[object, ...]] = []
    for number, part in enumerate(billed):
        tokens = part.tokens
        kinds = (
            tokens.input_tokens,
            tokens.output_tokens,
            tokens.cache_read_tokens,
            tokens.cache_write_5m_tokens,
            tokens.cache_write_1h_tokens,
            tokens.cache_write_unsplit_tokens,
        )
        rows.append((call_id, number, part.kind, part.model, *kinds, part.web_searches, part.nano, part.price_row))
    unexplained_nano = spent_nano - sum(part.nano for part in billed)
    if unexplained_nano:
        rows.append((call_id, len(billed), "estimate", None, 0, 0, 0, 0, 0, 0, 0, unexplained_nano, None))
    return rows
