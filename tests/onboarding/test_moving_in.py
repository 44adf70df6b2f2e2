"""The whole move of a village: twelve consumers in as many forms, a thirteenth that nobody finds, one key, no outage.

Each consumer is read as its platform reads it and calls with what it finds there. The handbook's chapter `moving-in` is this
test's transcript, block by block; run this file with REWRITE_DOCS=1 to write it anew.
"""

import asyncio
import base64
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import anthropic
import pytest
import yaml
from click.testing import CliRunner
from handbook import FOLDER
from ledgers import until
from pasting import claude_code, cron, dotenv, systemd
from processes import Ledgered, buried
from village import KEY, VILLAGE, build_village

from gateway_addon.cli import main
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.onboarding import snippets
from gateway_addon.simulator import ADMIN_KEY, Behaviour, Simulator

NEW_KEY = KEY.replace("Qm7x", "New1")
ASK = {"model": "claude-haiku-4-5", "max_tokens": 30, "messages": [{"role": "user", "content": "Hello"}]}
CHAPTER = FOLDER / "moving-in.md"
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)

type Env = dict[str, str]


def python_client(text: str) -> Env:
    """A client in code: its address there, its token in GATEWAY_TOKEN."""
    [url] = re.findall(r"(?:base_url=|baseURL: |WithBaseURL\()\\?\"([^\"\\]+)", text)
    return {"ANTHROPIC_BASE_URL": url}


def notebook(text: str) -> Env:
    return python_client("".join(json.loads(text)["cells"][0]["source"]))


def shell_script(text: str) -> Env:
    [url], [token] = re.findall(r"'(http\S+)/v1/messages'", text), re.findall(r"GATEWAY_TOKEN='(.+)'", text)
    return {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": token}


def compose(text: str) -> Env:
    return yaml.safe_load(text)["services"]["answers"]["environment"]


def workflow(text: str) -> Env:
    return yaml.safe_load(text)["env"]


def kubernetes(text: str) -> Env:
    return {name: base64.b64decode(value).decode() for name, value in yaml.safe_load(text)["data"].items()}


MOVES: dict[str, tuple[str, str, str, Callable[[str], Env]]] = {
    # path: (app, form of `token issue --for`, the file after the move (@form@: the form's lines), how its platform reads it)
    "etc/crontab": ("reports", "cron", "SHELL=/bin/sh\n@form@15 3 * * * root /opt/reports\n", cron),
    "etc/cron.daily/digest": ("digest", "curl", "#!/bin/sh\n@form@", shell_script),
    "etc/systemd/system/replies.service": ("replies", "systemd", "@form@", systemd),
    "home/ada/analysis/churn.ipynb": ("churn", "python", "", notebook),
    "home/ada/.claude/settings.json": ("ada", "claude-code", "@form@", claude_code),
    "srv/shop/compose.yaml": ("answers", "dotenv", "", compose),
    "srv/shop/.env": ("shop", "dotenv", "DEBUG=1\n@form@", dotenv),
    "srv/shop/lib/hardcoded.py": ("lookup", "python", "@form@", python_client),
    "srv/web/src/chat.ts": ("chat", "typescript", "@form@", python_client),
    "srv/web/.github/workflows/review.yml": ("review", "github-actions", "@form@jobs: {review: {steps: [{run: ./a}]}}\n", workflow),
    "srv/search/main.go": ("search", "dotenv", "", python_client),
    "srv/search/deploy/secret.yaml": ("deploy", "dotenv", "", kubernetes),
}
HIDDEN = "opt/legacy/agent"
"""Compiled, with the key in it: an inventory does not read binary files."""


class Village:
    """The machine under the move: its files, its gateway, its operator's terminal."""

    def __init__(self, root: Path, gateway: Ledgered, api: Simulator):
        self.root, self.gateway, self.api = root, gateway, api
        self.url = ""
        self.watched = 0
        self.transcript: list[str] = []

    async def operator(self, typed: str, *, shown: bool = True) -> str:
        """Run a command as it is typed; returns what it printed, and keeps both for the transcript."""
        words = typed.split()
        result = await asyncio.to_thread(CliRunner(catch_exceptions=False).invoke, main, words[1:])
        if shown:
            code = f"[exit code {result.exit_code}]\n" if result.exit_code else ""
            self.transcript.append(f"$ {typed}\n{result.output}{code}")
        return result.output

    def move(self, name: str, token: str) -> None:
        """Edit a consumer's file as the inventory said."""
        app, form, after, _ = MOVES[name]
        text = after.replace("@form@", snippets.lines(form, base_url=self.url, app=app, token_placeholder=token))
        if name.endswith(".ipynb"):
            lines = snippets.lines(form, base_url=self.url, app=app, token_placeholder=token).splitlines(keepends=True)
            text = json.dumps({"cells": [{"cell_type": "code", "source": lines}], "nbformat": 4}, indent=1)
        elif name.endswith("compose.yaml"):
            environment = {"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": token}
            text = yaml.dump({"services": {"db": {"image": "postgres"}, "answers": {"environment": environment}}})
        elif name.endswith("main.go"):
            text = f'package main\n\nimport "github.com/anthropics/anthropic-sdk-go"\n\nvar url = option.WithBaseURL("{self.url}")\n'
        elif name.endswith("secret.yaml"):
            values = {"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": token}
            text = yaml.dump({"kind": "Secret", "data": {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}})
        (self.root / name).write_text(text)

    async def call(self, name: str, token: str) -> None:
        """Let a moved consumer work: it calls with the address and the credential that it finds where it looks."""
        app, *_, read = MOVES[name]
        secret = f"GATEWAY_TOKEN_{app.upper()}"
        found = read((self.root / name).read_text())
        credential = {"api_key": found.get("ANTHROPIC_API_KEY", token).replace(f"${{{{ secrets.{secret} }}}}", token)}
        if "ANTHROPIC_AUTH_TOKEN" in found:
            credential = {"auth_token": found["ANTHROPIC_AUTH_TOKEN"]}
        async with anthropic.AsyncAnthropic(base_url=found["ANTHROPIC_BASE_URL"], max_retries=0, **credential) as client:
            await client.messages.create(**ASK)

    async def hidden_consumer(self) -> None:
        """The thirteenth, at the provider's own address, with the key that is compiled into it."""
        [key] = re.findall(rb"sk-ant-[\w-]+", (self.root / HIDDEN).read_bytes())
        async with anthropic.AsyncAnthropic(base_url=self.api.url, api_key=key.decode(), max_retries=0) as client:
            await client.messages.create(**ASK)


def prepared(folder: Path, api: Simulator) -> Village:
    """The village, and a gateway with a policy for each of its apps, whose key lies in a file."""
    root = folder / "village"
    build_village(root, others=100)
    (root / HIDDEN).parent.mkdir(parents=True)
    (root / HIDDEN).write_bytes(b"\x7fELF\0\0" + KEY.encode() + b"\0")
    (folder / "key").write_text(KEY)
    apps = folder / "policies" / "apps"
    apps.mkdir(parents=True)
    text = f"upstream: {api.url}\nkey: {{file: {folder / 'key'}}}\nadmin_key: {{env: SIMULATED_ADMIN_KEY}}\nworkspace_geo: global\n"
    (folder / "policies" / "gateway.yaml").write_text(text)
    for app, *_ in MOVES.values():
        (apps / f"{app}.yaml").write_text("models: {allow: [claude-haiku-4-5]}\ncaps: {day: $5}\n")
    sqlite_files.create(folder / "gateway.db")
    return Village(root, Ledgered(folder, {}), api)


def written(village: Village) -> list[str]:
    """The transcript as it can be compared: without this run's dates, tokens, port, folder and haste."""
    port = village.url.rpartition(":")[2]
    return [
        re.sub(r"gwt_\w+", "gwt_...", re.sub(r"\d{4}-\d\d-\d\d", "2026-11-24", re.sub(r" \d\d:\d\d", " 09:00", block)))
        .replace(f"{village.watched} calls passed", "21 calls passed")
        .replace(f":{port}", ":8080")
        .replace(f"{village.gateway.folder}/", "/srv/gateway/")
        for block in village.transcript
    ]


async def test_a_village_moves_in_and_the_handbook_tells_how(tmp_path, monkeypatch):
    async with Simulator(key=KEY) as api:
        village = prepared(tmp_path, api)
        monkeypatch.chdir(village.root)
        monkeypatch.setenv("SIMULATED_ADMIN_KEY", ADMIN_KEY)
        monkeypatch.setenv("GATEWAY_POLICIES", str(tmp_path / "policies"))
        monkeypatch.setenv("GATEWAY_LEDGER", f"sqlite:///{tmp_path / 'gateway.db'}")
        process, village.url = await village.gateway.serve()
        monkeypatch.setenv("GATEWAY_LISTEN", village.url.removeprefix("http://"))
        try:
            await moved(village)
        finally:
            process.terminate()
            await buried(process)
    compare_with_chapter(written(village))


async def moved(village: Village) -> None:
    await village.hidden_consumer()
    found = await village.operator("gateway inventory . --save")
    assert "12 consumers" in found

    tokens: dict[str, str] = {}
    for name, (app, form, *_) in MOVES.items():
        issued = await village.operator(f"gateway token issue {app} --for {form}", shown=app == "reports")
        [tokens[name]] = re.findall(r"gwt_\w+", issued)

    names = list(VILLAGE)
    late = ["srv/web/src/chat.ts", "etc/cron.daily/digest"]
    await move_and_call(village, [name for name in names if name not in late], tokens)
    assert "Not yet." in await village.operator("gateway cutover")
    await move_and_call(village, late, tokens)
    assert "Safe to rotate" in await village.operator("gateway cutover")

    await rotated(village, names, tokens)
    with pytest.raises(anthropic.AuthenticationError):
        await village.hidden_consumer()
    bypassed = await village.operator("gateway reconcile --since 1d")
    assert "calls that bypass it" in bypassed
    hidden = village.api.book.messages()[0]
    assert f"{hidden.usage.output_tokens:,} output tokens" in bypassed


async def move_and_call(village: Village, names: Iterable[str], tokens: dict[str, str]) -> None:
    for name in names:
        village.move(name, tokens[name])
        await village.call(name, tokens[name])


async def rotated(village: Village, names: list[str], tokens: dict[str, str]) -> None:
    """The key changes in the gateway's file while consumers go on calling; then the old one is disabled. No call may fail."""
    watching = asyncio.ensure_future(village.operator("gateway cutover --watch 3s"))
    await asyncio.sleep(0.3)
    village.api.also, village.api.behaviour = {NEW_KEY}, Behaviour(delay_headers_s=0.3)
    working = [asyncio.ensure_future(five_calls(village, name, tokens[name])) for name in names[:4]]
    async with asyncio.timeout(60):
        await until(lambda: len(village.api.book.messages()) >= 1 + 12 + 4)  # four calls under way, with the old key
    (village.gateway.folder / "key.new").write_text(NEW_KEY)
    os.replace(village.gateway.folder / "key.new", village.gateway.folder / "key")
    village.api.behaviour = Behaviour()
    await asyncio.gather(*working)
    village.api.key, village.api.also = NEW_KEY, set()
    await village.call(names[0], tokens[names[0]])
    [village.watched] = map(int, re.findall(r"^(\d+) calls passed, the provider refused the key 0 times", await watching))
    through = [row.header("x-api-key") for row in village.api.book.messages()[1:]]
    assert through == [KEY] * 16 + [NEW_KEY] * 17


async def five_calls(village: Village, name: str, token: str) -> None:
    for _ in range(5):
        await village.call(name, token)
        await asyncio.sleep(0.1)


def compare_with_chapter(transcript: list[str]) -> None:
    text = CHAPTER.read_text()
    blocks = iter(transcript)
    if os.environ.get("REWRITE_DOCS"):
        assert len(BLOCK.findall(text)) == len(transcript)
        CHAPTER.write_text(BLOCK.sub(lambda match: f"```console\n{next(blocks)}```", text))
    else:
        assert BLOCK.findall(text) == transcript, "REWRITE_DOCS=1 writes the chapter anew"
