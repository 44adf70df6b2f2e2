"""Write to the ledger, on one thread of the process.

Promises: operations that wait together share one durable commit; the event loop never waits for a disk; an operation marked `lasting`
(a settlement, a void, a release) is retried until it is written, every other one fails as soon as the store does; while the store
fails, the ends of calls are in its journal (a server's has one), so that they outlive this process; the answer given is the truth even
when a commit ended in doubt (the owner's row counts commits, so the next connection can look it up, and keep it from coming later).
Knows neither what the operations mean nor what kind of store it writes to.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store.interface import EVERYTHING, Asked, Store, WriterConnection
from gateway_addon.ledger.types import LedgerUnavailable, RecordedEnd

log = logging.getLogger(__name__)

BATCH_MAX = 256
CROWD = 3  # operations found waiting at once: a sign of load, under which a commit is worth sharing with those to come
GATHER_S = 0.004  # how long a crowd waits for company; one commit costs as much processor time as several operations
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(slots=True)
class Operation:
    """A write. `apply` runs inside a transaction and returns the answer. Lower ranks go first within a batch."""

    apply: Callable[[Connection], object]
    rank: int
    scopes: frozenset[str] = frozenset()
    """The scopes whose balances it judges or changes; EVERYTHING: it may touch any row."""
    asked: Asked | None = None
    """The work of `apply`, where the store may do it with others in one statement."""
    lasting: bool = False
    instead: Callable[[Connection], object] | None = None
    """The replacement for a lasting operation that cannot be stored as it is (a figure beyond 64 bits)."""
    record: RecordedEnd | None = None
    """The record in the store's journal while a lasting operation cannot be written."""
    recorded: bool = False
    wanted: Callable[[], bool] = lambda: True
    """Return False once nobody waits for the answer: the operation is then left out."""
    emit: Callable[[object], None] = lambda answer: None
    """Take the answer or the exception, on the thread that `deliver` chose."""


class Written(NamedTuple):
    operation: Operation
    value: object


class _Doubt(NamedTuple):
    """A commit of which nobody said whether it took place. `answers` None: the store has to find them."""

    number: int
    operations: Sequence[Operation]
    answers: list[Written] | None


type Deliver = Callable[[Sequence[Written]], None]
"""Take answers, on the writer's thread."""

_rank = attrgetter("rank")


class Writer:
    """The writing thread: begin with `start`, hand over with `put`, end with `stop`."""

    def __init__(self, store: Store, deliver: Deliver) -> None:
        self._store = store
        self._deliver = deliver
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._db: WriterConnection | None = None
        self._commits = 0
        self._doubt: _Doubt | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, work: Operation) -> None:
        self._queue.put(work)

    @property
    def waiting(self) -> int:
        """Return the number of operations not yet taken up."""
        return self._queue.qsize()

    def stop(self, timeout_s: float) -> bool:
        """Write the waiting operations and end; False where that took longer (the thread goes on, a sweep settles the rest)."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        kept: list[Operation] = []
        stopping = False
        while not stopping or kept:
            arrived, stop = self._take(wait_s=self._backoff_s() if kept or stopping or self._doubt is not None else None)
            stopping = stopping or stop
            if kept or self._failures:
                self._record(kept + arrived)
            groups = disjoint_groups(kept + arrived, self._store.scopes_max) or [[]]  # with none, a commit may still be in doubt
            kept = self._one_by_one(groups if self._store.near else [run for group in groups for run in batchable_runs(group)])
            if not kept and self._store.journal is not None:
                self._store.journal.clear()
        self._disconnect()
        self._store.close_writer()

    def _take(self, wait_s: float | None) -> tuple[list[Operation], bool]:
        """Take the waiting operations, at most a batch; wait for the first, and in a crowd for others to share its commit.

        The flag says that the end was asked for.
        """
        taken: list[Operation] = []
        stop = self._drain(taken, wait_s)
        if len(taken) >= CROWD and not stop:
            time.sleep(GATHER_S)
            stop = self._drain(taken, 0)
        return taken, stop

    def _drain(self, taken: list[Operation], wait_s: float | None) -> bool:
        """Add the waiting operations, up to a batch, after waiting for a first one. True if the end was asked for."""
        try:
            found = self._queue.get(timeout=wait_s) if wait_s != 0 else self._queue.get_nowait()
            while found is not None:
                taken.append(found)
                if len(taken) >= BATCH_MAX:
                    return False
                found = self._queue.get_nowait()
        except queue.Empty:
            return False
        return True

    def _backoff_s(self) -> float:
        return BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]

    def _one_by_one(self, groups: Sequence[list[Operation]]) -> list[Operation]:
        """Write each group in its own commit; return the operations to be tried again.

        After a failure all that are left go in one commit, so that a silent store is waited for once more, not once a group.
        """
        for number, group in enumerate(groups, start=1):
            kept = self._attempt(group)
            if kept or self._failures:
                later = [operation for group in groups[number:] for operation in group]
                return self._attempt(kept + later) if later else kept
        return []

    def _attempt(self, operations: list[Operation]) -> list[Operation]:
        """Write the operations that are still wanted and deliver the answers; return those to be tried again."""
        operations = sorted((each for each in operations if each.lasting or each.wanted()), key=_rank)
        if not operations and self._doubt is None:
            return []
        try:
            with self._store.turn():
                db = self._connection()
                operations = self._resolve_doubt(db, operations)
                answers = self._transaction(db, operations) if operations else []
        except Exception as error:
            if not isinstance(error, (LedgerUnavailable, *self._store.errors)):
                raise
            return self._failed(operations, error)
        self._failures = 0
        if answers is None:
            return self._one_by_one([[operation] for operation in operations])
        self._deliver(answers)
        return []

    def _connection(self) -> WriterConnection:
        self._store.must_be_unchanged()
        if self._db is None:
            self._db = self._store.connect()
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _transaction(self, db: WriterConnection, operations: Sequence[Operation]) -> list[Written] | None:
        """Write all of them in one commit. None where one breaks it: each is then to have its own commit, to break alone."""
        try:
            return self._commit(db, operations)
        except Exception as error:
            if isinstance(error, LedgerUnavailable) or self._store.is_its_own(error):
                raise
            if len(operations) > 1:
                log.debug("an operation broke its batch; each is tried alone", exc_info=True)
                return None
            failure = error
            log.exception("an operation on the ledger failed")
        [operation] = operations
        if operation.instead is None:
            return [Written(operation, failure)]
        operation.apply, operation.instead, operation.asked = operation.instead, None, None
        return self._transaction(db, operations)

    def _commit(self, db: WriterConnection, operations: Sequence[Operation]) -> list[Written]:
        scopes = frozenset[str]().union(*(operation.scopes for operation in operations))
        answers = self._in_one_statement(db, operations, scopes)
        if answers is None:
            answers = self._statements(db, operations, scopes)
            try:
                self._store.commit(db)
            except BaseException:
                self._doubt = _Doubt(self._commits, operations, answers)
                raise
        return answers

    def _in_one_statement(self, db: WriterConnection, operations: Sequence[Operation], scopes: frozenset[str]) -> list[Written] | None:
        asked = [operation.asked for operation in operations if operation.asked is not None]
        if not asked or len(asked) < len(operations):
            return None
        try:
            said = self._store.batch(db, scopes, asked, self._commits + 1)
        except BaseException:
            if db.in_doubt:
                self._doubt = _Doubt(self._commits + 1, operations, None)
            raise
        if said is None:
            return None
        self._commits += 1
        return [Written(*pair) for pair in zip(operations, said, strict=True)]

    def _statements(self, db: WriterConnection, operations: Sequence[Operation], scopes: frozenset[str]) -> list[Written]:
        try:
            self._store.begin(db, scopes)
            answers = [Written(operation, operation.apply(db)) for operation in operations]
            self._store.stamp(db, self._commits + 1)
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self._commits += 1
        return answers

    def _resolve_doubt(self, db: WriterConnection, operations: list[Operation]) -> list[Operation]:
        """Look up a commit that ended in an error: if it took place, its answers hold and nothing is done again."""
        if self._doubt is None:
            return operations
        number, doubted, answers = self._doubt
        if not self._store.took_place(db, number):
            answers = []
        elif answers is None:
            found = self._store.found(db, [operation.asked for operation in doubted if operation.asked is not None])
            answers = [Written(operation, answer) for operation, answer in zip(doubted, found, strict=True) if answer is not None]
        self._doubt = None
        self._commits = number
        self._deliver(answers)
        written = {id(answer.operation) for answer in answers}
        return [each for each in operations if id(each) not in written]

    def _failed(self, operations: list[Operation], error: Exception) -> list[Operation]:
        """Keep the lasting operations; fail the others at once, or, if the store is only busy, when nobody waits any more."""
        self._disconnect()
        if self._store.is_busy(error):
            return operations
        answer = error if isinstance(error, LedgerUnavailable) else self._store.unavailable(error)
        if self._failures == 0 and self._commits:  # else the opener says why it cannot be opened
            log.error("%s", answer)
        self._failures += 1
        self._deliver([Written(each, answer) for each in operations if not each.lasting])
        time.sleep(0.01)  # a failing store must not be asked as fast as a processor can ask
        return [each for each in operations if each.lasting]

    def _record(self, operations: Sequence[Operation]) -> None:
        """Record the lasting operations that could not be written, or may have to wait, in the store's journal."""
        new = [each for each in operations if each.record is not None and not each.recorded]
        if new and self._store.journal is not None and self._store.journal.keep([each.record for each in new if each.record]):
            for each in new:
                each.recorded = True


def batchable_runs(group: list[Operation]) -> list[list[Operation]]:
    """Divide a group so that what goes to the server in one statement is not held up by the rest; few of them stay where they are.

    The ranks keep their order: a run is written before the next one.
    """
    if sum(operation.asked is not None for operation in group) < CROWD:
        return [group]
    ordered = sorted(group, key=lambda operation: (operation.rank, operation.asked is None))
    return [list(run) for _, run in groupby(ordered, key=lambda operation: operation.asked is None)]


def disjoint_groups(operations: list[Operation], scopes_max: int | None) -> list[list[Operation]]:
    """Group the operations so that no two groups share a scope and each has at most `scopes_max` scopes (None: one group).

    The groups are as few as possible, in the order of their names: two gateways with the same apps then follow each other.
    """
    if scopes_max is None or any(EVERYTHING in operation.scopes for operation in operations):
        return [operations] if operations else []
    bound: dict[str, frozenset[str]] = {}  # by scope: those that must be in its group
    for operation in operations:
        whole = operation.scopes.union(*(bound.get(scope, ()) for scope in operation.scopes))
        bound.update(dict.fromkeys(whole, whole))

    def scopes(operation: Operation) -> list[str]:
        return sorted(whole) if (whole := bound.get(next(iter(operation.scopes), ""))) else []

    groups: list[list[Operation]] = []
    held = 0
    for wanted, together in groupby(sorted(operations, key=scopes), key=scopes):
        if not groups or held + len(wanted) > scopes_max:
            groups.append([])
            held = 0
        groups[-1] += together
        held += len(wanted)
    return groups
