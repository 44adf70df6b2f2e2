"""A clock for a test whose client, gateway and API run in one event loop: it passes while they wait, and not while they work.

Where nothing is left to do before the next timer, its time comes at once. So a stream of a minute takes as long as its work, and a
machine that is busy, or stands still for a second, changes nothing of what a test sees.
"""

import asyncio
import time

import pytest

from gateway_addon.clocks import Clocks
from gateway_addon.ledger.store.writer import Operation, Writer

MOMENT_S = 0.0005
"""How long the loop looks for what its own sockets bring: what one end has written is there for the other at once."""

SLOWLY = 20
"""How much slower it goes while the ledger's thread is at work, which may have to wait for the machine."""


def pass_while_idle(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Put the clock into a loop that runs; returns it for the gateway. What another thread does takes the time that it takes."""
    began_at, now_s, writes, threads = time.time(), [loop.time()], set[object](), set[object]()
    began_s, real_s, select, run_in_executor, put = now_s[0], [time.monotonic()], loop._selector.select, loop.run_in_executor, Writer.put

    def look(timeout_s: float | None) -> list[object]:
        if timeout_s is None or timeout_s <= 0 or writes or threads:
            found = select(timeout_s)
        elif not (found := select(MOMENT_S)):
            now_s[0] += timeout_s + 1e-6  # more than is lost in rounding: who asks for the time now finds it past
        passed_s, real_s[0] = time.monotonic() - real_s[0], time.monotonic()
        if writes or threads:
            now_s[0] += min(passed_s, MOMENT_S if found else timeout_s or MOMENT_S) / (1 if threads else SLOWLY) + 1e-6
        return found

    def in_executor(*arguments: object) -> asyncio.Future[object]:
        future = run_in_executor(*arguments)
        threads.add(future)
        future.add_done_callback(threads.discard)
        return future

    def counted(writer: Writer, work: Operation) -> None:
        writes.add(number := object())
        emit = work.emit

        def told(answer: object) -> None:
            writes.discard(number)
            emit(answer)

        work.emit = told
        put(writer, work)

    monkeypatch.setattr(loop, "time", lambda: now_s[0])
    monkeypatch.setattr(loop._selector, "select", look)
    monkeypatch.setattr(loop, "run_in_executor", in_executor)
    monkeypatch.setattr(Writer, "put", counted)
    return Clocks(now=lambda: began_at + now_s[0] - began_s, monotonic_s=lambda: loop.time())
