"""`./run.sh`, from any folder, with spaces in the path, twice at the same time, and without a Python that will do."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkouts import clone


def run(root: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([root / "run.sh", *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_it_runs_from_any_folder_with_spaces_in_the_path_and_installs_nothing_twice(tmp_path):
    root = clone(tmp_path)
    done = run(root, "prices", "--json", cwd=Path("/"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "claude-haiku-4-5" in done.stdout


def test_two_at_the_same_time_do_not_meet(tmp_path):
    root = clone(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run(root, "--version", cwd=tmp_path), range(2)))
    assert [done.returncode for done in both] == [0, 0]


def test_without_a_suitable_python_it_says_what_to_install(tmp_path):
    root = clone(tmp_path)
    shutil.rmtree(root / ".venv")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "env"):
        (tools / tool).symlink_to(shutil.which(tool))
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # as an older Python answers the question for its version
    old.chmod(0o755)
    nowhere = {"PATH": str(tools), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path), "UV_PYTHON_INSTALL_DIR": str(tmp_path)}
    done = run(root, "demo", cwd=tmp_path, **nowhere)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Python 3.12 or newer" in done.stderr
    assert "install it" in done.stderr


@pytest.mark.soak
def test_a_fresh_checkout_prepares_itself_and_again_only_when_the_lock_changes(tmp_path):
    root = clone(tmp_path)
    shutil.rmtree(root / ".venv")
    first = run(root, "--version", cwd=tmp_path)
    assert first.returncode == 0
    assert "Installing requirements.lock (once)" in first.stderr
    assert run(root, "--version", cwd=tmp_path).stderr == ""
    with open(root / "requirements.lock", "a") as lock:
        lock.write("\n")
    assert "Installing requirements.lock (once)" in run(root, "--version", cwd=tmp_path).stderr
