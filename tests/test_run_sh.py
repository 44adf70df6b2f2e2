"""`./run.sh`, from any folder, with spaces in the path, twice at the same time, and without a Python that will do."""

import os
import pty
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkouts import clone


def run(root: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([root / "run.sh", *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_run_sh_works_from_any_folder_and_installs_once(tmp_path):
    """Also with spaces in the path."""
    root = clone(tmp_path)
    done = run(root, "prices", "--json", cwd=Path("/"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "claude-haiku-4-5" in done.stdout


def test_two_at_the_same_time_do_not_meet(tmp_path):
    root = clone(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run(root, "--version", cwd=tmp_path), range(2)))
    assert [done.returncode for done in both] == [0, 0]


def machine(folder: Path, *pythons: tuple[str, str]) -> tuple[Path, dict[str, str]]:
    """A clone without an environment, and a machine on which only these Pythons are found, as (path, version)."""
    root = clone(folder)
    shutil.rmtree(root / ".venv")
    for tool in ("bin/bash", "bin/dirname", "bin/env"):
        (folder / tool).parent.mkdir(exist_ok=True)
        (folder / tool).symlink_to(shutil.which(Path(tool).name))
    for path, version in pythons:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        # It answers the question for its version by this interpreter, with another version in its place, and else says who it is.
        (folder / path).write_text(
            f"""#!/bin/sh
[ "$1" = -c ] || {{ echo "{path}" >&2; exit 7; }}
exec "{sys.executable}" -c "import collections, sys, sysconfig
Version = collections.namedtuple('Version', 'major minor micro releaselevel serial')
sys.version_info = Version(*{version})
$2"
"""
        )
        (folder / path).chmod(0o755)
    return root, {"PATH": str(folder / "bin"), "HOME": str(folder), "PYENV_ROOT": str(folder / "pyenv"), "UV_PYTHON_INSTALL_DIR": str(folder / "uv")}


def test_without_a_suitable_python_it_says_what_to_install(tmp_path):
    root, nowhere = machine(tmp_path, ("bin/python3", "(3, 11, 9, 'final', 0)"))
    done = run(root, "demo", cwd=tmp_path, **nowhere)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Python 3.12, 3.13 or 3.14" in done.stderr
    assert "install it" in done.stderr


PYTHONS = [
    # what is found on the machine, the newest that the locks are made for last
    [("bin/python3", "(3, 15, 0, 'final', 0)"), ("bin/python3.12", "(3, 12, 9, 'final', 0)")],
    [("bin/python3", "(3, 12, 3, 'final', 0)"), ("pyenv/versions/3.12.1/bin/python3", "(3, 12, 1, 'final', 0)"), ("pyenv/versions/3.13.0/bin/python3", "(3, 13, 0, 'final', 0)")],
    [("pyenv/versions/3.13.2/bin/python3", "(3, 13, 2, 'final', 0)"), ("uv/cpython-3.13.10-linux/bin/python3", "(3, 13, 10, 'final', 0)")],
    [("pyenv/versions/3.14.0rc2/bin/python3", "(3, 14, 0, 'candidate', 2)"), ("uv/cpython-3.15.0-linux/bin/python3", "(3, 15, 0, 'final', 0)"), ("bin/python3.13", "(3, 13, 1, 'final', 0)")],
    [("bin/python3", "(3, 11, 2, 'final', 0)"), ("uv/cpython-3.14.1-linux/bin/python3", "(3, 14, 1, 'final', 0)")],
]  # fmt: skip


@pytest.mark.parametrize("pythons", PYTHONS, ids=["too new", "pyenv", "ten after two", "unfinished", "uv"])
def test_it_takes_the_newest_python_that_the_locks_support(pythons, tmp_path):
    root, found = machine(tmp_path, *pythons)
    done = run(root, "demo", cwd=tmp_path, **found)
    assert done.stderr == f"{pythons[-1][0]}\n"


def test_a_terminal_shows_how_far_the_installation_is(tmp_path):
    """The environment's pip is a script here, which says what the real one says; a file gets the one line that it got before."""
    root = clone(tmp_path)
    python = root / ".venv" / "bin" / "python"
    said = "Collecting aioquic==1.2.0 (from -r requirements.lock (line 1))\\nProcessing /wheels/attrs-26.1.0-py3-none-any.whl\\nInstalling collected packages\\n"
    (root / ".venv" / "site").mkdir()
    pip = f"""#!/bin/sh
case "$*" in "-m pip install"*) printf '{said}'; exit "${{PIP_ENDS:-0}}";; *purelib*) echo "{root}/.venv/site"; exit 0;; esac
"""
    python.write_text(python.read_text().replace("#!/bin/sh\n", pip))
    stamp = root / ".venv" / "installed-requirements.lock"
    stamp.unlink()
    ours, theirs = pty.openpty()
    done = subprocess.run([root / "run.sh", "--version"], stderr=theirs, stdout=subprocess.DEVNULL, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    total = sum("==" in line for line in (root / "requirements.lock").read_text().splitlines())
    assert done.returncode == 0
    assert f"  1 of {total}: aioquic==1.2.0\r" in shown
    assert f"  2 of {total}: attrs-26.1.0-py3-none-any.whl\r" in shown
    stamp.unlink()
    assert run(root, "--version", cwd=tmp_path).stderr == "Installing requirements.lock (once) ...\n"
    stamp.unlink()
    failed = run(root, "--version", cwd=tmp_path, PIP_ENDS="1")
    assert (failed.returncode, stamp.exists()) == (1, False)
    assert failed.stderr.endswith("Installing collected packages\n\nThe environment could not be prepared: the lines above say why.\n")


@pytest.mark.soak
def test_run_sh_installs_anew_only_when_the_lock_changes(tmp_path):
    """A fresh checkout prepares itself."""
    root = clone(tmp_path)
    shutil.rmtree(root / ".venv")
    first = run(root, "--version", cwd=tmp_path)
    assert first.returncode == 0
    assert "Installing requirements.lock (once)" in first.stderr
    assert run(root, "--version", cwd=tmp_path).stderr == ""
    with open(root / "requirements.lock", "a") as lock:
        lock.write("\n")
    assert "Installing requirements.lock (once)" in run(root, "--version", cwd=tmp_path).stderr
