"""Name the words of SQLite and of PostgreSQL side by side, wherever they differ."""

from gateway_addon.ledger.sql import Engine
from gateway_addon.ledger.store import balances

_SQLITE_JSON = """json_extract({0}, '$."' || {1} || '"')"""
_POSTGRESQL_JSON = "(CAST({0} AS jsonb) ->> {1})"

SQLITE = Engine(
    instr="instr",
    whole="CAST({} AS INTEGER)",
    json_value=_SQLITE_JSON,
    balance_of_cap="""LEFT JOIN balances AS balance USING (scope, "window", window_start)
    LEFT JOIN part_balances AS part USING (scope, "window", window_start)""",
    labels="calls.labels",
    clear_balances="DELETE FROM balances",
    fill_balances=f"""
INSERT INTO balances (scope, "window", window_start, spent_nano, reserved_nano, quantum_nano, open)
{balances.from_entries(_SQLITE_JSON)}""",
    integer="INTEGER",
    real="REAL",
    strict=" STRICT, WITHOUT ROWID",
)

POSTGRESQL = Engine(
    instr="strpos",
    whole="CAST(floor({}) AS BIGINT)",
    json_value=_POSTGRESQL_JSON,
    # Balances are kept by app alone (postgres_schema.py).
    balance_of_cap="""LEFT JOIN LATERAL (
    SELECT sum(spent_nano) AS spent_nano, sum(reserved_nano) AS reserved_nano, sum(quantum_nano) AS quantum_nano, sum(open) AS open
    FROM app_balances AS kept WHERE kept."window" = cap."window" AND kept.window_start = cap.window_start
      AND (cap.scope = 'total' OR cap.scope = 'app:' || kept.app OR cap.scope = 'team:' || kept.team)) AS balance ON true
    LEFT JOIN part_balances AS part USING (scope, "window", window_start)""",
    labels="CAST(calls.labels AS json)",
    clear_balances="DELETE FROM app_balances",
    fill_balances=f"""
INSERT INTO app_balances ("window", window_start, app, team, spent_nano, reserved_nano, quantum_nano, open)
SELECT "window", {balances.window_start(_POSTGRESQL_JSON)}, app, coalesce(team, ''),
  sum(spent_nano), sum(reserved_nano), sum(quantum_nano), sum(open)
FROM ({balances.SUMS}) AS sums CROSS JOIN {balances.EACH_WINDOW}
WHERE {balances.window_start(_POSTGRESQL_JSON)} IS NOT NULL GROUP BY 1, 2, 3, 4""",
    integer="BIGINT",
    real="DOUBLE PRECISION",
    strict="",
)
