"""What all commands owe to whoever types them: an example that works, a place in the handbook, a clean Ctrl-C."""

import errno
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from handbook import README, page, topics

from gateway_addon.cli import COMMANDS, FOR_PROGRAMS, INTERRUPTED, main
from gateway_addon.ledger.store import sqlite_files

PAGES = README.read_text() + "".join(map(page, topics()))


def named(group: click.Group = main, path: tuple[str, ...] = ()) -> dict[str, click.Command]:
    """Every command and subcommand by what is typed."""
    found = {}
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        found[" ".join([*path, name])] = command
        if isinstance(command, click.Group):
            found |= named(command, (*path, name))
    return found


ALL = named()


@pytest.mark.parametrize("name", ALL)
def test_its_help_ends_with_an_example_that_its_options_take(name, tmp_path, monkeypatch):
    example = re.search(r"^Example: (.+)$", ALL[name].epilog or "", re.MULTILINE)
    assert example, f"gateway {name} --help shows no example"
    typed = shlex.split(re.search(r"gateway ([^&;>)]*)", example[1])[1])
    command, arguments = main, typed
    while isinstance(command, click.Group):
        command = command.get_command(click.Context(command), arguments[0])
        arguments = arguments[1:]
    assert " ".join(typed).startswith(name)
    for path in ("~", "request.json", "answer.sse"):  # what the examples name, and the reader has
        (tmp_path / path).touch()
    (tmp_path / "tomorrow").mkdir()
    monkeypatch.chdir(tmp_path)
    with command.make_context("gateway", arguments):
        pass


OF_ANOTHER_PROGRAM = ("statusline", "completion")
"""Their help quotes what another program's settings hold: it names the installed command."""


def test_help_is_written_in_one_way():
    """Options are sentences, --json is said once, no line of a list is cut short, and no hint names a command that a clone has not."""
    for name, command in ALL.items():
        assert name in OF_ANOTHER_PROGRAM or not re.search(rf"(?<!\.)\bgateway ({'|'.join(COMMANDS)})\b", command.help or ""), name
        for each in command.params:
            text = getattr(each, "help", None) or "Sentence."
            assert (text[0].isupper() or text.startswith("json:"), text[-1]) == (True, "."), (name, text)
            assert each.name != "as_json" or text in ("Print JSON, for programs.", "Print the outcome as JSON instead of telling the story."), name
        if isinstance(command, click.Group):
            assert "..." not in CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=60).output.partition("Commands:")[2], name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_handbook_shows_how_it_is_called(name):
    assert re.search(rf"(\./run\.sh|gateway) {name}\b", PAGES)


def test_the_help_of_all_fits_a_screen():
    shown = CliRunner().invoke(main, ["--help"]).output
    assert len(shown.splitlines()) < 45
    assert max(map(len, shown.splitlines())) <= 80
    assert re.findall(r"^  (\w+)", shown.partition("Commands:")[2], re.MULTILINE) == [name for name in COMMANDS if name not in FOR_PROGRAMS]


def test_a_mistyped_command_is_told_from_the_right_ones():
    wrong = CliRunner().invoke(main, ["reprot"])
    assert (wrong.exit_code, "No such command 'reprot'. Did you mean 'report'?" in wrong.output) == (2, True)
    deeper = CliRunner().invoke(main, ["cap", "rais"])
    assert (deeper.exit_code, "Did you mean 'raise'?" in deeper.output) == (2, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_completion_script(shell):
    shown = CliRunner().invoke(main, ["completion", shell])
    assert (shown.exit_code, "_GATEWAY_COMPLETE" in shown.stdout) == (0, True), shown.output


def test_commands_and_versions_answer_in_short_too():
    completed = CliRunner().invoke(main, [], prog_name="gateway", env={"_GATEWAY_COMPLETE": "bash_complete", "COMP_WORDS": "gateway ca", "COMP_CWORD": "1"})
    assert completed.output == "plain,cap\n"
    assert CliRunner().invoke(main, ["-V"]).output.startswith("gateway, version ")


DECIDED = ("mode=", "mode=socks5", "ignore_hosts=.*", "allow_hosts=x", "tcp_hosts=.*", "server=false", "listen_port=1")


@pytest.mark.parametrize("command", [["serve", "--workers", "1"], ["web", "--web-port", "8099"]])
@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("nothing", "--set: Unknown option(s): nothing."),
        ("tcp_timeout=soon", "--set: Failed to parse option tcp_timeout: not an integer: soon."),
        ("proxy_debug=true", "--set: The gateway needs proxy_debug=false"),
        *((each, f"--set: {each.partition('=')[0]} is the gateway's to decide, from --listen and the policy's upstream") for each in DECIDED),
    ],
)
def test_option_unknown_to_mitmproxy_is_a_sentence(command, option, sentence, tmp_path, monkeypatch):
    """An option that mitmproxy does not take is reported in a sentence."""
    (tmp_path / "gateway.yaml").write_text("workspace_geo: global\n")
    sqlite_files.create(tmp_path / "gateway.db")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-none")
    where = ["--listen", "127.0.0.1:0", "--policies", str(tmp_path), "--ledger", f"sqlite:///{tmp_path}/gateway.db"]
    done = CliRunner().invoke(main, [*command, *where, "--set", option])
    assert (done.exit_code, sentence in done.output) == (2, True), done.output


@pytest.mark.parametrize(
    ("arguments", "given", "said", "code"),
    [
        (["meter", "--jsonl"], '{"id": 1, "body": "{}"}\n', "{", INTERRUPTED),
        (["demo"], "", "The gateway, a process", INTERRUPTED),
        (["console", "--listen", "127.0.0.1:0"], "", "console", 0),
    ],
)
def test_ctrl_c_ends_it_without_traceback_or_left_process(arguments, given, said, code, tmp_path):
    """Ctrl c ends it without a traceback and leaves no process."""
    (tmp_path / "gateway.yaml").write_text("workspace_geo: global\n")
    sqlite_files.create(tmp_path / "gateway.db")
    where = {"GATEWAY_LEDGER": f"sqlite:///{tmp_path}/gateway.db", "GATEWAY_POLICIES": str(tmp_path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gateway_addon", *arguments], env=os.environ | where, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write(given)
    process.stdin.flush()
    assert next(line for line in process.stdout if said in line)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in errors) == (code, False), errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not list(tmp_path.glob("gateway-demo-*"))


def test_an_output_that_nothing_takes_is_said(monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(SystemExit) as ended:
        main(["docs"])
    assert (ended.value.code, capsys.readouterr().err) == (1, "The output cannot be written: No space left on device.\n")


@pytest.mark.parametrize("name", ALL)
def test_environment_tells_every_command_the_places(name):
    """The environment says where policies and ledger are, to every command that asks."""
    options = {opt: param.envvar for param in ALL[name].params for opt in param.opts}
    assert options.get("--policies", "GATEWAY_POLICIES") == "GATEWAY_POLICIES"
    assert options.get("--ledger", "GATEWAY_LEDGER") == "GATEWAY_LEDGER"
    if name not in ("console", "local"):  # they listen on ports of their own
        assert options.get("--listen", "GATEWAY_LISTEN") == "GATEWAY_LISTEN"


TABLES = {"app list", "invoice", "audit", "batches", "cap list", "demo", "check", "token list", "report", "sessions", "run", "explain", "replay", "prices", "inventory", "cutover", "reconcile", "doctor"}


def test_what_prints_a_table_prints_json_too():
    assert {name for name, command in ALL.items() if any("--json" in param.opts for param in command.params)} >= TABLES
    importing = {name for name in COMMANDS if "import table\n" in (Path(__file__).parents[2] / f"gateway_addon/cli/{COMMANDS[name][0]}.py").read_text()}
    assert importing - {"token", "cap", "app"} <= TABLES, "a command that prints a table says it to programs too"


@pytest.mark.parametrize("arguments", [["adjust", "99999999999999999999", "1", "--why", "x"], ["token", "revoke", "app", "--id", "99999999999999999999"]])
def test_a_number_that_no_ledger_counts_to_is_refused(arguments):
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, "is not in the range 1<=x<=9223372036854775807" in done.output) == (2, True), done.output


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("chek", "No such command 'chek'. Did you mean 'check'?"),
        ("token isue app", "No such command 'isue'. Did you mean 'issue'?"),
        ("--nope", "No such option '--nope'."),
        ("doctor --nope", "No such option '--nope'."),
        ("cap raise app", "Missing argument '{day|week|month"),
        ("reconcile", "Missing option '--since': the first day, in the gateway's zone"),
        ("app add x --from nope", "There is no example 'nope'; the examples: "),
        ("pause --all", "There is no ledger at "),
        ("report --by ap", "--by ap: did you mean app?"),
    ],
)
def test_each_error_begins_with_its_sentence(line, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("GATEWAY_LEDGER", f"sqlite:///{tmp_path / 'gateway.db'}")
    monkeypatch.setenv("GATEWAY_POLICIES", str(tmp_path))
    done = CliRunner().invoke(main, line.split(), prog_name="gateway")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(sentence)
    assert "Usage: " not in done.stderr or done.stderr.splitlines()[1].startswith("Usage: gateway")
    assert ("Example: gateway " in done.stderr) == sentence.startswith("Missing"), "what is left out is shown"
