"""What arrives on a socket, taken to its connection's layers at once.

mitmproxy reads by a task for each connection: the bytes go into a buffer, a future wakes the task in the loop's next turn, and the task
takes them to the layers, then waits anew. Here the transport hands them over itself. Promises the same events in the same order, nothing
after the moment in which the task was told to end, and no reading on while somebody is slow to take what was written. All else that
happens to a connection (its end, its errors) stays the task's affair. Knows nothing of the gateway.
"""

import asyncio
from typing import Any, Protocol

from mitmproxy import connection
from mitmproxy.proxy import events


class Taker(Protocol):
    def take(self, event: events.Event) -> None: ...

    async def drain_writers(self) -> None: ...

    @property
    def congested(self) -> bool: ...


class Intake(asyncio.Protocol):
    """Stands before asyncio's own protocol of a stream, for what arrives; the rest is passed on to it."""

    def __init__(self, taker: Taker, source: connection.Connection, transport: asyncio.Transport, task: "asyncio.Task[Any]"):
        self._taker, self._source, self._transport, self._task = taker, source, transport, task
        self._inner: Any = transport.get_protocol()
        self._draining: asyncio.Task[None] | None = None

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def eof_received(self) -> bool | None:
        return bool(self._inner.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._task.cancelling():
            return
        self._taker.take(events.DataReceived(self._source, data))
        if self._taker.congested and self._draining is None:
            self._transport.pause_reading()
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await self._taker.drain_writers()
        finally:
            self._draining = None
            if not self._transport.is_closing():
                self._transport.resume_reading()


def install(taker: Taker, source: connection.Connection, reader: object, writer: object) -> bytes:
    """Let a connection that the current task is about to read hand over by itself. Returns what its reader holds: that comes first."""
    if type(reader) is not asyncio.StreamReader or type(writer) is not asyncio.StreamWriter:
        return b""
    task, transport, held = asyncio.current_task(), writer.transport, getattr(reader, "_buffer", None)
    if type(held) is not bytearray or not isinstance(transport, asyncio.Transport) or task is None:
        return b""
    if type(transport.get_protocol()) is not asyncio.StreamReaderProtocol:
        return b""
    transport.set_protocol(Intake(taker, source, transport, task))
    first = bytes(held)
    held.clear()
    return first
