"""Pass a stream's bytes from the upstream's socket to the app's, each piece that arrives in one step.

mitmproxy takes each chunk of a chunked body through all of its layers alone, and an event of a stream is a chunk: twenty calls deep,
five option look-ups, one write: without this a stream costs 40 to 50 % more processor time as its events come, 150 % more in one
burst, and a JSON call 10 % more. Here all whole chunks of what arrived are one piece, and a piece of a running stream goes through the
stream's tap to the app's socket at once. Promises the same bytes in the same order, nothing held beyond what arrived with it, and the
same end of a body, in the releases that it was written beside; in any other mitmproxy's own way stays (`fits`). Knows nothing of the
gateway.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import h11
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer
from mitmproxy import connection
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.layers.http import (
    DropStream,
    GetHttpConnection,
    Http1Client,
    Http1Server,
    HttpClient,
    HttpEvent,
    HttpLayer,
    HttpStream,
    ReceiveHttp,
    RegisterHttpConnection,
    RequestHeaders,
    ResponseData,
    SendHttp,
)

from gateway_addon.proxy import bounded_http1
from gateway_addon.proxy.fastpath import dispatch, plain_http1, whole

READER = {"_bytes_in_chunk": 0, "_bytes_to_discard": b"", "_reading_trailer": False}
"""The state that h11's reader of a chunked body keeps between two calls, as it begins."""
PARTS: dict[type, dict[str, list[str]]] = {
    ChunkedReader: {"__call__": ["self", "buf"]},
    Http1Client: {"read_body": ["self", "event"]},
    Http1Server: {"send": ["self", "event"]},
    HttpStream: {"state_stream_response_body": ["self", "event"]},
    HttpLayer: {"event_to_child": ["self", "child", "event"], "register_connection": ["self", "command"]},
}
"""The methods that this module overrides or relies on, with their parameters."""

OPEN = connection.ConnectionState.OPEN


def fits(reader: Callable[[], object] = ChunkedReader) -> bool:
    """Tell whether mitmproxy and h11 are those that this module was written for."""
    return dispatch.fits() and vars(reader()) == READER and all(dispatch.has(owner, parts) for owner, parts in PARTS.items())


FITS = fits()


class Chunks(bounded_http1.BoundedChunks):
    """h11's reader of a chunked body, which returns complete chunks that arrive together as one."""

    def __call__(self, buf: ReceiveBuffer) -> h11.Data | h11.EndOfMessage | None:
        if not buf:
            return None
        content, end = self._whole(bytes(buf))
        if not end:
            return super().__call__(buf)  # a part of a chunk, the body's end, or something odd
        buf.maybe_extract_at_most(end)
        self._bytes_to_discard = b""
        return h11.Data(data=content)

    def content(self, data: bytes) -> bytes | None:
        """Return the content of these bytes, if they begin and end between two chunks; else None, and none of them is consumed."""
        content, end = self._whole(data)
        if end != len(data):
            return None
        self._bytes_to_discard = b""
        return content

    def _whole(self, there: bytes) -> tuple[bytes, int]:
        """Return the content of the complete chunks at the start of these bytes, and their end: 0 if there is none."""
        if self._bytes_in_chunk or self._reading_trailer or not there.startswith(self._bytes_to_discard):
            return b"", 0
        content, end = plain_http1.chunks(there, len(self._bytes_to_discard))
        return content, end if content else 0


class RelayClient(whole.WholeClient):
    """mitmproxy's HTTP/1 client, which hands the bytes of a running stream to the app's connection itself."""

    streams: Mapping[int, HttpStream]
    app: connection.Client
    framed: tuple[int, bool]
    """The last stream that ran, and whether the app gets it in chunks."""

    @classmethod
    def relaying(cls, client: Any, top: HttpLayer) -> None:
        """Turn a client that has sent nothing yet into this one."""
        cls.take_over(client)
        client.streams, client.app, client.framed = top.streams, top.context.client, (0, False)

    def handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        """Handle an event without the bookkeeping of blocking commands: this layer has none."""
        if type(event) is events.DataReceived and (sent := self.at_once(event.data)) is not None:
            return _each(sent)
        return self._handle_event(event)

    def at_once(self, data: bytes) -> tuple[commands.SendData, ...] | None:
        """Send complete chunks of a running stream to the app; None where that is not enough, and no byte was consumed."""
        stream = self._running()
        if stream is None or self.buf or type(self.body_reader) is not Chunks or self.state != self.read_body:
            return None
        content = self.body_reader.content(data)
        return None if content is None else self._handed_on(stream, content)

    def read_body(self, event: events.Event) -> layer.CommandGenerator[None]:
        if type(self.body_reader) is ChunkedReader:
            self.body_reader.__class__ = Chunks
        for command in super().read_body(event):
            if type(command) is ReceiveHttp and type(command.event) is ResponseData and (stream := self._running()):
                yield from self._handed_on(stream, command.event.data)
            else:
                yield command

    def _running(self) -> HttpStream | None:
        """Return the stream whose body passes piece by piece now; None: mitmproxy's layers handle the event."""
        stream = self.streams.get(self.stream_id or 0)
        if stream is None or stream._paused or stream.server_state != stream.state_stream_response_body:
            return None
        return stream if self.app.state is OPEN and stream.flow.response and callable(stream.flow.response.stream) else None

    def _handed_on(self, stream: HttpStream, data: bytes) -> tuple[commands.SendData, ...]:
        """Send the app the bytes that the stream's tap returns."""
        response: Any = stream.flow.response
        if self.framed[0] != stream.stream_id:
            self.framed = stream.stream_id, plain_http1.comes_in_chunks(response)
        said = response.stream(data)
        piece = said if isinstance(said, bytes) else b"".join(said)
        if not piece:
            return ()  # an empty chunk would end the body
        return (commands.SendData(self.app, b"%x\r\n%b\r\n" % (len(piece), piece) if self.framed[1] else piece),)


def _each(sent: tuple[commands.SendData, ...]) -> layer.CommandGenerator[None]:
    yield from sent


class DirectLayer(HttpLayer):
    """mitmproxy's HTTP layer, which passes bytes from a connection straight to that connection's own layer.

    Also without the bookkeeping of a layer that waits for answers: those below it wait, this one does not.
    """

    connections: dict[connection.Connection, Any]

    def handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if not FITS:
            return super().handle_event(event)
        if type(event) is events.DataReceived and (own := self.connections.get(event.connection)):
            if type(own) is RelayClient and (sent := own.at_once(event.data)) is not None:
                return _each(sent)
            if (read_whole := getattr(own, "read_whole", None)) is None:
                return self.event_to_child(own, event)
            message = read_whole(event.data)
            return self._relayed(own, own.in_parts(event)) if message is None else self._received(message)
        if isinstance(event, events.CommandCompleted):
            return self.event_to_child(self.command_sources.pop(event.command), event)
        return self._handle_event(event)  # type: ignore[no-any-return]

    def event_to_child(self, child: Any, event: events.Event) -> layer.CommandGenerator[None]:
        return self._relayed(child, child.handle_event(event)) if FITS else super().event_to_child(child, event)

    def _received(self, message: HttpEvent) -> layer.CommandGenerator[None]:
        if isinstance(message, RequestHeaders):
            yield from self.make_stream(message.stream_id)
        if (stream := self.streams.get(message.stream_id)) is not None:  # else it is over already
            yield from self._relayed(stream, stream.handle_event(message))

    def _relayed(self, child: Any, said: layer.CommandGenerator[None]) -> layer.CommandGenerator[None]:
        """Handle a child's commands as mitmproxy does, with the frequent ones tested first."""
        command: Any
        for command in said:
            kind = type(command)
            if kind is not commands.SendData and (command.blocking or kind is commands.RequestWakeup):
                self.command_sources[command] = child
            if kind is SendHttp:
                yield from self._send(self.connections[command.connection], command.event)
            elif kind is ReceiveHttp:
                yield from self._received(command.event)
            elif kind is DropStream:
                self.streams.pop(command.stream_id, None)
            elif kind is GetHttpConnection:
                yield from self.get_connection(command)
            elif kind is RegisterHttpConnection:
                yield from self.register_connection(command)
            else:
                if isinstance(command, commands.OpenConnection):
                    self.connections[command.connection] = child
                yield command

    def _send(self, way: Any, message: HttpEvent) -> Iterable[commands.Command]:
        if type(message) in whole.MESSAGES and (write := getattr(way, "send_at_once", None)) and (data := write(message)):
            return (commands.SendData(way.conn, data),)
        return self._relayed(way, way.handle_event(message))

    def register_connection(self, command: RegisterHttpConnection) -> layer.CommandGenerator[None]:
        install(self, command.connection)
        yield from super().register_connection(command)


def install(top: HttpLayer, server: connection.Connection) -> None:
    """Make a new connection to the upstream a direct one, or, where that does not fit, mitmproxy's own with bounds."""
    below: Any = top.connections.get(server)
    above: Any = None
    while below is not None and type(below) is not HttpClient:
        above, below = below, getattr(below, "child_layer", None)
    client: Any = getattr(below, "child_layer", None)
    if type(client) is not Http1Client:
        return
    if not FITS or top.context.options.store_streamed_bodies:
        bounded_http1.Client.take_over(client)
        return
    RelayClient.relaying(client, top)
    if above is None:
        top.connections[server] = client  # `HttpClient` has opened the connection and does nothing more
    else:
        above.child_layer = client
