"""The unit and the Containerfile that `gateway init` prints: as hardened as they say, and their commands run."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner
from gateway import write_policies
from ports import free_port
from processes import START_S

from gateway_addon.cli.init import init
from gateway_addon.operations import deploy
from gateway_addon.policy import load
from gateway_addon.simulator import KEY, Simulator

ROOT = Path(__file__).parents[2]
ANALYZE = shutil.which("systemd-analyze")
has_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not on this machine")


def printed(option):
    return CliRunner().invoke(init, [option], catch_exceptions=False).stdout


def directives(unit):
    """(name, value) of every line, in order."""
    return re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE)


@has_systemd
def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path):
    unit = tmp_path / "gateway.service"
    unit.write_text(printed("--systemd"))
    verified = subprocess.run([ANALYZE, "verify", unit], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")
    secure = [ANALYZE, "security", "--offline=yes", "--threshold=20", "--no-pager", unit]  # of 100; an unhardened service has 96
    assert subprocess.run(secure, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize(("root", "home"), [("/opt/gateway", "yes"), ("/home/ada/gateway", "read-only"), ("/root/gateway", "read-only")])
def test_a_checkout_at_home_stays_readable_and_no_more(root, home):
    unit = deploy.unit(root, f"{root}/.venv/bin/python")
    assert dict(directives(unit))["ProtectHome"] == home


@has_systemd
def test_a_checkout_may_lie_in_a_folder_with_spaces(tmp_path):
    python = tmp_path / "my gateway" / "100%" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    unit = tmp_path / "gateway.service"
    unit.write_text(deploy.unit(str(python.parent), str(python)))
    verified = subprocess.run([ANALYZE, "verify", unit], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")


async def test_units_commands_make_a_ledger_and_serve_until_stopped(tmp_path):
    """The unit's commands make a ledger, and serve until they are stopped."""
    port = free_port()
    here = {"/var/lib/gateway": str(tmp_path), "/etc/gateway": str(tmp_path / "etc"), "127.0.0.1:8080": f"127.0.0.1:{port}"}
    unit = printed("--systemd")
    for there, own in here.items():
        unit = unit.replace(there, own)
    environment = dict(value.split("=", 1) for name, value in directives(unit) if name == "Environment")
    commands = [shlex.split(value) for name, value in directives(unit) if name in ("ExecStartPre", "ExecStart")]
    async with Simulator() as api:
        write_policies(tmp_path / "etc" / "policies", api.url, {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n"})
        own = {"PATH": os.environ["PATH"], "SIMULATED_KEY": KEY, "PYTHONPATH": str(ROOT), **environment}
        ready = await asyncio.create_subprocess_exec(*commands[0], env=own, cwd="/", stdout=asyncio.subprocess.DEVNULL)
        assert await ready.wait() == 0
        running = await asyncio.create_subprocess_exec(*commands[1], env=own, cwd="/", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        assert (await asyncio.wait_for(running.stdout.readline(), START_S)).startswith(b"gateway")
        async with httpx2.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/gateway/healthz")).json()["status"] == "ok"
        running.terminate()
        _, log = await asyncio.wait_for(running.communicate(), 60)
    assert running.returncode == 0
    assert all(json.loads(line)["event"] == "log" for line in log.splitlines())


def test_a_stop_waits_longer_than_calls_in_flight_may_take(tmp_path):
    """Else the calls are cut that a drain would have let end. `podman stop` alone would wait ten seconds."""
    write_policies(tmp_path, "https://api.anthropic.com", {}, "")
    drain_s = load(tmp_path).timeouts.drain_s
    unit, compose, container = (deploy.text(name) for name in ("gateway.service", "compose.yaml", "Containerfile"))
    waits = [*re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M), re.search(r"&gateway\n(?:  .*\n)*?  stop_grace_period: (\d+)s", compose)[1]]
    waits += re.findall(r"podman run .*--stop-timeout (\d+)", container)
    assert len(waits) == 3
    assert all(int(wait_s) > drain_s + 10 for wait_s in waits)


@pytest.mark.parametrize("option", ["--systemd", "--container", "--compose", "--nginx", "--alert-rules"])
def test_printing_a_service_writes_nothing(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWAY_POLICIES", str(tmp_path / "policies"))
    monkeypatch.setenv("GATEWAY_LEDGER", f"sqlite:///{tmp_path}/gateway.db")
    assert printed(option).startswith("# ")
    assert not list(tmp_path.iterdir())
