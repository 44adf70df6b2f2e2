"""List the migrations of a ledger, the same for both engines, and run those that a file lacks.

A migration's name is its identity; it runs once, and all that are due run in one transaction. A text that both engines run stands here,
with the words of `engines.py` for its types; where the engines need texts of their own, those stand with the other tables of each.
"""

import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from gateway_addon.ledger.sql import Engine
from gateway_addon.ledger.store import engines, postgres_schema, sqlite_schema

if TYPE_CHECKING:
    from sqlite_utils import Database

NAME = "gateway_ledger"
APPLIED = f"SELECT name FROM _sqlite_migrations WHERE migration_set = '{NAME}'"

# What apps make in the workspace that all of them share at the provider. `price_tables` and `batch_usage` are there because a batch is
# priced by the table of its admission, hours after the process that read it may have ended, and from a file of any length.
WORKSPACE = """
CREATE TABLE belongings (   -- whose a batch or a file is, by the provider's id; `object` is the API's own JSON, as last seen
  id TEXT PRIMARY KEY, kind TEXT NOT NULL CHECK (kind IN ('batch', 'file')), app TEXT NOT NULL,
  made_at {real} NOT NULL, gone_at {real}, object TEXT NOT NULL
){strict};
CREATE INDEX belongings_of_app ON belongings (app, kind, made_at DESC, id DESC) WHERE gone_at IS NULL;

CREATE TABLE price_tables (digest TEXT PRIMARY KEY, content TEXT NOT NULL){strict};

CREATE TABLE batches (      -- open while it has a `look_at`: when somebody looks next whether it has ended
  id TEXT PRIMARY KEY, call_id {integer} NOT NULL UNIQUE, app TEXT NOT NULL, made_at {real} NOT NULL, requests {integer} NOT NULL,
  hour_ttl {integer} NOT NULL, prices TEXT NOT NULL, flags TEXT NOT NULL, status TEXT NOT NULL,
  look_at {real}, failures {integer} NOT NULL DEFAULT 0
){strict};
CREATE INDEX batches_to_look_at ON batches (look_at) WHERE look_at IS NOT NULL;

CREATE TABLE batch_usage (  -- what each request of a batch came to, read from its results; they sum to the call's usage when it is settled
  call_id {integer} NOT NULL, custom_id TEXT NOT NULL, part {integer} NOT NULL, kind TEXT NOT NULL, model TEXT,
  input_tokens {integer} NOT NULL, output_tokens {integer} NOT NULL, cache_read_tokens {integer} NOT NULL,
  cache_write_5m_tokens {integer} NOT NULL, cache_write_1h_tokens {integer} NOT NULL, cache_write_unsplit_tokens {integer} NOT NULL,
  web_search_requests {integer} NOT NULL, nano {integer} NOT NULL, price_row TEXT, flags TEXT NOT NULL,
  PRIMARY KEY (call_id, custom_id, part)
){strict};
"""


# `custom_ids`: of the batch's own requests, as digests in one text (calls/batches.py); NULL in a batch of an older gateway. `lost_since`:
# when the API first said, and has said since, that it has no such batch or not all of its results.
BATCH_IDS = """
ALTER TABLE batches ADD COLUMN custom_ids TEXT;
ALTER TABLE batches ADD COLUMN lost_since {real};
"""

# `limits`: what lowers a cap without an edit of its file. Who raised, and why, stood in the audit alone.
LIMITS = """
CREATE TABLE limits (
  scope TEXT NOT NULL, "window" TEXT NOT NULL, amount_nano {integer} NOT NULL, since {real} NOT NULL, who TEXT NOT NULL, why TEXT NOT NULL,
  PRIMARY KEY (scope, "window")
){strict};

ALTER TABLE raises ADD COLUMN who TEXT NOT NULL DEFAULT '';
ALTER TABLE raises ADD COLUMN why TEXT NOT NULL DEFAULT '';
UPDATE raises SET
  who = coalesce((SELECT who FROM audit WHERE action = 'cap raise' AND at = since AND subject = scope || ' ' || "window" LIMIT 1), ''),
  why = coalesce((SELECT why FROM audit WHERE action = 'cap raise' AND at = since AND subject = scope || ' ' || "window" LIMIT 1), '');
"""

# A workload has one row of tokens, which its issuer makes; a session is what an identity token was exchanged for, and ends by itself.
WORKLOADS = """
ALTER TABLE tokens ADD COLUMN issuer TEXT;
ALTER TABLE tokens ADD COLUMN subject TEXT;
CREATE INDEX tokens_of_subject ON tokens (app, subject) WHERE subject IS NOT NULL;

CREATE TABLE sessions (     -- by the SHA-256 of the session's token; `rule`: the digest of the policy's rule that let it in
  digest TEXT PRIMARY KEY, token_id {integer} NOT NULL, rule TEXT NOT NULL,
  issued_at {real} NOT NULL, expires_at {real} NOT NULL
){strict};
CREATE INDEX sessions_by_end ON sessions (expires_at);
"""
# The sentence of a refusal by a cap, a rate or a pause: how matters stood then. NULL for other reasons, and for calls refused before.
REFUSAL_SAID = "ALTER TABLE calls ADD COLUMN refusal_said TEXT;\n"


class Migration(NamedTuple):
    """A change of the tables. `postgresql` None: there is nothing to change there."""

    name: str
    sqlite: str
    postgresql: str | None


def worded(text: str, engine: Engine) -> str:
    """Return a text that both engines run, with the words of one."""
    return text.format(integer=engine.integer, real=engine.real, strict=engine.strict)


def both(name: str, text: str) -> Migration:
    return Migration(name, worded(text, engines.SQLITE), worded(text, engines.POSTGRESQL))


def each(name: str, constant: str) -> Migration:
    """Return a migration whose texts are a constant of that name in the schema of each engine."""
    return Migration(name, getattr(sqlite_schema, constant), getattr(postgres_schema, constant))


MIGRATIONS = (
    each("m001_ledger", "TABLES"),
    Migration("m002_views_for_people", sqlite_schema.VIEWS, None),
    each("m002_spend_call_by_call", "SPEND_CALL_BY_CALL"),
    both("m003_shared_workspace", WORKSPACE),
    each("m004_retention", "RETENTION"),
    each("m004_days", "DAYS"),
    each("m004_minutes", "MINUTES"),
    each("m005_observed", "OBSERVED"),
    both("m006_batch_ids", BATCH_IDS),
    both("m007_limits", LIMITS),
    each("m008_nano_in_views", "NANO_IN_VIEWS"),
    each("m011_parts", "PARTS"),
    each("m012_recorded", "RECORDED"),
    both("m013_workloads", WORKLOADS),
    both("m014_refusal_said", REFUSAL_SAID),
    each("m016_whole_days", "WHOLE_DAYS"),
)
"""In the order in which they run."""
ON_SERVER = tuple((each.name, each.postgresql) for each in MIGRATIONS if each.postgresql is not None)
"""Those of a ledger on PostgreSQL, with their texts."""


def runner(script: str) -> Callable[["Database"], None]:
    """Return a migration that runs a script statement by statement: `executescript` would commit its transaction first."""

    def run(db: "Database") -> None:
        statement = ""
        for line in script.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                db.conn.execute(statement)
                statement = ""

    return run


def known() -> list[str]:
    """List the migrations of a file's ledger, by name."""
    return [migration.name for migration in MIGRATIONS]


def is_behind(connection: sqlite3.Connection) -> bool:
    """Return whether a ledger is an older version's, or no ledger at all."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone() is None:
        return True
    return not {name for (name,) in connection.execute(APPLIED)}.issuperset(known())


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables up to date, in one transaction however many versions they are behind. Raises sqlite3.Error."""
    if not is_behind(connection):
        return
    from sqlite_utils import Database  # here: an eighth of every command's start, and 10 MB
    from sqlite_utils.migrations import Migrations

    in_file = Migrations(NAME)
    for migration in MIGRATIONS:
        in_file(name=migration.name)(runner(migration.sqlite))
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        in_file.apply(Database(connection, execute_plugins=False))  # of two processes, the second finds it done
