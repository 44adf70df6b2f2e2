"""How long a connection was not read because one of its sides was slow to take what was written to it.

mitmproxy reads a piece, writes what comes of it, and reads on once both sides have room again: so a few buffers of a stream are held at
most, however slow its reader is. That waiting is timed here, because the provider generates on meanwhile. Promises that the waiting
itself stays mitmproxy's own, on the fast path and off it. Knows nothing of the gateway.

mitmproxy closes what has been idle for too long, by the wall clock: a step of an hour would end calls whose answers take their time.
Here it goes by the clock that never steps.
"""

import time
from typing import Any

from mitmproxy import connection, ctx
from mitmproxy.proxy.mode_servers import ProxyConnectionHandler
from mitmproxy.proxy.server import TimeoutWatchdog

from gateway_addon.clocks import monotonic_s


class SteadyWatchdog(TimeoutWatchdog):
    """mitmproxy's watch over an idle connection, whatever becomes of the wall clock that it looks at."""

    active_monotonic_s: float

    @classmethod
    def take_over(cls, watchdog: Any) -> None:
        """Go on in this way with a watch that may have begun already."""
        watchdog.__class__ = cls
        watchdog.register_activity()

    @property
    def last_activity(self) -> float:  # type: ignore[override]
        """Return the wall clock's time at which it would have been active, had that clock always shown what it shows now."""
        return time.time() - (monotonic_s() - self.active_monotonic_s)

    def register_activity(self) -> None:
        self.active_monotonic_s = monotonic_s()


class TimedHandler(ProxyConnectionHandler):
    """mitmproxy's handler of a connection, with the time that it waited for room."""

    undrained_s: float = 0.0
    """All of it since the connection began. Two sides that wait at once count twice."""

    async def drain_writers(self) -> None:
        began_monotonic_s = monotonic_s()
        try:
            await super().drain_writers()  # type: ignore[no-untyped-call]
        finally:
            self.undrained_s += monotonic_s() - began_monotonic_s


def handler_of(client: connection.Client) -> Any:
    """Return the handler of a client's connection, None where it has ended."""
    return ctx.master.addons.get("proxyserver").connections.get(client.id)


def install(client: connection.Client) -> None:
    """Time the waiting and the idling of a connection from now on. Raises TypeError where mitmproxy has handlers of another kind."""
    handler = handler_of(client)
    if type(handler) is ProxyConnectionHandler:
        handler.__class__ = TimedHandler
    elif not isinstance(handler, TimedHandler):
        raise TypeError(f"mitmproxy handles a connection by {type(handler).__name__}: how long it waits for a slow reader is not known")
    SteadyWatchdog.take_over(handler.timeout_watchdog)
