"""An app of the demo as the gateway sees it: real sockets, HTTP/1.1, the headers of the official SDKs.

Without the SDK itself, which the gateway does not need at runtime; that the SDK works is the tests' business.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

from gateway_addon.messages import sse

HEADERS = {
    "accept": "application/json",
    "accept-encoding": "gzip, deflate",
    "anthropic-version": "2026-10-21",
    "content-type": "application/json",
    "user-agent": "gateway demo, shaped like Anthropic/Python 2.14.0",
    "x-stainless-lang": "python",
    "x-stainless-retry-count": "0",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, its body read to the end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def refusal(self) -> str | None:
        """Return the gateway's code for its own refusals; None for what the API answered."""
        return self.headers.get("x-gateway-refusal")

    @property
    def sentence(self) -> str:
        """Return an error's message, as an SDK's exception shows it."""
        return str(self.json["error"]["message"])


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is still arriving. To leave it early, leave the block it was opened in: its connection closes."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """Yield a stream's events as (name, data)."""
        framer = sse.Framer()
        async for chunk in self.chunks:
            for name, data in sse.events(framer.feed(chunk)):
                yield name.decode(), json.loads(data)


@dataclass(frozen=True, slots=True)
class App:
    """One app: where it calls, and the token it has."""

    name: str
    base_url: str
    token: str

    async def ask(self, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None) -> Reply:
        """Call (POST with a body, else GET) and read the whole answer."""
        async with self.open(path, body, headers) as answer:
            return Reply(answer.status, answer.headers, b"".join([chunk async for chunk in answer.chunks]))

    @asynccontextmanager
    async def open(
        self, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Answer]:
        """Call, and read the answer while it comes."""
        address = urlsplit(self.base_url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            http = h11.Connection(h11.CLIENT)
            sent = b"" if body is None else json.dumps(body).encode()
            own = {"host": address.netloc, "content-length": str(len(sent)), "authorization": f"Bearer {self.token}"}
            request = h11.Request(
                method="GET" if body is None else "POST", target=path, headers=list({**HEADERS, **own, **(headers or {})}.items())
            )
            for event in (request, h11.Data(data=sent), h11.EndOfMessage()):
                writer.write(http.send(event) or b"")
            await writer.drain()
            async with aclosing(_incoming(http, reader)) as incoming:
                head = await anext(incoming)
                assert isinstance(head, h11.Response)
                named = {name.decode(): value.decode() for name, value in head.headers}
                yield Answer(head.status_code, named, (bytes(event.data) async for event in incoming if isinstance(event, h11.Data)))
        finally:
            writer.close()


async def _incoming(http: h11.Connection, reader: asyncio.StreamReader) -> AsyncGenerator[h11.Event]:
    """Yield the events of one response as its bytes arrive."""
    while not isinstance(event := http.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(65536))
        else:
            assert not isinstance(event, type)
            yield event
