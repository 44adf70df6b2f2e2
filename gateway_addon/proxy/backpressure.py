"""Measure how long a connection was not read because one of its sides was slow to take its bytes.

mitmproxy reads a piece, writes it, and reads on once both sides have room again: so a few buffers of a stream are held at
most, however slow its reader is. That waiting is timed here, because the provider generates on meanwhile. Promises that the waiting
itself stays mitmproxy's own, on the fast path and off it. Knows nothing of the gateway.

mitmproxy closes idle connections by the wall clock, so a clock step of an hour would end calls with slow answers. Here the
monotonic clock counts.
"""

import asyncio
import time
from typing import Any, Self

from mitmproxy import connection, ctx
from mitmproxy.proxy.mode_servers import ProxyConnectionHandler
from mitmproxy.proxy.server import TimeoutWatchdog

from gateway_addon.clocks import monotonic_s


class SteadyWatchdog(TimeoutWatchdog):
    """mitmproxy's watchdog of an idle connection, made independent of steps of the wall clock."""

    active_monotonic_s: float

    @classmethod
    def take_over(cls, watchdog: Any) -> None:
        """Turn a watchdog that may be running already into this one."""
        watchdog.__class__ = cls
        watchdog.register_activity()

    @property
    def last_activity(self) -> float:  # type: ignore[override]
        """Return the last activity in wall-clock time, corrected by the monotonic clock; now, while it is disarmed."""
        return time.time() - (0 if self.blocker else monotonic_s() - self.active_monotonic_s)

    def register_activity(self) -> None:
        self.active_monotonic_s = monotonic_s()

    def disarm(self) -> Self:  # type: ignore[override]
        """Return a context in which idling is no reason to close, as mitmproxy's own is, without a generator for each hook."""
        return self

    def __enter__(self) -> None:
        self.blocker += 1

    def __exit__(self, *error: object) -> None:
        self.blocker -= 1
        self.register_activity()


class TimedHandler(ProxyConnectionHandler):
    """mitmproxy's handler of a connection, which measures the time that it waited for room, and knows its current flow."""

    flow_state: Any = None
    """The state of the flow under way (flows.py), None between two. HTTP/1 has one at a time."""
    undrained_s: float = 0.0
    """The waiting time since the connection began. Two sides that wait at once count twice."""

    async def drain_writers(self) -> None:
        if self.is_drained():
            return
        began_monotonic_s = monotonic_s()
        try:
            await super().drain_writers()  # type: ignore[no-untyped-call]
        finally:
            self.undrained_s += monotonic_s() - began_monotonic_s

    def is_drained(self) -> bool:
        """Tell whether nothing waits in any writer, so that there is nothing to wait for."""
        for io in self.transports.values():
            if io.writer is None:
                continue
            if type(io.writer) is not asyncio.StreamWriter or (way := io.writer.transport).is_closing() or way.get_write_buffer_size():
                return False
        return True


def handler_of(client: connection.Client) -> Any:
    """Return the handler of a client's connection, None where it has ended."""
    return ctx.master.addons.get("proxyserver").connections.get(client.id)


def install(client: connection.Client) -> None:
    """Measure waiting and idling of a connection from now on. Raises TypeError where mitmproxy has handlers of another kind."""
    handler = handler_of(client)
    if type(handler) is ProxyConnectionHandler:
        handler.__class__ = TimedHandler
    elif not isinstance(handler, TimedHandler):
        raise TypeError(f"mitmproxy handles a connection by {type(handler).__name__}: how long it waits for a slow reader is not known")
    SteadyWatchdog.take_over(handler.timeout_watchdog)
