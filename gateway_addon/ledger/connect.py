"""Open a ledger: to read one moment of it, to write in one transaction, or to keep it open for a gateway.

The engine is chosen here and nowhere else, by where the ledger is: a path is a file's, an address a PostgreSQL server's, whose driver is
imported when it is needed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store.interface import Place, Store
from gateway_addon.ledger.store.sqlite import FileLedger
from gateway_addon.ledger.types import LedgerUnavailable, ServerAddress
from gateway_addon.names import install

DRIVER = "psycopg[binary]"
type ReadConnection = Connection
"""One moment of a ledger, as `reading` yields it, for rooms that only pass it on."""


def at(place: Path | ServerAddress) -> Place:
    """Return what opens the ledger of this place. Raises LedgerUnavailable where its driver is not installed."""
    if isinstance(place, Path):
        return FileLedger(place)
    try:
        from gateway_addon.ledger.store.postgres import ServerLedger
    except ImportError as error:
        raise LedgerUnavailable(f"a ledger on PostgreSQL needs its driver: {install(DRIVER)} ({error})") from error
    return ServerLedger(place)


def create(place: Path | ServerAddress, zone: str = "UTC") -> None:
    """Make an empty ledger, or bring an existing one up to date. Raises LedgerUnavailable."""
    at(place).create(zone)


def changing(place: Path | ServerAddress) -> AbstractContextManager[Connection]:
    """Open a command's write transaction, in its turn among the gateway's processes. Raises LedgerUnavailable."""
    return at(place).changing()


def reading(
    place: Path | ServerAddress, tick: Callable[[], None] = lambda: None, *, as_it_is: bool = False
) -> AbstractContextManager[Connection]:
    """Open a connection that sees one moment of the ledger and cannot write; rows by name. Raises LedgerUnavailable.

    A long statement on a file calls `tick` some times a second, and can be ended by Ctrl-C in between. An older version's file is
    brought up to date first, unless it is wanted `as_it_is`.
    """
    return at(place).reading(tick, as_it_is=as_it_is)


def death_check(place: Path | ServerAddress, db: Connection) -> Callable[[str], bool]:
    """Return a function that says whether an owner's process is gone. A batch has no process: it waits for its results."""
    return at(place).death_check(db)


def store(place: Path | ServerAddress, timeout_s: float) -> Store:
    """Return the store of a gateway's process. Raises LedgerUnavailable."""
    return at(place).store(timeout_s)
