"""Open a ledger's file: its address, its connections, and the sentence for the operator when the file fails.

Promises that only `create` makes a file, that every connection has the same settings, and that a database error comes out as one
sentence that names the file and the way out. SQLite and its locks need a local filesystem.
"""

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from gateway_addon.ledger import access
from gateway_addon.ledger.sql import Connection, Statement
from gateway_addon.ledger.store import engines
from gateway_addon.ledger.store.interface import must_be_known
from gateway_addon.ledger.store.migrations import APPLIED, known, migrate
from gateway_addon.ledger.types import LedgerUnavailable, ServerAddress
from gateway_addon.names import PROGRAM

SCHEME = "sqlite:///"
SERVER_SCHEMES = ("postgresql://", "postgres://")
# What calls come back to: 1 MiB where twelve apps call, 8 where a thousand do in turn (measured: 4 MiB cost 0.2 reads a call more than 16,
# from the system's memory, and no time). A larger cache fills with what was written once: rows of ended calls, in every worker.
CACHE_KIB = 4 * 1024
NAME_YOURS = "name yours with --ledger or GATEWAY_LEDGER"
MOVED_TO = "moved_to"  # the setting of a file whose ledger is on a server since
WAL_KEPT_BYTES_MAX = 64 * 2**20  # a log that a long read made grow is cut back to this when it begins anew
BUSY_MS = 500  # for writers that take no turn (a person's sqlite3 shell, a backup); the gateway's own take turns and never meet

_SENTENCES = {
    sqlite3.SQLITE_BUSY: "the ledger {path} is locked by another program; close the program that writes to it",
    sqlite3.SQLITE_LOCKED: "the ledger {path} is locked by another program; close the program that writes to it",
    sqlite3.SQLITE_PROTOCOL: "the ledger {path} is locked by another program; close the program that writes to it",
    sqlite3.SQLITE_READONLY: "the ledger {path} cannot be written: give the gateway's user write access to the file and its folder",
    sqlite3.SQLITE_PERM: "the ledger {path} cannot be written: give the gateway's user write access to the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "the ledger {path} cannot be opened: check that its folder exists and the gateway's user may write there",
    sqlite3.SQLITE_FULL: "the disk of the ledger {path} is full: free some space, the gateway goes on by itself",
    sqlite3.SQLITE_IOERR: "the disk of the ledger {path} reports an error: the gateway goes on by itself when it is back",
    sqlite3.SQLITE_NOMEM: "there is not enough memory to open the ledger {path}",
    sqlite3.SQLITE_CORRUPT: f"the ledger {{path}} is damaged: stop the gateway, keep the file, restore the last backup, then"
    f" `{PROGRAM} doctor`",
    sqlite3.SQLITE_NOTADB: "{path} is not a ledger or is damaged: stop the gateway, keep the file, restore the last backup, then"
    f" `{PROGRAM} doctor`",
}  # fmt: skip

_VALUE = re.compile(r"\$([a-z0-9_]+)")

type Identity = tuple[int, int]
"""Device and inode: two files of one name differ by it."""


class FileConnection:
    """A connection to a ledger's file. Transactions are begun by hand."""

    __slots__ = ("raw",)
    engine = engines.SQLITE
    in_doubt = False

    def __init__(self, raw: sqlite3.Connection) -> None:
        self.raw = raw

    def execute(self, statement: str | Statement, values: Any = ()) -> sqlite3.Cursor:
        text, in_order = _unnamed(statement if isinstance(statement, str) else statement.text)
        return self.raw.execute(text, in_order(values))

    def executemany(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        text, in_order = _unnamed(statement)
        self.raw.executemany(text, map(in_order, rows))

    @property
    def in_transaction(self) -> bool:
        return self.raw.in_transaction

    def close(self) -> None:
        self.raw.close()


def ledger_path(url: str) -> Path | ServerAddress:
    """Return the file of `sqlite:///PATH` or a bare path, or the server of `postgresql://...`. Raises ValueError."""
    if url.startswith(SERVER_SCHEMES):
        return ServerAddress(url)
    if "://" in url and not url.startswith(SCHEME):
        raise ValueError(f"the ledger {url.split('://')[0]}://... is not supported; write sqlite:///PATH or postgresql://...")
    path = url.removeprefix(SCHEME)
    if not path:
        raise ValueError("the ledger's address names no file; write sqlite:///PATH, for example sqlite:///gateway.db")
    return Path(path)


def file_path(url: str) -> Path:
    """Return the file of a ledger. Raises ValueError with a sentence for a ledger on a server."""
    path = ledger_path(url)
    if isinstance(path, ServerAddress):
        raise ValueError(f"{path} is a server's ledger: copy it by the server's own means (pg_dump, its backups)")
    return path


def state_folder(path: Path | ServerAddress) -> Path:
    """Return the folder of a gateway's certificates and journals: beside the ledger's file; at home for a server's ledger.

    At home it is `~/.gateway` where that exists.
    """
    if isinstance(path, Path):
        return path.resolve().parent / ".gateway"
    before = Path.home() / ".gateway"
    return before if before.is_dir() else at_home("XDG_STATE_HOME", ".local/state")


def at_home(variable: str, below_home: str) -> Path:
    """Return this program's folder in a base directory of the user: the variable's, if that is an absolute path."""
    named = os.environ.get(variable, "")
    return (Path(named) if named.startswith("/") else Path.home() / below_home) / "gateway"


def create(path: Path, zone: str = "UTC") -> None:
    """Make an empty ledger, or bring an existing one up to date. Raises LedgerUnavailable."""
    if not path.parent.is_dir():
        raise LedgerUnavailable(f"the folder {path.parent} does not exist: make it, then make the ledger again")
    try:
        if not path.exists():
            must_have_no_log(path)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, access.PRIVATE))
        db = _open(path, "rw")
        try:
            if db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall():
                must_be_a_ledger(path, db)
            db.execute("PRAGMA journal_mode = WAL")
            migrate(db.raw)
            db.execute("INSERT INTO settings VALUES ('zone', $1) ON CONFLICT DO NOTHING", (zone,))
        finally:
            db.close()
    except (sqlite3.Error, OSError) as error:
        raise unavailable(path, error) from error


def must_have_no_log(path: Path) -> None:
    """Raise LedgerUnavailable where a removed database has left its log: SQLite would play it into the next one."""
    for log in (path.with_name(path.name + "-wal"), path.with_name(path.name + "-journal")):
        if log.exists():
            raise LedgerUnavailable(f"{log} is left of another database, and holds its last changes: move it to where that one is now")


def identity(path: Path) -> Identity:
    """Return the identity of a file. Raises LedgerUnavailable where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise LedgerUnavailable(f"there is no ledger at {path}: `{PROGRAM} init` makes one, or {NAME_YOURS}") from None
    except PermissionError as error:
        raise access.closed(path) from error
    except OSError as error:
        raise LedgerUnavailable(f"the ledger {path} cannot be read: {error.strerror}") from error
    return status.st_dev, status.st_ino


def must_be_unchanged(path: Path, known: Identity) -> None:
    """Raise LedgerUnavailable unless the file is the one that was opened: two ledgers would know half of the spending each."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise LedgerUnavailable(f"the ledger {path} was removed while the gateway runs: put the same file back, or restart") from None
    except OSError as error:
        raise LedgerUnavailable(f"the ledger {path} cannot be read: {error.strerror}") from error
    if (status.st_dev, status.st_ino) != known:
        raise LedgerUnavailable(f"the ledger {path} was replaced while the gateway runs: restart the gateway to use the new file")


def writer_connection(path: Path) -> FileConnection:
    """Open a connection that writes durably: a commit survives a power cut (`synchronous=FULL`). Raises sqlite3.Error."""
    db = _open(path, "rw")
    try:
        must_be_a_ledger(path, db)
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
        db.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES_MAX}").fetchall()
        migrate(db.raw)
    except BaseException:
        db.close()
        raise
    return db


def reader_connection(path: Path, *, wait_ms: int = BUSY_MS) -> FileConnection:
    """Open a connection that cannot write. Raises sqlite3.Error."""
    db = _open(path, "rw", wait_ms)
    db.execute("PRAGMA query_only = ON")
    return db


def unavailable(path: Path, error: Exception) -> LedgerUnavailable:
    """Return the sentence for an error of the file. The driver's own words follow, for a search."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    sentence = _SENTENCES.get(code, "the ledger {path} failed").format(path=path)
    return LedgerUnavailable(f"{sentence} ({error})")


def is_of_the_file(error: Exception) -> bool:
    """Return whether the file or the disk failed, and not one operation (a constraint, a wrong value)."""
    return isinstance(error, OSError) or (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _SENTENCES


def is_busy(error: Exception) -> bool:
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def must_be_a_ledger(path: Path, db: Connection) -> None:
    """Raise LedgerUnavailable where the file is another program's, or its tables are a newer gateway's."""
    if len(db.execute("SELECT 1 FROM sqlite_master WHERE name IN ('entries', '_sqlite_migrations')").fetchall()) < 2:
        if path.stat().st_size == 0:
            raise LedgerUnavailable(f"{path} is an empty file, not a ledger: remove it, then `{PROGRAM} init` makes one")
        raise LedgerUnavailable(f"{path} is another program's file, not a ledger: {NAME_YOURS}; `{PROGRAM} init` makes one")
    must_be_known(path, (name for (name,) in db.execute(APPLIED).fetchall()), known())


def moved_to(db: Connection) -> str | None:
    """Return the server that this file's ledger was moved to, or None."""
    rows = db.execute("SELECT value FROM settings WHERE name = $1", (MOVED_TO,)).fetchall()
    return rows[0][0] if rows else None


def must_be_here(path: Path, db: Connection) -> None:
    """Raise LedgerUnavailable where the ledger was moved: writes here would miss its caps, and reads are out of date."""
    if (server := moved_to(db)) is not None:
        raise LedgerUnavailable(f"the ledger {path} was moved to {server}: name that with --ledger. (The file is kept as it was.)")


@lru_cache(maxsize=1_000)
def _unnamed(statement: str) -> tuple[str, Callable[[Any], Sequence[object]]]:
    """Return a statement with `?` for each value, and a function that puts the values in that order.

    SQLite would look each name up among all of them, and Python make a text of each: twice the work of a reservation's values.
    """
    names = [int(name) - 1 if name.isdigit() else name for name in _VALUE.findall(statement)]
    text = _VALUE.sub("?", statement)
    if len(names) < 2:
        return text, lambda values: [values[name] for name in names]
    return text, itemgetter(*names)


def _open(path: Path, mode: str, wait_ms: int = BUSY_MS) -> FileConnection:
    """Open a connection whose transactions are begun by hand: the driver would begin them deferred and lose the lock."""
    address = f"{Path(os.path.abspath(path)).as_uri()}?mode={mode}"
    raw = sqlite3.connect(address, uri=True, timeout=wait_ms / 1000, isolation_level=None, check_same_thread=False)
    return FileConnection(raw)
