"""`gateway explain` says what admission would do, rule by rule, and what the call could cost."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ledgers import new_file

from gateway_addon.cli.explain import explain
from gateway_addon.ledger import Ledger, NameLimit, NewCall, Reserved, admin, connect, reservations

PLAIN: dict[str, Any] = {"model": "claude-haiku-4-5", "max_tokens": 1000, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "apps").mkdir()
    (tmp_path / "gateway.yaml").write_text("workspace_geo: global\ncaps: {month: $600}\n")
    (tmp_path / "apps" / "reports.yaml").write_text(
        "models: {allow: [claude-haiku-4-5], aliases: {small: claude-haiku-4-5}}\ncaps: {request: $0.01, day: $5}\n"
    )
    (tmp_path / "apps" / "watched.yaml").write_text("models: {allow: [claude-sonnet-5]}\ncaps: unlimited\nmode: observe\n")
    return tmp_path


def explained(folder: Path, body: Any, *options: str, app: str = "reports") -> Result:
    (folder / "request.json").write_bytes(body if isinstance(body, bytes) else json.dumps(body).encode())
    ledger = f"sqlite:///{folder / 'gateway.db'}"
    arguments = [str(folder / "request.json"), "--app", app, "--policies", str(folder), "--ledger", ledger, *options]
    return CliRunner().invoke(explain, arguments, catch_exceptions=False)


def test_an_admitted_request_shows_rules_quote_and_caps(folder: Path):
    result = explained(folder, PLAIN)
    assert result.exit_code == 0, result.output
    size = len(json.dumps(PLAIN))
    nano = (size + 1_000 + 64) * 1_000 + 1_000 * 5_000
    for fact in (f"{size + 1_064:,}", "input $1.00/MTok", "output $5.00/MTok", f"$0.00{nano}".rstrip("0"), "app:reports day"):
        assert fact in result.output
    assert result.output.rstrip().endswith("allowed by the policy")


def test_a_refused_request_shows_every_rule_and_ends_with_1(folder: Path):
    result = explained(folder, PLAIN | {"model": "claude-opus-5-5", "speed": "fast"}, "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert [rule["rule"] for rule in found["rules"] if rule["code"]] == ["models", "features"]
    assert found["refused"]["code"] == "model"
    assert "models.allow" in found["refused"]["sentence"]


def test_a_call_that_no_cap_fits_is_told_what_would_fit(folder: Path):
    result = explained(folder, PLAIN | {"max_tokens": 100_000})
    assert result.exit_code == 1
    room_nano = 10_000_000 - (len(json.dumps(PLAIN | {"max_tokens": 100_000})) + 1_064) * 1_000
    assert f"max_tokens {room_nano // 5_000:,} would fit" in result.output
    assert "quote_over_cap" in result.output


@pytest.mark.parametrize(("cap", "refused"), [("$0.1", None), ("$0.01", "quote_over_cap")])
def test_a_stream_must_fit_with_its_first_step_alone(folder: Path, cap: str, refused: str | None):
    (folder / "apps" / "steps.yaml").write_text(f"models: {{allow: [claude-haiku-4-5]}}\ncaps: {{request: {cap}}}\n")
    result = explained(folder, PLAIN | {"max_tokens": 100_000, "stream": True}, "--json", app="steps")
    found = json.loads(result.output)
    assert (result.exit_code, found["refused"] and found["refused"]["code"]) == (int(refused is not None), refused)
    assert found["quote"]["held_at_first"] is not None
    assert found["caps"][-1]["fits"] is (refused is None)


def test_what_is_left_of_a_cap_comes_from_the_ledger(folder: Path):
    async def hold() -> None:
        ledger = await Ledger.open(f"sqlite:///{folder / 'gateway.db'}", create=True)
        with connect.changing(folder / "gateway.db") as db:
            token = admin.issue_token(db, "reports", "00" * 32, who="test", now=time.time())
        held = await ledger.reserve(NewCall("reports", None, token.id), 4_999_000_000, (), now=time.time())
        assert isinstance(held, Reserved)
        found.update(json.loads(explained(folder, PLAIN, "--json").output))
        await ledger.close()

    found: dict[str, Any] = {}
    asyncio.run(hold())
    day = next(cap for cap in found["caps"] if cap["cap"] == "app:reports day")
    assert (day["amount"], day["spent"], day["held"], day["fits"]) == ("$5.00", "$0.00", "$4.999", False)


def test_the_caller_is_judged_as_far_as_it_is_given(folder: Path):
    (folder / "apps" / "near.yaml").write_text("models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\naddresses: [10.0.0.0/8]\n")
    with connect.changing(new_file(folder)) as db:
        token = admin.issue_token(db, "near", "00" * 32, who="test", now=time.time())
    assumed = explained(folder, PLAIN, app="near")
    assert (assumed.exit_code, "taken for granted: the call comes from one of 10.0.0.0/8" in assumed.output) == (0, True)
    cases = [(("--from", "192.0.2.1"), "token_address"), (("--token", "99"), "token_unknown"), (("--token", str(token.id)), None)]
    for options, code in cases:
        refused = json.loads(explained(folder, PLAIN, *options, "--json", app="near").output)["refused"]
        assert (refused and refused["code"]) == code
    with connect.changing(folder / "gateway.db") as db:
        admin.pause(db, "app:near", who="test", why="a look", now=time.time())
    assert "app_paused: app near is paused until it is resumed (a look)" in explained(folder, PLAIN, app="near").output.replace("App", "app")


def test_a_request_is_judged_as_its_sessions_too(folder: Path):
    file = folder / "apps" / "reports.yaml"
    file.write_text(file.read_text() + "each: {session: {ever: $0.000001}}\n")
    assert explained(folder, PLAIN).exit_code == 0
    found = explained(folder, PLAIN, "--header", "x-claude-code-session-id: 3f2a")
    assert "app:reports session:3f2a ever" in found.output
    assert "more than the cap of session 3f2a of app reports" in found.output
    assert found.exit_code == 1
    with connect.changing(new_file(folder)) as db:
        admin.pause(db, "app:reports session:3f2a", who="test", now=time.time())
        admin.pause(db, "total user:u", who="test", now=time.time())
    paused = explained(folder, PLAIN, "--header", "x-claude-code-session-id: 3f2a").output
    assert "app_paused: Session 3f2a of app reports is paused until it is resumed" in paused.replace("session 3f2a of", "Session 3f2a of")
    of_a_user = explained(folder, PLAIN | {"metadata": {"user_id": "u"}}).output
    assert "user u of any app is paused until it is resumed. The operator can end it: gateway resume --user u." in of_a_user


def test_a_request_has_its_tokens_labels_and_counts_with_others(folder: Path):
    """A required label is the token's; a session beyond a day's new names stands under the cap that these share."""
    file = folder / "apps" / "reports.yaml"
    file.write_text(file.read_text() + "parts_max: 1\neach: {session: {ever: $1}}\nlabels: {client: {values: [acme], required: true}}\n")
    with connect.changing(new_file(folder)) as db:
        labelled = admin.issue_token(db, "reports", "01" * 32, labels=(("client", "acme"),), who="test", now=time.time())
        admin.align(db, "UTC", {"reports": None}, (), {("reports", "session", "ever")}, who="test", now=time.time())
        names = NameLimit(1, frozenset(), frozenset(("session",)))
        for number in range(2):
            call = NewCall("reports", None, labelled.id, session_id=f"s{number}", names=names)
            assert isinstance(reservations.reserve(db, "me", call, 999_999_999, (), now=time.time()), Reserved)
    session = ("--header", "x-claude-code-session-id: s1")
    assert "label: " in explained(folder, PLAIN, *session).output
    found = explained(folder, PLAIN, *session, "--token", str(labelled.id))
    assert "app:reports session:others ever" in found.output
    assert "refused: cap_held: Of the cap of session others of app reports" in found.output, found.output


def test_an_alias_shows_as_rewritten(folder: Path):
    found = json.loads(explained(folder, PLAIN | {"model": "small"}, "--json").output)
    assert (found["rewritten"], found["refused"]) == ({"model": "claude-haiku-4-5"}, None)


def test_an_observed_app_is_told_what_would_have_been_refused(folder: Path):
    result = explained(folder, PLAIN, app="watched")
    assert result.exit_code == 0
    assert "observed, so let pass and recorded: model: app watched may not use claude-haiku-4-5" in result.output
    assert result.output.endswith("allowed by the policy\n")


def test_rule_in_observe_mode_lets_pass_others_refuse(folder: Path):
    """A rule that is only observed lets pass and the others refuse."""
    (folder / "apps" / "half.yaml").write_text("models: {allow: [claude-haiku-4-5]}\nmax_tokens: 5\ncaps: {day: $0.001}\nobserve: [max_tokens, caps]\n")
    passed = json.loads(explained(folder, PLAIN, "--json", app="half").output)
    assert ([each["code"] for each in passed["observed"]], passed["refused"]) == (["max_tokens", "quote_over_cap"], None)
    refused = explained(folder, PLAIN | {"speed": "fast"}, "--json", app="half")
    assert (refused.exit_code, json.loads(refused.output)["refused"]["code"]) == (1, "feature")


@pytest.mark.parametrize("body", [b"not json", b'{"model":"a","model":"b"}', b""])
def test_an_unreadable_request_is_refused_as_at_the_door(folder: Path, body: bytes):
    result = explained(folder, body)
    assert result.exit_code == 1
    assert "refused: body:" in result.output


def test_an_app_that_is_not_there_ends_with_2(folder: Path):
    result = explained(folder, PLAIN, app="report")
    assert result.exit_code == 2
    assert "No app 'report': did you mean reports?" in result.stderr


def test_a_beta_is_judged_like_a_sent_one(folder: Path):
    with (folder / "apps" / "reports.yaml").open("a") as file:
        file.write("betas: {deny: [fast-*]}\n")
    assert explained(folder, PLAIN, "--beta", "effort-2025-11-24").exit_code == 0
    assert explained(folder, PLAIN, "--beta", "fast-mode-2026-02-01").exit_code == 1
