"""A ledger on a PostgreSQL server, shared by the gateways of several machines.

Promises what a file's ledger promises, by other means. Writers take turns scope by scope: a transaction first locks the rows in
`turns` of the scopes that it judges or changes, in the order of their names, so no two wait for each other in a circle. An owner is
alive while its lease runs by the server's clock; each commit renews it, and one whose lease has run out is fenced: its commit is
refused, it comes back under a new name, and whoever lives settles its old calls. Every wait has a limit.

The statements are those of the file's ledger. `SPELLED` is the list of what this engine spells differently.
"""

import asyncio
import contextlib
import functools
import os
import re
import socket
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, cast
from uuid import uuid4

import psycopg
from psycopg import pq
from psycopg.adapt import Dumper, Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.numeric import Int8Dumper
from psycopg.types.string import TextLoader
from psycopg_pool import ConnectionPool

from gateway_addon.ledger import book, owners
from gateway_addon.ledger.pgschema import MIGRATIONS
from gateway_addon.ledger.store import EVERYTHING
from gateway_addon.ledger.values import LedgerUnavailable, Server

LEASE_S = 15.0
READERS = 4
SESSION = {
    # milliseconds unless said. The gateway answers its caller after two seconds; nothing of it stays behind on the server.
    "search_path": "gateway",
    "statement_timeout": "1500",
    "lock_timeout": "1000",
    "idle_in_transaction_session_timeout": "5000",  # a gateway that froze in the middle lets its locks go
    "default_transaction_isolation": "read committed",
}
PATIENT = SESSION | {"statement_timeout": "0", "lock_timeout": "10000", "idle_in_transaction_session_timeout": "0"}
"""For commands: a report may take its time, a person may wait for a lock."""
CONNECT = {
    "connect_timeout": 2,  # seconds; libpq takes no less
    "tcp_user_timeout": 2000,
    "keepalives_idle": 5,
    "keepalives_interval": 1,
    "keepalives_count": 3,
}

_ITS_BALANCE = """LEFT JOIN LATERAL (
    SELECT sum(spent_nano) AS spent_nano, sum(reserved_nano) AS reserved_nano, sum(quantum_nano) AS quantum_nano, sum(open) AS open
    FROM app_balances AS kept WHERE kept.window = cap.window AND kept.window_start = cap.window_start
      AND (cap.scope = 'total' OR cap.scope = 'app:' || kept.app OR cap.scope = 'team:' || kept.team)) AS balance ON true"""
_FILL_BALANCES = """
INSERT INTO app_balances (window, window_start, app, team, spent_nano, reserved_nano, quantum_nano, open)
SELECT framed.window, framed.window_start, app, coalesce(team, ''),
  sum(spent_nano), sum(reserved_nano), sum(entries.quantum_nano), sum(open)
FROM entries JOIN calls ON calls.id = call_id
CROSS JOIN LATERAL (VALUES ('day', day_start), ('week', week_start), ('month', month_start), ('ever', 0)) AS framed (window, window_start)
GROUP BY 1, 2, 3, 4"""

SPELLED = (
    (book.EACH_CAP, "json_array_elements(CAST(:caps AS json)) AS each_cap (value)"),
    (book.ITS_BALANCE, _ITS_BALANCE),
    (book.AS_JSON, f"coalesce({book.AS_JSON.replace('json_group_array(json_array(', 'json_agg(json_build_array(')}, '[]')"),
    (book.CLEAR_BALANCES, "DELETE FROM app_balances"),
    (book.FILL_BALANCES, _FILL_BALANCES),
)
SPELLED_BY_PATTERN = (
    (re.compile(r"\bwindow\b"), '"window"'),
    (re.compile(r"AS REAL\b"), "AS DOUBLE PRECISION"),  # SQLite's REAL has eight bytes
    (re.compile(r"\bCROSS JOIN (\w+) ON\b"), r"JOIN \1 ON"),  # a hint to SQLite's planner
    (re.compile(r"\bCAST\((\w+|coalesce\([\w, ]+\)) AS INTEGER\)"), r"CAST(floor(\1) AS BIGINT)"),  # SQLite cuts, this one rounds
    (re.compile(r"\binstr\("), "strpos("),
    (re.compile("%"), "%%"),
    (re.compile(r"\?"), "%s"),
    (re.compile(r"(?<![:\w]):([a-z_]+)"), r"%(\1)s"),
)

_SENTENCES = {
    # by SQLSTATE, or its first two characters
    "25006": "the ledger's server {at} is read-only (a standby?): point --ledger at the primary",
    "42P01": "the database on {at} has no ledger: `gateway init` makes one",
    "3F000": "the database on {at} has no ledger: `gateway init` makes one",
    "42501": "the ledger's user on {at} lacks a privilege",
    "53100": "the disk of the ledger's server {at} is full: free some space, the gateway goes on by itself",
    "55P03": "the ledger on {at} was held too long by another gateway or a person's transaction",
    "57014": "the ledger's server {at} is too slow",
    "57P": "the ledger's server {at} is shutting down or starting: the gateway goes on by itself when it is back",
}
_BUSY = {"40001", "40P01", "55P03"}

# In one statement, so at one moment: an owner enters before its first call.
_DEAD = f"""
SELECT id FROM owners WHERE lease_until <= extract(epoch FROM clock_timestamp())
UNION SELECT owner FROM calls WHERE state = 'open' AND owner <> '{owners.BATCHES}' AND owner NOT IN (SELECT id FROM owners)
"""

type Row = Any


class NamedRow(tuple[Any, ...]):
    """A row by position and by name, as sqlite3.Row is."""

    names: tuple[str, ...] = ()

    def __getitem__(self, key: Any) -> Any:
        return tuple.__getitem__(self, self.names.index(key) if isinstance(key, str) else key)

    def keys(self) -> tuple[str, ...]:
        return self.names


def _named_rows(cursor: psycopg.Cursor[Any]) -> Callable[[Sequence[Any]], NamedRow]:
    names = tuple(column.name for column in cursor.description or ())
    return type("Row", (NamedRow,), {"names": names})


class _Whole(Loader):
    """Sums of BIGINTs come as NUMERIC: all amounts here are whole."""

    def load(self, data: Any) -> int:
        return int(bytes(data))


class _Truth(Dumper):
    """True and False are 1 and 0, as in the file's ledger."""

    oid = psycopg.adapters.types["int8"].oid

    def dump(self, obj: Any) -> bytes:
        return b"1" if obj else b"0"


class Connection:
    """What the ledger's functions use of `sqlite3.Connection`, on psycopg. Transactions are begun and ended by hand, as there."""

    def __init__(self, raw: psycopg.Connection[Any]) -> None:
        self.raw = raw
        raw.adapters.register_loader("numeric", _Whole)
        raw.adapters.register_loader("json", TextLoader)
        raw.adapters.register_dumper(int, Int8Dumper)  # one type for every amount: a product of two small ones must not overflow
        raw.adapters.register_dumper(bool, _Truth)

    def execute(self, statement: str, values: Sequence[object] | Mapping[str, object] = ()) -> psycopg.Cursor[Row]:
        return self.raw.execute(spelled(statement), values)

    def executemany(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        self.raw.cursor().executemany(spelled(statement), rows)

    @property
    def in_transaction(self) -> bool:
        return self.raw.info.transaction_status in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)

    def close(self) -> None:
        self.raw.close()


@functools.lru_cache(maxsize=512)
def spelled(statement: str) -> bytes:
    """A statement of the file's ledger as this engine writes it."""
    for ours, theirs in SPELLED:
        statement = statement.replace(ours, theirs)
    for pattern, theirs in SPELLED_BY_PATTERN:
        statement = pattern.sub(theirs, statement)
    return statement.encode()


def connect(server: Server, session: Mapping[str, str] = SESSION) -> Connection:
    """A connection with the ledger's settings. Raises psycopg.Error, LedgerUnavailable where there is no ledger."""
    given = conninfo_to_dict(server.url)
    defaults = {"application_name": f"gateway {socket.gethostname()} {os.getpid()}", **CONNECT}
    raw = psycopg.connect(server.url, autocommit=True, **{name: value for name, value in defaults.items() if name not in given})  # type: ignore[arg-type]
    try:
        settle_in(raw, session)
    except BaseException:
        raw.close()
        raise
    return Connection(raw)


def settle_in(raw: psycopg.Connection[Any], session: Mapping[str, str] = SESSION) -> None:
    """Set a session up; durable commits, where the server's default is lax."""
    settings = ", ".join("set_config(%s, %s, false)" for _ in session)
    raw.execute(f"SELECT {settings}".encode(), [word for pair in session.items() for word in pair])
    raw.execute("SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'")


def create(server: Server, zone: str = "UTC") -> None:
    """Make an empty ledger in a database that exists, or bring one up to date. Raises LedgerUnavailable."""
    try:
        with contextlib.closing(connect(server, PATIENT)) as db, db.raw.transaction():
            db.raw.execute("SELECT pg_advisory_xact_lock(hashtext('gateway ledger'))")  # two `gateway init` at once
            exists = db.raw.execute("SELECT to_regclass('gateway.migrations') IS NOT NULL").fetchall()[0][0]
            done = {name for (name,) in db.raw.execute("SELECT name FROM gateway.migrations")} if exists else set()
            for name, script in MIGRATIONS:
                if name not in done:
                    db.raw.execute(script.encode())
                    db.raw.execute("INSERT INTO gateway.migrations VALUES (%s)", (name,))
            db.execute("INSERT INTO settings VALUES ('zone', ?) ON CONFLICT DO NOTHING", (zone,))
    except psycopg.Error as error:
        raise unavailable(server, error) from error


def unavailable(server: Server, error: Exception) -> LedgerUnavailable:
    """The sentence for an error of the server. The driver's own words follow, without what may be secret."""
    state = getattr(error, "sqlstate", None) or ""
    known = [_SENTENCES[code] for code in (state, state[:3], state[:2]) if code in _SENTENCES]
    sentence = known[0] if known else "the ledger's server {at} gives no connection"
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    words = primary or " ".join(str(error).split())
    password = conninfo_to_dict(server.url).get("password")
    return LedgerUnavailable(f"{sentence.format(at=server)} ({words.replace(str(password), '***') if password else words})")


def is_its_own(error: Exception) -> bool:
    own = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | psycopg.InternalError)
    return own or getattr(error, "sqlstate", None) in _SENTENCES


@contextlib.contextmanager
def changing(server: Server) -> Iterator[sqlite3.Connection]:
    """A write transaction of a command, alone in the ledger. Raises LedgerUnavailable."""
    try:
        with contextlib.closing(connect(server, PATIENT)) as db:
            _begin(db, (EVERYTHING,))
            yield cast(sqlite3.Connection, db)
            db.execute("COMMIT")
    except psycopg.Error as error:
        if not is_its_own(error):
            raise
        raise unavailable(server, error) from error


@contextlib.contextmanager
def reading(server: Server) -> Iterator[sqlite3.Connection]:
    """A connection that sees one moment of the ledger and cannot write; rows by name. Raises LedgerUnavailable."""
    try:
        with contextlib.closing(connect(server, PATIENT)) as db:
            db.raw.row_factory = _named_rows
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield cast(sqlite3.Connection, db)
    except psycopg.Error as error:
        if not is_its_own(error):
            raise
        raise unavailable(server, error) from error


def living(db: sqlite3.Connection) -> set[str]:
    """The owners whose lease runs, by the server's clock."""
    alive = "SELECT id FROM owners WHERE lease_until > extract(epoch FROM clock_timestamp())"
    return {owner for (owner,) in db.execute(alive).fetchall()}


def _begin(db: Connection, scopes: Collection[str]) -> None:
    """Take the turns. The table's lock lets whoever needs everything wait in line, and not for a moment in which nobody writes."""
    db.execute("BEGIN")
    if EVERYTHING in scopes:
        db.execute("LOCK TABLE turns IN EXCLUSIVE MODE")
    elif scopes:
        wanted = sorted(scopes)
        held = "SELECT scope FROM turns WHERE scope = ANY(?) ORDER BY scope FOR UPDATE"
        if len(db.execute(held, (wanted,)).fetchall()) < len(wanted):
            db.execute("INSERT INTO turns SELECT unnest(CAST(? AS text[])) ON CONFLICT DO NOTHING", (wanted,))
            db.execute(held, (wanted,))


class ServerStore:
    """One process's connections: one that writes, a few that read."""

    errors: tuple[type[Exception], ...] = (psycopg.Error,)
    near = False
    skew_s = 0
    heartbeat_s: float | None = LEASE_S / 3

    def __init__(self, server: Server, timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s
        self._name: str | None = None
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="ledger-reader")
        self._pool = ConnectionPool(
            server.url,
            kwargs={"autocommit": True, **CONNECT},
            min_size=0,
            max_size=READERS,
            timeout=timeout_s,
            configure=settle_in,
            open=False,
        )

    def __str__(self) -> str:
        return str(self._server)

    @property
    def owner(self) -> str:
        return self._name or "nobody yet"

    def connect(self) -> sqlite3.Connection:
        db = connect(self._server)
        try:
            if self._name is None:
                self._enrol(db)
        except BaseException:
            db.close()
            raise
        return cast(sqlite3.Connection, db)

    def _enrol(self, db: Connection) -> None:
        """Enter under a new name. A name whose lease ran out is never used again."""
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        db.execute(
            "INSERT INTO owners (id, pid, host, started_at, lease_until) SELECT ?, ?, ?, ?, extract(epoch FROM clock_timestamp()) + ?",
            (name, os.getpid(), socket.gethostname(), time.time(), LEASE_S),
        )
        self._name = name

    def still(self) -> None:
        """A server is what its address says."""

    def turn(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin(self, db: sqlite3.Connection, scopes: Collection[str]) -> None:
        _begin(cast(Connection, db), scopes)

    def stamp(self, db: sqlite3.Connection, number: int) -> None:
        asked_at = time.time()
        renew = """
        UPDATE owners SET commits = ?, lease_until = extract(epoch FROM clock_timestamp()) + ?
        WHERE id = ? AND lease_until > extract(epoch FROM clock_timestamp())
        RETURNING lease_until
        """
        rows = db.execute(renew, (number, LEASE_S, self._name)).fetchall()
        if not rows:
            self._name = None
            raise LedgerUnavailable(
                f"this gateway was out of touch with {self._server} for more than {LEASE_S:g} s: its calls were settled at what they held"
            )
        self.skew_s = round(rows[0][0] - LEASE_S - asked_at)

    def commits(self, db: sqlite3.Connection) -> int | None:
        rows = db.execute("SELECT commits FROM owners WHERE id = ?", (self._name,)).fetchall()
        return rows[0][0] if rows else None

    def sweep(self, db: sqlite3.Connection, now: float) -> int:
        return owners.settle_orphans(db, self.dead(db), now=now)

    def dead(self, db: sqlite3.Connection) -> list[str]:
        return [owner for (owner,) in db.execute(_DEAD).fetchall()]

    async def read[T](self, read: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(self._threads, self._read, read)
        except TimeoutError:
            raise LedgerUnavailable(f"the ledger {self._server} did not answer within {self._timeout_s:g} s: it is slow") from None
        except psycopg.Error as error:
            raise self.unavailable(error) from error

    def _read[T](self, read: Callable[[sqlite3.Connection], T]) -> T:
        """On a reader's thread. A connection that the server dropped while it was idle is found out by using it: one more try."""
        self._pool.open()
        for last in (False, True):
            with self._pool.connection() as raw:
                try:
                    return read(cast(sqlite3.Connection, Connection(raw)))
                except psycopg.OperationalError:
                    if last or not raw.closed:
                        raise
        raise AssertionError("the second try returns or raises")

    def unavailable(self, error: Exception) -> LedgerUnavailable:
        return unavailable(self._server, error)

    def is_its_own(self, error: Exception) -> bool:
        return is_its_own(error)

    def is_busy(self, error: Exception) -> bool:
        return getattr(error, "sqlstate", None) in _BUSY

    def hang_up(self) -> None:
        """Nothing is held between transactions."""

    async def close(self) -> None:
        await asyncio.to_thread(self._goodbye)

    def _goodbye(self) -> None:
        """End the lease: what is still open is the others' to settle."""
        self._pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(psycopg.Error), contextlib.closing(connect(self._server)) as db:
            db.execute("UPDATE owners SET lease_until = 0 WHERE id = ?", (self._name,))
