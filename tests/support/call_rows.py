"""Calls as the ledger has them, each with its entries, read from the file by SQL alone."""

import contextlib
import sqlite3
from typing import NamedTuple

ROWS = """
  SELECT state, flags, grant_nano, sum(kind IN ('settle', 'void')), sum(spent_nano)
  FROM calls JOIN entries ON call_id = calls.id GROUP BY calls.id ORDER BY calls.id
"""


class Call(NamedTuple):
    state: str
    flags: list[str]
    grant_nano: int
    resolutions: int
    spent_nano: int

    @property
    def reason(self) -> str:
        """Why it is an estimate, the one reason; empty if it is none."""
        reasons = [flag for flag in self.flags if flag.startswith("estimated:")]
        assert len(reasons) <= 1
        return reasons[0] if reasons else ""


def calls(folder) -> list[Call]:
    """The ledger's rows, each with its entries."""
    with contextlib.closing(sqlite3.connect(folder / "gateway.db")) as db:
        rows = db.execute(ROWS).fetchall()
    return [Call(state, flags.split(), *numbers) for state, flags, *numbers in rows]
