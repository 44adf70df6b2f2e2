"""Meter the bytes of one response while they pass: sans-IO, constant memory on streams, never raising on content.

The tap of a proxy calls `feed` with every chunk, so most bytes must cost almost nothing: content deltas, which are nearly all
of a stream, are recognised and measured by two regular expressions over the raw bytes; only the few events that carry money
or change of model are parsed as JSON. Knows nothing of prices.

How an answer can end, and what `close` then returns (calls/settlement.py has the rules, these are its facts):
| ending | started | readable | complete | error_type |
|---|---|---|---|---|
| whole JSON message, or a stream with a stop reason | yes | yes | yes | - |
| JSON error envelope (any status) | no | no | yes | set |
| stream: error event before message_start | no | no | no | set |
| stream: error event in the middle | yes | yes | no | set |
| stream: cut after message_start | yes | yes: input exact, output a floor | no | - |
| stream: only pings, or nothing at all | no | no | no | - |
| unreadable: HTML, corrupt gzip, half a JSON body, absurd counts | maybe | no | maybe | - |
"""

import json
import re

from gateway_addon.messages.decoding import Decoder
from gateway_addon.messages.merge import Draft
from gateway_addon.messages.sse import Framer, events
from gateway_addon.messages.usage import Usage

JSON_BYTES_MAX = 64 * 2**20  # twice the largest request that the API takes; an answer of 128k tokens is about 1 MB

# A run of content deltas, framed as the API frames them. Anything framed otherwise takes the slow way, with the same result.
_DELTAS = re.compile(rb"(?:event: content_block_delta\ndata: [^\n]*\n\n)++")
# What deltas show of the output: text and tool input, as escaped in JSON (so never shorter than the text itself); nothing for
# kinds that are no evidence (thinking may be summarised). Quotes inside a JSON string are escaped: no text can forge this.
_DELTA = (
    rb'"delta": ?\{"type": ?"(?:(?:text_delta", ?"text|input_json_delta", ?"partial_json)": ?"([^"\\\n]*+(?:\\.[^"\\\n]*+)*+)"'
    rb'|(?:thinking|signature|citations|compaction)_delta")'
)
_SHOWN = re.compile(_DELTA)
_ONE_DELTA = re.compile(rb'event: content_block_delta\ndata: \{"type": ?"content_block_delta", ?"index": ?\d+, ?' + _DELTA + rb"[^\n]*\n\n")
_BLOCK_KIND = re.compile(rb'\{"type": ?"content_block_start", ?"index": ?\d+, ?"content_block": ?\{"type": ?"(\w+)"')
_BLOCK_JSON_BYTES_MAX = 4096  # the blocks that say more than their kind are short; a tool's result can be 100 KB
_MONEY = (b"message_start", b"message_delta", b"error")
_PARSED = (*_MONEY, b"content_block_start", b"")
_VISIBLE = ("text", "tool_use", "server_tool_use", "mcp_tool_use")


class Meter:
    """Read one response. `feed` what arrives, then `close`; the properties are live evidence, cheap after each feed."""

    __slots__ = ("_begun", "_body", "_closed", "_decoder", "_draft", "_form", "_framer", "_plain_stream",
                 "blocks", "content_events", "seen_bytes", "tool_uses", "visible_open")  # fmt: skip

    def __init__(self, content_type: str, content_encoding: str | None = None) -> None:
        self._decoder = Decoder(content_encoding)
        self._form = "sse" if content_type.strip().lower().startswith("text/event-stream") else "json"
        self._begun = False
        self._plain_stream = False
        self._framer = Framer()
        self._body = bytearray()
        self._draft = Draft()
        self._closed: Usage | None = None
        self.seen_bytes = 0
        """Bytes of text and tool input so far, JSON escapes included; the whole of an event too long to look into."""
        self.content_events = 0
        self.blocks = 0
        self.tool_uses = 0
        """Uses of tools at the provider: each has a block."""
        self.visible_open = False
        """True while a text or tool block is open: then the generated tokens are visible."""

    @property
    def started(self) -> bool:
        return self._draft.started

    @property
    def complete(self) -> bool:
        """Return whether a stop reason was seen: nothing that is billed follows it."""
        return self._draft.complete

    @property
    def error_type(self) -> str | None:
        return self._draft.error_type

    @property
    def reported_output_tokens(self) -> int:
        """Return the last total that the provider gave."""
        return self._draft.output_tokens

    @property
    def at_event_boundary(self) -> bool:
        """Return whether the bytes fed end between two events of a plain stream: an event may be inserted here."""
        return self._plain_stream and self._framer.at_boundary

    def usage_so_far(self) -> Usage:
        self._draft.has_content |= self.content_events > 0
        return self._draft.usage()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body, as they came from the wire."""
        if self._plain_stream:
            if self._framer.at_boundary and (one := _ONE_DELTA.fullmatch(chunk)):
                # The same as what follows, at half the price: an upstream that flushes each event makes this the usual chunk.
                self.content_events += 1
                self.seen_bytes += one.end(1) - one.start(1)
            else:
                self._stream(self._framer.feed(chunk))
            return
        for piece in self._decoder.feed(chunk):
            self._take(piece)

    def close(self) -> Usage:
        """End the body, whole or not, and return its usage. A second call returns the same."""
        if self._closed is None:
            for piece in self._decoder.close():
                self._take(piece)
            if self._form == "sse":
                self._stream(self._framer.close(), cut=True)
            else:
                self._json()
            self._body.clear()
            if self._decoder.broken:
                self._draft.note(self._decoder.broken)
            if self._framer.skipped_bytes:
                self._draft.note(f"{self._framer.skipped_bytes} bytes of events too long to look into were skipped")
            self._closed = self.usage_so_far()
        return self._closed

    def _take(self, piece: bytes) -> None:
        if not self._begun:
            self._begin(piece)
        if self._form == "sse":
            self._stream(self._framer.feed(piece))
        elif len(self._body) <= JSON_BYTES_MAX:
            self._body += piece

    def _begin(self, piece: bytes) -> None:
        """Choose the framing. The first byte beats the content-type: the error to a streaming call is JSON in any case."""
        first = piece.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if first:
            self._begun = True
            self._form = "json" if first == b"{" else "sse" if first in b"ed:" else self._form
            self._plain_stream = self._form == "sse" and self._decoder.plain

    def _stream(self, whole: bytes, cut: bool = False) -> None:
        """Take whole events; with `cut`, the last of them may be a fragment."""
        at, end = 0, len(whole)
        while at < end:
            if run := _DELTAS.match(whole, at):
                self._deltas(whole, at, run.end())
                at = run.end()
            else:
                blank = whole.find(b"\n\n", at)
                after = blank + 2 if blank >= 0 else end  # end: a third line feed of the event before
                for name, data in events(whole[at:after]):
                    self._event(name, data, cut)
                at = after

    def _deltas(self, data: bytes, start: int, end: int, count: int = 0) -> None:
        count = count or data.count(b"\n\n", start, end)
        shown = _SHOWN.findall(data, start, end)
        self.content_events += count
        # A delta of a kind or spelling not known here counts with all its bytes: evidence may err upwards only.
        self.seen_bytes += sum(map(len, shown)) if len(shown) == count else end - start

    def _event(self, name: bytes, data: bytes, cut: bool) -> None:
        if name == b"content_block_delta":
            return self._deltas(data, 0, len(data), count=1)
        if name == b"content_block_stop":
            self.visible_open = False
        if name not in _PARSED:
            return None
        kind = _BLOCK_KIND.match(data)
        if kind and len(data) > _BLOCK_JSON_BYTES_MAX:
            return self._block({"type": kind[1].decode()})
        event = json_object(data)
        if event is None:
            return self._garbled(name, data, cut)
        match event.get("type") or name.decode():
            case "message_start":
                self._draft.message_start(event.get("message"))
            case "message_delta":
                self._draft.message_delta(event)
            case "content_block_start":
                self._block(event.get("content_block"))
            case "content_block_stop":
                self.visible_open = False
            case "content_block_delta":
                self._deltas(data, 0, len(data), count=1)
            case "error":
                self._draft.error(event)

    def _block(self, block: object) -> None:
        self.blocks += 1
        self.tool_uses += isinstance(block, dict) and block.get("type") == "server_tool_use"
        self.visible_open = isinstance(block, dict) and block.get("type") in _VISIBLE
        self._draft.block(block)

    def _garbled(self, name: bytes, data: bytes, cut: bool) -> None:
        """Note an event that is not JSON. A last event of totals that is cut off means that the earlier totals were not final."""
        if cut and b"message_delta" in name + data:
            self._draft.complete = False
        elif not cut and name in _MONEY:
            self._draft.not_understood(f"the {name.decode()} event is not JSON")

    def _json(self) -> None:
        body = json_object(bytes(self._body)) if len(self._body) <= JSON_BYTES_MAX else None
        if body is None:
            self._draft.not_understood("the body is not a JSON object" if self._body else "the body is empty")
        elif body.get("type") == "error" or "error" in body:
            self._draft.error(body)
            self._draft.complete = True
        elif body.get("type") == "message" or "usage" in body:
            self._draft.message(body)
        else:
            self._draft.not_understood("the body is not an answer of the Messages API")


def json_object(data: bytes) -> dict[str, object] | None:
    """Parse a JSON object; return None for anything else.

    The larger value of a doubled key holds: other readers may bill by either, and no less than the bill may be booked."""
    try:
        value = _DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    made = {}
    for name, value in pairs:
        made[name] = _larger(made[name], value) if name in made else value
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Made once: `json.loads` makes one for each text."""


def _larger(one: object, other: object) -> object:
    """Return the larger of a key's two values: the higher count, or the union of two objects or lists."""
    if other is None:
        return one
    if type(one) is int and type(other) is int:
        return max(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        for name, value in other.items():
            one[name] = _larger(one[name], value) if name in one else value
        return one
    if isinstance(one, list) and isinstance(other, list):
        one.extend(other)
        return one
    return other
