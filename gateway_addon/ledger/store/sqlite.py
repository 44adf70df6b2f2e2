"""Store a ledger in an SQLite file, shared by the processes of one machine.

Promises that writers take turns (locks.py), that a read is a lookup on a connection that never waits for a lock (some ten
microseconds, on the event loop itself), and that an owner is alive exactly while the operating system holds its lock.
"""

import contextlib
import math
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from gateway_addon.ledger import access, orphans
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store import migrations, sqlite_files
from gateway_addon.ledger.store.interface import Asked
from gateway_addon.ledger.store.locks import OwnerLock, Turnstile, forget_dead_owner, is_dead
from gateway_addon.ledger.types import LedgerUnavailable

BEAT_STEPS = 1_000_000  # of SQLite's machine: some hundredths of a second
STAMP = f"UPDATE owners SET commits = $1 WHERE id = $2 AND (SELECT count(*) FROM ({migrations.APPLIED})) <= $3"


class FileStore:
    """A store in a file. Raises LedgerUnavailable where there is none; OSError where its folder cannot be written."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
    near = True
    heartbeat_s: float | None = None
    skew_s = 0
    lease_left_s = math.inf
    journal = None
    scopes_max: int | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = sqlite_files.identity(path)
        access.must_be_allowed(path)
        self._lock = OwnerLock(path)
        self._turnstile = Turnstile(path)
        self._reader: sqlite_files.FileConnection | None = None
        self._enrolled = False

    def __str__(self) -> str:
        return str(self.path)

    @property
    def owner(self) -> str:
        return self._lock.owner

    def connect(self) -> sqlite_files.FileConnection:
        db = sqlite_files.writer_connection(self.path)
        try:
            if not self._enrolled:  # in this process's turn, as a move is made in one
                sqlite_files.must_be_here(self.path, db)
                enter = "INSERT INTO owners (id, pid, host, started_at) VALUES ($1, $2, $3, $4)"
                db.execute(enter, (self.owner, os.getpid(), socket.gethostname(), time.time()))
                self._enrolled = True
            db.execute("PRAGMA busy_timeout = 0")  # a batch may begin on the loop, which waits for nobody; the thread tries again by itself
        except BaseException:
            db.close()
            raise
        return db

    def must_be_unchanged(self) -> None:
        sqlite_files.must_be_unchanged(self.path, self._known)

    def unwritten_journals(self) -> AbstractContextManager[tuple[()]]:
        return nullcontext(())

    def turn(self) -> AbstractContextManager[None]:
        return self._turnstile.turn()

    def begin(self, db: Connection, scopes: Collection[str]) -> None:
        db.execute("BEGIN IMMEDIATE")

    def batch(self, db: Connection, scopes: Collection[str], asked: Sequence[Asked], number: int) -> None:
        """Leave a batch to its statements: each of them takes microseconds."""

    def found(self, db: Connection, asked: Sequence[Asked]) -> list[object]:
        return []

    def stamp(self, db: Connection, number: int) -> None:
        if db.execute(STAMP, (number, self.owner, len(migrations.known()))).rowcount == 0:
            sqlite_files.must_be_a_ledger(self.path, db)

    def commit(self, db: Connection) -> None:
        db.execute("COMMIT")

    def took_place(self, db: Connection, number: int) -> bool:
        return bool(db.execute("SELECT 1 FROM owners WHERE id = $1 AND commits >= $2", (self.owner, number)).fetchall())

    def dead(self, db: Connection) -> list[str]:
        return [owner for owner in orphans.known(db) if is_dead(self.path, owner)]

    def sweep(self, db: Connection, now: float) -> int:
        dead = self.dead(db)
        swept = orphans.settle_orphans(db, dead, now=now)
        for owner in dead if swept < orphans.SWEPT_AT_ONCE else ():
            forget_dead_owner(self.path, owner)
        return swept

    async def read[T](self, read: Callable[[Connection], T]) -> T:
        try:
            self.must_be_unchanged()
            if self._reader is None:
                self._reader = sqlite_files.reader_connection(self.path, wait_ms=0)
            return read(self._reader)
        except sqlite3.Error as error:
            self._close_reader()
            raise self.unavailable(error) from error

    def unavailable(self, error: Exception) -> LedgerUnavailable:
        return sqlite_files.unavailable(self.path, error)

    def is_its_own(self, error: Exception) -> bool:
        return sqlite_files.is_of_the_file(error)

    def is_busy(self, error: Exception) -> bool:
        return sqlite_files.is_busy(error)

    def close_writer(self) -> None:
        self._turnstile.close()

    async def close(self) -> None:
        self._close_reader()
        self._lock.close()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class FileLedger:
    """A ledger's file, as gateways and commands open it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, zone: str) -> None:
        sqlite_files.create(self.path, zone)

    @contextlib.contextmanager
    def changing(self) -> Iterator[sqlite_files.FileConnection]:
        try:
            with in_turn(self.path) as db:
                sqlite_files.must_be_here(self.path, db)
                yield db
                db.execute("COMMIT")
        except sqlite3.Error as error:
            if not sqlite_files.is_of_the_file(error):
                raise
            raise sqlite_files.unavailable(self.path, error) from error

    @contextlib.contextmanager
    def reading(self, tick: Callable[[], None] = lambda: None, *, as_it_is: bool = False) -> Iterator[sqlite_files.FileConnection]:
        def step() -> int:
            tick()
            return 0

        sqlite_files.identity(self.path)
        if not as_it_is:
            access.must_be_allowed(self.path, reading=True)
        try:
            with contextlib.closing(sqlite_files.reader_connection(self.path)) as db:
                if not as_it_is and migrations.is_behind(db.raw):
                    with self.changing():
                        pass
                db.raw.row_factory = sqlite3.Row
                db.raw.set_progress_handler(step, BEAT_STEPS)
                db.execute("BEGIN")
                sqlite_files.must_be_a_ledger(self.path, db)
                sqlite_files.must_be_here(self.path, db)
                yield db
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_INTERRUPT:  # what the driver makes of Ctrl-C in `step`
                raise KeyboardInterrupt from None
            if not sqlite_files.is_of_the_file(error):
                raise
            if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) and (shut := access.shut(self.path)) is not None:
                raise shut from error
            raise sqlite_files.unavailable(self.path, error) from error

    def death_check(self, db: Connection) -> Callable[[str], bool]:
        def gone(owner: str) -> bool:
            try:
                return owner != orphans.BATCHES and is_dead(self.path, owner)
            except PermissionError as error:  # a group may read the ledger, not the locks beside it
                raise access.closed(self.path) from error

        return gone

    def store(self, timeout_s: float) -> FileStore:
        try:
            return FileStore(self.path)
        except OSError as error:
            raise sqlite_files.unavailable(self.path, error) from error


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[sqlite_files.FileConnection]:
    """Open a write transaction on a file, in a turn among the gateway's processes; the caller commits it.

    Raises LedgerUnavailable, and sqlite3.Error as the driver raises it.
    """
    sqlite_files.identity(path)
    access.must_be_allowed(path)
    try:
        turnstile = Turnstile(path)
    except OSError as error:
        raise sqlite_files.unavailable(path, error) from error
    try:
        with turnstile.turn(), contextlib.closing(sqlite_files.writer_connection(path)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield db
    finally:
        turnstile.close()
