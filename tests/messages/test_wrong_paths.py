"""A base URL with a path too many or too few, another API's path, a browser: each is told where it should have gone."""

import json
from unittest import mock

import anthropic
import pytest
from gateway import gateway
from rawhttp import send, split_answer

from gateway_addon.messages import request
from gateway_addon.messages.wrong_paths import SEGMENTS_MAX, refusal
from gateway_addon.simulator import Simulator

HERE = "http://127.0.0.1:8080"
PLAIN, WITH_V1 = f"{HERE} (", f"{HERE}/v1."


def sentence(method, target, address=HERE):
    found = refusal(method, target, address)
    return found and found.sentence


@pytest.mark.parametrize(
    ("method", "target", "served", "base"),
    [
        ("POST", "/v1/v1/messages", "/v1/messages", PLAIN),
        ("POST", "/v1/v1/messages?beta=true", "/v1/messages", PLAIN),
        ("POST", "/anthropic/v1/messages", "/v1/messages", PLAIN),
        ("POST", "/v1/messages/", "/v1/messages", PLAIN),
        ("POST", "//v1/messages", "/v1/messages", PLAIN),
        ("POST", "/v1/messages/v1/messages", "/v1/messages", PLAIN),
        ("POST", "/messages", "/v1/messages", WITH_V1),
        ("POST", "/anthropic/messages", "/v1/messages", WITH_V1),
        ("POST", "/messages/count_tokens", "/v1/messages/count_tokens", WITH_V1),
        ("POST", "/v1/v1/messages/batches", "/v1/messages/batches", PLAIN),
        ("GET", "/models?limit=1", "/v1/models", WITH_V1),
        ("GET", "/api/v1/models/claude-haiku-4-5", "/v1/models/claude-haiku-4-5", PLAIN),
        ("GET", "/v1/v1/messages/batches/msgbatch_01Ab/results", "/v1/messages/batches/msgbatch_01Ab/results", PLAIN),
    ],
)
def test_a_wrong_base_url_is_answered_with_the_right_one(method, target, served, base):
    refusal = sentence(method, target)
    assert f"is not served here, {method} {served} is; set the client's base URL to {base}" in refusal
    assert refusal.startswith(f"{method} {target.partition('?')[0]} ")


@pytest.mark.parametrize(
    "labels", ["/l/branch=", "/l/", "/l/branch=%zz", "/l/branch%3Da", "/l/branch=a%2Cclient=beta", "/l/branch=a/l/client=acme", "/l/Branch=a", "/l"]
)
def test_labels_in_a_path_that_cannot_be_read_are_said_so(labels):
    refusal = sentence("POST", f"{labels}/v1/messages")
    assert "its labels cannot be read: write them once, as /l/client=acme,branch=main/v1/messages" in refusal


def test_a_client_that_appends_less_gets_its_base_url_too():
    assert sentence("POST", "/v1/v1/messages").endswith("http://127.0.0.1:8080 (http://127.0.0.1:8080/v1 for a client that appends only /messages).")


def test_behind_a_proxy_the_base_url_comes_without_an_address():
    assert sentence("POST", "/messages", "").endswith("set the client's base URL to the gateway's address followed by /v1.")


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/chat/completions", "/v1/responses", "/openai/v1/embeddings", "/v1/completions/"])
def test_an_openai_path_is_answered_with_clients_that_fit(target):
    refusal = sentence("POST", target)
    assert "this gateway speaks the Messages API of Claude (POST /v1/messages), not the API of OpenAI" in refusal
    assert "Anthropic's SDK or LiteLLM" in refusal


@pytest.mark.parametrize(("method", "target"), [("GET", "/v1/messages"), ("POST", "/v1/agents"), ("POST", "/"), ("GET", "/v1/models/../x"), ("PUT", "/messages")])
def test_a_path_that_is_like_none_gets_the_general_sentence(method, target):
    assert sentence(method, target) is None


def test_the_work_for_a_path_is_bounded_by_its_segments():
    with mock.patch.object(request, "endpoint_of", wraps=request.endpoint_of) as asked:
        assert sentence("POST", "/v1/a" * 20_000) is None
    assert asked.call_count <= 2 * SEGMENTS_MAX


async def test_the_sdk_with_a_wrong_base_url_shows_the_right_one(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        client = gw.client(base_url=f"{gw.url}/v1")
        with pytest.raises(anthropic.PermissionDeniedError, match=f"set the client's base URL to {gw.url} ") as raised:
            await client.messages.create(model="claude-haiku-4-5", max_tokens=10, messages=[{"role": "user", "content": "hi"}])
        assert raised.value.response.headers["x-gateway-refusal"] == "endpoint"
        assert api.book.bytes_received == 0


async def test_a_browser_reads_why_pages_hold_no_tokens(tmp_path):
    """A preflight carries no token; many of them are throttled like other requests without one."""
    ask = b"OPTIONS /v1/messages HTTP/1.1\r\nhost: x\r\norigin: https://page.example\r\naccess-control-request-method: POST\r\n\r\n"
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        status, headers, body = split_answer(await send(gw, ask))
        error = json.loads(body)["error"]
        assert (status, headers["x-gateway-refusal"], "access-control-allow-origin" in headers) == (403, "browser", False)
        assert "can read the token in it" in error["message"]
        assert "a server of your own" in error["message"]
        for _ in range(60):
            status, headers, _ = split_answer(await send(gw, ask))
        assert (status, headers["x-gateway-refusal"]) == (429, "token_noise")


async def test_an_offer_of_http2_in_clear_is_ignored(tmp_path):
    """Java's HttpClient makes it with each first call; whoever does not take it up answers as if it were not there (RFC 9110, 7.8)."""
    body = json.dumps({"model": "claude-haiku-4-5", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]}).encode()
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        head = (
            "POST /v1/messages HTTP/1.1", "host: x", f"x-api-key: {gw.tokens['app']}", "anthropic-version: 2023-06-01", f"content-length: {len(body)}",
            "content-type: application/json", "connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA",
        )  # fmt: skip
        status, headers, _ = split_answer(await send(gw, "\r\n".join(head).encode() + b"\r\n\r\n" + body))
        assert (status, "upgrade" in headers) == (200, False)
        [row] = (await api.settled()).messages()
        assert {"upgrade", "http2-settings"}.isdisjoint(name for name, _ in row.headers)
