"""Every hostile request of the table meets the refusal that the table says, on the pure functions."""

from collections import Counter

import pytest
from bypass import HOSTILE, PLAIN, POLICY, Hostile

from gateway_addon import policy, pricing
from gateway_addon.messages.request import Request, endpoint_of, read
from gateway_addon.policy.loading import parse_app
from gateway_addon.refusals import Refusal

PRICES = pricing.load(None, None)
APP = parse_app("policies/apps/victim.yaml", POLICY, PRICES, {})


def admitted(row: Hostile) -> Refusal | None:
    name = endpoint_of(row.method, row.target)
    if isinstance(name, Refusal):
        return name
    reading = read(name, Request(row.method, row.target, row.headers, row.body))
    return reading if isinstance(reading, Refusal) else policy.judge(APP, reading, PRICES)


@pytest.mark.parametrize("row", HOSTILE, ids=[f"{i}-{row.trick}" for i, row in enumerate(HOSTILE)])
def test_a_hostile_request_is_refused(row: Hostile):
    refusal = admitted(row)
    assert refusal is not None
    assert refusal.code == row.code, refusal.sentence


def test_the_plain_request_that_the_table_bends_is_admitted():
    assert PLAIN["model"] == "claude-haiku-4-5"
    assert admitted(Hostile("none", "none")) is None


def test_no_trick_pads_the_table():
    assert len(HOSTILE) >= 120
    assert max(Counter(row.trick for row in HOSTILE).values()) <= 5
