"""Cut a server-sent event stream into whole events: incremental, bounded in memory, never raising.

`Framer` cuts the stream at its blank lines and holds only the event that is still arriving; `events` takes whole events
apart. Framing is the HTML standard's (section 9.2, "Server-sent events"): LF, CRLF or CR, comments, several `data:` lines,
a leading byte order mark. One deliberate difference: the standard drops a last event without its blank line, `close` hands
it out, because the money is in it. Knows nothing of the events' meaning.
"""

from collections.abc import Iterator

EVENT_BYTES_MAX = 16 * 2**20  # the largest real events are web search results, some 100 KB

_BOM = b"\xef\xbb\xbf"


class Framer:
    """Cut a stream at event boundaries. Bytes go in as they come; whole events come out, line ends unified to LF."""

    __slots__ = ("_carriage_return", "_event_bytes_max", "_fresh", "_held", "_skipping", "skipped_bytes")

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = event_bytes_max
        self._held = bytearray()
        self._skipping = False
        self._carriage_return = False
        self._fresh = True
        self.skipped_bytes = 0
        """Bytes of events that were longer than the bound and therefore never handed out."""

    @property
    def at_boundary(self) -> bool:
        """Return whether the bytes fed so far end exactly between two events."""
        return not (self._held or self._skipping or self._carriage_return)

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes; return all events that they complete, each with its blank line (b"" when there is none)."""
        if self._fresh or self._carriage_return or b"\r" in chunk:
            chunk = self._unify(chunk)
        if not self._held:
            end = chunk.rfind(b"\n\n") + 2
            if 1 < end == len(chunk):
                return chunk  # whole events, not one byte copied: what a tap at a proxy mostly sees
            whole, rest = (chunk[:end], chunk[end:]) if end > 1 else (b"", chunk)
        else:
            searched = len(self._held) - 1  # its last byte may be the first half of a blank line
            self._held += chunk
            end = self._held.rfind(b"\n\n", searched) + 2
            if end == 1:
                self._bound()
                return b""
            whole, rest = bytes(self._held[:end]), bytes(self._held[end:])
            self._held.clear()
        if self._skipping:
            tail = whole.find(b"\n\n") + 2
            self.skipped_bytes += tail
            self._skipping = False
            whole = whole[tail:]
        self._held += rest.lstrip(b"\n")
        self._bound()
        return whole

    def close(self) -> bytes:
        """Return what is left: the last event where its blank line is missing, or the front part of a cut one."""
        rest = b"" if self._skipping else bytes(self._held).strip(b"\n")
        self._held.clear()
        return rest + b"\n\n" if rest else b""

    def _bound(self) -> None:
        if len(self._held) > self._event_bytes_max:
            self._skipping = True
        if self._skipping and self._held:
            self.skipped_bytes += len(self._held) - 1
            del self._held[:-1]

    def _unify(self, chunk: bytes) -> bytes:
        """Drop a leading byte order mark; turn CRLF and CR into LF, also where CR and LF come in different chunks."""
        if self._carriage_return:
            chunk = b"\r" + chunk
            self._carriage_return = False
        if self._fresh and chunk:
            self._held += chunk
            if len(self._held) < len(_BOM) and _BOM.startswith(self._held):
                return b""
            self._fresh = False
            chunk = bytes(self._held).removeprefix(_BOM).lstrip(b"\r\n")
            self._held.clear()
        if chunk.endswith(b"\r"):
            self._carriage_return = True
            chunk = chunk[:-1]
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def events(whole: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Take whole events (as `Framer.feed` returns them) apart: (name, data) of each that carries data."""
    for event in whole.split(b"\n\n"):
        name, data = b"", []
        for line in event.split(b"\n"):
            field, _, value = line.partition(b":")
            if field == b"data":
                data.append(value.removeprefix(b" "))
            elif field == b"event":
                name = value.removeprefix(b" ")
        if data:
            yield name, b"\n".join(data)
