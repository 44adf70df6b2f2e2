"""The real Claude Code, installed from npm, through the gateway to the simulated API."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import claude_code
import pytest
from gateway import gateway
from upstreams import served

from gateway_addon.ledger import admin
from gateway_addon.ledger.reports.sessions import AgentLine, tree
from gateway_addon.money import NANO_PER_DOLLAR
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = [pytest.mark.npm, pytest.mark.clients]

SHIPPED = (Path(__file__).parents[2] / "policies" / "examples" / "apps" / "claude-code.yaml").read_text()
SESSIONS = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")


def shipped(caps: str) -> str:
    """The policy for Claude Code that the project ships, with other caps."""
    return SHIPPED.replace("caps: {day: $20, month: $200}", f"caps: {caps}")


async def ask(gw, home, prompt, *options):
    """Ask Claude Code once, through the gateway: its exit code and all that it printed."""
    way = {"ANTHROPIC_BASE_URL": gw.url, "ANTHROPIC_AUTH_TOKEN": gw.tokens["app"], "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    return await claude_code.ask(home, prompt, *options, **way)


async def calls(gw, columns):
    await gw.quiet()
    return await gw.gateway.ledger.change(lambda db: db.execute(f"SELECT {columns} FROM calls ORDER BY id").fetchall())


async def test_it_works_and_is_attributed_to_its_session(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": SHIPPED}) as gw:
        code, printed = await ask(gw, tmp_path / "home", "Say hello.", "--session-id", SESSIONS[0], "--output-format", "json")
        assert code == 0, printed
        said = json.loads(printed)
        assert not said["is_error"], printed
        rows = await calls(gw, "state, session_id, stream, max_tokens")
        assert rows == [("settled", SESSIONS[0], 1, 128000)], rows
        assert (await gw.spent_nano(), await gw.held_nano()) == ((await api.settled()).billed_nano, 0)


async def test_a_reached_cap_is_shown_as_a_sentence_and_asked_once(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": shipped("{day: $5}")}) as gw:
        assert (await ask(gw, tmp_path / "home", "Say hello."))[0] == 0
        [(call_id,)] = await calls(gw, "id")
        await gw.gateway.ledger.change(lambda db: admin.adjust(db, call_id, 5 * NANO_PER_DOLLAR, who="test", why="spent", now=time.time()))
        code, printed = await ask(gw, tmp_path / "home", "Say hello.")
        assert code != 0
        assert "The cap for today of the app 'app' is used up" in printed, printed
        assert [refusal for (refusal,) in await calls(gw, "refusal")] == [None, "cap_spent"]
        assert len((await api.settled()).messages()) == 1


async def test_a_model_that_is_not_allowed_is_said_in_a_sentence(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": SHIPPED}) as gw:
        code, printed = await ask(gw, tmp_path / "home", "Say hello.", "--model", "claude-fable-5-2")
        assert code != 0
        assert "claude-fable-5-2" in printed


async def test_four_at_once_work_under_a_cap_of_five_dollars_a_day(tmp_path):
    async with Simulator(behaviour=Behaviour(tokens_per_s=80, output_tokens=400)) as api, gateway(tmp_path, api, {"app": shipped("{day: $5}")}) as gw:
        answers = await asyncio.gather(*(ask(gw, tmp_path / f"home{number}", "Write a poem.") for number in range(4)))
        assert [code for code, _ in answers] == [0] * 4, answers
        rows = await calls(gw, "state, complete, refusal, flags")
        assert [row[:3] for row in rows] == [("settled", 1, None)] * 4, rows
        assert await gw.spent_nano() == (await api.settled()).billed_nano


def calling(tool: str, given: dict[str, str]) -> str:
    """A prompt to which the simulated API answers with a call of this tool."""
    return f"Go on. simulate: {json.dumps({'tool_name': tool, 'tool_input': given, 'output_tokens': 60})}"


async def test_a_web_search_is_allowed_and_booked(tmp_path):
    """Claude Code searches by a call of its own, with the provider's tool; two searches are billed."""
    query = 'cats simulate: {"web_searches": 2}'
    async with Simulator() as api, gateway(tmp_path, api, {"app": SHIPPED}) as gw:
        code, printed = await ask(gw, tmp_path / "home", calling("WebSearch", {"query": query}), "--tools", "WebSearch", "--allowedTools", "WebSearch")
        assert code == 0, printed
        searched = [row for row in (await api.settled()).messages() if row.usage.web_searches]
        assert [row.usage.web_searches for row in searched] == [2], printed
        assert {row[:2] for row in await calls(gw, "state, refusal")} == {("settled", None)}
        assert await gw.spent_nano() == (await api.settled()).billed_nano


async def test_a_subagents_calls_are_the_sessions_and_its_own(tmp_path):
    told = {"description": "Say hello", "prompt": "Say hello.", "subagent_type": "general-purpose"}
    async with Simulator() as api, gateway(tmp_path, api, {"app": SHIPPED}) as gw:
        options = ("--tools", "Agent", "--session-id", SESSIONS[1])
        code, printed = await ask(gw, tmp_path / "home", calling("Agent", told), *options)
        assert code == 0, printed
        rows = await calls(gw, "state, session_id, agent_id")
        assert {row[:2] for row in rows} == {("settled", SESSIONS[1])}
        assert len({agent for _, _, agent in rows if agent}) == 1, rows
        assert await gw.spent_nano() == (await api.settled()).billed_nano


def streamed(blocks):
    """An answer of the API as a stream: texts, and calls of tools (name, input)."""
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-opus-5-5", "content": [], "stop_reason": None}
    events = [{"type": "message_start", "message": message | {"usage": {"input_tokens": 10_000, "output_tokens": 1}}}]
    for at, block in enumerate(blocks):
        opening = {"type": "text", "text": ""} if isinstance(block, str) else {"type": "tool_use", "id": f"toolu_{at}", "name": block[0], "input": {}}
        text = {"type": "text_delta", "text": block} if isinstance(block, str) else {"type": "input_json_delta", "partial_json": json.dumps(block[1])}
        events += [{"type": "content_block_start", "index": at, "content_block": opening}, {"type": "content_block_delta", "index": at, "delta": text}]
        events.append({"type": "content_block_stop", "index": at})
    reason = "end_turn" if isinstance(blocks[-1], str) else "tool_use"
    events += [{"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 50}}, {"type": "message_stop"}]
    body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def agents_answer(asked):
    """The main agent starts two, the first of which starts a third; each then says that it is done."""
    text, first = json.dumps(asked["messages"]), len(asked["messages"]) <= 2
    if first and "MAIN" in text:
        return [("Agent", {"description": "d", "prompt": f"FIRST{number}", "subagent_type": "general-purpose"}) for number in (1, 2)]
    if first and "FIRST1" in text:
        return [("Agent", {"description": "d", "prompt": "SECOND", "subagent_type": "general-purpose"})]
    return ["done"]


async def agents(reader, writer):
    """An API whose main agent starts others (`agents_answer`)."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            writer.write(streamed(agents_answer(json.loads(await reader.readexactly(length)))))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def test_a_run_is_billed_with_subagents_and_stops_at_its_cap(tmp_path):
    """`gateway run -- claude`: its subagents spend in its session, each stands below the one that started it, and a cap ends all of it."""
    home = tmp_path / "home"
    home.mkdir()
    async with served(agents, set()) as address, gateway(tmp_path, None, {"app": SHIPPED}, upstream=address) as gw:
        where = {"GATEWAY_POLICIES": f"{tmp_path}/policies", "GATEWAY_LEDGER": f"sqlite:///{tmp_path}/gateway.db", "GATEWAY_LISTEN": gw.url[7:]}
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", **where}

        async def run(cap):
            line = [sys.executable, "-m", "gateway_addon", "run", "--json", "--cap", cap, "--", claude_code.installed(), "-p", "MAIN"]
            process = await asyncio.create_subprocess_exec(
                *line, cwd=Path(__file__).parents[2], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )  # fmt: skip
            printed, _ = await asyncio.wait_for(process.communicate(), 120)
            return process.returncode, json.loads(printed.decode().splitlines()[-1])

        code, bill = await run("$5")
        rows = await calls(gw, "session_id, agent_id, parent_agent_id, state")
        shown = list(tree([AgentLine(**line) for line in bill["by_agent"]]))
        assert (code, bill["cut"], len({session for session, *_ in rows})) == (0, False, 1), rows
        assert [depth for depth, *_ in shown] in ([0, 1, 2, 1], [0, 1, 1, 2]), rows
        assert bill["spent_nano"] == await gw.spent_nano() == sum(line["spent_nano"] for line in bill["by_agent"]) > 0
        code, bill = await run("$0.10")
        assert (code, bill["cut"]) == (3, True)
        assert bill["spent_nano"] <= bill["cap_nano"]
