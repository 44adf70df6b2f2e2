"""Only the request headers that the API knows leave, in the gateway's own framing, on every way out."""

import asyncio
import json
import logging

import pytest
from bypass import PLAIN
from gateway import APP, gateway, write_policies
from rawhttp import gateway_head as head
from rawhttp import send
from upstreams import answer, message, upstream

from gateway_addon.messages import header_filter
from gateway_addon.policy import PolicyError, load
from gateway_addon.proxy.fastpath import relay, whole

BODY = json.dumps(PLAIN).encode()
LEAVES = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "User-Agent": "Anthropic/Python 2.14.0",
    "anthropic-version": "2023-06-01",
    "Anthropic-Dangerous-Direct-Browser-Access": "true",
    "x-anthropic-billing-header": "x",
    "X-Stainless-Retry-Count": "0",
    "x-app": "cli",
    "x-claude-code-session-id": "s",
    "x-cc-atis": "a",
    "x-environment-runner": "e",
    "x-client-request-id": "c",
    "Idempotency-Key": "i",
}
STAYS = {
    "cookie": "session=secret",
    "forwarded": "for=10.0.0.1",
    "via": "1.1 office",
    "x-real-ip": "10.0.0.1",
    "x-forwarded-for": "10.0.0.1",
    "x-forwarded-client-cert": "Subject=me",
    "cf-connecting-ip": "10.0.0.1",
    "cdn-loop": "cloudflare",
    "true-client-ip": "10.0.0.1",
    "traceparent": "00-1-2-01",
    "authorization": "",
    "proxy-authorization": "Basic eDp5",
    "accept-encoding": "gzip",
    "keep-alive": "timeout=5",
    "te": "trailers",
    "http2-settings": "AAMAAABk",
    "anthropic_beta": "oauth-2025-04-20",
    "content-lengths": "3",
    "xanthropic-version": "x",
    "x-gateway-anything": "x",
}
FRAMINGS = {
    "whole": (f"content-length: {len(BODY)}", BODY),
    "kept alive": (f"connection: keep-alive\r\ncontent-length: {len(BODY)}", BODY),
    "closing": (f"connection: close, cookie\r\ncontent-length: {len(BODY)}", BODY),
    "chunked": ("transfer-encoding: chunked", b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (BODY[:5], len(BODY) - 5, BODY[5:])),
}


def sent(received: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """The first line, the headers by name as written, and the body of what an upstream got."""
    top, _, body = bytes(received).partition(b"\r\n\r\n")
    first, *lines = top.split(b"\r\n")
    assert len({line.partition(b":")[0].lower() for line in lines}) == len(lines), "each header once"
    return first, dict(line.decode().split(": ", 1) for line in lines), body


@pytest.mark.parametrize("known", [True, False], ids=["fast", "mitmproxy"])
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_only_headers_that_the_api_knows_leave_in_own_framing(tmp_path, monkeypatch, known, framing):
    monkeypatch.setattr(whole, "FITS", known)
    monkeypatch.setattr(relay, "FITS", known)
    length, body = FRAMINGS[framing]
    reply = answer(200, "application/json", message())
    async with upstream(reply, then="silent") as api, gateway(tmp_path, None, upstream=api.url) as gw:
        lines = [f"{name}: {value}" for name, value in (LEAVES | STAYS).items() if name != "authorization"]
        got = await send(gw, head(*lines, length, token=gw.tokens["app"]) + body)
        assert b" 200 " in got.split(b"\r\n")[0], got
        first, headers, content = sent(api.received)
    own = {"host": api.url.removeprefix("http://"), "accept-encoding": "identity", "content-length": str(len(BODY)), "x-api-key": headers["x-api-key"]}
    assert (first, headers, content) == (b"POST /v1/messages HTTP/1.1", LEAVES | own, BODY)
    assert headers["x-api-key"] != gw.tokens["app"]


async def test_a_request_without_a_body_states_no_length(tmp_path):
    reply = answer(200, "application/json", b'{"data": [], "has_more": false, "first_id": null, "last_id": null}')
    async with upstream(reply, then="silent") as api, gateway(tmp_path, None, upstream=api.url) as gw:
        await send(gw, head("cookie: a=b", token=gw.tokens["app"], line="GET /v1/models HTTP/1.1"))
        assert set(sent(api.received)[1]) == {"host", "accept-encoding", "x-api-key"}


async def test_the_policy_lets_a_header_leave_and_a_first_drop_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    reply = answer(200, "application/json", message())
    async with upstream(reply) as api, gateway(tmp_path, None, policy="pass_headers: [X-Trace]", upstream=api.url) as gw:
        for _ in range(2):
            request = head("X-TRACE: t", "cookie: a=b", f"content-length: {len(BODY)}", token=gw.tokens["app"]) + BODY
            await send(gw, request)
        assert api.received.lower().count(b"x-trace: t") == 2
        assert b"cookie" not in api.received
        warnings = [record.getMessage() for record in caplog.records if "is not sent on" in record.getMessage()]
        assert [("cookie" in line, "pass_headers: [cookie]" in line) for line in warnings] == [(True, True)]
        gw.addon._log_drops("app", [b"x-%d" % each for each in range(3_000)])
        assert len(gw.addon.logged_drops) == 1_000, "an app that makes names up does not fill the log, nor the memory"


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "content-length", "connection", "X-Gateway-Label-Client", "not a name", "x:y"])
def test_a_header_that_the_gateway_writes_cannot_be_passed(tmp_path, name):
    policies = write_policies(tmp_path, "https://api.anthropic.com", {"app": APP}, f"pass_headers: ['{name}']")
    with pytest.raises(PolicyError, match=r"gateway\.yaml:\d+: pass_headers: "):
        load(policies)


BETAS = {
    "oauth-2025-04-20": None,
    "oidc-federation-2026-04-01, OAuth-x": None,
    "claude-code-20250219,oauth-2025-04-20,context-1m": "claude-code-20250219,context-1m",
    "a, oidc-b ,c": "a,c",
    "not-oauth-": "not-oauth-",
    "": "",
}


@pytest.mark.parametrize(("value", "left"), BETAS.items())
def test_betas_of_a_credential_stay_with_it(value, left):
    fields = ((b"Anthropic-Beta", value.encode()), (b"accept", b"oauth-"))
    wanted = () if left is None else ((b"Anthropic-Beta", left.encode()),)
    kept = header_filter.without_credential_betas(fields)
    assert tuple((name, value.replace(b", ", b",")) for name, value in kept) == (*wanted, (b"accept", b"oauth-"))


async def test_a_beta_of_a_credential_is_neither_judged_nor_sent(tmp_path):
    strict = APP + "betas: {allow: [claude-code-*]}\n"
    reply = answer(200, "application/json", message())
    async with upstream(reply) as api, gateway(tmp_path, None, {"app": strict}, upstream=api.url) as gw:
        lines = ("anthropic-beta: claude-code-1,oauth-2025-04-20", f"content-length: {len(BODY)}")
        assert b" 200 " in (await send(gw, head(*lines, token=gw.tokens["app"]) + BODY)).split(b"\r\n")[0]
        assert sent(api.received)[1]["anthropic-beta"] == "claude-code-1"


@pytest.mark.parametrize("name", ["anthropic-workspace-id", "anthropic-user-profile-id"])
@pytest.mark.parametrize("line", ["POST /v1/messages HTTP/1.1", "GET /v1/models HTTP/1.1", "GET /v1/models/claude-haiku-4-5 HTTP/1.1"])
async def test_who_pays_is_chosen_by_those_alone_who_may(tmp_path, name, line):
    """Whichever endpoint the header goes to: a list of models may be free, and is the workspace's business all the same."""
    body = BODY if line.startswith("POST") else b""
    allowed = APP + "features: {workspace: true, user_profile: true}\n"
    reply = answer(200, "application/json", message())
    async with upstream(reply) as api, gateway(tmp_path, None, {"app": APP, "payer": allowed}, upstream=api.url) as gw:
        answers = [await send(gw, head(f"{name}: w", f"content-length: {len(body)}", token=gw.tokens[app], line=line) + body) for app in ("app", "payer")]
        assert answers[0].startswith(b"HTTP/1.1 403"), answers[0]
        await asyncio.sleep(0)
        assert api.received.count(f"{name}: w".encode()) == 1
