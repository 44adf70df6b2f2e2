"""Bodies of the Messages API as a person reads them: whatever the bytes are, there is a text, and not too much of it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_addon.proxy.web import pretty

STREAM = b"".join(
    b"event: " + event["type"].encode() + b"\ndata: " + json.dumps(event).encode() + b"\n\n"
    for event in (
        {"type": "message_start", "message": {"id": "msg_1", "model": "claude-haiku-4-5", "usage": {"input_tokens": 12, "output_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "One could "}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "look it up."}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "I look\nit up."}},
        {"type": "content_block_stop", "index": 1},
        {"type": "content_block_start", "index": 2, "content_block": {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {}}},
        {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"word": '}},
        {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '"gate"}'}},
        {"type": "content_block_stop", "index": 2},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 30, "cache_read_input_tokens": 4000}},
        {"type": "message_stop"},
    )
)
MERGED = """\
model        claude-haiku-4-5
stop_reason  tool_use
cost         $1
usage        12 input, 4,000 cache read, 30 output
id           msg_1

thinking
  One could look it up.

text
  I look
  it up.

tool_use  look_up toolu_1
  {
    "word": "gate"
  }
"""
SSE = "text/event-stream; charset=utf-8"
JSON = "application/json"


def told(body, content_type=SSE):
    return pretty.answer(body, content_type, lambda usage: "$1")


def test_a_stream_is_merged_into_the_message_that_it_adds_up_to():
    assert told(STREAM) == MERGED


def test_cut_stream_shows_its_part_and_that_it_is_not_whole():
    """A stream that was cut shows what there is and that it is not whole."""
    shown = told(STREAM[: STREAM.index(b"content_block_stop")])
    assert "stop_reason  none: the answer is not whole" in shown
    assert "One could look it up." in shown


def test_a_whole_answer_reads_like_its_stream():
    blocks = [
        {"type": "thinking", "thinking": "One could look it up.", "signature": "x"},
        {"type": "text", "text": "I look\nit up."},
        {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"word": "gate"}},
    ]
    usage = {"input_tokens": 12, "output_tokens": 30, "cache_read_input_tokens": 4000}
    whole = {"type": "message", "id": "msg_1", "model": "claude-haiku-4-5", "content": blocks, "stop_reason": "tool_use", "usage": usage}
    assert told(json.dumps(whole).encode(), JSON) == MERGED


def test_an_error_is_said_with_its_type():
    envelope = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    assert told(json.dumps(envelope).encode(), JSON) == "error\n  overloaded_error: Overloaded\n"
    in_a_stream = STREAM[: STREAM.index(b"event: message_delta")] + b"event: error\ndata: " + json.dumps(envelope).encode() + b"\n\n"
    assert told(in_a_stream).endswith("error\n  overloaded_error: Overloaded\n")


def test_a_request_shows_its_settings_first_and_no_images_bytes():
    source = {"type": "base64", "media_type": "image/png", "data": "A" * 5000}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": [{"type": "text", "text": "no such word"}]}
    asked = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": [{"type": "image", "source": source}, result]}],
        "tools": [{"name": "look_up", "input_schema": {"properties": {"word": {}, "how": {}}, "required": ["word"]}}],
        "system": [{"type": "text", "text": "Be terse.", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "max_tokens": 2000,
        "model": "claude-haiku-4-5",
    }
    assert pretty.request(json.dumps(asked).encode()) == """\
model       claude-haiku-4-5
max_tokens  2000
thinking    {"type": "enabled", "budget_tokens": 1024}

system
  text  cache_control {"type": "ephemeral"}
    Be terse.

tools (1)
  look_up(word, how?)

messages (2)

[1] user
  hi

[2] user
  image
    {
      "source": {
        "type": "base64",
        "media_type": "image/png",
        "data": "(5,000 characters)"
      }
    }
  tool_result  toolu_1  is_error
    text
      no such word
"""


LARGE = {
    "a long text": {"content": [{"type": "text", "text": "word " * 1_000_000}]},
    "many lines": {"content": [{"type": "text", "text": "\n" * 19_000}] * 400},
    "many blocks": {"content": [{"type": "text", "text": "x"}] * 100_000},
    "deep blocks": {"content": json.loads('[{"type":"tool_result","content":' * 300 + "[]" + "}]" * 300)},
    "a long name": {"content": [{"type": "tool_use", "name": "x" * 1_000_000, "input": {}}]},
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_body_has_a_text_of_bounded_length(name):
    answer = {"type": "message", "model": "claude-haiku-4-5", "usage": {"input_tokens": 1, "output_tokens": 1}} | LARGE[name]
    for shown in (
        told(json.dumps(answer).encode(), JSON),
        pretty.request(json.dumps({"messages": [{"role": "user"} | LARGE[name]]}).encode()),
    ):
        assert len(shown) < 200_000
        assert shown.count("\n") <= pretty.LINES_MAX + 1


def test_a_body_too_large_to_look_into_says_so():
    body = b" " * (pretty.BODY_BYTES_MAX + 1)
    for shown in (told(body, JSON), pretty.request(body)):
        assert shown.startswith("This body has 8,388,609 bytes")
    assert pretty.model(body) == ""


NAMES = ["text", "tool_use", "message", "error", "content_block_start", "content_block_delta", "text_delta", "input_json_delta", "thinking"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["type", "content", "text", "delta", "index", "content_block", "message", "usage", "error", "messages", "tools", "system",
                         "input", "name", "input_schema", "properties", "source", "model", "partial_json", "thinking", "cache_control"]) | st.text(max_size=3),
        inner, max_size=6,
    ),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=50)
@given(st.binary(max_size=300) | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_have_a_text(body):
    for content_type in (SSE, JSON, ""):
        assert isinstance(told(body, content_type), str)
    assert isinstance(pretty.request(body), str)
    assert isinstance(pretty.model(body), str)


@given(st.lists(values, max_size=8))
def test_any_events_after_a_beginning_have_a_text(events):
    begin = STREAM[: STREAM.index(b"event: content_block_delta")]
    rest = b"".join(b"event: x\ndata: " + json.dumps(event).encode() + b"\n\n" for event in events)
    assert "claude-haiku-4-5" in told(begin + rest)
