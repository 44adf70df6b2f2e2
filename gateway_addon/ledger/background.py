"""Run long reads or changes of an open ledger in a daemon thread with its own connection.

Promises that the event loop and the writer's thread never wait for this work, and the end of the process for a moment only (`ended`). A
caller that is cancelled while it waits goes at once, and a file's long statement ends with it. A change that is not committed when the
process ends is undone.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gateway_addon.ledger import connect
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.types import ServerAddress

NAME = "ledger-background"
MOMENT_S = 1.0

type IsStopped = Callable[[], bool]
"""Return whether nobody waits for the answer any more."""


async def read[T](place: Path | ServerAddress, work: Callable[[Connection], T]) -> T:
    """Run a read of one moment of the ledger. Raises LedgerUnavailable."""

    def whole(gone: IsStopped) -> T:
        def tick() -> None:
            if gone():
                raise asyncio.CancelledError

        with connect.reading(place, tick) as db:
            return work(db)

    return await _in_thread(whole)


async def change[T](place: Path | ServerAddress, work: Callable[[Connection], T]) -> T:
    """Run a change alone in the ledger, however long it takes: calls find the ledger held meanwhile.

    A change whose caller is cancelled may still be written. Raises the change's own error, or LedgerUnavailable.
    """

    def whole(_: IsStopped) -> T:
        with connect.changing(place) as db:
            return work(db)

    return await _in_thread(whole)


async def _in_thread[T](work: Callable[[IsStopped], T]) -> T:
    """Run work in a thread of its own: the end of the loop would wait for the loop's threads."""
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

    threading.Thread(target=run, name=NAME, daemon=True).start()
    return await future


async def ended() -> None:
    """Wait until no work is under way in this process, for a moment at most.

    A thread in the middle of SQLite's or the driver's code when the interpreter ends can end the process with a segmentation fault.
    """
    until_s = time.monotonic() + MOMENT_S
    for thread in threading.enumerate():
        if thread.name == NAME:
            await asyncio.to_thread(thread.join, max(0.0, until_s - time.monotonic()))
