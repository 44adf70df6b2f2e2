"""Who has arrived, who is missing: reasons against rotating the key, each with its way out."""

import json
import shlex
import stat
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ledgers import ENGINES, Part, new_ledger, url
from village import KEY, write

from gateway_addon.cli import cutover as command
from gateway_addon.cli import main
from gateway_addon.identity import tokens
from gateway_addon.ledger import Ledger, NewCall, Outcome, Settlement, admin, connect
from gateway_addon.ledger.reports import token_usage
from gateway_addon.ledger.reports.token_usage import Arrival
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.onboarding.cutover import FileToday, tally, unaccounted, unseen
from gateway_addon.onboarding.inventory import inspect

NOW = time.time()
TOKEN = tokens.mint()
DIGEST = tokens.digest(TOKEN)


def arrival(calls: int = 1, refused: int = 0, state: str = "in force") -> Arrival:
    return Arrival(7, "reports", "cron", DIGEST, state, calls, refused, None, None)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (arrival(), None),
        (arrival(0), "has never called"),
        (arrival(3, 3), "refused each time"),
        (arrival(3, 2), None),
        (arrival(0, state="revoked"), None),
        (arrival(0, state="expired"), None),
    ],
)
def test_a_token_in_force_that_never_passed_is_a_reason(token, said):
    assert [each.problem.endswith(said or "") for each in unseen([token])] == ([True] if said else [])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (".env", f"ANTHROPIC_API_KEY={KEY}\n", "with a key of its own"),
        (".env", f"ANTHROPIC_BASE_URL=http://gw:8080\nANTHROPIC_API_KEY={KEY}\n", "still holds"),
        ("a.py", "import anthropic\n", "from where it runs"),
        (".env", f"ANTHROPIC_BASE_URL=http://gw:8080\nANTHROPIC_API_KEY={TOKEN}\n", None),
        (".env", f"ANTHROPIC_BASE_URL=http://gw:8080\nANTHROPIC_API_KEY={tokens.mint()}\n", "a token that is not in force here"),
        (".env", "ANTHROPIC_BASE_URL=http://gw:8080\nANTHROPIC_API_KEY=$TOKEN\n", None),
        ("README.md", f"our key: {KEY}\n", None),  # shows it, calls nobody: rotating is what makes it harmless
        ("policies/gateway.yaml", "upstream: https://api.anthropic.com\nkey: {env: ANTHROPIC_API_KEY}\n", None),
        ("admin.env", "ANTHROPIC_ADMIN_KEY=sk-ant-admin01-8cYf1GhJ6sAe3UoViXq5kMtBw0PyDnElZrCSu-OaHg8F2j\n", None),
        ("a.py", "print('hello')\n", None),
    ],
)
def test_what_a_consumer_s_file_says_today(name, content, said):
    found = unaccounted([FileToday(f"/srv/{name}", inspect(f"/srv/{name}", content.encode()))], [arrival()], [])
    assert [said in each.problem for each in found] == ([True] if said else [])


@pytest.mark.parametrize(
    ("accepted", "left"), [("/srv/a.py", 0), ("/srv", 0), ("/srv/", 0), ("/srv/a", 1), ("/srv/a.pyc", 1), ("/other", 1)]
)
def test_what_a_person_accepts_is_accounted_for(accepted, left):
    sqlite_files = [FileToday("/srv/a.py", inspect("/srv/a.py", b"import anthropic\n"))]
    assert len(unaccounted(sqlite_files, [], [accepted])) == left


def test_a_gone_file_is_accounted_for_an_unreadable_one_is_not():
    gone, locked = FileToday("/srv/gone"), FileToday("/srv/locked", problem="cannot be read now (Permission denied)")
    [reason] = unaccounted([gone, locked], [], [])
    assert (reason.subject, reason.way_out.endswith("gateway cutover --accept /srv/locked")) == ("/srv/locked", True)
    assert tally([gone, locked]) == {"no longer one": 1, "unreadable": 1}


# The command, on a ledger


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger with a token of `reports`, a policy for it, and an empty village."""
    write(tmp_path, {"policies/apps/reports.yaml": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n", "village/none": ""})
    write(tmp_path, {"policies/gateway.yaml": "key: {file: /run/key}\n"})
    sqlite_files.create(tmp_path / "gateway.db")
    with connect.changing(tmp_path / "gateway.db") as db:
        admin.issue_token(db, "reports", DIGEST, label="cron", who="test", now=NOW)
    monkeypatch.setenv("GATEWAY_POLICIES", str(tmp_path / "policies"))
    monkeypatch.setenv("GATEWAY_LEDGER", f"sqlite:///{tmp_path / 'gateway.db'}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gateway(*words: str) -> Result:
    return CliRunner().invoke(main, words)


async def called(folder: Path, status: int = 200, endpoint: str = "messages", at: float = NOW) -> None:
    ledger = await Ledger.open(f"sqlite:///{folder / 'gateway.db'}")
    held = await ledger.reserve(NewCall("reports", None, 1, endpoint, "claude-haiku-4-5"), 100, (), now=at)
    outcome = Outcome(status=status)
    await (ledger.settle(held, Settlement(9, (Part(9),), outcome), now=at) if status == 200 else ledger.void(held, outcome, now=at))
    await ledger.close()


def test_without_an_inventory_it_says_how_to_make_one(here):
    shown = gateway("cutover")
    assert (shown.exit_code, "gateway inventory PATH... --save" in shown.output) == (2, True)
    shown = gateway("cutover", "--inventory", "my apps.json")
    assert shlex.split(shown.output)[-1] == "my apps.json", "a path as a shell takes it"
    (here / "inventory.json").write_text('{"other": 1}')
    assert "is no inventory" in gateway("cutover").output


async def test_not_yet_then_accepted_then_safe(here):
    write(here, {"village/.env": f"ANTHROPIC_API_KEY={KEY}\n", "village/job.py": "import anthropic\n"})
    gateway("inventory", "village", "--save")
    assert stat.S_IMODE((here / "inventory.json").stat().st_mode) == 0o600
    first = gateway("cutover")
    assert first.exit_code == 1
    assert "the gateway has passed no call yet" in first.output
    assert "app reports, token 1 (cron) has never called" in first.output
    await called(here)
    (here / "village/.env").write_text(f"ANTHROPIC_BASE_URL=http://127.0.0.1:8080\nANTHROPIC_API_KEY={TOKEN}\n")
    assert "village/job.py:1 (python) takes its key from where it runs" in gateway("cutover").output
    assert gateway("cutover", "--accept", "village/job.py").exit_code == 0
    safe = gateway("cutover")  # it is remembered
    assert (safe.exit_code, "Safe to rotate the real key" in safe.output) == (0, True)
    assert "(file /run/key);\n     it is read again at once" in safe.output
    [accepted] = json.loads((here / "inventory.json").read_text())["accepted"]
    assert accepted["path"] == str(here / "village/job.py")


def test_only_what_the_inventory_found_is_accepted(here):
    write(here, {"village/job.py": "import anthropic\n"})
    gateway("inventory", "village", "--save")
    shown = gateway("cutover", "--accept", "village/jbo.py")
    assert (shown.exit_code, "no consumer at village/jbo.py" in shown.output) == (2, True)
    assert "accepted" not in json.loads((here / "inventory.json").read_text())


async def test_an_app_is_a_straggler_while_it_comes_through_local(here):
    """It is none any more once its latest call came by itself."""
    gateway("inventory", "village", "--save")
    await called(here, endpoint="local/messages")
    assert "App reports comes through gateway local" in gateway("cutover").output
    await called(here, at=NOW + 1)
    assert "gateway local" not in gateway("cutover").output


async def test_it_says_the_same_to_programs(here):
    gateway("inventory", "village", "--save")
    said = json.loads(gateway("cutover", "--json").stdout)
    assert (said["safe"], [each["subject"] for each in said["reasons"]]) == (False, ["the gateway", "app reports, token 1 (cron)"])
    assert [token["app"] for token in said["tokens"]] == ["reports"]


@pytest.mark.parametrize(
    ("status", "said", "code"),
    [(200, "1 call passed, the provider refused the key 0 times", 0), (401, "the provider answered 401", 1), (None, "is not proved", 1)],
)
async def test_the_watch_reports_a_key_that_the_provider_refuses(here, monkeypatch, status, said, code):
    await called(here, 401, at=NOW - 3600)  # long before
    if status is not None:
        await called(here, status, at=NOW + 3600)  # in the watch's time
    monkeypatch.setattr(command.time, "sleep", lambda seconds: None)
    shown = gateway("cutover", "--watch", "0s")
    assert (shown.exit_code, said in shown.output) == (code, True), shown.output


@pytest.mark.parametrize("engine", ENGINES)
async def test_what_the_ledger_knows_of_who_has_come(tmp_path, engine):
    path = new_ledger(tmp_path, engine)
    ledger = await Ledger.open(url(path))
    for at, endpoint in ((NOW - 50, "messages"), (NOW - 20, "local/messages"), (NOW - 30, "messages")):
        held = await ledger.reserve(NewCall("reports", None, 1, endpoint, "claude-haiku-4-5"), 100, (), now=at)
        await ledger.void(held, Outcome(status=401), now=at)
    await ledger.close()
    with connect.reading(path) as db:
        [seen] = token_usage.arrivals(db, now=NOW)
        [straggler] = token_usage.stragglers(db)
        passed = token_usage.passed(db, since=NOW - 40)
    assert (seen.calls, seen.refused, seen.first_at, seen.last_at, seen.state) == (3, 0, NOW - 50, NOW - 20, "in force")
    assert (straggler.app, straggler.last_at) == ("reports", NOW - 20)
    assert (passed.calls, passed.unauthorised, passed.last_unauthorised_at) == (2, 2, NOW - 20)
