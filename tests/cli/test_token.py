"""`gateway token`: the token alone on stdout, once; what goes with it on stderr or in a file of its own."""

import asyncio
import json
import re
import stat
import time
from pathlib import Path

import anthropic
import pytest
from click.testing import CliRunner, Result
from gateway import APP, gateway, write_policies

from gateway_addon import names
from gateway_addon.cli import main
from gateway_addon.identity import tokens
from gateway_addon.identity.workloads import workload_digest
from gateway_addon.ledger import admin, connect, workloads
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.onboarding import snippets
from gateway_addon.simulator import Behaviour, Simulator


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Policies for `app`, an empty ledger."""
    write_policies(tmp_path / "policies", "https://localhost", {"app": APP})
    sqlite_files.create(tmp_path / "gateway.db")
    monkeypatch.setenv("GATEWAY_POLICIES", str(tmp_path / "policies"))
    monkeypatch.setenv("GATEWAY_LEDGER", f"sqlite:///{tmp_path / 'gateway.db'}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def token(*words: str) -> Result:
    return CliRunner().invoke(main, ["token", *words])


@pytest.mark.parametrize("kind", snippets.KINDS)
def test_token_is_alone_on_stdout_and_in_no_other_line(here, kind):
    """The token is alone on stdout and in none of the lines beside it."""
    shown = token("issue", "app", "--for", kind)
    assert names.TOKEN_PATTERN.fullmatch(shown.stdout.strip())
    assert shown.stdout.strip() not in shown.stderr
    assert "http://127.0.0.1:8080" in shown.stderr
    with connect.reading(here / "gateway.db") as db:
        [row] = db.execute("SELECT digest FROM tokens").fetchall()
    assert row[0] == tokens.digest(shown.stdout.strip())


def test_the_lines_go_to_a_private_file_with_the_token_in_them(here):
    shown = token("issue", "app", "--for", "dotenv", "--to", "app.env")
    assert (here / "app.env").read_text() == f"ANTHROPIC_BASE_URL=http://127.0.0.1:8080\nANTHROPIC_API_KEY={shown.stdout.strip()}\n"
    assert stat.S_IMODE((here / "app.env").stat().st_mode) == 0o600
    assert "The lines are in app.env." in shown.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "new"], "Say in which form"),
        (["--for", "dotenv", "--to", "policies/gateway.yaml"], "exists and is not changed"),
        (["--for", "smoke-signals"], "is not one of"),
    ],
)
def test_a_wrong_use_issues_no_token(here, words, said):
    shown = token("issue", "app", *words)
    assert (shown.exit_code, said in shown.output) == (2, True)
    with connect.reading(here / "gateway.db") as db:
        assert admin.tokens(db) == []


def test_an_app_without_a_policy_gets_none(here):
    assert "No policy for app other" in token("issue", "other").output


def test_the_lines_name_the_gateway_as_apps_reach_it(here):
    with (here / "policies/gateway.yaml").open("a") as file:
        file.write("\ntls: {cert: a.pem, key: b.pem}\n")
    assert re.search(r"^ANTHROPIC_BASE_URL=https://\[::1\]:8443$", token("issue", "app", "--for", "cron", "--listen", "[::1]:8443").stderr, re.M)


@pytest.mark.parametrize(("overlap", "in_force"), [("0s", 1), ("1h", 2)])
def test_rotation_ends_the_old_token_now_or_after_an_overlap(here, overlap, in_force):
    """A rotated token ends the one before it now or after an overlap."""
    token("issue", "app")
    token("rotate", "app", "--overlap", overlap)
    assert token("list", "app", "--json").stdout.count('"in force"') == in_force


async def test_leaked_token_is_revoked_and_other_apps_never_notice(tmp_path):
    """The drill of the handbook: the leaked app gets a new token, the old one is dead at the next call, nobody else sees an error."""
    policy = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $10}\n"
    ledger = ["--ledger", f"sqlite:///{tmp_path / 'gateway.db'}"]
    where = [*ledger, "--policies", str(tmp_path / "policies")]
    ask = {"model": "claude-haiku-4-5", "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]}
    over = asyncio.Event()

    async def calling(client):
        answered = 0
        while not over.is_set():
            await client.messages.create(**ask)
            answered += 1
        return answered

    async with Simulator(behaviour=Behaviour(output_tokens=5)) as api, gateway(tmp_path, api, {"leaky": policy, "other": policy}) as gw:
        thief, others = gw.client("leaky"), asyncio.ensure_future(calling(gw.client("other")))
        await thief.messages.create(**ask)
        drill = await asyncio.to_thread(token, "rotate", "leaky", "--overlap", "0s", *where)
        assert drill.exit_code == 0, drill.output
        with pytest.raises(anthropic.AuthenticationError, match=r"is revoked|has just been revoked"):
            await thief.messages.create(**ask)
        gw.tokens["leaky"] = drill.stdout.strip().splitlines()[-1]
        await gw.client("leaky").messages.create(**ask)
        over.set()
        assert await others > 0
        await gw.quiet()
        told = CliRunner().invoke(main, ["report", "--by", "token", "--json", *ledger]).output
    lines = {line["key"]: line["calls"] for line in json.loads(told)["lines"]}
    assert [calls for key, calls in sorted(lines.items()) if key.startswith("leaky")] == [1, 1], "what the thief spent is told apart"


def test_looking_at_the_forms_issues_no_token(here: Path):
    listed = CliRunner().invoke(main, ["token", "forms"])
    shown = CliRunner().invoke(main, ["token", "forms", "langchain", "--listen", "127.0.0.1:9090"])
    assert (listed.exit_code, shown.exit_code) == (0, 0), listed.output + shown.output
    assert all(kind in listed.stdout for kind in snippets.KINDS)
    assert shown.stdout == snippets.lines("langchain", base_url="http://127.0.0.1:9090", app="app", token_placeholder="TOKEN")
    with connect.reading(here / "gateway.db") as db:
        assert admin.tokens(db) == []


ISSUERS = "audience: x\nissuers: {one: {url: https://one.test}, two: {url: https://two.test}}"
NIGHTLY = ("app", "https://one.test", "repo:o/r", workload_digest("app", "https://one.test", "repo:o/r"))


def workloads_of(here):
    with connect.reading(here / "gateway.db") as db:
        return [(each.issuer, each.refusal(time.time())) for each in admin.tokens(db) if each.issuer]


def test_a_workload_is_listed_revoked_and_let_in_again(here):
    token("issue", "app")
    assert "issuer" not in token("list").stdout
    with connect.changing(here / "gateway.db") as db:
        workloads.enter(db, *NIGHTLY, now=time.time())
    assert "repo:o/r" in token("list").stdout
    assert "https://one.test" in token("list").stdout
    assert token("revoke", "app", "--id", "2").exit_code == 0
    assert workloads_of(here) == [("https://one.test", "token_revoked")]
    restored = token("restore", "app", "--id", "2")
    assert (restored.exit_code, "2 (repo:o/r) of the app 'app' is let in again" in restored.stderr) == (0, True)
    assert workloads_of(here) == [("https://one.test", None)]
    refused = token("restore", "app", "--id", "1")
    assert (refused.exit_code, "has no workload 1" in refused.stderr) == (2, True)


def test_a_subject_is_barred_for_each_issuer_that_is_trusted(here):
    """Whatever else is wrong with the policy, and also one that was never seen."""
    assert "names no issuer" in token("revoke", "app", "--subject", "repo:o/r").stderr
    write_policies(here / "policies", "https://localhost", {"app": APP, "broken": "models: ["}, ISSUERS)
    assert token("revoke", "app", "--subject", "repo:o/r").exit_code == 0
    assert workloads_of(here) == [("https://one.test", "token_revoked"), ("https://two.test", "token_revoked")]
    again = token("revoke", "app", "--subject", "repo:o/r")
    assert (again.exit_code, "no such token in force" in again.stderr) == (1, True)
    assert token("revoke", "app", "--subject", "x", "--all").exit_code == 2


def test_a_subject_is_revoked_though_its_issuer_is_gone(here):
    with connect.changing(here / "gateway.db") as db:
        workloads.enter(db, *NIGHTLY, now=time.time())
    assert token("revoke", "app", "--subject", "repo:o/r").exit_code == 0
    assert workloads_of(here) == [("https://one.test", "token_revoked")]
