"""Ledgers for tests: values of the shapes that the ledger takes, and a file with one app's token in it."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from gateway_addon.ledger import NewCall, admin, files

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


def new_ledger(folder: Path) -> Path:
    """An empty ledger with one token (id 1) of the app `reports`."""
    path = folder / "gateway.db"
    files.create(path)
    with admin.changing(path) as db:
        admin.issue_token(db, "reports", "d1", who="test", now=NOON)
    return path


def rows(path: Path, sql: str, *values: object) -> list[tuple]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql, values).fetchall()


def balance(path: Path, scope: str = "app:reports", window: str = "ever") -> tuple[int, int, int]:
    """Spent, reserved and the number of open calls."""
    found = rows(path, "SELECT spent_nano, reserved_nano, open FROM balances WHERE scope = ? AND window = ?", scope, window)
    return found[0] if found else (0, 0, 0)
