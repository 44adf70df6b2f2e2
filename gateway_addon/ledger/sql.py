"""The form of the ledger's statements: one text that SQLite and PostgreSQL both take, with nothing rewritten when it runs.

- Values stand as `$1`, `$2`, ...: `db.execute("... WHERE id = $1 AND app = $2", (id, app))`. A number may stand in several places.
- A statement of many values has names: `TAKE = named("... > $now ...")` where its module is loaded, then `db.execute(TAKE, {"now": now})`.
  SQLite takes them in the order in which they stand there, PostgreSQL by the numbers that `named` gave them. Values that the statement
  does not use may be there.
- `"window"` is quoted (a keyword of PostgreSQL). Types in a CAST: BIGINT, DOUBLE PRECISION, TEXT.
- To hold SQLite to an order of joining: `a CROSS JOIN b WHERE b.a_id = a.id`, which PostgreSQL reads as any other join.
- What the engines say differently has a name in `Engine`: `f"... {db.engine.instr}(flags, 'drift') > 0"`. There is no other place for it.

Knows nothing of files, servers or drivers: `store/engines.py` has the two engines' words.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, NamedTuple, Protocol, overload

type Row = Any
"""A row by position; by name too where the connection was opened so (`connect.reading`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """The words of one engine, where the other has different ones."""

    instr: str
    """The function that finds a text in another: 1 or more, or 0."""
    whole: str
    """The whole part of a positive number, `{}`, as an integer."""
    json_value: str
    """The value, as text or number, under a key `{1}` of a JSON object `{0}`; NULL where there is none."""
    balance_of_cap: str
    """A join of the row `cap` (scope, window, window_start) with its balance, if it has any: as `balance`, or a part's as `part`."""
    labels: str
    """A call's labels, as what `->>` takes a value from."""
    clear_balances: str
    fill_balances: str
    integer: str
    """The type of a column of whole numbers."""
    real: str
    strict: str
    """The words after a new table with a primary key of its own: it keeps to its types."""


class Rows(Protocol):
    """The rows that a statement gave, or how many it changed."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Row: ...
    def fetchmany(self, size: int, /) -> list[Row]: ...
    def fetchall(self) -> list[Row]: ...
    def __iter__(self) -> Iterator[Row]: ...


class Connection(Protocol):
    """A connection to a ledger, of either engine."""

    @property
    def engine(self) -> Engine: ...

    @overload
    def execute(self, statement: str, values: Sequence[object] = (), /) -> Rows: ...
    @overload
    def execute(self, statement: "Statement", values: Mapping[str, object], /) -> Rows: ...

    def executemany(self, statement: str, rows: Iterable[Sequence[object]], /) -> object:
        """Run a statement once for each row of values."""


class Statement(NamedTuple):
    """A statement whose values have names, and with numbers in their place."""

    text: str
    numbered: str
    names: tuple[str, ...]
    """The name of each number's value."""


class _Numbers(dict[str, str]):
    def __missing__(self, name: str) -> str:
        self[name] = f"${len(self) + 1}"
        return self[name]


def named(text: str) -> Statement:
    """Number the values of a statement that is written with names: `$app` becomes `$1`, everywhere."""
    numbers = _Numbers()
    return Statement(text, Template(text).substitute(numbers), tuple(numbers))


def numbers(count: int, first: int = 1) -> str:
    """Return so many values' places: `$1, $2, $3`."""
    return ", ".join(f"${number}" for number in range(first, first + count))
