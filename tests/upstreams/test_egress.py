"""The way to the upstream: a company's proxy and its authority, for an app's calls and for the gateway's own questions alike."""

import asyncio
from types import SimpleNamespace

import anthropic
import pytest
from gateway import APP, gateway, write_policies
from ledgers import new_file
from mitmproxy import options
from sealed import sealed
from tunnel import PASSWORD, proxy

from gateway_addon.policy import PolicyError, load
from gateway_addon.policy.model import EgressPolicy
from gateway_addon.proxy.server import assembled, hardened
from gateway_addon.simulator import KEY, Behaviour
from gateway_addon.upstreams.client import ask
from gateway_addon.upstreams.egress import egress

HELLO = {"model": "claude-haiku-4-5", "max_tokens": 40, "messages": [{"role": "user", "content": "Say hello."}]}
def status(upstream, way) -> int:
    with ask(upstream, "/v1/models", KEY, way) as answer:
        return answer.status


async def test_calls_and_own_questions_go_through_the_proxy(tmp_path, monkeypatch, caplog):
    async with sealed(tmp_path) as far, proxy() as (at, heads, passed):
        monkeypatch.setenv("COMPANY_PROXY", f"http://user:{PASSWORD}@{at}")
        way_out = f"egress: {{proxy: {{env: COMPANY_PROXY}}, ca: {far.ca}}}\ntimeouts: {{first_byte: 500ms}}"
        async with gateway(tmp_path, far.api, policy=way_out, upstream=far.url) as gw:
            client = gw.client()
            for _ in range(2):
                assert (await client.messages.create(**HELLO)).content
            assert len(heads) == 1, "one tunnel for one client's connection"
            far.api.behaviour = Behaviour(delay_ms=5_000)
            with pytest.raises(anthropic.APIStatusError) as cut:
                await client.messages.create(**HELLO)
            assert cut.value.status_code == 504, "a call in a tunnel that is used again can be cut"
            far.api.behaviour = Behaviour()
            way = gw.addon.egress
            assert await asyncio.to_thread(status, far.url, way) == 200
        assert [head.split()[:2] for head in heads] == [["CONNECT", far.url.removeprefix("https://")]] * len(heads)
        assert len(heads) == 2
        assert KEY.encode() not in passed, "the key is inside TLS"
        assert PASSWORD not in f"{way!r} {way} {caplog.text}"


async def test_a_refusing_proxy_and_an_unknown_authority_are_sentences(tmp_path):
    async with sealed(tmp_path) as far, proxy() as (at, _, _):
        for name, way_out, said in (
            ("refused", f"egress: {{proxy: 'http://{at}', ca: {far.ca}}}", "refused HTTP CONNECT request: 407"),
            ("unknown", "", "egress.ca"),
        ):
            (folder := tmp_path / name).mkdir()
            async with gateway(folder, far.api, policy=way_out, upstream=far.url) as gw:
                with pytest.raises(anthropic.APIStatusError, match=said) as refused:
                    await gw.client().messages.create(**HELLO)
                assert refused.value.response.headers["x-gateway-refusal"] == "upstream_unreachable"
                await gw.quiet()
                assert (await gw.spent_nano(), await gw.held_nano()) == (0, 0)
        assert far.api.book.requests == 0


PROXY = ("proxy.corp", 3128)
WAYS = [
    # (environment, upstream's host, the proxy taken, or words of the error)
    ({}, "api.anthropic.com", None),
    ({"HTTPS_PROXY": "http://proxy.corp:3128"}, "api.anthropic.com", PROXY),
    ({"https_proxy": "proxy.corp:3128"}, "api.anthropic.com", PROXY),
    ({"HTTPS_PROXY": "http://proxy.corp"}, "api.anthropic.com", ("proxy.corp", 80)),
    ({"HTTP_PROXY": "http://proxy.corp:3128"}, "api.anthropic.com", None),
    ({"ALL_PROXY": "http://proxy.corp:3128"}, "api.anthropic.com", PROXY),
    ({"ALL_PROXY": f"socks5://user:{PASSWORD}@proxy.corp:1080"}, "api.anthropic.com", "ALL_PROXY names a proxy of the kind socks5"),
    ({"HTTPS_PROXY": f"http://user:{PASSWORD}@proxy.corp:port"}, "api.anthropic.com", "HTTPS_PROXY names a proxy"),
    ({"HTTPS_PROXY": "http://proxy.corp:3128", "NO_PROXY": "*"}, "api.anthropic.com", None),
    ({"HTTPS_PROXY": "http://proxy.corp:3128", "NO_PROXY": "localhost, .anthropic.com"}, "api.anthropic.com", None),
    ({"HTTPS_PROXY": "http://proxy.corp:3128", "no_proxy": "anthropic.com:443"}, "api.anthropic.com", None),
    ({"HTTPS_PROXY": "http://proxy.corp:3128", "NO_PROXY": "anthropic.com:8443,thropic.com,,"}, "api.anthropic.com", PROXY),
    ({"HTTPS_PROXY": "http://127.0.0.1:9", "GATEWAY_LOCAL_UPSTREAM": "api.anthropic.com:443"}, "api.anthropic.com", None),
    ({"SSL_CERT_FILE": "/no/such/file"}, "api.anthropic.com", "SSL_CERT_FILE names /no/such/file"),
]


@pytest.mark.parametrize(("environment", "host", "wanted"), WAYS)
def test_the_environment_names_the_way_where_the_policy_does_not(environment, host, wanted):
    policy = SimpleNamespace(upstream=f"https://{host}", egress=EgressPolicy())
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted) as refused:
            egress(policy, environment)
        assert PASSWORD not in str(refused.value)
    else:
        assert egress(policy, environment).proxy == wanted
        plain = SimpleNamespace(upstream="http://127.0.0.1:1", egress=EgressPolicy())
        assert egress(plain, environment).proxy is None, "a simulation on this machine is reached straight"
        named = SimpleNamespace(upstream=policy.upstream, egress=EgressPolicy("http://other.corp:1"))
        assert egress(named, environment).proxy == ("other.corp", 1)


@pytest.mark.parametrize("value", [f"http://user:{PASSWORD}@proxy:1", "socks5://proxy:1", "proxy"])
def test_a_proxy_in_the_policy_is_an_address_without_a_password(tmp_path, value):
    policies = write_policies(tmp_path, "https://api.anthropic.com", {"app": APP}, f"egress: {{proxy: '{value}'}}")
    with pytest.raises(PolicyError, match=r"gateway\.yaml:\d+: egress\.proxy: ") as refused:
        load(policies)
    assert PASSWORD not in str(refused.value)


async def test_every_start_takes_the_policys_way_out(tmp_path, monkeypatch):
    """`serve`, and a person's own mitmdump, which builds its master by itself."""
    monkeypatch.setenv("SIMULATED_KEY", KEY)
    async with sealed(tmp_path) as far:
        way_out = f"egress: {{proxy: 'http://127.0.0.1:3128', ca: {far.ca}}}"
        policies = write_policies(tmp_path / "policies", far.url, {"app": APP}, way_out)
        async with assembled(policies, f"sqlite:///{new_file(tmp_path)}") as (policy, _, addon):
            assert addon.egress.proxy == ("127.0.0.1", 3128)
        assert hardened(options.Options(), policy, addon.egress)["ssl_verify_upstream_trusted_ca"] == str(far.ca)
