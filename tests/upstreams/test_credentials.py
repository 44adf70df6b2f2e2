"""Where a secret is read from, when it is read again, and what is said where it cannot be: never the secret."""

import asyncio
import ctypes
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner
from gateway import write_policies
from users import needs_root

from gateway_addon.cli import main
from gateway_addon.policy import Source, load
from gateway_addon.upstreams import credentials
from gateway_addon.upstreams.credentials import SecretUnavailable, WatchedSecret

KEY = "sk-ant-api03-first"
NEXT = "sk-ant-api03-second"


def printing(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def held_in(folder: Path, kind: str) -> tuple[Source, dict[str, str]]:
    (folder / "key").write_text(f"{KEY}\n")
    source = {
        "env": Source("env", "REAL_KEY"),
        "file": Source("file", str(folder / "key")),
        "command": Source("command", printing(f"print('{KEY}')")),
    }[kind]
    return source, {"REAL_KEY": KEY, "PATH": os.environ["PATH"]}


@pytest.mark.parametrize("kind", ["env", "file", "command"])
def test_a_key_is_read_from_its_source_and_is_in_no_repr(tmp_path, kind):
    source, environment = held_in(tmp_path, kind)
    secret = WatchedSecret(source, environment)
    assert secret() == KEY
    assert repr(secret).startswith(f"Secret({kind} ")
    assert kind == "command" or KEY not in repr(secret)  # this test's command is the key's text itself


def test_a_file_is_read_again_as_soon_as_it_changes(tmp_path):
    secret = WatchedSecret(held_in(tmp_path, "file")[0])
    assert secret() == KEY
    (tmp_path / "new").write_text(NEXT)
    os.replace(tmp_path / "new", tmp_path / "key")
    assert secret() == NEXT


def counting(folder: Path) -> WatchedSecret:
    """Behind a command that says how often it was asked: x, xx, ... until there is a file `broken`."""
    code = f"import pathlib, sys; p = pathlib.Path({str(folder)!r}); (p / 'broken').exists() and sys.exit(1)"
    code += "; n = p / 'n'; n.write_text(n.read_text() + 'x' if n.exists() else 'x'); print(n.read_text())"
    return WatchedSecret(Source("command", printing(code)))


def test_a_command_is_asked_once_and_again_when_told(tmp_path):
    secret = counting(tmp_path)
    assert (secret(), secret()) == ("x", "x")
    secret.renew()
    assert (secret(), secret()) == ("xx", "xx")
    (tmp_path / "broken").touch()
    with pytest.raises(SecretUnavailable):
        secret.renew()
    assert secret() == "xx", "what was read before stays"


@pytest.mark.parametrize("refused", [True, False], ids=["after a refusal", "by the clock"])
async def test_a_running_gateway_renews_its_key(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(credentials, "ASK_AGAIN_S", 0)
    monkeypatch.setattr(credentials, "ASK_EVERY_S", 1000 if refused else 0.2)
    secret, hurry = counting(tmp_path), asyncio.Event()
    assert secret() == "x"
    if refused:
        hurry.set()
    async with asyncio.timeout(60):
        await credentials.renew_when_due(secret, hurry)
    assert (secret(), hurry.is_set()) == ("xx", False)


async def test_a_password_manager_that_fails_leaves_the_key_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(credentials, "ASK_AGAIN_S", 0)
    secret, hurry = counting(tmp_path), asyncio.Event()
    assert secret() == "x"
    (tmp_path / "broken").touch()
    hurry.set()
    with pytest.raises(SecretUnavailable, match="ended with status"):
        await credentials.renew_when_due(secret, hurry)
    assert secret() == "x"


def test_a_command_sees_no_secret_of_the_gateway(tmp_path):
    alerts = "alerts: {webhook: {env: HOOK}}"
    app = {"reports": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\nalerts: {webhook: {env: OTHER_HOOK}}\n"}
    policy = load(write_policies(tmp_path, "https://localhost", app, f"admin_key: {{env: ADMIN}}\n{alerts}\n"))
    assert policy.secret_variables == {"SIMULATED_KEY", "ADMIN", "HOOK", "OTHER_HOOK"}
    own = dict.fromkeys((*policy.secret_variables, "ANTHROPIC_API_KEY", "GATEWAY_LEDGER"), "secret")
    shown = printing("import os; print(','.join(sorted(name for name in os.environ if not name.startswith('LC_'))))")
    given = {"PATH": os.environ["PATH"], "OP_SERVICE_ACCOUNT_TOKEN": "the manager's own", **own}
    assert WatchedSecret(Source("command", shown), given, withheld=policy.secret_variables)() == "OP_SERVICE_ACCOUNT_TOKEN,PATH"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Source("env", "NOT_THERE"), "The environment variable NOT_THERE is not set"),
        (Source("file", "/nonexistent/key"), "The key file /nonexistent/key cannot be read"),
        (Source("command", ("/nonexistent/manager",)), r"failed .FileNotFoundError"),
        (Source("command", printing(f"import sys; print('{KEY}'); sys.exit(3)")), "ended with status 3"),
        (Source("command", printing("print('two words')")), "is not a key"),
        (Source("command", printing("print()")), "is not a key"),
        (Source("command", printing("while True: print('k' * 999)")), "gives more than 10,000 bytes"),
        (Source("file", "/dev/zero"), r"/dev/zero cannot be read .it is no file."),
        (Source("file", "/"), "it is no file"),
    ],
)
def test_a_key_that_cannot_be_read_is_a_sentence_without_it(source, said):
    with pytest.raises(SecretUnavailable, match=said) as problem:
        WatchedSecret(source, {"PATH": os.environ["PATH"]})()
    assert KEY not in str(problem.value) or source.kind == "command"


@pytest.mark.parametrize(
    "code",
    ["import time; time.sleep(30)", "import subprocess, time; subprocess.Popen(['sleep', '3'])", "import os, time; os.close(1); time.sleep(30)"],
    ids=["itself", "its child", "silently"],
)
def test_a_command_that_hangs_has_an_end(monkeypatch, code):
    monkeypatch.setattr(credentials, "COMMAND_TIMEOUT_S", 0.3)
    with pytest.raises(SecretUnavailable, match="TimeoutExpired"):
        WatchedSecret(Source("command", printing(code)))()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"\ufeff{KEY}\r\n", None),
        (f'"{KEY}"\n', "it has quotes around it"),
        (f"'{KEY}", "it has quotes around it"),
        (f"ANTHROPIC_API_KEY={KEY}\n", "it begins with NAME=, as in a .env file"),
        (f"export KEY = '{KEY}'\n", "it begins with NAME=, as in a .env file"),
        (f"{KEY}\n{NEXT}\n", "it is empty or has spaces or line breaks in it"),
        ("k" * 10_001, "gives more than 10,000 bytes: that is no key"),
        ("k" * 10_000, None),
    ],
    ids=lambda text: ascii(text)[:24],
)
def test_a_key_file_is_read_or_refused_with_the_reason(tmp_path, content, said):
    """A key with quotes was sent with them, and refused by the provider at the first call."""
    (tmp_path / "key").write_text(content)
    secret = WatchedSecret(Source("file", str(tmp_path / "key")))
    if said is None:
        assert secret() == content.strip("\ufeff\r\n")
    else:
        with pytest.raises(SecretUnavailable, match=said) as problem:
            secret()
        assert KEY not in str(problem.value)


def test_of_a_large_key_file_little_is_read(tmp_path):
    with (tmp_path / "key").open("wb") as file:
        file.truncate(100 * 2**20)
    tracemalloc.start()
    with pytest.raises(SecretUnavailable, match="gives more than 10,000 bytes"):
        WatchedSecret(Source("file", str(tmp_path / "key")))()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# The keyring


def keyring(folder: Path, held: str | None) -> dict[str, str]:
    """An environment in which the keyring package finds a backend of this test's own."""
    (folder / "backend.py").write_text(
        "from keyring.backend import KeyringBackend\n\n"
        "class Held(KeyringBackend):\n    priority = 1\n"
        f"    def get_password(self, service, user):\n        return {held!r} if (service, user) == ('claude', 'gateway') else None\n"
        "    def set_password(self, service, user, password): ...\n"
        "    def delete_password(self, service, user): ...\n"
    )
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(folder), "PYTHON_KEYRING_BACKEND": "backend.Held"}


def test_a_key_comes_from_the_keyring(tmp_path):
    pytest.importorskip("keyring")
    assert WatchedSecret(Source("keyring", "claude/gateway"), keyring(tmp_path, KEY))() == KEY


def test_a_keyring_without_the_key_says_how_to_put_it_there(tmp_path):
    pytest.importorskip("keyring")
    with pytest.raises(SecretUnavailable, match=r"keyring for claude/other .keyring set SERVICE USER puts a key there. ended with status 1"):
        WatchedSecret(Source("keyring", "claude/other"), keyring(tmp_path, KEY))()


def test_without_the_keyring_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(credentials, "find_spec", lambda name: None)
    with pytest.raises(SecretUnavailable, match="pip install keyring"):
        WatchedSecret(Source("keyring", "claude/gateway"))()


# What other processes may look at


CONCEALED = """
import ctypes, os, subprocess, sys
from gateway_addon.upstreams.credentials import conceal

os.setgroups([])
os.setgid(65533)
os.setuid(65533)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as a program has it that was started by this user
look = f"cat /proc/{os.getpid()}/environ | grep -c REAL_KEY; head -c 1 /proc/{os.getpid()}/mem"
for hide in (lambda: None, conceal):
    hide()
    print(subprocess.run(["/bin/sh", "-c", look], capture_output=True, text=True))
"""


@needs_root
def test_a_child_program_cannot_read_its_parents_environment():
    """`gateway local` takes the real key out of a command's environment; the command looked it up in its parent's."""
    done = subprocess.run([sys.executable, "-c", CONCEALED], capture_output=True, text=True, env=os.environ | {"REAL_KEY": KEY}, check=True)
    before, after = done.stdout.splitlines()
    assert "stdout='1\\n'" in before, before
    assert "stdout='0\\n'" in after, after
    assert after.count("Permission denied") == 2, after


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
@pytest.mark.parametrize("command", [["serve", "--workers", "1"], ["web"], ["local"]], ids=lambda command: command[0])
def test_what_holds_the_real_key_hides_it_from_its_neighbours(command):
    kernel = ctypes.CDLL(None)
    try:
        done = CliRunner().invoke(main, [*command, "--listen", "192.0.2.1:0", "--policies", "/nonexistent"])
        assert (done.exit_code, kernel.prctl(3, 0, 0, 0, 0)) == (2, 0), done.output
    finally:
        kernel.prctl(4, 1, 0, 0, 0)
