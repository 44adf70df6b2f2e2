"""Long work on a ledger that a gateway has open: in a thread and on a connection of its own, as a command beside the gateway would do it.

Promises that neither the event loop nor the writer's thread waits for it, and that the end of the process does not either: whoever is
cancelled while it waits goes at once, a file's long statement ends with it, and what was not committed by the process's end is undone.
"""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gateway_addon.ledger import admin
from gateway_addon.ledger.types import ServerAddress

type IsStopped = Callable[[], bool]
"""Whether nobody waits for the answer any more."""


async def read[T](place: Path | ServerAddress, work: Callable[[sqlite3.Connection], T]) -> T:
    """Run a read of one moment of the ledger. Raises LedgerUnavailable."""

    def whole(gone: IsStopped) -> T:
        def beat() -> None:
            if gone():
                raise asyncio.CancelledError

        with admin.reading(place, beat) as db:
            return work(db)

    return await _apart(whole)


async def change[T](place: Path | ServerAddress, work: Callable[[sqlite3.Connection], T]) -> T:
    """Run a change alone in the ledger, in its turn and however long it takes: calls find the ledger held meanwhile. One whose caller is
    cancelled may still be written. Raises what it raises, or LedgerUnavailable."""

    def whole(_: IsStopped) -> T:
        with admin.changing(place) as db:
            return work(db)

    return await _apart(whole)


async def _apart[T](work: Callable[[IsStopped], T]) -> T:
    """Not in the loop's own threads: the loop's end waits for those."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def emit(answer: Callable[[], None]) -> None:
        if not future.done():
            answer()

    def run() -> None:
        try:
            answer = partial(future.set_result, work(future.cancelled))
        except BaseException as error:
            answer = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(emit, answer)

    threading.Thread(target=run, name="ledger-apart", daemon=True).start()
    return await future
