"""Lock between processes, by the operating system in a folder beside the ledger: who may write now, and who is alive.

A lock of this kind vanishes with its process, however that dies, so nothing here needs a clock, a heartbeat or a pid that may have
been given away. Works on a local filesystem only.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4


def folder(ledger: Path) -> Path:
    """Return the locks' folder, made if it is missing. Raises OSError."""
    path = ledger.with_name(ledger.name + "-locks")
    path.mkdir(mode=0o700, exist_ok=True)
    return path


class Turnstile:
    """Admit one writer at a time, in the order of arrival, over threads and processes.

    SQLite waits by polling: of two busy writers one can wait for seconds. Here a writer first takes `turn`, then `write`, and
    leaves `turn` once it holds `write`; so a writer that comes back at once finds the next one already ahead of it.
    """

    def __init__(self, ledger: Path) -> None:
        place = folder(ledger)
        self._turn = _open(place / "turn")
        self._write = _open(place / "write")

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait, without limit, for this writer's turn. Not to be entered by two threads through one object."""
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._write, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        fcntl.flock(self._write, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._turn)
        os.close(self._write)


class OwnerLock:
    """Proof that this process lives, held from before its first reservation until its end."""

    def __init__(self, ledger: Path) -> None:
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self._path = _owner_path(ledger, self.owner)
        self._file = _open(self._path)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Release the lock and remove its file: a missing file reads as dead, like a lock that can be taken."""
        self._path.unlink(missing_ok=True)
        os.close(self._file)


def is_dead(ledger: Path, owner: str) -> bool:
    """Return whether the process that held this owner's lock is gone."""
    try:
        file = os.open(_owner_path(ledger, owner), os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        return take_if_free(file)
    finally:
        os.close(file)


def living(ledger: Path) -> list[str]:
    """Return the owners whose processes use this ledger now."""
    owners = sorted(path.name.removeprefix("owner-") for path in folder(ledger).glob("owner-*"))
    return [owner for owner in owners if not is_dead(ledger, owner)]


def forget_dead_owner(ledger: Path, owner: str) -> None:
    """Remove a dead owner's file, once none of its calls is open."""
    _owner_path(ledger, owner).unlink(missing_ok=True)


def _owner_path(ledger: Path, owner: str) -> Path:
    return folder(ledger) / f"owner-{owner}"


def take_if_free(file: int) -> bool:
    """Take a lock if nobody holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open(path: Path) -> int:
    """Open a lock file, close-on-exec (Python's default): a child program must not keep its parent's locks."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
