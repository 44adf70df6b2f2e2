"""Back up and restore a ledger: one consistent moment of it while gateways write, proved before it is trusted.

Promises that a copy is whole or not there, that a ledger in use is never replaced, nor a sound one by a copy that is not, and that
the replaced files are kept beside the ledger; all of it through a kill at any moment.
"""

import contextlib
import fcntl
import glob
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gateway_addon.ledger import access
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.ledger.store.journal import sync_folder
from gateway_addon.ledger.store.locks import Turnstile, living
from gateway_addon.ledger.store.migrations import migrate
from gateway_addon.ledger.store.sqlite import FileLedger
from gateway_addon.ledger.types import LedgerUnavailable

LOGS = ("-wal", "-journal")
"""Suffixes of SQLite's logs of changes that are not in the database yet: it plays them into any file of that name."""

type CopyFigures = tuple[int, ...]

_FIGURES = """
SELECT (SELECT count(*) FROM calls), (SELECT count(*) FROM entries), (SELECT coalesce(sum(spent_nano), 0) FROM entries),
  (SELECT count(*) FROM audit), (SELECT coalesce(max(id), 0) FROM audit)
"""


def backup(ledger: Path, copy: Path) -> int:
    """Copy one moment of a ledger to a private file; return its number of calls.

    Readers do not stop writers, so a running gateway goes on. Raises LedgerUnavailable, ValueError where `copy` cannot be made.
    """
    if copy.name.endswith((*LOGS, "-shm")):
        raise ValueError(f"{copy} is how SQLite calls a part of another database, and could be taken for one: name another file")
    if copy.exists():
        raise ValueError(f"{copy} exists already, and a backup is not written over: name another file, with the date in it")
    if not copy.absolute().parent.is_dir():
        raise ValueError(f"the folder {copy.absolute().parent} does not exist: make it, or name another file")
    sqlite_files.must_have_no_log(copy)
    sqlite_files.identity(ledger)
    access.must_be_allowed(ledger, reading=True)
    with _unfinished(copy) as unfinished:
        calls, *_ = _proved_copy(ledger, unfinished)
        os.replace(unfinished, copy)
        sync_folder(copy.absolute().parent)
    return calls


def restore(copy: Path, ledger: Path, *, now: float) -> tuple[int, list[Path]]:
    """Put a proved copy in a ledger's place; return its number of calls, and where the replaced files are now.

    Raises LedgerUnavailable where a gateway uses that ledger, or where the copy is not sound; ValueError where there is none.
    """
    if not ledger.absolute().parent.is_dir():
        raise ValueError(f"the folder {ledger.absolute().parent} does not exist: make it, or name another ledger with --ledger")
    if not copy.exists():
        raise ValueError(f"there is no backup at {copy}")
    if ledger.exists():
        access.must_be_allowed(ledger)
    turnstile = Turnstile(ledger)
    try:
        with turnstile.turn(), _unfinished(ledger) as unfinished:
            if users := living(ledger):
                raise LedgerUnavailable(
                    f"the ledger {ledger} is in use by {', '.join(users)}: stop the gateway, then restore. (What it"
                    " counts meanwhile would be lost.)"
                )
            figures = _proved_copy(copy, unfinished, log=True)
            kept = _aside(ledger, f"before-{int(now)}")
            os.replace(unfinished, ledger)
            sync_folder(ledger.absolute().parent)
            _prove_in_place(ledger, figures, kept, now)
    except sqlite3.Error as error:
        raise sqlite_files.unavailable(ledger, error) from error
    finally:
        turnstile.close()
    return figures[0], kept


def _proved_copy(source: Path, target: Path, *, log: bool = False) -> CopyFigures:
    """Copy a ledger into one file, without a log. `log`: the copy will keep a write-ahead log, as gateways need it."""
    with FileLedger(source).reading(as_it_is=True) as db:
        sqlite_files.must_be_a_ledger(source, db)
        with contextlib.closing(sqlite_files.FileConnection(sqlite3.connect(target, isolation_level=None))) as written:
            db.raw.backup(written.raw)
            written.execute("PRAGMA journal_mode = DELETE")
            migrate(written.raw)
            if findings := invariants.findings(written):
                raise LedgerUnavailable(f"{source} is not a sound ledger, so no copy of it was put anywhere: {'; '.join(findings)}")
            if log:
                written.execute("PRAGMA journal_mode = WAL")
            return _figures(written)


def _prove_in_place(ledger: Path, expected: CopyFigures, kept: list[Path], now: float) -> None:
    """Open the restored ledger in its place, as a gateway would; remove it where it differs from the copy."""
    try:
        with contextlib.closing(sqlite_files.writer_connection(ledger)) as db:
            findings = invariants.findings(db) or ([] if _figures(db) == expected else ["it is another ledger than the backup"])
    except sqlite3.Error as error:
        findings = [f"{error}"]
    if findings:
        [unsound, *_] = _aside(ledger, f"unsound-{int(now)}")
        before = f", what was there before is {', '.join(map(str, kept))}" if kept else ""
        raise LedgerUnavailable(f"what was restored is not sound and is now {unsound}{before}: {'; '.join(findings)}")


def _figures(db: Connection) -> CopyFigures:
    [row] = db.execute(_FIGURES).fetchall()
    return tuple(row)


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Make a private, empty file beside `path`; remove it afterwards unless it was renamed. Removes those of killed processes."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        for left in path.absolute().parent.glob(f".{glob.escape(path.name)}.[0-9]*"):
            if left.suffix[1:].isdigit() and _is_left(left):
                _remove(left)
        file = _locked_new(unfinished)
    except OSError as error:
        sentence = f"{path.absolute().parent} cannot be written to ({error.strerror}): choose a folder that you can write to"
        raise ValueError(sentence) from error
    try:
        yield unfinished
    finally:
        _remove(unfinished)
        os.close(file)


def _locked_new(path: Path) -> int:
    """Make a new file and lock it. Another process may remove it before the lock, as a dead one's: then try again."""
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, access.PRIVATE)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return file
        os.close(file)


def _is_left(unfinished: Path) -> bool:
    """Return whether an unfinished file's process, and with it the lock, is gone."""
    try:
        with open(unfinished, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError, PermissionError):
        return False
    return True


def _remove(unfinished: Path) -> None:
    for beside in ("", *LOGS, "-shm"):
        unfinished.with_name(unfinished.name + beside).unlink(missing_ok=True)


def _aside(ledger: Path, tag: str) -> list[Path]:
    """Rename a ledger with SQLite's own files, so that it can still be opened; return their new names.

    The log is under the new name before the database is, and under the old one until the database has left it: a kill in between
    leaves the ledger whole under one of the two names, and at worst a log alone under the other, which the next restore takes away. A
    database under the old name without its log would have lost what it had spent, and a log under it would be played into the next one.
    """
    kept = [(ledger.with_name(ledger.name + beside), ledger.with_name(f"{ledger.name}.{tag}{beside}")) for beside in ("", *LOGS, "-shm")]
    found = [(old, new) for old, new in kept if old.exists()]
    for old, new in found:
        if old.name.endswith(LOGS):
            with contextlib.suppress(OSError):  # a filesystem without links: then it follows the database
                os.link(old, new)
    for old, new in found:
        if new.exists() and new.samefile(old):
            old.unlink()  # to rename one link of a file to the other does nothing
        else:
            os.replace(old, new)
    sync_folder(ledger.absolute().parent)
    return [new for _, new in found]
