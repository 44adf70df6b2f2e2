"""Hand a new login link to a console that runs, by a file of its user's own. An edge: it reads and writes that file.

Promises that only the link's SHA-256 is written, that a link is taken once, and that no link is made for a console that has ended: it
holds a lock on the file while it runs.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway_addon.console.login import LINK_S, digest
from gateway_addon.ledger import ServerAddress
from gateway_addon.ledger.store.locks import take_if_free
from gateway_addon.ledger.store.sqlite_files import state_folder
from gateway_addon.names import PROGRAM


def place(ledger: Path | ServerAddress, host: str, port: int) -> Path:
    """Return the file of a ledger's console at an address."""
    return state_folder(ledger) / f"console-{host.replace(':', '.')}-{port}.link"


@contextmanager
def open_for_links(path: Path) -> Iterator[None]:
    """Let new links be made while the block runs. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def offer(path: Path) -> str:
    """Make a new link for the console that runs; an earlier one that nobody took is void. Raises ValueError where none runs."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise ValueError(_none(path)) from None
    try:
        if take_if_free(file):
            raise ValueError(_none(path))
        link = secrets.token_urlsafe(32)
        os.ftruncate(file, 0)
        os.pwrite(file, digest(link).encode(), 0)
        return link
    finally:
        os.close(file)


def offered(path: Path, now: float) -> str:
    """Return the digest of the link that may be taken; empty where there is none."""
    try:
        return path.read_text() if now <= path.stat().st_mtime + LINK_S else ""
    except OSError:
        return ""


def taken(path: Path) -> None:
    """Void the link that was offered."""
    os.truncate(path, 0)


def _none(path: Path) -> str:
    address = path.name.removeprefix("console-").removesuffix(".link").replace("-", ":")
    return f"no console runs at {address} for this user. Start one, or say which with --listen: {PROGRAM} console --listen {address}"
