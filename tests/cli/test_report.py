import csv
import json
import re
import sqlite3
import time
from contextlib import closing
from dataclasses import replace

import pytest
from click.testing import CliRunner
from ledgers import CALL, ENGINES, Cap, Part, Tokens, new_ledger, rows, writing

from gateway_addon.cli.invoice import invoice
from gateway_addon.cli.report import report
from gateway_addon.ledger import Alert, Outcome, Settlement, admin, connect, reservations, state
from gateway_addon.ledger.reports import spending
from gateway_addon.ledger.reports.invoice import invoice as invoice_lines
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.operations import tables
from gateway_addon.windows import next_start, starts

NOW = time.time()
CAPS = [Cap("total", "ever", 10**12)]
DOLLAR = 10**9


@pytest.fixture
def path(tmp_path):
    path = new_ledger(tmp_path)
    with closing(sqlite_files.writer_connection(path)) as db:
        admin.issue_token(db, "drafts", "d2", label="laptop", who="test", now=NOW)
        cached = Tokens(input_tokens=100, output_tokens=50, cache_read_tokens=300)
        spend(db, CALL, DOLLAR, cached)
        spend(db, CALL, 3 * DOLLAR, Tokens(input_tokens=100, output_tokens=50))
        dear = replace(CALL, app="drafts", team=None, token_id=2, model_asked="claude-opus-4-6", max_tokens=32000, agent_id="agent-7")
        spend(db, dear, 16 * DOLLAR, Tokens(input_tokens=5000, output_tokens=800))
        spend(db, CALL, 2 * DOLLAR, cached, at=NOW - 3 * 86_400)
        for code in ("cap_spent", "cap_spent", "model"):
            reservations.refused(db, "me", CALL, code, now=NOW - 60)
        reservations.failed_authentication(db, "token_unknown", now=NOW - 60)
        reservations.free(db, "me", replace(CALL, endpoint="count_tokens"), Outcome(status=200), now=NOW - 60)
        reservations.reserve(db, "me", CALL, DOLLAR // 2, CAPS, now=NOW - 60)
        said = Alert("threshold", "total", "ever 0 80", "all apps together spent $20.00", {"threshold_percent": 80, "spent_nano": 20 * DOLLAR})
        state.alert_once(db, said, False, now=NOW - 30)
    return path


def spend(db, call, nano, tokens, at=NOW - 3600):
    held = reservations.reserve(db, "me", call, nano, CAPS, now=at)
    outcome = Outcome(status=200, model_served=f"{call.model_asked}-20260101", complete=True)
    reservations.settle(db, held.call_id, Settlement(nano, (Part(nano, tokens=tokens, model=call.model_asked),), outcome), now=at)


def run(path, *options, command=report):
    result = CliRunner().invoke(command, ["--ledger", f"sqlite:///{path}", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def as_json(path, *options):
    return json.loads(run(path, "--since", "2d", "--json", *options))


@pytest.mark.parametrize(
    ("by", "lines"),
    [
        ("app", {"drafts": (1, 16), "reports": (3, 4)}),
        ("model", {"claude-opus-4-6": (1, 16), "claude-haiku-4-5": (3, 4)}),
        ("served", {"claude-opus-4-6-20260101": (1, 16), "claude-haiku-4-5-20260101": (2, 4), "(no answer)": (1, 0)}),
        ("token", {"drafts #2 laptop": (1, 16), "reports #1": (3, 4)}),
        ("agent", {"agent-7": (1, 16), "(none)": (3, 4)}),
    ],
)
def test_spending_is_told_apart_by(path, by, lines):
    found = as_json(path, "--by", by)["lines"]
    assert {line["key"]: (line["calls"], line["spent_nano"] // DOLLAR) for line in found} == lines


@pytest.mark.parametrize("by", [*spending.KEYS, "app,day", "team,model", "month,app", "token,session"])
def test_a_report_sums_to_what_the_caps_are_judged_by(path, by):
    found = json.loads(run(path, "--since", "30d", "--json", "--by", by))
    [(spent_nano, held_nano)] = rows(path, """SELECT spent_nano, reserved_nano FROM balances WHERE scope = 'total' AND "window" = 'ever'""")
    assert found["total"]["spent_nano"] == sum(line["spent_nano"] for line in found["lines"]) == spent_nano
    assert found["total"]["held_nano"] == held_nano == DOLLAR // 2


def test_an_adjustment_shows_in_the_report_of_its_call(path):
    with connect.changing(path) as db:
        admin.adjust(db, 1, -DOLLAR // 2, who="ops", why="the provider's report", now=NOW)
    [line] = [each for each in as_json(path)["lines"] if each["key"] == "reports"]
    assert line["spent_nano"] == 7 * DOLLAR // 2


def test_shares_means_and_changes(path):
    [line] = [each for each in as_json(path)["lines"] if each["key"] == "reports"]
    assert line["mean_nano"] == 2 * DOLLAR
    assert line["cache_hit_share"] == pytest.approx(300 / 500)
    assert line["output_share"] == pytest.approx(100 / 200)
    assert line["spent_before_nano"] == 2 * DOLLAR


def test_another_model_is_reported_with_its_first_day(path):
    """Another model than the one asked is told with the day since when."""
    with closing(sqlite_files.writer_connection(path)) as db:
        for days in (9, 1):
            held = reservations.reserve(db, "me", CALL, DOLLAR, CAPS, now=NOW - days * 86_400)
            outcome = Outcome(status=200, model_served="claude-sonnet-5", complete=True, flags=("drift",))
            reservations.settle(db, held.call_id, Settlement(DOLLAR, (), outcome), now=NOW - days * 86_400)
    [drift] = as_json(path, "--by", "served")["drifts"]
    assert (drift["app"], drift["asked"], drift["served"], drift["calls"]) == ("reports", "claude-haiku-4-5", "claude-sonnet-5", 1)
    assert (drift["first_at"], drift["last_at"]) == (NOW - 9 * 86_400, NOW - 86_400), "since before this period began"
    assert "Another model answered than the one asked for:" in run(path, "--since", "2d", "--by", "served")


def test_refusals_at_the_keys_limits_count_for_their_app(path):
    """Refusals of the provider at the key's limits are counted for the app that ran into them."""
    with closing(sqlite_files.writer_connection(path)) as db:
        held = reservations.reserve(db, "me", CALL, DOLLAR, CAPS, now=NOW - 60)
        reservations.void(db, held.call_id, Outcome(status=429, complete=True), now=NOW - 60)
    assert {line["key"]: line["upstream_429"] for line in as_json(path)["lines"]} == {"reports": 1, "drafts": 0}
    assert "Refused by the provider at the shared key's limits (429): 1 reports" in run(path, "--since", "2d")


def test_refused_calls_are_counted_by_reason(path):
    assert as_json(path)["refusals"] == {"cap_spent": 2, "model": 1, "token_unknown": 1}


def test_the_table_lines_up_and_ends_in_the_total(path):
    lines = run(path, "--since", "2d").splitlines()
    table = [line for line in lines[2:] if line.strip()]
    [drafts] = [line for line in table if line.startswith("drafts")]
    assert drafts.split() == ["drafts", "1", "$16.00", "$16.00", "0%", "2%", "new"]
    [total] = [line for line in table if line.startswith("total")]
    assert total.split()[:4] == ["total", "4", "$20.00", "$0.5000"]
    assert "+900%" in total
    assert lines[-1] == "Refused: 2 cap_spent, 1 model, 1 token_unknown"


def test_csv_is_read_by_machines(path):
    found = list(csv.DictReader(run(path, "--since", "2d", "--csv").splitlines()))
    assert [(line["key"], int(line["spent_nano"])) for line in found] == [("drafts", 16 * DOLLAR), ("reports", 4 * DOLLAR)]
    assert [(line["spent_dollars"], line["held_dollars"]) for line in found] == [("16.00", "0.00"), ("4.00", "0.50")]


def test_notable_names_the_configuration_that_costs_most_and_why(path):
    text = run(path, "--since", "2d", "--notable")
    assert text.startswith("drafts on claude-opus-4-6 with max_tokens 32,000 costs most: $16.00 of $20.00 (80%) in 1 call since")
    assert "A call costs $16.00, 8.0 times the mean of all others ($2.00)." in text
    assert "Its prompts are 5,000 tokens on average and 0% come from the cache" in text


def test_notes_are_below_a_table_that_needs_them(path):
    assert "*" not in run(path, "--since", "2d")
    with closing(sqlite_files.writer_connection(path)) as db:
        held = reservations.reserve(db, "me", CALL, DOLLAR, CAPS, now=NOW - 60)
        reservations.settle(db, held.call_id, Settlement(DOLLAR, (Part(DOLLAR),), Outcome(status=200, flags=("estimated:cut",))), now=NOW - 60)
    assert re.search(r"total .+\d\*.+\n\n\* An upper bound is booked", run(path, "--since", "2d"), re.DOTALL)
    assert "No such calls in this time.\n" in run(path, "--since", "2d", "--model", "gpt"), "there are others: no token is missing"


def test_alerts_are_listed(path):
    assert "All apps together spent $20.00" in run(path, "--since", "2d", "--alerts")
    [alert] = as_json(path, "--alerts")
    assert (alert["threshold_percent"], alert["spent_nano"]) == (80, 20 * DOLLAR)


@pytest.mark.parametrize("option", [(), ("--notable",), ("--alerts",), ("--csv",), ("--json",)])
def test_an_empty_ledger_reports_nothing_and_does_not_fail(tmp_path, option):
    path = new_ledger(tmp_path)
    run(path, "--since", "2d", *option)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ledger", "sqlite:////nowhere/gateway.db"], "There is no ledger at /nowhere/gateway.db"),
        (["--since", "yesterday"], "neither a date like"),
        (["--since", "2026-03-02", "--until", "2026-03-01"], "The period runs backwards: it begins 2026-03-02 00:00 UTC and ends 2026-03-01"),
        (["--last", "month", "--since", "7d"], "leave --since and --until out"),
        (["--by", "modle"], "--by modle: did you mean model?"),
        (["--by", "app,day,model"], "name one grouping, or two that differ"),
        (["--by", "app,app"], "name one grouping, or two that differ"),
        (["--app", "reprots"], "No app 'reprots': did you mean reports?"),
        (["--app", "reports", "--notable"], "leave --app and what else chooses calls out"),
    ],
)
def test_what_cannot_be_reported_is_said_in_a_sentence(path, options, sentence):
    result = CliRunner().invoke(report, ["--ledger", f"sqlite:///{path}", *options])
    assert (result.exit_code, sentence in result.output) == (2, True), result.output


def test_the_views_for_people_show_dollars(path):
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT spent FROM spend WHERE app = 'drafts'").fetchall() == [("$16.000000",)]
        assert ("$16.000000",) in db.execute("SELECT spent FROM standings WHERE scope = 'app:drafts'").fetchall()


def test_two_groupings_tell_each_pair_apart(path):
    found = as_json(path, "--by", "app,model")
    assert {line["key"]: line["spent_nano"] // DOLLAR for line in found["lines"]} == {
        "drafts / claude-opus-4-6": 16, "reports / claude-haiku-4-5": 4,
    }  # fmt: skip
    assert "app / model" in run(path, "--since", "2d", "--by", "app,model")


@pytest.mark.parametrize(
    ("options", "spent", "refused"),
    [
        (["--app", "reports"], 4, {"cap_spent": 2, "model": 1}),
        (["--app", "drafts"], 16, {}),
        (["--model", "claude-opus-4-6"], 16, {}),
        (["--model", "claude-opus-4-6-20260101"], 16, {}),
        (["--app", "drafts", "--model", "claude-haiku-4-5"], 0, {}),
    ],
)
def test_a_filter_leaves_the_calls_it_names(path, options, spent, refused):
    found = as_json(path, *options)
    assert (found["total"]["spent_nano"] // DOLLAR, found["refusals"]) == (spent, refused)


def test_dates_begin_in_the_gateways_zone(tmp_path):
    """A call half an hour into Berlin's first of March is of March, though it is February in UTC."""
    path = new_ledger(tmp_path)
    with closing(sqlite_files.writer_connection(path)) as db:
        admin.align(db, "Europe/Berlin", {"reports": "batch"}, who="test", now=NOW)
        spend(db, CALL, DOLLAR, Tokens(), at=1_772_321_400)
    said = {name: json.loads(run(path, *options, "--json"))["total"]["spent_nano"] // DOLLAR for name, options in {
        "march": ["--since", "2026-03-01", "--until", "2026-04-01"], "february": ["--since", "2026-02-01", "--until", "2026-03-01"],
    }.items()}  # fmt: skip
    assert said == {"march": 1, "february": 0}
    assert "2026-03-01 00:00 CET to 2026-04-01 00:00 CEST" in run(path, "--since", "2026-03-01", "--until", "2026-04-01")
    charged = json.loads(run(path, "--month", "2026-03", "--json", command=invoice))
    assert (charged["month"], charged["spent_nano"]) == ("2026-03", DOLLAR)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_report_that_is_too_wide_keeps_what_matters(path, columns, monkeypatch):
    monkeypatch.setattr(tables, "columns", lambda: columns)
    lines = run(path, "--since", "30d", "--by", "app").splitlines()
    assert max(map(len, lines)) <= columns
    assert [line.split()[:3] for line in lines if line.startswith("drafts")] == [["drafts", "1", "$16.00"]]


def test_a_change_is_left_out_where_it_says_nothing(path):
    assert "change" not in run(path, "--since", "30d"), "nothing was spent before"
    assert "change" not in run(path, "--since", "2d", "--by", "app,day"), "no day is the same day of the period before"
    with closing(sqlite_files.writer_connection(path)) as db:
        spend(db, CALL, 100 * DOLLAR, Tokens())
    assert "over 10x" in run(path, "--since", "2d")


@pytest.mark.parametrize("last", ["day", "week", "month"])
def test_the_last_period_is_the_one_that_is_over(path, last):
    before = starts(time.time())
    found = json.loads(run(path, "--last", last, "--json"))
    ends = {getattr(each, last) for each in (before, starts(time.time()))}  # two where midnight came in between
    assert (found["since"], found["until"]) in {(getattr(starts(end - 1), last), end) for end in ends}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_invoice_sums_to_the_ledger_to_the_nano(tmp_path, engine):
    """With a correction, an estimate and a call in flight; each app's sum is its balance of the month."""
    path, at = new_ledger(tmp_path, engine), 1_772_500_000.0
    with closing(writing(path)) as db:
        admin.issue_token(db, "drafts", "d2", who="test", now=at)
        spend(db, CALL, 1_234_567_891, Tokens(input_tokens=7, cache_write_1h_tokens=3), at=at)
        spend(db, replace(CALL, app="drafts", team=None, token_id=2, model_asked="claude-opus-4-6"), 77, Tokens(), at=at)
        spend(db, CALL, 5, Tokens(), at=at + 40 * 86_400)
        lost = reservations.reserve(db, "me", CALL, 999, CAPS, now=at)
        reservations.settle(db, lost.call_id, Settlement(None, (), Outcome()), now=at)
        reservations.reserve(db, "me", CALL, 10**6, CAPS, now=at)
        admin.adjust(db, 1, -891, who="ops", why="the bill", now=at + 50 * 86_400)
    with connect.reading(path) as db:
        lines = invoice_lines(db, since=starts(at).month, until=next_start("month", at))
    assert [(line.key, line.model, line.spent_nano) for line in lines] == [
        ("drafts", "claude-opus-4-6", 77),
        ("reports", "claude-haiku-4-5", 1_234_567_891), ("reports", "(estimated)", 999), ("reports", "(corrections)", -891),
    ]  # fmt: skip
    for app in ("drafts", "reports"):
        months = rows(path, """SELECT spent_nano FROM balances WHERE scope = $1 AND "window" = 'month' AND window_start = $2""", f"app:{app}", starts(at).month)
        assert months == [(sum(line.spent_nano for line in lines if line.key == app),)]


def test_an_invoice_is_a_table_and_csv(path):
    month = time.strftime("%Y-%m", time.gmtime(NOW - 3600))
    assert f"All apps: ${spent_in(path, month):,}.00" in run(path, "--month", month, command=invoice)
    found = list(csv.DictReader(run(path, "--month", month, "--csv", command=invoice).splitlines()))
    assert {line["app"] for line in found} == {"drafts", "reports"}
    assert [line["spent_dollars"] for line in found][:1] == ["16.00"]


def spent_in(path, month):
    return json.loads(run(path, "--month", month, "--json", command=invoice))["spent_nano"] // DOLLAR


@pytest.mark.parametrize(("month", "sentence"), [("October", "is not a month; write one like 2026-10"), ("2999-01", "2999-01 has not begun")])
def test_a_month_that_cannot_be_charged_is_refused(path, month, sentence):
    done = CliRunner().invoke(invoice, ["--ledger", f"sqlite:///{path}", "--month", month])
    assert (done.exit_code, sentence in done.output) == (2, True), done.output
