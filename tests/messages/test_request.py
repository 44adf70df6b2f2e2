"""Reading a request: exact doors, strict bodies, and the facts that rules and bounds are made of. (Hostile ones: bypass.py.)"""

import json
import time
import unicodedata
from typing import Any
from unittest import mock

import pytest
from bypass import ODD_BATCHES, ODD_FILES
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway_addon.messages import scan
from gateway_addon.messages.request import BODY_BYTES_MAX, ParsedRequest, Request, edited, endpoint_of, read
from gateway_addon.messages.schema import Effect
from gateway_addon.refusals import Refusal

PLAIN: dict[str, Any] = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hello"}]}


def request(body: Any, *headers: tuple[str, str]) -> Request:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request("POST", "/v1/messages?beta=true", headers, raw)


def reading(body: Any, *headers: tuple[str, str]) -> ParsedRequest:
    found = read("messages", request(body, *headers))
    assert isinstance(found, ParsedRequest), found
    return found


@pytest.mark.parametrize(
    ("method", "target", "name"),
    [
        ("POST", "/v1/messages", "messages"),
        ("POST", "/v1/messages?beta=true", "messages"),
        ("POST", "/v1/messages/count_tokens?beta=true", "count_tokens"),
        ("GET", "/v1/models", "models"),
        ("GET", "/v1/models?limit=1000&after_id=claude-opus-5", "models"),
        ("GET", "/v1/models/claude-haiku-4-5", "model"),
        ("GET", "/api/hello", "hello"),
        ("HEAD", "/api/hello", "hello"),
        ("GET", "/gateway/healthz", "healthz"),
        ("GET", "/gateway/readyz", "readyz"),
        ("HEAD", "/gateway/healthz", "healthz"),
        ("HEAD", "/gateway/readyz", "readyz"),
        ("GET", "/gateway/me", "me"),
    ],
)
def test_each_endpoint_has_one_spelling(method: str, target: str, name: str):
    assert endpoint_of(method, target) == name
    other = "POST" if method == "GET" else "GET" if method == "POST" else "PUT"
    assert isinstance(endpoint_of(other, target), Refusal)


@pytest.mark.parametrize(
    ("method", "target", "name", "item"),
    [
        ("GET", "/v1/messages/batches/msgbatch_01Ab", "batches.get", "msgbatch_01Ab"),
        ("DELETE", "/v1/messages/batches/msgbatch_01Ab", "batches.delete", "msgbatch_01Ab"),
        ("POST", "/v1/messages/batches/msgbatch_01Ab/cancel?beta=true", "batches.cancel", "msgbatch_01Ab"),
        ("GET", "/v1/messages/batches/msgbatch_01Ab/results", "batches.results", "msgbatch_01Ab"),
        ("GET", "/v1/files/file_01Ab", "files.get", "file_01Ab"),
        ("DELETE", "/v1/files/file_01Ab", "files.delete", "file_01Ab"),
        ("GET", "/v1/files/file_01Ab/content", "files.content", "file_01Ab"),
    ],
)
def test_what_has_an_id_in_its_path_is_read_with_it(method, target, name, item):
    assert endpoint_of(method, target) == name
    assert read(name, Request(method, target, (), b"")).item == item
    assert isinstance(endpoint_of("PUT", target), Refusal)


@pytest.mark.parametrize("target", [*ODD_BATCHES, *ODD_FILES])
def test_an_odd_spelling_of_an_id_is_no_endpoint(target):
    assert all(isinstance(endpoint_of(method, target), Refusal) for method in ("GET", "POST", "DELETE"))


@given(st.text(max_size=40))
@settings(max_examples=200, derandomize=True)
def test_any_other_target_is_refused_without_an_error(target: str):
    assert isinstance(endpoint_of("POST", target), Refusal)
    assert isinstance(endpoint_of(target, "/v1/messages"), Refusal)


def test_the_reading_says_what_is_asked_for():
    body = PLAIN | {"stream": True, "max_tokens": 4096}
    found = reading(body, ("anthropic-beta", "a-1, b-2"), ("anthropic-beta", "c-3"))
    assert (found.endpoint, found.model, found.max_tokens, found.stream) == ("messages", "claude-haiku-4-5", 4096, True)
    assert (found.body, found.size, found.betas) == (body, len(json.dumps(body)), ("a-1", "b-2", "c-3"))


def test_count_tokens_needs_no_max_tokens():
    body = {name: value for name, value in PLAIN.items() if name != "max_tokens"}
    found = read("count_tokens", Request("POST", "/v1/messages/count_tokens", (), json.dumps(body).encode()))
    assert isinstance(found, ParsedRequest)
    assert found.max_tokens == 0


def test_a_model_in_the_path_is_the_model():
    found = read("model", Request("GET", "/v1/models/claude-haiku-4-5", (), b""))
    assert isinstance(found, ParsedRequest)
    assert (found.endpoint, found.model) == ("model", "claude-haiku-4-5")


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("content-type", "application/json"),),
        (("content-type", "application/json; charset=utf-8"), ("content-encoding", "identity")),
        (("content-type", 'Application/JSON; charset="UTF-8"'),),
    ],
)
def test_plain_json_may_be_labelled_as_such(headers: tuple[tuple[str, str], ...]):
    assert isinstance(read("messages", request(PLAIN, *headers)), ParsedRequest)


def test_the_body_limit_is_the_api_s_own():
    assert isinstance(read("messages", request(json.dumps(PLAIN).encode().ljust(BODY_BYTES_MAX))), ParsedRequest)
    over = read("messages", request(json.dumps(PLAIN).encode().ljust(BODY_BYTES_MAX + 1)))
    assert isinstance(over, Refusal)
    assert over.code == "too_large"


@pytest.mark.parametrize(
    ("text", "bytes_min"),
    [
        ("hello", 5),
        ("\ufdfa" * 10, 330),  # one letter of 3 bytes becomes 18 letters of 33
        ("é" * 10, 20),
        ("😀" * 10, 40),
        ("①" * 10, 10),
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_text_is_bounded_by_its_nfkc_bytes_escaped_or_not(text: str, bytes_min: int, ascii_only: bool):
    raw = json.dumps(PLAIN | {"system": text}, ensure_ascii=ascii_only).encode()
    found = reading(raw)
    assert found.text_bytes >= max(len(raw), bytes_min + len(json.dumps(PLAIN)))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.booleans())
@settings(max_examples=200, derandomize=True, deadline=None)
def test_no_text_has_more_bytes_than_the_bound(text: str, ascii_only: bool):
    found = reading(json.dumps(PLAIN | {"system": text}, ensure_ascii=ascii_only).encode())
    assert found.text_bytes >= max(len(text.encode()), len(unicodedata.normalize("NFKC", text).encode()))


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 9_000}}


@pytest.mark.parametrize(
    ("block", "bytes_of_text_max", "images", "pdfs"),
    [
        (IMAGE, 300, 1, 0),
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "A" * 9_000}}, 300, 0, 1),
        ({"type": "document", "source": {"type": "content", "content": [IMAGE]}}, 300, 1, 0),
        ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A" * 9_000}}, 10_000, 0, 0),
        ({"type": "text", "text": "A" * 9_000}, 10_000, 0, 0),
    ],
)
def test_base64_of_images_and_pdfs_is_no_text_all_else_is(block: Any, bytes_of_text_max: int, images: int, pdfs: int):
    found = reading(PLAIN | {"messages": [{"role": "user", "content": [block]}]})
    assert bytes_of_text_max - 1_000 < found.text_bytes < bytes_of_text_max
    assert (found.found.images, found.found.pdfs) == (images, pdfs)


def test_base64_that_is_none_counts_as_text():
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "\ufdfa" * 100}}
    assert reading(PLAIN | {"messages": [{"role": "user", "content": [image]}]}).text_bytes > 3_300


@pytest.mark.parametrize(
    ("cache_control", "expected"),
    [(None, (False, False)), ({"type": "ephemeral"}, (True, False)), ({"type": "ephemeral", "ttl": "5m"}, (True, False))]
    + [({"type": "ephemeral", "ttl": ttl}, (True, True)) for ttl in ("1h", "24h")]
    + [({"ttl": "1h"}, (True, True))],
)
def test_a_cache_write_is_found_anywhere(cache_control: Any, expected: tuple[bool, bool]):
    """A lifetime that is not known counts as the dearest."""
    block = {"type": "text", "text": "hello", "cache_control": cache_control}
    inside = {"type": "tool_result", "tool_use_id": "x", "content": [block]}
    for body in (PLAIN | {"cache_control": cache_control}, PLAIN | {"messages": [{"role": "user", "content": [inside]}]}):
        found = reading(body)
        assert (found.cache_control, found.hour_ttl) == expected


def test_objects_are_counted_and_uses_named_with_their_place():
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 2}
    advisor = {"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-5-5", "max_uses": 1}
    content = [{"type": "text", "text": "x"}, {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}]
    found = reading(PLAIN | {"messages": [{"role": "user", "content": content}], "tools": [search, advisor], "speed": "fast"}).found
    assert (found.messages, found.blocks, found.images, found.typed_tools) == (1, 5, 1, 2)
    named = {(use.feature, use.where, use.effect) for use in found.uses}
    assert named == {
        ("fast", "speed", Effect.NONE),
        ("web_search", "tools[0]", Effect.SERVER_TOOL),
        ("advisor", "tools[1]", Effect.TYPED_TOOL),
        ("files", "messages[0].content[1].source", Effect.OUTSIDE),
    }
    assert found.models == [("tools[1].model", "claude-opus-5-5")]


def tool_use(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "t", "input": {}} | fields]}]}


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": [{"name": "t", "input_schema": {"type": "object", "properties": {"type": {"type": ["string", "null"]}}}}]},
        {"tools": [{"type": "custom", "name": "t", "input_schema": {"x-own": {"type": "web_search_20250305"}}}]},
        tool_use(input={"type": "url", "ttl": "1h"}),
        tool_use(caller={"type": "code_execution_20250825", "tool_id": "x"}),
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object", "fallbacks": "default"}}}},
        {"tools": [{"type": "browser_toolset_20260801", "configs": {"type": {"enabled": False}, "key": {"enabled": True}}}]},
        {"service_tier": "standard_only", "inference_geo": "global", "speed": "standard", "fallbacks": [], "container": None},
    ],
)
def test_plain_text_and_defaults_use_no_feature(harmless: dict[str, Any]):
    found = reading(PLAIN | harmless)
    assert (found.found.uses, found.found.unknown, found.hour_ttl) == ([], [], False)


def test_an_edited_request_is_read_again_from_its_new_bytes():
    old = request(PLAIN | {"system": "é", "temperature": 0.5}, ("anthropic-beta", "a-1"))
    new, found = edited("messages", old, {"model": "claude-sonnet-5", "max_tokens": 8})
    assert isinstance(found, ParsedRequest)
    assert json.loads(new.body) == PLAIN | {"system": "é", "temperature": 0.5, "model": "claude-sonnet-5", "max_tokens": 8}
    assert (found.model, found.max_tokens, found.size, found.betas) == ("claude-sonnet-5", 8, len(new.body), ("a-1",))
    assert (new.target, new.headers) == (old.target, old.headers)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "model", "ttl", "x"]), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["model", "max_tokens", "messages", "tools", "fallbacks", "system", "stream", "X"]), VALUES))
@settings(max_examples=100, derandomize=True, deadline=None)  # test_two_readings looks for disagreements in bytes, many more
def test_no_body_raises_and_another_parser_reads_the_same(changes: dict[str, Any]):
    raw = json.dumps(PLAIN | changes).encode()
    found = read("messages", request(raw))
    if isinstance(found, ParsedRequest):
        seen = json.loads(raw)
        assert (found.model, found.max_tokens, found.stream) == (seen["model"], seen["max_tokens"], seen.get("stream", False))


@given(st.binary(max_size=60), st.integers(0, 100))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_inserted_bytes_are_refused_or_read_as_json_reads_them(inserted: bytes, at: int):
    plain = json.dumps(PLAIN).encode()
    raw = plain[: at % len(plain)] + inserted + plain[at % len(plain) :]
    found = read("messages", request(raw))
    if isinstance(found, ParsedRequest):
        assert json.loads(raw.decode()) == found.body


def test_a_large_body_is_read_in_milliseconds():
    block = {"type": "text", "text": "word " * 200}
    tool = {"name": "t", "description": "d" * 300, "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    raw = json.dumps(PLAIN | {"messages": [{"role": "user", "content": [block]}] * 85, "tools": [tool] * 30}).encode()
    assert len(raw) > 100_000
    took = []
    for _ in range(5):
        began = time.thread_time()
        reading(raw)
        took.append(time.thread_time() - began)
    assert min(took) < 0.02  # about 1 ms on an idle machine


def test_a_file_is_seen_anywhere_but_in_the_echo_of_an_answer():
    blocks = [
        {"type": "document", "source": {"type": "file", "file_id": "file_1"}},
        {"type": "container_upload", "file_id": "file_2"},
        {"type": "hologram", "file_id": "file_3"},
        {"type": "text", "text": "x", "file_id": "file_4"},
        {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image", "source": {"type": "file", "file_id": "file_5"}}]},
        {"type": "code_execution_result", "content": [{"type": "code_execution_output", "file_id": "file_6"}], "return_code": 0},
        {"type": "tool_use", "id": "x", "name": "x", "input": {"file_id": "file_7"}},
    ]
    found = reading(PLAIN | {"messages": [{"role": "user", "content": blocks}]}).found
    assert sorted(found.files) == ["file_1", "file_2", "file_3", "file_4", "file_5"]


TEXTS = st.one_of(st.text(max_size=3), st.none(), st.just([]))
TEXT_LIKE = st.one_of(
    st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}, optional={"file_id": TEXTS, "odd": TEXTS}),
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "tool_use", 1]), "text": TEXTS}, optional={"ttl": TEXTS}),
    st.just({"type": "text", "cache_control": {"type": "ephemeral", "ttl": "1h"}}),
)
FIELDS = st.sampled_from(["messages", "content", "system", "tools", "file_id", "odd"])
BODIES = st.dictionaries(FIELDS, st.lists(st.recursive(TEXT_LIKE, lambda inner: st.dictionaries(FIELDS, st.lists(inner, max_size=3), max_size=3)), max_size=3), max_size=3)


@settings(deadline=None)
@example({"messages": [{"role": "user", "content": [{"type": "image", "file_id": "f"}]}]})
@given(BODIES)
def test_blocks_that_the_scan_skips_would_have_changed_nothing(body):
    """Messages and blocks of mere text are skipped."""
    with mock.patch.object(scan, "_passed_over", return_value=False):
        walked = scan.scan_request(body)
    assert scan.scan_request(body) == walked
