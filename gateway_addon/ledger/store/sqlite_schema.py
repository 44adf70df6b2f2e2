"""The ledger's tables in SQLite, and the rules that the database itself keeps.

Promises, whatever code writes: no entry without its balances (a trigger books both in one statement), no open call without its
reservation (the call's row writes the entry), no call resolved twice (a unique index), no entry or audit row changed or removed.
"""

# A call counts in each of these scopes and windows, capped or not: a cap added at noon knows the morning.
FRAMES = "\nUNION ALL\n".join(
    f"SELECT id AS call_id, {scope} AS scope, '{window}' AS window, {start} AS window_start FROM calls{where}"
    for scope, where in (("'total'", ""), ("'app:' || app", ""), ("'team:' || team", " WHERE team IS NOT NULL"))
    for window, start in (("day", "day_start"), ("week", "week_start"), ("month", "month_start"), ("ever", "0"))
)

CYCLE_FRAMES = "\nUNION ALL\n".join(
    f"SELECT id AS call_id, {scope} AS scope, window, json_extract(cycles, '$.\"' || window || '\"') AS window_start"
    f" FROM calls CROSS JOIN kept_cycles WHERE cycles IS NOT NULL AND json_extract(cycles, '$.\"' || window || '\"') IS NOT NULL{also}"
    for scope, also in (("'total'", ""), ("'app:' || app", ""), ("'team:' || team", " AND team IS NOT NULL"))
)

TABLES = f"""
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE owners (       -- a process that writes; `commits` counts its transactions, so that a doubtful one can be looked up
  id TEXT PRIMARY KEY, pid INTEGER NOT NULL, host TEXT NOT NULL, started_at REAL NOT NULL, commits INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;

CREATE TABLE tokens (
  id INTEGER PRIMARY KEY, app TEXT NOT NULL, label TEXT NOT NULL, digest TEXT NOT NULL UNIQUE,  -- SHA-256, hexadecimal
  created_at REAL NOT NULL, expires_at REAL, revoked_at REAL,
  last_used_at REAL                                                                       -- to the minute (see calls_use)
) STRICT;

CREATE TABLE calls (        -- a row per request with a valid token, refused ones too
  id INTEGER PRIMARY KEY,
  state TEXT NOT NULL CHECK (state IN ('open', 'settled', 'voided', 'refused', 'free')),
  owner TEXT NOT NULL,
  app TEXT NOT NULL, team TEXT, token_id INTEGER NOT NULL,
  endpoint TEXT NOT NULL, model_asked TEXT, model_served TEXT, stream INTEGER NOT NULL, max_tokens INTEGER,
  session_id TEXT, agent_id TEXT,
  day_start INTEGER NOT NULL, week_start INTEGER NOT NULL, month_start INTEGER NOT NULL,  -- of its admission, in the ledger's zone
  started_at REAL NOT NULL, first_byte_at REAL, ended_at REAL,
  quote_nano INTEGER NOT NULL DEFAULT 0, grant_nano INTEGER NOT NULL DEFAULT 0, quantum_nano INTEGER NOT NULL DEFAULT 0,
  input_tokens_quoted INTEGER NOT NULL DEFAULT 0,
  status INTEGER, refusal TEXT, stop_reason TEXT, request_id TEXT, complete INTEGER, price_rows TEXT,
  service_tier TEXT, speed TEXT, inference_geo TEXT,                                      -- as the answer says
  flags TEXT NOT NULL DEFAULT ''                                                          -- separated by spaces
) STRICT;
CREATE INDEX calls_by_start ON calls (started_at);
CREATE INDEX calls_open ON calls (owner) WHERE state = 'open';
CREATE INDEX calls_drifted ON calls (app, model_asked, model_served, started_at) WHERE instr(' ' || flags || ' ', ' drift ') > 0;

CREATE TABLE entries (      -- append-only; each column is a change, so the sum is the truth
  id INTEGER PRIMARY KEY,
  call_id INTEGER NOT NULL REFERENCES calls (id),
  at REAL NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('reserve', 'extend', 'release', 'settle', 'void', 'adjust', 'carry')),
  reserved_nano INTEGER NOT NULL DEFAULT 0, spent_nano INTEGER NOT NULL DEFAULT 0, quantum_nano INTEGER NOT NULL DEFAULT 0,
  open INTEGER NOT NULL DEFAULT 0,
  note TEXT
) STRICT;
CREATE INDEX entries_of_call ON entries (call_id);
CREATE UNIQUE INDEX entries_resolve_once ON entries (call_id) WHERE kind IN ('settle', 'void');

CREATE TABLE usage (        -- a row per billed part of a settled call; they sum to its settle entry
  call_id INTEGER NOT NULL REFERENCES calls (id), part INTEGER NOT NULL, kind TEXT NOT NULL, model TEXT,
  input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cache_read_tokens INTEGER NOT NULL,
  cache_write_5m_tokens INTEGER NOT NULL, cache_write_1h_tokens INTEGER NOT NULL, cache_write_unsplit_tokens INTEGER NOT NULL,
  web_search_requests INTEGER NOT NULL, nano INTEGER NOT NULL, price_row TEXT,
  PRIMARY KEY (call_id, part)
) STRICT, WITHOUT ROWID;

CREATE TABLE balances (     -- the sums of the entries, by scope and window: a check costs the same with ten rows or ten million
  scope TEXT NOT NULL, window TEXT NOT NULL, window_start INTEGER NOT NULL,
  spent_nano INTEGER NOT NULL, reserved_nano INTEGER NOT NULL, quantum_nano INTEGER NOT NULL, open INTEGER NOT NULL,
  PRIMARY KEY (scope, window, window_start)
) STRICT, WITHOUT ROWID;

CREATE TABLE minutes (      -- admissions by app and minute, for the rates
  app TEXT NOT NULL, minute INTEGER NOT NULL, requests INTEGER NOT NULL, input_tokens INTEGER NOT NULL,
  PRIMARY KEY (app, minute)
) STRICT, WITHOUT ROWID;

CREATE TABLE raises (       -- dated additions on top of a cap
  id INTEGER PRIMARY KEY, scope TEXT NOT NULL, window TEXT NOT NULL, amount_nano INTEGER NOT NULL,
  since REAL NOT NULL, until REAL NOT NULL
) STRICT;
CREATE INDEX raises_in_force ON raises (scope, window, until);

CREATE TABLE pauses (       -- `cut`: calls in flight are ended too
  scope TEXT PRIMARY KEY, since REAL NOT NULL, until REAL, why TEXT NOT NULL, cut INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;

CREATE TABLE overruns (     -- models whose answer cost more than was held: reserved in full until the operator clears them
  model TEXT PRIMARY KEY, call_id INTEGER NOT NULL, at REAL NOT NULL, over_nano INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE audit (        -- every change that a person made; before and after are JSON
  id INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
  before TEXT, after TEXT, why TEXT NOT NULL
) STRICT;

CREATE TABLE alerts (       -- what a person was told, once for each kind, scope and `once` (a window and threshold, a pair of models, ...)
  id INTEGER PRIMARY KEY, kind TEXT NOT NULL, scope TEXT NOT NULL, once TEXT NOT NULL, at REAL NOT NULL,
  sentence TEXT NOT NULL, facts TEXT NOT NULL,                                            -- JSON
  tries INTEGER NOT NULL DEFAULT 0, try_at REAL, delivered_at REAL,                       -- no `try_at`: nothing is left to send
  UNIQUE (kind, scope, once)
) STRICT;
CREATE INDEX alerts_by_time ON alerts (at);
CREATE INDEX alerts_to_send ON alerts (try_at) WHERE try_at IS NOT NULL;

CREATE TABLE ratelimits (name TEXT PRIMARY KEY, value TEXT NOT NULL, at REAL NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE noise (        -- requests without a valid token: counted, not stored one by one
  minute INTEGER NOT NULL, reason TEXT NOT NULL, calls INTEGER NOT NULL, PRIMARY KEY (minute, reason)
) STRICT, WITHOUT ROWID;

CREATE VIEW call_frames AS
{FRAMES};

CREATE TRIGGER calls_reserve AFTER INSERT ON calls WHEN NEW.state = 'open' BEGIN
  INSERT INTO entries (call_id, at, kind, reserved_nano, quantum_nano, open)
    VALUES (NEW.id, NEW.started_at, 'reserve', NEW.grant_nano, NEW.quantum_nano, 1);
  INSERT INTO minutes (app, minute, requests, input_tokens)
    VALUES (NEW.app, CAST(NEW.started_at AS INTEGER) / 60, 1, NEW.input_tokens_quoted)
    ON CONFLICT DO UPDATE SET requests = requests + 1, input_tokens = input_tokens + excluded.input_tokens;
END;

-- A key lookup beside the call's own row, and a write once a minute: cheaper on every call than an index that only a report reads.
CREATE TRIGGER calls_use AFTER INSERT ON calls BEGIN
  UPDATE tokens SET last_used_at = NEW.started_at WHERE id = NEW.token_id AND coalesce(last_used_at, 0) <= NEW.started_at - 60;
END;

CREATE TRIGGER entries_balance AFTER INSERT ON entries BEGIN
  INSERT INTO balances (scope, window, window_start, spent_nano, reserved_nano, quantum_nano, open)
    SELECT scope, window, window_start, NEW.spent_nano, NEW.reserved_nano, NEW.quantum_nano, NEW.open
    FROM call_frames WHERE call_id = NEW.call_id
    ON CONFLICT DO UPDATE SET spent_nano = spent_nano + excluded.spent_nano,
      reserved_nano = reserved_nano + excluded.reserved_nano, quantum_nano = quantum_nano + excluded.quantum_nano,
      open = open + excluded.open;
END;

CREATE TRIGGER entries_stay BEFORE UPDATE ON entries
  BEGIN SELECT RAISE(ABORT, 'entries are never changed: write an adjust entry'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries
  BEGIN SELECT RAISE(ABORT, 'entries are never removed: write an adjust entry'); END;
CREATE TRIGGER audit_stays BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit is never changed'); END;
CREATE TRIGGER audit_remains BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit is never removed'); END;
"""

# For people who look at the file (Datasette, the sqlite3 shell): dollars as text, times as UTC.
VIEWS = """
CREATE VIEW spend AS
  SELECT calls.id AS call, datetime(started_at, 'unixepoch') AS started, app, team, model_asked, model_served, state, status,
    refusal, printf('$%.6f', total(entries.spent_nano) / 1e9) AS spent, printf('$%.6f', total(entries.reserved_nano) / 1e9) AS held,
    flags, session_id, agent_id
  FROM calls LEFT JOIN entries ON entries.call_id = calls.id GROUP BY calls.id;

CREATE VIEW standings AS
  SELECT scope, window, CASE window_start WHEN 0 THEN 'the beginning' ELSE datetime(window_start, 'unixepoch') END AS since,
    printf('$%.6f', spent_nano / 1e9) AS spent, printf('$%.6f', reserved_nano / 1e9) AS held, open AS calls_open
  FROM balances;
"""

# Amounts looked up call by call instead of grouped over all: the newest twenty of 200,000 calls come at once.
SPEND_CALL_BY_CALL = """
DROP VIEW spend;
CREATE VIEW spend AS
  SELECT id AS call, datetime(started_at, 'unixepoch') AS started, app, team, model_asked, model_served, state, status, refusal,
    (SELECT printf('$%.6f', total(spent_nano) / 1e9) FROM entries WHERE call_id = calls.id) AS spent,
    (SELECT printf('$%.6f', total(reserved_nano) / 1e9) FROM entries WHERE call_id = calls.id) AS held,
    flags, session_id, agent_id
  FROM calls;
"""

# `carries`: the calls that are becoming one row, empty outside of a transaction (prune.py). A carry moves money from many entries to
# one, so it is booked in no balance: what it holds must be what they held, and they may go once it does, no earlier and no others.
RETENTION = """
ALTER TABLE calls ADD COLUMN carried INTEGER;  -- of how many calls this row is the sum; NULL: it is a call
CREATE TABLE carries (call_id INTEGER PRIMARY KEY, carry_id INTEGER NOT NULL) STRICT;
CREATE INDEX carries_of ON carries (carry_id);

DROP TRIGGER entries_balance;
CREATE TRIGGER entries_balance AFTER INSERT ON entries WHEN NEW.kind <> 'carry' BEGIN
  INSERT INTO balances (scope, window, window_start, spent_nano, reserved_nano, quantum_nano, open)
    SELECT scope, window, window_start, NEW.spent_nano, NEW.reserved_nano, NEW.quantum_nano, NEW.open
    FROM call_frames WHERE call_id = NEW.call_id
    ON CONFLICT DO UPDATE SET spent_nano = spent_nano + excluded.spent_nano,
      reserved_nano = reserved_nano + excluded.reserved_nano, quantum_nano = quantum_nano + excluded.quantum_nano,
      open = open + excluded.open;
END;

CREATE TRIGGER entries_carry AFTER INSERT ON entries WHEN NEW.kind = 'carry' BEGIN
  SELECT RAISE(ABORT, 'a carry holds the sum of the ended calls of one app, team and day')
    WHERE (NEW.spent_nano, NEW.reserved_nano, NEW.quantum_nano, NEW.open) IS NOT (
        SELECT sum(spent_nano), sum(reserved_nano), sum(quantum_nano), sum(open) FROM entries JOIN carries USING (call_id)
        WHERE carry_id = NEW.call_id)
      OR EXISTS (
        SELECT 1 FROM carries JOIN calls ON calls.id = carries.call_id JOIN calls AS carry ON carry.id = carry_id
        WHERE carry_id = NEW.call_id AND (calls.state = 'open'
          OR (calls.app, calls.team, calls.day_start, calls.week_start, calls.month_start)
          IS NOT (carry.app, carry.team, carry.day_start, carry.week_start, carry.month_start)));
END;
CREATE TRIGGER carries_before AFTER INSERT ON carries
  WHEN EXISTS (SELECT 1 FROM entries WHERE call_id = NEW.carry_id) OR NEW.call_id = NEW.carry_id
  BEGIN SELECT RAISE(ABORT, 'a carry that is booked takes no further call'); END;

DROP TRIGGER entries_remain;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries
  WHEN NOT EXISTS (SELECT 1 FROM carries JOIN entries AS carry ON carry.call_id = carry_id AND carry.kind = 'carry'
    WHERE carries.call_id = OLD.call_id)
  BEGIN SELECT RAISE(ABORT, 'entries are never removed: write an adjust entry'); END;
"""


# A minute's first admission lets the app's old ones go, an hour back and some at a time: no start-up or report has to, however long a
# gateway ran and whatever an older version left.
MINUTES = """
CREATE TRIGGER minutes_pass AFTER INSERT ON minutes BEGIN
  DELETE FROM minutes WHERE app = NEW.app AND minute IN (
    SELECT minute FROM minutes WHERE app = NEW.app AND minute < NEW.minute - 60 ORDER BY minute LIMIT 100);
END;
"""

# Whatever changes a day's report strikes the day off; no day is kept while a call of it is open, so a settlement need not.
DAYS = """
CREATE TABLE kept_days (    -- days whose sums are kept for reports, by their grouping; `ready` 1, or less: being summed (daily_totals.py)
  day_start INTEGER NOT NULL, grouping TEXT NOT NULL, day_end INTEGER NOT NULL, ready INTEGER NOT NULL, PRIMARY KEY (day_start, grouping)
) STRICT, WITHOUT ROWID;
CREATE TABLE kept_lines (   -- a line of such a day's report; counts only while its day is in `kept_days`
  day_start INTEGER NOT NULL, grouping TEXT NOT NULL, key TEXT NOT NULL,
  calls INTEGER NOT NULL, settled INTEGER NOT NULL, refused INTEGER NOT NULL, estimated INTEGER NOT NULL, upstream_429 INTEGER NOT NULL,
  spent_nano INTEGER NOT NULL, held_nano INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
  cache_read_tokens INTEGER NOT NULL, cache_write_tokens INTEGER NOT NULL, web_searches INTEGER NOT NULL, max_tokens INTEGER NOT NULL,
  limited_output_tokens INTEGER NOT NULL, PRIMARY KEY (day_start, grouping, key)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER calls_strike AFTER INSERT ON calls BEGIN DELETE FROM kept_days WHERE day_start = NEW.day_start; END;
CREATE TRIGGER entries_strike AFTER INSERT ON entries WHEN NEW.kind = 'adjust' BEGIN
  DELETE FROM kept_days WHERE day_start = (SELECT day_start FROM calls WHERE id = NEW.call_id);
END;
"""

# Text cannot be summed: each amount stands there as whole nano-dollars too.
NANO_IN_VIEWS = """
DROP VIEW spend;
CREATE VIEW spend AS
  SELECT id AS call, datetime(started_at, 'unixepoch') AS started, app, team, model_asked, model_served, state, status, refusal,
    (SELECT printf('$%.6f', total(spent_nano) / 1e9) FROM entries WHERE call_id = calls.id) AS spent,
    (SELECT printf('$%.6f', total(reserved_nano) / 1e9) FROM entries WHERE call_id = calls.id) AS held,
    flags, session_id, agent_id,
    (SELECT coalesce(sum(spent_nano), 0) FROM entries WHERE call_id = calls.id) AS spent_nano,
    (SELECT coalesce(sum(reserved_nano), 0) FROM entries WHERE call_id = calls.id) AS held_nano
  FROM calls;

DROP VIEW standings;
CREATE VIEW standings AS
  SELECT scope, window, CASE window_start WHEN 0 THEN 'the beginning' ELSE datetime(window_start, 'unixepoch') END AS since,
    printf('$%.6f', spent_nano / 1e9) AS spent, printf('$%.6f', reserved_nano / 1e9) AS held, open AS calls_open,
    spent_nano, reserved_nano AS held_nano
  FROM balances;
"""

# Of the few calls that passed though an observed rule would have refused them, so that a report need not look through all.
OBSERVED = "CREATE INDEX calls_observed ON calls (started_at) WHERE instr(flags, 'observed:') > 0;\n"

# What a call says of itself, and the labels of a token, as JSON objects. The index leads from a session to its calls; a call without a
# session is not in it.
RECORDED = """
ALTER TABLE calls ADD COLUMN parent_agent_id TEXT;
ALTER TABLE calls ADD COLUMN user_id TEXT;
ALTER TABLE calls ADD COLUMN labels TEXT;
ALTER TABLE tokens ADD COLUMN labels TEXT;
CREATE INDEX calls_of_session ON calls (session_id, app) WHERE session_id IS NOT NULL;

DROP VIEW spend;
CREATE VIEW spend AS
  SELECT id AS call, datetime(started_at, 'unixepoch') AS started, app, team, model_asked, model_served, state, status, refusal,
    (SELECT printf('$%.6f', total(spent_nano) / 1e9) FROM entries WHERE call_id = calls.id) AS spent,
    (SELECT printf('$%.6f', total(reserved_nano) / 1e9) FROM entries WHERE call_id = calls.id) AS held,
    flags, session_id, agent_id,
    (SELECT coalesce(sum(spent_nano), 0) FROM entries WHERE call_id = calls.id) AS spent_nano,
    (SELECT coalesce(sum(reserved_nano), 0) FROM entries WHERE call_id = calls.id) AS held_nano,
    parent_agent_id, user_id, labels
  FROM calls;
"""

# Parts of an app (one session, one user, ...) and billing cycles. Their balances are kept where a cap asks for one, and what a call
# counts in is on its own row. `since_id`: the first call that counts. `carried_parts`: what calls that are sums now had spent.
PARTS = f"""
ALTER TABLE calls ADD COLUMN app_parts TEXT;  -- JSON, by kind: {{"session": "3f2a", "model": ...}}; NULL: unknown
ALTER TABLE calls ADD COLUMN cycles TEXT;     -- JSON, the starts of its billing cycles: {{"cycle:17": 1789596000}}; NULL: none
ALTER TABLE tokens ADD COLUMN cap_nano INTEGER;

CREATE TABLE kept_cycles (window TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE kept_parts (
  app TEXT NOT NULL, kind TEXT NOT NULL, window TEXT NOT NULL, since_id INTEGER NOT NULL, PRIMARY KEY (app, kind, window)
) STRICT, WITHOUT ROWID;
CREATE TABLE part_balances (
  scope TEXT NOT NULL, window TEXT NOT NULL, window_start INTEGER NOT NULL,
  spent_nano INTEGER NOT NULL, reserved_nano INTEGER NOT NULL, quantum_nano INTEGER NOT NULL, open INTEGER NOT NULL,
  PRIMARY KEY (scope, window, window_start)
) STRICT, WITHOUT ROWID;
CREATE TABLE carried_parts (
  scope TEXT PRIMARY KEY, app TEXT NOT NULL, kind TEXT NOT NULL, spent_nano INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE part_names (app TEXT PRIMARY KEY, day_start INTEGER NOT NULL, names INTEGER NOT NULL) STRICT, WITHOUT ROWID;

DROP VIEW call_frames;
CREATE VIEW call_frames AS
{FRAMES}
UNION ALL
{CYCLE_FRAMES};

CREATE VIEW part_frames AS
  SELECT calls.id AS call_id, 'app:' || calls.app || ' ' || kind || ':' || json_extract(app_parts, '$."' || kind || '"') AS scope, window,
    CASE window WHEN 'day' THEN day_start WHEN 'week' THEN week_start WHEN 'month' THEN month_start WHEN 'ever' THEN 0
      ELSE json_extract(cycles, '$."' || window || '"') END AS window_start,
    kept_parts.app AS app, kind
  FROM calls CROSS JOIN kept_parts
  WHERE kept_parts.app = calls.app AND calls.id >= since_id AND json_extract(app_parts, '$."' || kind || '"') IS NOT NULL;

CREATE TRIGGER entries_part_balance AFTER INSERT ON entries WHEN NEW.kind <> 'carry' BEGIN
  INSERT INTO part_balances (scope, window, window_start, spent_nano, reserved_nano, quantum_nano, open)
    SELECT scope, window, window_start, NEW.spent_nano, NEW.reserved_nano, NEW.quantum_nano, NEW.open
    FROM part_frames WHERE call_id = NEW.call_id
    ON CONFLICT DO UPDATE SET spent_nano = spent_nano + excluded.spent_nano,
      reserved_nano = reserved_nano + excluded.reserved_nano, quantum_nano = quantum_nano + excluded.quantum_nano,
      open = open + excluded.open;
END;
"""

# One row a day, with all its lines (call_sums.py) as JSON: reports and pages group them. Calls without a token count in a day too.
WHOLE_DAYS = """
DROP TABLE kept_lines;
DROP TABLE kept_days;
CREATE TABLE kept_days (    -- `ready` 1, or less: being summed (daily_totals.py)
  day_start INTEGER PRIMARY KEY, day_end INTEGER NOT NULL, ready INTEGER NOT NULL, sums TEXT
) STRICT;

CREATE TRIGGER noise_strike AFTER INSERT ON noise BEGIN
  DELETE FROM kept_days WHERE day_start BETWEEN NEW.minute - 90000 AND NEW.minute AND day_end > NEW.minute;
END;
CREATE TRIGGER noise_strike_again AFTER UPDATE ON noise BEGIN
  DELETE FROM kept_days WHERE day_start BETWEEN NEW.minute - 90000 AND NEW.minute AND day_end > NEW.minute;
END;
"""
