"""Test the labels that a policy declares: which count, which are refused, in sentences that say where and what is allowed."""

import json

import pytest

from gateway_addon import policy, pricing
from gateway_addon.messages.labels import PATH_HEADER
from gateway_addon.messages.request import ParsedRequest, Request, read
from gateway_addon.policy import PolicyError
from gateway_addon.policy.labels import labels_in_force
from gateway_addon.policy.loading import parse_app

PRICES = pricing.load(None, None)
FILE = "policies/apps/reports.yaml"
LEAST = "models: {allow: [claude-haiku-4-5*]}\ncaps: unlimited\n"
BODY = json.dumps({"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hello"}]}).encode()
CLIENT = "labels: {client: {values: [acme, beta-*]}}\n"


def judged(text, said, fixed=(), endpoint="messages", path=""):
    """The refusal of a request with these labels, or those by which it is booked."""
    app = parse_app(FILE, LEAST + text, PRICES, {})
    headers = [(f"x-gateway-label-{name}", value) for name, value in said] + ([(PATH_HEADER, path)] if path else [])
    body = BODY if endpoint in ("messages", "count_tokens") else b""
    reading = read(endpoint, Request("POST", "/v1/messages", tuple(headers), body, fixed))
    assert isinstance(reading, ParsedRequest)
    refusal = policy.judge(app, reading, PRICES)
    return f"{refusal.code}: {refusal.sentence}" if refusal else dict(labels_in_force(app, reading))


@pytest.mark.parametrize(
    ("text", "said", "booked"),
    [
        ("", (), {}),
        (CLIENT, (), {}),
        (CLIENT, [("client", "acme")], {"client": "acme"}),
        (CLIENT, [("client", "beta-2")], {"client": "beta-2"}),
        (CLIENT, [("client", "acme"), ("client", "acme")], {"client": "acme"}),
        ("labels: {a: {}, b: {from: header}}\n", [("b", "2"), ("a", "1")], {"a": "1", "b": "2"}),
        (CLIENT + "undeclared_labels: drop\n", [("branch", "main"), ("client", "acme")], {"client": "acme"}),
        (CLIENT + "observe: [labels]\n", [("client", "other"), ("branch", "main")], {}),
        ("labels: {client: {required: true}}\nobserve: [labels]\n", (), {}),
    ],
)
def test_a_declared_label_is_booked(text, said, booked):
    assert judged(text, said) == booked


@pytest.mark.parametrize(
    ("text", "said", "sentence"),
    [
        (CLIENT, [("client", "acne")], "client=acne; allowed: acme, beta-*"),
        (CLIENT, [("client", "acme"), ("client", "beta-1")], "says its label client twice, as acme and beta-1"),
        (CLIENT, [("clinet", "acme")], "no label 'clinet'; declared: client"),
        ("", [("client", "acme")], "no label 'client'; declared: none"),
        ("labels: {client: {from: path}}\n", [("client", "acme")], "in the path (/l/client=VALUE), not in its header"),
        ("labels: {client: {from: token}}\n", [("client", "acme")], "on its token alone, not in its header"),
        ("labels: {client: {required: true}}\n", (), "must say its label client with each call, in a header (x-gateway-label-client) or in"),
    ],
)
def test_another_label_is_refused_with_what_is_allowed(text, said, sentence):
    refused = judged(text, said)
    assert isinstance(refused, str)
    assert refused.startswith("label: App reports ")
    assert sentence in refused
    assert FILE in refused or "twice" in refused


def test_a_label_in_the_path_counts_like_one_in_a_header():
    assert judged(CLIENT, (), path="client=acme") == {"client": "acme"}
    assert "twice" in judged(CLIENT, [("client", "beta-1")], path="client=acme")


def test_a_token_says_its_label_for_all_its_calls():
    fixed = (("client", "house"), ("pr", "41"))
    for said in ((), [("client", "acme")], [("client", "nobody"), ("pr", "42")]):
        assert judged(CLIENT + "undeclared_labels: drop\n", said, fixed) == dict(fixed)
    assert judged("labels: {client: {required: true, from: token}}\n", (), fixed) == dict(fixed)
    assert judged("", (), fixed) == dict(fixed), "it needs no declaration"


def test_only_what_may_cost_something_needs_a_required_label():
    required = "labels: {client: {required: true}}\nendpoints: [messages, count_tokens, models, batches]\n"
    assert judged(required, (), endpoint="count_tokens") == {}
    assert "must say" in judged(required, (), endpoint="batches.create")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("labels: {Client: {}}", "labels.Client: not a name"),
        ("labels: {client: {from: cookie}}", "labels.client.from: 'cookie' is not a word known here"),
        ("labels: {client: {form: header}}", "labels.client.form: unknown key, did you mean from?"),
        ("labels: {client: {values: ['']}}", "labels.client.values: '' is not a value"),
        ("undeclared_labels: pass", "undeclared_labels: 'pass' is not a word known here"),
    ],
)
def test_a_wrong_declaration_is_said_to_its_line(text, problem):
    with pytest.raises(PolicyError, match=f"{FILE}:3: {problem.replace('?', '.')}"):
        parse_app(FILE, LEAST + text, PRICES, {})
