"""`gateway run` as it is typed: a program of the Anthropic SDK with a token, a cap and a label of its own, and its bill."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from authority import ready_authority
from click.testing import CliRunner
from gateway import APP, gateway
from ledgers import rows, until
from processes import ledgered
from sealed import sealed

from gateway_addon.cli import main
from gateway_addon.cli import run as runs
from gateway_addon.cli.run_token import RunToken, token_of_a_run
from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.simulator import KEY, Simulator

NOBODY = "127.0.0.1:9"

SDK = """
import os, sys, anthropic
client = anthropic.Anthropic(max_retries=0)
for number in range(2):
    agent = {"x-claude-code-session-id": "s", **({"x-claude-code-agent-id": f"a{number}"} if number else {})}
    made = client.messages.create(
        model="claude-haiku-4-5", max_tokens=16, messages=[{"role": "user", "content": "hello"}], extra_headers=agent)
    print(made.content[0].type)
print("SIMULATED_KEY" in os.environ, os.environ["NO_PROXY"])
sys.exit(7)
"""
PLAIN = """
import json, os, urllib.error, urllib.request
body = {{"model": "claude-haiku-4-5", "max_tokens": {max_tokens}, "messages": [{{"role": "user", "content": "hello"}}]}}
headers = {{"x-api-key": os.environ["ANTHROPIC_API_KEY"], "content-type": "application/json", "anthropic-version": "2023-06-01"}}
try:
    urllib.request.urlopen(urllib.request.Request(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", json.dumps(body).encode(), headers))
except urllib.error.HTTPError as error:
    raise SystemExit(f"refused: {{error.code}}")
"""
WAITS = "import time; print('up', flush=True); time.sleep(60)"


def plain(max_tokens=16):
    """A program that makes one call, and starts in a tenth of the time of the SDK's."""
    return [sys.executable, "-c", PLAIN.format(max_tokens=max_tokens)]


INTERCEPTED = """
import sys, anthropic
client = anthropic.Anthropic(base_url=sys.argv[1])  # the address in the code, all else by default
for model, more in (("claude-haiku-4-5", {}), ("claude-sonnet-5", {"x-claude-code-agent-id": "a1"}), ("claude-sonnet-5", {})):
    tokens = 16 if more or "haiku" in model else 100_000
    messages = [{"role": "user", "content": "hello"}]
    with client.messages.stream(model=model, max_tokens=tokens, messages=messages, extra_headers=more) as stream:
        print(stream.get_final_message().model)
"""


async def started(folder, listen, *arguments, **more):
    """A `gateway run` in a process of its own, which sees the real key and a proxy on the way."""
    line = [sys.executable, "-m", "gateway_addon", "run", *arguments]
    where = {"GATEWAY_POLICIES": f"{folder}/policies", "GATEWAY_LEDGER": f"sqlite:///{folder}/gateway.db", "GATEWAY_LISTEN": listen}
    proxied = {"HTTP_PROXY": "http://127.0.0.1:9", "ANTHROPIC_API_KEY": "sk-ant-api03-real"}
    environment = os.environ | where | {"SIMULATED_KEY": KEY} | proxied | more
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    return await asyncio.create_subprocess_exec(*line, env=environment, **pipes)


async def run(folder, listen, *arguments, **more):
    """Its exit code, what its command printed, and what it said itself."""
    process = await started(folder, listen, *arguments, **more)
    printed, said = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, printed.decode(), said.decode()


def token(folder):
    return rows(folder / "gateway.db", "SELECT app, revoked_at IS NOT NULL, labels FROM tokens WHERE label = 'run' ORDER BY id DESC LIMIT 1")[0]


async def test_a_command_has_a_cap_a_label_and_a_bill_of_its_own(tmp_path, monkeypatch):
    """Beside a gateway that runs: a program of the SDK, and one that its cap stops at its first call."""
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP, "other": APP}) as gw:
        listen = gw.url.removeprefix("http://")
        code, printed, said = await run(tmp_path, listen, "--app", "app", "--cap", "$2", "--label", "pr=41", "--", sys.executable, "-c", SDK)
        assert (code, printed.split("\n")) == (7, ["text", "text", "False 127.0.0.1", ""]), said
        assert "└ a1" in said
        assert " of $2.00 in 2 calls." in said.splitlines()[-1], said
        assert token(tmp_path) == ("app", 1, '{"pr": "41"}')
        assert rows(tmp_path / "gateway.db", "SELECT DISTINCT labels, session_id, state FROM calls") == [('{"pr": "41"}', "s", "settled")]

        assert await gw.spent_nano() == (await api.settled()).billed_nano

        monkeypatch.setattr("gateway_addon.ledger.ledger.LINGER_S", 0.3)  # a refusal's row comes after its answer
        capped = ["--app", "app", "--cap", "$0.001", "--until", "30m", "--json", "--"]
        code, printed, said = await run(tmp_path, listen, *capped, *plain(max_tokens=4000))
        bill = json.loads(printed)
        assert (code, "refused: 429" in said) == (3, True), said
        assert (bill["cut"], bill["code"], bill["cap_nano"], bill["spent_nano"], bill["refused"]) == (True, 1, 1_000_000, 0, 1)
        assert len((await api.settled()).messages()) == 2
        assert token(tmp_path)[1] == 1


async def test_a_run_inside_a_run_uses_the_gateway_of_the_outer_one(tmp_path, monkeypatch):
    """It could start none: the real key is not in its environment."""
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", gw.url)
        monkeypatch.setenv("GATEWAY_TOKEN", "the outer one's")
        monkeypatch.setattr(runs, "RECORDED_WITHIN_S", 0)

        def led_to():
            with runs._gateway(gw.gateway.policy, tmp_path, "", ("127.0.0.1", 9), RunToken(1, gw.tokens["app"], 0, 0)) as base_url:
                return base_url

        assert await asyncio.to_thread(led_to) == gw.url


async def test_where_no_gateway_runs_one_is_started_for_the_command(tmp_path):
    """It uses the same policies and ledger, and ends with the command."""
    async with Simulator() as api:
        ledgered(tmp_path, api.url, {"app": APP})
        code, _, said = await run(tmp_path, NOBODY, "--cap", "1", "--", *plain())
        assert (code, " of $1.00 in 1 call." in said) == (0, True), said
        assert len((await api.settled()).messages()) == 1


@pytest.mark.parametrize("form", ["--json", pytest.param("table", marks=pytest.mark.soak)])
async def test_a_run_that_is_intercepted_meets_its_cap_and_has_a_bill(tmp_path, form):
    """The SDK with the API's own address: two agents on two models, then a call that the run's cap does not allow."""
    ready_authority(tmp_path / ".mitmproxy")
    async with sealed(tmp_path) as far:
        ledgered(tmp_path, far.url, {"app": f"{APP}reserve: full\n"}, f"egress: {{ca: {far.ca}}}\n")
        options = ["--local", "--cap", "0.05", "--label", "pr=7", *(["--json"] if form == "--json" else []), "--"]
        code, printed, said = await run(
            tmp_path, NOBODY, *options, sys.executable, "-c", INTERCEPTED, far.url, HOME=str(tmp_path), HTTP_PROXY=""
        )
        billed_nano = (await far.api.settled()).billed_nano
        assert len(far.api.book.messages()) == 2
    models = ["claude-haiku-4-5-20251001", "claude-sonnet-5"]
    assert (code, [line for line in printed.splitlines() if line in models]) == (3, models), said
    assert "anthropic.RateLimitError" in said
    database = tmp_path / "gateway.db"
    assert rows(database, "SELECT DISTINCT app, endpoint, labels FROM calls") == [("app", "local/messages", '{"pr": "7"}')]
    assert token(tmp_path)[1] == 1
    if form == "--json":
        bill = json.loads(printed.splitlines()[-1])
        assert (bill["cut"], bill["code"], bill["refused"], bill["calls"], bill["spent_nano"]) == (True, 1, 1, 2, billed_nano)
        billed = {(line["agent"], line["model"]): line for line in bill["by_agent"]}
        assert billed.keys() == {(None, "claude-haiku-4-5"), ("a1", "claude-sonnet-5"), (None, "claude-sonnet-5")}
        assert all(line["input_tokens"] > 0 < line["output_tokens"] for key, line in billed.items() if key != (None, "claude-sonnet-5"))
        assert sum(line["spent_nano"] for line in bill["by_agent"]) == billed_nano
    else:
        assert re.search(r"^└ a1 +claude-sonnet-5 +1 +\d+ +\d+ +\$0\.0", said, re.MULTILINE), said
        assert re.search(r"^app: \$0\.\d+ of \$0\.05 in 2 calls, 1 refused\. A cap or a pause stopped it\.$", said, re.MULTILINE), said


async def test_however_a_run_ends_its_token_is_revoked(tmp_path):
    """By SIGTERM, which its command gets too, and by SIGKILL, which leaves it no time."""
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        for number, code in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
            process = await started(tmp_path, gw.url.removeprefix("http://"), "--", sys.executable, "-c", WAITS)
            assert await asyncio.wait_for(process.stdout.readline(), 60) == b"up\n"
            assert token(tmp_path)[1] == 0
            command = await asyncio.to_thread(children, process.pid, "time.sleep")
            process.send_signal(number)
            await until(lambda: token(tmp_path)[1] == 1)
            for pid in command if number == signal.SIGKILL else ():
                os.kill(pid, signal.SIGKILL)  # it holds the pipe, for whose end asyncio waits beside the process's
            assert await asyncio.wait_for(process.wait(), 60) == code
            process._transport.close()


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
async def test_a_token_whose_ledger_is_locked_is_revoked_later(tmp_path):
    """Nobody but its guard is left to do that: the command has ended, and so does the run."""
    ledgered(tmp_path, "http://127.0.0.1:9", {"app": APP})
    place = tmp_path / "gateway.db"
    with closing(sqlite3.connect(place, isolation_level=None)) as other:
        with (
            pytest.raises(LedgerUnavailable, match=r"is revoked as soon as the ledger allows it: .* is locked"),
            token_of_a_run("app", tmp_path / "policies", f"sqlite:///{place}", name="run", why="gateway run"),
        ):
            other.execute("BEGIN EXCLUSIVE")
        other.execute("ROLLBACK")
    await until(lambda: token(tmp_path)[1] == 1)


def children(parent, text):
    """The children of a process whose command line has a text."""
    found = subprocess.run(["ps", "--ppid", str(parent), "-o", "pid=,args="], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if text in line]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--", "true"], "Say whose calls these are by --app, one of: app, other"),
        (["--app", "app", "--cap", "much", "--", "true"], "is not an amount"),
        (["--app", "app", "--until", "soon", "--", "true"], "is not a duration"),
        (["--app", "app"], "Missing argument"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.setattr("gateway_addon.cli.run.conceal", lambda: None)
    ledgered(tmp_path, "http://127.0.0.1:9", {"app": APP, "other": APP})
    where = ["--policies", f"{tmp_path}/policies", "--ledger", f"sqlite:///{tmp_path}/gateway.db"]
    done = CliRunner().invoke(main, ["run", *where, *arguments])
    assert (done.exit_code, sentence in done.output) == (2, True), done.output
