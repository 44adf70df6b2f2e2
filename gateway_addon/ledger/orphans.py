"""Settle the reservations of dead processes: at the held amount, or as the process had written down. The store knows who is dead.

A dead process cannot say what its calls cost, and the provider bills them all the same, so an orphan is never given back by a
clock; `gateway reconcile` corrects the estimate later. A living sibling's reservations are left alone.
"""

from collections.abc import Iterable

from gateway_addon.ledger import reservations
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.types import Outcome, RecordedEnd, Resolution, Settlement

BATCHES = "batches"
"""The owner of the reservation of a batch that the provider has taken: no process, so no death can sweep it."""

SWEPT_AT_ONCE = 50
"""Calls in one commit: nothing else is written meanwhile, and a server takes a millisecond for each."""
ORPHAN = Settlement(cost_nano=None, outcome=Outcome(flags=("estimated", "orphan")))


def known(db: Connection) -> list[str]:
    """Return every process that was entered as an owner or has open reservations."""
    every = "SELECT id FROM owners UNION SELECT owner FROM calls WHERE state = 'open' AND owner <> $1"
    return [owner for (owner,) in db.execute(every, (BATCHES,)).fetchall()]


def resume(db: Connection, ending: RecordedEnd) -> Resolution | None:
    """Resolve a call as its dead process recorded its end. None where the call is not here: the ledger was restored since."""
    known = db.execute("SELECT 1 FROM calls WHERE id = $1 AND owner = $2", (ending.call_id, ending.owner)).fetchall()
    return reservations.end(db, ending) if known else None


def settle_orphans(db: Connection, dead: Iterable[str], *, now: float) -> int:
    """Settle the open reservations of these owners, `SWEPT_AT_ONCE` at most, and strike off who has none left; returns how many.

    Inside a write transaction.
    """
    swept = 0
    for owner in dead:
        orphans = db.execute(reservations.OPEN_OF_OWNER, (owner, SWEPT_AT_ONCE - swept)).fetchall()
        swept += sum(reservations.settle(db, call_id, ORPHAN, now=now).first for (call_id,) in orphans)
        if swept >= SWEPT_AT_ONCE:
            break
        db.execute("DELETE FROM owners WHERE id = $1", (owner,))
    return swept
