"""Undo content codings as the bytes arrive: gzip, deflate, br, zstd, and bodies that lie about theirs.

Promises pieces of bounded size whatever a bomb holds, and no exception on any bytes: a corrupt body ends with `broken` set.
The first bytes decide before the header does, because recorded traffic has both lies: compressed bodies without a
content-encoding, and plain ones that still carry it (a proxy or a cassette had decoded them). Knows nothing of the content.
"""

import zlib
from collections.abc import Callable, Iterator

import brotli  # type: ignore[import-untyped]  # ships no type information
import zstandard

PIECE_BYTES_MAX = 64 * 2**10

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_WINDOW_BYTES_MAX = 8 * 2**20  # RFC 9659: what a decoder of the "zstd" coding has to support, and no more
_ZSTD_SLICE_BYTES = 64  # four bytes can stand for a 128 KiB block and the library has no output limit: 2 MiB a slice at most

# How the answers of the API begin when they are plain. None of these is the beginning of a compressed body: `{"` would be an
# empty brotli stream, and a deflate stream of text that starts with `{` starts with 0xab.
_PLAIN = (b'{"', b"{ ", b"{\n", b"{\r", b"{}", b"event:", b"data:", b"id:", b"retry:", b":", b"[", b"<")
_HEAD_BYTES = 8


class Decoder:
    """Undo one content coding. `feed` and `close` yield decoded pieces; after `broken` is set nothing more comes."""

    __slots__ = ("_declared", "_head", "_unpack", "broken", "plain")

    def __init__(self, declared: str | None = None) -> None:
        self._declared = (declared or "identity").strip().lower()
        self._head: bytes = b""
        self._unpack: Callable[[bytes], Iterator[bytes]] | None = None
        self.plain = False
        """True once it is certain that the bytes need no decoding."""
        self.broken: str | None = None
        """Why the body cannot be decoded, as a sentence; None while it can."""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        if self.plain:
            yield chunk
        elif self._unpack is not None:
            yield from self._guarded(chunk)
        elif self.broken is None:
            self._head += chunk
            if len(self._head.lstrip()) >= _HEAD_BYTES or len(self._head) >= PIECE_BYTES_MAX:
                yield from self._begin()

    def close(self) -> Iterator[bytes]:
        """Yield the content of a body that was too short for its coding to be decided."""
        if self._head:
            yield from self._begin()

    def _begin(self) -> Iterator[bytes]:
        head, self._head = self._head, b""
        coding = _sniff(head, self._declared)
        if coding == "identity":
            self.plain = True
            yield head
        elif coding not in _UNPACKERS:
            self.broken = f"content-encoding {coding!r} is not one that the gateway can read"
        else:
            self._unpack = _UNPACKERS[coding]()
            yield from self._guarded(head)

    def _guarded(self, chunk: bytes) -> Iterator[bytes]:
        if self.broken is None and self._unpack is not None:
            try:
                yield from self._unpack(chunk)
            except (zlib.error, brotli.error, zstandard.ZstdError) as error:
                self.broken = f"the compressed body is corrupt ({error})"


def _sniff(head: bytes, declared: str) -> str:
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if head.startswith(_ZSTD_MAGIC):
        return "zstd"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_PLAIN):
        return "identity"
    if declared == "deflate" and (head[0] & 0x0F != 8 or int.from_bytes(head[:2]) % 31):
        return "raw-deflate"  # RFC 1950's header is not there: many servers send RFC 1951 under this name
    return declared


class _Inflate:
    """Inflate with an output limit; gzip members may follow each other, and padding after the last one is ignored."""

    __slots__ = ("_begun", "_member", "_members", "_wbits")

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._member = zlib.decompressobj(wbits)
        self._members = 0
        self._begun = False

    def __call__(self, chunk: bytes) -> Iterator[bytes]:
        data = chunk
        while data or self._begun:
            try:
                piece = self._member.decompress(data, PIECE_BYTES_MAX)
            except zlib.error:
                if self._members == 0:
                    raise
                return
            if piece:
                yield piece
            # zlib may have eaten all its input and still hold output back: ask again until a piece is short.
            self._begun = len(piece) == PIECE_BYTES_MAX
            data = self._member.unconsumed_tail
            if self._member.eof:
                data, self._begun = self._member.unused_data, False
                self._member = zlib.decompressobj(self._wbits)
                self._members += 1


def _brotli() -> Callable[[bytes], Iterator[bytes]]:
    decompressor = brotli.Decompressor()

    def unpack(chunk: bytes) -> Iterator[bytes]:
        data = chunk
        while not decompressor.is_finished():
            piece = decompressor.process(data, output_buffer_limit=PIECE_BYTES_MAX)
            yield piece
            data = b""
            # `can_accept_more_data` turns true while output is still held back: only an empty piece means that all is out.
            if not piece and decompressor.can_accept_more_data():
                return

    return unpack


def _zstd() -> Callable[[bytes], Iterator[bytes]]:
    frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES_MAX).decompressobj(read_across_frames=True)

    def unpack(chunk: bytes) -> Iterator[bytes]:
        for start in range(0, len(chunk), _ZSTD_SLICE_BYTES):
            if piece := frame.decompress(chunk[start : start + _ZSTD_SLICE_BYTES]):
                yield piece

    return unpack


_UNPACKERS: dict[str, Callable[[], Callable[[bytes], Iterator[bytes]]]] = {
    "gzip": lambda: _Inflate(31),
    "x-gzip": lambda: _Inflate(31),
    "deflate": lambda: _Inflate(15),
    "raw-deflate": lambda: _Inflate(-15),
    "br": _brotli,
    "zstd": _zstd,
}
