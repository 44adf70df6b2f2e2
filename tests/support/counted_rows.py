"""Count the rows that the readers of a ledger in a file fetch from its tables, by a function in a view that stands before each table."""

from collections import Counter

import pytest

from gateway_addon.ledger.store import sqlite_files

TABLES = ("calls", "entries", "usage", "audit", "alerts", "noise", "balances", "tokens", "raises", "minutes", "kept_days")


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the numbers of rows that readers fetch from now on, by table.

    SQLite applies the condition of the view before any other that needs the row itself; an index narrows the rows first. The condition
    names a column, or a join would ask it once for all rows that belong to one of another table.
    """
    fetched: Counter[str] = Counter()
    opened = sqlite_files.reader_connection

    def seen(table: str, _column: object) -> int:
        fetched[table] += 1
        return 1

    def open_counted(*arguments, **named):
        db = opened(*arguments, **named)
        db.raw.create_function("seen", 2, seen)
        db.execute("PRAGMA query_only = OFF")
        for table in TABLES:
            [(column, *_)] = db.execute(f"SELECT name FROM pragma_table_info('{table}') WHERE cid = 0").fetchall()
            db.execute(f"CREATE TEMP VIEW {table} AS SELECT * FROM main.{table} WHERE seen('{table}', \"{column}\")")
        db.execute("PRAGMA query_only = ON")
        return db

    monkeypatch.setattr(sqlite_files, "reader_connection", open_counted)
    return fetched
