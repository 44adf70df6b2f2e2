"""The words in which Claude Code hears of caps: the official gateway's recorded answers (2.1.332), and a real gateway's."""

import time
from types import SimpleNamespace

import anthropic
import httpx2
import pytest
from gateway import gateway

from gateway_addon.calls.responses import cap_headers
from gateway_addon.calls.spend_limit import allowed_headers, rejected_headers, usage
from gateway_addon.ledger import Standing, admin
from gateway_addon.money import NANO_PER_DOLLAR
from gateway_addon.simulator import Simulator

CENT = NANO_PER_DOLLAR // 100
MIDNIGHT, MONDAY, FIRST = 1795910400, 1795996800, 1796083200
RESETS = {"day": MIDNIGHT, "week": MONDAY, "month": FIRST, "ever": None}
HELLO = {"model": "claude-haiku-4-5", "max_tokens": 40, "messages": [{"role": "user", "content": "Say hello."}]}
PREFIX = "anthropic-ratelimit-unified-"


def cap(cents, window="day", of_cents=1000, scope="app:coder"):
    return Standing(scope, window, 0, RESETS[window], round(of_cents * CENT), 0, round(cents * CENT), 10**9, 10**9, 1)


def short(headers):
    return {name.removeprefix(PREFIX): value for name, value in headers}


@pytest.mark.parametrize(
    ("cents", "status", "share", "threshold"),
    [
        (0, "allowed", "0", None), (4.9, "allowed", "0", None), (5, "allowed", "0.01", None), (500, "allowed", "0.5", None),
        (749.9, "allowed", "0.75", None), (750, "allowed", "0.75", None), (750.1, "allowed_warning", "0.75", "0.75"),
        (760, "allowed_warning", "0.76", "0.75"), (950, "allowed_warning", "0.95", "0.75"), (950.1, "allowed_warning", "0.95", "0.95"),
        (990, "allowed_warning", "0.99", "0.95"), (999.99, "allowed_warning", "0.99", "0.95"), (1200, "allowed_warning", "0.99", "0.95"),
    ],
)  # fmt: skip
def test_an_answers_headers_are_the_recorded_ones(cents, status, share, threshold):
    expected = {
        "status": status, "reset": str(MIDNIGHT), "overage-reset": str(MIDNIGHT), "overage-utilization": share,
        "representative-claim": "overage", "overage-status": status,
    }  # fmt: skip
    assert short(allowed_headers("coder", [cap(cents)])) == expected | ({"overage-surpassed-threshold": threshold} if threshold else {})


@pytest.mark.parametrize(("cents", "share"), [(1000, "1"), (1200, "1.2"), (1070, "1.07"), (5000, "5"), (997, "1"), (100_000_000, "100000")])
def test_a_reached_caps_headers_are_the_recorded_ones(cents, share):
    assert short(rejected_headers("coder", cap(cents))) == {
        "status": "rejected", "reset": str(MIDNIGHT), "overage-reset": str(MIDNIGHT), "overage-utilization": share,
        "overage-surpassed-threshold": "1", "overage-period": "daily", "overage-disabled-reason": "org_spend_cap_reached",
    }  # fmt: skip


@pytest.mark.parametrize("scope", ["team:all", "total"])
def test_a_pool_that_is_used_up_is_named_as_one(scope):
    found = short(rejected_headers("coder", cap(1000, "month", scope=scope)))
    assert (found["overage-scope"], found["overage-period"]) == ("group_pool", "monthly")


def test_a_cap_for_ever_has_neither_reset_nor_period():
    assert not {"reset", "overage-reset"} & short(allowed_headers("coder", [cap(800, "ever")])).keys()
    assert not {"reset", "overage-reset", "overage-period"} & short(rejected_headers("coder", cap(1000, "ever"))).keys()


@pytest.mark.parametrize(
    ("caps", "speaks"),
    [
        ([cap(100), cap(900, "month"), cap(300, "week")], "month"),
        ([cap(1500), cap(1500, "month", 1400), cap(1500, "week", 10)], "month"),
        ([cap(1500), cap(100, "month", 2000)], "day"),
        ([cap(0, of_cents=0), cap(1, "month")], "day"),
        ([cap(1000), cap(1000, "ever")], "ever"),
    ],
    ids=["the fullest", "of those used up the last to reset", "one used up", "a cap of nothing", "for ever is the last"],
)
def test_of_several_caps_one_speaks(caps, speaks):
    reset = RESETS[speaks]
    assert short(allowed_headers("coder", caps)).get("reset") == (None if reset is None else str(reset))


@pytest.mark.parametrize("standings", [[], [cap(900, scope="total"), cap(900, scope="team:all")]], ids=["no cap", "only others' caps"])
def test_an_app_without_caps_of_its_own_gets_no_headers(standings):
    assert allowed_headers("coder", standings) == ()
    assert cap_headers(SimpleNamespace(name="coder"), standings) == []
    none = {"limit": None, "used_credits": 0, "utilization": None}
    extra = {
        "is_enabled": True,
        "monthly_limit": None,
        "used_credits": 0,
        "utilization": None,
        "currency": "USD",
        "daily": none,
        "weekly": none,
    }
    assert usage("coder", standings) == {"extra_usage": extra, "limits": []}


@pytest.mark.parametrize(
    ("cents", "percent", "severity"),
    [
        (0, 0, "normal"),
        (500, 50, "normal"),
        (751, 75, "warning"),
        (951, 95, "critical"),
        (999.9, 99, "critical"),
        (1000, 100, "critical"),
        (5000, 500, "critical"),
    ],
)
def test_usage_is_the_recorded_one(cents, percent, severity):
    limit = {
        "kind": "spend", "group": "daily", "percent": percent, "resets_at": "2026-11-29T00:00:00.000Z", "severity": severity, "is_active": True,
    }  # fmt: skip
    extra = {"is_enabled": True, "monthly_limit": 1000, "used_credits": int(cents), "utilization": percent, "currency": "USD"}
    assert usage("coder", [cap(cents)]) == {"extra_usage": extra, "limits": [limit]}


def test_usage_of_several_caps_is_that_of_the_binding_one():
    found = usage("coder", [cap(2500, "day"), cap(2500, "week", 2000), cap(2500, "month", 1500)])
    assert found["extra_usage"] == {"is_enabled": True, "monthly_limit": 1500, "used_credits": 2500, "utilization": 167, "currency": "USD"}
    shown = [(limit["group"], limit["percent"], limit["is_active"]) for limit in found["limits"]]
    assert shown == [("daily", 250, False), ("weekly", 125, False), ("monthly", 167, True)]


async def test_a_client_hears_of_its_cap_from_first_call_to_last(tmp_path):
    """JSON, stream and refusal, by the real SDK; counting and a call that alone is too dear carry none: nothing is used up by them."""
    app = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n"
    async with (
        Simulator() as api,
        gateway(tmp_path, api, {"app": app, "free": "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\n"}) as gw,
    ):
        client = gw.client("app")

        async def spend(nano):
            await gw.quiet()
            [(call_id,)] = await gw.gateway.ledger.change(
                lambda db: db.execute("SELECT max(id) FROM calls WHERE state = 'settled'").fetchall()
            )
            await gw.gateway.ledger.change(lambda db: admin.adjust(db, call_id, nano, who="test", why="spent", now=time.time()))

        async def stood():
            async with httpx2.AsyncClient() as plain:
                return (await plain.get(f"{gw.url}/api/oauth/usage", headers={"authorization": f"Bearer {gw.tokens['app']}"})).json()

        first = await client.messages.with_raw_response.create(**HELLO)
        assert first.headers[f"{PREFIX}status"] == "allowed"
        await spend(NANO_PER_DOLLAR * 82 // 100)
        streamed = await client.messages.with_raw_response.create(**HELLO, stream=True)
        assert (streamed.headers[f"{PREFIX}status"], streamed.headers[f"{PREFIX}overage-utilization"]) == ("allowed_warning", "0.82")
        [event async for event in await streamed.parse()]
        counted = await client.messages.with_raw_response.count_tokens(model=HELLO["model"], messages=HELLO["messages"])
        assert f"{PREFIX}status" not in counted.headers
        assert (await stood())["limits"][0]["severity"] == "warning"
        with pytest.raises(anthropic.RateLimitError) as large:
            await client.messages.create(**HELLO, system="x" * 1_200_000)
        assert (large.value.response.headers["x-gateway-refusal"], f"{PREFIX}status" in large.value.response.headers) == (
            "quote_over_cap",
            False,
        )
        await spend(NANO_PER_DOLLAR * 20 // 100)
        with pytest.raises(anthropic.RateLimitError, match="cap for today of the app 'app'") as reached:
            await client.messages.create(**HELLO)
        assert reached.value.response.headers[f"{PREFIX}status"] == "rejected"
        other = await gw.client("free").messages.with_raw_response.create(**HELLO)
        assert f"{PREFIX}status" not in other.headers
