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

import click
import httpx2
import pytest
from click.testing import CliRunner
from gateway import write_policies
from processes import START_S, free_port

from gateway_addon.cli import main
from gateway_addon.cli.init import init
from gateway_addon.operations import deploy
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


async def test_the_units_commands_make_a_ledger_and_serve_until_they_are_stopped(tmp_path):
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
        _, log = await asyncio.wait_for(running.communicate(), 20)
    assert running.returncode == 0
    assert all(json.loads(line)["event"] == "log" for line in log.splitlines())


def test_the_container_copies_what_there_is_and_runs_commands_that_exist():
    lines = deploy.text("Containerfile").replace("\\\n", " ").splitlines()
    instructions = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    copied = [words.split()[:-1] for name, words in instructions if name == "COPY"]
    assert all((ROOT / path).exists() for paths in copied for path in paths)
    assert [words for name, words in instructions if name == "USER"] == ["10001"]
    shell = json.loads(next(words for name, words in instructions if name == "CMD"))
    for typed in re.findall(r"-m gateway_addon ([^&]*)", shell[2]):
        name, *arguments = typed.split()
        with main.get_command(click.Context(main), name).make_context(name, arguments):
            pass


def test_the_container_brings_the_bytecode_of_both_its_commands(tmp_path):
    (tmp_path / "gateway_addon").mkdir()
    (tmp_path / "gateway_addon" / "__init__.py").touch()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "os.py").touch()
    [command] = re.findall(r"^RUN (python -m compileall (?:.*\\\n)*.*)", deploy.text("Containerfile"), re.MULTILINE)
    where = re.search(r"\$\((python -c '(.+?)')\)", command)
    assert subprocess.check_output([sys.executable, "-c", where[2]], text=True).strip() == str(Path(os.__file__).parent)
    command = command.replace(where[0], "lib").replace("python -m", f"{shlex.quote(sys.executable)} -m")
    done = subprocess.run(["sh", "-ec", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    version = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    made = {path.name for path in tmp_path.rglob("*.pyc")}
    assert made == {f"{name}.{version}{kind}.pyc" for name in ("__init__", "os") for kind in ("", ".opt-1")}


@pytest.mark.parametrize("option", ["--systemd", "--container", "--compose", "--nginx"])
def test_printing_a_service_writes_nothing(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWAY_POLICIES", str(tmp_path / "policies"))
    monkeypatch.setenv("GATEWAY_LEDGER", f"sqlite:///{tmp_path}/gateway.db")
    assert printed(option).startswith("# ")
    assert not list(tmp_path.iterdir())
