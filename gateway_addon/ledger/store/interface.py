"""The interface of a store: an SQLite file (sqlite.py) or a PostgreSQL server (postgres.py).

The statements about money (reservations.py and its neighbours) are written once; the differences between the engines are named here:
how a connection is made, how writers take turns, what a commit is stamped with, which errors are the store's own.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store.journal import Journal, LeftJournal
from gateway_addon.ledger.types import LedgerUnavailable, RecordedEnd, Reservation, ServerAddress

EVERYTHING = "*"
"""The scope of an operation that may touch any row: nothing else may write at that time."""


type Asked = Reservation | RecordedEnd
"""Work that a store may do with other work of its kind in one statement."""


def must_be_known(ledger: Path | ServerAddress, applied: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a ledger whose tables a newer gateway has changed: this version's statements do not keep its rules.

    Both are names of migrations. Raises LedgerUnavailable.
    """
    if newer := sorted(set(applied) - set(known)):
        sentence = f"the ledger {ledger} is a newer gateway's ({', '.join(newer)} changed its tables): update this gateway, then restart it"
        raise LedgerUnavailable(sentence)


class WriterConnection(Connection, Protocol):
    @property
    def in_transaction(self) -> bool: ...
    @property
    def in_doubt(self) -> bool:
        """Return whether nobody said how the last statement ended."""

    def close(self) -> None: ...


class Store(Protocol):
    errors: tuple[type[Exception], ...]
    """The exceptions of the driver."""
    near: bool
    """A statement takes microseconds and waits for nothing."""
    skew_s: int
    """By how many whole seconds the ledger's clock is ahead of this machine's."""

    scopes_max: int | None
    """How many scopes one commit may lock; None: any number, since writers take turns for the whole ledger."""

    @property
    def heartbeat_s(self) -> float | None:
        """Return how often a process must show that it lives; None where the operating system knows."""

    @property
    def lease_left_s(self) -> float:
        """Return for how long, at least, no other process may settle this one's calls."""

    @property
    def journal(self) -> Journal | None:
        """Return the journal that keeps unwritten settlements beyond this process; None where the ledger is on this disk."""

    def unwritten_journals(self) -> AbstractContextManager[Sequence[LeftJournal]]:
        """Hold the journals of this machine's dead processes until they are dealt with."""

    @property
    def owner(self) -> str:
        """Return this process's name in the ledger."""

    def connect(self) -> WriterConnection:
        """Open the writer thread's connection, with this process entered as an owner. Raises `errors`, LedgerUnavailable."""

    def must_be_unchanged(self) -> None:
        """Raise LedgerUnavailable unless this is the ledger that was opened."""

    def turn(self) -> AbstractContextManager[None]:
        """Take the writer's turn among the processes, before `begin`."""

    def begin(self, db: Connection, scopes: Collection[str]) -> None:
        """Begin a transaction that may judge and change the balances of `scopes`, alone in each of them until its commit."""

    def batch(self, db: Connection, scopes: Collection[str], asked: Sequence[Asked], number: int) -> list[object] | None:
        """Do all that is asked in one statement: stamped, and durable when it returns. None: nothing was done, and it goes one by one."""

    def found(self, db: Connection, asked: Sequence[Asked]) -> list[object]:
        """Return the answers to the last batch that took place, by what it wrote; None where that is nothing, to be asked again."""

    def stamp(self, db: Connection, number: int) -> None:
        """Note, inside the transaction, that this owner commits for the `number`th time.

        Raises LedgerUnavailable if it may not: its lease ran out, or a newer gateway has changed the tables since.
        """

    def commit(self, db: Connection) -> None:
        """Make the transaction durable."""

    def took_place(self, db: Connection, number: int) -> bool:
        """Return whether the owner's commit of this number took place. If not, it cannot any more, though it may still be under way."""

    def dead(self, db: Connection) -> list[str]:
        """Return the dead owners that have not been swept."""

    def sweep(self, db: Connection, now: float) -> int:
        """Settle the next open calls of dead owners (`orphans.SWEPT_AT_ONCE`); return how many. In a transaction on EVERYTHING."""

    async def read[T](self, read: Callable[[Connection], T]) -> T:
        """Run a read on the request's path. Raises LedgerUnavailable."""

    def unavailable(self, error: Exception) -> LedgerUnavailable:
        """Return the sentence for an error of the store."""

    def is_its_own(self, error: Exception) -> bool:
        """Return whether the store failed, and not one operation (a constraint, a wrong value)."""

    def is_busy(self, error: Exception) -> bool:
        """Return whether another process held a lock: try again as long as a caller waits."""

    def close_writer(self) -> None:
        """Close the writer's locks, when its thread has ended."""

    async def close(self) -> None:
        """Close the readers, and end this process's ownership."""


class Place(Protocol):
    """A ledger's file or server: how it is opened. Every method raises LedgerUnavailable; `connect` says what each promises."""

    def create(self, zone: str) -> None: ...
    def changing(self) -> AbstractContextManager[Connection]: ...
    def reading(self, tick: Callable[[], None], *, as_it_is: bool) -> AbstractContextManager[Connection]: ...
    def death_check(self, db: Connection) -> Callable[[str], bool]: ...
    def store(self, timeout_s: float) -> Store: ...
