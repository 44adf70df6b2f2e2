"""Bound the bytes that may stand before, between and behind bodies on mitmproxy's two ends of an HTTP/1 connection.

Promises, in every release: interim answers (100, 103 and the like; not 101) are skipped, they are no answer; trailers are dropped, in
both directions, for mitmproxy raises on them; and neither an answer's head, its interim answers included, nor a line that frames a chunk
takes more memory than `HEAD_BYTES_MAX`. Knows nothing of the gateway.
"""

from typing import Any

import h11
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.layers.http import Http1Client, ReceiveHttp, ResponseHeaders
from mitmproxy.proxy.layers.http._http1 import Http1Connection

HEAD_BYTES_MAX = 64 * 1024  # of a first line and the headers behind it; mitmproxy itself has no limit


class BoundedChunks(ChunkedReader):
    """h11's reader of a chunked body, which drops trailers."""

    def __call__(self, buf: ReceiveBuffer) -> h11.Data | h11.EndOfMessage | None:
        found = super().__call__(buf)
        return h11.EndOfMessage() if type(found) is h11.EndOfMessage else found


class Body(Http1Connection):
    """The part of mitmproxy's connection that reads bodies, on either side."""

    def read_body(self, event: events.Event) -> layer.CommandGenerator[None]:
        if type(self.body_reader) is ChunkedReader:
            self.body_reader.__class__ = BoundedChunks
        yield from super().read_body(event)
        # What is left of a body's bytes is no content: it is half of a line that frames a chunk, or trailers.
        if self.state == self.read_body and len(self.buf) > HEAD_BYTES_MAX:
            yield from self._too_long("A line between two chunks, or the trailers,")

    def _too_long(self, what: str) -> layer.CommandGenerator[None]:
        assert self.stream_id is not None
        self.buf, self.state = ReceiveBuffer(), self.done
        yield commands.CloseConnection(self.conn)
        sentence = f"{what} had more than {HEAD_BYTES_MAX // 1024} KB"
        yield ReceiveHttp(self.ReceiveProtocolError(self.stream_id, sentence, self.ReceiveProtocolError.code))


class Client(Body, Http1Client):
    """mitmproxy's side towards the upstream."""

    _read: tuple[int, int] = (0, 0)
    """The stream whose answer began last, and the bytes of its heads so far."""

    @classmethod
    def take_over(cls, client: Any) -> None:
        """Turn a client that has sent nothing yet into this one."""
        client.__class__ = cls
        client.state = client.read_headers

    def read_headers(self, event: events.ConnectionEvent) -> layer.CommandGenerator[None]:
        while (yield from self._read_a_head(event)):
            pass

    def _read_a_head(self, event: events.ConnectionEvent) -> layer.CommandGenerator[bool]:
        """Read the bytes that arrived; return True where they began with an interim answer, which is dropped."""
        stream_id, unread_bytes = self.stream_id or 0, len(self.buf)
        read_bytes = self._read[1] if self._read[0] == stream_id else 0
        generator = super().read_headers(event)
        for command in generator:
            if type(command) is ReceiveHttp and type(command.event) is ResponseHeaders:
                self._read = stream_id, read_bytes + unread_bytes - len(self.buf)
                status = command.event.response.status_code
                if self._read[1] > HEAD_BYTES_MAX:
                    break
                if 100 <= status < 200 and status != 101:
                    generator.close()  # before it makes ready for a body
                    self.response = None
                    return True
            yield command
        headless = self.request is not None and self.state == self.read_headers
        if headless and max(self._read[1], read_bytes + len(self.buf)) > HEAD_BYTES_MAX:
            self.response = None
            yield from self._too_long("The head of the answer")
        return False
