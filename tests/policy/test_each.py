"""Test caps on the parts of an app, and cycles: how a policy writes them, which of them hold for a call, what is said of mistakes."""

from typing import Any

import pytest

from gateway_addon import pricing
from gateway_addon.ledger import NewCall
from gateway_addon.policy import AppPolicy, Cap, PolicyError, caps_by_model, part_caps
from gateway_addon.policy.loading import parse_app

PRICES = pricing.load(None, None)
OPUS, HAIKU = "claude-opus-4-5", "claude-haiku-4-5"
LEAST = "models:\n  allow: [claude-*]\n  caps: {MODELS}\ncaps: {CAPS}\neach: {EACH}\n"


def app(each: str = "{}", models: str = "{}", caps: str = "unlimited") -> AppPolicy:
    text = LEAST.replace("{EACH}", each).replace("{MODELS}", models).replace("{CAPS}", caps)
    return parse_app("policies/apps/coder.yaml", text, PRICES, {})


def found(policy: AppPolicy, *, last_call: bool = False, **named: Any) -> list[Cap]:
    call = NewCall("coder", None, 7, **named)
    return list(part_caps(policy, call.parts, last_call=last_call))


def test_each_part_of_a_call_has_its_own_cap():
    policy = app("{session: {ever: $2}, agent: {ever: $1}, model: {day: $5, month: $60}, token: {week: $10}, label.client: {month: $50}}")
    assert found(policy, session_id="3f2a", model=HAIKU) == [
        Cap("app:coder session:3f2a", "ever", 2_000_000_000),
        Cap(f"app:coder model:{HAIKU}", "day", 5_000_000_000),
        Cap(f"app:coder model:{HAIKU}", "month", 60_000_000_000),
        Cap("app:coder token:7", "week", 10_000_000_000),
    ]
    assert list(part_caps(policy, [("label.client", "acme"), ("label.team", "a")], last_call=False)) == [
        Cap("app:coder label.client:acme", "month", 50_000_000_000)
    ]


def test_a_models_own_cap_stands_in_the_place_of_each_ones():
    policy = app("{model: {day: $5, month: $60}}", f"{{{OPUS}: {{day: $20}}}}")
    assert [cap.amount_nano for cap in found(policy, model=PRICES.canonical(OPUS))][:2] == [20_000_000_000, 60_000_000_000]
    assert [cap.amount_nano for cap in found(policy, model=HAIKU)] == [5_000_000_000, 60_000_000_000]
    assert caps_by_model(policy)
    assert not caps_by_model(app("{session: {ever: $2}}"))


def test_the_last_share_is_kept_for_last_calls():
    policy = app("{session: {ever: $2, last_call: 5%}}")
    [usual], [last] = found(policy, session_id="s"), found(policy, session_id="s", last_call=True)
    assert (usual.amount_nano, last.amount_nano) == (1_900_000_000, 2_000_000_000)


def test_a_cycle_is_a_window_like_the_others():
    policy = app("{user: {cycle: {amount: $3, from: 31}}}", caps="{day: $5, cycle: {amount: $100, from: 17}, ever: $900}")
    assert dict(policy.caps) == {"day": 5_000_000_000, "cycle:17": 100_000_000_000, "ever": 900_000_000_000}
    assert dict(policy.each["user"].caps) == {"cycle:31": 3_000_000_000}


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ({"each": "{sesion: {ever: $2}}"}, "each.sesion: unknown key, did you mean session?"),
        ({"each": "{project: {ever: $2}}"}, "each.project: unknown key; known: agent, label.NAME, model, session, token, user"),
        ({"each": "{label.Client: {ever: $2}}"}, "each.label.Client: unknown key"),
        ({"each": "{session: {}}"}, "each.session: names no window; write one like {day: $5}"),
        ({"each": "{session: {last_call: 5%}}"}, "each.session: names no window"),
        ({"each": "{session: {request: $2}}"}, "each.session.request: unknown key"),
        ({"each": "{session: {ever: $2, last_call: 0%}}"}, "each.session.last_call: '0%' is not a share"),
        ({"each": "{session: {cycle: $100}}"}, "each.session.cycle: expected keys: amount, from"),
        ({"caps": "{cycle: {amount: $100, from: 32}}"}, "caps.cycle.from: '32' is not a day of the month"),
        ({"caps": "{cycle: {amount: $100}}"}, "caps.cycle: from is missing"),
        ({"models": "{claude-nope: {day: $5}}"}, "models.caps.claude-nope: claude-nope has no price"),
        ({"models": f"{{{HAIKU}: {{}}}}"}, f"models.caps.{HAIKU}: names no window"),
        ({"models": f"{{{HAIKU}: {{day: $1}}, {HAIKU}-20251001: {{day: $2}}}}"}, "are one model; write its caps once"),
    ],
)
def test_a_mistake_in_the_caps_of_parts_names_its_place(written, reason):
    with pytest.raises(PolicyError) as error:
        app(**written)
    assert reason in str(error.value)
    assert str(error.value).startswith("policies/apps/coder.yaml:")
