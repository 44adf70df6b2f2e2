"""Rules that are only observed: what they would refuse passes, is flagged, and is reported; the others hold."""

import json

import anthropic
import pytest
from click.testing import CliRunner
from gateway import gateway
from ledgers import rows

from gateway_addon.cli.report import report
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("idle_clock")

HELLO = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
SEARCH = {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 1}]}


async def outcome(gw, **changes) -> str:
    try:
        await gw.client().messages.create(**HELLO | changes)
    except anthropic.APIStatusError as error:
        return error.response.headers["x-gateway-refusal"]
    return "passed"


RULES = [
    # an app's policy beside its models, what it asks for, what the rule says
    ("models", "caps: unlimited", {"model": "claude-sonnet-5"}, "model"),
    ("unknown_fields", "caps: unlimited", {"extra_body": {"surprise": 1}}, "unknown_field"),
    ("features", "caps: unlimited", SEARCH, "feature"),
    ("betas", "caps: unlimited\nbetas: {deny: [new-*]}", {"extra_headers": {"anthropic-beta": "new-1"}}, "feature"),
    ("max_tokens", "caps: unlimited\nmax_tokens: 49", {}, "max_tokens"),
    ("thinking", "caps: unlimited\nthinking: {budget_tokens: 1}", {"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 2}}}, "feature"),
    ("require", "caps: unlimited\nrequire: [system]", {}, "requirement"),
    ("caps", "caps: {request: $0.000001}", {}, "quote_over_cap"),
    ("caps", "caps: {day: $0.000001}", {}, "quote_over_cap"),
    ("rates", "caps: unlimited\nrates: {input_tokens_per_minute: 1}", {}, "rate"),
]


@pytest.mark.parametrize(("rule", "policy", "asked", "code"), RULES, ids=[f"{i}-{row[0]}" for i, row in enumerate(RULES)])
async def test_a_rule_refuses_unless_it_is_observed(tmp_path, rule, policy, asked, code):
    allowed = "models: {allow: [claude-haiku-4-5]}\n"
    apps = {"app": f"{allowed}{policy}\nobserve: [{rule}]\n", "other": f"{allowed}{policy}\n", "third": f"{allowed}{policy}\nmode: observe\n"}
    async with Simulator() as api, gateway(tmp_path, api, apps) as gw:
        said = []
        for app in apps:
            gw.tokens["app"], kept = gw.tokens[app], gw.tokens["app"]
            said.append(await outcome(gw, **asked))
            gw.tokens["app"] = kept
        await gw.quiet()
    assert said == ["passed", code, "passed"]
    found = rows(tmp_path / "gateway.db", "SELECT app, state, flags FROM calls ORDER BY app")
    assert [(app, state) for app, state, _ in found] == [("app", "settled"), ("other", "refused"), ("third", "settled")]
    assert all(f"observed:{code}" in flags.split() for app, _, flags in found if app != "other")
    shown = CliRunner().invoke(report, ["--ledger", f"sqlite:///{tmp_path / 'gateway.db'}"]).stdout
    assert f"Let pass by rules that are only observed: 2 {code}" in shown
    asked_for_programs = CliRunner().invoke(report, ["--json", "--ledger", f"sqlite:///{tmp_path / 'gateway.db'}"]).stdout
    assert json.loads(asked_for_programs)["observed"] == {code: 2}


async def test_caps_that_are_shared_hold_for_an_observed_app_too(tmp_path):
    app = "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\nmode: observe\n"
    async with Simulator() as api, gateway(tmp_path, api, {"app": app}, "caps: {day: $0.000001}\n") as gw:
        assert await outcome(gw) == "quote_over_cap"
        assert (await api.settled()).messages() == []


async def test_an_observed_cap_does_not_cut_a_stream_that_outgrows_it(tmp_path):
    policy = "models: {allow: [claude-opus-5-5]}\ncaps: {request: $0.01, day: $0.01}\nreserve: progressive\nobserve: [caps]\n"
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "prices.yaml").write_text("assumed: {lag_s: 2}\n")  # so that four seconds of a stream need a top-up
    behaviour = Behaviour(output_tokens=1_400, tokens_per_s=380, tokens_per_event=20)
    async with Simulator(behaviour=behaviour) as api, gateway(tmp_path, api, {"app": policy}) as gw:
        async with gw.client().messages.stream(**HELLO | {"model": "claude-opus-5-5", "max_tokens": 60_000}) as stream:
            message = await stream.get_final_message()
        await gw.quiet()
        assert message.usage.output_tokens == 1_400
        assert await gw.spent_nano() == (await api.settled()).billed_nano > 10_000_000


async def test_a_token_count_by_an_observed_app_is_flagged_as_well(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": "models: {allow: [claude-sonnet-5]}\ncaps: unlimited\nobserve: [models]\n"}) as gw:
        await gw.client().messages.count_tokens(model="claude-haiku-4-5", messages=HELLO["messages"])
        await gw.quiet()
    assert rows(tmp_path / "gateway.db", "SELECT state, flags FROM calls") == [("free", "observed:model")]
