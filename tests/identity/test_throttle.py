"""Noise is limited by address, bounded in memory, and never in the way of a valid token."""

import httpx2
from gateway import gateway

from gateway_addon.identity import tokens
from gateway_addon.identity.throttle import ADDRESSES_MAX, FAILURES_PER_MINUTE, FailedAuthenticationThrottle
from gateway_addon.simulator import Simulator

NOON = 1_800_000_000.0 - 1_800_000_000 % 60


def test_an_address_gets_so_many_answers_each_minute():
    failed_authentication = FailedAuthenticationThrottle()
    assert [failed_authentication.too_much("10.0.0.1", NOON + 0.9 * second) for second in range(FAILURES_PER_MINUTE)] == [False] * FAILURES_PER_MINUTE
    assert failed_authentication.too_much("10.0.0.1", NOON + 59)
    assert not failed_authentication.too_much("10.0.0.2", NOON + 59), "another address has its own"
    assert not failed_authentication.too_much("10.0.0.1", NOON + 60)


def test_ever_new_addresses_share_one_count():
    failed_authentication = FailedAuthenticationThrottle()
    for number in range(ADDRESSES_MAX + FAILURES_PER_MINUTE):
        assert not failed_authentication.too_much(f"address {number}", NOON)
    assert failed_authentication.too_much("one more", NOON)
    assert not failed_authentication.too_much("address 0", NOON), "and who was there before is not touched by them"


async def test_failures_are_limited_and_a_valid_token_passes(tmp_path):
    """The failures are counted; the valid token comes from the same address."""
    async with Simulator() as api, gateway(tmp_path, api) as gw, httpx2.AsyncClient(base_url=gw.url) as http:
        wrong = {"x-api-key": tokens.mint()}
        answers = [await http.post("/v1/messages", headers=wrong, content=b"{}") for _ in range(2 * FAILURES_PER_MINUTE + 2)]
        limited = [each for each in answers if each.status_code == 429]
        assert len(limited) >= 2, "sixty a minute, whichever minute it is"
        assert limited[-1].headers["x-gateway-refusal"] == "token_noise"
        assert 1 <= int(limited[-1].headers["retry-after"]) <= 60
        assert "127.0.0.1" in limited[-1].json()["error"]["message"]
        assert {each.status_code for each in answers} == {401, 429}
        models = await http.get("/v1/models", headers={"x-api-key": gw.tokens["app"]})
        assert models.status_code == 200
        assert [row.target for row in (await api.settled()).all()] == ["/v1/models"], "none of it reached the API"
