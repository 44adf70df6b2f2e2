"""Judge who may open a ledger's files: their owner, and for reading the group that the operator lets in.

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
"""Suffixes of SQLite's own files beside a database. Each gets the mode of the database."""
PRIVATE = 0o600
GROUP_READS = 0o640
"""The widest mode for a group. Write access to -shm, or a lock on it, can stop every call; read access allows a lock."""


def must_be_allowed(ledger: Path, *, reading: bool = False) -> None:
    """Raise LedgerUnavailable where the existing files are another user's."""
    status = ledger.stat()
    if not is_allowed(status, os.geteuid(), {os.getegid(), *os.getgroups()}, reading=reading):
        way = "" if not reading else f"; or be of the group {status.st_gid} and write `ledger_mode: 0640` in gateway.yaml"
        raise LedgerUnavailable(f"the ledger {ledger} is {_run_as(status)}{way}")


def is_allowed(status: os.stat_result, user: int, groups: Collection[int], *, reading: bool) -> bool:
    """Judge a user by the file's owner, group and mode."""
    return user == status.st_uid or (reading and status.st_mode & stat.S_IRGRP != 0 and status.st_gid in groups)


def shut(ledger: Path) -> LedgerUnavailable | None:
    """Return the error for another user's reader, which may not make SQLite's files; None for the ledger's own user."""
    if os.geteuid() == (status := ledger.stat()).st_uid:
        return None
    return LedgerUnavailable(f"the ledger {ledger} can be read by its group only while a gateway runs, and is else {_run_as(status)}")


def closed(ledger: Path) -> LedgerUnavailable:
    """Return the error for a ledger in a folder, or with locks in one, that is closed to this user."""
    for path in (ledger, *ledger.absolute().parents):
        try:
            return LedgerUnavailable(f"the ledger {ledger} is closed to you: it is {_run_as(path.stat())}")
        except OSError:
            continue
    return LedgerUnavailable(f"the ledger {ledger} is closed to you: run this as the gateway's user")


def restrict(ledger: Path, mode: int) -> list[str]:
    """Give the files this mode; return a sentence for each change. Raises OSError."""
    changed = []
    for path, found in _modes(ledger):
        if found != mode:
            path.chmod(mode)
            changed.append(f"{path} had the mode {found:04o} and has {mode:04o} now (ledger_mode)")
    return changed


def exposed(ledger: Path, mode: int) -> list[str]:
    """Return a sentence for each file that more people may open than `mode` says."""
    return [
        f"{path} has the mode {found:04o}: anybody who can open it reads everything and can stop every call. chmod {mode:04o} {path}"
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
