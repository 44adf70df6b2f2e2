"""Run several gateway processes on one port: share the listening socket, replace dead workers, drain all of them together.

Promises that a caller sees one gateway: the socket is bound once, here, and outlives every worker; a worker that dies is
replaced, and its successor settles what it left open (the ledger's sweep at every start). Workers end when this process does,
however it ends: they watch a pipe that only it holds. This module starts processes and reads signals.
"""

import asyncio
import errno
import ipaddress
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import replace
from typing import IO, Any, cast

from gateway_addon.proxy.connecting import ConnectingLoop
from gateway_addon.proxy.settings import WORKER, Settings

logger = logging.getLogger(__name__)

BACKLOG = 1024
SHARED_ACCEPTS = 8  # at each turn of a worker's loop: of many that come at once the first worker to wake would take all
FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
SAY_EVERY_S = 60.0
RESTART_S = 1.0  # at least this long between two starts of one worker: a gateway that cannot start must not spin
STILL_STARTING = -signal.SIGTERM  # of a worker that was told to end before it could listen to signals: it had no calls
OPTIMISED = ["-O"] if sys.flags.optimize else []
"""Workers run with the same flag as their supervisor."""


class ListeningLoop(ConnectingLoop):
    """An event loop whose first server listens on a socket that is already bound, instead of the address it is given.

    It accepts all waiting connections in one turn, so that no first call waits for the later calls of other clients; but few
    at a time from a socket that is `shared` with other workers.

    Where the process has no descriptor or memory left for one more connection, clients wait in the socket's queue, and one line is logged.
    """

    def __init__(self, listener: socket.socket, *, shared: bool = False):
        super().__init__()
        self._accepts = SHARED_ACCEPTS if shared else BACKLOG
        self._listener: socket.socket | None = listener
        self._full_at = -math.inf
        self._retry: asyncio.TimerHandle | None = None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log an uncaught exception; a failure to accept at most once a minute and without a traceback: asyncio retries each second."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in FULL and "accept" in context.get("message", "")):
            return super().call_exception_handler(context)
        if self.time() - self._full_at >= SAY_EVERY_S:
            self._full_at = self.time()
            logger.error("No more connections are taken for now (%s): raise `ulimit -n`, or start more workers.", error.strerror)
        return None

    def call_later[*Ts](
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Retry accepting once: without descriptors, asyncio asks for a retry for each connection that it may take in one turn."""
        if callback != self._start_serving:  # type: ignore[attr-defined]
            return super().call_later(delay, callback, *args, context=context)
        if self._retry is None:
            self._retry = super().call_later(delay, cast(Callable[[*Ts], object], self._accept_again), *args)
        return self._retry

    def _accept_again(self, protocol_factory: Any, listener: socket.socket, *arguments: Any) -> None:
        self._retry = None
        if listener.fileno() >= 0:  # else it was closed meanwhile
            self._start_serving(protocol_factory, listener, *arguments)  # type: ignore[attr-defined]

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> asyncio.Server:
        if self._listener is None:
            return await super().create_server(protocol_factory, host, port, **options)
        listener, self._listener = self._listener, None
        server = await super().create_server(protocol_factory, sock=listener, backlog=self._accepts, **options)  # so many at each turn
        listener.listen(BACKLOG)
        return server


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError with a sentence where the address is taken or not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its protocol asyncio knows what to send at once: else the kernel holds an answer's body back until its head is acknowledged, 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        problem = f"Cannot listen on {host}:{port} ({error.strerror}). Is another gateway running? Choose another port with --listen."
        raise OSError(problem) from None
    return listener


def is_loopback(host: str) -> bool:
    """Tell whether bytes sent to this host stay on the machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a gateway: SIGHUP too where it runs on a terminal; elsewhere SIGHUP means to reload."""
    on_a_terminal = sys.stdin is not None and sys.stdin.isatty() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if on_a_terminal else ()))


def supervise(settings: Settings, listener: socket.socket, count: int) -> int:
    """Run `count` workers on one socket until told to stop. Returns the worst exit code.

    The first worker starts alone: where a gateway cannot start, it says why, once. A second signal ends what is still in flight.
    """
    alive_read, alive_write = os.pipe()
    stopping: list[int] = []
    reloading: list[int] = []
    for number in stop_signals():
        signal.signal(number, lambda received, frame: stopping.append(received))
    if signal.SIGHUP not in stop_signals():
        signal.signal(signal.SIGHUP, lambda received, frame: reloading.append(received))

    def start(number: int, *ready_fd: int) -> subprocess.Popen[bytes]:
        own = replace(settings, repeats=number > 0)
        return _start(own, listener, alive_read, *ready_fd, stdout=None if ready_fd else subprocess.DEVNULL)

    ready_read, ready_write = os.pipe()
    workers = [start(0, ready_write)]
    os.close(ready_write)
    if not os.read(ready_read, 1):
        return workers[0].wait()
    workers += [start(number) for number in range(1, count)]
    started = [time.monotonic()] * count
    while not stopping:
        time.sleep(0.1)
        while reloading:
            for worker in workers:
                worker.send_signal(reloading[0])
            reloading.pop(0)
        for index, worker in enumerate(workers):
            if worker.poll() is not None and time.monotonic() - started[index] >= RESTART_S and not stopping:
                logger.error("Worker %d ended with %d and is replaced; its open calls are settled.", worker.pid, worker.returncode)
                workers[index], started[index] = start(index), time.monotonic()
    listener.close()  # the workers close theirs: who comes now is refused, and goes to another gateway, not into a queue that nobody reads
    return _drained(workers, stopping, alive_write)


@contextmanager
def beside(settings: Settings, listener: socket.socket, log: IO[bytes]) -> Iterator[None]:
    """Run one worker on a socket for as long as the block runs, and let its calls in flight finish; what it says goes to `log`.

    It ends with this process, however that ends. Raises OSError where it does not start; then `log` says why.
    """
    (alive_read, alive_write), (ready_read, ready_write) = os.pipe(), os.pipe()
    worker = _start(settings, listener, alive_read, ready_write, stdout=subprocess.DEVNULL, stderr=log)
    os.close(alive_read)
    os.close(ready_write)
    listener.close()
    try:
        started = os.read(ready_read, 1)
        os.close(ready_read)
        if not started:
            raise OSError(f"the gateway did not start (exit code {worker.wait()})")
        yield
    finally:
        _drained([worker], [], alive_write)


def _start(
    settings: Settings, listener: socket.socket, alive_fd: int, *ready_fd: int, stdout: int | None, stderr: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start a worker, which ends when nobody holds the other end of `alive_fd`, and says at `ready_fd` that it listens."""
    passed = (listener.fileno(), alive_fd, *ready_fd)
    own = replace(settings, socket_fd=passed[0], parent_fd=alive_fd, ready_fd=next(iter(ready_fd), None))
    command, environment = [sys.executable, *OPTIMISED, "-m", "gateway_addon.cli.worker"], os.environ | {WORKER: own.written()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # inherited: it waits for a worker that is not ready to hear it
    try:
        return subprocess.Popen(
            command, env=environment, pass_fds=passed, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
def inherited(settings: Settings) -> socket.socket:
    """Return a worker's listening socket, which its supervisor has bound."""
    return socket.socket(fileno=settings.socket_fd)


def _drained(workers: list[subprocess.Popen[bytes]], signals: list[int], alive_fd: int) -> int:
    """Let all workers finish their calls in flight; end them at a second signal. Returns the worst exit code."""
    for worker in workers:
        worker.terminate()
    os.close(alive_fd)
    while any(worker.poll() is None for worker in workers) and len(signals) < 2:
        time.sleep(0.05)
    if len(signals) < 2:
        return max(0 if worker.returncode == STILL_STARTING else abs(worker.returncode) for worker in workers)
    for worker in workers:
        worker.terminate()
    return max(abs(worker.wait()) for worker in workers)


def when_the_parent_ends(parent_fd: int, stop: Callable[[], None]) -> None:
    """Call `stop` once the supervising process is gone: its end of the pipe closes with it, even by kill -9."""
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(parent_fd)
        stop()

    loop.add_reader(parent_fd, ended)
