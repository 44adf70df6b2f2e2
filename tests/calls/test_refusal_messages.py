"""Sentences of refusals, with amounts that add up and places that are right."""

from datetime import UTC
from types import MappingProxyType

import pytest
from ledgers import NOON

from gateway_addon.calls.quote import Quote, quote
from gateway_addon.calls.refusal_messages import denied, paused
from gateway_addon.calls.reservation_options import ReservationOption
from gateway_addon.ledger import CallFacts, Pause, RateLimits, Standing, Token
from gateway_addon.ledger.denials import judge
from gateway_addon.ledger.types import MinuteCount
from gateway_addon.messages.request import Request, read
from gateway_addon.policy.loading import parse_app
from gateway_addon.policy.model import Team
from gateway_addon.pricing import load

CENT = 10_000_000
PRICES = load()
BODY = b'{"model": "claude-haiku-4-5", "max_tokens": 4000, "messages": [{"role": "user", "content": "hi"}]}'
RATES = RateLimits(60, 5_000, 2)
APP = "models: {allow: [claude-haiku-4-5]}\nteam: night\ncaps: {day: $0.60}\n"


def app_of(name="reports", folder="policies"):
    return parse_app(f"{folder}/apps/{name}.yaml", APP, PRICES, {"night": Team(MappingProxyType({}))})


def bound() -> Quote:
    found = quote(read("messages", Request("POST", "/v1/messages", (), BODY)), app_of(), PRICES, NOON)
    assert isinstance(found, Quote)
    return found


def sentence(cap=None, *, hold=0, quantum=0, facts=None, rates=RATES, tokens=10, app=None, **cap_facts) -> str:
    """What a call is told that asks for so many cents."""
    standing = Standing("app:reports", "day", int(NOON), NOON + 3600, 60 * CENT, 0, 0, 0, 0, 0)._replace(**cap_facts)
    known = facts or CallFacts(Token(1, "reports", "", NOON, None, None), (), (standing,))
    option = ReservationOption(100, hold * CENT, quantum_nano=quantum * CENT)
    found = judge(known, rates, option.hold_nano, option.quantum_nano, tokens, NOON)
    assert found is not None
    return denied(found, app or app_of(), bound(), option, UTC).sentence




@pytest.mark.parametrize(
    ("facts", "begins", "holds"),
    [
        (
            {"hold": 39, "quantum": 6, "spent_nano": 17 * CENT},
            "The cap for today of app reports would be passed: $0.1700 spent of $0.60; this call needs $0.4500, $0.3900 to start and $0.0600 for its "
            "next step. It resets at ",
            "The operator can raise it: gateway cap raise reports day AMOUNT --until DATE.",
        ),
        ({"hold": 59, "spent_nano": 58 * CENT}, "The cap for today of app reports would be passed: $0.5800 spent", "The largest max_tokens that still fits is 3,767."),
        ({"hold": 1, "spent_nano": 60 * CENT}, "The cap for today of app reports is used up: $0.6000 spent of $0.60. It resets", "cap raise"),
        ({"hold": 1, "spent_nano": 70 * CENT, "scope": "total"}, "The cap for today of all apps together is used up", "cap raise total day"),
        ({"hold": 1, "spent_nano": 70 * CENT, "scope": "team:night"}, "The cap for today of team night is used up", "cap raise team:night day"),
        ({"hold": 1, "spent_nano": 70 * CENT, "limit_nano": 60 * CENT}, "The cap for", "The operator's limit holds (gateway cap list); to lift it: gateway cap limit reports day --lift."),
        (
            {"hold": 39, "quantum": 1, "spent_nano": 9 * CENT, "reserved_nano": 15 * CENT, "quantum_nano": 2 * CENT},
            "Of the cap for today of app reports ($0.60) $0.0900 is spent, $0.1500 held by calls in flight, $0.0200 kept for their next steps; this call",
            "Try again shortly.",
        ),
        ({"hold": 61}, "This call can cost up to", "more than the cap for today of app reports ($0.60, policies/apps/reports.yaml: caps)."),
        ({"hold": 61, "scope": "total"}, "This call can cost up to", "of all apps together ($0.60, policies/gateway.yaml: caps)."),
        ({"hold": 61, "scope": "team:night", "app": app_of(folder="tomorrow")}, "This", "of team night ($0.60, tomorrow/gateway.yaml: teams.night.caps)."),
        ({"hold": 61, "limit_nano": 60 * CENT}, "This call", "($0.60, the operator's limit: gateway cap list)."),
        ({"hold": 61, "spent_nano": 70 * CENT}, "This call can cost up to", "caps). $0.7000 is spent already, so nothing of it is left."),
    ],
)
def test_caps_name_all_that_is_asked_and_where_they_stand(facts, begins, holds):
    said = sentence(**facts)
    assert said.startswith(begins), said
    assert holds in said


def held_up(**facts) -> dict[str, CallFacts]:
    return {"facts": CallFacts(Token(1, "reports", "", NOON, None, None), **facts)}


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (held_up(open=2), "App reports has 2 calls in flight, as many as it may have at once (policies/apps/reports.yaml: rates.concurrent), and none ended for this one within 30 s"),
        ({**held_up(open=1), "rates": RateLimits(None, None, 0)}, "App reports may have no call in flight (policies/apps/reports.yaml: rates.concurrent). Raise it there."),
        (held_up(requests=MinuteCount(60, 0)), "App reports is at its limit of 60 requests per minute (policies/apps/reports.yaml: rates). Slow down"),
        ({**held_up(), "tokens": 9_000}, "This call alone is more than the 5,000 input tokens per minute of app reports (policies/apps/reports.yaml: rates). Send less"),
        ({**held_up(requests=MinuteCount(1, 0)), "rates": RateLimits(1, None, None), "app": app_of("app")}, "The app 'app' is at its limit of 1 request per minute (policies/apps/app.yaml: rates)."),
    ],
)  # fmt: skip
def test_rates_name_the_limit_and_whether_waiting_helps(facts, said):
    assert sentence(**facts).startswith(said)


@pytest.mark.parametrize(
    ("scope", "said"), [("total", "Every app is paused until"), ("team:night", "Team night is paused until"), ("app:app", "The app 'app' is paused until")]
)
def test_a_pause_names_what_is_paused(scope, said):
    assert paused(Pause(scope, NOON, NOON + 60, ""), UTC).sentence.startswith(said)
