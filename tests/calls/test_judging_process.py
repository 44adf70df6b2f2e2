"""No body holds up the calls beside it: what takes long is judged in another process, in bounded memory, with the same result."""

import asyncio
import hashlib
import json
import os
import signal
from contextlib import contextmanager
from unittest import mock

import httpx2
import pytest
from gateway import gateway
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import until

from gateway_addon import pricing
from gateway_addon.calls import judging_process, quote
from gateway_addon.calls.judging import Judgement, judge_request
from gateway_addon.calls.judging_process import HERE_BATCH_BYTES_MAX, HERE_BRACKETS_MAX, HERE_BYTES_MAX, JudgingProcess, is_large
from gateway_addon.messages import request, scan
from gateway_addon.messages.request import Request, value_count
from gateway_addon.policy.loading import parse_app
from gateway_addon.refusals import Refusal
from gateway_addon.simulator import Simulator

PRICES = pricing.load(None, None)
POLICY = """
models: {allow: [claude-haiku-4-5, claude-sonnet-5], aliases: {fast: claude-haiku-4-5}}
max_tokens: {limit: 4096, over: clamp}
caps: {request: $1, day: $100}
features: {web_search: {max_uses: 20}, tool_search: true, files: true, fallbacks: {}}
"""
APP = parse_app("policies/apps/app.yaml", POLICY, PRICES, {})
PLAIN = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hello"}]}
SEARCH = {"type": "web_search_20260209", "name": "web_search", "max_uses": 3, "allowed_callers": ["direct"]}


def judged(body, judge=judge_request):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return APP, PRICES, "messages", Request("POST", "/v1/messages", (), raw), frozenset(), 0.0


@pytest.fixture
async def process():
    made = JudgingProcess()
    yield made
    made.close()


@contextmanager
def turns():
    """The turns that the loop takes meanwhile."""
    taken = [0]

    async def turning():
        while True:
            await asyncio.sleep(0)
            taken[0] += 1

    task = asyncio.ensure_future(turning())
    try:
        yield taken
    finally:
        task.cancel()


async def test_the_loop_turns_while_one_call_holds_an_interpreter(process):
    """A sleep gives the interpreter away and would show nothing: a sum over a range is one call in C that does not."""
    await process.run(abs, 1)  # started
    held = asyncio.ensure_future(process.run(sum, range(10**9)))
    for _ in range(50_000):
        await asyncio.sleep(0)
    assert not held.done()  # in a thread of this process it would be: the loop would have stood still meanwhile
    held.cancel()


async def test_the_loop_turns_while_a_worst_body_is_judged(tmp_path):
    body = json.dumps(PLAIN | {"system": [{}] * 200_000}).encode()
    async with Simulator() as api, gateway(tmp_path, api) as gw, httpx2.AsyncClient(base_url=gw.url) as client:
        run, seen = gw.gateway._judging.run, []

        async def counted(*arguments):
            with turns() as taken:
                answer = await run(*arguments)
            seen.append(taken[0])
            return answer

        gw.gateway._judging.run = counted
        with mock.patch.object(request, "read", side_effect=AssertionError("read in the process of the connections")):
            answer = await client.post("/v1/messages", content=body, headers={"x-api-key": gw.tokens["app"]})
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
        assert "system[" in answer.text
        assert seen[0] > 100
        assert not (await api.settled()).rows


SMALL = [
    PLAIN,
    PLAIN | {"model": "fast", "max_tokens": 100_000, "stream": True, "thinking": {"type": "disabled"}},
    PLAIN | {"model": "fast", "max_tokens": 100_000},
    PLAIN | {"tools": [SEARCH], "inference_geo": "us"},
    PLAIN | {"tools": [{"type": "hologram"}]},
    PLAIN | {"model": "claude-opus-5-5"},
    PLAIN | {"model": 1},
    b'{"model": "a", "model": "b"}',
    b"[1, 2",
    b"\xff",
    b"[" * 5_000,
]


async def test_another_process_says_what_this_one_would(process):
    for body in SMALL:
        here = judge_request(*judged(body))
        there = await process.run(judge_request, *judged(body))
        assert there == here, body
        if isinstance(here, Judgement):
            assert getattr(there.verdict, "terms", None) == getattr(here.verdict, "terms", None), body


async def test_a_large_body_leaves_as_it_was_judged(tmp_path):
    """Edited in the other process, and unedited: the API receives the bytes that were judged."""
    policy = "models: {allow: [claude-haiku-4-5], aliases: {fast: claude-haiku-4-5}}\ncaps: {day: $100}\n"
    async with Simulator() as api, gateway(tmp_path, api, {"app": policy}) as gw:
        async with httpx2.AsyncClient(base_url=gw.url, headers={"x-api-key": gw.tokens["app"], "anthropic-version": "2023-06-01"}) as client:
            for model in ("claude-haiku-4-5", "fast"):
                body = json.dumps(PLAIN | {"model": model, "system": "é"}, indent=1).encode() + b" " * HERE_BYTES_MAX
                assert is_large("messages", body)
                answer = await client.post("/v1/messages", content=body)
                assert answer.status_code == 200, answer.text
                sent = body if model != "fast" else request.edited("messages", judged(body)[3], {"model": "claude-haiku-4-5"})[0].body
                assert (await api.settled()).messages()[-1].body_sha256 == hashlib.sha256(sent).hexdigest()


@pytest.mark.parametrize(
    ("endpoint", "body", "large"),
    [
        ("messages", b" " * HERE_BYTES_MAX, False),
        ("messages", b" " * (HERE_BYTES_MAX + 1), True),
        ("messages", b"{[ " * (HERE_BRACKETS_MAX // 2), False),
        ("messages", b"{[ " * (HERE_BRACKETS_MAX // 2) + b"[", True),
        ("messages", b"{" * (HERE_BRACKETS_MAX + 1), True),
        ("count_tokens", b"{[" * HERE_BRACKETS_MAX, True),
        ("batches.create", b" " * (HERE_BATCH_BYTES_MAX + 1), True),
        ("files.upload", b"[" * 10 * HERE_BYTES_MAX, False),  # nobody looks into it
    ],
)
def test_what_takes_long_is_told_by_size_and_brackets(endpoint, body, large):
    assert is_large(endpoint, body) is large


async def test_body_that_kills_its_process_is_refused_the_next_not(process):
    """A body that ends its process is refused, and the next body is not."""
    killed = await process.run(os.abort)
    assert isinstance(killed, Refusal)
    assert killed.code == "body"
    assert await process.run(abs, -1) == 1
    os.kill(process._child.pid, signal.SIGKILL)
    await asyncio.to_thread(process._child.wait)
    assert await process.run(abs, -2) == 2


async def test_a_body_that_wants_too_much_memory_is_refused(process):
    refusal = await process.run(bytearray, 2 * 2**30)
    assert isinstance(refusal, Refusal)
    assert "2,048 MB" in refusal.sentence
    assert await process.run(abs, -1) == 1


async def test_a_body_that_nobody_waits_for_ends_with_its_process(process):
    waiting = asyncio.ensure_future(process.run(sum, range(10**12)))
    await until(lambda: process._child is not None)
    child = process._child
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await asyncio.to_thread(child.wait) == -signal.SIGKILL
    assert await process.run(abs, -1) == 1


async def test_the_other_process_has_no_secret(process, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-ant-secret")
    assert await process.run(os.getenv, "SOME_KEY") is None


def test_a_call_in_flight_keeps_nothing_of_its_prompt():
    search = SEARCH | {"allowed_domains": ["d" * 9_000]}
    found = judge_request(*judged(PLAIN | {"system": "x" * 9_000, "tools": [search], "metadata": {"user_id": "u" * 9_000}}))
    assert isinstance(found, Judgement)
    assert len(repr(found)) < 10_000
    assert set(found.parsed.body) == {"model", "max_tokens", "metadata"}


OWN = [{"name": f"own{i}", "input_schema": {}, "description": "d" * 100 * i} for i in range(8)]
FINDER = {"type": "tool_search_tool_bm25", "name": "tool_search_tool_bm25"}
REFERRING = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "tool_reference", "tool_name": "own1"}]}]}]


@pytest.mark.parametrize("more", [{}, {"tools": [SEARCH]}, {"tools": [FINDER, *OWN]}, {"tools": OWN, "messages": REFERRING}, {"fallbacks": [{"model": "claude-haiku-4-5"}]}, {"cache_control": {"type": "ephemeral"}}])
def test_what_would_fit_is_the_same_without_the_prompt(more):
    arguments = judged(PLAIN | {"model": "claude-sonnet-5"} | more)
    whole, kept = quote.quote(request.read("messages", arguments[3]), APP, PRICES, 0.0), judge_request(*arguments).verdict
    for amount_nano in (10**6, 10**7, 10**8, 10**9):
        assert kept.output_within(amount_nano) == whole.output_within(amount_nano)
    assert kept.terms.parsed.found.definitions.keys() <= {f"own{i}" for i in (1, *range(3, 8))}


def parsed_values(raw: str) -> int:
    found = json.loads(raw)
    stack, count = [found], 0
    while stack:
        node = stack.pop()
        count += 1
        stack.extend(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
    return count


JSON = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('a\\",[{}]:\n')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('a\\",[')), inner),
)


@pytest.mark.parametrize("examples", [150, pytest.param(5_000, marks=pytest.mark.soak)])
def test_no_value_is_missed_before_parsing(examples):
    @given(JSON, st.integers(0, 12), st.booleans())
    @settings(max_examples=examples, derandomize=True, deadline=None)
    def never(value, limit, spaced):
        raw = json.dumps(value, indent=1 if spaced else None)
        with mock.patch.object(request, "VALUES_MAX", limit):
            too_many = value_count(raw.encode()) > limit
        assert too_many or parsed_values(raw) - 1 <= limit  # the outermost has no mark before it

    never()


def test_marks_inside_of_text_are_no_values():
    body = json.dumps(PLAIN | {"system": '[1,{"a":2}],' * 700_000}).encode()
    assert value_count(body) < 100
    assert isinstance(request.read("messages", Request("POST", "/v1/messages", (), body)), request.ParsedRequest)


@pytest.mark.parametrize("unit", ["[],", "1,", '"",', '{"":1},'])
def test_too_many_values_are_refused_before_they_are_made(unit):
    body = ("[" + unit * 4_000_001)[:-1].encode() + b"]"
    with mock.patch.object(request.json, "loads", side_effect=AssertionError("parsed")):
        refusal = request.read("messages", Request("POST", "/v1/messages", (), body))
    assert isinstance(refusal, Refusal)
    assert "the gateway reads 2,000,000" in refusal.sentence


NESTED = {"type": 1}
for _ in range(50):
    NESTED = {"type": NESTED, "ttl": NESTED, "file_id": NESTED} if len(json.dumps(NESTED)) < 100_000 else {"type": NESTED}


@pytest.mark.parametrize(
    "body",
    [
        PLAIN | {"system": [{}] * 5_000},
        PLAIN | {"system": [{"ttl": [1] * 50, "file_id": [1] * 50, "type": "x" * 99}] * 500},
        PLAIN | {"k" * 100_000: {"l" * 100_000: [{}] * 1_000}},
        PLAIN | {"system": NESTED},
    ],
    ids=["objects", "odd values", "long keys", "nested"],
)
def test_places_are_written_out_for_a_few_objects_only(body):
    found = scan.scan_request(body)
    assert len(found.unknown) <= scan.UNKNOWN_KEPT
    assert sum(map(len, (*found.unknown, *found.files))) < 30_000


@pytest.mark.parametrize(
    "body",
    [
        PLAIN | {"tools": [SEARCH] * 1_100},
        PLAIN | {"fallbacks": [{"model": "claude-haiku-4-5"}] * 110},
        PLAIN | {"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "f"}] * 1_100}]},
        PLAIN | {"system": [{"file_id": "f"}] * 20_001},
        PLAIN | {"model": "m" * 257},
    ],
    ids=["tools", "fallbacks", "blocks", "files", "model"],
)
def test_more_than_any_request_asks_for_is_refused(body):
    refusal = request.read("messages", judged(body)[3])
    assert isinstance(refusal, Refusal)
    assert refusal.code == "body"
    assert " at most " in refusal.sentence or " looks up " in refusal.sentence


async def test_process_under_ulimit_judges_with_the_memory_it_has(process, monkeypatch):
    """Under `ulimit -v` it ended at once, with a traceback, and every large body was refused as its own fault."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({700 * 2**20},) * 2); {judging_process._PROGRAM}"
    monkeypatch.setattr(judging_process, "_PROGRAM", limited)
    body = PLAIN | {"messages": [{"role": "user", "content": "x" * HERE_BYTES_MAX}]}
    assert isinstance(await process.run(judge_request, *judged(body)), Judgement)
