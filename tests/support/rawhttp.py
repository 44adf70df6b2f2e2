"""Send bytes to a socket, and read the bytes that come back: requests without an SDK."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator

from gateway_addon.simulator import KEY, Row, Simulator

MODEL = "claude-sonnet-5-5"


def ask(text: str = "hello", **fields) -> dict:
    """A request's body; `simulate` becomes the magic text."""
    if (wishes := fields.pop("simulate", None)) is not None:
        text = f"{text} simulate: {json.dumps(wishes)}"
    return {"model": MODEL, "max_tokens": 1000, "messages": [{"role": "user", "content": text}]} | fields


def head(body: bytes, *headers: str, path: str = "/v1/messages") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: simulated", f"x-api-key: {KEY}", "anthropic-version: 2023-06-01", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode()


@contextlib.asynccontextmanager
async def raw(api: Simulator) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(api.url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()


async def post(api: Simulator, body: dict | bytes, *headers: str, path: str = "/v1/messages") -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own, answered as it came over the wire (chunks joined)."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with raw(api) as (reader, writer):
        writer.write(head(sent, "connection: close", *headers, path=path) + sent)
        return split_answer(await reader.read(-1))


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """Read one answer from a connection that stays open, by its length or to its last chunk."""
    top = await reader.readuntil(b"\r\n\r\n")
    headers = split_answer(top)[1]
    if "content-length" in headers:
        return top + await reader.readexactly(int(headers["content-length"]))
    body, size = b"", 1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line, 16)
        body += line + await reader.readexactly(size + 2)
    return top + body


def split_answer(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    top, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(chunks(body))
    return int(status.split()[1]), headers, body


def chunks(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, body = body.partition(b"\r\n")
        yield body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]


def events(body: bytes) -> list[dict]:
    return [json.loads(frame.partition(b"data: ")[2]) for frame in body.split(b"\n\n") if frame]


async def last_row(api: Simulator) -> Row:
    """The book's row for the latest request, once it is final."""
    return (await api.settled()).all()[-1]


async def send(gw, data: bytes, *, finish: bool = False) -> bytes:
    """Everything that comes back until the gateway closes, or has answered and is silent for two moments with no call left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    answer, moments = b"", 0
    try:
        writer.write(data)
        if finish:
            writer.write_eof()
        await writer.drain()
        while moments < 2:
            try:
                chunk = await asyncio.wait_for(reader.read(65536), 0.015 if answer else 60)
            except TimeoutError:
                moments += not gw.addon.flow_states or not answer
                continue
            if not chunk:
                break
            answer, moments = answer + chunk, 0
    except ConnectionError:
        pass
    finally:
        writer.close()
    return answer


def gateway_head(*lines: str, token: str, line: str = "POST /v1/messages HTTP/1.1") -> bytes:
    return "\r\n".join((line, "host: gateway.internal", f"x-api-key: {token}", *lines, "", "")).encode()
