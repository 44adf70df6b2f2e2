"""Batches as values: each request judged and quoted like a call of its own, results priced by the table of the admission."""

import json
from dataclasses import replace

import pytest

from gateway_addon import pricing
from gateway_addon.calls.batches import REQUESTS_MAX, PricedResults, judge_batch, object_of
from gateway_addon.calls.quote import quote
from gateway_addon.messages import Meter
from gateway_addon.messages.request import Request, read
from gateway_addon.policy.loading import parse_app
from gateway_addon.pricing import cost, kept, restored
from gateway_addon.refusals import Refusal

PRICES = pricing.load(None, None)
NOON = 1_795_000_000.0
POLICY = """
models: {allow: [claude-haiku-4-5, claude-sonnet-5], aliases: {fast: claude-haiku-4-5}}
caps: {request: $0.10, day: $5}
endpoints: [batches]
features: {web_search: {max_uses: 3}, code_execution: true, files: true}
max_tokens: {limit: 4096, over: clamp}
"""
APP = parse_app("policies/apps/nightly.yaml", POLICY, PRICES, {}, workspace_geo="global")
PARAMS = {"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}


def request(body, *headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request("POST", "/v1/messages/batches", (("content-type", "application/json"), *headers), raw)


def batch(*params, ids="abcdefgh"):
    return {"requests": [{"custom_id": id, "params": PARAMS | more} for id, more in zip(ids, params, strict=False)]}


def asked(body, *headers, app=APP):
    return judge_batch(app, PRICES, request(body, *headers), NOON)


def quoted(params):
    app = parse_app("policies/apps/nightly.yaml", POLICY.replace("[batches]", "[messages]"), PRICES, {}, workspace_geo="global")
    reading = read("messages", Request("POST", "/v1/messages", (), json.dumps(params, ensure_ascii=False).encode()))
    return quote(reading, app, PRICES, NOON).total_nano


@pytest.mark.parametrize("more", [{}, {"model": "claude-sonnet-5", "max_tokens": 4000}, {"messages": [{"role": "user", "content": "\ufdfa" * 50}]}])
def test_a_request_in_a_batch_is_quoted_at_half_price(more):
    """A request in a batch is quoted at half of its quote alone."""
    assert abs(2 * asked(batch(more)).quote_nano - quoted(PARAMS | more)) <= 2  # each line is rounded up


def test_the_quote_of_a_batch_is_the_sum_of_its_requests():
    one, two = asked(batch({})), asked(batch({}, {}, {}))
    assert (two.requests, two.quote_nano, two.model) == (3, 3 * one.quote_nano, "claude-haiku-4-5")
    assert asked(batch({}, {"model": "claude-sonnet-5"})).model is None


def test_fast_mode_gets_no_discount_in_the_quote():
    opus = POLICY.replace("claude-sonnet-5", "claude-opus-5-5").replace("files: true", "files: true, fast: true").replace("$0.10", "$10")
    app = parse_app("policies/apps/nightly.yaml", opus, PRICES, {}, workspace_geo="global")
    plain, fast = (asked(batch({"model": "claude-opus-5-5", **more}), app=app).quote_nano for more in ({}, {"speed": "fast"}))
    assert fast >= 4 * plain


SHAPES = {
    "no requests": {"requests": []},
    "not a list": {"requests": {}},
    "not an object": [],
    "another key": batch({}) | {"priority": "high"},
    "entry is no object": {"requests": ["a"]},
    "no custom_id": {"requests": [{"params": PARAMS}]},
    "no params": {"requests": [{"custom_id": "a"}]},
    "another key in an entry": {"requests": [{"custom_id": "a", "params": PARAMS, "method": "POST"}]},
    "custom_id twice": batch({}, {}, ids="aa"),
    "custom_id empty": batch({}, ids=[""]),
    "custom_id a number": batch({}, ids=[1]),
    "custom_id too long": batch({}, ids=["x" * 65]),
    "custom_id with a line end": batch({}, ids=["x\n"]),
    "no model": batch({"model": None}),
    "max_tokens a text": batch({"max_tokens": "100"}),
    "streamed": batch({"stream": True}),
    "half a surrogate": batch({"messages": [{"role": "user", "content": "\ud800"}]}),
    "too deep": batch({"messages": [{"role": "user", "content": json.loads("[" * 80 + "]" * 80)}]}),
    "model twice": json.dumps(batch({})).replace('"max_tokens"', '"model": "claude-opus-5-5", "max_tokens"').encode(),
    "NaN": json.dumps(batch({"temperature": float("nan")})).encode(),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(batch({})).encode(),
}


@pytest.mark.parametrize("body", SHAPES.values(), ids=SHAPES)
def test_a_batch_without_a_single_reading_is_refused(body):
    refusal = asked(body)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "body", refusal.sentence


def test_a_batch_of_too_many_requests_is_refused():
    entry = {"custom_id": "a", "params": {}}
    refusal = asked({"requests": [entry] * (REQUESTS_MAX + 1)})
    assert (refusal.code, "100,001 requests" in refusal.sentence) == ("body", True)


RULES = {
    "model": ({"model": "claude-opus-5-5"}, "model"),
    "feature": ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}, "feature"),
    "unknown field": ({"turbo": 1}, "unknown_field"),
    "uses over the policy": ({"tools": [SEARCH | {"max_uses": 4}]}, "feature"),
    "a tool that nothing bounds in a batch": ({"tools": [{"type": "code_execution_20260521", "name": "code_execution"}]}, "feature"),
    "dearer than one request may be": ({"messages": [{"role": "user", "content": "x" * 300_000}]}, "quote_over_cap"),
}


@pytest.mark.parametrize(("more", "code"), RULES.values(), ids=RULES)
def test_one_refused_request_refuses_its_batch_by_name(more, code):
    """A request that would be refused alone refuses the batch, and the refusal names it."""
    refusal = asked(batch({}, {}, more, {}))
    assert refusal.code == code, refusal.sentence
    assert refusal.sentence.startswith("requests[2] (c): ")


def test_batch_headers_are_judged_with_each_request():
    """The headers of a batch are judged with each of its requests."""
    assert asked(batch({}), ("anthropic-user-profile-id", "x")).code == "feature"


def test_an_app_that_is_observed_is_told_of_and_let_pass():
    found = asked(batch({"turbo": 1}, {"model": "claude-opus-5-5"}), app=replace(APP, mode="observe"))
    assert found.flags == ("observed:unknown_field", "observed:model")


def test_what_the_policy_rewrites_is_judged_as_it_is_sent():
    found = asked(batch({"model": "fast", "max_tokens": 9_999}, {}))
    sent = json.loads(found.body)
    assert [(each["params"]["model"], each["params"]["max_tokens"]) for each in sent["requests"]] == [("claude-haiku-4-5", 4096), ("claude-haiku-4-5", 100)]
    assert found.flags == ("edited:model", "edited:max_tokens")
    again = asked(found.body)
    assert (again.quote_nano, again.body) == (found.quote_nano, None)


def test_every_file_that_a_batch_names_is_known():
    source = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}
    found = asked(batch({"messages": [{"role": "user", "content": [source]}]}), app=replace(APP, caps={}))
    assert found.files == {"file_1"}


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"id": "file_1"}', b'{"id": "msgbatch_../x"}', b'{"id": 5}', b"[" * 100_000])
def test_an_answer_that_shows_no_batch_is_none(body):
    assert object_of(body) is None


def test_the_results_address_becomes_one_behind_the_gateway():
    shown = object_of(json.dumps({"id": "msgbatch_1", "processing_status": "ended", "results_url": "https://api.anthropic.com/v1/x?y"}).encode())
    assert (shown.status, json.loads(shown.content)["results_url"]) == ("ended", "/v1/x")


# --- results

USAGE = {"input_tokens": 1000, "output_tokens": 101, "service_tier": "batch"}


def line(custom_id, kind="succeeded", usage=USAGE, model="claude-haiku-4-5-20251001"):
    message = {"id": "msg_1", "type": "message", "model": model, "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn", "usage": usage}
    result = {"type": kind, **({"message": message} if kind == "succeeded" else {})}
    return json.dumps({"custom_id": custom_id, "result": result}).encode() + b"\n"


def read_all(data, step=7, prices=PRICES):
    results = PricedResults(prices, NOON, hour_ttl=False)
    rows = [row for start in range(0, len(data), step) for row in results.feed(data[start : start + step])]
    return rows + results.close()


def test_results_cost_half_and_failed_ones_nothing():
    """Results are priced at half and what did not succeed is free."""
    rows = read_all(line("a") + line("b", "errored") + line("c", "canceled") + line("d", "expired"))
    assert [(row.custom_id, row.kind, row.nano) for row in rows] == [("a", "message", (1000 * 1000 + 101 * 5000) // 2), ("b", "errored", 0), ("c", "canceled", 0), ("d", "expired", 0)]


WHOLE = {"type": "message", "model": "claude-haiku-4-5-20251001", "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn"}
TURN = {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 55_096}


@pytest.mark.parametrize(
    ("message", "nano"),
    [
        (WHOLE | {"usage": USAGE}, 752_500),
        (WHOLE | {"usage": USAGE | {"input_tokens": 0, "output_tokens": 0}}, 0),
        (WHOLE | {"usage": USAGE | {"iterations": [{"type": "compaction", **TURN}, {"type": "message", **TURN}]}}, 2 * 2_772_300),
        (WHOLE | {"content": [], "stop_reason": "refusal", "usage": USAGE}, 0),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, 0),
        (WHOLE, None),
        (WHOLE | {"usage": {"input_tokens": 9}}, None),
    ],
    ids=["plain", "unbilled", "iterations", "refused", "an error", "no usage", "half a usage"],
)
def test_each_line_of_a_batchs_results_is_judged_as_a_message_is(message, nano):
    """By the meter's own rules for the same message as an answer of its own, at half its price."""
    rows = read_all(json.dumps({"custom_id": "a", "result": {"type": "succeeded", "message": message}}).encode() + b"\n")
    assert (sum(row.nano for row in rows) if rows else None) == nano
    meter = Meter("application/json")
    meter.feed(json.dumps(message).encode())
    alone = replace(meter.close(), service_tier="batch")
    assert cost(PRICES, alone, at=NOON, hour_ttl_requested=False).nano == nano


@pytest.mark.parametrize("bad", [b"{}\n", b"junk\n", line("a", model="claude-unknown-9"), line("a", usage={"input_tokens": -1}), line("a", "mystery"), line("a")[:-20]])
def test_what_cannot_be_read_or_priced_is_no_result(bad):
    assert [row.custom_id for row in read_all(bad + b"\n" + line("z"))] == ["z"]


def test_each_billed_part_of_a_result_is_a_row():
    iteration = {"input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    usage = USAGE | {"iterations": [{"type": "compaction", **iteration}, {"type": "message", **iteration}]}
    assert [(row.part, row.kind) for row in read_all(line("a", usage=usage))] == [(0, "compaction"), (1, "message")]


def test_a_price_table_that_was_kept_prices_as_it_did():
    again = restored(kept(PRICES))
    assert again == PRICES
    data = line("a") + line("b", model="claude-haiku-5-5", usage=USAGE | {"input_tokens": 100_001})
    assert read_all(data, prices=again) == read_all(data)
