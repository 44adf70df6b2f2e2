"""A provider that generates whether it is read or not, and clients that read slowly or not at all."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from upstreams import OPENING, event, served

STEP_S = 0.02
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
OPEN = event("message_start", message=OPENING) + event("content_block_start", index=0, content_block={"type": "text", "text": ""})


@dataclass(slots=True)
class Provider:
    """`url`, and for each client's stream the bytes that were taken from it and the tokens that were generated until it was cut."""

    url: str = ""
    sent_bytes: list[int] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)


@asynccontextmanager
async def provider(*, tokens_per_s: int = 380, padding_bytes: int = 8_000, paddings: int = 25) -> AsyncIterator[Provider]:
    """Stream endlessly: a piece of text each step, behind so many comments, which nobody pays for. Each piece waits in line."""
    made, tasks = Provider(), set()
    padding = (b": " + b"." * padding_bytes + b"\n\n") * paddings

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        name = json.loads(await reader.readexactly(length))["messages"][0]["content"]
        number, began, made.sent_bytes = len(made.sent_bytes), time.monotonic(), [*made.sent_bytes, 0]
        with suppress(ConnectionError, asyncio.CancelledError):
            writer.write(HEAD + b"%x\r\n%b\r\n" % (len(OPEN), OPEN))
            step = 0
            while True:
                step += 1
                await asyncio.sleep(max(0.0, began + step * STEP_S - time.monotonic()))
                text = "word" * int(tokens_per_s * STEP_S)
                piece = padding + event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
                made.sent_bytes[number] += len(piece)
        made.tokens[name] = int(tokens_per_s * (time.monotonic() - began))
        writer.close()

    async with served(talk, tasks) as made.url:
        yield made


def ask(port: int, token: str, name: str, max_tokens: int = 60_000) -> socket.socket:
    """Ask for a stream by a socket that holds little, and read nothing yet."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    thinking = {"type": "disabled"}
    body = {"model": "claude-haiku-4-5", "max_tokens": max_tokens, "stream": True, "thinking": thinking, "messages": [{"role": "user", "content": name}]}
    raw = json.dumps(body).encode()
    client.sendall(f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {token}\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
    client.setblocking(False)
    return client


async def read_slowly(client: socket.socket, bytes_per_s: float) -> int:
    """Read until the other side ends, no faster than this. Returns how much there was."""
    loop, began, total = asyncio.get_running_loop(), time.monotonic(), 0
    with suppress(ConnectionError):
        while data := await loop.sock_recv(client, 16_384):
            total += len(data)
            await asyncio.sleep(max(0.0, began + total / bytes_per_s - time.monotonic()))
    return total
