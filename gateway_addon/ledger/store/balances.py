"""Compute the balances from the entries alone, as the triggers keep them call by call; `gateway doctor` compares the two.

Promises to be independent of the triggers: the scopes and windows in which a call counts are named here, not asked of their view.
`json_value` is the engine's word (`sql.Engine`).
"""

from gateway_addon.ledger.sql import Connection

# Entries are summed by what decides where they count, in the order of time, before each such group is spread over its balances (twelve
# without a billing cycle): of ten million calls there are some ten thousand groups.
SUMS = """
  SELECT day_start, week_start, month_start, cycles, app, team, sum(spent_nano) AS spent_nano, sum(reserved_nano) AS reserved_nano,
    sum(entries.quantum_nano) AS quantum_nano, sum(entries.open) AS open
  FROM entries JOIN calls ON calls.id = call_id GROUP BY day_start, week_start, month_start, cycles, app, team
"""
EACH_WINDOW = """(SELECT 'day' AS "window" UNION ALL SELECT 'week' UNION ALL SELECT 'month' UNION ALL SELECT 'ever'
    UNION ALL SELECT "window" FROM kept_cycles) AS windows"""


def window_start(json_value: str, window: str = '"window"') -> str:
    """Return the start of a call's window, NULL for a cycle in which it does not count."""
    cycle = json_value.format("cycles", window)
    return f"""CASE {window} WHEN 'day' THEN day_start WHEN 'week' THEN week_start WHEN 'month' THEN month_start WHEN 'ever' THEN 0
    ELSE CAST({cycle} AS BIGINT) END"""


def from_entries(json_value: str) -> str:
    """Return the balances of the total, of teams and of apps, as the entries make them."""
    return f"""
  WITH sums AS ({SUMS})
  SELECT CASE kind WHEN 'app' THEN 'app:' || app WHEN 'team' THEN 'team:' || team ELSE 'total' END AS scope, "window",
    {window_start(json_value)} AS window_start,
    sum(spent_nano) AS spent_nano, sum(reserved_nano) AS reserved_nano, sum(quantum_nano) AS quantum_nano, sum(open) AS open
  FROM sums CROSS JOIN (SELECT 'total' AS kind UNION ALL SELECT 'app' UNION ALL SELECT 'team') AS kinds CROSS JOIN {EACH_WINDOW}
  WHERE (kind <> 'team' OR team IS NOT NULL) AND {window_start(json_value)} IS NOT NULL GROUP BY 1, 2, 3
"""


def parts_from_entries(json_value: str, which: str = "true") -> str:
    """Return the balances of the parts of which any are kept, as the entries make them; beside them what was carried of a part."""
    value, start = json_value.format("app_parts", "kept.kind"), window_start(json_value, 'kept."window"')
    scope = f"'app:' || kept.app || ' ' || kept.kind || ':' || {value}"
    return f"""
  SELECT scope, "window", window_start, sum(spent_nano) AS spent_nano, sum(reserved_nano) AS reserved_nano,
    sum(quantum_nano) AS quantum_nano, sum(open) AS open
  FROM (
    SELECT {scope} AS scope, kept."window", {start} AS window_start, spent_nano, reserved_nano, entries.quantum_nano, entries.open
    FROM kept_parts AS kept CROSS JOIN calls CROSS JOIN entries
    WHERE calls.app = kept.app AND calls.id >= kept.since_id AND entries.call_id = calls.id AND {value} IS NOT NULL AND {which}
    UNION ALL
    SELECT scope, 'ever', 0, spent_nano, 0, 0, 0 FROM carried_parts CROSS JOIN kept_parts AS kept
    WHERE kept."window" = 'ever' AND carried_parts.app = kept.app AND carried_parts.kind = kept.kind AND {which}) AS booked
  GROUP BY scope, "window", window_start
"""


def fill_parts(json_value: str, which: str = "true") -> str:
    """Return the statement that fills the balances of parts: of those kept in the rows `kept` that `which` chooses."""
    columns = 'scope, "window", window_start, spent_nano, reserved_nano, quantum_nano, open'
    return f"INSERT INTO part_balances ({columns}) {parts_from_entries(json_value, which)}"


def rebuild(db: Connection) -> None:
    """Compute the balances of the total, of teams and of apps anew."""
    db.execute(db.engine.clear_balances)
    db.execute(db.engine.fill_balances)
