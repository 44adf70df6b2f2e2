"""The official SDKs' `tool_runner`, which asks for a thread unless it is told that there is none."""

import asyncio
import json
import os
import subprocess

import anthropic
import pytest
from anthropic import beta_async_tool
from gateway import FIRST, gateway

from gateway_addon.simulator import Simulator

ASK = 'What is the weather? simulate: {"tool_use": true}'


@beta_async_tool
async def weather(city: str = "here") -> str:
    """Tell the weather of a city."""
    return "sunny"


async def refusals(gw):
    await gw.quiet()
    return await gw.gateway.ledger.change(lambda db: db.execute("SELECT state, refusal FROM calls ORDER BY started_at").fetchall())


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streaming"])
async def test_the_runner_goes_on_without_a_thread(tmp_path, stream):
    """The first request is refused with the details that the runner looks for; the rest of the conversation is sent whole."""
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as gw:
        runner = gw.client().beta.messages.tool_runner(
            model="claude-sonnet-5", max_tokens=1000, tools=[weather], messages=[{"role": "user", "content": ASK}], stream=stream
        )
        turns = []
        async for turn in runner:
            turns.append(await turn.get_final_message() if stream else turn)
        assert [turn.stop_reason for turn in turns] == ["tool_use", "end_turn"]
        assert await refusals(gw) == [("refused", "thread"), ("settled", None), ("settled", None)]
        assert len((await api.settled()).messages()) == 2


async def test_a_thread_asked_for_by_hand_is_refused_with_the_details(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as gw:
        with pytest.raises(anthropic.PermissionDeniedError, match="may not use thread") as raised:
            await gw.client().messages.create(
                model="claude-sonnet-5", max_tokens=10, messages=[{"role": "user", "content": "hi"}], extra_body={"thread": {"type": "create"}}
            )
        assert raised.value.body["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        assert api.book.bytes_received == 0


RUNNER = """
import Anthropic from "@anthropic-ai/sdk";
import { betaTool } from "@anthropic-ai/sdk/helpers/beta/json-schema";

const client = new Anthropic({ maxRetries: 0 });
const inputSchema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = betaTool({ name: "weather", description: "Tells the weather of a city.", inputSchema, run: () => "sunny" });
for (const stream of [false, true]) {
  const messages = [{ role: "user", content: process.argv[2] }];
  const runner = client.beta.messages.toolRunner({ model: "claude-sonnet-5", max_tokens: 1000, tools: [weather], messages, stream });
  const turns = [];
  for await (const turn of runner) turns.push((stream ? await turn.finalMessage() : turn).stop_reason);
  console.log(JSON.stringify(turns));
}
"""


@pytest.mark.npm
async def test_the_typescript_runner_goes_on_without_a_thread(tmp_path):
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "@anthropic-ai/sdk@1"]
    await asyncio.to_thread(subprocess.run, install, cwd=tmp_path, check=True, capture_output=True, timeout=90)
    (tmp_path / "app.mjs").write_text(RUNNER)
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as gw:
        private = {"PATH": os.environ["PATH"], "ANTHROPIC_BASE_URL": gw.url, "ANTHROPIC_API_KEY": gw.tokens["app"]}
        done = await asyncio.to_thread(subprocess.run, ["node", "app.mjs", ASK], cwd=tmp_path, env=private, capture_output=True, text=True, timeout=60)
        assert [json.loads(line) for line in done.stdout.splitlines()] == [["tool_use", "end_turn"]] * 2, done.stderr
        assert (await refusals(gw)).count(("refused", "thread")) == 2
