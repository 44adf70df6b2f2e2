"""Compute the balances from the entries alone, as the triggers keep them call by call; `gateway doctor` compares the two.

Promises to be independent of the triggers: the scopes and windows in which a call counts are named here, not asked of their view.
"""

from gateway_addon.ledger.sql import Connection

# Entries are summed by what decides where they count, in the order of time, before each such group is spread over its twelve balances:
# of ten million calls there are some ten thousand groups.
SUMS = """
  SELECT day_start, week_start, month_start, app, team, sum(spent_nano) AS spent_nano, sum(reserved_nano) AS reserved_nano,
    sum(entries.quantum_nano) AS quantum_nano, sum(entries.open) AS open
  FROM entries JOIN calls ON calls.id = call_id GROUP BY day_start, week_start, month_start, app, team
"""
WINDOW_STARTS = """
  CASE "window" WHEN 'day' THEN day_start WHEN 'week' THEN week_start WHEN 'month' THEN month_start ELSE 0 END AS window_start"""
EACH_WINDOW = """(SELECT 'day' AS "window" UNION ALL SELECT 'week' UNION ALL SELECT 'month' UNION ALL SELECT 'ever') AS windows"""
FROM_ENTRIES = f"""
  WITH sums AS ({SUMS})
  SELECT CASE kind WHEN 'app' THEN 'app:' || app WHEN 'team' THEN 'team:' || team ELSE 'total' END AS scope, "window", {WINDOW_STARTS},
    sum(spent_nano) AS spent_nano, sum(reserved_nano) AS reserved_nano, sum(quantum_nano) AS quantum_nano, sum(open) AS open
  FROM sums CROSS JOIN (SELECT 'total' AS kind UNION ALL SELECT 'app' UNION ALL SELECT 'team') AS kinds CROSS JOIN {EACH_WINDOW}
  WHERE kind <> 'team' OR team IS NOT NULL GROUP BY 1, 2, 3
"""


def rebuild(db: Connection) -> None:
    """Compute the balances anew."""
    db.execute(db.engine.clear_balances)
    db.execute(db.engine.fill_balances)
