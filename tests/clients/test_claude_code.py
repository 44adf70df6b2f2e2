"""The real Claude Code, installed from npm, through the gateway to the simulated API."""

import asyncio
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from gateway import gateway

from gateway_addon.ledger import admin
from gateway_addon.money import NANO_PER_DOLLAR
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.npm

PACKAGE = "@anthropic-ai/claude-code@2.1.330"
SHIPPED = (Path(__file__).parents[2] / "policies" / "examples" / "apps" / "claude-code.yaml").read_text()
SESSIONS = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")


def shipped(caps: str) -> str:
    """The policy for Claude Code that the project ships, with other caps."""
    return SHIPPED.replace("caps: {day: $20, month: $200}", f"caps: {caps}")


@pytest.fixture(scope="session")
def claude(tmp_path_factory):
    folder = tmp_path_factory.mktemp("npm")
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", folder, PACKAGE], check=True, capture_output=True, timeout=300)
    return folder / "node_modules" / ".bin" / "claude"


async def ask(claude, home, gw, prompt, *options, **environment):
    """Run `claude -p`; its exit code and all that it printed."""
    home.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        claude, "-p", prompt, *options, cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={
            "PATH": os.environ["PATH"], "HOME": str(home), "ANTHROPIC_BASE_URL": gw.url, "ANTHROPIC_AUTH_TOKEN": gw.tokens["app"],
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", **environment,
        },
    )  # fmt: skip
    printed, _ = await asyncio.wait_for(process.communicate(), 90)
    return process.returncode, printed.decode()


async def calls(gw, columns):
    await gw.quiet()
    return await gw.gateway.ledger.change(lambda db: db.execute(f"SELECT {columns} FROM calls ORDER BY id").fetchall())


async def test_it_works_and_is_attributed_to_its_session(tmp_path, claude):
    async with Simulator() as api, gateway(tmp_path, api, {"app": SHIPPED}) as gw:
        code, printed = await ask(claude, tmp_path / "home", gw, "Say hello.", "--session-id", SESSIONS[0], "--output-format", "json")
        assert code == 0, printed
        said = json.loads(printed)
        assert not said["is_error"], printed
        rows = await calls(gw, "state, session_id, stream, max_tokens")
        assert rows == [("settled", SESSIONS[0], 1, 128000)], rows
        assert (await gw.spent_nano(), await gw.held_nano()) == ((await api.settled()).billed_nano, 0)


async def test_a_reached_cap_is_shown_as_a_sentence_and_asked_once(tmp_path, claude):
    async with Simulator() as api, gateway(tmp_path, api, {"app": shipped("{day: $5}")}) as gw:
        assert (await ask(claude, tmp_path / "home", gw, "Say hello."))[0] == 0
        [(call_id,)] = await calls(gw, "id")
        await gw.gateway.ledger.change(lambda db: admin.adjust(db, call_id, 5 * NANO_PER_DOLLAR, who="test", why="spent", now=time.time()))
        code, printed = await ask(claude, tmp_path / "home", gw, "Say hello.")
        assert code != 0
        assert "The cap for today of the app 'app' is used up" in printed, printed
        assert [refusal for (refusal,) in await calls(gw, "refusal")] == [None, "cap_spent"]
        assert len((await api.settled()).messages()) == 1


async def test_a_model_that_is_not_allowed_is_said_in_a_sentence(tmp_path, claude):
    async with Simulator() as api, gateway(tmp_path, api, {"app": SHIPPED}) as gw:
        code, printed = await ask(claude, tmp_path / "home", gw, "Say hello.", "--model", "claude-fable-5-2")
        assert code != 0
        assert "claude-fable-5-2" in printed


async def test_four_at_once_work_under_a_cap_of_five_dollars_a_day(tmp_path, claude):
    async with Simulator(behaviour=Behaviour(tokens_per_s=80, output_tokens=400)) as api, gateway(tmp_path, api, {"app": shipped("{day: $5}")}) as gw:
        answers = await asyncio.gather(*(ask(claude, tmp_path / f"home{number}", gw, "Write a poem.") for number in range(4)))
        assert [code for code, _ in answers] == [0] * 4, answers
        rows = await calls(gw, "state, complete, refusal, flags")
        assert [row[:3] for row in rows] == [("settled", 1, None)] * 4, rows
        assert await gw.spent_nano() == (await api.settled()).billed_nano
