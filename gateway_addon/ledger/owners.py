"""Reservations whose process died: found by its lock, settled at what they hold.

A dead process cannot say what its calls cost, and the provider bills them all the same, so an orphan is never given back by a
clock; `gateway reconcile` corrects the estimate later. A living sibling's reservations are left alone.
"""

import os
import socket
import sqlite3
from pathlib import Path

from gateway_addon.ledger import book
from gateway_addon.ledger.locks import bury, is_dead
from gateway_addon.ledger.values import Outcome, Settlement

ORPHAN = Settlement(cost_nano=None, outcome=Outcome(flags=("estimated", "orphan")))
RATES_KEPT_S = 3600


def enrol(db: sqlite3.Connection, owner: str, *, now: float) -> None:
    """Enter a process into the ledger; its lock is held already."""
    db.execute("INSERT INTO owners (id, pid, host, started_at) VALUES (?, ?, ?, ?)", (owner, os.getpid(), socket.gethostname(), now))


def sweep(db: sqlite3.Connection, ledger: Path, *, now: float) -> int:
    """Settle the open reservations of dead owners; returns how many. Inside a write transaction."""
    known = [owner for (owner,) in db.execute("SELECT id FROM owners UNION SELECT owner FROM calls WHERE state = 'open'").fetchall()]
    swept = 0
    for owner in known:
        if not is_dead(ledger, owner):
            continue
        orphans = db.execute(book.OPEN_OF_OWNER, (owner,)).fetchall()
        swept += sum(book.settle(db, call_id, ORPHAN, now=now).first for (call_id,) in orphans)
        db.execute("DELETE FROM owners WHERE id = ?", (owner,))
        bury(ledger, owner)
    db.execute("DELETE FROM minutes WHERE minute < ?", (int(now - RATES_KEPT_S) // 60,))
    return swept
