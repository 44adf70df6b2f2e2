"""Plain messages that arrive whole, through mitmproxy's HTTP layers in one event instead of three.

mitmproxy takes a message apart (head, body, end), passes each part through four layers, up and down again, and puts it together at the
other side: two thirds of what a small call costs. Here a request or an answer that is there in one piece, and framed in the one way that
clients of an API use, is read, judged and sent on as one. Promises the same hooks in the same order, the same bytes and the same states
of mitmproxy's own layers at each moment at which anything else can happen, so that whatever does happen then is theirs to deal with.
Everything that is not plain to the byte, and any release that is not known (`fits`), goes mitmproxy's own way. Knows nothing of the
gateway.
"""

import re
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

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

from gateway_addon import bounded, dispatch
from gateway_addon.bounded import HEAD_BYTES_MAX

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
"""What is overridden or stood on here, with its parameters."""

OPEN = connection.ConnectionState.OPEN

type Fields = tuple[tuple[bytes, bytes], ...]

_FIELDS = rb"((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[^\r\n\0]*+\r\n)++)\r\n"
_REQUEST = re.compile(rb"POST (/[!-~]*+) HTTP/1\.1\r\n" + _FIELDS)
_ANSWER = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) ([!-~]++(?: [!-~]++)*+)\r\n" + _FIELDS)
_LENGTH = re.compile(rb"[1-9][0-9]{0,8}")
_BODILESS = (b"204", b"304")
_FRAMING = frozenset({b"transfer-encoding", b"connection", b"expect", b"upgrade", b"trailer"})
_KEPT = (b"connection", b"keep-alive")


def fits() -> bool:
    """Whether mitmproxy's layers are still those that are stood in for."""
    return dispatch.fits() and all(dispatch.has(owner, parts) for owner, parts in PARTS.items())


FITS = fits()


def request(data: bytes) -> tuple[http.Request, bytes] | None:
    """A POST that these bytes are, whole and plain, and its body; None: let mitmproxy look."""
    head = _REQUEST.match(data)
    if head is None or head.end() > HEAD_BYTES_MAX:
        return None
    if not _is_framed(fields := _fields(head[2]), len(data) - head.end()):
        return None
    made = http.Request("", 0, b"POST", b"", b"", head[1], b"HTTP/1.1", http.Headers(fields), None, None, time.time(), None)
    return made, data[head.end() :]


def answer(data: bytes) -> tuple[http.Response, bytes] | None:
    """An answer that these bytes are, whole and plain, and its body; None: let mitmproxy look."""
    head = _ANSWER.match(data)
    if head is None or head.end() > HEAD_BYTES_MAX or head[1] in _BODILESS:
        return None
    if not _is_framed(fields := _fields(head[3]), len(data) - head.end()):
        return None
    made = http.Response(b"HTTP/1.1", int(head[1]), head[2], http.Headers(fields), None, None, time.time(), None)
    return made, data[head.end() :]


def _fields(block: bytes) -> Fields:
    parted = [line.partition(b":") for line in block.split(b"\r\n")[:-1]]
    return tuple([(name, value.strip()) for name, _, value in parted])


def _is_framed(fields: Fields, content_bytes: int) -> bool:
    """Whether a message ends behind so many bytes of content."""
    length = _length(fields)
    return length is not None and _LENGTH.fullmatch(length) is not None and int(length) == content_bytes


def _length(fields: Fields) -> bytes | None:
    """The content-length, where it and nothing else says where the message ends, and the connection stays open."""
    lengths = []
    for name, value in fields:
        if (lower := name.lower()) == b"content-length":
            lengths.append(value)
        elif lower in _FRAMING and (lower, value.lower()) != _KEPT:
            return None
    return lengths[0] if len(lengths) == 1 else None


def stays(message: http.Message) -> bool:
    """Whether the connection stays open behind this message, as one that arrived whole says, whatever was made of it since."""
    return message.data.http_version == b"HTTP/1.1" and _length(message.headers.fields) is not None


@dataclass
class WholeRequest(RequestHeaders):
    content: bytes = b""


@dataclass
class WholeAnswer(ResponseHeaders):
    content: bytes = b""


def body_bytes_max(context: Context) -> int:
    """How large a body may be that is taken whole; 0 where mitmproxy is asked for more than to forward it."""
    options: Options = context.options
    asks_more = options.store_streamed_bodies or options.stream_large_bodies or options.keep_host_header
    if not FITS or asks_more or not isinstance(context.client.proxy_mode, ReverseMode):
        return 0
    limit = human.parse_size(options.body_size_limit)
    return 1 << 30 if limit is None else limit


def _nothing() -> layer.CommandGenerator[None]:
    yield from ()


class Server(bounded.Body, Http1Server):
    """mitmproxy's side towards the client."""

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
        plain = self.request_done and self.request is not None and stays(self.request) and stays(event.response)
        return self._sent(event) if plain else self._in_parts(event)

    def _in_parts(self, event: WholeAnswer) -> layer.CommandGenerator[None]:
        yield from super().send(ResponseHeaders(event.stream_id, event.response))
        if event.content:  # an empty chunk would end the body
            yield from super().send(ResponseData(event.stream_id, event.content))
        yield from super().send(ResponseEndOfMessage(event.stream_id))

    def _sent(self, event: WholeAnswer) -> layer.CommandGenerator[None]:
        yield commands.SendData(self.conn, http1.assemble_response_head(event.response) + event.content)
        self.request_done, self.request = False, None
        self.stream_id += 2
        self.state = self.read_headers
        if self.buf:  # a client that did not wait
            yield from self.state(events.DataReceived(self.conn, b""))


class Client(bounded.Client):
    """mitmproxy's side towards the upstream."""

    @cached_property
    def whole_bytes_max(self) -> int:
        return body_bytes_max(self.context)

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if type(event) is events.DataReceived and self.request_done and not self.buf and self.state == self.read_headers:
            found = answer(event.data)
            if found is not None and len(found[1]) <= self.whole_bytes_max and self._asked_plainly():
                return self._received(*found)
        return super()._handle_event(event)

    def _asked_plainly(self) -> bool:
        return self.request is not None and self.request.data.method == b"POST" and stays(self.request)

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


class Stream(HttpStream):
    """What happens between the two."""

    top: HttpLayer

    def handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        """As every layer of mitmproxy's: a blocking command pauses it, and what comes meanwhile waits. In one generator, not in three."""
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
            known = isinstance(self.top.connections.get(self.context.client), Server)
            return self._answer(event) if known and self.server_state == self.state_wait_for_response_headers else self._in_parts(event)
        return cast(layer.CommandGenerator[None], super()._handle_event(event))

    def _in_parts(self, event: WholeAnswer) -> layer.CommandGenerator[None]:
        """An answer for somebody who knows of none that is whole."""
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
        flow.request.headers["Host"] = url.hostport(flow.request.scheme, *address)
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
        if self._takes_whole(server) and stays(flow.request):
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
        """Take the connection to the upstream that is there and rests, if there is one."""
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
        return isinstance(below, Client)

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
        flow.response.timestamp_end = time.time()
        yield HttpResponseHook(flow)
        self.server_state = self.state_done
        if (yield from self.check_killed(False)):
            return
        flow.live = False
        yield DropStream(self.stream_id)
        yield SendHttp(WholeAnswer(self.stream_id, flow.response, content=flow.response.raw_content or b""), self.context.client)
