"""Judge large bodies in another process, so that no body delays the other calls.

One call into the JSON parser holds the interpreter until it returns: 2.7 s for 31 MB of `[1,1,...]`, in a thread as well. Promises that
the event loop only copies a large body, to another process, which judges one body at a time; that its answer is the value that the
function would have returned here; and that a body is refused on which that process dies, takes too long or needs too much memory.
The process is started for the first large body, and ends with its parent: it reads from a socket of which the parent holds the other end.
"""

import asyncio
import gc
import io
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, cast

from gateway_addon.messages.request import Request
from gateway_addon.policy import AppPolicy
from gateway_addon.pricing import Prices
from gateway_addon.refusals import Refusal, stated

HERE_BYTES_MAX = 256 * 1024
HERE_BRACKETS_MAX = 10_000
HERE_BATCH_BYTES_MAX = 16 * 1024
"""Bodies up to these limits are judged at once, in this process: the worst of them takes about 25 ms."""

ANSWER_WITHIN_S = 30.0  # the slowest body known takes about 6 s; a slower one is a fault of the gateway's
MEMORY_BYTES_MAX = 2 * 2**30
_LENGTH = struct.Struct("!Q")
_PROGRAM = "import sys; from gateway_addon.calls.judging_process import serve; serve(int(sys.argv[1]))"


def is_large(endpoint: str, body: bytes) -> bool:
    """Tell whether judging a body may take longer than the other calls can wait. An upload is not parsed."""
    if endpoint not in ("messages", "count_tokens"):
        return endpoint == "batches.create" and len(body) > HERE_BATCH_BYTES_MAX
    if len(body) > HERE_BYTES_MAX:
        return True
    if len(body) <= HERE_BRACKETS_MAX:  # no room for so many
        return False
    # To take them out is ten times as fast as to count them where they are few, as in prose; it stops where they are too many.
    return sum(len(body) - len(body.replace(bracket, b"", HERE_BRACKETS_MAX + 1)) for bracket in (b"{", b"[")) > HERE_BRACKETS_MAX


class JudgingProcess:
    """Start, ask and end the one judging process of this process; it starts with the first question."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    async def judge[T](self, endpoint: str, body: bytes, function: Callable[..., T], *arguments: Any) -> T | Refusal:
        """Return `function(*arguments)`, run here for a small body, in the other process for a large one.

        `function` must be a module's own. A caller that is cancelled meanwhile ends the process: nobody waits for its answer any more.
        """
        if not is_large(endpoint, body):
            return function(*arguments)
        return await self.run(function, *arguments)

    async def run[T](self, function: Callable[..., T], *arguments: Any) -> T | Refusal:
        """Return `function(*arguments)`, run in the other process, or the refusal of a body for which that fails."""
        async with self._turn:
            try:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    answer = await self._ask(function, arguments)
                return cast(T | Refusal, _Loading(io.BytesIO(answer), _shared(arguments)).load())
            except TimeoutError:
                self.close()
                return stated("body", f"the body could not be judged within {ANSWER_WITHIN_S:g} s; send it in several requests")
            except OSError:  # it died: out of memory, or killed
                self.close()
                return stated("body", "the process that judges large bodies ended at this one; send it in several requests")
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Kill the process, even while it judges."""
        child, held, self._child, self._socket = self._child, self._socket, None, None
        if held is not None:
            held.close()
        if child is not None:
            child.kill()
            threading.Thread(target=child.wait, daemon=True).start()  # giving its memory back takes longer than calls can wait

    async def _ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytearray:
        if self._child is not None and self._child.poll() is not None:
            self.close()
        loop, held = asyncio.get_running_loop(), self._socket or self._start()
        bodies: list[pickle.PickleBuffer] = []
        question = _dumped((function, arguments), (), bodies.append)
        for part in (question, bodies[0].raw() if bodies else b""):
            await loop.sock_sendall(held, _LENGTH.pack(len(part)))
            await loop.sock_sendall(held, part)
        return await self._received(held, _LENGTH.unpack(await self._received(held, _LENGTH.size))[0])

    async def _received(self, held: socket.socket, length: int) -> bytearray:
        answer, done = bytearray(length), 0
        while done < length:
            count = await asyncio.get_running_loop().sock_recv_into(held, memoryview(answer)[done:])
            if not count:
                raise ConnectionError("the process has ended")
            done += count
        return answer

    def _start(self) -> socket.socket:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        optimised = ["-O"] if sys.flags.optimize else []
        with theirs:
            # In a session of its own: an interrupt at the terminal is for the gateway alone. Without the secrets of the environment.
            self._child = subprocess.Popen(
                [sys.executable, *optimised, "-c", _PROGRAM, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, start_new_session=True,
            )  # fmt: skip
        return self._socket


def serve(descriptor: int) -> None:
    """Answer questions until the other end of the socket is closed (runs in the judging process)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_memory_bytes_max(),) * 2)
    gc.freeze()  # what was imported stays
    gc.disable()  # a parser's millions of objects hold no circles, and looking for some would take as long as making them
    with socket.socket(fileno=descriptor) as held, held.makefile("rb") as questions:
        while question := _part(questions):
            answer = _answer(question, _part(questions))
            held.sendall(_LENGTH.pack(len(answer)))
            held.sendall(answer)
            gc.collect()


def _part(questions: io.BufferedReader) -> bytes:
    head = questions.read(_LENGTH.size)
    return questions.read(_LENGTH.unpack(head)[0]) if head else b""


def _answer(question: bytes, body: bytes) -> bytes:
    try:
        function, arguments = pickle.loads(question, buffers=[body])
        return _dumped(function(*arguments), _shared(arguments))
    except MemoryError:
        needed, way_out = f"{_memory_bytes_max() // 2**20:,} MB", "send several requests, or data as text"
        return _dumped(stated("body", f"the body needs more than {needed} of memory to be judged; {way_out}"), ())


def _memory_bytes_max() -> int:
    """Return the memory limit of this process: less than `MEMORY_BYTES_MAX` where the gateway was given less (`ulimit -v`)."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    return MEMORY_BYTES_MAX if most == resource.RLIM_INFINITY else min(MEMORY_BYTES_MAX, most)


def _shared(arguments: tuple[Any, ...]) -> list[Any]:
    """Return the arguments that both processes have already: an answer refers to them by their place."""
    return [each for each in arguments if isinstance(each, AppPolicy | Prices)]


class _Dumping(pickle.Pickler):
    def __init__(self, file: io.BytesIO, shared: Sequence[Any], beside: Callable[[pickle.PickleBuffer], Any] | None):
        super().__init__(file, pickle.HIGHEST_PROTOCOL, buffer_callback=beside)
        self._places = {id(each): place for place, each in enumerate(shared)}

    def persistent_id(self, obj: Any) -> int | None:
        return self._places.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Request):  # its body goes beside the rest, and is not copied for that
            return Request, (obj.method, obj.target, obj.headers, pickle.PickleBuffer(obj.body))
        return (_read_only, (dict(obj),)) if isinstance(obj, MappingProxyType) else NotImplemented


class _Loading(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: list[Any]):
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, pid: int) -> Any:
        return self._shared[pid]


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)  # the class itself has no name by which it could be found


def _dumped(value: Any, shared: Sequence[Any], beside: Callable[[pickle.PickleBuffer], Any] | None = None) -> bytes:
    file = io.BytesIO()
    _Dumping(file, shared, beside).dump(value)
    return file.getvalue()
