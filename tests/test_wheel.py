"""The wheel, built once and installed in a clean folder by the Containerfile's own commands: it holds all, and its commands work."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkouts import ROOT, clone
from ports import free_port
from processes import START_S

from gateway_addon.operations import deploy

pytestmark = pytest.mark.longest
QUIET = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT, "start_new_session": True}

LIBRARIES = sysconfig.get_path("purelib")  # the suite's own environment, in the place of the registry


@dataclass(slots=True)
class Installation:
    """A machine of its own below `folder`: the wheel in a virtual environment, a home, and no clone."""

    folder: Path
    wheel: Path

    @property
    def bin(self) -> Path:
        return self.folder / "venv" / "bin"

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.folder / "home"), "LANG": "C.UTF-8", "ANTHROPIC_API_KEY": "sk-ant-none"}

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120)


def instructions() -> list[tuple[str, str]]:
    text = deploy.text("Containerfile").replace("\\\n", " ")
    return [(name, words) for name, _, words in (line.partition(" ") for line in text.splitlines()) if name and name != "#"]


def stand_ins(machine: Installation) -> None:
    """What the image brings and this machine does not: pip without a network, a registry or a cache; users; a library of its own."""
    python = shlex.quote(sys.executable)
    scripts = {
        "pip": f"""export PIP_NO_INDEX=1 PIP_NO_DEPS=1
exec {python} -m pip --disable-pip-version-check --python {machine.bin}/python "$@" """,
        "useradd": f'exec {shlex.quote(shutil.which("useradd") or "echo")} --prefix {machine.folder}/users "$@"',
    }
    for name, script in scripts.items():
        (machine.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (machine.bin / name).chmod(0o755)
    (machine.folder / "users" / "etc").mkdir(parents=True)
    for name in ("passwd", "group", "shadow", "gshadow"):
        (machine.folder / "users" / "etc" / name).touch()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The Containerfile carried out, but for what makes a user, which only root may; its COPY is of one wheel alone."""
    folder = tmp_path_factory.mktemp("machine")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder / "built", clone(folder)]
    subprocess.run(build, check=True, timeout=120)
    shutil.rmtree(folder / "a project")
    machine = Installation(folder, next((folder / "built").iterdir()))
    venv.create(folder / "venv", symlinks=True)
    own = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    (own / "suite.pth").write_text(f"{LIBRARIES}\n")
    stand_ins(machine)
    place = folder / "opt"
    place.mkdir()
    (folder / "home").mkdir()
    shutil.copy(machine.wheel, place)
    done = []
    for name, words in instructions():
        if name == "RUN" and (not words.startswith("useradd") or os.geteuid() == 0):
            words = words.replace("$(python -c 'import os; print(os.path.dirname(os.__file__))')", str(own.parent))
            ran = subprocess.run(["sh", "-ec", words], cwd=place, env=machine.environment | {"EXTRAS": "[postgres]"}, capture_output=True, text=True, timeout=120)
            assert (ran.returncode, "not all could be compiled" in ran.stdout) == (0, False), (words, ran.stdout, ran.stderr)
            done.append(words)
    assert len(done) >= 3
    return machine


def test_the_wheel_holds_every_file_of_the_package(machine):
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "gateway_addon", "policies/examples"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    there = {re.sub("^policies/", "gateway_addon/policy/", name) for name in names if name and (ROOT / name).is_file()}
    held = set(zipfile.ZipFile(machine.wheel).namelist())
    assert there - held == set()
    assert {name for name in held if not name.startswith("gateway_addon-")} - there == set()


def test_the_image_has_its_user_and_the_bytecode_of_both_kinds(machine):
    assert [words for name, words in instructions() if name == "USER"] == ["10001"]
    if os.geteuid() == 0 and shutil.which("useradd"):
        assert re.match(r"gateway:x?[^:]*:10001:", (machine.folder / "users/etc/passwd").read_text())
    [addon] = machine.folder.glob("venv/lib/python*/site-packages/gateway_addon/addon.py")
    kinds = {path.name.partition(".cpython-")[2].partition(".")[2] for path in (addon.parent / "__pycache__").glob("addon.*")}
    assert kinds == {"pyc", "opt-1.pyc"}


async def answers(process: asyncio.subprocess.Process, port: int, path: str) -> dict:
    """What is answered once it listens and is ready."""
    until = time.monotonic() + START_S
    while True:
        assert process.returncode is None, (await process.communicate())[0].decode()
        try:
            with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return json.load(answer)
        except OSError:
            assert time.monotonic() < until
            await asyncio.sleep(0.1)


async def test_its_commands_work_where_there_is_no_clone(machine):
    """As a newcomer types them: init, docs, demo; then serve as the image does it, and the addon in a mitmdump of one's own."""
    home, port, other = machine.folder / "home", free_port(), free_port()
    made = machine.run("gateway", "init", "--yes")
    assert (made.returncode, made.stderr) == (0, "")
    shown = machine.run("gateway", "docs", "running")
    assert (shown.returncode, shown.stdout) == (0, (ROOT / "gateway_addon/docs/running.md").read_text())
    added = machine.run("gateway", "app", "add", "claude-code", "--from", "claude-code")
    assert (added.returncode, added.stdout[:4]) == (0, "gwt_"), added.stderr
    where = json.loads(machine.run("python", "-m", "gateway_addon", "where", "--json").stdout)
    assert [where[name]["place"] for name in ("policies", "ledger")] == [str(home / ".config/gateway/policies"), str(home / ".local/share/gateway/gateway.db")]
    script = machine.run("python", "-c", "import gateway_addon; print(gateway_addon.__path__[0])").stdout.strip() + "/addon.py"
    assert script.startswith(str(machine.folder))
    image = json.loads(next(words for name, words in instructions() if name == "CMD"))
    mitmdump = ["python", "-c", "from mitmproxy.tools.main import mitmdump; mitmdump()", "--mode", "reverse:https://api.anthropic.com"]
    mitmdump += ["--listen-host", "127.0.0.1", "--listen-port", str(other), "--set", f"confdir={machine.folder / 'mitmproxy'}", "-s", script]
    started = [["gateway", "demo", "--json"], image, mitmdump, ["gateway", "console", "--listen", "127.0.0.1:0"]]
    environment = machine.environment | {"GATEWAY_LISTEN": f"127.0.0.1:{port}"}
    demo, serve, own, console = [await asyncio.create_subprocess_exec(*command, cwd=machine.folder, env=environment, **QUIET) for command in started]
    try:
        assert (await answers(serve, port, "/gateway/healthz"))["status"] == "ok"
        assert (await answers(own, other, "/gateway/readyz"))["status"] == "ready"
        assert b"/login/" in await asyncio.wait_for(console.stdout.readline(), START_S)
        told = json.loads((await asyncio.wait_for(demo.communicate(), 120))[0])
    finally:
        for process in (demo, serve, own, console):
            if process.returncode is None:
                process.terminate()
        ended = [await asyncio.wait_for(process.communicate(), 60) for process in (serve, own, console)]
    assert (demo.returncode, serve.returncode, own.returncode) == (0, 0, 0), (told, ended)


INSTALLED_BY = re.findall(r"^((pipx|uv) .*install .*\.whl)$", (ROOT / "gateway_addon/docs/running.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("line", "tool"), INSTALLED_BY, ids=[tool for _, tool in INSTALLED_BY])
async def test_the_handbooks_line_installs_the_wheel(machine, tmp_path, line, tool):
    """Typed as it stands there, in a home of its own, with packages from the registry; then each command, in another folder."""
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is not installed here: pip install {tool}")
    home, elsewhere, port = tmp_path / "home", tmp_path / "another folder", free_port()
    home.mkdir()
    elsewhere.mkdir()
    shutil.copy(machine.wheel, tmp_path)
    path = f"{home}/.local/bin:{Path(found).parent}:/usr/bin:/bin"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "XDG_", "PYTHON"))}
    environment |= {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8", "ANTHROPIC_API_KEY": "sk-ant-none", "GATEWAY_LISTEN": f"127.0.0.1:{port}"}
    typed = line.replace("python3.13", sys.executable)
    await asyncio.to_thread(subprocess.run, ["sh", "-ec", typed], cwd=tmp_path, env=environment, check=True, timeout=300)

    def says(*arguments):
        done = subprocess.run(["gateway", *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    assert "gateway token issue app" in says("init", "--yes")
    assert json.loads(says("where", "--json"))["policies"]["place"] == str(home / ".config/gateway/policies")
    assert says("docs", "running") == (ROOT / "gateway_addon/docs/running.md").read_text()
    says("demo", "--json")
    serve = await asyncio.create_subprocess_exec("gateway", "serve", cwd=elsewhere, env=environment, **QUIET)
    console = await asyncio.create_subprocess_exec("gateway", "console", "--listen", "127.0.0.1:0", cwd=elsewhere, env=environment, **QUIET)
    try:
        assert (await answers(serve, port, "/gateway/healthz"))["status"] == "ok"
        assert b"/login/" in await asyncio.wait_for(console.stdout.readline(), START_S)
        assert b"gateway console --link" in await console.stdout.readline()
    finally:
        for process in (serve, console):
            process.terminate()
            await asyncio.wait_for(process.communicate(), 30)
    assert [each.name for each in elsewhere.iterdir()] == []
