"""Prune a ledger: calls that ended long ago become sums, to the nano.

A *carry* is one row in the place of many calls that no report tells apart: same app, team, token, day, models, state, flags. It keeps
their number, their tokens by price row and their money; it does not keep each call's times, sessions, users and request ids.
Promises that every balance stays the sum of its entries (the tables refuse a carry that holds another sum, and the removal of an entry
that no carry holds), and that each transaction is small: a gateway that writes meanwhile waits for some ten milliseconds at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from gateway_addon.ledger import parts
from gateway_addon.ledger.admin import PRUNED, audit, keep_setting
from gateway_addon.ledger.reservations import kept_calendar
from gateway_addon.ledger.sql import Connection, named
from gateway_addon.ledger.types import LedgerUnavailable
from gateway_addon.names import PROGRAM
from gateway_addon.windows import starts

DAY_S = 86_400

type PruneGroup = tuple[int, ...]
"""The numbers of calls that become one carry."""


@dataclass(frozen=True, slots=True)
class PrunedDay:
    """Calls of one (UTC) day, grouped; `end` is where the next one begins."""

    end: int
    groups: list[PruneGroup]


@dataclass(frozen=True, slots=True)
class Prunable:
    """Counts of the rows before a time that may go. `kept_open`: calls without an end, which stay."""

    calls: int
    kept_open: int
    alerts: int


# What reports group or count by. Days of the provider's (UTC) beside those of the ledger's zone, for `gateway reconcile`.
_KEYS = """state, app, team, token_id, endpoint, model_asked, model_served, stream, status, refusal, service_tier, speed, inference_geo,
  flags, labels, day_start, week_start, month_start, cycles"""
_DAYS = f"{{started}} / {DAY_S}, {{ended}} / {DAY_S}, max_tokens IS NULL"
_PAST = "started_at >= $since AND started_at < $before AND carried IS NULL AND state <> 'open'"

_NEXT = named(f"SELECT started_at FROM calls WHERE {_PAST} ORDER BY started_at LIMIT 1")
_OF_A_DAY = f"SELECT {_KEYS}, {_DAYS}, id FROM calls WHERE {_PAST} ORDER BY {_KEYS}, {_DAYS}, id"

_CARRY = f"""
INSERT INTO calls (owner, started_at, ended_at, carried, {_KEYS})
SELECT 'carry', started_at, coalesce(ended_at, started_at), $1, {_KEYS} FROM calls WHERE id = $2 RETURNING id
"""
_TAKE = "INSERT INTO carries (carry_id, call_id) SELECT $1, id FROM calls WHERE id = $2"
_HOW_MANY = named("SELECT count(*) FROM carries WHERE carry_id = $carry_id")
_TAKEN = "(SELECT call_id FROM carries WHERE carry_id = $carry_id)"
# `max_tokens` of the calls that have an answer, which is what a report holds the answers' lengths against.
_LIMIT = named(f"""
UPDATE calls SET max_tokens = (
  SELECT sum(old.max_tokens) FROM calls AS old JOIN usage ON usage.call_id = old.id AND part = 0 WHERE old.id IN {_TAKEN})
WHERE id = $carry_id
""")
_BOOK = named(f"""
INSERT INTO entries (call_id, at, kind, spent_nano)
SELECT $carry_id, $now, 'carry', sum(spent_nano) FROM entries WHERE call_id IN {_TAKEN} HAVING count(*) > 0
""")
# What a carry's calls spent for ever in parts of their app: it is one row of many parts, and counts in none by itself.
_KEEP_PARTS = named(f"""
INSERT INTO carried_parts (scope, app, kind, spent_nano)
SELECT scope, app, part_frames.kind, sum(spent_nano) FROM part_frames JOIN entries USING (call_id)
WHERE "window" = 'ever' AND call_id IN {_TAKEN} GROUP BY scope, app, part_frames.kind
ON CONFLICT (scope) DO UPDATE SET spent_nano = carried_parts.spent_nano + excluded.spent_nano
""")
_METER = named(f"""
INSERT INTO usage (call_id, part, kind, model, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens,
  cache_write_1h_tokens, cache_write_unsplit_tokens, web_search_requests, nano, price_row)
SELECT $carry_id, row_number() OVER (ORDER BY min(part), kind) - 1, kind, model, sum(input_tokens), sum(output_tokens),
  sum(cache_read_tokens), sum(cache_write_5m_tokens), sum(cache_write_1h_tokens), sum(cache_write_unsplit_tokens),
  sum(web_search_requests), sum(nano), price_row
FROM usage WHERE call_id IN {_TAKEN} GROUP BY kind, model, price_row
""")
# Corrections have no tokens: beside the parts they are what the rest of an estimate is, and take the sum of the parts to the carry's.
_CORRECT = named("""
INSERT INTO usage (call_id, part, kind, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens,
  cache_write_1h_tokens, cache_write_unsplit_tokens, web_search_requests, nano)
SELECT $carry_id, parts, 'estimate', 0, 0, 0, 0, 0, 0, 0, spent_nano - billed_nano
FROM (SELECT count(*) AS parts, coalesce(sum(nano), 0) AS billed_nano FROM usage WHERE call_id = $carry_id) AS metered
CROSS JOIN (SELECT spent_nano FROM entries WHERE call_id = $carry_id) AS carry WHERE spent_nano <> billed_nano
""")
_ROWS_OF_A_CALL = ("usage WHERE call_id", "batch_usage WHERE call_id", "batches WHERE call_id", "entries WHERE call_id", "calls WHERE id")
_REMOVE = tuple(named(f"DELETE FROM {column} IN {_TAKEN}") for column in _ROWS_OF_A_CALL)

_NOISY = "SELECT DISTINCT minute - minute % 86400 FROM noise WHERE minute < $1 AND minute % 86400 <> 0"
_NOISE_OF_A_DAY = "FROM noise WHERE minute >= $1 AND minute < $1 + 86400"


def prunable(db: Connection, before: float) -> Prunable:
    """Count the rows that would go; change nothing."""
    count = named("""
    SELECT count(*) FILTER (WHERE state <> 'open'), count(*) FILTER (WHERE state = 'open'),
      (SELECT count(*) FROM alerts WHERE at < $before AND kind = 'threshold')
    FROM calls WHERE started_at < $before AND carried IS NULL
    """)
    return Prunable(*db.execute(count, {"before": before}).fetchone())


def begin(db: Connection, before: float, found: Prunable, *, who: str, now: float) -> None:
    """Audit the prune that begins, and delete from the small tables. Raises ValueError for a time within an open window."""
    windows = starts(now, *kept_calendar(db))
    closed = min(windows.day, windows.week, windows.month, *(start for _, start in windows.cycles))
    if before > closed:
        raise ValueError(
            "only calls from before this week, this month and this billing cycle may go: later ones count in open windows and may be"
            " corrected"
        )
    facts = {"before": before, "calls": found.calls}
    audit(db, who, "prune", "ledger", None, facts, "calls become daily sums", now)
    keep_setting(db, PRUNED, str(before))
    db.execute("DELETE FROM raises WHERE until < $1", (before,))
    # An alert of another kind is what keeps a person from being told the same again.
    db.execute("DELETE FROM alerts WHERE at < $1 AND kind = 'threshold' AND try_at IS NULL", (before,))
    parts.forget_idle(db, before)
    db.execute("DELETE FROM kept_days WHERE day_start < $1", (before,))
    for (day,) in db.execute(_NOISY, (before,)).fetchall():
        _sum_noise(db, day)


def _sum_noise(db: Connection, day: int) -> None:
    counted = db.execute(f"SELECT reason, sum(calls) {_NOISE_OF_A_DAY} GROUP BY reason", (day,)).fetchall()
    db.execute(f"DELETE {_NOISE_OF_A_DAY}", (day,))
    db.executemany("INSERT INTO noise (minute, reason, calls) VALUES ($1, $2, $3)", [(day, reason, calls) for reason, calls in counted])


def next_day(db: Connection, since: float, before: float) -> PrunedDay | None:
    """Return the first day from `since` on with calls to carry. Read before the write transactions: an ended call's keys stay."""
    first = db.execute(_NEXT, {"since": since, "before": before}).fetchone()
    if first is None:
        return None
    end = (int(first[0]) // DAY_S + 1) * DAY_S
    whole = db.engine.whole
    query = named(_OF_A_DAY.format(started=whole.format("started_at"), ended=whole.format("coalesce(ended_at, started_at)")))
    calls = (tuple(row) for row in db.execute(query, {"since": first[0], "before": min(end, before)}).fetchall())
    return PrunedDay(end, [tuple(call[-1] for call in alike) for _, alike in groupby(calls, key=lambda call: call[:-1])])


def bundle(groups: Sequence[PruneGroup], calls_max: int) -> tuple[list[PruneGroup], list[PruneGroup]]:
    """Take at most `calls_max` calls for one transaction; return them and the rest. A large group is divided."""
    taken: list[PruneGroup] = []
    for number, group in enumerate(groups):
        if len(group) >= calls_max:
            left = [group[calls_max:]] if len(group) > calls_max else []
            return [*taken, group[:calls_max]], [*left, *groups[number + 1 :]]
        taken.append(group)
        calls_max -= len(group)
    return taken, []


def carry(db: Connection, groups: Sequence[PruneGroup], *, now: float) -> None:
    """Put one row in each group's place, inside a write transaction on everything. Raises LedgerUnavailable where calls have gone since."""
    for group in groups:
        rows = db.execute(_CARRY, (len(group), group[0])).fetchall()
        carry_id = rows[0][0] if rows else None
        db.executemany(_TAKE, [(carry_id, call_id) for call_id in group])
        values = {"carry_id": carry_id, "now": now}
        if db.execute(_HOW_MANY, values).fetchone()[0] != len(group):
            raise LedgerUnavailable(f"another `{PROGRAM} prune` works on this ledger: let it finish")
        for statement in (_LIMIT, _KEEP_PARTS, _BOOK, _METER, _CORRECT, *_REMOVE):
            db.execute(statement, values)
        db.execute("DELETE FROM carries WHERE carry_id = $1", (carry_id,))
