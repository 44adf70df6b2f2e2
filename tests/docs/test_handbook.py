"""Every command of the README, run in order in a clone of the repository, with the simulated API in the real one's place."""

import asyncio
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from checkouts import clone

from gateway_addon.policy.reference import reference
from gateway_addon.simulator import KEY, Simulator

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python|yaml|text)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

HAVE_TESTS_OF_THEIR_OWN = ("./run.sh demo\n", "./run.sh test\n")


def test_the_reference_of_every_key_is_the_one_that_validates_them():
    between = re.search(r"^<!-- keys: .*? -->\n(.*?)^<!-- /keys -->", README, re.MULTILINE | re.DOTALL)
    assert between is not None
    assert between[1].strip() == reference().strip()


def test_the_table_of_endings_is_that_of_the_settlement():
    from gateway_addon.calls import settlement

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
async def test_every_command_works_in_order_in_a_clone(tmp_path):
    """As somebody types them: nothing is set that no line of the README exports, but the address and the upstream."""
    port, root = free_port(), clone(tmp_path)
    async with Simulator() as api:
        policy = root / "policies" / "gateway.yaml"
        policy.write_text(policy.read_text().replace("upstream: https://api.anthropic.com", f"upstream: {api.url}"))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ANTHROPIC_", "GATEWAY_")) and name != "TOKEN"}
        environment = inherited | {"GATEWAY_LISTEN": f"127.0.0.1:{port}"}
        server, ran = None, 0
        for language, block in BLOCKS:
            text = block.replace("127.0.0.1:8080", f"127.0.0.1:{port}").replace("sk-ant-your-real-key", KEY)
            for line in HAVE_TESTS_OF_THEIR_OWN:
                text = text.replace(line, "")
            if language in ("yaml", "text") or not text:
                continue
            if text.strip() == "./run.sh serve":
                server = subprocess.Popen(["./run.sh", "serve"], cwd=root, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
                await reachable(port)
                continue
            after = tmp_path / "after"
            command = ["bash", "-ec", f"{text}\nenv -0 > '{after}'"] if language == "bash" else [root / ".venv/bin/python", "-c", text]
            done = await asyncio.to_thread(subprocess.run, command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
            if done.returncode != 0 and server is not None:
                os.killpg(server.pid, 15)
            assert done.returncode == 0, (text, done.stdout[-2000:], done.stderr[-2000:])
            if language == "bash":
                environment |= dict(line.split("=", 1) for line in after.read_text().split("\0") if "=" in line)
            ran += 1
        os.killpg(server.pid, 15)
        server.wait(10)
        book = await api.settled()
    assert ran >= 7
    assert len(book.messages()) == 2, "the curl and the SDK's call"
