"""Copies of a ledger: one consistent moment of it while gateways write, proved before it is trusted; and the way back.

Promises that a copy is whole or not there, that nothing is put in the place of a ledger that a gateway uses or of one that is
sound by a copy that is not, and that what was in its place is kept beside it.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gateway_addon.ledger import access, admin, files, proof
from gateway_addon.ledger.access import BESIDE
from gateway_addon.ledger.locks import Turnstile, living
from gateway_addon.ledger.schema import migrate
from gateway_addon.ledger.values import LedgerUnavailable


def backup(ledger: Path, copy: Path) -> int:
    """Copy one moment of a ledger to a file of its own, for this user's eyes; returns its number of calls.

    Readers do not stop writers, so a running gateway goes on. Raises LedgerUnavailable, ValueError where `copy` exists.
    """
    if copy.exists():
        raise ValueError(f"{copy} exists already, and a backup is not written over: name another file, with the date in it")
    if not copy.absolute().parent.is_dir():
        raise ValueError(f"the folder {copy.absolute().parent} does not exist: make it, or name another file")
    files.identity(ledger)
    access.must_be_allowed(ledger, reading=True)
    with _unfinished(copy) as unfinished:
        calls = _proved_copy(ledger, unfinished)
        os.replace(unfinished, copy)
    return calls


def restore(copy: Path, ledger: Path, *, now: float) -> tuple[int, Path | None]:
    """Put a proved copy in a ledger's place; returns its calls, and where the ledger that was there is now.

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
                    f"the ledger {ledger} is in use by {', '.join(users)}: stop the gateway, then restore. (Its counts of what was spent"
                    " would be lost under it.)"
                )
            calls = _proved_copy(copy, unfinished)
            kept = _aside(ledger, now) if ledger.exists() else None
            os.replace(unfinished, ledger)
        with contextlib.closing(files.writer_connection(ledger)) as db:  # brings an older one up to date
            db.execute("PRAGMA journal_mode = WAL")
    except sqlite3.Error as error:
        raise files.unavailable(ledger, error) from error
    finally:
        turnstile.close()
    return calls, kept


def _proved_copy(source: Path, target: Path) -> int:
    with admin.reading(source, as_it_is=True) as db:
        files.must_be_a_ledger(source, db)
        with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as written:
            db.backup(written)
            written.execute("PRAGMA journal_mode = DELETE")  # one file, with nothing of it in a log beside it
            migrate(written)
            if findings := proof.findings(written):
                raise LedgerUnavailable(f"{source} is not a sound ledger, so no copy of it was put anywhere: {'; '.join(findings)}")
            calls: int = written.execute("SELECT count(*) FROM calls").fetchone()[0]
            return calls


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A private, empty file beside `path` that is gone afterwards, unless it has been renamed."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        sentence = f"{path.absolute().parent} cannot be written to ({error.strerror}): choose a folder that you can write to"
        raise ValueError(sentence) from error
    try:
        yield unfinished
    finally:
        for beside in (*BESIDE, "-journal"):
            unfinished.with_name(unfinished.name + beside).unlink(missing_ok=True)


def _aside(ledger: Path, now: float) -> Path:
    """Rename a ledger with SQLite's own files of it, so that it can still be opened."""
    kept = ledger.with_name(f"{ledger.name}.before-{int(now)}")
    for beside in BESIDE:
        with contextlib.suppress(FileNotFoundError):
            os.replace(ledger.with_name(ledger.name + beside), kept.with_name(kept.name + beside))
    return kept
