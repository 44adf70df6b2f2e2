"""HTTP/1.1 for the simulated API: requests in, answers out, one at a time on each connection; h11 knows the grammar.

Knows nothing of Claude. Promises to notice a client that leaves while an answer is being made, even a silent one: every
wait ends with HungUp then, so that the caller can write down how far it came.
"""

import asyncio
import contextlib
import hashlib
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

import brotli  # type: ignore[import-untyped]
import h11
import zstandard

BODY_BYTES_MAX = 32 * 1024 * 1024
READ_BYTES = 65_536

Headers = list[tuple[str, str]]

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class HungUp(Exception):
    """The connection is no more: the client left, or the behaviour wanted it cut."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in the order of the wire."""
    body: bytes
    """The body, or the beginning of one that is too large."""
    too_large: bool = False

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


class Exchange:
    """One request and the answer to it. `sent_sha256` runs over the answer's body as it goes onto the wire."""

    def __init__(self, request: Request, connection: h11.Connection, writer: asyncio.StreamWriter, gone: asyncio.Event):
        self.request = request
        self.sent_sha256 = hashlib.sha256()
        self.sent_bytes = 0
        self.status: int | None = None
        self.cut_after_bytes: int | None = None
        self._connection, self._writer, self._gone = connection, writer, gone
        self._encoder: Encoder = Plain()

    async def answer(self, status: int, headers: Headers, body: bytes, *, encoding: str = "identity") -> None:
        """Send a whole answer by its length. One to HEAD has the headers of a body and no body."""
        encoder = ENCODERS[encoding]()
        encoded = encoder.feed(body) + encoder.end()
        await self._head(status, [*headers, ("content-length", str(len(encoded)))], encoding)
        if self.request.method != "HEAD":
            await self._body(encoded)
        await self._write(h11.EndOfMessage())

    async def answer_in_chunks(self, status: int, headers: Headers, body: bytes, *, encoding: str = "identity") -> None:
        """Send a whole answer in chunks, as the real API does: its length comes with its end, in a piece of its own."""
        await self.start(status, headers, encoding=encoding)
        await self.send(body)
        await self.finish()

    async def start(self, status: int, headers: Headers, *, encoding: str = "identity") -> None:
        """Begin an answer whose length nobody knows yet; `send` its parts, then `finish` it."""
        self._encoder = ENCODERS[encoding]()
        await self._head(status, [*headers, ("transfer-encoding", "chunked")], encoding)

    async def send(self, data: bytes) -> None:
        """Send a part of the body, flushed through its encoding, so that the client can read it at once."""
        await self._body(self._encoder.feed(data))

    async def finish(self) -> None:
        await self._body(self._encoder.end())
        await self._write(h11.EndOfMessage())

    async def pause(self, seconds: float) -> None:
        """Wait. Raises HungUp as soon as the client leaves, also for a wait of nothing."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), seconds)
        if self._gone.is_set():
            raise HungUp

    def hang_up(self) -> None:
        """Close the connection, what was sent before it still arriving."""
        self._writer.close()
        raise HungUp

    async def _head(self, status: int, headers: Headers, encoding: str) -> None:
        self.status = status
        coded = [("content-encoding", encoding)] if encoding != "identity" else []
        await self._write(h11.Response(status_code=status, headers=[*headers, *coded], reason=REASONS.get(status, b"")))

    async def _body(self, encoded: bytes) -> None:
        left = None if self.cut_after_bytes is None else self.cut_after_bytes - self.sent_bytes
        encoded = encoded if left is None else encoded[:left]
        self.sent_bytes += len(encoded)
        self.sent_sha256.update(encoded)
        if encoded:
            await self._write(h11.Data(data=encoded))
        if left is not None and left <= len(encoded):
            self.hang_up()

    async def _write(self, event: h11.Event) -> None:
        if self._gone.is_set():
            raise HungUp
        self._writer.write(self._connection.send(event) or b"")
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise HungUp from error


Answerer = Callable[[Exchange], Awaitable[None]]


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answerer, received: Callable[[int], None]) -> None:
    """Serve one connection until either side closes it. `received` is told of every byte that arrives."""
    connection = h11.Connection(h11.SERVER)
    try:
        while (request := await _read(connection, reader, writer, received)) is not None:
            gone = asyncio.Event()
            watch = asyncio.create_task(_watch(connection, reader, gone, received))
            try:
                await answer(Exchange(request, connection, writer, gone))
            finally:
                watch.cancel()
                await asyncio.wait([watch])  # a StreamReader lets only one reader wait at a time
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                break
            connection.start_next_cycle()
    except HungUp:
        pass
    except h11.RemoteProtocolError as error:
        if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            bad = h11.Response(status_code=error.error_status_hint, headers=[("content-length", "0"), ("connection", "close")])
            writer.write((connection.send(bad) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    finally:
        writer.close()


async def _read(
    connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Callable[[int], None]
) -> Request | None:
    """Read the next request; None when the client has no more.

    A body that is too large is read to its end, so that the refusal of it arrives, but it is not kept.
    """
    head: h11.Request | None = None
    body, too_large = bytearray(), False
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                writer.write(connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            connection.receive_data(await _receive(reader, received))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            too_large = too_large or len(body) + len(event.data) > BODY_BYTES_MAX
            body += b"" if too_large else event.data
        elif isinstance(event, h11.EndOfMessage) or event is h11.PAUSED:
            break
        else:
            return None
    if head is None:
        return None
    headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers)
    return Request(head.method.decode(), head.target.decode("latin-1"), headers, bytes(body), too_large)


async def _watch(connection: h11.Connection, reader: asyncio.StreamReader, gone: asyncio.Event, received: Callable[[int], None]) -> None:
    """Read on while an answer is being made: bytes are the next request's and are kept, the end means that the client has left."""
    while data := await _receive(reader, received):
        connection.receive_data(data)
    gone.set()


async def _receive(reader: asyncio.StreamReader, received: Callable[[int], None]) -> bytes:
    try:
        data = await reader.read(READ_BYTES)
    except ConnectionError:
        return b""
    received(len(data))
    return data


class Encoder(Protocol):
    def feed(self, data: bytes) -> bytes: ...
    def end(self) -> bytes: ...


class Plain:
    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> bytes:
        return b""


class Deflate:
    """zlib's formats: 15 window bits for `deflate`, 16 more for gzip's header."""

    def __init__(self, window_bits: int) -> None:
        self._deflate = zlib.compressobj(wbits=window_bits)

    def feed(self, data: bytes) -> bytes:
        return self._deflate.compress(data) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        return self._deflate.flush()


class Brotli:
    def __init__(self) -> None:
        self._compressor = brotli.Compressor(quality=4)

    def feed(self, data: bytes) -> bytes:
        return bytes(self._compressor.process(data) + self._compressor.flush())

    def end(self) -> bytes:
        return bytes(self._compressor.finish())


class Zstandard:
    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor().compressobj()

    def feed(self, data: bytes) -> bytes:
        return self._compressor.compress(data) + self._compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)

    def end(self) -> bytes:
        return self._compressor.flush()


ENCODERS: dict[str, Callable[[], Encoder]] = {
    "identity": Plain,
    "gzip": lambda: Deflate(31),
    "deflate": lambda: Deflate(15),
    "br": Brotli,
    "zstd": Zstandard,
}
