"""Open a session on a PostgreSQL server: its settings, its connections, the meaning of its errors.

Promises that every wait of a gateway has a limit, and that an error comes out as one sentence without a secret in it. Knows nothing of
owners, leases or calls.
"""

import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import psycopg
from psycopg import pq
from psycopg.adapt import Dumper, Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.numeric import Int8Dumper

from gateway_addon.ledger.sql import Row, Statement
from gateway_addon.ledger.store import engines
from gateway_addon.ledger.types import LedgerUnavailable, ServerAddress
from gateway_addon.names import PROGRAM

SESSION = {
    # milliseconds unless said. The gateway answers its caller after two seconds; nothing of it stays behind on the server.
    "search_path": "gateway",
    "statement_timeout": "1500",
    "lock_timeout": "1000",
    "idle_in_transaction_session_timeout": "5000",  # a gateway that froze in the middle lets its locks go
    "default_transaction_isolation": "read committed",
}
PATIENT = SESSION | {"statement_timeout": "0", "lock_timeout": "10000", "idle_in_transaction_session_timeout": "0"}
"""Settings for commands: a report may take long, and a person may wait for a lock."""
CONNECT = {
    "connect_timeout": 2,  # seconds; libpq takes no less
    "tcp_user_timeout": 2000,
    "keepalives_idle": 5,
    "keepalives_interval": 1,
    "keepalives_count": 3,
}
SILENCE_S = 2.5  # a second beyond the server's own limit for a statement
LOOK_S = 0.1  # how often a wait looks at the clock

BEHIND = f"the ledger on {{at}} is an older version's: `{PROGRAM} init` brings it up to date"
_SENTENCES = {
    # by SQLSTATE, or its first two characters
    "25006": "the ledger's server {at} is read-only (a standby?): point --ledger at the primary",
    "42P01": f"the database on {{at}} has no ledger: `{PROGRAM} init` makes one",
    "42703": BEHIND,
    "3F000": f"the database on {{at}} has no ledger: `{PROGRAM} init` makes one",
    "42501": "the ledger's user on {at} lacks a privilege",
    "53100": "the disk of the ledger's server {at} is full: free some space, the gateway goes on by itself",
    "55P03": "the ledger on {at} was held too long by another gateway or a person's transaction",
    "57014": "the ledger's server {at} is too slow",
    "57P": "the ledger's server {at} is shutting down or starting: the gateway goes on by itself when it is back",
}
_BUSY = {"40001", "40P01", "55P03"}


class NamedRow(tuple[Any, ...]):
    """A row by position and by name, as sqlite3.Row is."""

    names: tuple[str, ...] = ()

    def __getitem__(self, key: Any) -> Any:
        return tuple.__getitem__(self, self.names.index(key) if isinstance(key, str) else key)

    def keys(self) -> tuple[str, ...]:
        return self.names


def named_rows(cursor: psycopg.Cursor[Any]) -> Callable[[Sequence[Any]], NamedRow]:
    names = tuple(column.name for column in cursor.description or ())
    return type("Row", (NamedRow,), {"names": names})


class _Whole(Loader):
    """Load NUMERIC as int: sums of BIGINTs come so, and all amounts here are whole."""

    def load(self, data: Any) -> int:
        return int(bytes(data))


class _Truth(Dumper):
    """Load booleans as 1 and 0, as in a ledger in a file."""

    oid = psycopg.adapters.types["int8"].oid

    def dump(self, obj: Any) -> bytes:
        return b"1" if obj else b"0"


class Limited(psycopg.Connection[Any]):
    """A gateway's connection, whose waits have a limit on this side.

    Neither TCP nor the server's own limits notice a server that went silent with the connection open (a dead switch, a frozen
    proxy that still acknowledges): the client must give up by itself.
    """

    def wait(self, gen: Any, interval: float = LOOK_S, timeout: float | None = None) -> Any:
        return super().wait(gen, interval, SILENCE_S if timeout is None else timeout)


class ServerConnection:
    """A connection to a ledger's server. Transactions are begun by hand."""

    __slots__ = ("raw",)
    engine = engines.POSTGRESQL

    def __init__(self, raw: psycopg.Connection[Any]) -> None:
        self.raw = raw
        raw.adapters.register_loader("numeric", _Whole)
        raw.adapters.register_dumper(int, Int8Dumper)  # one type for every amount: a product of two small ones must not overflow
        raw.adapters.register_dumper(bool, _Truth)

    def execute(self, statement: str | Statement, values: Any = ()) -> psycopg.Cursor[Row]:
        if isinstance(statement, str):
            return self.raw.execute(statement.encode(), values)
        return self.raw.execute(statement.numbered.encode(), [values[name] for name in statement.names])

    def executemany(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        self.raw.cursor().executemany(statement.encode(), rows)

    @property
    def in_transaction(self) -> bool:
        return self.raw.info.transaction_status in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)

    @property
    def in_doubt(self) -> bool:
        return self.raw.info.transaction_status in (pq.TransactionStatus.ACTIVE, pq.TransactionStatus.UNKNOWN)

    def close(self) -> None:
        self.raw.close()


def defaults(server: ServerAddress) -> dict[str, Any]:
    """Return the connection parameters for what the address does not say."""
    given = conninfo_to_dict(server.url)
    ours = {"application_name": f"gateway {socket.gethostname()} {os.getpid()}", **CONNECT}
    return {name: value for name, value in ours.items() if name not in given}


def connect(
    server: ServerAddress, session: Mapping[str, str] = SESSION, kind: type[psycopg.Connection[Any]] = psycopg.Connection
) -> ServerConnection:
    """Open a connection with the ledger's settings. Raises psycopg.Error, LedgerUnavailable where there is no ledger."""
    raw = kind.connect(server.url, autocommit=True, cursor_factory=psycopg.RawCursor, **defaults(server))
    try:
        settle_in(raw, session)
    except BaseException:
        raw.close()
        raise
    return ServerConnection(raw)


def settle_in(raw: psycopg.Connection[Any], session: Mapping[str, str] = SESSION) -> None:
    """Set a session up, with durable commits even where the server's default is otherwise."""
    settings = ", ".join(f"set_config(${first}, ${first + 1}, false)" for first in range(1, 2 * len(session), 2))
    raw.execute(f"SELECT {settings}".encode(), [word for pair in session.items() for word in pair])
    raw.execute("SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'")


def unavailable(server: ServerAddress, error: Exception) -> LedgerUnavailable:
    """Return the sentence for an error of the server. The driver's own words follow, without secrets."""
    state = getattr(error, "sqlstate", None) or ""
    known = [_SENTENCES[code] for code in (state, state[:3], state[:2]) if code in _SENTENCES]
    sentence = known[0] if known else "the ledger's server {at} gives no connection"
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    words = primary or " ".join(str(error).split())
    password = conninfo_to_dict(server.url).get("password")
    return LedgerUnavailable(f"{sentence.format(at=server)} ({words.replace(str(password), '***') if password else words})")


def is_its_own(error: Exception) -> bool:
    own = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | psycopg.InternalError)
    return own or getattr(error, "sqlstate", None) in _SENTENCES


def is_busy(error: Exception) -> bool:
    """Return whether another session held a lock."""
    return getattr(error, "sqlstate", None) in _BUSY
