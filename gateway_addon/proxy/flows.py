"""Keep the state of a flow from its headers to its end, hold a call to its deadlines, and cut it early.

Promises that an admitted call has a deadline at every moment (to connect, to begin, to go on, and the end of its grant), and
that a call which is cut closes its upstream socket at once. Knows mitmproxy's connections; decides nothing about money.
"""

import asyncio
import dataclasses
import math
from typing import Any

from mitmproxy import connection, http

from gateway_addon.calls.admission import Admission, Caller, EndedBy
from gateway_addon.calls.exchange import ExchangeRequest
from gateway_addon.calls.gateway import Gateway
from gateway_addon.calls.responses import error_event
from gateway_addon.calls.running import InFlightCall
from gateway_addon.calls.top_ups import cut_refusal
from gateway_addon.clocks import Clocks
from gateway_addon.proxy.backpressure import handler_of
from gateway_addon.refusals import Refusal

CUT_GRACE_S = 0.1  # for a cut stream to complete its current event
LOOK_AGAIN_S = 3600.0
HALF_CLOSED_S = 0.25  # a client that closed its side may still wait so long to be admitted: longer than it takes where there is budget
UNREAD_ANSWER_S = 1.0  # for a client to read the answer to a body that was refused

@dataclasses.dataclass(frozen=True, slots=True)
class SendPermission:
    """Permission to send one request, as admitted, to one address, with one credential."""

    address: tuple[str, int]
    tls: bool
    method: str
    path: str
    fields: tuple[tuple[bytes, bytes], ...]
    """The headers as judged."""
    leaving: tuple[tuple[bytes, bytes], ...]
    """The headers that the API gets, besides those that the gateway writes: host, length and credential."""
    body: bytes | None
    credential: tuple[str, str] = dataclasses.field(repr=False)
    """Header name and secret. Kept out of every repr, so out of every traceback and log."""


@dataclasses.dataclass(slots=True, eq=False, weakref_slot=True)
class FlowState:
    """All that is remembered of one flow, from its headers on.

    The stream of mitmproxy's layers that made it (inject.py) keeps it to its own end; the addon finds it by its flow's id until the
    call has ended.
    """

    flow: http.HTTPFlow
    gateway: Gateway
    clocks: Clocks
    handler: Any
    """The handler of its connection (backpressure.py); None once the connection or the flow has ended."""
    caller: Caller | None = None
    exchange: ExchangeRequest | None = None
    """Set where the body is an identity token to exchange for a session."""
    admitting: "asyncio.Task[None] | None" = None
    """The task that waits for this call to be admitted, while one does."""
    left: bool = False
    """The client has left for certain, or has closed its side while it waited for budget."""
    client_closed: bool = False
    """The client has closed its side: it has left, or only sends nothing more."""
    admission: Admission | None = None
    running: InFlightCall | None = None
    """Set where the admission has a hold: the call is metered."""
    began_monotonic_s: float = 0.0
    """The moment of its admission."""
    undrained_before_s: float = 0.0
    """How long its connection had waited for a slow reader before its admission."""
    server: connection.Server | None = None
    status: int | None = None
    last_byte_monotonic_s: float = 0.0
    """Set for an answer that passes without a meter."""
    cut_by: float = math.inf
    """The moment at which a stream that is being cut closes, even within an event."""
    watchdog: asyncio.TimerHandle | None = None
    ended: bool = False
    on_end: "asyncio.Future[None] | None" = None
    """Done at the flow's end, where a task waits for it."""

    # On the wire: the permission to send goes in, the facts come out.

    grant: SendPermission | None = None
    sent: bool = False
    """The request was handed to the upstream's socket: from here on the provider may have done work."""
    broken_by: EndedBy | None = None
    refusal: Refusal | None = None
    """The client's answer if the exchange breaks before the upstream's answer began."""
    close_unread: bool = False
    """Answer with `flow.response` at once, without reading the body, and close."""
    body_bytes: int = 0
    """Bytes of the request's body that have arrived."""
    hold_open: bool = False
    """The call goes on when its client closes its side: the client may still read, and the answer tells the cost."""
    final_event: bytes | None = None
    """The gateway's own final event of a stream that it cuts: sent when the upstream side is closed, before a clean end."""
    unmasked: tuple[bytes, bytes] | None = None
    """A mask in the gateway's own answer, and the secret that the client gets in its place."""

    def began(self, admission: Admission, monotonic_s: float) -> None:
        """Note the admission, before any of the call is sent."""
        self.admission, self.running = admission, self.gateway.run(admission, monotonic_s)
        self.hold_open = self.hold_open and not admission.streams
        self.began_monotonic_s = monotonic_s
        self.undrained_before_s = self.handler.undrained_s if self.handler is not None else 0.0

    def leaves(self) -> SendPermission | None:
        """Take the permission to send, which is good for once."""
        grant, self.grant = self.grant, None
        return grant

    def went_out(self) -> None:
        """Note that the request is being handed to the upstream's socket: other deadlines hold from then on."""
        self.sent = True
        self.watch()

    # -- the bytes of a stream

    def chunk(self, chunk: bytes) -> bytes:
        """Meter a chunk of a stream. Returns the bytes for the client: the chunk itself, unless the call is being cut."""
        running, monotonic_s = self.running, self.clocks.monotonic_s()
        if running is None:
            self._pass_unmetered(chunk, monotonic_s)
        if running is None or not chunk:
            return chunk
        paused_s = self.handler.undrained_s - self.undrained_before_s if self.handler is not None else 0.0
        running.feed(chunk, monotonic_s, self.gateway.streams.stalled_s(monotonic_s), paused_s)
        self.gateway.progressed(running, monotonic_s)
        if running.cut is None and not running.covers(monotonic_s):
            running.cut = "budget"
        return chunk if running.cut is None else self._last_bytes(chunk, running)

    def _last_bytes(self, chunk: bytes, running: InFlightCall) -> bytes:
        """Return the bytes that still pass of a stream that is being cut: up to the end of an event; the final event follows."""
        if self.final_event is not None:
            return b""  # it arrived after the final event was chosen
        if running.encoded:
            self.close_upstream()
            return b""
        whole = running.meter is not None and running.meter.at_event_boundary
        end = len(chunk) if whole else _last_boundary(chunk)
        if end == 0 and (monotonic_s := self.clocks.monotonic_s()) < self.cut_by:
            self.cut_by = min(self.cut_by, monotonic_s + CUT_GRACE_S)
            self.watch()
            return chunk
        if end:
            self.final_event = self._final_event(running)
        self.close_upstream()
        return chunk[:end]

    def _pass_unmetered(self, chunk: bytes, monotonic_s: float) -> None:
        """Pass a chunk of an answer without a meter to its tap, if it has one."""
        self.last_byte_monotonic_s = monotonic_s
        if self.admission is not None and self.admission.response_hook.tap is not None and chunk:
            self.admission.response_hook.tap(chunk)

    # -- deadlines

    def watch(self) -> None:
        """Check the deadlines now, and again when the nearest one is due.

        A deadline that moves away leaves the timer in place, which then checks early: most calls end long before their first deadline.
        """
        if self.ended:
            return
        monotonic_s, loop, running = self.clocks.monotonic_s(), asyncio.get_running_loop(), self.running
        since, what, limit_s = self._waits_for()
        granted_until = min(running.covered_until(), self.cut_by) if running is not None and self.sent else math.inf
        due = min(since + limit_s, granted_until)
        if monotonic_s >= due:
            self.stop_watching()
            if running is not None and granted_until < since + limit_s:
                self.cut(running.cut or "budget")
            else:
                self._time_out(what, limit_s)
            return
        look_at = loop.time() + min(due - monotonic_s, LOOK_AGAIN_S)
        if self.watchdog is None or self.watchdog.when() > look_at:
            self.stop_watching()
            self.watchdog = loop.call_at(look_at, self._look)

    def _look(self) -> None:
        self.watchdog = None
        self.watch()

    def stop_watching(self) -> None:
        """Stop watching."""
        if self.watchdog is not None:
            self.watchdog.cancel()
            self.watchdog = None

    def end(self) -> None:
        """End the flow: nothing of it is sent any more, and nothing waits for it."""
        if self.handler is not None and self.handler.flow_state is self:
            self.handler.flow_state = None  # a connection that idles keeps no bodies
        self.ended, self.handler, self.grant = True, None, None
        self.stop_watching()
        if self.on_end is not None and not self.on_end.done():
            self.on_end.set_result(None)

    # -- a client that leaves

    def client_ended(self) -> None:
        """Note that the client closed its side. It may still read: it gets its answer, but does not wait for budget."""
        self.client_closed = True
        if self.ended:
            return
        asyncio.get_running_loop().call_later(HALF_CLOSED_S, self.stop_waiting)

    def stop_waiting(self) -> None:
        """Give up waiting to be admitted."""
        if self.admitting is not None:
            self.left = True
            self.admitting.cancel()

    async def finished(self) -> None:
        """Wait until the answer of a call that goes on without its client is read to its end."""
        if self.sent and self.hold_open and not self.ended:
            self.on_end = asyncio.get_running_loop().create_future()
            await self.on_end

    def _waits_for(self) -> tuple[float, str, float]:
        """Return since when the upstream is waited for, what it did not do if that lasts too long, and how long it may last."""
        assert self.caller is not None
        timeouts, running = self.caller.policy.timeouts, self.running
        if not self.sent:
            return self.began_monotonic_s, "could not be reached", timeouts.connect_s
        if running is None and self.last_byte_monotonic_s:
            return self.last_byte_monotonic_s, "sent nothing", timeouts.silence_s
        if running is None or running.status is None:
            return self.began_monotonic_s, "began no answer", timeouts.first_byte_s
        return running.last_byte_monotonic_s, "sent nothing", timeouts.silence_s

    def _time_out(self, what: str, limit_s: float) -> None:
        sentence = f"The Claude API {what} within {limit_s:g} s, so the gateway gave up on this call. Try again."
        self.refusal = Refusal("upstream_timeout", sentence)
        self.close_upstream()

    # -- an early end

    def cut(self, why: str) -> None:
        """End a running call now, with the reason as the stream's final event where one can be sent."""
        running = self.running
        if running is None or self.ended:
            return
        running.cut = why
        if running.meter is None:
            self.refusal = cut_refusal(running)
        elif running.meter.at_event_boundary and not running.encoded:
            self.final_event = self._final_event(running)
        self.close_upstream()

    def _final_event(self, running: InFlightCall) -> bytes:
        refusal = cut_refusal(running)
        return error_event(refusal.error_type, refusal.sentence)

    def close_upstream(self) -> None:
        """Close the socket to the upstream; mitmproxy then ends the exchange towards the client."""
        handler = handler_of(self.flow.client_conn)
        for each, transport in list(handler.transports.items()) if handler is not None else ():
            # Every server connection: the flow does not know one that leads to a proxy on the route.
            if isinstance(each, connection.Server) and transport.handler is not None:
                transport.handler.cancel("closed by the gateway")


def close_forgotten(client: connection.Client) -> None:
    """Close the socket of a connection that has ended, where mitmproxy left it open: it does so when a piece arrives as it closes.

    Not at once: a client that is still sending would lose the answer that it has not read yet.
    """
    handler = handler_of(client)
    transport = handler.transports.get(client) if handler is not None else None
    if transport is not None and not transport.writer.is_closing():
        transport.writer.write_eof()
        asyncio.get_running_loop().call_later(UNREAD_ANSWER_S, transport.writer.close)


def _last_boundary(chunk: bytes) -> int:
    """Return the index behind the last blank line of a piece of an event stream; 0 if no event ends in it."""
    for blank in (b"\n\n", b"\r\n\r\n"):
        found = chunk.rfind(blank)
        if found >= 0:
            return found + len(blank)
    return 0
