"""The worst case of a request, worked by hand, and proved never to be below what the answer costs."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quotes import NOW, PRICES, app, content, quoted, reading

from gateway_addon import pricing
from gateway_addon.calls.quote import Quote, input_bound, quote
from gateway_addon.messages import TokenCounts, Usage, UsagePart
from gateway_addon.refusals import Refusal

BASE64 = {"type": "base64", "media_type": "x", "data": "A" * 4_000}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}


@pytest.mark.parametrize(
    ("model", "body", "tokens"),
    [
        # bytes without base64 + 1,000 + 64 a message + 16 a typed object + images + typed tools
        ("claude-haiku-4-5", {}, lambda size: size + 1_000 + 64),
        ("claude-haiku-4-5", {"messages": [{"role": "user", "content": "a"}] * 3}, lambda size: size + 1_000 + 3 * 64),
        ("claude-haiku-4-5", content({"type": "text", "text": "a"}), lambda size: size + 1_000 + 64 + 16),
        ("claude-haiku-4-5", content({"type": "image", "source": BASE64}), lambda size: size - 4_000 + 1_000 + 64 + 2 * 16 + 1_568),
        ("claude-opus-5-5", content({"type": "image", "source": BASE64}), lambda size: size - 4_000 + 1_000 + 64 + 2 * 16 + 4_784),
        ("claude-haiku-4-5", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, lambda size: size + 1_000 + 64 + 16 + 8_000),
        ("claude-haiku-4-5", {"tools": [{"name": "own", "input_schema": {"type": "object"}}]}, lambda size: size + 1_000 + 64),
        # a pdf, a url, a file, a container, a thread: the context window
        ("claude-haiku-4-5", content({"type": "document", "source": BASE64}), lambda size: 200_000),
        ("claude-opus-5-5", content({"type": "document", "source": {"type": "url", "url": "https://x"}}), lambda size: 1_000_000),
        ("claude-haiku-4-5", content({"type": "image", "source": {"type": "file", "file_id": "f"}}), lambda size: 200_000),
        ("claude-haiku-4-5", {"container": "c"}, lambda size: 200_000),
        ("claude-haiku-4-5", {"thread": {"type": "continue", "previous_message_id": "m"}}, lambda size: 200_000),
        ("claude-haiku-4-5", content({"type": "web_search_tool_result", "tool_use_id": "t", "content": []}), lambda size: 200_000),
        ("claude-haiku-4-5", content({"type": "text", "text": "a" * 300_000}, {"type": "container_upload", "file_id": "f"}),
         lambda size: size + 1_000 + 64 + 2 * 16),
    ],
)  # fmt: skip
def test_the_input_bound_is_the_sum_of_its_parts(model: str, body: dict[str, Any], tokens: Any):
    found = reading(model=model, **body)
    row = PRICES.row(model, NOW)
    assert row is not None
    assert input_bound(found, row) == tokens(found.size)
    assert quoted(found).input_tokens == tokens(found.size)


HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
FIVE = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("model", "body", "geo", "input_rate", "output_rate"),
    [
        # nano-dollars a token: dollars a million tokens x 1,000
        ("claude-haiku-4-5", {}, "global", 1_000, 5_000),
        ("claude-haiku-4-5", FIVE, "global", 1_250, 5_000),
        ("claude-haiku-4-5", HOUR, "global", 2_000, 5_000),
        ("claude-opus-5-5", {}, "global", 4_000, 20_000),
        ("claude-opus-5-5", {}, "us", 4_400, 22_000),  # 1.1 times
        ("claude-opus-5-5", {}, "unknown", 4_400, 22_000),  # the workspace's default may be us
        ("claude-opus-5-5", {"inference_geo": "global"}, "unknown", 4_000, 20_000),
        ("claude-opus-5-5", {"inference_geo": "us"}, "global", 4_400, 22_000),
        ("claude-haiku-4-5", {}, "unknown", 1_000, 5_000),  # takes no inference_geo
        ("claude-opus-5-5", {"speed": "fast"}, "global", 8_000, 40_000),  # twice
        ("claude-opus-5-5", {"speed": "fast", "inference_geo": "us", **HOUR}, "global", 17_600, 44_000),  # 8 x 2 x 1.1
        ("claude-haiku-5-5", {}, "global", 100, 500),
        ("claude-haiku-5-5", {"system": "a" * 99_000}, "global", 500, 2_500),  # with the margins above 100,000: the long tier
    ],
)
def test_the_rate_is_the_dearest_that_the_request_can_reach(
    model: str, body: dict[str, Any], geo: str, input_rate: int, output_rate: int
):
    bound = quoted(reading(model=model, **body), geo)
    assert (bound.input_rate, bound.output_rate) == (input_rate, output_rate)
    assert bound.total_nano == bound.input_tokens * input_rate + 1_000 * output_rate
    assert (bound.extra_nano, bound.releasable) == (0, True)


def test_quote_grows_by_the_token_and_tells_what_fits_a_cap():
    """A stream is held by the token, and a cap knows which max_tokens would fit."""
    bound = quoted(reading(max_tokens=100))
    assert bound.for_output(40) == bound.for_output(0) + 40 * 5_000
    assert bound.output_within(bound.for_output(40)) == 40
    assert bound.output_within(bound.for_output(41) - 1) == 40
    assert bound.output_within(0) == 0


def test_each_turn_writes_max_tokens_and_reads_earlier_turns():
    """Each turn writes max tokens and reads the turns before it."""
    found = reading(tools=[SEARCH | {"max_uses": 3}])
    row = PRICES.row("claude-haiku-4-5", NOW)
    assert row is not None
    bound = quoted(found)
    assert bound.output_tokens == 4 * 1_000  # at first, and after each search
    assert bound.input_tokens == 4 * input_bound(found, row) + (1 + 2 + 3) * (1_000 + 10_000)  # what was written, results of 10k
    assert bound.for_output(0) == (4 * input_bound(found, row) + (1 + 2 + 3) * 10_000) * 1_250 + 3 * 10_000_000
    assert bound.total_nano == bound.input_tokens * 1_250 + 4_000 * 5_000 + 3 * 10_000_000  # cached between turns; $10 per 1,000 searches
    assert not bound.releasable


DIRECT = {"allowed_callers": ["direct"]}


@pytest.mark.parametrize(
    ("tools", "turns"),
    [
        ([SEARCH | {"max_uses": 3}], 4),
        ([SEARCH | {"max_uses": 0}], 1),
        ([SEARCH | {"max_uses": 2}, {"type": "web_fetch_20250910", "name": "web_fetch", "max_uses": 1}], 4),
        ([SEARCH | {"max_uses": 99}], 11),
        ([SEARCH | {"max_uses": 3, "type": "web_search_20260209"}], 11),
        ([SEARCH | {"max_uses": 3, "type": "web_search_20260318"}], 11),
        ([SEARCH | {"max_uses": 3, "type": "web_search_20270101"}], 11),
        ([SEARCH | {"max_uses": 3, "type": "web_search_20260209"} | DIRECT], 4),
        ([SEARCH | {"max_uses": 3, "allowed_callers": ["direct", "code_execution_20260120"]}], 11),
        ([SEARCH | {"max_uses": 3, "allowed_callers": None}], 4),
        ([SEARCH | {"max_uses": 3}, {"type": "code_execution_20250825", "name": "code_execution"}], 11),
        ([SEARCH | {"max_uses": 3}, {"type": "tool_search_tool_bm25", "name": "tool_search_tool_bm25"}], 11),
        ([{"type": "mcp_toolset", "mcp_server_name": "m"}], 11),
    ],
)
def test_max_uses_bounds_turns_only_where_no_code_runs(tools: list[dict[str, Any]], turns: int):
    """Else the loop's own maximum does: the provider reads the prompt again ten times before it pauses the turn."""
    assert quoted(reading(tools=tools)).output_tokens == turns * 1_000


def test_uses_beyond_the_turns_bring_their_results_at_once():
    """Twelve searches in ten gaps: the worst is three of them in the first."""
    found = reading(model="claude-opus-5-5", tools=[SEARCH | {"max_uses": 12}])
    row = PRICES.row("claude-opus-5-5", NOW)
    assert row is not None
    assert quoted(found).input_tokens == 11 * input_bound(found, row) + 55 * 1_000 + sum(range(3, 13)) * 10_000


@pytest.mark.parametrize(
    ("tools", "windows"),
    [
        ([{"type": "web_fetch_20250910", "name": "web_fetch", "max_uses": 2}], 2),
        ([{"type": "code_execution_20250825", "name": "code_execution"}], 10),
        ([SEARCH | {"max_uses": 5}, {"type": "code_execution_20250825", "name": "code_execution"}], 10),
    ],
)
def test_tool_without_declared_size_fills_the_window_each_use(tools: list[dict[str, Any]], windows: int):
    """A tool without a declared size fills the window each time."""
    found = reading(tools=tools)
    row = PRICES.row("claude-haiku-4-5", NOW)
    assert row is not None
    assert quoted(found).input_tokens == input_bound(found, row) + windows * 200_000


def test_a_tool_search_brings_the_five_largest_definitions():
    """What it finds is in the body, but is expanded where the search refers to it."""
    own = [{"name": f"t{i}", "input_schema": {}, "description": "d" * 10 * i} for i in range(8)]
    found = reading(tools=[{"type": "tool_search_tool_bm25", "name": "tool_search_tool_bm25"}, *own])
    row = PRICES.row("claude-haiku-4-5", NOW)
    assert row is not None
    brought = sum(len(json.dumps(tool)) + 16 for tool in own[3:])
    assert quoted(found).input_tokens == 11 * input_bound(found, row) + 55 * (1_000 + brought)


REFERENCE = {"type": "tool_reference", "tool_name": "own"}


@pytest.mark.parametrize(
    ("more", "expanded"),
    [
        ({"tools": [{"name": "own", "input_schema": {}, "description": "d" * 500}]}, [500 + 54]),
        ({"tools": [{"name": "own", "input_schema": {}, "description": "\ufdfa" * 10}]}, [330 + 54]),  # after NFKC
        ({"tools": [{"type": "bash_20250124", "name": "own"}]}, [40 + 8_000]),  # its description is in no body
        ({"tools": [{"name": "other", "input_schema": {}}, {"name": "own", "input_schema": {}}]}, [35]),
    ],
)
def test_a_tool_is_counted_as_often_as_it_is_referred_to(more: dict[str, Any], expanded: list[int]):
    """The API expands the whole definition where a reference stands, and nothing says that repeated ones merge."""
    row = PRICES.row("claude-haiku-4-5", NOW)
    assert row is not None
    once, thrice = (reading(**content(*[REFERENCE] * times), **more) for times in (1, 3))
    bytes_more = 2 * (len(json.dumps(REFERENCE, separators=(",", ":"))) + 1)
    assert input_bound(thrice, row) - input_bound(once, row) == bytes_more + 2 * 16 + 2 * sum(expanded)


def test_a_reference_to_a_tool_that_no_body_shows_is_the_window():
    assert quoted(reading(**content(REFERENCE))).input_tokens == 200_000


def test_many_references_to_a_large_tool_are_counted_in_no_time():
    """A definition is measured once, however often it is referred to."""
    large = {"name": "own", "input_schema": {}, "description": "d" * 1_000_000}
    found = reading(tools=[large], **content(*[REFERENCE] * 20_000))
    assert found.text_bytes > 20_000 * 1_000_000


@pytest.mark.parametrize(
    ("tool", "refused"),
    [
        (SEARCH | {"max_uses": 3}, None),
        (SEARCH | {"max_uses": 3, "type": "web_search_20260209"} | DIRECT, None),
        (SEARCH, "give it a max_uses, or"),
        (SEARCH | {"max_uses": 3, "type": "web_search_20260209"}, 'give it a max_uses and allowed_callers: ["direct"], or'),
    ],
)
def test_a_batch_refuses_a_tool_whose_turns_nothing_bounds(tool: dict[str, Any], refused: str | None):
    """Nobody says how often the loop of a batch reads the prompt again."""
    bound = quote(reading(tools=[tool]), app(), PRICES, NOW, batch=True)
    if refused is None:
        assert isinstance(bound, Quote)
        assert bound.output_tokens == 4 * 1_000
    else:
        assert isinstance(bound, Refusal)
        assert refused in bound.sentence


@pytest.mark.parametrize("max_uses", [10**4, 10**9])
def test_an_absurd_number_of_uses_costs_a_batch_no_time(max_uses: int):
    bound = quote(reading(tools=[SEARCH | {"max_uses": max_uses}]), app(), PRICES, NOW, batch=True)
    assert isinstance(bound, Quote)
    assert bound.turns.count == max_uses + 1
    assert bound.input_tokens <= (max_uses + 1) * 200_000


@pytest.mark.parametrize("more", [{}, {"tools": [SEARCH | {"max_uses": 3}]}, {"fallbacks": [{"model": "claude-sonnet-5"}]}])
def test_the_largest_max_tokens_that_fits_is_just_that(more: dict[str, Any]):
    """Also where later turns read what earlier ones wrote, and where a fallback writes as much again."""
    found = reading(**more)
    for amount_nano in (quoted(replace(found, max_tokens=500)).total_nano, 200_000_000, 999_999_999):
        fits = quoted(found).output_within(amount_nano)
        assert quoted(replace(found, max_tokens=fits)).total_nano <= amount_nano < quoted(replace(found, max_tokens=fits + 1)).total_nano


def test_an_advisor_is_quoted_as_calls_of_its_own():
    advisor = {"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-5-5", "max_uses": 2, "max_tokens": 500}
    # 2 x (1,000,000 x 5 $/M as a cache write + 500 x 20 $/M)
    found = reading(tools=[advisor])
    assert quoted(found).extra_nano == 2 * (1_000_000 * 5_000 + 500 * 20_000)
    row = PRICES.row("claude-haiku-4-5", NOW)
    assert row is not None
    # the executor reads its prompt again after each advice, and the advice; recorded: 1,128 + 1,262 tokens
    assert quoted(found).input_tokens == 3 * input_bound(found, row) + (1 + 2) * (1_000 + 500)
    assert quoted(found).output_tokens == 3 * 1_000
    unlimited = quoted(reading(tools=[advisor | {"max_tokens": None}]))
    assert unlimited.extra_nano == 2 * (1_000_000 * 5_000 + 128_000 * 20_000)


def test_each_fallback_is_an_attempt_of_its_own():
    chain = [{"model": "claude-sonnet-5", "max_tokens": 10}, {"model": "claude-opus-5-5", "speed": "fast"}]
    found = reading(model="claude-fable-5-2", fallbacks=chain)
    bound = quoted(found)
    tokens = bound.input_tokens
    assert bound.extra_nano == tokens * 2_500 + 10 * 10_000 + tokens * 10_000 + 1_000 * 40_000
    assert bound.price_rows == ("claude-fable-5-2@2026-11-09", "claude-sonnet-5@2026-06-30", bound.price_rows[2])
    assert bound.price_rows[2].startswith("claude-opus-5-5")
    default = quoted(reading(model="claude-fable-5-2", fallbacks="default"))
    assert [part.name for part in default.parts[2:]] == ["fallback to claude-haiku-4-5: input", "fallback to claude-haiku-4-5: output"]


def test_a_fallback_searches_compacts_and_is_advised_on_its_own():
    advisor = {"type": "advisor_20260301", "name": "advisor", "model": "claude-haiku-4-5", "max_uses": 1, "max_tokens": 500}
    tools = [SEARCH | {"max_uses": 2}, advisor]
    alone = reading(model="claude-sonnet-5", tools=tools, context_management={"edits": [{"type": "compact_20260112"}]})
    chain = reading(**{**alone.body, "model": "claude-fable-5-2", "fallbacks": [{"model": "claude-sonnet-5"}] * 2})
    fallback, chained = quoted(alone), quoted(chain)
    names = [part.name for part in chained.parts]
    assert sum(name.startswith("web searches") for name in names) == 3
    for kind, times in (("each", 3), ("output", 9)):
        assert sum(part.kind == kind for part in chained.parts) == times, names
    own = quoted(reading(**{**alone.body, "model": "claude-fable-5-2"}))
    row = PRICES.row("claude-sonnet-5", NOW)
    assert row is not None
    longer = len(json.dumps(chain.body, separators=(",", ":"))) - len(json.dumps(alone.body, separators=(",", ":")))
    assert 0 <= chained.total_nano - own.total_nano - 2 * fallback.total_nano <= 3 * 4 * (longer + 100) * 10_000


@pytest.mark.parametrize(("more", "times"), [({}, 1), ({"tools": [SEARCH | {"max_uses": 3}]}, 4)])
def test_each_turn_may_begin_with_a_compaction(more: dict[str, Any], times: int):
    bound = quoted(reading(context_management={"edits": [{"type": "compact_20260112"}]}, **more))
    assert sum(part.nano for part in bound.parts if part.name.startswith("compaction")) == times * (200_000 * 1_250 + 64_000 * 5_000)


def test_a_compaction_is_billed_beside_the_answer():
    bound = quoted(reading(context_management={"edits": [{"type": "compact_20260112"}]}))
    assert bound.extra_nano == 200_000 * 1_250 + 64_000 * 5_000


@pytest.mark.parametrize("body", [{"model": "claude-nope"}, {"fallbacks": [{"model": "claude-nope"}]}, {"speed": "fast"}])
def test_what_has_no_price_is_refused(body: dict[str, Any]):
    refusal = quote(reading(**body), app(), PRICES, NOW)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "model_unpriced"


def test_observed_app_is_quoted_for_features_not_in_its_policy():
    """An app in observe mode is quoted even for features that its policy does not name."""
    nothing = "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\nmode: observe\n"
    bound = quoted(reading(tools=[SEARCH], fallbacks="default", container="c"), text=nothing)
    assert (bound.input_tokens, bound.extra_nano) == (11 * 200_000, 10 * 10_000_000)


def test_passed_unknown_field_keeps_the_whole_reservation():
    """An unknown field that is passed keeps the whole reservation."""
    assert not quoted(reading(surprise=1)).releasable


def test_the_parts_add_up_to_the_quote():
    bound = quoted(reading(tools=[SEARCH | {"max_uses": 3}], fallbacks=[{"model": "claude-sonnet-5"}], system="x"))
    assert sum(part.nano for part in bound.parts) == bound.total_nano
    assert all(part.rate.startswith(("input $", "output $", "5m cache write $", "$0.01 each")) for part in bound.parts)


# quote >= cost

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SETTINGS = st.fixed_dictionaries(
    {"model": st.sampled_from(["claude-haiku-4-5", "claude-haiku-5-5", "claude-opus-5-5", "claude-sonnet-4-5", "claude-fable-5-2"])},
    optional={
        "system": WORDS,
        "cache_control": st.sampled_from([FIVE["cache_control"], HOUR["cache_control"]]),
        "inference_geo": st.sampled_from(["us", "global"]),
        "max_tokens": st.integers(0, 200_000),
    },
)


@given(SETTINGS, WORDS, st.tuples(*[st.integers(0, 6)] * 4), st.integers(0, 100), st.sampled_from(["us", "global", None]), st.booleans())
@settings(max_examples=300, derandomize=True, deadline=None)
def test_no_answer_to_a_plain_request_costs_more_than_its_quote(
    body: dict[str, Any], text: str, shares: tuple[int, ...], output_percent: int, geo: str | None, fills: bool
):
    """Whatever the provider does with a prompt of at most the bound's tokens: reads, writes for 5m or 1h, in any mixture."""
    found = reading(**body, **content({"type": "text", "text": text}))
    bound = quoted(found, "unknown")
    row = PRICES.row(found.model, NOW)
    assert row is not None
    prompt = input_bound(found, row) if fills else found.size
    unit = Fraction(prompt, max(1, sum(shares)))
    plain, cached, five, hour = (math.floor(unit * share) for share in shares)
    if not found.hour_ttl:
        five, hour = five + hour, 0
    if not found.cache_control:
        plain, five = plain + five, 0
    tokens = TokenCounts(plain, found.max_tokens * output_percent // 100, cached, five, hour)
    served_in = found.body.get("inference_geo") or (geo if row.geo else None)
    usage = Usage(model=found.model, tokens=tokens, inference_geo=served_in, readable=True, complete=True, started=True)
    cost = pricing.cost(PRICES, usage, at=NOW, hour_ttl_requested=found.hour_ttl)
    assert cost.nano is not None
    assert cost.nano <= bound.total_nano


@given(st.integers(0, 5), st.integers(0, 30_000), st.lists(st.tuples(st.integers(0, 1_000), st.integers(0, 10_000)), max_size=5))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_no_answer_with_searches_costs_more_than_its_quote(max_uses: int, prompt: int, turns: list[tuple[int, int]]):
    """One turn for each search and one more, each reading all before it; a result is as large as the operator said, or less."""
    found = reading(system="a" * prompt, tools=[SEARCH | {"max_uses": max_uses}])
    bound = quoted(found)
    tokens, read = [], found.size
    for output, result in [*turns[:max_uses], (1_000, 0)]:
        tokens.append(TokenCounts(0, output, cache_write_5m_tokens=read))
        read += output + result
    parts = tuple(UsagePart("message", found.model, each) for each in tokens)
    searches = len(turns[:max_uses])
    usage = Usage(model=found.model, iterations=parts, web_search_requests=searches, readable=True, complete=True, started=True)
    cost = pricing.cost(PRICES, usage, at=NOW, hour_ttl_requested=False)
    assert cost.nano is not None
    assert cost.nano <= bound.total_nano
    written = sum(output for output, _ in turns[:max_uses]) + 1_000
    assert cost.nano <= bound.for_output(written), "a grant of no more than was written covers it as well"
