"""A gateway between an app and an API that say what a test wants to the byte, and all that can be told of it from outside."""

import asyncio
import functools
import re
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from typing import Any

from call_rows import calls
from gateway import gateway
from ledgers import until
from mitmproxy import ctx
from mitmproxy.proxy.layer import NextLayer
from mitmproxy.proxy.layers.http import HttpLayer
from mitmproxy.proxy.layers.http._http1 import Http1Connection

POLICY = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\nreserve: full\nmax_tokens: {limit: 100, over: clamp}\n"
HOOKS = ("requestheaders", "request", "responseheaders", "response", "error")


async def beat() -> None:
    """Time for bytes to arrive on the other side of a socket of this loop."""
    for _ in range(6):
        await asyncio.sleep(0)


def length_of(head: bytes) -> int:
    found = re.search(rb"content-length: (\d+)", head)
    return int(found[1]) if found else 0


class Api:
    """Answers each request with the next one of its answers (each in pieces), whatever the connection; with none left, it closes."""

    answers: list[Any]
    received = b""

    async def talk(self, reader, writer):
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.received += head + await reader.readexactly(length_of(head))
                if not self.answers:
                    break
                for piece in self.answers.pop(0):
                    writer.write(piece if isinstance(piece, bytes) else await piece())
                    await beat()


class Other:
    """Another addon, which does something in one hook, and notes what there is to see in each."""

    at, do, flow = "", None, None

    def __init__(self):
        self.noted = []
        for hook in HOOKS:
            setattr(self, hook, functools.partial(self.called, hook))

    def called(self, hook, flow):
        done = self.do(flow) if self.do and hook == self.at else None
        if done is not None:
            return self.later(done, hook, flow)
        said = flow.response and (flow.response.status_code, flow.response.timestamp_end is None, flow.response.raw_content)
        sent = (flow.request.headers.fields, flow.request.raw_content, flow.request.timestamp_end is None, flow.request.url)
        self.flow = flow
        self.noted.append((hook, plain(repr((sent, said, flow.live, flow.error and flow.error.msg)).encode())))

    async def later(self, done, hook, flow):
        await done
        self.noted.append((hook, states()))
        self.called("", flow)


def states() -> list[Any]:
    """Where mitmproxy's own layers are, of each connection and each call, while there is nothing to do."""
    found: list[Any] = []
    for handler in ctx.master.addons.get("proxyserver").connections.values():
        top = handler.layer
        while not isinstance(top, HttpLayer):
            top = top.layer if isinstance(top, NextLayer) else top.child_layer
        for end in top.connections.values():
            if isinstance(end, Http1Connection):
                said = (end.request_done, end.response_done, end.request is None, end.response is None)
                found.append((end.state.__name__, end.stream_id, *said, bytes(end.buf)))
        found += [(each, stream.client_state.__name__, stream.server_state.__name__) for each, stream in top.streams.items()]
    return found


def plain(data: bytes) -> bytes:
    """Without ids, ports, and what a cap has come to."""
    return re.sub(rb"req_\w+|localhost:\d+|spent=[^;]*; held=[^;]*|[\d.]+ s\b", b"_", data)


@dataclass
class Outcome:
    """All that can be told from outside."""

    received: bytes
    closed: bool
    reached: bytes
    noted: list[Any]
    calls: list[Any]


class Stage:
    """A gateway between an app and an API, each of which says what a test wants."""

    def __init__(self, gw: Any, api: Api, other: Other):
        self.gw, self.api, self.other = gw, api, other

    async def outcome(self, talk, answers, hook="", do=None, options=None) -> Outcome:
        """`talk(stage)`: what the client does; gives what it received, and whether the connection was closed then."""
        self.api.answers, self.api.received = [(each,) if isinstance(each, bytes) else each for each in answers], b""
        self.other.at, self.other.do, self.other.noted = hook, do, []
        calls_before, usual = len(calls(self.gw.folder)), {name: getattr(self.gw.master.options, name) for name in options or {}}
        self.gw.master.options.update(**options or {})
        async with asyncio.timeout(60):
            received, closed = await talk(self)
            await self.gw.quiet()
            await beat()
            await until(lambda: not ctx.master.addons.get("proxyserver").connections)
        self.gw.master.options.update(**usual)
        self.other.do = None
        self.other.noted.append(self.other.flow and self.other.flow.live)
        return Outcome(plain(received), closed, plain(self.api.received), self.other.noted, calls(self.gw.folder)[calls_before:])


@asynccontextmanager
async def staged(folder, tls=None, **more):
    api, other, before = Api(), Other(), {name: value for name, value in vars(ctx).items() if name in ("master", "options")}
    async with await asyncio.start_server(api.talk, "127.0.0.1", 0, ssl=tls) as server:
        url = f"{'https' if tls else 'http'}://localhost:{server.sockets[0].getsockname()[1]}"
        async with gateway(folder, None, {"app": POLICY}, upstream=url, prepare=lambda master: master.addons.add(other), **more) as gw:
            yield Stage(gw, api, other)
    vars(ctx).update(before)  # mitmproxy knows of one master, the last: one that was there before would not find its own way out


def talk(*pieces: bytes, tls=None):
    """Send these pieces, with `b""` to wait for an answer, and receive what is answered."""

    async def talking(stage):
        reader, writer = await asyncio.open_connection("127.0.0.1", stage.gw.port, ssl=tls)
        received, closed = b"", False
        with closing(writer):
            for piece in (*pieces, b""):
                writer.write(piece.replace(b"TOKEN", stage.gw.tokens["app"].encode()))
                await beat()
                before, idle = received, 0
                while not (piece or closed or (idle > 1 and received != before)):
                    idle = 0 if stage.gw.addon.flow_states else idle + 1
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.02):
                            more = await reader.read(65_536)
                            received, closed, idle = received + more, not more, 0
                if not piece:
                    stage.other.noted.append(states())
            return received, closed

    return talking
