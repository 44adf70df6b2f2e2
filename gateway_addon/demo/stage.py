"""The demo's stage: a simulated Claude API in this process, and in front of it the gateway as anybody would start it.

Everything lies in one temporary folder: the policies, the ledger, the file with the (simulated) real key. The gateway is a
process of its own, `gateway serve`, on a free loopback port. This is an edge: files, the clock, a process.
"""

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway_addon.demo.client import App
from gateway_addon.identity import tokens
from gateway_addon.ledger import admin, connect
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.names import PROGRAM
from gateway_addon.simulator import KEY, Simulator

START_S = 15.0
STOP_S = 10.0

GATEWAY = """\
upstream: {upstream}
key: {{file: {key}}}
caps: {{day: $5}}
workspace_geo: global
"""
APPS = {
    "reviews": """\
models: {allow: [claude-haiku-4-5]}
max_tokens: 1024
caps: {request: $0.02, day: $0.03}
""",
    "pipeline": """\
models: {allow: [claude-sonnet-5-5, claude-opus-5-5]}
caps: {day: $1}
reserve: progressive
""",
    "experiments": """\
models: {allow: [claude-*], deny: [claude-fable-*, claude-mythos-*]}
caps: {day: $0.15}
""",
}


class GatewayFailed(Exception):
    """The gateway did not start or did not stop as it should. The message ends with what it said."""


@dataclass(slots=True)
class Stage:
    """All that a scene can use."""

    api: Simulator
    folder: Path
    gateway: asyncio.subprocess.Process
    url: str
    apps: dict[str, App]

    @property
    def ledger(self) -> Path:
        return self.folder / "gateway.db"

    async def stop(self) -> None:
        """Stop the gateway as an operator would, and wait until its last settlement is written."""
        self.gateway.terminate()
        code = await asyncio.wait_for(self.gateway.wait(), STOP_S)
        if code != 0:
            raise GatewayFailed(f"The gateway ended with status {code}:\n{_log(self.folder)}")


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[Stage]:
    """Keep everything running until the block ends. Raises GatewayFailed, OSError where the loopback or the folder cannot be used."""
    async with Simulator() as api:
        _write_files(folder, api.url)
        sqlite_files.create(folder / "gateway.db")
        gateway = await _start(folder)
        try:
            url = await _url(gateway, folder)
            yield Stage(api, folder, gateway, url, {app: App(app, url, issue(folder, app)) for app in APPS})
        finally:
            if gateway.returncode is None:
                gateway.kill()
                await gateway.wait()


def issue(folder: Path, app: str) -> str:
    """Issue a token for an app, as `gateway token issue` does."""
    token = tokens.mint()
    with connect.changing(folder / "gateway.db") as db:
        admin.issue_token(db, app, tokens.digest(token), label="demo", who="demo", now=time.time())
    return token


def _write_files(folder: Path, upstream: str) -> None:
    (folder / "policies" / "apps").mkdir(parents=True)
    key = folder / "key"
    key.touch(0o600)
    key.write_text(KEY)
    (folder / "policies" / "gateway.yaml").write_text(GATEWAY.format(upstream=upstream, key=key))
    for app, policy in APPS.items():
        (folder / "policies" / "apps" / f"{app}.yaml").write_text(policy)


async def _start(folder: Path) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "ANTHROPIC_"))}
    environment["GATEWAY_COMMAND"] = PROGRAM
    command = ["-u", "-m", "gateway_addon", "serve", "--listen", "127.0.0.1:0"]
    where = ["--policies", str(folder / "policies"), "--ledger", f"sqlite:///{folder / 'gateway.db'}"]
    log = os.open(folder / "gateway.log", os.O_WRONLY | os.O_CREAT)
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, *command, *where, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment
        )
    finally:
        os.close(log)


async def _url(gateway: asyncio.subprocess.Process, folder: Path) -> str:
    """Wait for the gateway's first line, and return the address in it."""
    assert gateway.stdout is not None
    try:
        line = await asyncio.wait_for(gateway.stdout.readline(), START_S)
    except TimeoutError:
        line = b""
    found = re.search(r"http://\S+", line.decode())
    if found is None:
        raise GatewayFailed(f"The gateway did not start:\n{_log(folder)}")
    return found[0]


def _log(folder: Path) -> str:
    return (folder / "gateway.log").read_text(errors="replace")[-2000:]
