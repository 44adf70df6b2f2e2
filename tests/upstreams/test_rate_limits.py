"""The shared key's limits: what a background app leaves to the others."""

import time

import anthropic
import pytest
from gateway import gateway
from ledgers import rows, until

from gateway_addon.clocks import Clocks
from gateway_addon.simulator import Behaviour, Simulator
from gateway_addon.upstreams.rate_limits import shortage

NOW = 1_790_000_000.0
SOON, GONE = "2026-09-21T14:14:20Z", "2026-09-21T14:13:00Z"  # 60 s after NOW, 20 s before it


def reported(kind="requests", limit="100", remaining="10", reset=SOON):
    return {f"anthropic-ratelimit-{kind}-{field}": (value, NOW) for field, value in (("limit", limit), ("remaining", remaining), ("reset", reset))}


@pytest.mark.parametrize(
    ("latest", "keep_percent", "short"),
    [
        ({}, 20, None),
        (reported(remaining="20"), 20, None),
        (reported(remaining="19"), 20, ("requests", 19, 100, 60)),
        (reported(remaining="0"), 0, None),
        (reported(reset=GONE), 20, None),
        (reported(limit="0"), 20, None),
        (reported(limit="many"), 20, None),
        (reported(reset="soon"), 20, None),
        (reported() | reported("input-tokens", "1000", "1", "2026-09-21T14:15:20Z"), 20, ("input-tokens", 1, 1000, 120)),
    ],
)
def test_a_shortage_is_the_short_limit_with_the_longest_wait(latest, keep_percent, short):
    assert shortage(latest, keep_percent, NOW) == short


APPS = {
    "nightly": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\nrates: {headroom: 20%}\n",
    "interactive": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\n",
    "slow": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\nrates: {requests_per_minute: 2}\n",
}


async def ask(gw, app):
    return await gw.client(app).messages.create(model="claude-haiku-4-5", max_tokens=20, messages=[{"role": "user", "content": "hi"}])


async def test_a_background_app_leaves_room_for_the_interactive_one(tmp_path, monkeypatch):
    """The limits are written once in a while, however many answers tell them."""
    monkeypatch.setattr("gateway_addon.calls.gateway.LIMITS_EVERY_S", 60.0)
    async with Simulator(behaviour=Behaviour(ratelimit_remaining_percent=10)) as api, gateway(tmp_path, api, APPS) as gw:
        written = []
        keep = gw.gateway.ledger.ratelimits
        monkeypatch.setattr(gw.gateway.ledger, "ratelimits", lambda limits, now: (written.append(limits), keep(limits, now=now)))
        await ask(gw, "interactive")
        await gw.quiet()
        with pytest.raises(anthropic.RateLimitError) as refused:
            await ask(gw, "nightly")
        assert refused.value.response.headers["x-gateway-refusal"] == "headroom"
        assert 0 < int(refused.value.response.headers["retry-after"]) <= 61
        assert "keeps 20 % of them free for the others" in refused.value.message
        await ask(gw, "interactive")
        await gw.quiet()
        assert len(written) == 1


def in_one_minute():
    """A clock that stands: a sliding minute is counted by calendar minutes, and a test may straddle one."""
    now = time.time() // 60 * 60 + 20
    return Clocks(now=lambda: now)


async def test_requests_a_minute_hold_and_say_when_to_come_back(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, APPS, clocks=in_one_minute()) as gw:
        await ask(gw, "slow")
        await ask(gw, "slow")
        with pytest.raises(anthropic.RateLimitError) as refused:
            await ask(gw, "slow")
        assert refused.value.response.headers["x-gateway-refusal"] == "rate"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert len((await api.settled()).messages()) == 2


async def test_count_tokens_has_the_rate_apart_from_messages(tmp_path):
    apps = APPS | {"watched": APPS["slow"] + "observe: [rates]\n"}
    async with Simulator() as api, gateway(tmp_path, api, apps, clocks=in_one_minute()) as gw:
        count = {"model": "claude-haiku-4-5", "messages": [{"role": "user", "content": "hi"}]}
        for app in ("slow", "watched"):
            for _ in range(2):
                await ask(gw, app)
                await gw.client(app).messages.count_tokens(**count)
        with pytest.raises(anthropic.RateLimitError, match="at its limit of 2 requests per minute to count tokens") as refused:
            await gw.client("slow").messages.count_tokens(**count)
        assert refused.value.response.headers["x-gateway-refusal"] == "rate"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        await gw.client("watched").messages.count_tokens(**count)
        watched = "SELECT flags FROM calls WHERE app = 'watched' AND endpoint = 'count_tokens' ORDER BY id"
        await until(lambda: rows(tmp_path / "gateway.db", watched) == [("",), ("",), ("observed:rate",)])
