"""Where a call comes from, with proxies in front and without: nobody chooses an address of his own."""

from ipaddress import ip_network

import httpx2
import pytest
from gateway import APP, gateway

from gateway_addon.identity import tokens
from gateway_addon.identity.client_address import origin
from gateway_addon.identity.throttle import FAILURES_PER_MINUTE
from gateway_addon.policy import PolicyError, load
from gateway_addon.simulator import Simulator

PROXY, INNER = ["10.0.0.1/32"], ["10.0.0.0/8"]


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "found"),
    [
        ("192.0.2.7", [], [], "192.0.2.7"),
        ("192.0.2.7", ["198.51.100.1"], [], "192.0.2.7"),
        ("192.0.2.7", ["198.51.100.1"], PROXY, "192.0.2.7"),
        ("10.0.0.1", ["198.51.100.1"], PROXY, "198.51.100.1"),
        ("10.0.0.1", ["203.0.113.9, 198.51.100.1"], PROXY, "198.51.100.1"),
        ("10.0.0.1", ["203.0.113.9", "198.51.100.1"], PROXY, "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, 10.0.0.9"], INNER, "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, 10.0.0.9"], PROXY, "10.0.0.9"),
        ("10.0.0.1", ["10.0.0.8"], INNER, "10.0.0.8"),
        ("10.0.0.1", [], PROXY, "10.0.0.1"),
        ("10.0.0.1", ["unknown"], PROXY, "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, , "], PROXY, "10.0.0.1"),
        ("10.0.0.1", ["2001:db8::7"], PROXY, "2001:db8::7"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], PROXY, "198.51.100.1"),
        ("::ffff:192.0.2.7", [], [], "192.0.2.7"),
        ("", ["198.51.100.1"], PROXY, ""),
    ],
)
def test_forwarded_for_is_read_from_the_right_while_trusted(peer, forwarded, trusted, found):
    """Each entry is believed only while the proxy that wrote it is a trusted one."""
    headers = (("x-api-key", "t"), *(("x-forwarded-for", value) for value in forwarded))
    assert origin(peer, headers, [ip_network(each) for each in trusted]) == found


@pytest.mark.parametrize(("everybody"), ["0.0.0.0/0", "::/0"])
def test_trusting_everybody_is_refused(tmp_path, everybody):
    (tmp_path / "gateway.yaml").write_text(f"trusted_proxies: ['{everybody}']\n")
    with pytest.raises(PolicyError, match=r"gateway.yaml:1: trusted_proxies: .* is everybody"):
        load(tmp_path)


BOUND = {"app": APP + "addresses: [198.51.100.0/24]\n"}
TRUSTING = "trusted_proxies: [127.0.0.1/32]\n"


async def models(gw, token, **headers):
    async with httpx2.AsyncClient(base_url=gw.url) as http:
        return await http.get("/v1/models", headers={"x-api-key": token, **headers})


async def test_address_rules_hold_behind_a_trusted_proxy(tmp_path):
    """The proxy's header does not leave for the API."""
    async with Simulator() as api, gateway(tmp_path, api, BOUND, TRUSTING) as gw:
        token = gw.tokens["app"]
        assert (await models(gw, token, **{"x-forwarded-for": "203.0.113.9, 198.51.100.4"})).status_code == 200
        refused = await models(gw, token, **{"x-forwarded-for": "198.51.100.4, 203.0.113.9"})
        assert (refused.status_code, refused.headers["x-gateway-refusal"]) == (401, "token_address")
        assert "may not call from 203.0.113.9 " in refused.json()["error"]["message"]
        [row] = (await api.settled()).all()
        assert "x-forwarded-for" not in dict(row.headers), "where a call came from is not the provider's to know"


async def test_an_untrusted_forwarded_for_is_ignored_with_a_way_out(tmp_path):
    """The refusal's sentence says how to name a trusted proxy."""
    async with Simulator() as api, gateway(tmp_path, api, BOUND) as gw:
        refused = await models(gw, gw.tokens["app"], **{"x-forwarded-for": "198.51.100.4"})
        assert refused.headers["x-gateway-refusal"] == "token_address"
        assert "may not call from 127.0.0.1 " in refused.json()["error"]["message"]
        assert "(trusted_proxies)" in refused.json()["error"]["message"]
        assert "(trusted_proxies)" not in (await models(gw, gw.tokens["app"])).json()["error"]["message"]


async def test_noise_behind_a_proxy_is_counted_by_caller(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, policy=TRUSTING) as gw, httpx2.AsyncClient(base_url=gw.url) as http:
        wrong = {"x-api-key": tokens.mint()}
        refused = [
            await http.get("/v1/models", headers=wrong | {"x-forwarded-for": "198.51.100.4"}) for _ in range(2 * FAILURES_PER_MINUTE + 2)
        ]
        throttled = [each for each in refused if each.headers["x-gateway-refusal"] == "token_noise"]  # a minute may end in between
        assert "198.51.100.4 has sent more than" in throttled[-1].json()["error"]["message"]
        other = await http.get("/v1/models", headers=wrong | {"x-forwarded-for": "198.51.100.5"})
        assert other.headers["x-gateway-refusal"] == "token_unknown"
