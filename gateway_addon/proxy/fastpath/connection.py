"""Take a connection's bytes where they arrive, and run its hooks inline where no addon awaits, without a task woken for each.

mitmproxy wakes a task for every piece that arrives, and makes one for every hook, which waits for a lock that the event itself still
holds: six turns of the loop a call; without that there are 5 % more calls a second (64 connections). Here the running handler also takes
the events that arrive meanwhile, in the same order. Promises the same commands, hooks and order as mitmproxy's own handler, and that it
reads no more while a side is slow to take its bytes (backpressure.py), in the releases that it was written beside; in any other that one
stays (`fits`). Knows nothing of the gateway.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable
from typing import Any

from mitmproxy import connection, optmanager
from mitmproxy.options import Options
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.commands import ConnectionCommand, OpenConnection, RequestWakeup, SendData, StartHook
from mitmproxy.proxy.layers import modes
from mitmproxy.proxy.mode_servers import ProxyConnectionHandler
from mitmproxy.proxy.server import ConnectionHandler, ConnectionIO
from mitmproxy.utils import asyncio_utils

from gateway_addon.proxy.backpressure import SteadyWatchdog, TimedHandler, handler_of
from gateway_addon.proxy.fastpath import dispatch

PARTS = {
    "server_event": ["self", "event"],
    "open_connection": ["self", "command"],
    "close_connection": ["self", "connection", "half_close"],
    "wakeup": ["self", "request"],
    "handle_hook": ["self", "hook"],
    "handle_connection": ["self", "connection"],
    "drain_writers": ["self"],
}
"""The methods that this module overrides or relies on, with their parameters."""
READER = {"feed_data": ["self", "data"], "read": ["self", "n"], "_wakeup_waiter": ["self"], "_wait_for_data": ["self", "func_name"]}
"""Those of asyncio's reader."""
OPTION = {"current": ["self"], "reset": ["self"]}
"""Those of one of mitmproxy's options."""
PIECE_BYTES_MAX = 65_535  # as mitmproxy reads: a side that takes no bytes leaves no more than some such pieces here
CHOOSERS = (layer.NextLayer, modes.ReverseProxy)


def fits(handler: type = ConnectionHandler, reader: type = asyncio.StreamReader) -> bool:
    """Tell whether mitmproxy's handler and options, and asyncio's reader, are those that this module was written for."""
    parts = (handler, PARTS), (reader, READER), (optmanager._Option, OPTION)
    return dispatch.fits() and all(dispatch.has(owner, methods) for owner, methods in parts)


FITS = fits()


def _chosen(top: Any) -> Any:
    """Return the first layer that handles events: those above have chosen it, and only pass events on."""
    while type(top) in CHOOSERS:
        choice = vars(top).get("layer" if type(top) is layer.NextLayer else "child_layer")
        if choice is None or top._paused or getattr(top._handle_event, "__self__", None) is not choice:
            break
        top = choice
    return top


class QuickOptions(Options):
    """mitmproxy's options, which copies no values that cannot change: a new connection reads twenty of them."""

    def __getattr__(self, attr: str) -> Any:
        option = self._options.get(attr) if FITS else None
        if option is not None:
            value = option._default if option.value is optmanager.unset else option.value
            if value is None or type(value) in (bool, int, str):
                return value
        return super().__getattr__(attr)  # type: ignore[no-untyped-call]


class QuickHandlers:
    """The addon that gives each new connection its handler, before its first event."""

    def client_connected(self, client: connection.Client) -> None:
        handler = handler_of(client)
        if FITS and type(handler) is ProxyConnectionHandler and isinstance(handler.master.addons, dispatch.Dispatch):
            QuickHandler.take_over(handler)


class QuickReader(asyncio.StreamReader):
    """asyncio's reader, which hands a piece on where it arrives while its task only waits for one."""

    handler: "QuickHandler"
    read_from: connection.Connection
    _waiter: asyncio.Future[None] | None
    full = False
    """A side has not taken all of its bytes: the task is woken to wait for that, as mitmproxy's does, before it reads on."""

    @classmethod
    def take_over(cls, reader: Any, handler: "QuickHandler", read_from: connection.Connection) -> None:
        reader.__class__, reader.handler, reader.read_from = cls, handler, read_from

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        waiter = self._waiter
        if waiter is None or waiter.done() or len(data) > PIECE_BYTES_MAX:
            return super().feed_data(data)  # its task takes it piece by piece, when it has finished what it is at
        self.handler.take(events.DataReceived(self.read_from, data))
        if self.handler.full and not self.handler.is_drained():
            self.full = True
            self._wakeup_waiter()  # type: ignore[attr-defined]
        else:
            self.handler.full = False

    async def read(self, n: int = -1) -> bytes:
        while not (data := await super().read(n)) and self.full:
            self.full = False
            await self.handler.drain_writers()
        return data


class QuickHandler(TimedHandler):
    arrived: deque[events.Event]
    hooks: dispatch.Dispatch
    timeout_watchdog: SteadyWatchdog
    hooking: set[asyncio.Task[None] | None]
    """Hooks that wait for something: held here, since the loop holds its tasks weakly."""
    at_work: bool
    """Whether an event is being handled. (There is one thread, but an eager task can start in the middle of an event.)"""
    said: list[SendData]
    """Words for one side, said in the event that is being handled, and not written yet."""
    full = False
    """Whether a side may have bytes that it has not taken."""

    @classmethod
    def take_over(cls, handler: Any) -> None:
        """Turn the handler of a connection that has had no event yet into this one."""
        handler.__class__ = cls
        handler.arrived, handler.at_work, handler.hooks, handler.hooking = deque(), False, handler.master.addons, set()
        handler.said = []

    async def handle_connection(self, connection: connection.Connection) -> None:
        if type(reader := self.transports[connection].reader) is asyncio.StreamReader:
            QuickReader.take_over(reader, self, connection)
        await super().handle_connection(connection)

    async def server_event(self, event: events.Event) -> None:
        self.take(event)

    def take(self, event: events.Event) -> None:
        """Handle an event, and those that it causes at once."""
        self.arrived.append(event)
        if self.at_work:
            return
        self.at_work = True
        self.timeout_watchdog.register_activity()
        try:
            while self.arrived:
                self._take(self.arrived.popleft())
        finally:
            self.at_work = False
            if self.said:
                self._write()

    def _take(self, event: events.Event) -> None:
        if type(self.layer) in CHOOSERS:
            self.layer = _chosen(self.layer)
        try:
            for command in self.layer.handle_event(event):
                if type(command) is SendData:
                    if self.said and self.said[-1].connection is not command.connection:
                        self._write()
                    self.said.append(command)
                elif isinstance(command, StartHook):
                    self._hook(command)
                else:
                    self._command(command)
        except Exception:
            self.log("mitmproxy has crashed!", logging.ERROR, exc_info=True)

    def _write(self) -> None:
        """Write what was said to one side, in one piece: each write is a call of the system, and wakes the reader."""
        said, self.said = self.said, []
        io = self.transports.get(said[0].connection)
        if io is None or io.writer is None:
            return
        way = io.writer.transport if isinstance(io.writer, asyncio.StreamWriter) else io.writer
        if not way.is_closing():
            way.write(said[0].data if len(said) == 1 else b"".join([each.data for each in said]))
            self.full = self.full or not isinstance(way, asyncio.WriteTransport) or way.get_write_buffer_size() > 0

    def _command(self, command: commands.Command) -> None:
        """Handle the rare commands: connections and timers."""
        if isinstance(command, commands.Log):
            self.log(command.message, command.level)
            return
        if self.said:
            self._write()
        if isinstance(command, OpenConnection):
            name = f"server connection handler {command.connection.address}"
            task = asyncio_utils.create_task(self.open_connection(command), name=name, keep_ref=False, client=self.client.peername)
            self.transports[command.connection] = ConnectionIO(handler=task)
        elif isinstance(command, RequestWakeup):
            task = asyncio_utils.create_task(self.wakeup(command), name="wakeup timer", keep_ref=False, client=self.client.peername)
            self.wakeup_timer.add(task)
        elif isinstance(command, ConnectionCommand):
            if command.connection in self.transports:
                half = isinstance(command, commands.CloseTcpConnection) and command.half_close
                self.close_connection(command.connection, half)
        else:
            raise RuntimeError(f"Unexpected command: {command}")

    def _hook(self, hook: StartHook) -> None:
        rest = self.hooks.begin(hook)
        if rest is None:
            self._done_at_once(hook)
            return
        task = asyncio.Task(self._rest_of(hook, rest), loop=asyncio.get_running_loop(), name=hook.name, eager_start=True)
        if not task.done():
            self.hooking.add(task)
            self.timeout_watchdog.__enter__()

    async def _rest_of(self, hook: StartHook, rest: Awaitable[None]) -> None:
        task = asyncio.current_task()
        try:
            await rest
        finally:
            if waited := task in self.hooking:
                self.hooking.discard(task)
                self.timeout_watchdog.__exit__()
        if not waited:
            self._done_at_once(hook)
        elif hook.blocking:
            self.take(events.HookCompleted(hook))

    def _done_at_once(self, hook: StartHook) -> None:
        """Let the layer that waits for a hook go on: behind it, where it can do that (whole.py) and no event came before."""
        if getattr(hook, "goes_on", False) and not self.arrived:
            hook.blocking = False
        elif hook.blocking:
            self.arrived.append(events.HookCompleted(hook))
