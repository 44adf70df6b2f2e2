"""Real clients, their defaults untouched, through a real gateway under the policy that `gateway init --yes` writes.

`./run.sh test -m clients`: minutes, and a first time more, since each client is installed. It renews the requests that
test_first_requests.py replays.
"""

import datetime

import pytest
from client_tier import CLIENTS, Client, keep, recorder, run
from gateway import FIRST, gateway

from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.clients

POOR = FIRST.replace("day: $2, month: $20", "day: $0.0001")
WITH_BATCHES = FIRST + "endpoints: [messages, count_tokens, models, batches]\n"
TOOLS = 'What is the weather? simulate: {"tool_use": true, "output_tokens": 60}'
LONG = 'Tell a long story. simulate: {"output_tokens": 10000, "tokens_per_s": 300, "tokens_per_event": 50}'


async def rows(gw, columns="app, state, refusal"):
    await gw.quiet()
    return await gw.gateway.ledger.change(lambda db: db.execute(f"SELECT {columns} FROM calls ORDER BY started_at").fetchall())


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
async def test_a_clients_calls_work_and_what_is_refused_is_said(tmp_path, client):
    """First call, stream, tools, 10,000 tokens; then a model that is not allowed and a cap that is reached, as its user reads them."""
    async with Simulator(behaviour=Behaviour(output_tokens=40)) as api, gateway(tmp_path, api, {"app": WITH_BATCHES, "poor": POOR}) as gw:
        async with recorder(gw.url) as recording:
            first = await run(client, tmp_path / "first", recording.url, gw.tokens["app"], "call", "Say hello.")
            assert (first.code, bool(first.printed.strip())) == (0, True), first.everything
            request = recording.first()
            keep(client, request, datetime.date.today().isoformat())
        for scene in client.scenes[1:]:
            ran = await run(client, tmp_path / scene, gw.url, gw.tokens["app"], scene, TOOLS if scene == "tools" else "Say hello.")
            assert (ran.code, bool(ran.printed.strip())) == (0, True), (scene, ran.everything)
        scene = "stream" if "stream" in client.scenes else "call"
        long = await run(client, tmp_path / "long", gw.url, gw.tokens["app"], scene, LONG)
        assert long.code == 0, long.everything
        tokens = min(10_000, request["body"]["max_tokens"])
        assert len(long.printed) > tokens, "so many tokens are more characters"
        called = await rows(gw)
        assert {app for app, *_ in called} == {"app"}
        assert {(state, refusal) for _, state, refusal in called} <= {("settled", None), ("free", None), ("refused", "thread")}
        billed = (await api.settled()).billed_nano
        assert await gw.spent_nano() == billed > 0

        denied = await run(client, tmp_path / "denied", gw.url, gw.tokens["app"], "call", "Say hello.", model="claude-opus-5-5")
        assert "may not use claude-opus-5-5; allowed: claude-haiku-4-5, claude-sonnet-5" in denied.everything, denied.everything
        broke = await run(client, tmp_path / "poor", gw.url, gw.tokens["poor"], "call", "Say hello.")
        assert "more than the cap for today of app poor" in broke.everything, broke.everything
        assert (await api.settled()).billed_nano == billed, "nothing of it reached the API"


async def test_a_client_of_another_api_is_told_what_to_use_instead(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as gw:
        ran = await run(Client("openai", None), tmp_path / "openai", gw.url, gw.tokens["app"], "call", "Say hello.")
        assert ran.code != 0
        assert "this gateway speaks the Messages API of Claude" in ran.everything
        assert "Anthropic's SDK or LiteLLM with anthropic/MODEL" in ran.everything
        assert await rows(gw) == [("app", "refused", "endpoint")]
        assert api.book.bytes_received == 0
