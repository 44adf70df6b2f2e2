"""Pass plain messages that arrive whole through mitmproxy's HTTP layers in one event instead of three.

mitmproxy takes a message apart (head, body, end), passes each part through four layers, up and down again, and puts it together at the
other side: without this a JSON call costs 15 to 40 % more processor time. Here a request or an answer that is there in one piece, and
framed as clients and the API frame theirs, is read, judged and sent on as one; of an answer in chunks that comes in pieces, the head and
the end are read and written so. Promises the same hooks in the same order, the same bytes
and the same states of mitmproxy's own layers at each moment at which anything else can happen, so that whatever does happen then is
theirs to deal with. Everything that is not plain to the byte, and any release that is not known (`fits`), goes mitmproxy's own way.
Knows nothing of the gateway.
"""

import time
import uuid
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from h11._readers import ChunkedReader
from mitmproxy import connection, flow, http
from mitmproxy.hooks import Hook
from mitmproxy.options import Options
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers.http import (
    DropStream,
    Http1Client,
    Http1Server,
    HttpEvent,
    HttpLayer,
    HttpRequestHeadersHook,
    HttpRequestHook,
    HttpResponseHeadersHook,
    HttpResponseHook,
    HttpStream,
    ReceiveHttp,
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    SendHttp,
)
from mitmproxy.proxy.layers.http._http1 import Http1Connection
from mitmproxy.proxy.mode_specs import ReverseMode
from mitmproxy.proxy.utils import ReceiveBuffer
from mitmproxy.utils import human

from gateway_addon.proxy import bounded_http1
from gateway_addon.proxy.fastpath import dispatch
from gateway_addon.proxy.fastpath.plain_http1 import (
    CHUNKED,
    LAST_CHUNK,
    RawFields,
    answer_head_bytes,
    framing_of,
    head_bytes,
    host_of,
    is_plain,
    read_answer,
    read_answer_head,
    read_request,
    with_host,
)

_EVENT = ["self", "event"]
PARTS: dict[type, dict[str, list[str]]] = {
    Http1Server: {**dict.fromkeys(("_handle_event", "send", "wait", "read_headers"), _EVENT), "mark_done": ["self", "request", "response"]},
    Http1Client: {**dict.fromkeys(("_handle_event", "send", "read_headers"), _EVENT), "mark_done": ["self", "request", "response"]},
    flow.Flow: {"__init__": ["self", "client_conn", "server_conn", "live"]},
    HttpStream: {
        "__init__": ["self", "context", "stream_id"],
        **dict.fromkeys(("_handle_event", "state_wait_for_response_headers"), _EVENT),
        **dict.fromkeys(("state_consume_response_body", "state_stream_response_body"), _EVENT),
        "state_done": ["self", "_"],
        "check_killed": ["self", "emit_error_hook"],
        "make_server_connection": ["self"],
        "start_response_stream": ["self"],
        "send_response": ["self", "already_streamed"],
    },
    Context: {"__init__": ["self", "client", "options"], "fork": ["self"]},
    layer.Layer: {"__init__": ["self", "context"], "handle_event": _EVENT},
    HttpLayer: {"event_to_child": ["self", "child", "event"], "get_connection": ["self", "event", "reuse"]},
}
"""The methods that this module overrides or relies on, with their parameters."""

OPEN = connection.ConnectionState.OPEN

_FLOW = vars(http.HTTPFlow(None, None))  # type: ignore[arg-type]
"""A new flow's attributes."""
_FLOW_ID = str(uuid.uuid4())[:24]
_FLOW_NUMBER = count()


def fits() -> bool:
    """Tell whether mitmproxy's layers are those that this module was written for."""
    return dispatch.fits() and all(dispatch.has(owner, parts) for owner, parts in PARTS.items())


FITS = fits()


def new_flow(client: connection.Client, server: connection.Server) -> http.HTTPFlow:
    """Return a flow, as mitmproxy's constructor does, but for its id: random once in a process, then counted."""
    made = http.HTTPFlow.__new__(http.HTTPFlow)
    fresh = {"id": f"{_FLOW_ID}{next(_FLOW_NUMBER):012x}", "timestamp_created": time.time(), "metadata": {}}
    made.__dict__.update(_FLOW, client_conn=client, server_conn=server, live=True, **fresh)
    return made


def hook[T: Hook](kind: type[T], about: http.HTTPFlow) -> T:
    """Return a hook whose layer goes on as soon as no addon waits for anything (connection.py)."""
    made: Any = object.__new__(kind)
    made.flow, made.goes_on = about, True
    return made  # type: ignore[no-any-return]


class LightContext(Context):
    """mitmproxy's context of a layer, which forks without making a server connection that is dropped at once."""

    @classmethod
    def take_over(cls, context: Any) -> None:
        if FITS:
            context.__class__ = cls

    def fork(self) -> Context:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, layers=[*self.layers])
        return made


@dataclass
class WholeRequest(RequestHeaders):
    content: bytes = b""


@dataclass
class WholeAnswer(ResponseHeaders):
    content: bytes = b""


MESSAGES = (WholeRequest, WholeAnswer)


class PlainHead(ResponseHeaders):
    """The head of an answer that is plain, and whose body is framed in chunks."""


def body_bytes_max(context: Context) -> int:
    """Return the largest body that is taken whole; 0 where mitmproxy's options ask for more than forwarding."""
    options: Options = context.options
    asks_more = options.store_streamed_bodies or options.stream_large_bodies or options.keep_host_header
    if not FITS or asks_more or not isinstance(context.client.proxy_mode, ReverseMode):
        return 0
    limit = human.parse_size(options.body_size_limit)
    return 1 << 30 if limit is None else limit


def _no() -> layer.CommandGenerator[bool]:
    yield from ()
    return False


def _nothing() -> layer.CommandGenerator[None]:
    yield from ()


class WholeServer(bounded_http1.Body, Http1Server):
    """mitmproxy's HTTP/1 server, towards the client, which takes and sends whole messages."""

    answers_whole = True
    in_chunks: RawFields | None = None
    """The headers of the last answer that was begun in chunks."""

    def __init__(self, context: Context):
        super().__init__(context)
        self.whole_bytes_max = body_bytes_max(context)

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if type(event) is events.DataReceived and (found := self.read_whole(event.data)) is not None:
            return _received(found)
        return self.in_parts(event)

    def in_parts(self, event: events.Event) -> layer.CommandGenerator[None]:
        """Handle an event that is no whole message, as mitmproxy does."""
        return super()._handle_event(event)

    def read_whole(self, data: bytes) -> WholeRequest | None:
        """Read a whole request; None: let mitmproxy look, and nothing was consumed."""
        if not self.whole_bytes_max or self.buf or self.state != self.read_headers:
            return None
        found = read_request(data)
        return None if found is None or len(found[1]) > self.whole_bytes_max else self._received(*found)

    def _received(self, request: http.Request, content: bytes) -> WholeRequest:
        self.request, self.request_done, self.state = request, True, self.wait
        return WholeRequest(self.stream_id, request, end_stream=False, content=content)

    def send(self, event: HttpEvent) -> layer.CommandGenerator[None]:
        if type(event) is not WholeAnswer:
            said = self._part(event) if self.whole_bytes_max else None
            return super().send(event) if said is None else self._said(said, type(event) is ResponseEndOfMessage)
        said = self.send_whole(event)
        return self._in_parts(event) if said is None else self._sent(said)

    def _part(self, event: HttpEvent) -> bytes | None:
        """Write the head of a plain answer in chunks, a chunk of it or its end; None: let mitmproxy write."""
        if type(event) is ResponseHeaders and framing_of(event.response) == CHUNKED:
            self.response, data = event.response, event.response.data
            self.in_chunks = data.headers.fields
            return answer_head_bytes(data)
        if self.response is None or self.response.data.headers.fields is not self.in_chunks:
            return None
        if type(event) is ResponseData and event.data:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        return LAST_CHUNK if type(event) is ResponseEndOfMessage and is_plain(self.request) else None

    def _said(self, part: bytes, at_end: bool) -> layer.CommandGenerator[None]:
        yield commands.SendData(self.conn, part)
        if at_end:
            yield from self.mark_done(response=True)

    def mark_done(self, *, request: bool = False, response: bool = False) -> layer.CommandGenerator[None]:
        if response and self.request_done and self.whole_bytes_max and _ends_plainly(self):
            return _next_message(self, self.stream_id + 2)
        return super().mark_done(request=request, response=response)

    def send_whole(self, event: WholeAnswer) -> bytes | None:
        """Write a whole answer; None: it goes in parts, and nothing was done."""
        framing = framing_of(event.response) if self.request_done and is_plain(self.request) else None
        if framing is None:
            return None
        data, content = event.response.data, event.content
        if framing == CHUNKED:
            content = (b"%x\r\n%b\r\n" % (len(content), content) if content else b"") + LAST_CHUNK
        self.request_done, self.request = False, None
        self.stream_id += 2
        self.state = self.read_headers
        return answer_head_bytes(data) + content

    def send_at_once(self, event: WholeAnswer) -> bytes | None:
        """Write a whole answer, where nothing has to be done behind it."""
        return None if self.buf or self.conn.state is not OPEN else self.send_whole(event)

    def _in_parts(self, event: WholeAnswer) -> layer.CommandGenerator[None]:
        yield from super().send(ResponseHeaders(event.stream_id, event.response))
        if event.content:  # an empty chunk would end the body
            yield from super().send(ResponseData(event.stream_id, event.content))
        yield from super().send(ResponseEndOfMessage(event.stream_id))

    def _sent(self, said: bytes) -> layer.CommandGenerator[None]:
        yield commands.SendData(self.conn, said)
        if self.buf:  # a client that did not wait
            yield from self.state(events.DataReceived(self.conn, b""))


class WholeClient(bounded_http1.Client):
    """mitmproxy's HTTP/1 client, towards the upstream, which takes and sends whole messages."""

    takes_whole = True

    @cached_property
    def whole_bytes_max(self) -> int:
        return body_bytes_max(self.context)

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if type(event) is events.DataReceived and (found := self.read_whole(event.data)) is not None:
            return _received(found)
        return self.in_parts(event)

    def in_parts(self, event: events.Event) -> layer.CommandGenerator[None]:
        """Handle an event that is no whole message, as mitmproxy does."""
        return super()._handle_event(event)

    def read_whole(self, data: bytes) -> WholeAnswer | None:
        """Read a whole answer; None: let mitmproxy look, and nothing was consumed."""
        if not self.request_done or self.buf or self.state != self.read_headers:
            return None
        found = read_answer(data)
        whole = found is not None and len(found[1]) <= self.whole_bytes_max and is_plain(self.request)
        return self._received(*found) if found is not None and whole else None

    def _received(self, response: http.Response, content: bytes) -> WholeAnswer:
        assert self.stream_id is not None
        found = WholeAnswer(self.stream_id, response, content=content)
        self.request_done, self.request, self.response, self.stream_id = False, None, None, None
        return found

    def read_headers(self, event: events.ConnectionEvent) -> layer.CommandGenerator[None]:
        plain = type(event) is events.DataReceived and self.request_done and self.whole_bytes_max and self._read[0] != self.stream_id
        head = read_answer_head(bytes(self.buf)) if plain else None
        if head is None or head[1] != CHUNKED or not is_plain(self.request):
            return super().read_headers(event)
        return self._head_read(event, head[0], head[2])

    def _head_read(self, event: events.ConnectionEvent, response: http.Response, end: int) -> layer.CommandGenerator[None]:
        assert self.stream_id is not None
        self.buf.maybe_extract_at_most(end)
        self.response, self.body_reader, self._read = response, ChunkedReader(), (self.stream_id, end)
        yield ReceiveHttp(PlainHead(self.stream_id, response, end_stream=False))
        self.state = self.read_body
        yield from self.read_body(event)

    def mark_done(self, *, request: bool = False, response: bool = False) -> layer.CommandGenerator[None]:
        if response and self.request_done and self.whole_bytes_max and _ends_plainly(self):
            return _next_message(self, None)
        return super().mark_done(request=request, response=response)

    def send(self, event: HttpEvent) -> layer.CommandGenerator[None]:
        return self._sent(event) if type(event) is WholeRequest else super().send(event)

    def send_whole(self, event: WholeRequest) -> bytes:
        """Write a whole request."""
        self.stream_id, self.request, self.request_done = event.stream_id, event.request, True
        data = event.request.data
        return head_bytes(b"%b %b %b" % (data.method, data.path, data.http_version), data.headers.fields) + event.content

    send_at_once = send_whole

    def _sent(self, event: WholeRequest) -> layer.CommandGenerator[None]:
        yield commands.SendData(self.conn, self.send_whole(event))


def _received(event: HttpEvent) -> layer.CommandGenerator[None]:
    yield ReceiveHttp(event)


def _ends_plainly(end: Http1Connection) -> bool:
    """Tell whether a connection stays open behind the exchange that ends, by the headers of both messages."""
    response = end.response
    return response is not None and response.status_code != 101 and framing_of(response) is not None and is_plain(end.request)


def _next_message(end: Http1Connection, stream_id: Any) -> layer.CommandGenerator[None]:
    """Make ready for the next message, as mitmproxy does."""
    end.request_done = end.response_done = False
    end.request = end.response = None
    end.stream_id, end.state = stream_id, end.read_headers
    if end.buf:
        yield from end.state(events.DataReceived(end.conn, b""))


class WholeStream(HttpStream):
    """mitmproxy's HTTP stream between the two, which runs the hooks of a whole message."""

    top: HttpLayer

    def __init__(self, context: Context, stream_id: int):
        if not FITS:
            super().__init__(context, stream_id)
            return
        context.layers.append(self)
        self.context, self.stream_id = context, stream_id
        self._paused, self._paused_event_queue = None, deque()
        self.client_state, self.server_state = self.state_wait_for_request_headers, self.state_uninitialized  # as after its start

    request_body_buf = cached_property(lambda self: ReceiveBuffer())
    response_body_buf = cached_property(lambda self: ReceiveBuffer())

    def handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        """Handle an event as every layer does (a blocking command pauses it, later events wait), in one generator instead of three."""
        if not FITS:
            return super().handle_event(event)
        paused = self._paused
        if paused is None:
            return self._run(self._handle_event(event), None)
        if isinstance(event, events.CommandCompleted) and event.command is paused.command:
            self._paused = None
            return self._run(paused.generator, event.reply)
        self._paused_event_queue.append(event)
        return _nothing()

    def _run(self, generator: layer.CommandGenerator[None], reply: Any) -> layer.CommandGenerator[None]:
        while True:
            try:
                command = generator.send(reply)
                while command.blocking is not True:
                    yield command
                    command = next(generator)
            except StopIteration:
                if self._paused or not self._paused_event_queue:
                    return
                generator, reply = self._handle_event(self._paused_event_queue.popleft()), None
                continue
            command.blocking = self
            self._paused = layer.Paused(command, generator)
            yield command
            if command.blocking:
                return
            self._paused, reply = None, None  # a hook that was done at once (connection.py)
            self.top.command_sources.pop(command, None)

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if type(event) is WholeRequest:
            return self._request(event)
        if type(event) is WholeAnswer:
            waits = self.server_state == self.state_wait_for_response_headers
            return self._answer(event) if waits and self._answers_whole() else self._in_parts(event)
        if type(event) is PlainHead and self.server_state == self.state_wait_for_response_headers:
            return self._answer_head(event)
        return super()._handle_event(event)  # type: ignore[no-any-return]

    def _answer_head(self, event: PlainHead) -> layer.CommandGenerator[None]:
        self.flow.response = event.response
        yield HttpResponseHeadersHook(self.flow)
        if (yield from self._killed()):
            return
        if self.flow.response.stream:
            yield from self.start_response_stream()
        else:
            self.server_state = self.state_consume_response_body

    def _in_parts(self, event: WholeAnswer) -> layer.CommandGenerator[None]:
        """Send an answer in parts, to a side that knows no whole messages."""
        yield from super()._handle_event(ResponseHeaders(self.stream_id, event.response))
        yield from super()._handle_event(ResponseData(self.stream_id, event.content))
        yield from super()._handle_event(ResponseEndOfMessage(self.stream_id))

    def _request(self, event: WholeRequest) -> layer.CommandGenerator[None]:
        address, tls = self.context.server.address, self.context.server.tls
        assert address is not None
        self.flow = flow = new_flow(self.context.client, self.context.server)
        request, data = event.request, event.request.data
        flow.request, data.scheme = request, b"https" if tls else b"http"
        data.host, data.port = address
        data.headers.fields = with_host(data.headers.fields, host_of(address, tls))
        yield hook(HttpRequestHeadersHook, flow)
        if (yield from self._killed()):
            return
        self.server_state = self.state_wait_for_response_headers
        data = flow.request.data
        data.timestamp_end, data.content = time.time(), event.content
        self.client_state = self.state_done
        yield hook(HttpRequestHook, flow)
        if (yield from self._killed()):
            return
        if flow.response:
            flow.response.timestamp_start = time.time()
            yield hook(HttpResponseHeadersHook, flow)
            if not (yield from self._killed()):
                yield from self.send_response()
            return
        if not self._connected() and not (yield from self.make_server_connection()):
            return
        content, server = flow.request.data.content or b"", self.context.server
        if self._takes_whole(server) and is_plain(flow.request):
            yield SendHttp(WholeRequest(self.stream_id, flow.request, False, content=content), server)
            return
        yield SendHttp(RequestHeaders(self.stream_id, flow.request, not content), server)
        if content:
            yield SendHttp(RequestData(self.stream_id, content), server)
        yield SendHttp(RequestEndOfMessage(self.stream_id), server)

    def _killed(self) -> layer.CommandGenerator[bool]:
        return self.check_killed(True) if self.flow.error or self._paused_event_queue else _no()

    def _connected(self) -> bool:
        """Take an open, idle connection to the upstream, if there is one."""
        wanted, own = self.flow.request.data, self.flow.server_conn
        spec = (wanted.host, wanted.port), wanted.scheme == b"https", own.via, own.transport_protocol
        for server in self.top.connections:
            if type(server) is connection.Server and (server.address, server.tls, server.via, server.transport_protocol) == spec:
                if server in self.top.waiting_for_establishment or server.error or server.state is not OPEN:
                    return False
                self.context.server = self.flow.server_conn = server
                return True
        return False

    def _takes_whole(self, server: connection.Server) -> bool:
        below: Any = self.top.connections[server]
        while (child := getattr(below, "child_layer", None)) is not None:
            below = child
        return getattr(below, "takes_whole", False)

    def _answers_whole(self) -> bool:
        return getattr(self.top.connections.get(self.context.client), "answers_whole", False)

    def _answer(self, event: WholeAnswer) -> layer.CommandGenerator[None]:
        flow: Any = self.flow
        flow.response = event.response
        yield hook(HttpResponseHeadersHook, flow)
        if (yield from self._killed()):
            return
        if flow.response.stream:
            yield from self.start_response_stream()
            yield from self.state_stream_response_body(ResponseData(self.stream_id, event.content))
            yield from self.state_stream_response_body(ResponseEndOfMessage(self.stream_id))
            return
        self.server_state = self.state_consume_response_body
        flow.response.data.content = event.content
        if self._sends_whole():
            yield from self._send_whole(hook(HttpResponseHook, flow))
        else:
            yield from super().send_response()

    def send_response(self, already_streamed: bool = False) -> layer.CommandGenerator[None]:
        """Send a complete answer in one event, where mitmproxy makes three of it."""
        if already_streamed or not FITS or not self._sends_whole():
            return super().send_response(already_streamed)  # type: ignore[no-any-return]
        return self._send_whole(HttpResponseHook(self.flow))

    def _sends_whole(self) -> bool:
        response: Any = self.flow.response
        return response.data.status_code != 101 and self.client_state == self.state_done and self._answers_whole()

    def _send_whole(self, response_hook: HttpResponseHook) -> layer.CommandGenerator[None]:
        flow: Any = self.flow
        flow.response.data.timestamp_end = time.time()
        yield response_hook
        self.server_state = self.state_done
        if (flow.error or self._paused_event_queue) and (yield from self.check_killed(False)):
            return
        flow.live = False
        yield DropStream(self.stream_id)
        yield SendHttp(WholeAnswer(self.stream_id, flow.response, content=flow.response.data.content or b""), self.context.client)
