"""The README and the handbook's pages, block by block, and a terminal that types their commands in a clone."""

import asyncio
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from checkouts import ROOT, clone
from ports import free_port

from gateway_addon.simulator import KEY, Simulator

README = ROOT / "README.md"
FOLDER = ROOT / "gateway_addon" / "docs"
LANGUAGES = {"bash", "python", "yaml", "json", "console"}
STAYS = re.compile(r"(?:\./run\.sh|gateway) (serve|web|console)\b|\.venv/bin/(mitmdump)\b")
"""The beginning of a command that runs until it is stopped."""


UPSTREAM = "upstream: https://api.anthropic.com"


class Block(NamedTuple):
    language: str
    text: str
    not_run: str | None
    """The mark: why no test can type these commands."""


def page(topic: str) -> str:
    return (FOLDER / f"{topic}.md").read_text()


def topics() -> list[str]:
    """The chapters in the order of the index."""
    return re.findall(r"^- \[([\w-]+)\]", page("index"), re.MULTILINE)


def blocks(text: str) -> list[Block]:
    found = re.findall(r"^(?:<!-- not run: (.+?) -->\n)?```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [Block(language, inside, reason or None) for reason, language, inside in found]


def section(text: str, heading: str) -> str:
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


class Terminal:
    """A reader's shell in a clone: what one block exports or defines, the next one has. The simulated API is in the real one's place."""

    def __init__(self, folder: Path, api: Simulator):
        self.root = clone(folder)
        self._session, self._api = folder / "session.sh", api
        self._session.touch()
        self._ports = {port: str(free_port()) for port in ("8080", "8081", "8083", "8084", "8090")}
        tools = folder / "bin"
        tools.mkdir()
        command = tools / "gateway"  # as an installed one is on the PATH
        command.write_text(f'#!/bin/sh\nexec "{self.root}/.venv/bin/python" -O -m gateway_addon "$@"\n')
        command.chmod(0o755)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ANTHROPIC_", "GATEWAY_")) and name != "TOKEN"}
        address = f"127.0.0.1:{self._ports['8080']}"
        self._environment = inherited | {"GATEWAY_LISTEN": address, "PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(folder)}
        self._git("init", "-q")
        self._git("add", "--all")
        self._serving: subprocess.Popen[str] | None = None

    async def play(self, typed: Iterable[Block]) -> int:
        """Type the blocks in order; returns how many ran. Raises AssertionError with the output of the first that fails."""
        ran, printed = 0, ""
        for block in typed:
            if block.language == "json":
                [sentence] = re.findall(r'"message": "(.+?)"', block.text)
                assert sentence in printed, (sentence, printed)
            elif block.language in ("bash", "python") and block.not_run is None:
                printed = await self._type(block.language, self._here(block.text))
                ran += 1
        return ran

    def _here(self, text: str) -> str:
        """The text with this machine's ports, the simulated API's address and its key."""
        text = re.sub(rf"((?:127\.0\.0\.1:|-port ))({'|'.join(self._ports)})", lambda found: found[1] + self._ports[found[2]], text)
        return text.replace("https://api.anthropic.com", self._api.url).replace("sk-ant-your-real-key", KEY)

    async def _type(self, language: str, text: str) -> str:
        *before, last = text.splitlines()
        stays = STAYS.match(last) if language == "bash" else None
        if stays is not None:
            if before:
                await self._finish("\n".join(before))
            await self._start(last, stays[1] or stays[2])
            return ""
        return await self._finish(text) if language == "bash" else await self._finish(".venv/bin/python -", text)

    async def _finish(self, script: str, stdin: str = "") -> str:
        wrapped = f"source '{self._session}'\n{script}\n{{ declare -px; declare -f; }} > '{self._session}'"
        done = await asyncio.to_thread(
            subprocess.run, ["bash", "-ec", wrapped], cwd=self.root, env=self._environment, input=stdin, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (script, done.stdout[-2000:], done.stderr[-2000:])
        policy = self.root / "policies" / "gateway.yaml"
        if policy.exists() and UPSTREAM in (text := policy.read_text()):
            policy.write_text(text.replace(UPSTREAM, f"upstream: {self._api.url}"))
        return done.stdout

    def _git(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=self.root, check=True, capture_output=True, text=True).stdout

    def changed(self) -> str:
        """What git would show of the clone that was not there at the start: one line for each file."""
        return "".join(line for line in self._git("status", "--porcelain").splitlines(keepends=True) if not line.startswith("A  "))

    async def _start(self, command: str, kind: str) -> None:
        """Start what stays; `serve` goes on, the others are stopped when they answer."""
        script = f"source '{self._session}'\nexec {command}"
        said = self._session.with_name(f"{kind}.log")
        with said.open("w") as log:
            started = subprocess.Popen(
                ["bash", "-c", script], cwd=self.root, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True, start_new_session=True
            )
        port = self._ports[{"serve": "8080", "web": "8084", "mitmdump": "8083", "console": "8090"}[kind]]
        try:
            await asyncio.to_thread(answers, f"http://127.0.0.1:{port}/{'' if kind == 'console' else 'gateway/readyz'}", started)
        except AssertionError as error:
            stop(started)
            raise AssertionError(command, said.read_text()[:3000]) from error
        if kind == "serve":
            self._serving = started
        else:
            await asyncio.to_thread(stop, started)

    def close(self) -> None:
        if self._serving is not None:
            stop(self._serving)


def answers(url: str, process: subprocess.Popen[str]) -> None:
    """Wait until something at `url` answers HTTP. Raises AssertionError when the process ends before, or after 300 looks."""
    for _ in range(300):
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=60).close()
        except urllib.error.HTTPError as answered:
            answered.close()
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"{url} never answered")


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


def marks() -> Iterator[str]:
    """Every mark of the README and the pages, with its reason."""
    for text in (README.read_text(), *map(page, ["index", *topics()])):
        yield from re.findall(r"<!-- not run: (.+?) -->", text)
