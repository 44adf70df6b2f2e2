"""Framing: whatever way the bytes are cut, the same events come out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_addon.messages.sse import Framer, events

TWO = b"event: a\ndata: 1\n\nevent: b\ndata: 2\n\n"
EXPECTED = [(b"a", b"1"), (b"b", b"2")]


def read(chunks: list[bytes], **options: int) -> list[tuple[bytes, bytes]]:
    framer = Framer(**options)
    found = [event for chunk in chunks for event in events(framer.feed(chunk))]
    return found + list(events(framer.close()))


def single(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


FRAMINGS = {
    "line feeds": TWO,
    "carriage returns and line feeds": TWO.replace(b"\n", b"\r\n"),
    "carriage returns alone": TWO.replace(b"\n", b"\r"),
    "no last blank line": TWO[:-1],
    "no last line end at all": TWO[:-2],
    "comments between": b": hello\n\n" + TWO.replace(b"\n\n", b"\n\n: keep-alive\n\n"),
    "a comment inside": b"event: a\n: why\ndata: 1\n\nevent: b\ndata: 2\n\n",
    "more blank lines than needed": b"\n\n" + TWO.replace(b"\n\n", b"\n\n\n\n\n"),
    "three line feeds at the end": TWO + b"\n",
    "no space after the colon": TWO.replace(b": ", b":"),
    "data before its name": b"data: 1\nevent: a\n\ndata: 2\nevent: b\n\n",
    "unknown fields": b"id: 7\nretry: 10\nnoise\n" + TWO,
    "a byte order mark": b"\xef\xbb\xbf" + TWO,
    "an event without data": b"event: nothing\n\n" + TWO,
}


@pytest.mark.parametrize("stream", FRAMINGS.values(), ids=FRAMINGS)
def test_each_framing_reads_the_same_however_it_is_split(stream: bytes) -> None:
    """Whole, byte by byte and split at every byte."""
    assert read([stream]) == EXPECTED
    assert read(single(stream)) == EXPECTED
    for cut in range(len(stream)):
        assert read([stream[:cut], stream[cut:]]) == EXPECTED


def test_several_data_lines_are_one_datum() -> None:
    assert read([b"data: {\ndata: }\n\n"]) == [(b"", b"{\n}")]


def test_an_event_comes_out_with_its_blank_line_and_not_before() -> None:
    framer = Framer()
    assert framer.feed(b"data: 1\n") == b""
    assert not framer.at_boundary
    assert framer.feed(b"\ndata: 2") == b"data: 1\n\n"
    assert not framer.at_boundary
    assert framer.feed(b"\n\n") == b"data: 2\n\n"
    assert framer.at_boundary


def test_an_event_over_the_bound_is_skipped_and_counted() -> None:
    """The next event is read."""
    huge = b"event: huge\ndata: " + b"x" * 1000 + b"\n\n"
    framer = Framer(event_bytes_max=100)
    stream = TWO + huge + TWO
    found = [event for byte in single(stream) for event in events(framer.feed(byte))]
    assert found == EXPECTED * 2
    assert framer.skipped_bytes == len(huge)
    assert framer.at_boundary


def test_an_endless_event_holds_no_more_than_the_bound() -> None:
    framer = Framer(event_bytes_max=1000)
    for _ in range(100):
        assert framer.feed(b"x" * 900) == b""
        assert len(framer._held) <= 1000
    assert framer.close() == b""


SCRAPS = [b"\n", b"\r", b"\r\n", b"data: 1", b"event: a", b":", b"\xef", b"\xef\xbb\xbf", b"\x00", b"data:\xff"]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS)), st.data())
def test_any_bytes_in_any_pieces_give_the_same_events(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(pieces) == read([stream]) == read(single(stream))
