"""Every command of the README, run in order in an empty folder, with the simulated API in the real one's place."""

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gateway_addon.policy.reference import reference
from gateway_addon.simulator import KEY, Simulator

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python|yaml|text)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

RUN_SH = """#!/usr/bin/env bash
# The project's own run.sh, without the environment that it prepares: this test's interpreter has it. The demo has its own test.
[ "$1" = test ] || [ "$1" = demo ] && exit 0
"{python}" -m gateway_addon "$@" || exit $?
[ "$1" = init ] && sed -i "s#^upstream:.*#upstream: $SIMULATED_URL#" "$GATEWAY_POLICIES/gateway.yaml"
exit 0
"""


def test_the_reference_of_every_key_is_the_one_that_validates_them():
    between = re.search(r"^<!-- keys: .*? -->\n(.*?)^<!-- /keys -->", README, re.MULTILINE | re.DOTALL)
    assert between is not None
    assert between[1].strip() == reference().strip()


def test_the_table_of_endings_is_that_of_the_settlement():
    from gateway_addon import settlement

    reasons = set(re.findall(r"estimated:(\w+)", settlement.__doc__)) - {"gateway_error"}
    assert reasons <= set(re.findall(r"estimated:(\w+)", README))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def reachable(port: int) -> None:
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise AssertionError("serve did not listen")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_every_command_works_in_order_in_an_empty_folder(tmp_path):
    port = free_port()
    (tmp_path / "run.sh").write_text(RUN_SH.format(python=sys.executable))
    (tmp_path / "run.sh").chmod(0o755)
    here = {"GATEWAY_POLICIES": f"{tmp_path}/policies", "GATEWAY_LEDGER": f"sqlite:///{tmp_path}/gateway.db"}
    root = str(Path(__file__).parent.parent)
    async with Simulator() as api:
        environment = os.environ | here | {"SIMULATED_URL": api.url, "GATEWAY_LISTEN": f"127.0.0.1:{port}", "PYTHONPATH": root}
        exported, server, ran = {}, None, 0
        for language, block in BLOCKS:
            text = block.replace("127.0.0.1:8080", f"127.0.0.1:{port}").replace("sk-ant-your-real-key", KEY)
            if language in ("yaml", "text"):
                continue
            if text.strip() == "./run.sh serve":
                server = subprocess.Popen(["./run.sh", "serve"], cwd=tmp_path, env=environment | exported, stdout=subprocess.DEVNULL, start_new_session=True)
                await reachable(port)
                continue
            command = ["bash", "-ec", f"{text}\nset +x; env > .after; echo TOKEN=$TOKEN >> .after"] if language == "bash" else [sys.executable, "-c", text]
            done = await asyncio.to_thread(subprocess.run, command, cwd=tmp_path, env=environment | exported, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, (text, done.stdout[-2000:], done.stderr[-2000:])
            if language == "bash":
                after = dict(line.split("=", 1) for line in (tmp_path / ".after").read_text().splitlines() if "=" in line)
                exported |= {name: after[name] for name in ("TOKEN", "ANTHROPIC_API_KEY") if after.get(name)}
            ran += 1
        os.killpg(server.pid, 15)
        server.wait(10)
        book = await api.settled()
    assert ran >= 7
    assert len(book.messages()) == 2, "the curl and the SDK's call"
