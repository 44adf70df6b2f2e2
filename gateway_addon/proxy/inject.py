"""Put the real key on the wire copy of a request, at the last moment, and answer in the API's shape where mitmproxy would not.

Promises that the key is in no flow, so in nothing that shows or stores flows; that it leaves only for the pinned host, over
TLS where the upstream has it, once per admitted request; and that what leaves is what was admitted, byte for byte: a flow
edited afterwards is not sent. Decides nothing: takes a `SendPermission` from the flow's state, and notes there what happened.

mitmproxy writes a request in `HttpStream`, which reads `flow.request`. The subclass below swaps the request in the one
command that carries it to the wire. `install` puts it in place by the public `next_layer` hook.
"""

import functools
import logging
import re
from collections.abc import Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

from mitmproxy import connection, flow, http
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.layers.http import (
    DropStream,
    ErrorCode,
    HttpErrorHook,
    HttpEvent,
    HttpLayer,
    HTTPMode,
    HttpRequestHeadersHook,
    ReceiveHttp,
    RequestData,
    RequestHeaders,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
    SendHttp,
)

from gateway_addon.proxy.bounded_http1 import HEAD_BYTES_MAX
from gateway_addon.proxy.fastpath import plain_http1, relay, whole
from gateway_addon.proxy.flows import FlowState, SendPermission
from gateway_addon.proxy.request_head import NOT_WELL_FORMED
from gateway_addon.refusals import Refusal, new_request_id

logger = logging.getLogger(__name__)

FAILED = "The gateway failed while judging this request, so it was not sent. Its log says why; sending the same again will not help."
_TOLD_BEYOND = re.compile(r""":? b['"]|, refusing """)
"""Where mitmproxy's words about an answer go on to the bytes, or to advice that this gateway does not take."""
BROKEN = (RequestProtocolError, ResponseProtocolError)
BODY_METHODS = ("POST", "PUT", "PATCH")
"""Methods whose requests state a length even where they have no body (RFC 9110, section 8.6)."""


@functools.lru_cache(16)
def address(upstream: str) -> tuple[tuple[str, int], bool]:
    """Return an upstream's host and port, and whether it speaks TLS."""
    parts = urlsplit(upstream)
    secure = parts.scheme == "https"
    return (parts.hostname or "", parts.port or (443 if secure else 80)), secure


class Flows(Protocol):
    """The table of a process's flows."""

    def begin(self, flow: http.HTTPFlow) -> FlowState:
        """Remember a flow from now on."""

    def body_grew(self, flow_state: FlowState) -> bool:
        """Take note that more of a request's body has arrived; True where `flow.response` is to be sent at once, for lack of memory."""


def install(top: layer.Layer | None, flows: Flows) -> None:
    """Turn every plain HTTP layer under `top` into one whose streams inject (called from the `next_layer` hook)."""
    while top is not None:
        if type(top) is HttpLayer:
            InjectLayer.take_over(top, flows)
        top = getattr(top, "child_layer", None)


def uninstall(top: Any) -> None:
    """Turn the layers back, for a connection whose hook has failed: its flows are in no table, and so refused."""
    while top is not None:
        if type(top) is InjectLayer:
            top.__class__ = HttpLayer  # type: ignore[assignment]
        top = getattr(top, "child_layer", None)


class InjectLayer(relay.DirectLayer):
    """mitmproxy's HTTP layer, whose streams inject the key, and which ends its flows when a layer below fails."""

    broken = False
    """A layer has failed: its flows are settled, its connections close, and later events are ignored."""
    flows: Flows

    @classmethod
    def take_over(cls, top: Any, flows: Flows) -> None:
        top.__class__, top.flows = cls, flows
        whole.LightContext.take_over(top.context)

    def handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if self.broken:
            return
        try:
            yield from super().handle_event(event)
        except Exception as error:
            self.broken = True
            log_failure("a layer of the proxy", error)
            refusal = failed(error)
        else:
            return
        yield from self._end_all_flows(refusal)

    def _end_all_flows(self, refusal: Refusal) -> layer.CommandGenerator[None]:
        """End all flows in flight: mitmproxy would log the failure, and leave client and upstream waiting for each other."""
        states = [each.state for each in self.streams.values() if isinstance(each, InjectStream) and each.state is not None]
        self.streams.clear()  # with the bodies, where there was no memory for one more copy
        for state in states:
            state.broken_by = "gateway"
            state.flow.error = flow.Error(refusal.sentence)
            yield HttpErrorHook(state.flow)
        client = self.connections.get(self.context.client)
        if isinstance(client, ApiHttp1Server) and client.response is None:
            yield commands.SendData(self.context.client, _raw_answer(refusal))
        for connected in [*self.connections]:
            yield commands.CloseConnection(connected)

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if isinstance(event, events.Start) and self.context.client.alpn != b"h2":  # none, none in common, or HTTP/1
            server = ApiHttp1Server(self.context.fork())
            server.top = self
            first = self.connections.setdefault(self.context.client, server)
            if whole.FITS and self.mode is not HTTPMode.upstream:  # mitmproxy would make a server of its own, and drop it
                yield from self.event_to_child(first, event)
                return
        yield from super()._handle_event(event)

    def make_stream(self, stream_id: int) -> layer.CommandGenerator[None]:
        stream = self.streams[stream_id] = InjectStream(self.context.fork(), stream_id)
        stream.top = self
        if not whole.FITS:  # else it is made as one that has started
            yield from self.event_to_child(stream, events.Start())


class InjectStream(whole.WholeStream):
    """mitmproxy's HTTP stream, which sends an admitted request with the key, once, and ends a cut stream with its final event."""

    top: InjectLayer
    state: FlowState | None = None
    """The state of its flow, from its headers on."""

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        state = self.state
        if state is not None and isinstance(event, BROKEN):
            state.broken_by = state.broken_by or ("client" if isinstance(event, RequestProtocolError) else "upstream")
        elif state is not None and type(event) is RequestData:
            state.body_bytes += len(event.data)
            if self.top.flows.body_grew(state) and self.flow.response:
                yield from self._answer_and_close(self.flow.response)
                return
        generator = super()._handle_event(event)
        reply: Any = None
        while True:
            try:
                command = generator.send(reply)
            except StopIteration:
                return
            if type(command) is SendHttp:
                if isinstance(command.event, RequestHeaders) and command.connection is not self.context.client:
                    request = self._granted(command.event.request, command.connection)
                    if request is None:
                        generator.close()
                        yield from self._refuse_to_send()
                        return
                    command.event.request = request
                elif isinstance(command.event, ResponseProtocolError) and command.connection is self.context.client:
                    words = None if state is None else state.final_event
                    if words is not None:
                        yield SendHttp(ResponseData(self.stream_id, words), self.context.client)
                    command.event = self._ending(command.event)
                elif state is not None and state.unmasked is not None:
                    _unmask(command.event, *state.unmasked)
            elif type(command) is HttpRequestHeadersHook:
                state = self.state = self.top.flows.begin(self.flow)
            reply = yield command
            if type(command) is DropStream:
                self._break_cycles()
            elif type(command) is HttpRequestHeadersHook:
                self.flow.request.stream = False  # whatever another addon wants: a body is judged before any of it leaves
                if state is not None and state.close_unread and self.flow.response:
                    generator.close()
                    yield from self._answer_and_close(self.flow.response)
                    return

    def _break_cycles(self) -> None:
        """Break the reference cycles of an ended stream (its states are its own methods, its context lists it).

        Else its flow, with both bodies, would stay until the garbage collector runs, and that would have to run often.
        """
        self.client_state = self.server_state = _over
        self.context.layers.remove(self)

    def _granted(self, request: http.Request, server: connection.Connection) -> http.Request | None:
        """Return the wire copy of an admitted request; None without a grant, for another server, without TLS, or if it was changed."""
        state = self.state
        grant = None if state is None else state.leaves()
        if state is None or grant is None or not isinstance(server, connection.Server) or server.address != grant.address:
            return None
        if grant.tls and not (server.tls and server.tls_established):
            return None
        as_it_is = request.method, request.path, request.data.headers.fields, request.data.content
        if as_it_is != (grant.method, grant.path, grant.fields, grant.body):
            return None
        state.went_out()
        return _wire_copy(request, grant)

    def _refuse_to_send(self) -> layer.CommandGenerator[None]:
        logger.error("A request reached the wire without a grant, or changed after it was admitted; it was not sent.")
        refusal = Refusal(
            "internal", "The request was changed after it was admitted, so it was not sent. Send it again through the gateway, unedited."
        )
        self.flow.error = flow.Error(refusal.sentence)
        yield HttpErrorHook(self.flow)
        yield SendHttp(ApiProtocolError(self.stream_id, refusal.sentence, ErrorCode.GENERIC_SERVER_ERROR, refusal), self.context.client)
        self._give_up()

    def _ending(self, event: ResponseProtocolError) -> HttpEvent:
        state = self.state
        if state is not None and state.final_event is not None:
            return ResponseEndOfMessage(self.stream_id)
        if state is not None and state.refusal is not None:
            return ApiProtocolError(self.stream_id, event.message, ErrorCode.GENERIC_SERVER_ERROR, state.refusal)
        return event

    def _answer_and_close(self, response: http.Response) -> layer.CommandGenerator[None]:
        """Answer, and close the connection behind it; say so, or the client's next request comes to its end."""
        client = self.context.client
        if not self.flow.request.is_http2:
            response.headers["connection"] = "close"
        yield SendHttp(ResponseHeaders(self.stream_id, response, end_stream=False), client)
        yield SendHttp(ResponseData(self.stream_id, response.raw_content or b""), client)
        yield SendHttp(ResponseProtocolError(self.stream_id, "answered without reading the body", ErrorCode.KILL), client)
        self._give_up()

    def _give_up(self) -> None:
        self.flow.live = False
        self.client_state = self.server_state = self.state_errored


def _unmask(event: HttpEvent, mask: bytes, secret: bytes) -> None:
    """Put a secret in the place of its mask, on the wire alone: the flow keeps the mask."""
    if isinstance(event, whole.WholeAnswer):
        event.content = event.content.replace(mask, secret)
    elif isinstance(event, ResponseData):
        event.data = event.data.replace(mask, secret)


def failed(error: Exception) -> Refusal:
    """Return the refusal for a request at which the gateway failed."""
    if isinstance(error, MemoryError):
        return Refusal("crowded", "The gateway has no memory for this request beside those in flight. Send it again in a moment.", 1)
    return Refusal("internal", FAILED)


def log_failure(where: str, error: Exception) -> None:
    """Log a failure. Lack of memory takes one line: its traceback would keep the bodies alive, and names a place by chance."""
    if isinstance(error, MemoryError):
        logger.error("Out of memory in %s: its call ends. Lower bodies_in_flight, or give the process more.", where)
    else:
        logger.error("The gateway failed in %s.", where, exc_info=error)


def _over(event: events.Event) -> layer.CommandGenerator[None]:
    """Ignore an event: the state of a stream that has ended."""
    yield from ()


class ApiProtocolError(ResponseProtocolError):
    """A broken exchange, with the refusal that the client gets."""

    def __init__(self, stream_id: int, message: str, code: ErrorCode, refusal: Refusal):
        super().__init__(stream_id, message, code)
        self.refusal = refusal


class ApiHttp1Server(whole.WholeServer):
    """mitmproxy's HTTP/1 server, with its own errors (400, 413, 502, in HTML) in the API's shape, and a bounded head.

    A client that closes its side behind its request is taken for one that left, unless its call is one to `hold_open`.
    """

    top: HttpLayer

    def handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        """Handle an event without the bookkeeping of blocking commands: this layer has none, in the releases that are known."""
        return self._handle_event(event) if relay.FITS else super().handle_event(event)

    def send(self, event: HttpEvent) -> layer.CommandGenerator[None]:
        state = self.conn.state
        if state is not connection.ConnectionState.OPEN and not state & connection.ConnectionState.CAN_WRITE:
            return  # one answer was given and the connection closed behind it: a second one would be taken for the next request's
        if isinstance(event, ResponseData) and not event.data:
            return  # an empty chunk would end the body, as if it were whole
        if isinstance(event, ResponseProtocolError) and not self.response:
            refusal = event.refusal if isinstance(event, ApiProtocolError) else _refusal_of_mitmproxy(event)
            if refusal is not None:
                yield commands.SendData(self.conn, _raw_answer(refusal))
                yield commands.CloseConnection(self.conn)
                return
        yield from super().send(event)
        if isinstance(event, ResponseEndOfMessage | whole.WholeAnswer) and self.conn.state is connection.ConnectionState.CAN_WRITE:
            yield from self.state(events.ConnectionClosed(self.conn))  # as it was while the call went on

    def wait(self, event: events.Event) -> layer.CommandGenerator[None]:
        stream = self.top.streams.get(self.stream_id)
        state = stream.state if isinstance(event, events.ConnectionClosed) and isinstance(stream, InjectStream) else None
        if state is not None and state.hold_open and (state.sent or self.conn.state is connection.ConnectionState.CAN_WRITE):
            state.client_ended()
            return
        yield from super().wait(event)

    def read_headers(self, event: events.ConnectionEvent) -> layer.CommandGenerator[None]:
        if self.buf and (head := bytes(self.buf)).startswith((b"\r", b"\n")):  # empty lines before a request (RFC 9112, section 2.2)
            self.buf.maybe_extract_at_most(len(head) - len(head.lstrip(b"\r\n")))
        if len(self.buf) > HEAD_BYTES_MAX and b"\r\n\r\n" not in bytes(self.buf)[:HEAD_BYTES_MAX]:
            sentence = f"The request's headers are longer than {HEAD_BYTES_MAX // 1024} KB. Send fewer or shorter headers."
            yield from self._reject(Refusal("request", sentence))
            return
        for command in super().read_headers(event):
            if isinstance(command, commands.SendData) and self.state == self.read_headers:  # else they are of the body behind it
                lengths = "The request's length headers are ambiguous or invalid. Send one Content-Length, or chunked alone."
                command.data = _raw_answer(Refusal("request", NOT_WELL_FORMED if self.request is None else lengths))
            yield command

    def read_body(self, event: events.Event) -> layer.CommandGenerator[None]:
        """Pass on as one piece the chunks of a body that arrived together: 64 KB can be ten thousand, each through all layers."""
        pieces: list[bytes] = []
        for command in super().read_body(event):
            if type(command) is ReceiveHttp and type(command.event) is RequestData:
                pieces.append(command.event.data)
                continue
            if pieces:
                yield ReceiveHttp(RequestData(self.stream_id, b"".join(pieces)))
                pieces.clear()
            if type(command) is commands.CloseConnection and isinstance(event, events.DataReceived) and not self.response:
                yield commands.SendData(self.conn, _raw_answer(Refusal("request", NOT_WELL_FORMED)))
            yield command
        if pieces:
            yield ReceiveHttp(RequestData(self.stream_id, b"".join(pieces)))

    def _reject(self, refusal: Refusal) -> Iterator[commands.Command]:
        yield commands.SendData(self.conn, _raw_answer(refusal))
        yield commands.CloseConnection(self.conn)
        self.state = self.done


def _wire_copy(request: http.Request, grant: SendPermission) -> http.Request:
    """Copy the request with the real credential and the gateway's own framing, without headers that stay here.

    The copy is shallow and made by hand: `request.copy()` checks every field's type, a tenth of a call's processor time.
    """
    sent = _shallow_copy(request)
    sent.data = _shallow_copy(request.data)
    name, secret = grant.credential
    host = b"host", plain_http1.host_of(grant.address, grant.tls)
    framing = ((b"content-length", b"%d" % len(grant.body or b"")),) if grant.body or grant.method in BODY_METHODS else ()
    sent.data.headers = plain_http1.headers((host, *grant.leaving, *framing, (name.encode(), secret.encode())))
    return sent


def _shallow_copy[T](thing: T) -> T:
    """Return a shallow copy; `copy.copy` would take the slower way of pickle's protocol."""
    made = object.__new__(type(thing))
    made.__dict__.update(thing.__dict__)
    return made


def _refusal_of_mitmproxy(event: ResponseProtocolError) -> Refusal | None:
    """Return the refusal for an error of mitmproxy's own, or None where it would close without an answer."""
    match event.code:
        case ErrorCode.REQUEST_TOO_LARGE:
            return Refusal("too_large", "The request's body is larger than the gateway takes (33 MB). Send less, or use several calls.")
        case ErrorCode.REQUEST_VALIDATION_FAILED | ErrorCode.GENERIC_CLIENT_ERROR | ErrorCode.DESTINATION_UNKNOWN:
            return Refusal("request", NOT_WELL_FORMED)
        case ErrorCode.CONNECT_FAILED:
            sentence = f"The gateway could not reach the Claude API: {event.message}. Nothing was sent; try again."
            if "ertificate verify failed" in event.message:
                sentence += " If a proxy of the company's opens TLS, name its authority in gateway.yaml (egress.ca)."
            return Refusal("upstream_unreachable", sentence)
        case ErrorCode.GENERIC_SERVER_ERROR | ErrorCode.RESPONSE_VALIDATION_FAILED | ErrorCode.RESPONSE_TOO_LARGE:
            shown = _TOLD_BEYOND.split(event.message)[0][:200]  # the bytes themselves may be an echo of the request, the key in it
            return Refusal("upstream_unreachable", f"The Claude API's answer broke off before it began ({shown}). Try again.")
        case _:
            return None


def _raw_answer(refusal: Refusal) -> bytes:
    """Return a complete HTTP/1.1 answer for a connection that is about to be closed."""
    request_id = new_request_id()
    body = refusal.body(request_id)
    headers = {**refusal.headers(request_id), "content-length": str(len(body)), "connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {refusal.status} {refusal.error_type}\r\n{head}\r\n".encode() + body
