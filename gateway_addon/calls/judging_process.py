"""Judge large bodies in a process of its own, so that no body holds up the calls beside it.

One call into the JSON parser holds the interpreter until it returns: 2.7 s for 31 MB of `[1,1,...]`, in a thread as well. Promises that
the event loop only copies a large body, to another process, which judges one body at a time; that its answer is the same value that the
function would have returned here; and that a body on which that process dies, is stuck or wants more memory than it may have is refused.
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
"""What is judged at once, without another process: the worst such body takes about 25 ms."""

ANSWER_WITHIN_S = 30.0  # the worst body that is judged to its end takes about 6 s; one that takes longer is a fault of the gateway's
MEMORY_BYTES_MAX = 2 * 2**30
_LENGTH = struct.Struct("!Q")
_PROGRAM = "import sys; from gateway_addon.calls.judging_process import serve; serve(int(sys.argv[1]))"


def is_large(endpoint: str, body: bytes) -> bool:
    """Whether judging a body may take longer than the other calls can wait. An upload is not looked into."""
    if endpoint not in ("messages", "count_tokens"):
        return endpoint == "batches.create" and len(body) > HERE_BATCH_BYTES_MAX
    return len(body) > HERE_BYTES_MAX or body.count(b"{") + body.count(b"[") > HERE_BRACKETS_MAX


class JudgingProcess:
    """The one that belongs to this process, started when it is first asked."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    async def judge[T](self, endpoint: str, body: bytes, function: Callable[..., T], *arguments: Any) -> T | Refusal:
        """Return what a function of a module returns for these values, among them the request whose body decides where it is run.

        Whoever is cancelled while it runs ends the process with it: nobody waits for its answer any more.
        """
        if not is_large(endpoint, body):
            return function(*arguments)
        return await self.run(function, *arguments)

    async def run[T](self, function: Callable[..., T], *arguments: Any) -> T | Refusal:
        """Return what a function of a module returns, run in the other process, or the refusal of a body for which that cannot be done."""
        async with self._turn:
            try:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    answer = await self._ask(function, arguments)
                return cast(T | Refusal, _Loading(io.BytesIO(answer), _shared(arguments)).load())
            except TimeoutError:
                self.close()
                return stated("body", f"the body could not be judged within {ANSWER_WITHIN_S:g} s; send it in several requests")
            except OSError:  # it died: of memory, or by somebody's hand
                self.close()
                return stated("body", "the process that judges large bodies ended at this one; send it in several requests")
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the process, whatever it is at."""
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
            # In a session of its own: an interrupt at the terminal is the gateway's affair. Without the secrets of the environment.
            self._child = subprocess.Popen(
                [sys.executable, *optimised, "-c", _PROGRAM, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, start_new_session=True,
            )  # fmt: skip
        return self._socket


def serve(descriptor: int) -> None:
    """Answer until the other end of the socket is closed."""
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
    """Of this process: less than is meant for it where the gateway was given less (`ulimit -v`), which cannot be raised."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    return MEMORY_BYTES_MAX if most == resource.RLIM_INFINITY else min(MEMORY_BYTES_MAX, most)


def _shared(arguments: tuple[Any, ...]) -> list[Any]:
    """What both sides have already: an answer that leads to it names its place."""
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
