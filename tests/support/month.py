"""A ledger as it looks after a month of work, made by SQL alone.

Made, not recorded: apps, models and amounts follow the call's number, so two runs give the same ledger. The calls of the busiest app,
29 of 100, are one session. What the triggers do at every
call is done once for all, in a fifth of the time; that it comes to the same is the doctor's to prove (test_large.py).
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from gateway_addon.ledger import admin, connect
from gateway_addon.ledger.store import sqlite_files, sqlite_schema

DAY_S = 86_400
APPS = ("reviews", "pipeline", "experiments", "search", "support", "digest", "translate", "tagger", "billing-bot", "notebook", "evals", "site")
MODELS = ("claude-haiku-4-5", "claude-sonnet-5", "claude-opus-4-6")

# The numbers are spread by multiplying with primes, so that app, model, size and fate of a call do not go in step.
_CALLS = """
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :calls),
spread AS (SELECT i, (i * 7919) % 1009 AS a, (i * 104729) % 997 AS b, :since + (i * (:until - :since)) / :calls AS at FROM n),
placed AS (
  SELECT *, (i * 15485863 % 1013) * (i * 15485863 % 1013) * 12 / (1013 * 1013) AS app, CASE WHEN b < 620 THEN 0 WHEN b < 930 THEN 1 ELSE 2 END AS model,
    i % 40 = 7 AS refused FROM spread),
busy AS (SELECT *, iif(strftime('%w', at, 'unixepoch') IN ('0', '6'), 4, 9 + at / 86400 * 5 % 7) AS rush FROM placed),
priced AS (
  SELECT *, i + 1 AS id, at + (a % 100) / 100.0 AS started, json_extract(:models, '$[' || model || ']') AS asked,
    100 * (20 + a) * (1 + 6 * model) * rush AS nano FROM busy)
INSERT INTO calls (id, state, owner, app, team, token_id, endpoint, model_asked, stream, max_tokens, day_start, week_start, month_start,
  started_at, quote_nano, ended_at, grant_nano, refusal, first_byte_at, status, complete, stop_reason, model_served, request_id,
  session_id, agent_id, parent_agent_id, user_id)
SELECT id, iif(refused, 'refused', 'settled'), 'month', json_extract(:apps, '$[' || app || ']'), iif(app % 3 = 1, 'content', NULL),
  app + 1, 'messages', asked, b % 2, 1024 * (1 + a % 8),
  at / 86400 * 86400, (at / 86400 + 3) / 7 * 7 * 86400 - 3 * 86400, CAST(strftime('%s', at, 'unixepoch', 'start of month') AS INTEGER),
  started, nano, iif(refused, at + 1, started + 2), iif(refused, 0, nano),
  iif(refused, CASE b % 3 WHEN 0 THEN 'cap_spent' WHEN 1 THEN 'model' ELSE 'rate' END, NULL),
  iif(refused, NULL, started + 0.6), iif(refused, NULL, 200), iif(refused, NULL, 1), iif(refused, NULL, 'end_turn'),
  iif(refused, NULL, iif(id % 5000 = 11, 'claude-sonnet-5', asked)), iif(refused, NULL, 'req_month' || id),
  CASE app WHEN 0 THEN 'endless' WHEN 1 THEN 'run-' || (i / 2000) END, iif(app = 0 AND b % 4, 'agent-' || (b % 4), NULL),
  iif(app = 0 AND b % 4 > 1, 'agent-1', NULL), iif(app = 1, 'user-' || (b % 3), NULL)
FROM priced
"""

_RESERVE = """
INSERT INTO entries (call_id, at, kind, reserved_nano, open)
SELECT id, started_at, 'reserve', grant_nano, 1 FROM calls WHERE state = 'settled'
"""

_SETTLE = """
INSERT INTO entries (call_id, at, kind, reserved_nano, spent_nano, open)
SELECT id, started_at + 2, 'settle', -grant_nano, grant_nano - 1000 * (id % 17), -1 FROM calls WHERE state = 'settled'
"""

_USAGE = """
INSERT INTO usage (call_id, part, kind, model, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens,
  cache_write_1h_tokens, cache_write_unsplit_tokens, web_search_requests, nano, price_row)
SELECT id, 0, 'message', model_asked, 200 + id % 700, 40 + id % 300, iif(id % 3, 0, 2000 + id % 5000), iif(id % 9, 0, 3000), 0, 0, 0,
  grant_nano - 1000 * (id % 17), model_asked FROM calls WHERE state = 'settled'
"""

# Of groups of calls that count in the same frames: the schema's own, of rows that stand for many calls.
_BALANCES = f"""
WITH sums AS MATERIALIZED (
  SELECT app, team, day_start, week_start, month_start, sum(entries.spent_nano) AS spent, sum(entries.reserved_nano) AS reserved,
    sum(entries.quantum_nano) AS quantum, sum(entries.open) AS open
  FROM main.entries JOIN main.calls ON calls.id = call_id GROUP BY 1, 2, 3, 4, 5),
calls AS (SELECT row_number() OVER () AS id, * FROM sums)
INSERT INTO balances SELECT scope, "window", window_start, sum(spent), sum(reserved), sum(quantum), sum(open)
FROM ({sqlite_schema.FRAMES}) JOIN calls ON id = call_id GROUP BY scope, "window", window_start
"""

_MINUTES = """
INSERT INTO minutes SELECT app, CAST(started_at AS INTEGER) / 60, count(*), sum(input_tokens_quoted) FROM calls
WHERE state = 'settled' AND started_at > (SELECT max(started_at) - 3600 FROM calls) GROUP BY 1, 2
"""

_USED = "UPDATE tokens SET last_used_at = (SELECT started_at FROM calls WHERE token_id = tokens.id ORDER BY id DESC LIMIT 1)"


def make(path: Path, calls: int, *, until: float, days: int = 30) -> None:
    """Create a ledger at `path` with so many resolved or refused calls, evenly over the days before `until`."""
    sqlite_files.create(path)
    with connect.changing(path) as db:
        for number, app in enumerate(APPS):
            admin.issue_token(db, app, f"digest {number}", who="month", now=until - days * DAY_S)
    since = int(until) - days * DAY_S
    figures = {"calls": calls, "since": since, "until": int(until), "apps": json.dumps(APPS), "models": json.dumps(MODELS)}
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for setting in ("synchronous = OFF", "journal_mode = OFF", "cache_size = -200000"):
            db.execute(f"PRAGMA {setting}")
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        db.execute(_CALLS, figures)
        for statement in (_RESERVE, _SETTLE, _USAGE, _BALANCES, _MINUTES, _USED, *(sql for _, sql in triggers)):
            db.execute(statement)
        db.execute("PRAGMA journal_mode = WAL")
