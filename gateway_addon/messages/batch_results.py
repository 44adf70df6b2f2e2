"""Read the results of a message batch: JSONL lines -> one `BatchResult` each, incrementally.

Only `succeeded` lines are billed, and of those none whose message is the API's error: such a line comes out as `errored`. A
line's usage is counted by the rules of any other message. Results can be fetched again for 29 days, so they are booked by batch
and `custom_id`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gateway_addon.messages.decoding import Decoder
from gateway_addon.messages.merge import Draft
from gateway_addon.messages.meter import JSON_BYTES_MAX, json_object
from gateway_addon.messages.usage import Usage


@dataclass(frozen=True, slots=True)
class BatchResult:
    custom_id: str
    kind: str
    """`succeeded`, `errored`, `canceled` or `expired`; `unreadable` for a line that is none of these."""
    usage: Usage


class BatchMeter:
    """Read a results file as it passes. Holds one line at a time; a line over the bound comes out as `unreadable`."""

    __slots__ = ("_decoder", "_line", "_oversized")

    def __init__(self, content_encoding: str | None = None) -> None:
        self._decoder = Decoder(content_encoding)
        self._line = bytearray()
        self._oversized = False

    def feed(self, chunk: bytes) -> Iterator[BatchResult]:
        """Take the next bytes; yield the results that they complete. Exhaust it before feeding more."""
        for piece in self._decoder.feed(chunk):
            yield from self._take(piece)

    def close(self) -> Iterator[BatchResult]:
        """Yield the last line where its line end is missing."""
        for piece in self._decoder.close():
            yield from self._take(piece)
        yield from self._take(b"\n")

    def _take(self, piece: bytes) -> Iterator[BatchResult]:
        *ended, rest = piece.split(b"\n")
        for line in ended:
            self._hold(line)
            if self._oversized or self._line.strip():
                yield _result(b"" if self._oversized else bytes(self._line))
            self._line.clear()
            self._oversized = False
        self._hold(rest)

    def _hold(self, part: bytes) -> None:
        self._oversized = self._oversized or len(self._line) + len(part) > JSON_BYTES_MAX
        if self._oversized:
            self._line.clear()
        else:
            self._line += part


def _result(line: bytes) -> BatchResult:
    row = json_object(line) or {}
    custom_id, result = row.get("custom_id"), row.get("result")
    kind = result.get("type") if isinstance(result, dict) else None
    draft = Draft()
    if not isinstance(custom_id, str) or not isinstance(result, dict) or not isinstance(kind, str):
        draft.not_understood("the line is not a batch result")
        return BatchResult(custom_id if isinstance(custom_id, str) else "", "unreadable", draft.usage())
    message, error = result.get("message"), result.get("error")
    if kind == "succeeded" and isinstance(message, dict) and message.get("type") == "error":
        kind, error = "errored", message
    if kind == "succeeded" and isinstance(message, dict):
        draft.message(message)
    elif kind == "succeeded":
        draft.not_understood("the result carries no message")
    elif isinstance(error, dict):
        draft.error(error)
    usage = draft.usage()
    return BatchResult(custom_id, kind, replace(usage, complete=True, service_tier=usage.service_tier or "batch"))
