"""Pass plain messages that arrive whole through mitmproxy's HTTP layers in one event instead of three.

mitmproxy takes a message apart (head, body, end), passes each part through four layers, up and down again, and puts it together at the
other side: without this a JSON call costs 15 to 40 % more processor time. Here a request or an answer that is there in one piece, and
framed as clients and the API frame theirs, is read, judged and sent on as one. Promises the same hooks in the same order, the same bytes
and the same states of mitmproxy's own layers at each moment at which anything else can happen, so that whatever does happen then is
theirs to deal with. Everything that is not plain to the byte, and any release that is not known (`fits`), goes mitmproxy's own way.
Knows nothing of the gateway.
"""

import re
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mitmproxy import connection, http
from mitmproxy.net.http import http1, url
from mitmproxy.options import Options
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers.http import (
    DropStream,
    GetHttpConnection,
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
from mitmproxy.proxy.mode_specs import ReverseMode
from mitmproxy.utils import human

from gateway_addon.proxy import bounded_http1
from gateway_addon.proxy.bounded_http1 import HEAD_BYTES_MAX
from gateway_addon.proxy.fastpath import dispatch

_EVENT = ["self", "event"]
PARTS: dict[type, dict[str, list[str]]] = {
    Http1Server: dict.fromkeys(("_handle_event", "send", "wait", "read_headers"), _EVENT),
    Http1Client: dict.fromkeys(("_handle_event", "send", "read_headers"), _EVENT),
    HttpStream: {
        **dict.fromkeys(("_handle_event", "state_wait_for_response_headers"), _EVENT),
        **dict.fromkeys(("state_consume_response_body", "state_stream_response_body"), _EVENT),
        "state_done": ["self", "_"],
        "check_killed": ["self", "emit_error_hook"],
        "make_server_connection": ["self"],
        "start_request_stream": ["self"],
        "start_response_stream": ["self"],
        "send_response": ["self", "already_streamed"],
    },
    layer.Layer: {"handle_event": _EVENT},
    HttpLayer: {"event_to_child": ["self", "child", "event"], "get_connection": ["self", "event", "reuse"]},
}
"""The methods that this module overrides or relies on, with their parameters."""

OPEN = connection.ConnectionState.OPEN

type RawFields = tuple[tuple[bytes, bytes], ...]

_FIELDS = rb"((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[^\r\n\0]*+\r\n)++)\r\n"
_REQUEST = re.compile(rb"POST (/[!-~]*+) HTTP/1\.1\r\n" + _FIELDS)
_ANSWER = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) ([!-~]++(?: [!-~]++)*+)\r\n" + _FIELDS)
_LENGTH = re.compile(rb"[1-9][0-9]{0,8}")
_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})\r\n")
_CHUNKED = (b"transfer-encoding", b"chunked")
_LAST_CHUNK = b"0\r\n\r\n"
_BODILESS = (b"204", b"304")
_TELLING = frozenset({b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade", b"trailer"})
"""Headers that say where a message ends, or that it is not a plain one."""
_KEPT = (b"connection", b"keep-alive")


def fits() -> bool:
    """Tell whether mitmproxy's layers are those that this module was written for."""
    return dispatch.fits() and all(dispatch.has(owner, parts) for owner, parts in PARTS.items())


FITS = fits()


def request(data: bytes) -> tuple[http.Request, bytes] | None:
    """Read a POST that these bytes are, whole and plain, and its body; None: let mitmproxy look."""
    head = _REQUEST.match(data)
    if head is None or head.end() > HEAD_BYTES_MAX:
        return None
    framing = _framing(fields := _fields(head[2]))
    if framing == _CHUNKED or (content := _content(framing, data, head.end())) is None:
        return None
    return http.Request("", 0, b"POST", b"", b"", head[1], b"HTTP/1.1", headers(fields), None, None, time.time(), None), content


def answer(data: bytes) -> tuple[http.Response, bytes] | None:
    """Read an answer that these bytes are, whole and plain, and its body; None: let mitmproxy look."""
    head = _ANSWER.match(data)
    if head is None or head.end() > HEAD_BYTES_MAX or head[1] in _BODILESS:
        return None
    content = _content(_framing(fields := _fields(head[3])), data, head.end())
    if content is None:
        return None
    return http.Response(b"HTTP/1.1", int(head[1]), head[2], headers(fields), None, None, time.time(), None), content


def headers(fields: RawFields) -> http.Headers:
    """Return headers of these fields. (mitmproxy's constructor copies them and looks at the type of each.)"""
    made = http.Headers.__new__(http.Headers)
    made.fields = fields
    return made


def _fields(block: bytes) -> RawFields:
    parted = [line.partition(b":") for line in block.split(b"\r\n")[:-1]]
    return tuple([(name, value.strip()) for name, _, value in parted])


def _framing(fields: RawFields) -> tuple[bytes, bytes] | None:
    """Find the header that says where a message ends, in lower case, where no other says it and the connection stays open."""
    told = [(lower, value.lower()) for name, value in fields if (lower := name.lower()) in _TELLING]
    found = [field for field in told if field != _KEPT]
    return found[0] if len(found) == 1 and (found[0] == _CHUNKED or found[0][0] == b"content-length") else None


def _content(framing: tuple[bytes, bytes] | None, data: bytes, at: int) -> bytes | None:
    """Read a body that begins at a place and ends with these bytes; None: it does not, or it is empty."""
    if framing is None:
        return None
    if framing == _CHUNKED:
        if not data.endswith(_LAST_CHUNK):
            return None
        content, end = chunks(data, at)
        return content if content and end + len(_LAST_CHUNK) == len(data) else None
    return data[at:] if _LENGTH.fullmatch(framing[1]) and int(framing[1]) == len(data) - at else None


def chunks(data: bytes, at: int) -> tuple[bytes, int]:
    """Read the whole chunks from a place on: their content, and where they end (there, if there is none)."""
    pieces = []
    while (head := _SIZE.match(data, at)) and (size := int(head[1], 16)) and data.startswith(b"\r\n", head.end() + size):
        pieces.append(data[head.end() : head.end() + size])
        at = head.end() + size + 2
    return b"".join(pieces), at


def _is_plain(request: http.Request | None) -> bool:
    """Tell whether a request, as it is now, can be passed on whole, and its connection stays open behind it."""
    framing = _framing_of(request) if request is not None and request.data.method == b"POST" else None
    return framing is not None and framing != _CHUNKED


def _with_host(fields: RawFields, host: bytes) -> RawFields:
    """Return the fields with one Host header, in the place of the first that there was."""
    at = [place for place, (name, _) in enumerate(fields) if name.lower() == b"host"]
    if len(at) != 1:
        made = http.Headers(fields)
        made[b"Host"] = host
        return made.fields
    return (*fields[: at[0]], (fields[at[0]][0], host), *fields[at[0] + 1 :])


def _framing_of(message: http.Message) -> tuple[bytes, bytes] | None:
    return _framing(message.headers.fields) if message.data.http_version == b"HTTP/1.1" else None


@dataclass
class WholeRequest(RequestHeaders):
    content: bytes = b""


@dataclass
class WholeAnswer(ResponseHeaders):
    content: bytes = b""


def body_bytes_max(context: Context) -> int:
    """Return the largest body that is taken whole; 0 where mitmproxy's options ask for more than forwarding."""
    options: Options = context.options
    asks_more = options.store_streamed_bodies or options.stream_large_bodies or options.keep_host_header
    if not FITS or asks_more or not isinstance(context.client.proxy_mode, ReverseMode):
        return 0
    limit = human.parse_size(options.body_size_limit)
    return 1 << 30 if limit is None else limit


def _nothing() -> layer.CommandGenerator[None]:
    yield from ()


class WholeServer(bounded_http1.Body, Http1Server):
    """mitmproxy's HTTP/1 server, towards the client, which takes and sends whole messages."""

    def __init__(self, context: Context):
        super().__init__(context)
        self.whole_bytes_max = body_bytes_max(context)

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if type(event) is events.DataReceived and self.whole_bytes_max and not self.buf and self.state == self.read_headers:
            found = request(event.data)
            if found is not None and len(found[1]) <= self.whole_bytes_max:
                return self._received(*found)
        return super()._handle_event(event)

    def _received(self, request: http.Request, content: bytes) -> layer.CommandGenerator[None]:
        self.request, self.request_done, self.state = request, True, self.wait
        yield ReceiveHttp(WholeRequest(self.stream_id, request, end_stream=False, content=content))

    def send(self, event: HttpEvent) -> layer.CommandGenerator[None]:
        if type(event) is not WholeAnswer:
            return super().send(event)
        framing = _framing_of(event.response) if self.request_done and _is_plain(self.request) else None
        return self._in_parts(event) if framing is None else self._sent(event, framing == _CHUNKED)

    def _in_parts(self, event: WholeAnswer) -> layer.CommandGenerator[None]:
        yield from super().send(ResponseHeaders(event.stream_id, event.response))
        if event.content:  # an empty chunk would end the body
            yield from super().send(ResponseData(event.stream_id, event.content))
        yield from super().send(ResponseEndOfMessage(event.stream_id))

    def _sent(self, event: WholeAnswer, chunked: bool) -> layer.CommandGenerator[None]:
        content = event.content
        if chunked:
            content = (b"%x\r\n%b\r\n" % (len(content), content) if content else b"") + _LAST_CHUNK
        yield commands.SendData(self.conn, http1.assemble_response_head(event.response) + content)
        self.request_done, self.request = False, None
        self.stream_id += 2
        self.state = self.read_headers
        if self.buf:  # a client that did not wait
            yield from self.state(events.DataReceived(self.conn, b""))


class WholeClient(bounded_http1.Client):
    """mitmproxy's HTTP/1 client, towards the upstream, which takes and sends whole messages."""

    @cached_property
    def whole_bytes_max(self) -> int:
        return body_bytes_max(self.context)

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if type(event) is events.DataReceived and self.request_done and not self.buf and self.state == self.read_headers:
            found = answer(event.data)
            if found is not None and len(found[1]) <= self.whole_bytes_max and _is_plain(self.request):
                return self._received(*found)
        return super()._handle_event(event)

    def _received(self, response: http.Response, content: bytes) -> layer.CommandGenerator[None]:
        assert self.stream_id is not None
        self.response = response
        yield ReceiveHttp(WholeAnswer(self.stream_id, response, content=content))
        self.request_done, self.request, self.response, self.stream_id = False, None, None, None

    def send(self, event: HttpEvent) -> layer.CommandGenerator[None]:
        if type(event) is not WholeRequest:
            return super().send(event)
        return self._sent(event)

    def _sent(self, event: WholeRequest) -> layer.CommandGenerator[None]:
        self.stream_id, self.request, self.request_done = event.stream_id, event.request, True
        yield commands.SendData(self.conn, http1.assemble_request_head(event.request) + event.content)


class WholeStream(HttpStream):
    """mitmproxy's HTTP stream between the two, which runs the hooks of a whole message."""

    top: HttpLayer

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
            else:
                command.blocking = self
                self._paused = layer.Paused(command, generator)
                yield command
                return

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if type(event) is WholeRequest:
            return self._request(event)
        if type(event) is WholeAnswer:
            waits = self.server_state == self.state_wait_for_response_headers
            return self._answer(event) if waits and self._answers_whole() else self._in_parts(event)
        return super()._handle_event(event)  # type: ignore[no-any-return]

    def _in_parts(self, event: WholeAnswer) -> layer.CommandGenerator[None]:
        """Send an answer in parts, to a side that knows no whole messages."""
        yield from super()._handle_event(ResponseHeaders(self.stream_id, event.response))
        yield from super()._handle_event(ResponseData(self.stream_id, event.content))
        yield from super()._handle_event(ResponseEndOfMessage(self.stream_id))

    def _request(self, event: WholeRequest) -> layer.CommandGenerator[None]:
        address, tls = self.context.server.address, self.context.server.tls
        assert address is not None
        self.flow = flow = http.HTTPFlow(self.context.client, self.context.server)
        flow.request, flow.live = event.request, True
        flow.request.data.host, flow.request.data.port = address
        flow.request.scheme = "https" if tls else "http"
        flow.request.headers.fields = _with_host(flow.request.headers.fields, url.hostport(flow.request.scheme, *address).encode())
        yield HttpRequestHeadersHook(flow)
        if (yield from self.check_killed(True)):
            return
        if flow.request.stream:  # an addon wants it sent before it is judged
            yield from self._as_it_comes(event.content)
            return
        self.server_state = self.state_wait_for_response_headers
        flow.request.timestamp_end = time.time()
        flow.request.data.content = event.content
        self.client_state = self.state_done
        yield HttpRequestHook(flow)
        if (yield from self.check_killed(True)):
            return
        if flow.response:
            flow.response.timestamp_start = time.time()
            yield HttpResponseHeadersHook(flow)
            if not (yield from self.check_killed(True)):
                yield from self.send_response()
            return
        if not self._connected() and not (yield from self.make_server_connection()):
            return
        content, server = flow.request.raw_content or b"", self.context.server
        if self._takes_whole(server) and _is_plain(flow.request):
            yield SendHttp(WholeRequest(self.stream_id, flow.request, False, content=content), server)
            return
        yield SendHttp(RequestHeaders(self.stream_id, flow.request, not content), server)
        if content:
            yield SendHttp(RequestData(self.stream_id, content), server)
        yield SendHttp(RequestEndOfMessage(self.stream_id), server)

    def _as_it_comes(self, content: bytes) -> layer.CommandGenerator[None]:
        yield from self.start_request_stream()
        self.server_state = self.state_wait_for_response_headers
        for part in (RequestData(self.stream_id, content), RequestEndOfMessage(self.stream_id)):
            yield from self.client_state(part)

    def _connected(self) -> bool:
        """Take an open, idle connection to the upstream, if there is one."""
        request, own = self.flow.request, self.flow.server_conn
        wanted = GetHttpConnection((request.host, request.port), request.scheme == "https", own.via, own.transport_protocol)
        for server in self.top.connections:
            if wanted.connection_spec_matches(server):
                if server in self.top.waiting_for_establishment or server.error or server.state is not OPEN:
                    return False
                assert isinstance(server, connection.Server)
                self.context.server = self.flow.server_conn = server
                return True
        return False

    def _takes_whole(self, server: connection.Server) -> bool:
        below: Any = self.top.connections[server]
        while (child := getattr(below, "child_layer", None)) is not None:
            below = child
        return isinstance(below, WholeClient)

    def _answers_whole(self) -> bool:
        return isinstance(self.top.connections.get(self.context.client), WholeServer)

    def _answer(self, event: WholeAnswer) -> layer.CommandGenerator[None]:
        flow: Any = self.flow
        flow.response = event.response
        yield HttpResponseHeadersHook(flow)
        if (yield from self.check_killed(True)):
            return
        if flow.response.stream:
            yield from self.start_response_stream()
            yield from self.state_stream_response_body(ResponseData(self.stream_id, event.content))
            yield from self.state_stream_response_body(ResponseEndOfMessage(self.stream_id))
            return
        self.server_state = self.state_consume_response_body
        flow.response.data.content = event.content
        yield from self.send_response()

    def send_response(self, already_streamed: bool = False) -> layer.CommandGenerator[None]:
        """Send a complete answer in one event, where mitmproxy makes three of it."""
        flow: Any = self.flow
        more_follows = already_streamed or flow.response.status_code == 101
        if not FITS or more_follows or self.client_state != self.state_done or not self._answers_whole():
            yield from super().send_response(already_streamed)
            return
        flow.response.timestamp_end = time.time()
        yield HttpResponseHook(flow)
        self.server_state = self.state_done
        if (yield from self.check_killed(False)):
            return
        flow.live = False
        yield DropStream(self.stream_id)
        yield SendHttp(WholeAnswer(self.stream_id, flow.response, content=flow.response.raw_content or b""), self.context.client)
