"""Hints name a command that works where they are printed: as `run.sh` was called in a clone, `gateway` where that is installed."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkouts import ROOT, clone

from gateway_addon.cli import COMMANDS, main

COMMAND = re.compile(rf"\bgateway (?:{'|'.join(name for name in COMMANDS if name not in ('token', 'local', 'app'))}|token (?:issue|list|revoke))\b")
NO_HINTS = {
    "demo/client.py": "a user-agent", "policy/keys.py": "the reference of keys, which is printed in the handbook", "ledger/admin.py": "the reason in an audit row", "cli/run.py": "the reason in an audit row",
    "ledger/maintenance/migrate.py": "a lock's name", "ledger/store/postgres.py": "a lock's name", "cli/completion.py": "lines for a shell's start, which knows `gateway` alone",
}  # fmt: skip


def spelt_out(path: Path) -> list[str]:
    """The strings of a module, its docstrings apart, that name a command by `gateway` whatever this program is called."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings]
    return [text for text in strings if COMMAND.search(text)]


def test_no_sentence_spells_the_programs_name_out():
    package = ROOT / "gateway_addon"
    modules = {str(path.relative_to(package)): path for path in package.rglob("*.py") if "simulator" not in path.parts}
    assert {name: found for name, path in modules.items() if name not in NO_HINTS and (found := spelt_out(path))} == {}
    assert not [path for path in package.rglob("*.html") if COMMAND.search(path.read_text())]


HINTS = {
    # what is typed (the ledger and the policies are missing): what is printed
    ("report",): "`{} init` makes one",
    ("check",): "`{} init` writes a first policy",
    ("pause", "--help"): "until {} resume",
    ("token", "issue", "--help"): "Usage: {} token issue",
    ("cap", "raise", "--help"): "Example: {} cap raise",
}
NAMES = ["./run.sh", "../a project/run.sh"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("hints"))


@pytest.mark.parametrize(("arguments", "hint"), HINTS.items(), ids=lambda value: " ".join(value))
def test_a_hint_begins_as_run_sh_was_called(arguments, hint, project):
    """By the clone's own script, in its folder and with a space in the path; the second can be typed again, for it is quoted."""
    environment = os.environ | {"GATEWAY_POLICIES": str(project / "none"), "GATEWAY_LEDGER": f"sqlite:///{project}/none.db"}
    for typed in NAMES if arguments == ("check",) else NAMES[:1]:
        done = subprocess.run([typed, *arguments], cwd=project, env=environment, capture_output=True, text=True, timeout=60)
        assert hint.format(typed.replace(" ", "\\ ")) in " ".join((done.stdout + done.stderr).split())


def test_an_installed_gateway_is_called_by_its_name():
    program = subprocess.run([sys.executable, "-c", "from gateway_addon.names import PROGRAM; print(PROGRAM)"], env={}, cwd=ROOT, capture_output=True, text=True)
    assert program.stdout == "gateway\n"
    assert main.name == "main"
