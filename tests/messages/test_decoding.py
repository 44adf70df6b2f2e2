"""Every content coding, in any pieces; bodies that lie about theirs; bombs; junk."""

import gzip
import tracemalloc
import zlib

import brotli
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_addon.messages.decoding import PIECE_BYTES_MAX, Decoder

JSON = b'{"type":"message","usage":{"input_tokens":1}}' * 50
STREAM = b"event: ping\ndata: {}\n\n" * 50


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def flushed_brotli(data: bytes) -> bytes:
    """As a server sends events: each flushed by itself."""
    packer = brotli.Compressor()
    half = len(data) // 2
    return packer.process(data[:half]) + packer.flush() + packer.process(data[half:]) + packer.finish()


PACKERS = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-Gzip ", gzip.compress),
    "gzip, two members": ("gzip", lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:])),
    "gzip, zeros behind it": ("gzip", lambda data: gzip.compress(data) + bytes(20)),
    "deflate": ("deflate", zlib.compress),
    "deflate without its header": ("deflate", raw_deflate),
    "br": ("br", brotli.compress),
    "br, flushed in the middle": ("br", flushed_brotli),
    "zstd": ("zstd", zstandard.compress),
    "zstd, two frames": ("zstd", lambda data: zstandard.compress(data[:7]) + zstandard.compress(data[7:])),
    "identity": ("identity", bytes),
    "none named": (None, bytes),
    "lie: gzip that nobody declared": (None, gzip.compress),
    "lie: zstd that nobody declared": (None, zstandard.compress),
    "lie: gzip declared as br": ("br", gzip.compress),
    "lie: plain declared as gzip": ("gzip", bytes),
    "lie: plain declared as deflate": ("deflate", bytes),
    "lie: plain declared as br": ("br", bytes),
    "lie: plain declared as zstd": ("zstd", bytes),
    "lie: plain declared as something unknown": ("snappy", bytes),
}


def decode(chunks: list[bytes], declared: str | None) -> tuple[bytes, Decoder]:
    decoder = Decoder(declared)
    out = b"".join(piece for chunk in chunks for piece in decoder.feed(chunk))
    return out + b"".join(decoder.close()), decoder


@pytest.mark.parametrize("body", [JSON, STREAM, b"{}", b"  \r\n " + JSON], ids=["json", "stream", "tiny", "blank start"])
@pytest.mark.parametrize(("declared", "pack"), PACKERS.values(), ids=PACKERS)
def test_a_body_comes_out_as_it_was_whole_bytewise_and_split(declared, pack, body: bytes) -> None:
    packed = pack(body)
    for chunks in ([packed], [packed[i : i + 1] for i in range(len(packed))], [packed[:9], packed[9:]], [b"", packed, b""]):
        out, decoder = decode(chunks, declared)
        assert out == body
        assert decoder.broken is None


@pytest.mark.parametrize(
    ("declared", "body", "sentence"),
    [
        ("gzip", b"this is not gzip at all", "corrupt"),
        ("deflate", b"\x78\x9cthis is not zlib either", "corrupt"),
        ("br", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "corrupt"),
        ("zstd", b"\x28\xb5\x2f\xfd\x00\xff" + bytes(20), "corrupt"),
        ("gzip", gzip.compress(JSON, mtime=0)[:10] + b"\x07" * 40, "corrupt"),
        ("snappy", b"\x00\x01\x02\x03\x04\x05\x06\x07", "'snappy' is not one that the gateway can read"),
        ("gzip, br", b"\x00\x01\x02\x03\x04\x05\x06\x07", "'gzip, br' is not one"),
    ],
)
def test_a_body_that_cannot_be_decoded_says_why_and_never_raises(declared: str, body: bytes, sentence: str) -> None:
    for chunks in ([body], [body[i : i + 1] for i in range(len(body))]):
        _, decoder = decode(chunks, declared)
        assert sentence in (decoder.broken or "")
        assert list(decoder.feed(b"more")) == []


def test_what_arrived_before_a_cut_is_handed_out() -> None:
    packer = zlib.compressobj(wbits=31)
    first = packer.compress(STREAM) + packer.flush(zlib.Z_SYNC_FLUSH)
    out, decoder = decode([first], "gzip")
    assert out == STREAM
    assert decoder.broken is None


@pytest.mark.parametrize(
    ("declared", "pack"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("br", brotli.compress), ("zstd", zstandard.compress)],
)
def test_a_bomb_comes_out_in_pieces_and_never_in_memory_at_once(declared: str, pack) -> None:
    size = 40 * 2**20
    bomb = pack(bytes(size))
    assert len(bomb) < size / 500
    decoder = Decoder(declared)
    tracemalloc.start()
    total = 0
    longest = 0
    for piece in decoder.feed(bomb):
        total += len(piece)
        longest = max(longest, len(piece))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == size
    assert longest <= (2**22 if declared == "zstd" else 2 * PIECE_BYTES_MAX)
    assert peak < 30 * 2**20


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([None, "gzip", "deflate", "br", "zstd", "compress"]))
def test_arbitrary_bytes_never_raise(body: bytes, declared: str | None) -> None:
    decode([body], declared)
    decode([body[i : i + 1] for i in range(len(body))], declared)
