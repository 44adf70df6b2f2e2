"""Open a ledger for a command: to read one moment of it, or to write in one transaction, on either engine."""

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from gateway_addon.ledger import access
from gateway_addon.ledger.orphans import BATCHES
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.ledger.store.interface import driver
from gateway_addon.ledger.store.locks import Turnstile, is_dead
from gateway_addon.ledger.store.sqlite_schema import is_behind
from gateway_addon.ledger.types import ServerAddress

BEAT_STEPS = 1_000_000  # of SQLite's machine: some hundredths of a second


@contextlib.contextmanager
def changing(path: Path | ServerAddress) -> Iterator[Connection]:
    """Open a command's write transaction, in its turn among the gateway's processes. Raises LedgerUnavailable."""
    if isinstance(path, ServerAddress):
        with driver():
            from gateway_addon.ledger.store import postgres
        with postgres.changing(path) as db:
            yield db
        return
    try:
        with in_turn(path) as db:
            sqlite_files.must_be_here(path, db)
            yield db
            db.execute("COMMIT")
    except sqlite3.Error as error:
        if not sqlite_files.is_of_the_file(error):
            raise
        raise sqlite_files.unavailable(path, error) from error


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


@contextlib.contextmanager
def reading(path: Path | ServerAddress, tick: Callable[[], None] = lambda: None, *, as_it_is: bool = False) -> Iterator[Connection]:
    """Open a connection that sees one moment of the ledger and cannot write. Raises LedgerUnavailable.

    A long statement on a file calls `tick` some times a second, and can be ended by Ctrl-C in between. An older version's ledger is
    brought up to date first, unless it is wanted `as_it_is`.
    """

    if isinstance(path, ServerAddress):
        with driver():
            from gateway_addon.ledger.store import postgres
        with postgres.reading(path) as db:
            yield db
        return
    with reading_file(path, tick, as_it_is=as_it_is) as db:
        yield db


@contextlib.contextmanager
def reading_file(
    path: Path, tick: Callable[[], None] = lambda: None, *, as_it_is: bool = False
) -> Iterator[sqlite_files.FileConnection]:
    """Open a ledger's file like `reading`."""

    def step() -> int:
        tick()
        return 0

    sqlite_files.identity(path)
    if not as_it_is:
        access.must_be_allowed(path, reading=True)
    try:
        with contextlib.closing(sqlite_files.reader_connection(path)) as db:
            if not as_it_is and is_behind(db.raw):
                with changing(path):
                    pass
            db.raw.row_factory = sqlite3.Row
            db.raw.set_progress_handler(step, BEAT_STEPS)
            db.execute("BEGIN")
            sqlite_files.must_be_a_ledger(path, db)
            sqlite_files.must_be_here(path, db)
            yield db
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_INTERRUPT:  # what the driver makes of Ctrl-C in `step`
            raise KeyboardInterrupt from None
        if not sqlite_files.is_of_the_file(error):
            raise
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) and (shut := access.shut(path)) is not None:
            raise shut from error
        raise sqlite_files.unavailable(path, error) from error


def death_check(path: Path | ServerAddress, db: Connection) -> Callable[[str], bool]:
    """Return a function that says whether an owner's process is gone. A batch has no process: it waits for its results."""
    if isinstance(path, ServerAddress):
        with driver():
            from gateway_addon.ledger.store import postgres
        living = postgres.living(db) | {BATCHES}
        return lambda owner: owner not in living

    def gone(owner: str) -> bool:
        try:
            return owner != BATCHES and is_dead(path, owner)
        except PermissionError as error:  # a group may read the ledger, not the locks beside it
            raise access.closed(path) from error

    return gone
