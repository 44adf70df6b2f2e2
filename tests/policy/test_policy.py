"""Policy files and the rules that they make: errors to the line, deny by default, every model and feature judged."""

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from gateway_addon import policy, pricing
from gateway_addon.messages.request import ParsedRequest, Request, edited, read
from gateway_addon.policy import AppPolicy, Cap, PolicyError
from gateway_addon.policy.loading import parse_app, parse_gateway
from gateway_addon.policy.model import Source, Team
from gateway_addon.refusals import stated

PRICES = pricing.load(None, None)
FILE = "policies/apps/reports.yaml"
SHIPPED = Path(__file__).parents[2] / "policies" / "examples"
PLAIN: dict[str, Any] = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hello"}]}
LEAST = "models: {allow: [claude-haiku-4-5*]}\ncaps: unlimited\n"
ALIASES = "caps: unlimited\nmodels:\n  allow: [claude-haiku-4-5]\n  aliases: {"


def app(text: str = "") -> AppPolicy:
    return parse_app(FILE, LEAST + text, PRICES, {"batch-jobs": Team(MappingProxyType({}))})


def reading(body: dict[str, Any], *betas: str, endpoint: str = "messages") -> ParsedRequest:
    headers = tuple(("anthropic-beta", beta) for beta in betas)
    found = read(endpoint, Request("POST", "/v1/messages", headers, json.dumps(PLAIN | body).encode()))
    assert isinstance(found, ParsedRequest), found
    return found


def refused(policy_text: str, body: dict[str, Any], *betas: str) -> str | None:
    refusal = policy.judge(app(policy_text), reading(body, *betas), PRICES)
    return refusal and f"{refusal.code}: {refusal.sentence}"


# files


def test_the_shipped_policies_are_in_force_as_they_are():
    loaded = policy.load(SHIPPED)
    assert set(loaded.apps) == {"reviews", "pipeline", "experiments", "claude-code"}
    assert loaded.apps["claude-code"].unknown_fields == "pass"
    assert policy.caps(loaded, replace(loaded.apps["pipeline"], team="content")) == (
        Cap("total", "day", 40_000_000_000),
        Cap("total", "month", 600_000_000_000),
        Cap("team:content", "month", 200_000_000_000),
        Cap("app:pipeline", "request", 3_000_000_000),
        Cap("app:pipeline", "day", 15_000_000_000),
        Cap("app:pipeline", "month", 150_000_000_000),
    )


def test_every_key_of_the_design_is_read():
    found = app("""
team: batch-jobs
endpoints: [messages]
features: {web_search: {max_uses: 3}, files: true, fast: false}
max_tokens: 8192
reserve: progressive
rates: {requests_per_minute: 60, input_tokens_per_minute: 200k, concurrent: 4, headroom: 20%}
alerts: {at: [50%, 100%], webhook: {env: SPEND_WEBHOOK}}
betas: {deny: [fast-mode-*]}
mode: observe
served: exact
addresses: [10.0.0.0/8, "::1"]
""")
    assert (found.name, found.team, found.endpoints, found.reserve, found.mode, found.served) == (
        "reports", "batch-jobs", ("messages",), "progressive", "observe", "exact",
    )  # fmt: skip
    assert set(found.features) == {"web_search", "files", "hour_ttl"}
    assert (found.features["web_search"].max_uses, found.max_tokens and found.max_tokens.limit) == (3, 8192)
    rates = found.rates
    assert (rates.requests_per_minute, rates.input_tokens_per_minute, rates.concurrent, rates.headroom_percent) == (60, 200_000, 4, 20)
    assert rates.wait_s == 30.0
    assert (found.alerts.at_percent, found.alerts.webhook) == ((50, 100), Source("env", "SPEND_WEBHOOK"))
    assert [str(network) for network in found.addresses] == ["10.0.0.0/8", "::1/128"]


@pytest.mark.parametrize(("wait", "wait_s"), [("0", 0.0), ("0s", 0.0), ("250ms", 0.25), ("5m", 300.0)])
def test_the_wait_for_concurrency_may_be_none(wait: str, wait_s: float):
    assert app(f"rates: {{concurrent: 2, wait: {wait}}}").rates.wait_s == wait_s


def test_the_gateway_s_own_keys_have_defaults():
    values = parse_gateway("policies/gateway.yaml", "caps: {day: $40}\n")
    assert (values["upstream"], values["key"], values["timezone"]) == (
        "https://api.anthropic.com", Source("env", "ANTHROPIC_API_KEY"), "UTC",
    )  # fmt: skip
    timeouts = values["timeouts"]
    assert (timeouts.connect_s, timeouts.first_byte_s, timeouts.silence_s) == (10.0, 600.0, 300.0)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("key: {file: /run/secrets/claude}", Source("file", "/run/secrets/claude")),
        ("key: {command: [pass, show, claude]}", Source("command", ("pass", "show", "claude"))),
        ("key: {keyring: claude/gateway}", Source("keyring", "claude/gateway")),
    ],
)
def test_the_key_has_one_source(text: str, key: Source):
    assert parse_gateway("policies/gateway.yaml", text)["key"] == key


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("models: {allow: [claude-haiku-4-5]}", f"{FILE}:1: caps is missing"),
        ("caps: unlimited", f"{FILE}:1: models is missing"),
        (LEAST.replace("unlimited", "{mnth: $5}"), f"{FILE}:2: caps.mnth: unknown key, did you mean month?"),
        (LEAST + "featurs: {}", f"{FILE}:3: featurs: unknown key, did you mean features?"),
        (LEAST + "caps: unlimited", f"{FILE}:3: caps: given twice (first on line 2)"),
        (LEAST.replace("unlimited", "unlimted"), f"{FILE}:2: caps: 'unlimted' is not a word known here, did you mean unlimited?"),
        (LEAST.replace("unlimited", "{day: five}"), f"{FILE}:2: caps.day: 'five' is not an amount"),
        (LEAST.replace("unlimited", "{day: -5}"), f"{FILE}:2: caps.day: '-5' is not an amount"),
        (LEAST.replace("unlimited", "{day: 1e3}"), f"{FILE}:2: caps.day: '1e3' is not an amount"),
        (LEAST.replace("unlimited", ""), f"{FILE}:2: caps: expected one value, found nothing"),
        (LEAST.replace("haiku", "hiku"), f"{FILE}:1: models.allow: claude-hiku-4-5* matches no model that has a price, did you mean"),
        (LEAST + "features: {web_search: true}", f"{FILE}:3: features.web_search: max_uses must be given, like {{max_uses: 5}}"),
        (LEAST + "features: {web_search: {tokens_per_use: 1}}", f"{FILE}:3: features.web_search: max_uses is missing"),
        (LEAST + "features: {websearch: true}", "features.websearch: unknown key, did you mean web_search?"),
        (LEAST + "features: {files: yes}", f"{FILE}:3: features.files: 'yes' is neither true nor false"),
        (LEAST + "features: {fallbacks: {default: [claude-nope]}}", "features.fallbacks.default: claude-nope has no price"),
        (LEAST + "team: batch-job", f"{FILE}:3: team: no team 'batch-job' in gateway.yaml, did you mean batch-jobs?"),
        (LEAST + "max_tokens: lots", f"{FILE}:3: max_tokens: 'lots' is not a whole number"),
        (LEAST + "reserve: most", f"{FILE}:3: reserve: 'most' is not a word known here"),
        (LEAST + "addresses: [10.0.0.1/8]", f"{FILE}:3: addresses: 10.0.0.1/8 has host bits set"),
        (LEAST + "rates: {headroom: 120%}", f"{FILE}:3: rates.headroom: '120%' is not a share"),
        (LEAST + "rates: {wait: 10m}", f"{FILE}:3: rates.wait: '10m' is longer than 5m: the SDKs give a call up after 10m"),
        (LEAST + "rates: {wait: 30}", f"{FILE}:3: rates.wait: '30' is not a duration; write one like 500ms, 10s"),
        (ALIASES + "claude-opus-5-5: claude-haiku-4-5}", f"{FILE}:4: models.aliases.claude-opus-5-5: is a model's own name"),
        (ALIASES + "fast: claude-hiku}", f"{FILE}:4: models.aliases.fast: claude-hiku has no price"),
        ("", f"{FILE}:1: the file is empty"),
        ("- a", f"{FILE}:1: expected keys"),
        (LEAST + "a: [", f"{FILE}:3: not readable as YAML"),
        (LEAST + "---\na: b", f"{FILE}:3: not readable as YAML"),
        ("<<: {models: {}}\n", f"{FILE}:1: <<: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_app_file_is_refused_with_place_and_reason(text: str, sentence: str):
    with pytest.raises(PolicyError) as caught:
        parse_app(FILE, text, PRICES, {"batch-jobs": None})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("upstream: http://api.anthropic.com", "gateway.yaml:1: upstream: 'http://api.anthropic.com' must be https"),
        ("upstream: http://127.0.0.1.evil.example", "must be https"),
        ("upstream: http://127.0.0.1@evil.example", "must be https"),
        ("upstream: https://user@api.anthropic.com", "must be scheme, host and port alone"),
        ("upstream: https://api.anthropic.com/v1", "must be scheme, host and port alone"),
        ("key: sk-ant-api03-secret", "gateway.yaml:1: key: expected exactly one of"),
        ("key: {env: A, file: b}", "key: expected exactly one of"),
        ("timezone: Mars/Olympus", "timezone: 'Mars/Olympus' is not a time zone"),
        ("teams: {a: {}}", "gateway.yaml:1: teams.a: caps is missing"),
        ("teams: {A B: {caps: unlimited}}", "teams.A B: not a name"),
        ("caps: {request: $1}", "caps.request: unknown key"),
        ("timeouts: {connect: 10}", "timeouts.connect: '10' is not a duration"),
        ("tls: {cert: a.pem}", "tls: key is missing"),
    ],
)
def test_a_wrong_gateway_file_is_refused_with_place_and_reason(text: str, sentence: str):
    with pytest.raises(PolicyError) as caught:
        parse_gateway("policies/gateway.yaml", text)
    assert sentence in str(caught.value)
    assert "sk-ant" not in str(caught.value)


@pytest.mark.parametrize("upstream", ["http://127.0.0.1:9", "http://localhost:9", "http://[::1]:9", "https://example.com:8443"])
def test_plain_http_goes_to_this_machine_alone(upstream: str):
    assert parse_gateway("policies/gateway.yaml", f"upstream: {upstream}/")["upstream"] == upstream


@pytest.mark.parametrize("name", ["Reports.yaml", "reports.yml", "a b.yaml", "reports.json", "über.yaml"])
def test_a_file_that_would_be_ignored_is_an_error(tmp_path: Path, name: str):
    (tmp_path / "apps").mkdir()
    (tmp_path / "gateway.yaml").write_text("timezone: UTC\n")
    (tmp_path / "apps" / name).write_text(LEAST)
    with pytest.raises(PolicyError, match="an app's file is named APP"):
        policy.load(tmp_path)


def test_a_folder_is_loaded_whole_and_its_digest_holds_changes(tmp_path: Path):
    with pytest.raises(PolicyError, match=r"gateway\.yaml: no such file"):
        policy.load(tmp_path)
    (tmp_path / "apps").mkdir()
    (tmp_path / "gateway.yaml").write_text("workspace_geo: global\n")
    (tmp_path / "apps" / "reports.yaml").write_text(LEAST)
    (tmp_path / "apps" / ".reports.yaml.swp").write_text("an editor's")
    (tmp_path / "apps" / "notes.md").write_text("ours")
    first = policy.load(tmp_path)
    assert (list(first.apps), first.apps["reports"].workspace_geo) == (["reports"], "global")
    assert policy.load(tmp_path).digest == first.digest
    (tmp_path / "apps" / "reports.yaml").write_text(LEAST + "# why\n")
    assert policy.load(tmp_path).digest != first.digest
    (tmp_path / "prices.yaml").write_text("modles: {}\n")
    with pytest.raises(PolicyError, match=r"prices\.yaml"):
        policy.load(tmp_path)


# models


@pytest.mark.parametrize(
    ("allow", "deny", "model", "admitted"),
    [
        ("claude-haiku-4-5", "", "claude-haiku-4-5", True),
        ("claude-haiku-4-5", "", "claude-haiku-4-5-20251001", True),
        ("claude-haiku-4-5-20251001", "", "claude-haiku-4-5", True),
        ("claude-opus-5-5", "", "claude-opus-5-5[1m]", True),
        ("claude-haiku-*", "", "claude-haiku-5-5", True),
        ("claude-haiku-*", "", "claude-haiku-evil", False),
        ("claude-haiku-*", "", "xclaude-haiku-4-5", False),
        ("claude-haiku-4-5", "", "claude-haiku-5-5", False),
        ("claude-haiku-?-5", "", "claude-haiku-5-5", True),
        ("claude-*", "claude-opus-*", "claude-opus-5-5", False),
        ("claude-*", "claude-opus-*", "claude-opus-5-5[1m]", False),
        ("claude-*", "claude-haiku-4-5-20251001", "claude-haiku-4-5", False),
        ("claude-*", "claude-haiku-4-5", "claude-haiku-4-5-20251001", False),
        ("claude-*", "claude-opus-*", "claude-sonnet-5", True),
    ],
)
def test_models_are_judged_by_what_they_are_and_deny_wins(allow: str, deny: str, model: str, admitted: bool):
    own = parse_app(FILE, f"models: {{allow: ['{allow}'], deny: [{deny and repr(deny)}]}}\ncaps: unlimited", PRICES, {})
    refusal = policy.judge(own, reading({"model": model}), PRICES)
    assert (refusal is None) == admitted
    assert refusal is None or refusal.code == "model"
    assert policy.may_use(own, model, PRICES) == admitted


def test_a_model_refusal_names_the_allowed_models_and_the_key():
    sentence = "App reports may not use claude-opus-5-5; allowed: claude-haiku-4-5* (policies/apps/reports.yaml models.allow)."
    assert refused("", {"model": "claude-opus-5-5"}) == f"model: {sentence}"


def test_an_alias_is_rewritten_to_its_model_and_judged_as_that():
    own = parse_app(FILE, ALIASES + "fast: claude-haiku-4-5, dear: claude-opus-5-5}", PRICES, {})
    assert policy.edits(own, reading({}), PRICES) == {}
    assert policy.edits(own, reading({"model": "fast"}), PRICES) == {"model": "claude-haiku-4-5"}
    for alias, code in (("fast", None), ("dear", "model")):
        request = Request("POST", "/v1/messages", (), json.dumps(PLAIN | {"model": alias}).encode())
        _, changed = edited("messages", request, policy.edits(own, reading({"model": alias}), PRICES))
        assert isinstance(changed, ParsedRequest)
        refusal = policy.judge(own, changed, PRICES)
        assert (refusal and refusal.code) == code


MOVING = "models: {allow: [claude-haiku-4-5, claude-opus-5-5, claude-3-opus], moving: %s}\ncaps: unlimited\n"
DATED = "claude-haiku-4-5-20251001"


@pytest.mark.parametrize(
    ("moving", "asked", "sent", "code"),
    [
        ("pass", "claude-haiku-4-5", "claude-haiku-4-5", None),
        ("refuse", "claude-haiku-4-5", "claude-haiku-4-5", "model"),
        ("refuse", "claude-haiku-4-5[1m]", "claude-haiku-4-5[1m]", "model"),
        ("refuse", "claude-3-opus-latest", "claude-3-opus-latest", "model"),
        ("refuse", DATED, DATED, None),
        ("refuse", "claude-opus-5-5", "claude-opus-5-5", None),
        ("pin", "claude-haiku-4-5", DATED, None),
        ("pin", "claude-haiku-4-5[1m]", f"{DATED}[1m]", None),
        ("pin", DATED, DATED, None),
        ("pin", "claude-opus-5-5", "claude-opus-5-5", None),
        ("pin", "claude-3-opus-latest", "claude-3-opus-latest", "model"),
    ],
)
def test_a_moving_name_passes_is_refused_or_is_pinned(moving, asked, sent, code):
    """A moving name is one that the provider may point at another snapshot; pinned, its dated id is sent."""
    own = parse_app(FILE, MOVING % moving, PRICES, {})
    request = Request("POST", "/v1/messages", (), json.dumps(PLAIN | {"model": asked}).encode())
    changes = policy.edits(own, reading({"model": asked}), PRICES)
    assert changes == ({} if asked == sent else {"model": sent})
    _, changed = edited("messages", request, changes)
    assert isinstance(changed, ParsedRequest)
    refusal = policy.judge(own, changed, PRICES)
    assert (refusal and refusal.code) == code
    assert policy.may_use(own, asked, PRICES) == (code is None)


def test_a_moving_name_that_cannot_be_pinned_is_refused():
    """Only the top-level model is rewritten: a moving name in `fallbacks` cannot be."""
    text = MOVING % "pin" + "features: {fallbacks: true}\n"
    own = parse_app(FILE, text, PRICES, {})
    asked = reading({"model": "claude-opus-5-5", "fallbacks": [{"model": "claude-haiku-4-5"}]})
    refusal = policy.judge(own, asked, PRICES)
    assert refusal is not None
    assert f"ask for {DATED} ({FILE} models.moving)" in refusal.sentence


# everything else an app may ask for


WEB = "features: {web_search: {max_uses: 3}}"
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
ADVISOR = {"type": "advisor_20260301", "name": "advisor", "model": "claude-haiku-4-5", "max_uses": 2}
MCP = {"mcp_servers": [{"type": "url", "name": "x", "url": "https://mcp.example.com/sse"}]}


@pytest.mark.parametrize(
    ("text", "body", "outcome"),
    [
        (WEB, {"tools": [SEARCH | {"max_uses": 3}]}, None),
        (WEB, {"tools": [SEARCH]}, "feature: App reports must give tools[0] a max_uses of its own"),
        (WEB, {"tools": [SEARCH | {"max_uses": True}]}, "feature: App reports must give tools[0]"),
        (WEB, {"tools": [SEARCH | {"max_uses": 4}]}, "feature: App reports may use web_search 3 times"),
        (WEB, {"tools": [SEARCH | {"max_uses": 5}, SEARCH | {"max_uses": -3}]}, "feature: App reports must give tools[1]"),
        (WEB, {"tools": [SEARCH | {"max_uses": 2}] * 2}, "feature: App reports may use web_search 3 times"),
        ("features: {web_fetch: {max_uses: 3}}", {"tools": [SEARCH | {"max_uses": 1}]}, "feature: App reports may not use web_search"),
        ("features: {advisor: {max_uses: 2}}", {"tools": [ADVISOR]}, None),
        ("features: {advisor: {max_uses: 2}}", {"tools": [ADVISOR | {"model": "claude-opus-5-5"}]}, "model: App reports may"),
        ("features: {fallbacks: true}", {"fallbacks": [{"model": "claude-haiku-4-5"}]}, None),
        ("features: {fallbacks: true}", {"fallbacks": [{"model": "claude-opus-5-5"}]}, "model: App reports may not use claude-opus-5-5"),
        ("features: {fallbacks: true}", {"fallbacks": "default"}, 'feature: App reports may not use fallbacks: "default"'),
        ("features: {fallbacks: {default: [claude-haiku-4-5]}}", {"fallbacks": "default"}, None),
        ("features: {fallbacks: {default: [claude-opus-5-5]}}", {"fallbacks": "default"}, "model: App reports may not use claude-opus-5-5"),
        ("features: {fallbacks: true}", {"fallbacks": "claude-opus-5-5"}, "feature: fallbacks must be a list"),
        ("features: {mcp: true}", MCP, None),
        ("features: {mcp: {servers: ['https://mcp.example.com/*']}}", MCP, None),
        ("features: {mcp: {servers: ['https://other.example.com/*']}}", MCP, "feature: App reports may not use the MCP server"),
        ("features: {fast: true, inference_geo: true}", {"speed": "fast", "inference_geo": "us"}, None),
        ("", {"cache_control": {"type": "ephemeral", "ttl": "1h"}}, None),
        ("features: {hour_ttl: false}", {"cache_control": {"type": "ephemeral", "ttl": "1h"}}, "feature: App reports may not write caches"),
        ("features: {hour_ttl: false}", {"cache_control": {"type": "ephemeral"}}, None),
        ("max_tokens: 16", {}, None),
        ("max_tokens: 15", {}, "max_tokens: App reports may ask for at most 15 tokens of output, not 16 (max_tokens); lower it"),
        ("max_tokens: 16\nfeatures: {fallbacks: true}", {"fallbacks": [{"model": "claude-haiku-4-5", "max_tokens": 17}]}, "max_tokens:"),
        ("thinking: {budget_tokens: 1024}", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, None),
        ("thinking: {budget_tokens: 1024}", {"thinking": {"type": "enabled", "budget_tokens": 1025}}, "feature: App reports may think"),
        ("thinking: {effort: [low]}", {"output_config": {"effort": "low"}}, None),
        ("thinking: {effort: [low]}", {"output_config": {"effort": "max"}}, "feature: App reports may not ask for effort 'max'"),
        ("thinking: {effort: [low]}", {"messages": [{"role": "system", "content": "x", "output_config": {"effort": "max"}}]},
         "feature: App reports may not ask for effort 'max' (messages[0].output_config)"),
        ("require: [metadata.user_id]", {"metadata": {"user_id": "u1"}}, None),
        ("require: [metadata.user_id]", {}, "requirement: App reports must send metadata.user_id"),
        ("require: [metadata.user_id]", {"metadata": {"user_id": ""}}, "requirement: App reports must send metadata.user_id"),
        ("require: [system]", {"system": ""}, "requirement: App reports must send system"),
        ("", {"surprise": 1}, "unknown_field: App reports sends surprise, which this gateway does not know"),
        ("unknown_fields: pass", {"surprise": 1}, None),
        ("unknown_fields: pass", {"tools": [{"type": "web_search_20990101"}]}, "feature: App reports may not use web_search (tools[0])"),
        ("unknown_fields: pass", {"tools": [{"type": "advisor_20990101", "model": "claude-opus-5-5"}]}, "model: App reports may"),
        ("unknown_fields: pass", {"surprise": {"tools": [SEARCH]}}, "feature: App reports may not use web_search (surprise.tools[0])"),
    ],
)  # fmt: skip
def test_unnamed_features_are_refused_and_named_ones_keep_limits(text: str, body: dict[str, Any], outcome: str | None):
    found = refused(text, body)
    assert found == outcome if outcome is None or found is None else found.startswith(outcome)


@pytest.mark.parametrize(
    ("text", "beta", "admitted"),
    [
        ("", "something-2027-01-01", True),
        ("betas: {deny: [fast-mode-*]}", "fast-mode-2026-02-01", False),
        ("betas: {deny: [fast-mode-*]}", "effort-2025-11-24", True),
        ("betas: {allow: [effort-*]}", "effort-2025-11-24", True),
        ("betas: {allow: [effort-*]}", "something-2027-01-01", False),
    ],
)
def test_betas_pass_unless_the_policy_says_otherwise(text: str, beta: str, admitted: bool):
    assert (refused(text, {}, "interleaved-thinking-2025-05-14" if "allow" not in text else beta, beta) is None) == admitted


def test_a_ceiling_clamps_only_where_the_policy_says_so():
    clamping = app("max_tokens: {limit: 10, over: clamp}")
    assert policy.edits(clamping, reading({}), PRICES) == {"max_tokens": 10}
    assert policy.edits(clamping, reading({"max_tokens": 10}), PRICES) == {}
    assert policy.edits(app("max_tokens: 10"), reading({}), PRICES) == {}


def budget(tokens, **more):
    return {"type": "enabled", "budget_tokens": tokens, **more}


@pytest.mark.parametrize(
    ("body", "lowered"),
    [
        ({"thinking": budget(3_000)}, {}),
        ({"thinking": budget(4_000, display="omitted")}, {"thinking": budget(3_999, display="omitted")}),
        ({"thinking": budget(7_999)}, {"thinking": budget(3_999)}),
        ({"thinking": budget(8_000)}, {}),  # not below the `max_tokens` asked for either: interleaved thinking, or the API's to refuse
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking": None}, {}),
        ({"fallbacks": [{"model": "m"}, {"model": "m", "thinking": budget(5_000)}]},
         {"fallbacks": [{"model": "m"}, {"model": "m", "thinking": budget(3_999)}]}),
        ({"fallbacks": [{"model": "m", "thinking": budget(5_000), "max_tokens": 6_000}]}, {}),  # its own `max_tokens` is not clamped
    ],
)  # fmt: skip
def test_a_clamp_lowers_the_thinking_that_no_longer_fits(body, lowered):
    clamping = app("max_tokens: {limit: 4000, over: clamp}")
    assert policy.edits(clamping, reading(body | {"max_tokens": 8_000}), PRICES) == {"max_tokens": 4_000} | lowered
    assert policy.edits(clamping, reading(body | {"max_tokens": 4_000}), PRICES) == {}


@pytest.mark.parametrize(("limit", "asked", "too_little"), [(1_025, 2_000, False), (1_024, 2_000, True), (100, 1_100, True), (100, 100, False)])
def test_a_clamp_that_leaves_no_thinking_is_refused(limit, asked, too_little):
    """The API takes no budget under 1,024: a call that a clamp brings there is refused with that sentence."""
    clamping = app(f"max_tokens: {{limit: {limit}, over: clamp}}")
    sent = reading({"max_tokens": asked, "thinking": budget(1_050)})
    sent = reading({**sent.body, **policy.edits(clamping, sent, PRICES)})
    refusal = policy.judge(clamping, sent, PRICES)
    assert (refusal is not None) == too_little
    if refusal is not None:
        assert refusal.code == "max_tokens"
        assert "which leaves thinking.budget_tokens less than the API's least, 1,024; ask without thinking" in refusal.sentence


def test_an_endpoint_that_is_not_named_is_refused():
    refusal = policy.judge(app("endpoints: [messages]"), reading({}, endpoint="count_tokens"), PRICES)
    assert refusal is not None
    assert (refusal.code, refusal.sentence) == (
        "endpoint", "App reports may not call count_tokens; allowed: messages (policies/apps/reports.yaml endpoints).",
    )  # fmt: skip
    assert policy.judge(app("endpoints: [models]"), ParsedRequest("models"), PRICES) is None
    assert policy.judge(app("endpoints: []"), ParsedRequest("me"), PRICES) is None


def test_count_tokens_is_judged_as_a_message_without_max_tokens():
    assert policy.judge(app("max_tokens: 1"), reading({}, endpoint="count_tokens"), PRICES) is None
    counted = policy.judge(app(), reading({"model": "claude-opus-5-5"}, endpoint="count_tokens"), PRICES)
    assert counted is not None
    assert counted.code == "model"


def test_the_judgement_is_the_first_refusal_of_the_trail():
    """The trail holds every rule in order, those after a refusal too."""
    body = {"model": "claude-opus-5-5", "surprise": 1, "max_tokens": 99}
    trail = list(policy.trail(app("max_tokens: 16\nrequire: [system]"), reading(body), PRICES))
    assert [(verdict.rule, verdict.code) for verdict in trail] == [
        ("endpoints", None), ("models", "model"), ("unknown_fields", "unknown_field"), ("max_tokens", "max_tokens"), ("require", "requirement"),
    ]  # fmt: skip
    refusal = policy.judge(app("max_tokens: 16"), reading(body), PRICES)
    assert refusal is not None
    assert refusal == stated("model", trail[1].sentence)
