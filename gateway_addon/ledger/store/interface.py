"""What the ledger asks of the place where it is kept: a file of SQLite's (sqlite.py) or a PostgreSQL server (postgres.py).

The money's statements (book.py and its neighbours) are written once; what differs between the two engines is here by name: how a
connection is made, how writers take turns, what a commit is stamped with, which errors are the place's own.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from gateway_addon.ledger.store.journal import Journal, LeftJournal
from gateway_addon.ledger.types import LedgerUnavailable, ServerAddress

EVERYTHING = "*"
"""Among the scopes of an operation: it may touch any row, nothing else may write beside it."""


@contextlib.contextmanager
def driver() -> Iterator[None]:
    """Around the import of postgres.py. Raises LedgerUnavailable where its driver is not installed."""
    try:
        yield
    except ImportError as error:
        raise LedgerUnavailable(f"a ledger on PostgreSQL needs its driver: pip install 'gateway-addon[postgres]' ({error})") from error


def must_be_known(ledger: Path | ServerAddress, applied: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a ledger whose tables a newer gateway has changed: this version's statements do not keep its rules.

    Both are names of migrations. Raises LedgerUnavailable.
    """
    if newer := sorted(set(applied) - set(known)):
        sentence = f"the ledger {ledger} is a newer gateway's ({', '.join(newer)} changed its tables): update this gateway, then restart it"
        raise LedgerUnavailable(sentence)


class Store(Protocol):
    errors: tuple[type[Exception], ...]
    """What its driver raises."""
    near: bool
    """A statement takes microseconds and waits for nothing: a batch's statements run on the event loop."""
    skew_s: int
    """By how many whole seconds the ledger's clock is ahead of this machine's."""

    scopes_max: int | None
    """How many scopes a commit may hold from the other writers at once; None: all that come, since they wait for the whole ledger."""

    @property
    def heartbeat_s(self) -> float | None:
        """How often a process must show that it lives; None where the operating system knows."""

    @property
    def lease_left_s(self) -> float:
        """For how long, at least, no other process may settle this one's calls."""

    @property
    def journal(self) -> Journal | None:
        """Where settlements outlive this process while they cannot be written; None where the ledger is as near as a journal would be."""

    def unwritten_journals(self) -> AbstractContextManager[Sequence[LeftJournal]]:
        """The journals of dead processes of this machine, held until they are dealt with."""

    @property
    def owner(self) -> str:
        """This process's name in the ledger."""

    def connect(self) -> sqlite3.Connection:
        """A connection that writes, for the writer's thread, with this process entered as an owner. Raises `errors`, LedgerUnavailable."""

    def still(self) -> None:
        """Raises LedgerUnavailable unless this is the ledger that was opened."""

    def turn(self) -> AbstractContextManager[None]:
        """The writer's turn among the processes, taken before `begin`."""

    def turn_now(self) -> Callable[[], None] | None:
        """The same where it is to be had without waiting, and what ends it; None where it is not, as on a server."""

    def begin(self, db: sqlite3.Connection, scopes: Collection[str]) -> None:
        """Begin a transaction that may judge and change the balances of `scopes`, alone in each of them until its commit."""

    def stamp(self, db: sqlite3.Connection, number: int) -> None:
        """Note, inside the transaction, that this owner commits for the `number`th time. Raises LedgerUnavailable if it may not:
        its lease ran out, or a newer gateway has changed the tables since."""

    def commit(self, db: sqlite3.Connection) -> None:
        """Make the transaction durable."""

    def commits(self, db: sqlite3.Connection) -> int | None:
        """The number of the owner's last commit; None where the ledger does not know the owner."""

    def dead(self, db: sqlite3.Connection) -> list[str]:
        """The owners that live no longer and have not been swept."""

    def sweep(self, db: sqlite3.Connection, now: float) -> int:
        """Settle what dead owners left open; returns how many calls. In a transaction on EVERYTHING."""

    async def read[T](self, read: Callable[[sqlite3.Connection], T]) -> T:
        """Run a read on the request's path. Raises LedgerUnavailable."""

    def unavailable(self, error: Exception) -> LedgerUnavailable:
        """The sentence for an error of the place."""

    def is_its_own(self, error: Exception) -> bool:
        """True where the place failed, False where one operation did (a constraint, a wrong value)."""

    def is_busy(self, error: Exception) -> bool:
        """True where somebody else held what was wanted: to be tried again as long as somebody waits."""

    def hang_up(self) -> None:
        """The writer's thread has ended: let go of its turns."""

    async def close(self) -> None:
        """Let go of the readers, and say goodbye as an owner."""
