"""The bad night's commands: each can be listed and taken back, works beside a broken file, and refuses what would have no effect."""

import json
import re
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gateway import APP, write_policies
from ledgers import CALL, Cap, spend

from gateway_addon.calls.responses import me
from gateway_addon.cli import main
from gateway_addon.ledger import Alert, NameLimit, Reserved, admin, connect, reservations, state
from gateway_addon.ledger.reports.forecast import forecasts
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.operations import tables
from gateway_addon.policy import caps, load

DOLLAR = 1_000_000_000
REPORTS = "models: {allow: [claude-haiku-4-5]}\nteam: batch\ncaps: {request: $1, day: $10}\n"
GENERAL = "\ntimezone: Europe/Berlin\ncaps: {day: $40}\nteams: {batch: {caps: {day: $20}}}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Policies for `reports` and `app`, a ledger in Berlin's zone with a token of `reports`."""
    write_policies(tmp_path / "policies", "https://localhost", {"app": APP, "reports": REPORTS})
    with (tmp_path / "policies/gateway.yaml").open("a") as file:
        file.write(GENERAL)
    sqlite_files.create(tmp_path / "gateway.db", "Europe/Berlin")
    with connect.changing(tmp_path / "gateway.db") as db:
        admin.issue_token(db, "reports", "d1", who="test", now=time.time())
        admin.align(db, "Europe/Berlin", {"reports": "batch", "app": None}, who="test", now=time.time())
    monkeypatch.setenv("GATEWAY_POLICIES", str(tmp_path / "policies"))
    monkeypatch.setenv("GATEWAY_LEDGER", f"sqlite:///{tmp_path / 'gateway.db'}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gateway(line: str) -> Result:
    return CliRunner().invoke(main, line.split())


def refused(line: str, code: int = 2) -> str:
    done = gateway(line)
    assert done.exit_code == code, done.output
    return done.output


def told(line: str) -> dict:
    done = gateway(f"{line} --json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_billing_cycle_is_raised_and_limited_by_its_name(here: Path):
    path = here / "policies/apps/reports.yaml"
    path.write_text(path.read_text().replace("day: $10", "cycle: {amount: $10, from: 17}"))
    assert "is not one of 'day', 'week', 'month', 'ever', 'cycle:DAY'" in refused("cap raise reports cycle:x 5 --until 3d")
    assert "reports has no cap for a cycle:5 to change; its caps: request, cycle:17" in refused("cap limit reports cycle:5 1")
    assert told("cap raise reports cycle:17 5 --until 3d")["window"] == "cycle:17"
    [row] = [row for row in told("cap list reports")["caps"] if row["window"] == "cycle:17"]
    assert (row["policy_nano"], row["in_force_nano"]) == (10 * DOLLAR, 15 * DOLLAR)


def hold(here: Path, nano: int) -> bool:
    """Whether a call of `reports` that costs so much is let in now."""
    judged = [Cap("app:reports", "day", 10 * DOLLAR), Cap("team:batch", "day", 20 * DOLLAR), Cap("total", "day", 40 * DOLLAR)]
    with connect.changing(here / "gateway.db") as db:
        return isinstance(reservations.reserve(db, "me", CALL, nano, judged, now=time.time()), Reserved)


def test_a_mistyped_raise_is_replaced_or_withdrawn(here):
    wrong = told("cap raise reports day 500 --until 12h")
    assert told(f"cap raise reports day 5 --until 12h --replace {wrong['id']}")["adds_to"] == []
    assert [each["amount_nano"] for each in told("cap list")["raises"]] == [5 * DOLLAR]
    second = gateway("cap raise reports day 2 --until 3d")
    assert "It adds to raise 2 of $5.00: $7.00 above in all." in second.output
    assert hold(here, 17 * DOLLAR)
    assert gateway("cap withdraw 2").output == "reports may no longer spend $5.00 above its cap a day.\n"
    assert "No raise 2 is in force" in refused("cap withdraw 2")
    assert not hold(here, 1)


def test_a_replacement_for_another_scope_changes_nothing(here):
    made = told("cap raise team:batch day 5 --until 12h")
    assert "is of team:batch day, not of reports day: nothing was changed" in refused(f"cap raise reports day 1 --until 12h --replace {made['id']}")
    assert [each["id"] for each in told("cap list")["raises"]] == [made["id"]]


def test_a_limit_binds_from_the_next_call_until_lifted(here):
    assert gateway("cap limit reports day 1 --why loop").exit_code == 0
    assert not hold(here, DOLLAR + 1)
    said = refused("cap raise reports day 5 --until 12h", 1)
    assert "is limited to $1.00 a day by" in said
    assert "(loop)" in said
    assert told("cap list")["raises"] == [], "a raise without effect is not kept"
    [row] = [each for each in told("cap list reports")["caps"] if each["window"] == "day"]
    assert (row["policy_nano"], row["limit_nano"], row["in_force_nano"]) == (10 * DOLLAR, DOLLAR, DOLLAR)
    assert gateway("cap limit reports day --lift").exit_code == 0
    assert "has no limit for a day" in refused("cap limit reports day --lift", 1)
    assert hold(here, 10 * DOLLAR)


def test_a_raise_can_take_the_limit_away_with_it(here):
    gateway("cap limit total day 1")
    assert gateway("cap raise total day 5 --until 12h --lift-limit").exit_code == 0
    found = told("cap list total")
    assert (found["limits"], [each["in_force_nano"] for each in found["caps"]]) == ([], [45 * DOLLAR])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("cap raise reports day -5 --until 12h", "-5 is below zero; to lower a cap: gateway cap limit reports day"),
        ("cap limit reports day -5", "-5 is below zero"),
        ("cap limit reports day 11", "A limit lowers a cap, and reports has $10.00 a day: to raise it, gateway cap raise"),
        ("cap limit reports week 1", "reports has no cap for a week to change; its caps: request, day"),
        ("cap limit reports day", "Say to what: an AMOUNT, or --lift"),
        ("cap limit reports day 1 --lift", "Say to what: an AMOUNT, or --lift"),
        ("cap raise reports day 5 --until 2020-01-01", "2020-01-01 is past, so it would have no effect (it is 20"),
        ("pause reports --until 2020-01-01", "did you mean 20"),
        ("pause reports --until 0s", "is past"),
        ("pause reprots", "No app 'reprots': did you mean reports?"),
        ("pause team:bach", "No team 'bach': did you mean batch?"),
        ("cap list nothing-like-it", "No app 'nothing-like-it'; known: app, reports"),
        ("token list nope", "No app 'nope'"),
        ("adjust abc 1 --why x", "'abc' is not a valid whole number."),
        ("prices --at 2026-13-01", "'2026-13-01' is not a day; write YYYY-MM-DD"),
        ("token revoke nope", "No app 'nope'"),
        ("audit --app nope", "No app 'nope'"),
        ("app show nope", "No app 'nope'"),
        ("invoice --app nope", "No app 'nope'"),
        ("explain /dev/null --app reprots", "No app 'reprots': did you mean reports?"),
        ("token issue nope", "No policy for app nope: write "),
    ],
)
def test_what_would_have_no_effect_is_refused(here, line, sentence):
    assert sentence in refused(line)
    with connect.reading(here / "gateway.db") as db:
        assert db.execute("SELECT (SELECT count(*) FROM pauses) + (SELECT count(*) FROM raises) + (SELECT count(*) FROM limits)").fetchone()[0] == 0


CODER = """models: {allow: [claude-haiku-4-5, claude-opus-5-5], caps: {claude-opus-5-5: {day: $5}}}
caps: {day: $10}
each:
  session: {ever: $2}
  agent: {ever: $2}
  user: {ever: $2}
  label.client: {ever: $2}
  model: {ever: $2}
"""
PARTS = {  # as typed: (as named, its scope's end)
    "--session 3f2a": ("session 3f2a9c of coder", "session:3f2a9c"),
    "--agent a1": ("agent a1 of coder", "agent:a1"),
    "--user u1": ("user u1 of coder", "user:u1"),
    "--label client=acme": ("client acme of coder", "label.client:acme"),
    "--model claude-haiku-4-5-20251001": ("model claude-haiku-4-5 of coder", "model:claude-haiku-4-5"),
    "--token 2": ("token 2 of coder", "token:2"),
}


@pytest.fixture
def parted(here: Path) -> Path:
    """An app `coder` too, with caps on its parts and one call, by a token that was issued with a cap of its own."""
    (here / "policies/apps/coder.yaml").write_text(CODER)
    with connect.changing(here / "gateway.db") as db:
        kept = [("coder", kind, "ever") for kind in ("session", "agent", "user", "label.client", "model")]
        admin.align(db, "Europe/Berlin", {"reports": "batch", "app": None, "coder": None}, (), kept, who="test", now=time.time())
        admin.issue_token(db, "coder", "d2", cap_nano=2 * DOLLAR, who="test", now=time.time())
        parts = {"session_id": "3f2a9c", "agent_id": "a1", "user_id": "u1", "labels": (("client", "acme"),), "model": "claude-haiku-4-5"}
        spend(db, time.time(), DOLLAR, replace(CALL, app="coder", team=None, token_id=2, **parts))
    return here


def test_each_parts_cap_is_raised_limited_listed_and_undone(parted):
    for number, (option, (name, scope)) in enumerate(PARTS.items(), start=1):
        scope = f"app:coder {scope}"
        done = gateway(f"cap raise coder ever 1 {option} --until 12h --why night")
        assert done.output.startswith(f"{name} may spend $1.00 above its $2.00 for ever, until "), done.output
        listed = told("cap list coder")
        [row] = [each for each in listed["caps"] if each["scope"] == scope and each["window"] == "ever"]
        assert (row["policy_nano"], row["raised_nano"], row["in_force_nano"], row["spent_nano"]) == (2 * DOLLAR, DOLLAR, 3 * DOLLAR, DOLLAR)
        assert [each["scope"] for each in listed["raises"]] == [scope]
        assert gateway(f"cap withdraw {number}").output == f"{name} may no longer spend $1.00 above its cap for ever.\n"
        assert gateway(f"cap limit coder ever 1 {option}").output.startswith(f"{name} may spend $1.00 for ever, whatever its raises, until ")
        assert f"{name} is limited to $1.00 for ever by" in refused(f"cap raise coder ever 1 {option} --until 12h", 1)
        assert [each["in_force_nano"] for each in told(f"cap list coder {option}")["caps"] if each["window"] == "ever"] == [DOLLAR]
        assert gateway(f"cap limit coder ever {option} --lift").output == f"{name} may spend up to its cap for ever again, raises included.\n"
        assert f"{name} has no limit for ever" in refused(f"cap limit coder ever {option} --lift", 1)
    assert {each["subject"] for each in told("audit --app coder") if each["action"] == "cap raise"} == {
        f"app:coder {scope} ever" for _, scope in PARTS.values()
    }
    assert not told("cap list coder")["raises"]
    assert gateway("cap raise coder day 1 --model claude-opus-5-5 --until 1h").output.startswith("model claude-opus-5-5 of coder may spend")
    assert "coder --model claude-opus-5-5  day" in gateway("cap list coder").output


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("cap raise coder ever 1 --until 1h --session nope", "No session 'nope' in this ledger"),
        ("cap raise coder ever 1 --until 1h --token 1", "token 1 is not one of coder"),
        ("cap raise coder ever 1 --until 1h --model gpt", "No model 'gpt' has a price"),
        ("cap raise coder day 1 --until 1h --user u1", "user u1 of coder has no cap for a day to change; its caps: ever. Write one in"),
        ("cap raise reports ever 1 --until 1h --user u1", "user u1 of reports has no cap for ever to change; its caps: none"),
        ("cap raise coder ever 1 --until 1h --user u1 --agent a1", "Name one part of an app"),
        ("cap raise team:batch ever 1 --until 1h --user u1", "belongs to an app: name the APP"),
        ("cap list --user u1", "belongs to an app: name the APP"),
        ("cap limit coder ever 3 --user u1", "user u1 of coder has $2.00 for ever: to raise it, gateway cap raise coder ever AMOUNT --until DATE --user u1"),
    ],
)
def test_a_parts_cap_that_is_not_there_is_not_changed(parted, line, sentence):
    assert sentence in refused(line)


def test_an_empty_name_of_a_part_does_not_mean_the_app(parted):
    done = CliRunner().invoke(main, ["cap", "raise", "coder", "day", "1", "--until", "1h", "--session", ""])
    assert (done.exit_code, "is empty" in done.output) == (2, True)
    long = "u" * 300
    assert gateway(f"cap raise coder ever 1 --until 1h --user {long}").output.startswith(f"user {'u' * 199}… of coder may"), "as calls are kept"


def test_a_session_beyond_a_days_names_is_shown_where_it_counts(parted):
    """Its own cap would change nothing: the command says whose cap would."""
    names = NameLimit(0, frozenset(), frozenset(("session",)))
    with connect.changing(parted / "gateway.db") as db:
        spend(db, time.time(), DOLLAR, replace(CALL, app="coder", team=None, token_id=2, session_id="late", names=names))
    said = refused("cap raise coder ever 1 --session late --until 1h")
    assert "The calls of session late of coder count in 'others'" in said
    assert "change coder --session others, or raise parts_max" in said
    with connect.changing(parted / "gateway.db") as db:
        admin.raise_cap(db, "app:coder session:others", "ever", DOLLAR, until=time.time() + 60, who="test", now=time.time())
    [cap] = next(each for each in told("sessions") if each["session"] == "late")["caps"]
    assert (cap["scope"], cap["in_force_nano"], cap["left_nano"]) == ("app:coder session:others", 3 * DOLLAR, 2 * DOLLAR)
    assert "$3.00 (+$1.00), shared" in gateway("sessions").output


def test_sessions_and_tokens_show_their_cap_and_what_is_left(parted):
    gateway("cap raise coder ever 1 --session 3f2a --until 1h")
    gateway("cap limit coder ever 1.5 --token 2")
    [cap] = told("sessions")[0]["caps"]
    assert (cap["policy_nano"], cap["raised_nano"], cap["in_force_nano"], cap["left_nano"]) == (2 * DOLLAR, DOLLAR, 3 * DOLLAR, 2 * DOLLAR)
    assert "  $3.00 (+$1.00)  $2.00  " in gateway("sessions").output
    assert "\ncap      $3.00 (+$1.00), $2.00 left\n" in gateway("sessions 3f2a").output
    assert [(row["id"], row["cap_nano"], row["left_nano"]) for row in told("token list")] == [(1, None, None), (2, 3 * DOLLAR // 2, DOLLAR // 2)]
    assert re.search(r"^2 +coder .* \$1\.50 +\$0\.50$", gateway("token list").output, re.MULTILINE)


def test_a_part_that_no_call_had_is_raised_with_a_warning(parted):
    assert "None of the last 100,000 calls had it: is it spelled so?" in gateway("cap raise coder ever 1 --until 1h --user u2").output


BAD_NIGHT = [
    "cap list", "cap raise reports day 5 --until 12h", "cap withdraw 1", "cap limit reports day 1", "cap limit reports day --lift",
    "pause reports --now", "resume reports", "pause team:batch", "resume team:batch", "pause --all", "resume --all",
    "token issue reports", "token rotate reports", "token list", "token revoke reports --all", "audit --app reports",
    "app list", "app show reports", "report", "report --by token", "invoice", "adjust 1 0.25 --why bill",
]  # fmt: skip


@pytest.mark.parametrize(
    "broken",
    [
        {"apps/app.yaml": "caps: {mnth: $5}\n"},
        {"apps/app.yaml": "\tno: yaml"},
        {"apps/reports.yaml": "modles: {}\ncaps: [1]\n"},
        {"gateway.yaml": "caps: [what\n"},
        {"prices.yaml": "nonsense"},
        {"gateway.yaml": None},
    ],
    ids=str,
)
def test_the_bad_nights_commands_work_beside_a_broken_file(here, broken):
    with connect.changing(here / "gateway.db") as db:
        spend(db, time.time(), DOLLAR)
    for name, text in broken.items():
        (here / "policies" / name).unlink(missing_ok=True)
        if text is not None:
            (here / "policies" / name).write_text(text)
    assert gateway("check").exit_code == 2, "it is broken"
    for line in BAD_NIGHT:
        done = gateway(f"{line} --json")
        assert done.exit_code == 0, (line, done.output)
        json.loads(done.stdout)


def test_a_pauses_end_is_read_and_said_in_the_gateways_zone(here):
    assert gateway("pause reports --until 2099-07-01").output.startswith("reports is paused until 2099-07-01 00:00 CEST.")
    assert told("audit --app reports")[-1]["after"] == {"until": 4086540000.0, "cut": False}
    assert "is paused until gateway resume reports." in gateway("pause reports").output, "the command that ends it"
    assert re.search(r" until 2099-07-01 00:00 CEST > until none\n", gateway("audit --app reports").output)
    assert gateway("pause --all").output.startswith("Every app is paused until gateway resume --all.")
    assert [gateway("resume --all").output, refused("resume --all", 1)] == ["Every app may call again.\n", "No pause of every app is in force.\n"]


def test_of_several_tokens_all_are_revoked_only_when_said(here):
    gateway("token issue reports")
    assert "App reports has 2 tokens in force: 1, 2. Name one with --id, or revoke them --all." in refused("token revoke reports")
    assert [each["state"] for each in told("token list reports")] == ["in force", "in force"]
    assert gateway("token revoke reports --id 1").exit_code == 0
    assert gateway("token revoke reports").exit_code == 0, "one is left: there is nothing to ask"


def test_the_audit_names_who_did_what_to_an_app(here):
    gateway("cap raise reports day 5 --until 12h --why launch")
    gateway("pause app")
    gateway("cap limit reports day 0")
    shown = gateway("audit --app reports").output
    assert [line.split()[-1] for line in shown.splitlines() if "cap raise" in line] == ["launch"]
    assert "pause" not in shown
    assert re.search(r"cap limit +app:reports day +amount \$0\.00$", shown, re.MULTILINE)
    assert re.search(r"raised \$0\.00 > raised \$5\.00, until \d{4}-\d\d-\d\d \d\d:\d\d CES?T +launch", shown), "no raw numbers"
    assert len(told("audit")) > len(told("audit --app reports"))


def test_an_apps_screen_shows_policy_caps_tokens_and_calls(here):
    assert hold(here, DOLLAR)
    gateway("cap limit team:batch day 3")
    gateway("pause reports --until 2099-07-01 --why loop")
    shown = gateway("app show reports").output
    for part in ("reports, team batch", "may use claude-haiku-4-5", "paused (app:reports) until 2099-07-01 00:00 CEST: loop", "Tokens: 1 last used"):
        assert part in shown
    stands = {(each["scope"], each["window"]): (each["in_force_nano"], each["held_nano"]) for each in told("app show reports")["caps"]}
    assert stands == {("app:reports", "day"): (10 * DOLLAR, DOLLAR), ("team:batch", "day"): (3 * DOLLAR, DOLLAR), ("total", "day"): (40 * DOLLAR, DOLLAR)}
    assert [(each["app"], each["state"], each["tokens"]) for each in told("app list")] == [("app", "in force", 0), ("reports", "paused", 1)]


def test_check_explain_and_me_say_raise_and_limit(here):
    gateway("cap raise reports day 5 --until 12h")
    gateway("cap limit reports day 1")
    checked = told("check")
    assert [(each["scope"], each["amount_nano"]) for each in (*checked["raises"], *checked["limits"])] == [("app:reports", 5 * DOLLAR), ("app:reports", DOLLAR)]
    assert re.search(r"raise 1 +reports +day +\+\$5\.00 ", gateway("check").output)
    assert "limit    reports" in gateway("check").output
    (here / "request.json").write_text('{"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}')
    [own] = [each for each in told("explain request.json --app reports")["caps"] if each["cap"] == "app:reports day"]
    assert (own["amount"], own["raised"], own["limit"]) == ("$1.00", "$5.00", "$1.00")
    assert re.search(r"app:reports day +\$1\.00 +\$5\.00 +\$1\.00 +\$0\.00", gateway("explain request.json --app reports").output)
    policy = load(here / "policies")
    with connect.reading(here / "gateway.db") as db:
        stands = reservations.standing(db, ["app:reports"], caps(policy, policy.apps["reports"]), now=time.time())
        coming = forecasts(db, stands, now=time.time())
    [day] = [each for each in me(policy.apps["reports"], stands, coming).body["windows"] if each["window"] == "day"]
    assert (day["cap"], day["raised"], day["limit"], day["limit_nano"]) == ("$1.00", "$5.00", "$1.00", DOLLAR)


def test_report_app_show_and_me_tell_one_forecast(here):
    """Five days of ten dollars each, and five so far today; a cap of a hundred without an end is reached in the fourth day from now."""
    (here / "policies/apps/reports.yaml").write_text(REPORTS.replace("day: $10", "month: $9000, ever: $100"))
    now = time.time()
    with connect.changing(here / "gateway.db") as db:
        admin.issue_token(db, "app", "d2", who="test", now=now)
        for day in range(1, 6):
            spend(db, now - day * 86_400, 10 * DOLLAR)
        spend(db, now, 5 * DOLLAR)
        spend(db, now, DOLLAR, replace(CALL, app="app", team=None, token_id=2))
    policy = load(here / "policies")
    with connect.reading(here / "gateway.db") as db:
        stands = reservations.standing(db, ["app:reports"], caps(policy, policy.apps["reports"]), now=now)
        windows = {each["window"]: each for each in me(policy.apps["reports"], stands, forecasts(db, stands, now=now)).body["windows"]}
        day = datetime.fromtimestamp(now, reservations.zone(db)).date() + timedelta(days=4)
    assert (windows["ever"]["cap_reached_on"], windows["ever"]["forecast"], windows["ever"]["forecast_days"]) == (day.isoformat(), None, 5)
    assert windows["day"]["forecast"] == "$10.00"
    report = told("report")
    lines = {line["key"]: line["forecast_nano"] for line in [*report["lines"], report["total"]]}
    assert (lines["reports"], lines["app"]) == (windows["month"]["forecast_nano"], None)
    assert lines["total"] == lines["reports"]
    shown = {each["window"]: (each["forecast_nano"], each["cap_reached_on"]) for each in told("app show reports")["caps"] if each["scope"] == "app:reports"}
    assert shown == {"month": (lines["reports"], None), "ever": (None, day.isoformat())}
    sentence = f"app reports would reach the cap in all, $100.00, on {day:%A}, {day}, at the pace of the last 5 days."
    assert sentence in gateway("report").output
    young = "No forecast yet for app: it takes 3 days that are over since the first call."
    assert young in gateway("report").output
    assert "forecast" not in gateway("report --since 30d").output, "of a period that ends now, not with the month"


TABLES = [
    "check", "cap list", "app list", "app show reports", "token list", "token forms", "audit", "report", "report --by app,model", "report --alerts", "invoice --month",
    "prices", "inventory .", "explain request.json --app reports", "replay --policy policies", "cutover", "check --changes 3",
]  # fmt: skip


def test_tables_fit_sixty_columns_and_times_say_the_zone(here, monkeypatch):
    """Prose may be longer than a line; what is in columns may not. The ledger's zone is Berlin's, whatever the machine's."""
    monkeypatch.setattr(tables, "columns", lambda: 60)
    (here / "request.json").write_text('{"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}')
    (here / "app.py").write_text("import anthropic\nclient = anthropic.Anthropic(api_key='sk-ant-api03-a-key-that-is-in-the-code-of-an-app')\n")
    now = time.time()
    with connect.changing(here / "gateway.db") as db:
        spend(db, now, 3 * DOLLAR)
        state.alert_once(db, Alert("threshold", "total", "x", "all apps together spent " + "much " * 20, {}), False, now)
        admin.keep_policy(db, "a" * 64, {"gateway.yaml": "caps: {}"}, who="test", now=now)
    for line in ("inventory . --save", "cap raise reports day 5 --until 12h --why " + "long-" * 20, "cap limit reports day 1", "pause app --until 12h --why loop"):
        assert gateway(line).exit_code == 0, line
    month = datetime.fromtimestamp(now, reservations.ZoneInfo("Europe/Berlin")).strftime(" %Y-%m")
    for line in TABLES:
        done = gateway(line + month * (line == "invoice --month"))
        assert done.exception is None or isinstance(done.exception, SystemExit), (line, done.output)
        assert done.exit_code == (1 if line.startswith(("cutover", "explain")) else 0), (line, done.output)
        assert [row for row in done.output.splitlines() if len(row) > 60 and "  " in row.strip() and not row.startswith("  ")] == [], line
    monkeypatch.setattr(tables, "columns", lambda: 0)
    for line in TABLES:
        whole = gateway(line + month * (line == "invoice --month")).output
        assert re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d(?! CES?T\b)", whole) == [], (line, whole)


def test_a_date_is_the_zones_wherever_it_is_read(here):
    """A pause says the same end in the command and in the refusal; replay and prune begin where Berlin's day does."""
    ending = re.search(r"until (\S+ \S+ CES?T)", gateway("pause reports --until 8h").output)[1]
    (here / "request.json").write_text('{"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}')
    assert f"App reports is paused until {ending}." in refused("explain request.json --app reports", 1)
    assert gateway("replay --policy policies --since 2026-07-01").output.startswith("2026-07-01 00:00 CEST to ")
    assert "0 calls before 2026-01-09 00:00 CET would" in gateway("prune --before 2026-01-09 --dry-run").output
    assert "The period runs backwards: it begins 2026-07-02 00:00 CEST" in refused("report --since 2026-07-02 --until 2026-07-01")
