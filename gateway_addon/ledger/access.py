"""Who may open a ledger's files: the user whose they are, and for reading the group that the operator lets in.

Promises that a command of another user stops before it touches anything, with the user's name: SQLite's files and the locks beside
them would become that user's, and the gateway could not open them any more. Root is no exception. Knows nothing of SQL.
"""

import os
import pwd
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from gateway_addon.ledger.types import LedgerUnavailable

BESIDE = ("", "-wal", "-shm")
"""What SQLite appends to a database's name for its own files. It gives each the mode of the database."""
PRIVATE = 0o600
GROUP_READS = 0o640
"""Never more: who may write -shm, or take a lock on it, stops every call; and to read it is to be able to lock it."""


def must_be_allowed(ledger: Path, *, reading: bool = False) -> None:
    """Raises LedgerUnavailable where the files are another user's. The file is there."""
    status = ledger.stat()
    if not is_allowed(status, os.geteuid(), {os.getegid(), *os.getgroups()}, reading=reading):
        way = "" if not reading else f"; or be of the group {status.st_gid} and write `ledger_mode: 0640` in gateway.yaml"
        raise LedgerUnavailable(f"the ledger {ledger} is {_run_as(status)}{way}")


def is_allowed(status: os.stat_result, user: int, groups: Collection[int], *, reading: bool) -> bool:
    """Judge a user by the file's owner, group and mode."""
    return user == status.st_uid or (reading and status.st_mode & stat.S_IRGRP != 0 and status.st_gid in groups)


def shut(ledger: Path) -> LedgerUnavailable | None:
    """The error for a reader of another user that failed because it may not make SQLite's files of the ledger; None for its own user."""
    if os.geteuid() == (status := ledger.stat()).st_uid:
        return None
    return LedgerUnavailable(f"the ledger {ledger} can be read by its group only while a gateway runs, and is else {_run_as(status)}")


def closed(ledger: Path) -> LedgerUnavailable:
    """The error for a ledger that lies, or whose locks lie, in a folder which is closed to this user."""
    for path in (ledger, *ledger.absolute().parents):
        try:
            return LedgerUnavailable(f"the ledger {ledger} is closed to you: it is {_run_as(path.stat())}")
        except OSError:
            continue
    return LedgerUnavailable(f"the ledger {ledger} is closed to you: run this as the gateway's user")


def restrict(ledger: Path, mode: int) -> list[str]:
    """Give the files this mode; returns what was changed, a sentence each. Raises OSError."""
    changed = []
    for path, found in _modes(ledger):
        if found != mode:
            path.chmod(mode)
            changed.append(f"{path} had the mode {found:04o} and has {mode:04o} now (ledger_mode)")
    return changed


def exposed(ledger: Path, mode: int) -> list[str]:
    """The files that more people may open than `mode` says, a sentence each."""
    return [
        f"{path} has the mode {found:04o}: whoever may open it reads everything and can stop every call. chmod {mode:04o} {path}"
        " (a gateway that starts does it)"
        for path, found in _modes(ledger)
        if found & ~mode
    ]


def _modes(ledger: Path) -> Iterator[tuple[Path, int]]:
    for beside in BESIDE:
        path = ledger.with_name(ledger.name + beside)
        try:
            yield path, stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError:  # SQLite removes them when the last one leaves
            continue


def _run_as(status: os.stat_result) -> str:
    try:
        name = pwd.getpwuid(status.st_uid).pw_name
        return f"the user {name}'s: run this as {name} (sudo -u {name} ...)"
    except KeyError:
        return f"the user {status.st_uid}'s: run this as that user (sudo -u '#{status.st_uid}' ...)"
