"""Usage out of response bytes: each rule of merging, each ending, each odd shape, in any pieces."""

import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_addon.messages import BatchMeter, Meter, TokenCounts, Usage, UsagePart

SSE = "text/event-stream; charset=utf-8"


def event(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, separators=(',', ':'))}\n\n".encode()


def start(model: str = "claude-opus-5-5", **usage: object) -> bytes:
    usage = {"input_tokens": 10, "output_tokens": 1, **usage}
    return event("message_start", message={"id": "msg_1", "type": "message", "model": model, "content": [], "usage": usage})


def delta(stop_reason: str | None = "end_turn", usage: object = None) -> bytes:
    more = {} if usage is None else {"usage": usage}
    return event("message_delta", delta={"stop_reason": stop_reason}, **more)


def block(kind: str = "text", index: int = 0, **more: object) -> bytes:
    more = {"text": ""} if kind == "text" and not more else more
    return event("content_block_start", index=index, content_block={"type": kind, **more})


def text(words: str, index: int = 0) -> bytes:
    return event("content_block_delta", index=index, delta={"type": "text_delta", "text": words})


def thinking(words: str) -> bytes:
    return event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": words})


PING = b'event: ping\ndata: {"type": "ping"}\n\n'
CLOSE = event("content_block_stop", index=0)
STOP = event("message_stop")
WHOLE = [start(), block(), PING, text("Hello"), text(" there"), CLOSE, delta(usage={"output_tokens": 7}), STOP]


def read(body: bytes, content_type: str = SSE, encoding: str | None = None, size: int | None = None) -> Usage:
    meter = Meter(content_type, encoding)
    for at in range(0, len(body), size or len(body) or 1):
        meter.feed(body[at : at + (size or len(body))])
    return meter.close()


def message(**changes: object) -> bytes:
    """A JSON answer; `usage` changes merge into the usual one."""
    usage = {"input_tokens": 10, "output_tokens": 7, **(changes.pop("usage", None) or {})}
    whole = {"type": "message", "id": "msg_1", "model": "claude-opus-5-5", "stop_reason": "end_turn"}
    return json.dumps({**whole, "content": [{"type": "text", "text": "Hello"}], "usage": usage, **changes}).encode()


def of_json(**changes: object) -> Usage:
    return read(message(**changes), "application/json")


# How running totals merge: the highest number holds, null and absent keep, nothing is added.
BOTH = [{"type": "compaction", "input_tokens": 60_385, "output_tokens": 522}, {"type": "message", "input_tokens": 612, "output_tokens": 0}]
MERGES = [
    ("a delta replaces the placeholder of the output", {}, [{"output_tokens": 7}], TokenCounts(10, 7)),
    ("input grows", {}, [{"input_tokens": 404_500, "output_tokens": 7}], TokenCounts(404_500, 7)),
    ("beside iterations totals may fall", {"input_tokens": 60_385}, [{"input_tokens": 612, "output_tokens": 0, "iterations": BOTH}], TokenCounts(612, 0)),
    ("an empty list of iterations lets nothing fall", {}, [{"input_tokens": 0, "output_tokens": 7, "iterations": []}], TokenCounts(10, 7)),
    ("the placeholder of the output may fall", {"output_tokens": 3}, [{"output_tokens": 0}], TokenCounts(10, 0)),
    ("a reported output never falls", {}, [{"output_tokens": 9}, {"output_tokens": 0}], TokenCounts(10, 9)),
    ("a lower input never lowers", {"input_tokens": 60_385}, [{"input_tokens": 612, "output_tokens": 7}], TokenCounts(60_385, 7)),
    ("null keeps", {"cache_read_input_tokens": 5}, [{"input_tokens": None, "cache_read_input_tokens": None}], TokenCounts(10, 1, 5)),
    ("a zero never erases", {"cache_read_input_tokens": 5}, [{"cache_read_input_tokens": 0, "output_tokens": 7}], TokenCounts(10, 7, 5)),
    (
        "a zero split never erases",
        {"cache_creation_input_tokens": 9, "cache_creation": {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 4}},
        [{"cache_creation_input_tokens": 0, "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}}],
        TokenCounts(10, 1, 0, 5, 4, 0),
    ),
    ("three deltas: the last is the highest", {}, [{"output_tokens": 3}, {"output_tokens": 5}, {"output_tokens": 9}], TokenCounts(10, 9)),
    ("a delta without usage keeps", {}, [{"output_tokens": 7}, None], TokenCounts(10, 7)),
    ("no delta usage at all", {}, [None], TokenCounts(10, 1)),
    (
        "the split stays, the total grows",
        {"cache_creation_input_tokens": 2474, "cache_creation": {"ephemeral_5m_input_tokens": 2474, "ephemeral_1h_input_tokens": 0}},
        [{"cache_creation_input_tokens": 24_164, "output_tokens": 7}],
        TokenCounts(10, 7, 0, 2474, 0, 21_690),
    ),
    (
        "a split without a total counts",
        {"cache_creation": {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 4}},
        [{"output_tokens": 7}],
        TokenCounts(10, 7, 0, 3, 4, 0),
    ),
    ("no split at all", {"cache_creation_input_tokens": 50}, [{"output_tokens": 7}], TokenCounts(10, 7, 0, 0, 0, 50)),
]


@pytest.mark.parametrize(("opening", "totals", "tokens"), [row[1:] for row in MERGES], ids=[row[0] for row in MERGES])
def test_counts_are_cumulative(opening: dict[str, object], totals: list[dict[str, object] | None], tokens: TokenCounts) -> None:
    body = start(**opening) + b"".join(delta(usage=usage) for usage in totals) + STOP
    usage = read(body)
    assert usage.tokens == tokens
    assert usage.readable
    assert usage.complete


LARGE, SMALL = {"input_tokens": 10, "output_tokens": 900}, {"input_tokens": 10, "output_tokens": 1}
TWICE = [
    ("the whole usage", '"usage": {}, "usage": {}', (LARGE, SMALL), 900),
    ("one count of it", '"usage": {{"input_tokens": 10, "output_tokens": {}, "output_tokens": {}}}', (900, 1), 900),
    ("a null beside it", '"usage": {}, "usage": {}', (LARGE, None), 900),
    ("its iterations", '"usage": {{"input_tokens": 1, "output_tokens": 1, "iterations": {}, "iterations": {}}}',
     ([{"type": "message", "input_tokens": 10, "output_tokens": 900}], []), 900),
]  # fmt: skip


@pytest.mark.parametrize(("written", "values", "output_tokens"), [row[1:] for row in TWICE], ids=[row[0] for row in TWICE])
def test_a_key_given_twice_counts_with_its_larger_value(written: str, values: tuple[object, ...], output_tokens: int) -> None:
    """Whichever of the two the provider bills by."""
    for pair in (values, values[::-1]):
        usage = written.format(*(json.dumps(value) for value in pair))
        whole = f'{{"type": "message", "id": "msg_1", "model": "claude-opus-5-5", "stop_reason": "end_turn", "content": [], {usage}}}'
        line = f'{{"custom_id": "a", "result": {{"type": "succeeded", "message": {whole}}}}}\n'.encode()
        [result] = BatchMeter().feed(line)
        for each in (read(whole.encode(), "application/json"), result.usage):
            billed = [part.tokens for part in each.iterations] or [each.tokens]
            assert [tokens.output_tokens for tokens in billed] == [output_tokens]


@pytest.mark.parametrize("opening", [None, {}, {"input_tokens": 0, "output_tokens": 0}], ids=["none", "empty", "zeroes"])
def test_usage_may_come_only_in_the_delta(opening: dict[str, int] | None) -> None:
    beginning = event("message_start", message={"id": "msg_1", "type": "message", "model": "claude-opus-5-5", "content": [], "usage": opening})
    whole = {"input_tokens": 10, "output_tokens": 7, "cache_read_input_tokens": 5, "server_tool_use": {"web_search_requests": 2}}
    for size in (None, 1, 7):
        usage = read(beginning + block() + text("Hi") + CLOSE + delta(usage=whole) + STOP, size=size)
        assert (usage.tokens, usage.web_search_requests) == (TokenCounts(10, 7, 5), 2)
        assert usage.readable
        assert usage.complete
        assert usage.notes == ()
    assert not read(beginning + block() + text("Hi")).prompt_known, "cut before its delta, it has told nothing"


def test_searches_are_cumulative_beside_iterations_too() -> None:
    first, second = ({"output_tokens": 1, "iterations": BOTH, "server_tool_use": {"web_search_requests": n}} for n in (3, 0))
    assert read(start() + delta(usage=first) + delta(usage=second) + STOP).web_search_requests == 3


@pytest.mark.parametrize(
    "later",
    [
        [],
        BOTH[:1],
        [entry | {"input_tokens": 0, "output_tokens": 0} for entry in BOTH],
        [{**BOTH[0], "input_tokens": 1}, {**BOTH[1], "output_tokens": None}],
    ],
    ids=["empty", "shorter", "zeroes", "lower"],
)
def test_iterations_are_cumulative(later: list[dict[str, object]]) -> None:
    readable = all(entry["output_tokens"] is not None for entry in later)
    usage = read(start() + delta(usage={"output_tokens": 1, "iterations": BOTH}) + delta(usage={"iterations": later}) + STOP)
    assert [(part.kind, part.tokens) for part in usage.iterations] == [("compaction", TokenCounts(60_385, 522)), ("message", TokenCounts(612, 0))]
    assert usage.readable is readable


CALL = {"type": "tool_use", "id": "toolu_1", "name": "roll", "input": {}, "caller": {"type": "code_execution_20250825", "tool_id": "srvtoolu_1"}}


@pytest.mark.parametrize("counts", [{"input_tokens": 0, "output_tokens": 0}, {"input_tokens": 10, "output_tokens": 7}], ids=["unbilled", "billed"])
def test_a_message_start_may_be_the_whole_message(counts: dict[str, int]) -> None:
    """Programmatic tool calls, as recorded: what the code asks for comes in one piece, and nothing is generated for it."""
    whole = json.loads(message(content=[CALL], stop_reason="tool_use", container={"id": "container_1"}, usage=counts))
    body = event("message_start", message=whole) + STOP
    as_json = read(json.dumps(whole).encode(), "application/json")
    for cut in (len(body), len(body) - len(STOP), len(body) - len(STOP) - 2):
        for size in (None, 1, 7):
            assert read(body[:cut], size=size) == as_json
    assert (as_json.complete, as_json.readable, as_json.stop_reason, as_json.code_executed) == (True, True, "tool_use", True)
    assert as_json.tokens == TokenCounts(**counts)


def test_a_refusal_that_comes_whole_is_free_only_without_content() -> None:
    for content, free in (([], True), ([{"type": "text", "text": "I"}], False)):
        whole = json.loads(message(content=content, stop_reason="refusal"))
        assert read(event("message_start", message=whole) + STOP).refused_before_output is free


# How an answer can end: (bytes, content type) -> started, readable, complete, error_type. The table in usage/meter.py, executed.
ERROR = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
ERROR_EVENT = event("error", error=ERROR["error"])
ENDINGS = {
    "whole stream": (b"".join(WHOLE), SSE, (True, True, True, None)),
    "whole stream without its last blank line": (b"".join(WHOLE)[:-2], SSE, (True, True, True, None)),
    "stop reason seen, message_stop not": (b"".join(WHOLE[:-1]), SSE, (True, True, True, None)),
    "last event is message_delta, unterminated": (b"".join(WHOLE[:-1])[:-2], SSE, (True, True, True, None)),
    "cut inside message_delta": (b"".join(WHOLE[:-1])[:-12], SSE, (True, True, False, None)),
    "cut inside a second message_delta": (b"".join(WHOLE[:-1]) + delta(usage={"output_tokens": 9})[:-9], SSE, (True, True, False, None)),
    "cut after message_start": (start(), SSE, (True, True, False, None)),
    "cut in the middle of the text": (b"".join(WHOLE[:4]), SSE, (True, True, False, None)),
    "error event in the middle": (b"".join(WHOLE[:4]) + ERROR_EVENT, SSE, (True, True, False, "overloaded_error")),
    "error event before message_start": (PING + ERROR_EVENT, SSE, (False, False, False, "overloaded_error")),
    "pings only": (PING * 3, SSE, (False, False, False, None)),
    "nothing, as a stream": (b"", SSE, (False, False, False, None)),
    "nothing, as JSON": (b"", "application/json", (False, False, False, None)),
    "a broken money event": (start() + b"event: message_delta\ndata: {oops}\n\n" + STOP, SSE, (True, False, False, None)),
    "whole JSON": (message(), "application/json", (True, True, True, None)),
    "half a JSON body": (message()[:-20], "application/json", (False, False, False, None)),
    "JSON without usage": (json.dumps({"type": "message", "model": "m"}).encode(), "application/json", (True, False, True, None)),
    "JSON with null usage": (json.dumps({"type": "message", "usage": None}).encode(), "application/json", (True, False, True, None)),
    "another JSON object": (b'{"input_tokens": 14}', "application/json", (False, False, False, None)),
    "JSON error envelope": (json.dumps(ERROR).encode(), "application/json", (False, False, True, "overloaded_error")),
    "JSON error to a streaming call": (json.dumps(ERROR).encode(), SSE, (False, False, True, "overloaded_error")),
    "an error without a type": (b'{"type":"error"}', "application/json", (False, False, True, "error")),
    "HTML": (b"<html>502 Bad Gateway</html>", "text/html", (False, False, False, None)),
    "a stream called JSON": (b"".join(WHOLE), "application/json", (True, True, True, None)),
    "deep nesting": (b'{"a":' * 100_000, "application/json", (False, False, False, None)),
}


@pytest.mark.parametrize(("body", "content_type", "ending"), ENDINGS.values(), ids=ENDINGS)
def test_each_ending_is_told_apart(body: bytes, content_type: str, ending: tuple[object, ...]) -> None:
    for size in (None, 1, 7):
        usage = read(body, content_type, size=size if len(body) < 10_000 else None)
        assert (usage.started, usage.readable, usage.complete, usage.error_type) == ending


def test_a_stream_cut_before_its_stop_reason_is_never_complete() -> None:
    """The stream is cut at every byte."""
    body = b"".join(WHOLE)
    known_from = body.index(b"event: message_stop") - 2  # message_delta is there but for its blank line, which may be missing
    for cut in range(len(body) + 1):
        usage = read(body[:cut])
        assert usage.complete == (cut >= known_from)
        assert usage.started == (cut >= len(WHOLE[0]) - 2)


@pytest.mark.parametrize("value", [-1, 1.5, "7", True, 10**13, [], {}], ids=repr)
@pytest.mark.parametrize("where", ["usage", "delta", "split", "searches", "iteration"])
def test_a_count_that_is_no_count_makes_the_usage_unreadable(where: str, value: object) -> None:
    usage = {
        "usage": lambda: of_json(usage={"input_tokens": value}),
        "delta": lambda: read(start() + delta(usage={"output_tokens": value}) + STOP),
        "split": lambda: of_json(usage={"cache_creation": {"ephemeral_1h_input_tokens": value}}),
        "searches": lambda: of_json(usage={"server_tool_use": {"web_search_requests": value}}),
        "iteration": lambda: of_json(usage={"iterations": [{"type": "message", "input_tokens": value, "output_tokens": 1}]}),
    }[where]()
    assert not usage.readable
    assert "is not a count of tokens" in usage.notes[0]


@pytest.mark.parametrize("iterations", ["x", {}, [1], [{"type": "message"}], [{"input_tokens": 1, "output_tokens": None}]])
def test_unreadable_iterations_make_the_usage_unreadable(iterations: object) -> None:
    assert not of_json(usage={"iterations": iterations}).readable


@pytest.mark.parametrize("missing", ["input_tokens", "output_tokens"])
def test_a_first_usage_without_input_or_output_is_unreadable(missing: str) -> None:
    assert not of_json(usage={missing: None}).readable


def test_names_come_from_the_first_usage_and_are_kept() -> None:
    usage = read(start(service_tier="standard", inference_geo="us", speed="fast") + delta(usage={"output_tokens": 7, "speed": None}) + STOP)
    assert (usage.service_tier, usage.inference_geo, usage.speed) == ("standard", "us", "fast")
    assert (usage.model, usage.message_id, usage.stop_reason) == ("claude-opus-5-5", "msg_1", "end_turn")


def test_iterations_have_their_own_model_an_advisor_perhaps_none() -> None:
    entries = [
        {"type": "message", "input_tokens": 1, "output_tokens": 2, "model": None},
        {"type": "advisor_message", "input_tokens": 3, "output_tokens": 4, "model": "claude-opus-5"},
        {"type": "advisor_message", "input_tokens": 3, "output_tokens": 4},
        {"type": "something_new", "input_tokens": 5, "output_tokens": 6, "cache_creation_input_tokens": 9},
    ]
    for usage in (of_json(usage={"iterations": entries}), read(start() + delta(usage={"output_tokens": 7, "iterations": entries}) + STOP)):
        assert usage.iterations == (
            UsagePart("message", "claude-opus-5-5", TokenCounts(1, 2)),
            UsagePart("advisor_message", "claude-opus-5", TokenCounts(3, 4)),
            UsagePart("advisor_message", None, TokenCounts(3, 4)),
            UsagePart("something_new", "claude-opus-5-5", TokenCounts(5, 6, 0, 0, 0, 9)),
        )


def test_a_fallback_block_names_the_model_that_served() -> None:
    switch = {"type": "fallback", "from": {"model": "claude-opus-5-5"}, "to": {"model": "claude-sonnet-5"}}
    streamed = read(start() + event("content_block_start", index=0, content_block=switch) + text("hi") + delta(usage={"output_tokens": 2}))
    whole = of_json(model="claude-opus-5-5", content=[switch, {"type": "text", "text": "hi"}])
    for usage in (streamed, whole):
        assert usage.model == "claude-sonnet-5"
        assert usage.fallback


def test_a_fallback_iteration_names_the_model_that_served() -> None:
    """The first hop keeps the model that was asked for."""
    hops = [
        {"type": "message", "input_tokens": 535, "output_tokens": 0},
        {"type": "fallback_message", "model": "claude-opus-5-5", "input_tokens": 412, "output_tokens": 264},
    ]
    usage = read(start(model="claude-fable-5-2") + delta(usage={"output_tokens": 264, "iterations": hops}) + STOP)
    assert usage.model == "claude-opus-5-5"
    assert [part.model for part in usage.iterations] == ["claude-fable-5-2", "claude-opus-5-5"]


NO_OUTPUT = start() + block() + CLOSE
REFUSALS = {
    "no content at all": (start(), True),
    "an empty text block": (NO_OUTPUT, True),
    "text before it": (start() + block() + text("I") + CLOSE, False),
    "hidden thinking before it": (start() + block("thinking") + thinking("") + CLOSE, False),
    "a tool's result before it": (start() + block("web_search_tool_result", content=[]) + CLOSE, False),
}


@pytest.mark.parametrize(("opening", "free"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_before_output_only_without_any_content(opening: bytes, free: bool) -> None:
    assert read(opening + delta("refusal", {"output_tokens": 0}) + STOP).refused_before_output is free
    assert not read(opening + delta("end_turn", {"output_tokens": 0}) + STOP).refused_before_output


@pytest.mark.parametrize(
    ("content", "free"),
    [([], True), ([{"type": "text", "text": ""}], True), ([{"type": "text", "text": "I"}], False), (None, False)],
)
def test_a_json_refusal_is_before_output_only_without_content(content: object, free: bool) -> None:
    assert of_json(content=content, stop_reason="refusal").refused_before_output is free


def test_server_tools_are_counted_and_code_execution_is_noticed() -> None:
    tools = {"web_search_requests": 2, "web_fetch_requests": 3, "code_execution_requests": 1}
    usage = read(start() + delta(usage={"output_tokens": 7, "server_tool_use": tools}) + STOP)
    assert (usage.web_search_requests, usage.web_fetch_requests, usage.code_execution_requests) == (2, 3, 1)
    assert usage.code_executed
    for kind in ("code_execution_tool_result", "bash_code_execution_tool_result"):
        assert of_json(content=[{"type": kind}]).code_executed
        assert read(start() + block(kind, content=["x" * 10_000]) + delta()).code_executed
    assert of_json(container={"id": "container_1"}).code_executed
    assert not of_json().code_executed


def test_what_is_unknown_is_ignored() -> None:
    odd = event("some_new_event", usage={"input_tokens": 999}) + event("content_block_delta", index=0, delta={"type": "new_delta", "x": 1})
    body = b": comment\n\n" + PING + start(new_key={"a": 1}) + odd + block("new_block", x=[1])
    body += delta(usage={"output_tokens": 7, "novel": 3}) + STOP
    assert read(body).tokens == TokenCounts(10, 7)
    assert read(body).complete


def test_a_doubled_message_start_changes_nothing() -> None:
    usage = read(start() + start() + b"".join(WHOLE[1:]))
    assert usage.tokens == TokenCounts(10, 7)
    assert "message_start came twice" in usage.notes


def test_events_without_names_crlf_and_odd_spacing_read_the_same() -> None:
    plain = read(b"".join(WHOLE))
    unnamed = b"".join(b"\n".join(line for line in part.split(b"\n") if not line.startswith(b"event:")) for part in WHOLE)
    spaced = b"".join(WHOLE).replace(b'":', b'" : ').replace(b"}\n", b"}    \n")
    for body in (unnamed, b"".join(WHOLE).replace(b"\n", b"\r\n"), b"".join(WHOLE).replace(b"event: ", b"event:"), spaced):
        assert read(body) == plain
        assert read(body, size=1) == plain
        assert read(gzip.compress(body), encoding="gzip", size=5) == plain


def test_an_assumed_output_raises_the_count_and_says_so() -> None:
    cut = read(start() + block() + text("Hello"))
    assumed = cut.assuming_output(500)
    assert assumed.tokens == TokenCounts(10, 500)
    assert assumed.estimated
    assert not assumed.complete
    assert read(b"".join(WHOLE)).assuming_output(3).tokens.output_tokens == 7
    hops = [{"type": "compaction", "input_tokens": 9, "output_tokens": 2}, {"type": "message", "input_tokens": 10, "output_tokens": 7}]
    assert [part.tokens.output_tokens for part in of_json(usage={"iterations": hops}).assuming_output(10).iterations] == [2, 10]


# Live evidence: what a progressive reservation may rely on while the stream runs.


def watch(*events: bytes) -> Meter:
    meter = Meter(SSE)
    for part in events:
        meter.feed(part)
    return meter


def test_text_and_tool_input_are_evidence_and_thinking_is_none() -> None:
    """The evidence is their bytes."""
    tool = event("content_block_delta", index=12, delta={"type": "input_json_delta", "partial_json": '{"a": "é'})
    escaped = len(json.dumps('{"a": "é')) - 2
    meter = watch(start(), block(), text("Hello"), thinking("a long thought"), tool)
    assert meter.seen_bytes == 5 + escaped
    assert meter.content_events == 3
    assert meter.blocks == 1
    at_once = watch(start() + block() + text("Hello") + thinking("a long thought") + tool)
    assert at_once.seen_bytes == meter.seen_bytes
    assert at_once.content_events == 3


def test_padding_and_envelopes_are_no_evidence() -> None:
    """A forged opening inside a text counts as text."""
    padded = text("Hi").replace(b"}}\n", b"}}          \n")
    forged = text('"delta":{"type":"text_delta","text":"' + "x" * 50 + '"')
    assert watch(start(), block(), padded).seen_bytes == 2
    assert watch(start(), block(), forged).seen_bytes == len(json.dumps('"delta":{"type":"text_delta","text":"' + "x" * 50 + '"')) - 2


def test_a_delta_of_unknown_kind_counts_with_all_its_bytes() -> None:
    odd = event("content_block_delta", index=0, delta={"type": "new_delta", "stuff": "x" * 30})
    assert watch(start(), block(), odd).seen_bytes >= len(odd)


def test_visible_open_follows_the_blocks() -> None:
    meter = watch(start())
    for opening, visible in ((block("thinking"), False), (block(), True), (block("tool_use", id="t", name="n", input={}), True)):
        meter.feed(opening)
        assert meter.visible_open is visible
        meter.feed(CLOSE)
        assert not meter.visible_open


def test_the_meter_knows_whether_it_stands_between_two_events() -> None:
    meter = watch(start(), block())
    for part in WHOLE[2:]:
        assert meter.at_event_boundary
        meter.feed(part[:-1])
        assert not meter.at_event_boundary
        meter.feed(part[-1:])
    assert meter.at_event_boundary
    packed = Meter(SSE, "gzip")
    packed.feed(gzip.compress(start()))
    assert not packed.at_event_boundary  # nothing can be written into a compressed stream


def test_evidence_before_the_end() -> None:
    meter = watch(start())
    assert meter.started
    assert meter.usage_so_far().tokens == TokenCounts(10, 1)
    meter.feed(delta(None, {"output_tokens": 40}))
    assert meter.reported_output_tokens == 40
    meter.feed(ERROR_EVENT)
    assert meter.error_type == "overloaded_error"
    assert meter.close() is meter.close()


def test_a_stream_of_many_megabytes_leaves_no_trace_in_memory() -> None:
    chunk = b"".join(text(f"word {n} " * 5) for n in range(500))
    meter = watch(start(), block())
    tracemalloc.start()
    for _ in range(300):
        meter.feed(chunk[:30_000])
        meter.feed(chunk[30_000:])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    meter.feed(delta(usage={"output_tokens": 7}))
    assert meter.close().tokens == TokenCounts(10, 7)
    assert meter.content_events == 150_000
    assert peak < 2 * 2**20


@pytest.mark.soak
def test_three_hundred_megabytes_in_constant_memory() -> None:
    chunk = b"".join(text(f"word {n} " * 20) for n in range(400))
    meter = watch(start(), block())
    fed = 0
    tracemalloc.start()
    while fed < 300 * 2**20:
        meter.feed(chunk)
        fed += len(chunk)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 2**20


def test_an_event_of_20_mb_is_not_kept_and_does_not_end_metering() -> None:
    meter = watch(start(), block())
    tracemalloc.start()
    meter.feed(b'event: content_block_start\ndata: {"type":"content_block_start","index":1,"content_block":{"type":"x","data":"')
    for _ in range(20):
        meter.feed(b"x" * 2**20)
    meter.feed(b'"}}\n\n')
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    meter.feed(delta(usage={"output_tokens": 7}))
    usage = meter.close()
    assert usage.tokens == TokenCounts(10, 7)
    assert current < 2**20
    assert any("too long to look into" in note for note in usage.notes)


# Batch results.

LINES = [
    {"custom_id": "a1", "result": {"type": "succeeded", "message": json.loads(message(model="claude-sonnet-5-5"))}},
    {"custom_id": "a2", "result": {"type": "errored", "error": ERROR}},
    {"custom_id": "a3", "result": {"type": "expired"}},
    {"custom_id": "a4", "result": {"type": "succeeded"}},
    {"custom_id": "a5"},
]
BATCH = b"\n".join(json.dumps(line).encode() for line in LINES) + b"\n\nnot json\n"


@pytest.mark.parametrize("size", [1, 50, 10_000])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("tail", [b"", b'{"custom_id":"z","result":{"type":"canceled"}}'], ids=["", "no last line end"])
def test_only_succeeded_batch_results_carry_usage(size: int, pack, tail: bytes) -> None:
    """Results come line by line, in pieces of any size."""
    meter = BatchMeter()
    body = pack(BATCH + tail)
    results = [result for at in range(0, len(body), size) for result in meter.feed(body[at : at + size])] + list(meter.close())
    kinds = [(result.custom_id, result.kind, result.usage.readable) for result in results]
    assert kinds[:6] == [
        ("a1", "succeeded", True),
        ("a2", "errored", False),
        ("a3", "expired", False),
        ("a4", "succeeded", False),
        ("a5", "unreadable", False),
        ("", "unreadable", False),
    ]
    assert kinds[6:] == ([("z", "canceled", False)] if tail else [])
    assert (results[0].usage.model, results[0].usage.tokens, results[0].usage.service_tier) == ("claude-sonnet-5-5", TokenCounts(10, 7), "batch")
    assert results[1].usage.error_type == "overloaded_error"


# Properties.

COUNT = st.integers(0, 10**6)
JUNK = [b"\n", b"\r\n", b"data: ", b"event: message_delta\n", b"{", b'"usage":', b"\xff", b"\x1f\x8b", b"null"]
SCRAPS = st.sampled_from([*WHOLE, start(), PING, ERROR_EVENT, *JUNK])


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(SCRAPS, max_size=12), st.data())
def test_any_split_of_the_bytes_gives_the_same_usage(scraps: list[bytes], data: st.DataObject) -> None:
    body = b"".join(scraps)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
    meter = Meter(SSE)
    for begin, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        meter.feed(body[begin:end])
    assert meter.close() == read(body) == read(body, size=1)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.one_of(st.binary(max_size=300), st.lists(SCRAPS, max_size=8).map(b"".join)),
    st.sampled_from([SSE, "application/json", "", "text/html"]),
    st.sampled_from([None, "gzip", "br", "zstd", "deflate", "what"]),
)
def test_arbitrary_bytes_never_raise(body: bytes, content_type: str, encoding: str | None) -> None:
    usage = read(body, content_type, encoding)
    assert usage.complete <= (usage.started or usage.error_type is not None or usage.stop_reason is not None)
    for result in [*(meter := BatchMeter(encoding)).feed(body), *meter.close()]:
        assert isinstance(result.usage, Usage)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**14) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["type", "usage", "message", "model", "id", "input_tokens", "output_tokens", "iterations", "content", "delta"]),
        inner,
        max_size=5,
    ),
    max_leaves=12,
)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(JSON_VALUES, st.sampled_from(["message", "error", "message_start", "message_delta", "content_block_start"]))
def test_objects_of_any_shape_never_raise(value: object, kind: str) -> None:
    fields = value if isinstance(value, dict) else {"usage": value, "message": value, "content_block": value, "delta": value}
    body = json.dumps({**fields, "type": kind}).encode()
    read(body, "application/json")
    read(f"event: {kind}\ndata: ".encode() + body + b"\n\n")
