"""Real calls by the official SDK, through a real mitmproxy, to the simulated API."""

import asyncio
import hashlib
import json

import httpx2
import pytest
from gateway import gateway

from gateway_addon.simulator import KEY, Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("either_dispatch")  # what holds must hold when mitmproxy's internals have moved, too

HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize("model", ["claude-haiku-4-5", "claude-sonnet-5", "claude-opus-5-5"])
async def test_what_the_ledger_says_a_call_cost_is_what_the_api_billed(tmp_path, model, stream):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        client = gw.client()
        if stream:
            async with client.messages.stream(model=model, max_tokens=300, messages=HELLO) as answer:
                message = await answer.get_final_message()
        else:
            message = await client.messages.create(model=model, max_tokens=300, messages=HELLO)
        assert message.usage.output_tokens > 0
        await gw.quiet()
        assert (await gw.spent_nano(), await gw.held_nano()) == ((await api.settled()).billed_nano, 0)


async def test_the_sync_client_works_as_well(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        client = gw.sync_client()
        message = await asyncio.to_thread(client.messages.create, model="claude-haiku-4-5", max_tokens=50, messages=HELLO)
        assert message.content[0].text


async def test_upstream_gets_the_real_key_and_the_body_to_the_byte(tmp_path):
    """The upstream gets the real key alone, and the body to the byte."""
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        response = await gw.client().messages.with_raw_response.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO)
        sent = response.http_response.request.read()
        [row] = (await api.settled()).messages()
        assert (row.header("x-api-key"), row.header("authorization")) == (KEY, None)
        assert row.body_sha256 == hashlib.sha256(sent).hexdigest()
        assert row.header("accept-encoding") == "identity"


async def test_the_client_gets_the_upstreams_bytes_unchanged(tmp_path):
    async with Simulator(behaviour=Behaviour(ping_s=0.01, delay_ms=5)) as api, gateway(tmp_path, api) as gw:
        ask = gw.client().messages.with_streaming_response.create
        async with ask(model="claude-sonnet-5", max_tokens=200, messages=HELLO, stream=True) as answer:
            received = b"".join([chunk async for chunk in answer.iter_bytes()])
        [row] = (await api.settled()).messages()
        assert hashlib.sha256(received).hexdigest() == row.answer_sha256


async def test_first_event_arrives_while_the_upstream_still_sends(tmp_path):
    """The first event arrives while the upstream is still sending."""
    async with Simulator(behaviour=Behaviour(delay_ms=30, output_tokens=200)) as api, gateway(tmp_path, api) as gw:
        async with gw.client().messages.stream(model="claude-sonnet-5", max_tokens=400, messages=HELLO) as answer:
            async for event in answer:
                assert event.type == "message_start"
                assert api.book.in_flight == 1
                break


async def test_headers_about_the_shared_account_stay_inside(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        raw = await gw.client().messages.with_raw_response.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO)
        shown = [name for name in raw.headers if name.startswith("anthropic-")]
        assert all(name.startswith("anthropic-ratelimit-unified-") for name in shown), "the app's own caps alone"
        assert raw.headers["request-id"].startswith("req_")
        assert "cap=$100.00" in raw.headers["x-gateway-cap-day"]


async def test_an_app_learns_where_it_stands_and_nothing_of_others(tmp_path):
    apps = {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {request: $0.25, day: $2, month: $9}\n", "other": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $7}\n"}
    async with Simulator() as api, gateway(tmp_path, api, apps, "caps: {day: $40}\n") as gw, httpx2.AsyncClient(base_url=gw.url) as http:
        answered = await gw.client().messages.with_raw_response.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO)
        assert {name for name in answered.headers if name.startswith("x-gateway-cap-")} == {"x-gateway-cap-day", "x-gateway-cap-month"}
        assert answered.headers["x-gateway-cap-day"].startswith("spent=$0.00; held=$0.00")
        await gw.quiet()
        spent_nano = await gw.spent_nano()
        me = (await http.get("/gateway/me", headers={"x-api-key": gw.tokens["app"]})).json()
        assert (await http.get("/gateway/me")).status_code == 401
    assert (me["app"], me["models"], me["request_cap_nano"]) == ("app", ["claude-haiku-4-5"], 250_000_000)
    stands = {window["window"]: window for window in me["windows"]}
    assert (stands["day"]["cap"], stands["month"]["cap"], stands["week"]["cap"]) == ("$2.00", "$9.00", None)
    assert (stands["day"]["spent_nano"], stands["day"]["held_nano"], stands["day"]["free_nano"]) == (spent_nano, 0, 2_000_000_000 - spent_nano)
    assert stands["day"]["resets_at"] % 86_400 == 0
    assert (stands["month"]["forecast"], stands["month"]["forecast_days"], stands["month"]["cap_reached_on"]) == (None, 0, None)
    assert "other" not in json.dumps(me)


async def test_an_app_sees_only_the_models_it_may_use(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": "models: {allow: [claude-haiku-*]}\ncaps: unlimited\n"}) as gw:
        models = [model.id async for model in gw.client().models.list()]
        assert models == ["claude-haiku-5-5", "claude-haiku-4-5-20251001"]


async def test_counting_tokens_is_free_and_never_blocked_by_a_cap(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $0}\n"}) as gw:
        assert (await gw.client().messages.count_tokens(model="claude-haiku-4-5", messages=HELLO)).input_tokens > 0


async def test_ready_while_the_ledger_takes_writes_and_calls_pass(tmp_path, monkeypatch):
    """A gateway is ready while its ledger takes writes and it takes calls."""
    monkeypatch.setattr("gateway_addon.calls.gateway.READY_FOR_S", 0.0)
    async with Simulator() as api, gateway(tmp_path, api) as gw, httpx2.AsyncClient(base_url=gw.url) as http:

        async def asked(path):
            answer = await http.get(f"/gateway/{path}")
            return answer.status_code, answer.headers.get("x-gateway-refusal")

        assert await asked("readyz") == (200, None)
        (tmp_path / "gateway.db").rename(tmp_path / "elsewhere.db")
        assert await asked("readyz") == (503, "ledger")
        assert await asked("healthz") == (200, None), "the process itself lives"
        (tmp_path / "elsewhere.db").rename(tmp_path / "gateway.db")
        assert await asked("readyz") == (200, None)
        gw.addon.draining = True
        assert await asked("readyz") == (503, "draining")
    assert not api.book.all()


async def test_readiness_asks_the_ledger_once_a_second(tmp_path):
    """The ledger is asked once a second, however many ask whether the gateway is ready."""
    async with Simulator() as api, gateway(tmp_path, api) as gw, httpx2.AsyncClient(base_url=gw.url) as http:
        before = gw.gateway.ledger._writer._commits
        answers = [await http.get("/gateway/readyz") for _ in range(20)]
        assert {answer.status_code for answer in answers} == {200}
        assert gw.gateway.ledger._writer._commits - before <= 3
