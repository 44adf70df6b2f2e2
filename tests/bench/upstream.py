"""A simulated API that costs next to nothing: it reads the framing of a request and answers from memory.

It answers as the real API does (wire format, usage, ids, and the headers of recorded answers: JSON in chunks, which arrive in one piece
or in two), but it bills nobody: `gateway_addon.simulator` does that.
"""

import asyncio
import json
import ssl
import sys

PACED_S = 0.002
SECOND_PIECE_S = 0.001
DELTAS = 50

_USAGE = {"input_tokens": 180, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 250, "service_tier": "standard"}
_MODEL = "claude-sonnet-4-5-20250929"


def _message(content: list[dict[str, str]], usage: dict[str, object], stop: str | None) -> dict[str, object]:
    return {"id": "msg_bench", "type": "message", "role": "assistant", "model": _MODEL, "content": content, "stop_reason": stop, "stop_sequence": None, "usage": usage}


def _event(name: str, **data: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n".encode()


_LIMITS = "".join(
    f"anthropic-ratelimit-{what}-limit: 4000\r\nanthropic-ratelimit-{what}-remaining: 3999\r\nanthropic-ratelimit-{what}-reset: 2026-11-28T12:00:00Z\r\n"
    for what in ("requests", "tokens", "input-tokens", "output-tokens")
)


def _head(content_type: str, framing: str) -> bytes:
    """With the names of the headers of the recorded answers."""
    lines = (
        "HTTP/1.1 200 OK", "date: Sat, 28 Nov 2026 12:00:00 GMT", f"content-type: {content_type}", framing, "connection: keep-alive", "request-id: req_bench",
        "anthropic-organization-id: 00000000-0000-0000-0000-000000000000", "via: 1.1 google", "cf-cache-status: DYNAMIC", "x-robots-tag: none",
        "strict-transport-security: max-age=31536000; includeSubDomains; preload", "server: cloudflare", "cf-ray: 87084f286b44103c-LAX",
    )  # fmt: skip
    return ("\r\n".join(lines) + f"\r\n{_LIMITS}\r\n").encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


BODY = json.dumps(_message([{"type": "text", "text": "word " * 200}], _USAGE, "end_turn")).encode()
LAST_CHUNK = b"0\r\n\r\n"
JSON = _head("application/json", "transfer-encoding: chunked") + _chunk(BODY)
BY_LENGTH = _head("application/json", f"content-length: {len(BODY)}") + BODY
EVENTS = [
    _event("message_start", message=_message([], _USAGE | {"output_tokens": 1}, None)),
    _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    *(_event("content_block_delta", index=0, delta={"type": "text_delta", "text": f"delta number {n} of the stream "}) for n in range(DELTAS)),
    _event("content_block_stop", index=0),
    _event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 250}),
    _event("message_stop"),
]
STREAM_HEAD = _head("text/event-stream; charset=utf-8", "transfer-encoding: chunked")
BURST = STREAM_HEAD + _chunk(b"".join(EVENTS)) + LAST_CHUNK


class Api(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.pacing: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        if self.pacing is not None:
            self.pacing.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end]).lower()
            _, found, rest = head.partition(b"content-length:")
            total = end + 4 + (int(rest.split(b"\r\n")[0]) if found else 0)
            if len(self.buffer) < total:
                return
            body = bytes(self.buffer[end + 4 : total])
            del self.buffer[:total]
            if b"bench-two" in body:
                self.transport.write(JSON)
                asyncio.get_running_loop().call_later(SECOND_PIECE_S, self.transport.write, LAST_CHUNK)
            elif b"bench-length" in body:
                self.transport.write(BY_LENGTH)
            elif b'"stream": true' not in body:
                self.transport.write(JSON + LAST_CHUNK)
            elif b"bench-paced" in body:
                self.pacing = asyncio.ensure_future(self.pace())
            else:
                self.transport.write(BURST)

    async def pace(self) -> None:
        """Every event at its own time, however late the one before it was."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self.transport.write(STREAM_HEAD)
        for number, event in enumerate(EVENTS):
            await asyncio.sleep(began + number * PACED_S - loop.time())
            self.transport.write(_chunk(event))
        self.transport.write(LAST_CHUNK)


async def main(certificate: str, port: int) -> None:
    context = None
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    server = await asyncio.get_running_loop().create_server(Api, "127.0.0.1", port, backlog=1024, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
