"""A ledger on a PostgreSQL server, shared by the gateways of several machines.

Promises the same as a ledger in a file, by other means. Writers take turns scope by scope: a transaction first locks the rows in
`turns` of the scopes that it judges or changes, in the order of their names, so no two wait for each other in a circle. An owner is
alive while its lease runs by the server's clock; each commit renews it, and one whose lease has run out is fenced: its commit is
refused, it comes back under a new name, and living processes settle its old calls. Every wait has a limit.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import psycopg
from psycopg import pq

from gateway_addon.clocks import monotonic_s
from gateway_addon.ledger import orphans
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store import postgres_batch, sqlite_files
from gateway_addon.ledger.store.interface import EVERYTHING, Asked, must_be_known
from gateway_addon.ledger.store.journal import Journal, LeftJournal, unwritten_journals
from gateway_addon.ledger.store.migrations import ON_SERVER
from gateway_addon.ledger.store.postgres_session import (
    BEHIND,
    PATIENT,
    Limited,
    ServerConnection,
    connect,
    is_busy,
    is_its_own,
    named_rows,
    unavailable,
)
from gateway_addon.ledger.types import LedgerUnavailable, ServerAddress

log = logging.getLogger(__name__)

LEASE_S = 15.0
READERS = 4
SCOPES_MAX = 8  # of 100 apps and four gateways, each with 32 calls at once: twice the calls of commits that hold all that came

# In one statement, so at one moment: an owner enters before its first call.
_DEAD = f"""
SELECT id FROM owners WHERE lease_until <= extract(epoch FROM clock_timestamp())
UNION SELECT owner FROM calls WHERE state = 'open' AND owner <> '{orphans.BATCHES}' AND owner NOT IN (SELECT id FROM owners)
"""


def create(server: ServerAddress, zone: str = "UTC") -> None:
    """Make an empty ledger in a database that exists, or bring one up to date. Raises LedgerUnavailable."""
    try:
        with contextlib.closing(connect(server, PATIENT)) as db, db.raw.transaction():
            db.raw.execute("SELECT pg_advisory_xact_lock(hashtext('gateway ledger'))")  # two `gateway init` at once
            exists = db.raw.execute("SELECT to_regclass('gateway.migrations') IS NOT NULL").fetchall()[0][0]
            done = {name for (name,) in db.raw.execute("SELECT name FROM gateway.migrations")} if exists else set()
            must_be_known(server, done, (name for name, _ in ON_SERVER))
            for name, script in ON_SERVER:
                if name not in done:
                    db.raw.execute(script.encode())
                    db.raw.execute("INSERT INTO gateway.migrations VALUES ($1)", (name,))
            db.execute("INSERT INTO settings VALUES ('zone', $1) ON CONFLICT DO NOTHING", (zone,))
    except psycopg.Error as error:
        raise unavailable(server, error) from error


class ServerLedger:
    """A ledger's server, as gateways and commands open it."""

    def __init__(self, server: ServerAddress) -> None:
        self.server = server

    def create(self, zone: str) -> None:
        create(self.server, zone)

    @contextlib.contextmanager
    def changing(self) -> Iterator[ServerConnection]:
        with self._patient() as db:
            _begin(db, (EVERYTHING,))
            _must_fit(self.server, db)
            yield db
            db.execute("COMMIT")

    @contextlib.contextmanager
    def reading(self, tick: Callable[[], None] = lambda: None, *, as_it_is: bool = False) -> Iterator[ServerConnection]:
        with self._patient() as db:
            db.raw.row_factory = named_rows
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            _must_fit(self.server, db)
            yield db

    @contextlib.contextmanager
    def _patient(self) -> Iterator[ServerConnection]:
        try:
            with contextlib.closing(connect(self.server, PATIENT)) as db:
                yield db
        except psycopg.Error as error:
            if not is_its_own(error):
                raise
            raise unavailable(self.server, error) from error

    def death_check(self, db: Connection) -> Callable[[str], bool]:
        alive = "SELECT id FROM owners WHERE lease_until > extract(epoch FROM clock_timestamp())"  # by the server's clock
        living = {owner for (owner,) in db.execute(alive).fetchall()} | {orphans.BATCHES}
        return lambda owner: owner not in living

    def store(self, timeout_s: float) -> "ServerStore":
        return ServerStore(self.server, timeout_s, sqlite_files.state_folder(self.server))


def _begin(db: Connection, scopes: Collection[str]) -> None:
    """Take the turns. By the table's lock an operation on everything waits in order, not for a moment without writers."""
    db.execute("BEGIN")
    if EVERYTHING in scopes:
        db.execute("LOCK TABLE turns IN EXCLUSIVE MODE")
    elif scopes:
        wanted = sorted(scopes)
        held = "SELECT scope FROM turns WHERE scope = ANY($1) ORDER BY scope FOR UPDATE"
        if len(db.execute(held, (wanted,)).fetchall()) < len(wanted):
            db.execute("INSERT INTO turns SELECT unnest(CAST($1 AS text[])) ON CONFLICT DO NOTHING", (wanted,))
            db.execute(held, (wanted,))


def _must_fit(server: ServerAddress, db: Connection) -> None:
    """Refuse tables of another version: other gateways may use a server's ledger, so only `gateway init` changes them."""
    applied = {name for (name,) in db.execute("SELECT name FROM migrations").fetchall()}
    known = {name for name, _ in ON_SERVER}
    must_be_known(server, applied, known)
    if known - applied:
        raise LedgerUnavailable(BEHIND.format(at=server))


class ServerStore:
    """One process's connections to a server: one that writes, a few that read."""

    errors: tuple[type[Exception], ...] = (psycopg.Error,)
    near = False
    scopes_max: int | None = SCOPES_MAX
    skew_s = 0
    _calendar: postgres_batch.SeenCalendar

    def __init__(self, server: ServerAddress, timeout_s: float, state: Path) -> None:
        self._server = server
        self._timeout_s = timeout_s
        self._unwritten = state / "unwritten"
        self._name: str | None = None
        self._lease_from = self._lease_ends = -math.inf
        self.journal: Journal | None = None
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="ledger-reader")
        self._reader = threading.local()
        self._readers: set[ServerConnection] = set()
        self._closed = False
        self._batches = False

    def __str__(self) -> str:
        return str(self._server)

    @property
    def owner(self) -> str:
        return self._name or "nobody yet"

    @property
    def heartbeat_s(self) -> float | None:
        return LEASE_S / 3

    @property
    def lease_left_s(self) -> float:
        return self._lease_ends - monotonic_s()

    def connect(self) -> ServerConnection:
        db = connect(self._server, kind=Limited)
        try:
            _must_fit(self._server, db)
            if self._name is None:
                self._enrol(db)
            self._calendar = postgres_batch.calendar_now(db)
            self._batches = self._bring_function(db)
        except BaseException:
            db.close()
            raise
        return db

    def _bring_function(self, db: ServerConnection) -> bool:
        try:
            db.raw.execute(postgres_batch.FUNCTION.encode())
        except psycopg.errors.InsufficientPrivilege as error:
            log.warning("the ledger's user may make no temporary function on %s: calls are written one by one (%s)", self._server, error)
            return False
        return True

    def _enrol(self, db: Connection) -> None:
        """Enter this process under a new name. A name whose lease ran out is never used again."""
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        asked_at = monotonic_s()
        db.execute(
            "INSERT INTO owners (id, pid, host, started_at, lease_until) SELECT $1, $2, $3, $4, extract(epoch FROM clock_timestamp()) + $5",
            (name, os.getpid(), socket.gethostname(), time.time(), LEASE_S),
        )
        self._name, self._lease_ends = name, asked_at + LEASE_S
        if self.journal is None:
            db.execute("INSERT INTO settings VALUES ('identity', $1) ON CONFLICT DO NOTHING", (uuid4().hex,))
            [(identity,)] = db.execute("SELECT value FROM settings WHERE name = 'identity'").fetchall()
            self._unwritten /= identity  # whatever address the server will have then: a standby that took over is the same ledger
            self.journal = Journal(self._unwritten, name)
            if not self.journal.possible:
                log.warning("%s cannot be written: settlements that the server cannot take will wait in memory alone", self.journal)

    def unwritten_journals(self) -> AbstractContextManager[Sequence[LeftJournal]]:
        return unwritten_journals(self._unwritten)

    def must_be_unchanged(self) -> None:
        """Check nothing: a server is the one at its address."""

    def turn(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin(self, db: Connection, scopes: Collection[str]) -> None:
        _begin(db, scopes)

    def stamp(self, db: Connection, number: int) -> None:
        asked_at, self._lease_from = time.time(), monotonic_s()
        rows = db.execute(postgres_batch.RENEW, (number, LEASE_S, self._name, len(ON_SERVER))).fetchall()
        if not rows:
            self._fenced(db)
        self._renewed(rows[0][0], asked_at)

    def batch(self, db: Connection, scopes: Collection[str], asked: Sequence[Asked], number: int) -> list[object] | None:
        if EVERYTHING in scopes or not isinstance(db, ServerConnection) or not self._batches:
            return None
        asked_at, self._lease_from = time.time(), monotonic_s()
        sender = postgres_batch.Sender(self.owner, number, LEASE_S, len(ON_SERVER), self._calendar)
        try:
            lease_until, answers = postgres_batch.send(db, scopes, asked, sender)
        except psycopg.DatabaseError as error:
            if error.diag.sqlstate not in (postgres_batch.FENCED, postgres_batch.MOVED):
                raise
            if error.diag.sqlstate == postgres_batch.FENCED:
                self._fenced(db)
            self._calendar = postgres_batch.calendar_now(db)
            return None
        except LedgerUnavailable:  # a window that the calendar lacks, or lacked when it was looked at
            self._calendar = postgres_batch.calendar_now(db)
            return None
        self._lease_ends = self._lease_from + LEASE_S
        self._renewed(lease_until, asked_at)
        return answers

    def found(self, db: Connection, asked: Sequence[Asked]) -> list[object]:
        return postgres_batch.found(db, self.owner, asked)

    def _fenced(self, db: Connection) -> NoReturn:
        _must_fit(self._server, db)
        self._name = None
        raise LedgerUnavailable(
            f"this gateway was out of touch with {self._server} for more than {LEASE_S:g} s: its calls were settled at what they held"
        )

    def _renewed(self, lease_until: float, asked_at: float) -> None:
        server_at = lease_until - LEASE_S
        self.skew_s = round(server_at - min(max(server_at, asked_at), time.time()))  # 0 where it may be that both clocks agree

    def commit(self, db: Connection) -> None:
        db.execute("COMMIT")
        self._lease_ends = self._lease_from + LEASE_S

    def took_place(self, db: Connection, number: int) -> bool:
        """Look up a commit. If the server is still at it, this waits, or it is too late for it: `RENEW` takes no number twice."""
        if db.execute("UPDATE owners SET commits = $2 WHERE id = $1 AND commits < $2", (self._name, number)).rowcount:
            return False
        return bool(db.execute("SELECT 1 FROM owners WHERE id = $1", (self._name,)).fetchall())

    def sweep(self, db: Connection, now: float) -> int:
        return orphans.settle_orphans(db, self.dead(db), now=now)

    def dead(self, db: Connection) -> list[str]:
        return [owner for (owner,) in db.execute(_DEAD).fetchall()]

    async def read[T](self, read: Callable[[Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise LedgerUnavailable(f"the ledger {self._server} is closed: this gateway is stopping")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(self._threads, self._read, read)
        except TimeoutError:
            raise LedgerUnavailable(f"the ledger {self._server} did not answer within {self._timeout_s:g} s: it is slow") from None
        except psycopg.Error as error:
            raise self.unavailable(error) from error

    def _read[T](self, read: Callable[[Connection], T]) -> T:
        """Run a read on a reader's thread, whose connection is its own: a second time if the server had dropped it while it was idle."""
        db: ServerConnection | None = getattr(self._reader, "db", None)
        was_idle = db is not None
        while True:
            if db is None:
                self._reader.db = db = connect(self._server, kind=Limited)  # a server that refuses says so to this call, at once
                self._readers.add(db)
            try:
                return read(db)
            except psycopg.OperationalError:
                dropped = db.raw.closed
                if db.raw.info.transaction_status != pq.TransactionStatus.IDLE:  # closed, or its answer is still to come
                    self._readers.discard(db)
                    db.close()
                    self._reader.db = db = None
                if not (was_idle and dropped):
                    raise
                was_idle = False

    def unavailable(self, error: Exception) -> LedgerUnavailable:
        return unavailable(self._server, error)

    def is_its_own(self, error: Exception) -> bool:
        return is_its_own(error)

    def is_busy(self, error: Exception) -> bool:
        return is_busy(error)

    def close_writer(self) -> None:
        """Do nothing: no lock is held between transactions."""

    async def close(self) -> None:
        await asyncio.to_thread(self._end_lease)

    def _end_lease(self) -> None:
        """End the lease: other processes settle the calls that are still open."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for reader in list(self._readers):
            reader.close()
        with contextlib.suppress(psycopg.Error), contextlib.closing(connect(self._server)) as db:
            db.execute("UPDATE owners SET lease_until = 0 WHERE id = $1", (self._name,))
