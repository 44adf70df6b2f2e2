"""Move a ledger from its file to a PostgreSQL server, with proof that it is the same one there.

Promises that nobody can use half of it: it grows in a schema of another name, which becomes the ledger in the commit that ends the
move, after every count, every column's sum and every balance agree; that a move which was cut off goes on with the next call that is
missing; that nobody uses the file afterwards, since two ledgers would know half of the spending each. In the one instant
between the file's last commit and the server's, neither takes calls: run it again. Identifiers are kept.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from gateway_addon.ledger import admin
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.scope import TOTAL
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store import balances, postgres, postgres_session, sqlite_files
from gateway_addon.ledger.store.locks import living
from gateway_addon.ledger.store.migrations import ON_SERVER
from gateway_addon.ledger.store.sqlite import in_turn
from gateway_addon.ledger.types import LedgerUnavailable, ServerAddress

UNFINISHED = "gateway_unfinished"
CALLS_AT_ONCE = 10_000  # a commit's worth: a move that was cut off has lost no more than this
OF_CALLS = {"calls": "id", "entries": "call_id", "usage": "call_id"}
"""The tables that grow with the calls, each with its column of the call: moved in steps. The others are moved whole, at the end."""
STAYS = {"owners", "balances", "part_balances"}
"""Owners live on one engine; balances are computed there from the entries, which proves them once more."""
DIFFERENCES_MAX = 5
LAST_MOVE_MS = "2000"  # how long a server may take to notice that the connection of the last move has ended, and to let its lock go

ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r", "\0": "?"})
"""Text in COPY's format. PostgreSQL stores no NUL, which a refused call's model name may have."""

type Columns = dict[str, dict[str, str]]
"""By table: each column with its type."""
type Figures = dict[str, list[int | None]]
"""By table: the number of its rows, then each column's count of values and its sum (of text: its bytes; of times: whole seconds)."""

BYTES_IN_FILE = "length(CAST({} AS BLOB))"
BYTES_ON_SERVER = "octet_length(convert_to({}, 'UTF8'))"

_BALANCES = """
SELECT scope, "window", window_start, spent_nano, reserved_nano, quantum_nano, open FROM balances ORDER BY scope, "window", window_start
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """The figures that are equal on both sides. `kept_calls`: calls that an interrupted move had brought over."""

    figures: Figures
    balances: int
    spent_nano: int
    kept_calls: int

    def rows(self, table: str) -> int:
        return self.figures[table][0] or 0


def move(
    source: Path, target: ServerAddress, *, who: str, now: float, emit: Callable[[int, int], None] = lambda done, of: None
) -> Proof | None:
    """Move a ledger, or go on moving it; None where it was moved there before. `emit` gets the number of moved calls.

    Raises LedgerUnavailable where the source is in use or not sound, where the target has a ledger of its own, or where either fails.
    """
    try:
        with _held(source) as ledger, _alone(target) as db:
            if _is_there(ledger, db, source, target):
                return None
            if found := invariants.findings(ledger):
                raise LedgerUnavailable(f"{source} is not a sound ledger, so nothing was moved: {'; '.join(found)}")
            columns = _columns(ledger)
            expected = _figures(ledger, columns, BYTES_IN_FILE)
            kept = _begin(db, target, {table: expected[table] for table in OF_CALLS})
            _bring_calls(ledger, db, columns, expected["calls"][0] or 0, emit)
            proved = _end(ledger, db, columns, expected, kept, source, who, now)
            admin.moved(ledger, str(source), str(target), who=who, now=now)
            ledger.execute("COMMIT")
            db.execute("COMMIT")
            return proved
    except sqlite3.Error as error:
        raise sqlite_files.unavailable(source, error) from error
    except psycopg.Error as error:
        if postgres_session.is_its_own(error):
            raise postgres_session.unavailable(target, error) from error
        raise LedgerUnavailable(f"{target} did not take the ledger, and {source} is as it was ({error})") from error


@contextlib.contextmanager
def _held(source: Path) -> Iterator[Connection]:
    """Open the file's ledger with its write lock: gateways that start have to wait, and then find it moved."""
    with in_turn(source) as ledger:
        if users := living(source):
            raise LedgerUnavailable(f"the ledger {source} is in use by {', '.join(users)}: stop the gateway, then move its ledger")
        yield ledger


@contextlib.contextmanager
def _alone(target: ServerAddress) -> Iterator[postgres_session.ServerConnection]:
    patient = postgres_session.PATIENT | {"search_path": UNFINISHED}
    with contextlib.closing(postgres_session.connect(target, patient | {"lock_timeout": LAST_MOVE_MS})) as db:
        try:
            db.execute("SELECT pg_advisory_lock(hashtext('gateway migrate'))")
        except psycopg.errors.LockNotAvailable:
            raise LedgerUnavailable(f"another ledger is being moved to {target} now: let that end first") from None
        postgres_session.settle_in(db.raw, patient)
        yield db


def _is_there(ledger: Connection, db: postgres_session.ServerConnection, source: Path, target: ServerAddress) -> bool:
    """Return whether this move was made before. Raises LedgerUnavailable where either side is part of another move."""
    moved_to = sqlite_files.moved_to(ledger)
    if moved_to not in (None, str(target)):
        raise LedgerUnavailable(f"the ledger {source} was moved to {moved_to}, and what was spent since is there: nothing is left to move")
    if moved_to is not None and not _exists(db, UNFINISHED) and _exists(db, "gateway"):
        return True
    if full := _tables_with_rows(db):
        raise LedgerUnavailable(
            f"{target} has another ledger's rows ({', '.join(full)}), and two ledgers cannot become one: name a database without any"
        )
    return False


def _begin(db: postgres_session.ServerConnection, target: ServerAddress, calls_figures: Figures) -> int:
    """Make the tables to move into, or keep an interrupted move's if the file's calls are unchanged. Returns the calls in them."""
    mark = json.dumps([calls_figures, [name for name, _ in ON_SERVER]])
    if _exists(db, UNFINISHED):
        if db.execute("SELECT value FROM settings WHERE name = 'moving'").fetchall() == [(mark,)]:
            return int(db.execute("SELECT count(*) FROM calls").fetchall()[0][0])
        db.execute(f"DROP SCHEMA {UNFINISHED} CASCADE")
    postgres.create(target)
    db.execute("BEGIN")
    db.execute(f"ALTER SCHEMA gateway RENAME TO {UNFINISHED}")
    for table in OF_CALLS:
        db.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")  # what they would write is moved as it is
    db.execute("INSERT INTO settings VALUES ('moving', $1) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (mark,))
    db.execute("COMMIT")
    return 0


def _bring_calls(
    ledger: Connection, db: postgres_session.ServerConnection, columns: Columns, total: int, emit: Callable[[int, int], None]
) -> None:
    """Copy the missing calls, in the order of their ids, each with its entries and usage."""
    [(last, done)] = db.execute("SELECT coalesce(max(id), 0), count(*) FROM calls").fetchall()
    step = "SELECT max(id), count(*) FROM (SELECT id FROM calls WHERE id > $1 ORDER BY id LIMIT $2)"
    emit(done, total)
    while (found := ledger.execute(step, (last, CALLS_AT_ONCE)).fetchone())[1]:
        db.execute("BEGIN")
        for table, call in OF_CALLS.items():
            _pour(ledger, db, table, columns[table], f"WHERE {call} > $1 AND {call} <= $2", (last, found[0]))
        db.execute("COMMIT")
        last, done = found[0], done + found[1]
        emit(done, total)


def _end(
    ledger: Connection,
    db: postgres_session.ServerConnection,
    columns: Columns,
    expected: Figures,
    kept: int,
    source: Path,
    who: str,
    now: float,
) -> Proof:
    """Copy the other tables, prove the move, give the schema the ledger's name: all but the commit."""
    db.execute("BEGIN")
    db.execute("DELETE FROM settings")  # of this move, and the defaults of new tables
    for table in columns.keys() - OF_CALLS.keys():
        db.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        _pour(ledger, db, table, columns[table])
    db.execute(db.engine.fill_balances)
    db.execute(balances.fill_parts(db.engine.json_value))
    for table in columns:
        db.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
        db.execute(f"ANALYZE {table}")
    for table in (table for table, its in columns.items() if its.get("id") == "INTEGER"):
        db.execute(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), coalesce(max(id), 0) + 1, false) FROM {table}")
    summed = ledger.execute(_BALANCES).fetchall()
    wrong = [*_differences(expected, _figures(db, columns, BYTES_ON_SERVER)), *_unequal(summed, db), *invariants.findings(db)]
    if wrong:
        db.execute("ROLLBACK")
        db.execute(f"DROP SCHEMA {UNFINISHED} CASCADE")
        raise LedgerUnavailable(f"what was moved is not what was there, so it was thrown away: {'; '.join(wrong[:DIFFERENCES_MAX])}")
    if _exists(db, "gateway"):
        if full := _tables_with_rows(db):
            raise LedgerUnavailable(f"another ledger was begun there meanwhile ({', '.join(full)}): name a database without any")
        db.execute("DROP SCHEMA gateway CASCADE")
    db.execute(f"ALTER SCHEMA {UNFINISHED} RENAME TO gateway")
    db.execute("SET LOCAL search_path = gateway")
    admin.moved(db, str(source), None, who=who, now=now)
    spent_nano = sum(row[3] for row in summed if row[:2] == (TOTAL, "ever"))
    return Proof(expected, len(summed), spent_nano, kept)


def _columns(ledger: Connection) -> Columns:
    named = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT GLOB '_sqlite_*' AND name NOT GLOB 'sqlite_*'"
    tables = {name for (name,) in ledger.execute(named).fetchall()} - STAYS
    return {table: {row[1]: row[2] for row in ledger.execute(f"PRAGMA table_info({table})").fetchall()} for table in sorted(tables)}


def _figures(db: Connection, columns: Columns, bytes_of: str) -> Figures:
    measures = {"INTEGER": "{}", "REAL": db.engine.whole, "TEXT": bytes_of}
    found: Figures = {}
    for table, its in columns.items():
        sums = [f'count("{column}"), sum({measures[kind].format(f'"{column}"')})' for column, kind in its.items()]
        found[table] = [*db.execute(f"SELECT count(*), {', '.join(sums)} FROM {table} WHERE {_moves(table)}").fetchall()[0]]
    return found


def _moves(table: str) -> str:
    """Return the condition for the rows of a table that move."""
    return f"name <> '{sqlite_files.MOVED_TO}'" if table == "settings" else "true"


def _pour(
    ledger: Connection,
    db: postgres_session.ServerConnection,
    table: str,
    columns: Mapping[str, str],
    where: str = "WHERE true",
    values: Sequence[object] = (),
) -> None:
    """Copy rows of a table. Each number is written so that it reads back as the same one."""
    names = ", ".join(f'"{column}"' for column in columns)
    rows = ledger.execute(f"SELECT {names} FROM {table} {where} AND {_moves(table)} ORDER BY 1", values)
    with db.raw.cursor() as cursor, cursor.copy(f"COPY {table} ({names}) FROM STDIN".encode()) as copy:
        while some := rows.fetchmany(1000):
            copy.write("".join(map(_line, some)))


def _line(row: Iterable[int | float | str | None]) -> str:
    fields = [r"\N" if value is None else value.translate(ESCAPES) if isinstance(value, str) else repr(value) for value in row]
    return "\t".join(fields) + "\n"


def _differences(expected: Figures, found: Figures) -> list[str]:
    return [f"{table} counts and sums to {found[table]}, not {figures}" for table, figures in expected.items() if found[table] != figures]


def _unequal(balances: list[tuple[object, ...]], db: postgres_session.ServerConnection) -> list[str]:
    there = {tuple(row) for row in db.execute(_BALANCES).fetchall()}
    return [f"balance {row}: the two sides differ" for row in sorted(there ^ set(balances), key=repr)]


def _exists(db: postgres_session.ServerConnection, schema: str) -> bool:
    return bool(db.execute("SELECT to_regnamespace($1) IS NOT NULL", (schema,)).fetchall()[0][0])


def _tables_with_rows(db: postgres_session.ServerConnection) -> list[str]:
    """Return the tables with rows of the ledger of that name: an empty one, as `gateway init` makes it, has none."""
    named = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'gateway' AND table_type = 'BASE TABLE' ORDER BY 1"
    tables = {name for (name,) in db.execute(named).fetchall()} - {"migrations", "settings", "owners", "turns"}
    return [table for table in sorted(tables) if db.execute(f'SELECT EXISTS (SELECT 1 FROM gateway."{table}")').fetchall()[0][0]]
