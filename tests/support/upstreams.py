"""Upstreams that the simulated API is too well-behaved to be: canned bytes, silence, and what arrived."""

import asyncio
import json
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import repeat


@dataclass(slots=True)
class Upstream:
    url: str = ""
    received: bytearray = field(default_factory=bytearray)
    connections: int = 0
    closed_at: list[float] = field(default_factory=list)
    """When the other side closed each connection, by the loop's clock."""


@asynccontextmanager
async def served(talk: Callable[[StreamReader, StreamWriter], Awaitable[None]], tasks: set[asyncio.Task[None]]) -> AsyncIterator[str]:
    """Serve connections by `talk` until the block ends, then cancel the `tasks`, which `talk` adds to. Yields the address."""
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def upstream(answer: bytes | Iterable[bytes] = b"", *, then: str = "close", piece_bytes: int | None = None) -> AsyncIterator[Upstream]:
    """Accept calls; answer each connection's first bytes with `answer`, or the next of them, and then `close`, or stay `silent` until the caller leaves.

    `piece_bytes`: the answer goes out in pieces of this size.
    """
    made, tasks = Upstream(), set()
    answers = repeat(answer) if isinstance(answer, bytes) else iter(answer)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.connections += 1
        request, answer = bytearray(), next(answers)
        tasks.add(asyncio.current_task())
        answered = False
        with suppress(ConnectionError, asyncio.CancelledError):
            while data := await reader.read(65_536):
                made.received += data
                request += data
                if b"\r\n\r\n" in request and not answered:
                    answered = True
                    for at in range(0, len(answer), size := piece_bytes or len(answer) or 1):
                        writer.write(answer[at : at + size])
                        await asyncio.sleep(0)
                    if then == "close":
                        break
        made.closed_at.append(asyncio.get_running_loop().time())
        writer.close()

    async with served(talk, tasks) as made.url:
        yield made


def answer(status: int, content_type: str, body: bytes, *, announce: int | None = None) -> bytes:
    """A whole HTTP answer; `announce` states another length than the body has."""
    length = len(body) if announce is None else announce
    head = f"HTTP/1.1 {status} x\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\nrequest-id: req_raw\r\n\r\n"
    return head.encode() + body


def chunked(*pieces: bytes, more: str = "", end: bytes = b"0\r\n\r\n", content_type: str = "text/event-stream") -> bytes:
    """A whole answer in chunks; `more`: further header lines."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n{more}\r\n"
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


def message(model: str = "claude-haiku-4-5", **usage: int) -> bytes:
    """A whole JSON answer by `model`."""
    said = {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": [{"type": "text", "text": "hi"}]}
    counts = {"input_tokens": 9, "output_tokens": 2} | usage
    return json.dumps(said | {"stop_reason": "end_turn", "stop_sequence": None, "usage": counts}).encode()


def event(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


OPENING = {"id": "msg_1", "type": "message", "model": "claude-haiku-4-5", "usage": {"input_tokens": 9, "output_tokens": 1}}
START = event("message_start", message=OPENING)
