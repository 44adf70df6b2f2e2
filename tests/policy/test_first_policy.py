"""The policy that `gateway init --yes` writes: the calls that clients make by default go through, and an edit is said."""

import json

import pytest
from gateway import FIRST, gateway

from gateway_addon import pricing
from gateway_addon.calls.quote import Quote, quote
from gateway_addon.calls.reservation_options import rewritten
from gateway_addon.messages.request import ParsedRequest, Request, read
from gateway_addon.policy import judge
from gateway_addon.policy.loading import parse_app
from gateway_addon.simulator import Behaviour, Simulator

PRICES = pricing.load()
HELLO = [{"role": "user", "content": "Say hello."}]
NOW = 1_795_000_000.0  # 2026-11


def app(text=FIRST):
    return parse_app("policies/apps/app.yaml", text, PRICES, {})


def reading(**fields):
    body = {"model": "claude-sonnet-5", "max_tokens": 64_000, "messages": HELLO} | fields
    found = read("messages", Request("POST", "/v1/messages", (), json.dumps(body).encode()))
    assert isinstance(found, ParsedRequest)
    return found


@pytest.mark.parametrize("model", ["claude-haiku-4-5", "claude-sonnet-5"])
def test_a_clamped_call_fits_the_first_request_cap(model):
    """On each model that the policy allows, with 200 KB of prompt and a cache mark, at the geo's dearer price."""
    text = [{"type": "text", "text": "word " * 40_000, "cache_control": {"type": "ephemeral"}}]
    policy, asked = app(), reading(model=model, messages=[{"role": "user", "content": text}], max_tokens=32_000)
    assert sorted(policy.models.allow) == ["claude-haiku-4-5", "claude-sonnet-5"]
    bound = quote(asked, policy, PRICES, NOW)
    assert isinstance(bound, Quote)
    assert bound.total_nano <= policy.caps["request"]


@pytest.mark.parametrize(
    ("fields", "policy", "overrun", "changes"),
    [
        ({}, "", False, {"max_tokens": 32_000}),
        ({"max_tokens": 32_000}, "", False, {}),
        ({"stream": True}, "", False, {}),
        ({"stream": True}, "reserve: full\n", False, {"max_tokens": 32_000}),
        ({"stream": True}, "", True, {"max_tokens": 32_000}),
        ({"stream": True, "model": "writer"}, "", False, {"model": "claude-sonnet-5"}),
        ({"model": "writer"}, "", False, {"model": "claude-sonnet-5", "max_tokens": 32_000}),
        ({"stream": True, "thinking": {"type": "enabled", "budget_tokens": 50_000}}, "", False, {}),
    ],
    ids=["json", "within", "stream", "stream held whole", "stream of an overrun model", "stream by an alias", "json by an alias", "stream that thinks"],
)
def test_what_is_held_whole_is_clamped_and_steps_are_not(fields, policy, overrun, changes):
    text = FIRST.replace("models:\n", "models:\n  aliases: {writer: claude-sonnet-5}\n") + policy
    asked = reading(**fields)
    assert rewritten(app(text), PRICES, asked, overrun=overrun, now=NOW) == changes
    sent = reading(**fields | changes)
    assert judge(app(text), sent, PRICES) is None


def test_the_refusal_of_a_ceiling_names_the_clamp():
    refusal = judge(app(FIRST.replace("{limit: 32000, over: clamp}", "32k")), reading(), PRICES)
    assert refusal is not None
    assert refusal.sentence == (
        "The app 'app' may ask for at most 32,000 tokens of output, not 64000 (max_tokens); lower it, or have the gateway lower it by "
        "max_tokens: {limit: 32000, over: clamp} (policies/apps/app.yaml max_tokens)."
    )


async def test_the_answer_of_an_edited_call_says_what_was_edited(tmp_path):
    text = FIRST.replace("models:\n", "models:\n  aliases: {Dichter-ä: claude-sonnet-5}\n")
    async with Simulator(behaviour=Behaviour(output_tokens=20)) as api, gateway(tmp_path, api, {"app": text}) as gw:
        client = gw.client()

        async def edited(**fields):
            asked = {"model": "claude-sonnet-5", "max_tokens": 64_000, "messages": HELLO} | fields
            answer = await client.messages.with_raw_response.create(**asked, timeout=60)
            return answer.headers.get("x-gateway-edited")

        assert await edited() == "max_tokens=32000 (asked 64000)"
        assert await edited(stream=True) is None
        assert await edited(max_tokens=100) is None
        assert await edited(model="Dichter-ä") == "model=claude-sonnet-5 (asked Dichter-\\xe4), max_tokens=32000 (asked 64000)"
        counted = await client.messages.with_raw_response.count_tokens(model="Dichter-ä", messages=HELLO)
        assert counted.headers["x-gateway-edited"] == "model=claude-sonnet-5 (asked Dichter-\\xe4)"
        first, stream, *_ = (await api.settled()).messages()
        body = {"messages": HELLO, "model": "claude-sonnet-5", "max_tokens": 64_000}
        as_json = [json.dumps(body | changes, separators=(",", ":")).encode() for changes in ({"max_tokens": 32_000}, {"stream": True})]
        assert [first.body_bytes, stream.body_bytes] == list(map(len, as_json))


async def test_a_batch_says_which_fields_were_edited(tmp_path):
    text = FIRST + "endpoints: [messages, batches]\n"
    async with Simulator() as api, gateway(tmp_path, api, {"app": text}) as gw:
        params = {"model": "claude-haiku-4-5", "max_tokens": 40_000, "messages": HELLO}
        requests = [{"custom_id": "one", "params": params}, {"custom_id": "two", "params": params | {"max_tokens": 10}}]
        made = await gw.client().messages.batches.with_raw_response.create(requests=requests)
        assert made.headers["x-gateway-edited"] == "max_tokens"
        plain = await gw.client().messages.batches.with_raw_response.create(requests=requests[1:])
        assert "x-gateway-edited" not in plain.headers
