"""Every form is pasted as it is and has to bring a call, with the app's token, to the simulated API standing in for the gateway."""

import asyncio
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anthropic
import pytest
from pasting import TOKEN, claude_code, cron, dotenv, github_actions, systemd

from gateway_addon.onboarding import snippets
from gateway_addon.simulator import Simulator

ASK = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def gateway() -> AsyncIterator[Simulator]:
    """Answers only who shows the app's token."""
    async with asyncio.timeout(120), Simulator(key=TOKEN) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("ANTHROPIC_", "CLAUDE_", "GATEWAY_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def pasted(kind: str, url: str) -> str:
    return snippets.lines(kind, base_url=url, app="review-replies", token_placeholder=TOKEN)


@pytest.mark.parametrize(
    ("kind", "reader"),
    [("dotenv", dotenv), ("systemd", systemd), ("cron", cron), ("github-actions", github_actions), ("claude-code", claude_code)],
)
async def test_a_form_that_sets_variables_moves_an_unchanged_program(
    kind: str, reader: Callable[[str], dict[str, str]], gateway: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in reader(pasted(kind, gateway.url)).items():
        monkeypatch.setenv(name, value)
    async with anthropic.AsyncAnthropic(max_retries=0) as client:
        answer = await client.messages.create(**ASK)
    assert (answer.model, len(gateway.book.rows)) == ("claude-haiku-4-5-20251001", 1)


async def test_the_python_form_is_a_client_of_the_gateway(gateway: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_TOKEN", TOKEN)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a-forgotten-real-key")
    program: dict[str, anthropic.Anthropic] = {}
    exec(pasted("python", gateway.url), program)
    with program["client"] as client:
        await asyncio.to_thread(client.messages.create, **ASK)
    assert len(gateway.book.rows) == 1


def test_the_python_form_stops_without_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a-forgotten-real-key")
    with pytest.raises(KeyError, match="GATEWAY_TOKEN"):
        exec(pasted("python", "http://127.0.0.1:8080"), {})


async def test_the_curl_form_runs_in_a_plain_shell(gateway: Simulator) -> None:
    command = ["sh", "-euc", pasted("curl", gateway.url)]
    answer = await asyncio.to_thread(subprocess.run, command, env={"PATH": os.environ["PATH"]}, capture_output=True, check=True, timeout=30)
    assert json.loads(answer.stdout)["type"] == "message"
    assert len(gateway.book.rows) == 1


@pytest.mark.npm
async def test_the_typescript_form_calls_and_stops_without_its_token(gateway: Simulator, tmp_path: Path) -> None:
    def node(**environment: str) -> subprocess.CompletedProcess[str]:
        private = {"PATH": os.environ["PATH"], "ANTHROPIC_API_KEY": "a-forgotten-real-key", "ANTHROPIC_AUTH_TOKEN": "another"} | environment
        return subprocess.run(["node", "app.mjs"], cwd=tmp_path, env=private, capture_output=True, text=True, timeout=60)

    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "@anthropic-ai/sdk@1"]
    await asyncio.to_thread(subprocess.run, install, cwd=tmp_path, check=True, capture_output=True, timeout=90)
    call = f"console.log(JSON.stringify(await client.messages.create({json.dumps(ASK)})));\n"
    (tmp_path / "app.mjs").write_text(pasted("typescript", gateway.url) + call)
    called = await asyncio.to_thread(node, GATEWAY_TOKEN=TOKEN)
    assert json.loads(called.stdout)["type"] == "message", called.stderr
    stopped = await asyncio.to_thread(node)
    assert "GATEWAY_TOKEN is not set: it holds the gateway token of review-replies" in stopped.stderr
    assert len(gateway.book.rows) == 1


@pytest.mark.parametrize("kind", snippets.KINDS)
def test_what_is_committed_never_holds_the_token(kind: str) -> None:
    private = {"curl", "claude-code", "claude-code-caps", "dotenv", "systemd", "cron", "llm", "aider"}
    committed = kind not in private
    assert pasted(kind, "http://127.0.0.1:8080").count(TOKEN) == (0 if committed else 1)


@pytest.mark.parametrize("kind", snippets.KINDS)
def test_a_trailing_slash_of_the_base_url_is_dropped(kind: str) -> None:
    """The SDK adds its own."""
    assert pasted(kind, "https://gateway.example:8443/") == pasted(kind, "https://gateway.example:8443")


@pytest.mark.parametrize("kind", snippets.KINDS)
def test_nothing_is_left_to_fill_in(kind: str) -> None:
    text = pasted(kind, "http://[::1]:8080") + snippets.where(kind, app="review-replies")
    assert not re.search("@[a-z_]+@", text)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kind": "perl"}, "no form for 'perl'; there is one for python, typescript"),
        ({"base_url": "127.0.0.1:8080"}, "not the gateway's address"),
        ({"base_url": "http://h/'; rm -rf ~"}, "not the gateway's address"),
        ({"base_url": "http://user:password@h"}, "not the gateway's address"),
        ({"app": "two words"}, "'two words' cannot be pasted everywhere"),
        ({"token_placeholder": '"$(id)"'}, "cannot be pasted everywhere"),
    ],
)
def test_what_cannot_be_pasted_as_it_is_is_refused(wrong: dict[str, str], named: str) -> None:
    values = {"kind": "dotenv", "base_url": "http://127.0.0.1:8080", "app": "reports", "token_placeholder": "gwt_..."} | wrong
    with pytest.raises(ValueError, match=re.escape(named)):
        snippets.lines(values.pop("kind"), **values)
