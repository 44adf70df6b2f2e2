"""Count the rows that the readers of a ledger in a file fetch from its tables, by a function in a view that stands before each table."""

from collections import Counter

import pytest

from gateway_addon.ledger.store import sqlite_files

TABLES = ("calls", "entries", "usage", "audit", "alerts", "noise", "balances", "tokens", "raises", "minutes", "kept_lines")


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the numbers of rows that readers fetch from now on, by table.

    SQLite applies the condition of the view before any other that needs the row itself; an index narrows the rows first.
    """
    fetched: Counter[str] = Counter()
    opened = sqlite_files.reader_connection

    def seen(table: str) -> int:
        fetched[table] += 1
        return 1

    def open_counted(*arguments, **named):
        db = opened(*arguments, **named)
        db.raw.create_function("seen", 1, seen)
        db.execute("PRAGMA query_only = OFF")
        for table in TABLES:
            db.execute(f"CREATE TEMP VIEW {table} AS SELECT * FROM main.{table} WHERE seen('{table}')")
        db.execute("PRAGMA query_only = ON")
        return db

    monkeypatch.setattr(sqlite_files, "reader_connection", open_counted)
    return fetched
