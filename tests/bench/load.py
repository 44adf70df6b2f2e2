"""Callers in a closed loop: each sends its next call when its last one was answered whole. Prints what it saw as JSON.

    python load.py '{"port": 8080, "credential": "x-api-key: ...", "body": "json", "callers": 64, "seconds": 3, "connections": "kept"}'

Connections are `kept`, or made anew for `each` call, or all made `at once`: each makes one call, and when all were answered the next begin.
Of several credentials the calls take one after the other.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator

_TURN = "The quick brown fox jumps over the lazy dog while forty-two engineers measure what that costs. "


def _body(turns: int, *, stream: bool, marker: str = "") -> bytes:
    messages = [{"role": ("user", "assistant")[n % 2], "content": marker + _TURN * (4 if turns == 1 else 22)} for n in range(turns)]
    return json.dumps({"model": "claude-sonnet-4-5", "max_tokens": 300, "stream": stream, "messages": messages}).encode()


BODIES = {
    "json": _body(1, stream=False),
    "two": _body(1, stream=False, marker="bench-two "),
    "length": _body(1, stream=False, marker="bench-length "),
    "json100k": _body(49, stream=False),
    "burst": _body(1, stream=True),
    "paced": _body(1, stream=True, marker="bench-paced "),
}


class Caller(asyncio.Protocol):
    """One connection; its answers' times go to `seen` as (whole, first byte of the body), in seconds."""

    def __init__(self, requests: Iterator[bytes], until: float, seen: list[tuple[float, float]], faults: list[str], kept: bool) -> None:
        self.requests, self.until, self.seen, self.faults, self.kept = requests, until, seen, faults, kept
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.faults.append(f"the connection was lost: {error}")
            self.done.set_result(None)

    def send(self) -> None:
        self.answer, self.whole, self.first = bytearray(), -1, 0.0
        self.began = time.perf_counter()
        self.transport.write(next(self.requests))

    def data_received(self, data: bytes) -> None:
        self.answer += data
        if self.whole < 0:
            end = self.answer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.answer[:end]).lower()
            _, found, rest = head.partition(b"\r\ncontent-length:")
            self.whole = end + 4 + int(rest.split(b"\r\n")[0]) if found else 0
            self.body_at = end + 4
        if not self.first and len(self.answer) > self.body_at:
            self.first = time.perf_counter()
        if len(self.answer) >= self.whole if self.whole else self.answer.endswith(b"\r\n0\r\n\r\n") and len(self.answer) > self.body_at:
            self.ended()

    def ended(self) -> None:
        now = time.perf_counter()
        good = self.answer.startswith(b"HTTP/1.1 200") and (b"message_stop" if b"text/event-stream" in self.answer else b'"usage"') in self.answer
        if good:
            self.seen.append((now - self.began, self.first - self.began))
        else:
            self.faults.append(bytes(self.answer[:300]).decode("latin-1"))
        if now < self.until and self.kept:
            self.send()
        else:
            self.done.set_result(None)
            self.transport.close()


async def main(port: int, credential: str | list[str], body: str, callers: int, seconds: float, connections: str) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    content = BODIES[body]
    head = "POST /v1/messages HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nanthropic-version: 2023-06-01\r\n"
    credentials = [credential] if isinstance(credential, str) else credential
    requests = itertools.cycle([f"{head}{each}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content for each in credentials])
    seen: list[tuple[float, float]] = []
    faults: list[str] = []
    began = time.perf_counter()
    until = began + seconds

    async def call() -> None:
        while True:
            _, caller = await loop.create_connection(lambda: Caller(requests, until, seen, faults, connections == "kept"), "127.0.0.1", port)
            await caller.done
            if time.perf_counter() >= until or connections != "each":
                return

    await asyncio.gather(*(call() for _ in range(callers)))
    while connections == "at once" and time.perf_counter() < until:
        await asyncio.gather(*(call() for _ in range(callers)))
    wholes, firsts = sorted(whole for whole, _ in seen), sorted(first for _, first in seen)
    at = len(seen) // 2
    return {
        "calls": len(seen),
        "per_second": len(seen) / (time.perf_counter() - began),
        "p50_ms": 1000 * wholes[at] if seen else 0.0,
        "p99_ms": 1000 * wholes[len(seen) * 99 // 100] if seen else 0.0,
        "first_ms": 1000 * firsts[at] if seen else 0.0,
        "faults": len(faults),
        "fault": faults[0] if faults else "",
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(**json.loads(sys.argv[1])))))
