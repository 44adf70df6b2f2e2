"""Ledgers for tests, on both engines: values of the shapes that the ledger takes, and a ledger with one app's token in it."""

import asyncio
import inspect
import os
import shutil
import sqlite3
import tempfile
import time
import weakref
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import postgresql
import pytest

from gateway_addon.ledger import NewCall, Outcome, ServerAddress, Settlement, admin, connect, reservations
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store import postgres, sqlite_files
from gateway_addon.ledger.store.journal import Journal

NOON = 1_773_144_000.0  # Tuesday 2026-03-10 12:00 UTC


@dataclass(frozen=True)
class Cap:
    scope: str
    window: str
    amount_nano: int


@dataclass(frozen=True)
class Tokens:
    input_tokens: int = 10
    output_tokens: int = 5
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    cache_write_unsplit_tokens: int = 0


@dataclass(frozen=True)
class Part:
    nano: int
    kind: str = "message"
    model: str | None = "claude-haiku-4-5"
    tokens: Tokens = Tokens()
    web_searches: int = 0
    price_row: str | None = "claude-haiku-4-5"


CALL = NewCall("reports", "batch", 1, model_asked="claude-haiku-4-5", max_tokens=100)
DAY_CAP = [Cap("app:reports", "day", 1000)]


ENGINES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.xdist_group("postgresql"))]


@cache
def _empty_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        sqlite_files.create(path := Path(folder) / "gateway.db")
        return path.read_bytes()


def new_file(folder: Path) -> Path:
    """The folder's ledger, an empty one if it has none. Its tables are made once: that takes longer than what most tests do with them."""
    path = folder / "gateway.db"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_bytes(_empty_file())
    return path


def new_ledger(folder: Path, engine: str = "sqlite") -> Path | ServerAddress:
    """An empty ledger with one token (id 1) of the app `reports`."""
    path = postgresql.shared().ledger() if engine == "postgresql" else new_file(folder)
    with connect.changing(path) as db:
        admin.issue_token(db, "reports", "d1", who="test", now=NOON)
    return path


def copied(ledger: Path | ServerAddress, folder: Path) -> Path | ServerAddress:
    """Copy a ledger for a test to change, so that it is filled once. No process may have it open."""
    if isinstance(ledger, ServerAddress):
        return ServerAddress(postgresql.shared().database(like=ledger.url.partition("@/")[2].partition("?")[0]))
    return Path(shutil.copy(ledger, folder / "gateway.db"))


def url(path: Path | ServerAddress) -> str:
    return path.url if isinstance(path, ServerAddress) else f"sqlite:///{path}"


def writing(path: Path | ServerAddress) -> Connection:
    """A connection to try the book's functions on, outside of a transaction."""
    return postgres.connect(path) if isinstance(path, ServerAddress) else sqlite_files.writer_connection(path)


def rows(path: Path | ServerAddress, sql: str, *values: object) -> list[tuple]:
    with closing(postgres.connect(path) if isinstance(path, ServerAddress) else sqlite_files.FileConnection(sqlite3.connect(path))) as db:
        return db.execute(sql, values).fetchall()


def spend(db: Connection, now: float, nano: int = 10, call: NewCall = CALL) -> int:
    """Book a call that came to so much. Returns its number."""
    call_id = reservations.reserve(db, "me", call, max(100, nano), [], now=now).call_id
    reservations.settle(db, call_id, Settlement(nano, (Part(nano),), Outcome(status=200)), now=now)
    return call_id


def balance(path: Path | ServerAddress, scope: str = "app:reports", window: str = "ever") -> tuple[int, int, int]:
    """Spent, reserved and the number of open calls."""
    found = rows(path, 'SELECT spent_nano, reserved_nano, open FROM balances WHERE scope = $1 AND "window" = $2', scope, window)
    return found[0] if found else (0, 0, 0)


class Steps:
    """Counts the work of a connection's statements, in tens of virtual instructions."""

    def __init__(self, db: Connection):
        self.count = 0
        db.raw.set_progress_handler(self._step, 10)

    def _step(self) -> int:
        self.count += 1
        return 0

    def of(self, work) -> int:
        before = self.count
        work()
        return self.count - before


def die(journal: Journal) -> None:
    """End a journal as its process's death would: the operating system closes the file, and with it the lock."""
    os.close(journal._file)


def reconnect(ledger):
    """Make the writer open a new connection on its next turn.

    The old one is closed with the ledger, not now: a commit may still be at work on it, though what it wrote can be read already.
    """
    writer = ledger._writer
    left, writer._db = writer._db, None
    if left is not None:
        weakref.finalize(ledger, left.close)


async def until(condition, seconds=60):
    """Wait until the condition holds: what it returns, or what it returns is awaited to.

    The limit only ends a test that would never end. It is no measure: a machine may be twenty times too busy.
    """
    deadline = time.monotonic() + seconds
    while not (await found if inspect.isawaitable(found := condition()) else found):
        assert time.monotonic() < deadline, f"it did not come true within {seconds} s"
        await asyncio.sleep(0.01)
