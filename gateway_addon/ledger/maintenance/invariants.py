"""Prove the ledger's invariants from its entries: every finding is a sentence that names what is wrong. Read-only."""

from collections.abc import Callable
from dataclasses import dataclass

from gateway_addon.ledger.sql import Connection, named
from gateway_addon.ledger.store import balances, engines
from gateway_addon.money import dollars

PART_BALANCES = "SELECT * FROM part_balances"
FINDINGS_MAX = 20  # of one kind: a broken ledger should not scroll its cause off the screen


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A reservation that waits for its call's end. `alive` False: its process is gone, the next start settles it.

    `owner`: the process, or the batch that waits for its results.
    """

    call_id: int
    app: str
    model: str | None
    held_nano: int
    age_s: float
    owner: str
    alive: bool


# Nothing is judged by a window of a part that is over: there a correction may stand alone, and `prune` lets go of what there was.
_JUDGED_BY = """
SELECT * FROM ({balances}) AS booked WHERE (spent_nano <> 0 OR reserved_nano <> 0 OR quantum_nano <> 0 OR open <> 0)
  AND ("window" = 'ever' OR window_start = (
    SELECT max(window_start) FROM balances AS app WHERE app.scope = 'total' AND app."window" = booked."window"))
"""


def _unequal(kept: str, computed: str) -> str:
    """Return the statement that lays each balance beside the same from the entries: two equal rows, or something is wrong."""
    return f"""
SELECT scope, "window", window_start, sum(kept * spent_nano) AS kept_spent, sum((1 - kept) * spent_nano) AS spent,
  sum(kept * reserved_nano) AS kept_reserved, sum((1 - kept) * reserved_nano) AS reserved
FROM (SELECT 1 AS kept, * FROM ({kept}) AS booked UNION ALL SELECT 0, * FROM ({computed}) AS summed) AS both_ways
GROUP BY scope, "window", window_start
HAVING count(*) <> 2 OR min(spent_nano) <> max(spent_nano) OR min(reserved_nano) <> max(reserved_nano)
  OR min(quantum_nano) <> max(quantum_nano) OR min(open) <> max(open)
"""


_USAGE = """
SELECT * FROM (
  SELECT calls.id, entries.spent_nano AS settled, coalesce((SELECT sum(nano) FROM usage WHERE call_id = calls.id), 0) AS parts
  FROM calls JOIN entries ON entries.call_id = calls.id AND entries.kind IN ('settle', 'carry')) AS bills
WHERE settled <> parts
"""

_STATES = """
SELECT * FROM (
  SELECT calls.id, state, carried, coalesce(sum(entries.open), 0) AS left_open, coalesce(sum(reserved_nano), 0) AS left_held,
    count(*) FILTER (WHERE kind IN ('settle', 'void')) AS resolutions
  FROM calls LEFT JOIN entries ON entries.call_id = calls.id GROUP BY calls.id) AS states
WHERE left_open <> CASE state WHEN 'open' THEN 1 ELSE 0 END OR left_held < 0 OR (state <> 'open' AND left_held <> 0)
  OR resolutions <> CASE WHEN state IN ('settled', 'voided') AND carried IS NULL THEN 1 ELSE 0 END
"""

# By sub-queries, and sorted by a value that no index has: else SQLite would read every call instead of the index of the open ones.
_OPEN = named("""
SELECT id, app, model_asked, (SELECT sum(reserved_nano) FROM entries WHERE call_id = calls.id) AS held, $now - started_at AS age_s, owner,
  (SELECT batches.id FROM batches WHERE batches.call_id = calls.id) AS batch
FROM calls WHERE state = 'open' ORDER BY +started_at
""")


def findings(db: Connection) -> list[str]:
    """Return the faults of the file, the balances, the calls' states and the billed parts; empty for a sound ledger."""
    found = _of_the_file(db) if db.engine is engines.SQLITE else []  # a server looks after its own files
    if found:
        return found
    word = db.engine.json_value
    of_scopes = _unequal("SELECT * FROM balances", balances.from_entries(word))
    of_parts = _unequal(*(_JUDGED_BY.format(balances=each) for each in (PART_BALANCES, balances.parts_from_entries(word))))
    wrong = [row for statement in (of_scopes, of_parts) for row in db.execute(statement).fetchmany(FINDINGS_MAX)]
    for scope, window, start, kept_spent, spent, kept_reserved, reserved in wrong:
        found.append(
            f"balance {scope} {window} from {start}: says spent {dollars(kept_spent)}, held {dollars(kept_reserved)};"
            f" the entries say {dollars(spent)}, {dollars(reserved)}"
        )
    for call_id, settled, parts in db.execute(_USAGE).fetchmany(FINDINGS_MAX):
        found.append(f"call {call_id}: its parts sum to {dollars(parts)}, it was settled at {dollars(settled)}")
    for call_id, state, _, is_open, held, resolutions in db.execute(_STATES).fetchmany(FINDINGS_MAX):
        found.append(f"call {call_id} is {state}, but its entries leave {is_open} open, {dollars(held)} held, {resolutions} resolutions")
    return found


def _of_the_file(db: Connection) -> list[str]:
    damage = [str(row[0]) for row in db.execute(f"PRAGMA integrity_check({FINDINGS_MAX})").fetchall() if row[0] != "ok"]
    if damage:
        return [f"the file is damaged: {line}; restore the last backup" for line in damage]
    return [f"call {row[0]} refers to a row that is missing" for row in db.execute("PRAGMA foreign_key_check").fetchmany(FINDINGS_MAX)]


def open_calls(db: Connection, is_dead: Callable[[str], bool], *, now: float) -> list[OpenCall]:
    """Return every open reservation, the oldest first; `is_dead` judges an owner (`connect.death_check`)."""
    rows = db.execute(_OPEN, {"now": now}).fetchall()
    return [
        OpenCall(call_id, app, model, held_nano, age_s, f"batch {batch}" if batch else owner, not is_dead(owner))
        for call_id, app, model, held_nano, age_s, owner, batch in rows
    ]
