"""Gather the operations of one moment on the event loop for one durable commit on the writer's thread (group commit).

Promises that the loop waits for nobody. On a store that is near, a batch begins on the loop itself: its statements run there, in a turn
that is free at that moment, and only the commit goes to the thread. Where the turn is not free, or anything fails, the operations go to
the thread whole, because it can wait; while the thread fails, so do all that follow. A lone call so costs one hand-over to the thread
and one back, instead of one for each lock and statement, and each of them costs more than the statements do. Knows nothing of what the
operations mean, nor of files and servers.
"""

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Sequence
from typing import Literal

from gateway_addon.ledger.store.interface import Store
from gateway_addon.ledger.store.writer import BATCH_MAX, CROWD, GATHER_S, LINGER_S, BegunCommit, Operation, Writer, Written

log = logging.getLogger(__name__)

TRY_S, TRIES = 0.001, 10  # for a turn that is not free


class CommitQueue:
    """A queue made on the loop whose operations it takes. `start` it, `put` operations in, `stop` it."""

    def __init__(self, store: Store) -> None:
        self._loop = asyncio.get_running_loop()
        self._begins_here = store.near
        self.writer = Writer(store, self._deliver, *((self._on_the_loop,) if store.near else ()))
        self._thread: Literal["rests", "commits", "works"] = "rests" if store.near else "works"
        self._given = 0
        self._waiting: list[Operation] = []
        self._beginning: asyncio.Handle | None = None
        self._soon = False
        """True: the waiting operations begin in the loop's next turns; else they linger."""

    def start(self) -> None:
        self.writer.start()

    async def stop(self, timeout_s: float) -> bool:
        """Write the waiting operations and end; False where that took longer."""
        self._begins_here = False
        self._to_the_thread()
        ended = await asyncio.to_thread(self.writer.stop, timeout_s)
        await asyncio.sleep(0)  # the last batch's answers
        return ended

    @property
    def waiting(self) -> int:
        """Return the number of operations not yet taken up."""
        return len(self._waiting) + self.writer.waiting

    def put(self, operation: Operation) -> None:
        if self._thread == "works":
            self._hand_over(operation)
            return
        self._waiting.append(operation)
        if self._thread == "rests":
            self._plan(operation.may_linger)

    # from the loop to the thread

    def _plan(self, may_linger: bool) -> None:
        """Plan the next batch: soon if a caller waits for it, else a moment later."""
        if self._soon or (may_linger and self._beginning is not None):
            return
        if self._beginning is not None:
            self._beginning.cancel()
        self._soon = not may_linger
        if may_linger:
            self._beginning = self._loop.call_later(LINGER_S, self._begin)
        else:
            self._beginning = self._loop.call_soon(self._gather, 0, self._loop.time() + GATHER_S)

    def _gather(self, found: int, until: float) -> None:
        """Wait for more operations while each turn of the loop brings some, but never while the loop is idle."""
        now_found = len(self._waiting)
        if now_found >= CROWD and now_found > found and self._loop.time() < until:
            self._beginning = self._loop.call_soon(self._gather, now_found, until)
        else:
            self._begin()

    def _begin(self, tries: int = 0) -> None:
        self._beginning, self._soon = None, False
        self._waiting = [operation for operation in self._waiting if operation.lasting or operation.wanted()]
        if not self._waiting:
            return
        release_turn = self.writer.try_turn()
        if release_turn is None and tries < TRIES:  # another process's turn is short; the thread would have to get in line for it
            self._beginning, self._soon = self._loop.call_later(TRY_S, self._begin, tries + 1), True
            return
        batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
        begun = self.writer.begin(batch, release_turn) if release_turn is not None else None
        self._thread = "commits"
        for work in batch if begun is None else [begun]:
            self._hand_over(work)

    def _to_the_thread(self) -> None:
        self._thread = "works"
        if self._beginning is not None:
            self._beginning.cancel()
        self._beginning, self._soon = None, False
        waiting, self._waiting = self._waiting, []
        for operation in waiting:
            self._hand_over(operation)

    def _hand_over(self, work: Operation | BegunCommit) -> None:
        self._given += 1
        self.writer.put(work)

    # from the thread to the loop

    def _deliver(self, answers: Sequence[Written], dealt_with: int | None) -> None:
        """Deliver answers, on the thread: wake the loop once a batch, and when the thread rests if a batch may then begin."""
        if not answers and not self._begins_here:
            return
        try:
            self._loop.call_soon_threadsafe(self._receive, answers, dealt_with)
        except RuntimeError:
            log.debug("the loop ended before %d answers of the ledger", len(answers))

    def _receive(self, answers: Sequence[Written], dealt_with: int | None) -> None:
        for answer in answers:
            answer.operation.emit(answer.value)
        if dealt_with == self._given and self._begins_here:
            self._thread = "rests"
            if self._waiting:
                self._plan(all(operation.may_linger for operation in self._waiting))
        elif self.writer.failing and self._thread == "commits":
            self._to_the_thread()

    def _on_the_loop(self, work: Callable[[], list[Written]]) -> list[Written]:
        """Run statements on the loop, called on the thread: between the lock and the commit that the thread waits for."""
        outcome: concurrent.futures.Future[list[Written]] = concurrent.futures.Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:  # the loop has ended: what is left is this thread's alone
            return work()
        return outcome.result()
