"""A ledger as it looks after a month of work, made by SQL alone: the triggers book every entry and balance, as they do for the gateway.

Made, not recorded: apps, models and amounts follow the call's number, so two runs give the same ledger.
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from gateway_addon.ledger import admin, files

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
priced AS (SELECT *, 100 * (20 + a) * (1 + 6 * model) * rush AS nano FROM busy)
INSERT INTO calls (state, owner, app, team, token_id, endpoint, model_asked, stream, max_tokens, day_start, week_start, month_start,
  started_at, ended_at, quote_nano, grant_nano, refusal)
SELECT iif(refused, 'refused', 'open'), 'month', json_extract(:apps, '$[' || app || ']'), iif(app % 3 = 1, 'content', NULL),
  app + 1, 'messages', json_extract(:models, '$[' || model || ']'), b % 2, 1024 * (1 + a % 8),
  at / 86400 * 86400, (at / 86400 + 3) / 7 * 7 * 86400 - 3 * 86400, CAST(strftime('%s', at, 'unixepoch', 'start of month') AS INTEGER),
  at + (a % 100) / 100.0, iif(refused, at + 1, NULL), nano, iif(refused, 0, nano),
  iif(refused, CASE b % 3 WHEN 0 THEN 'cap_spent' WHEN 1 THEN 'model' ELSE 'rate' END, NULL)
FROM priced
"""

_SETTLE = """
INSERT INTO entries (call_id, at, kind, reserved_nano, spent_nano, open)
SELECT id, started_at + 2, 'settle', -grant_nano, grant_nano - 1000 * (id % 17), -1 FROM calls WHERE state = 'open' AND owner = 'month'
"""

_USAGE = """
INSERT INTO usage (call_id, part, kind, model, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens,
  cache_write_1h_tokens, cache_write_unsplit_tokens, web_search_requests, nano, price_row)
SELECT id, 0, 'message', model_asked, 200 + id % 700, 40 + id % 300, iif(id % 3, 0, 2000 + id % 5000), iif(id % 9, 0, 3000), 0, 0, 0,
  grant_nano - 1000 * (id % 17), model_asked FROM calls WHERE state = 'open' AND owner = 'month'
"""

_FINISH = """
UPDATE calls SET state = 'settled', ended_at = started_at + 2, first_byte_at = started_at + 0.6, status = 200, complete = 1,
  stop_reason = 'end_turn', model_served = iif(id % 5000 = 11, 'claude-sonnet-5', model_asked), request_id = 'req_month' || id
WHERE state = 'open' AND owner = 'month'
"""


def make(path: Path, calls: int, *, until: float, days: int = 30) -> None:
    """Create a ledger at `path` with so many resolved or refused calls, evenly over the days before `until`."""
    files.create(path)
    with admin.changing(path) as db:
        for number, app in enumerate(APPS):
            admin.issue_token(db, app, f"digest {number}", who="month", now=until - days * DAY_S)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA synchronous = OFF")
        since = int(until) - days * DAY_S
        db.execute(_CALLS, {"calls": calls, "since": since, "until": int(until), "apps": json.dumps(APPS), "models": json.dumps(MODELS)})
        for statement in (_SETTLE, _USAGE, _FINISH):
            db.execute(statement)
        db.commit()
