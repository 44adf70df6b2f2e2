"""Test sessions, agents, users and labels in reports and invoices, on both engines: who is at work, the tree, sums that add up."""

import json
from contextlib import closing
from dataclasses import replace

import pytest
from click.testing import CliRunner
from ledgers import CALL, ENGINES, NOON, Cap, Part, Tokens, new_ledger, url, writing

from gateway_addon.cli import main
from gateway_addon.ledger import Settlement, admin, connect, reservations
from gateway_addon.ledger.reports import invoice, sessions, spending
from gateway_addon.ledger.reports.call_sums import Only
from gateway_addon.ledger.reports.sessions import AgentLine, tree

CENT, DOLLAR, MINUTE_S = 10**7, 10**9, 60
CAPS = [Cap("total", "ever", 10**12)]
ACME, BETA = (("client", "acme"),), (("branch", "a\"b'c"), ("client", "beta"))
RUN = replace(CALL, session_id="5e55-run")
CALLS = [
    # minutes before NOON, the call, its cost
    (90, RUN, 5 * DOLLAR),
    (30, RUN, DOLLAR),
    (5, replace(RUN, agent_id="a1", user_id="u1"), 2 * DOLLAR),
    (4, replace(RUN, agent_id="a2", parent_agent_id="a1"), DOLLAR // 2),
    (3, replace(RUN, agent_id="a2", parent_agent_id="a1", model_asked="claude-opus-4-6"), DOLLAR // 4),
    (2, replace(CALL, session_id="5e55-other", user_id="u1", labels=ACME), DOLLAR),
    (300, replace(CALL, session_id="old", labels=BETA), 3 * DOLLAR),
    (1, CALL, DOLLAR),
]


@pytest.fixture(params=ENGINES)
def path(request, tmp_path):
    path = new_ledger(tmp_path, request.param)
    with closing(writing(path)) as db:
        for minutes, call, nano in CALLS:
            at = NOON - minutes * MINUTE_S
            held = reservations.reserve(db, "me", call, nano, CAPS, now=at)
            part = Part(nano, tokens=Tokens(input_tokens=10, output_tokens=5), model=call.model_asked)
            reservations.settle(db, held.call_id, Settlement(nano, (part,)), now=at + 1)
        reservations.reserve(db, "me", RUN, CENT, CAPS, now=NOON - 30)
        reservations.refused(db, "me", RUN, "model", now=NOON - 20)
        admin.adjust(db, 2, -CENT, who="ops", why="less", now=NOON - 10)
    return path


def test_sessions_at_work_with_what_they_spent(path):
    with connect.reading(path) as db:
        found = sessions.active(db, since=NOON - 3600, now=NOON)
    assert [(each.session, each.user_id, each.agents, each.calls, each.open, each.refused) for each in found] == [
        ("5e55-run", "u1", 2, 6, 1, 1), ("5e55-other", "u1", 0, 1, 0, 0),
    ]  # fmt: skip
    run = found[0]
    recent = 2 * DOLLAR + DOLLAR // 2 + DOLLAR // 4 - CENT
    assert (run.spent_nano, run.held_nano) == (6 * DOLLAR + recent, CENT), "what was spent before the hour too"
    assert (run.recent_nano, run.hour_nano, run.rate_nano) == (recent, recent + DOLLAR, 6 * recent)


def test_a_sessions_agents_are_a_tree(path):
    with connect.reading(path) as db:
        [one] = sessions.one(db, "5e55-run", now=NOON)
        [listed] = [each for each in sessions.active(db, since=NOON - 3600, now=NOON) if each.session == "5e55-run"]
    found = one.agents
    assert one.session == listed
    assert [(depth, agent, [line.spent_nano for line in own]) for depth, agent, own in tree(found)] == [
        (0, None, [6 * DOLLAR - CENT]), (1, "a1", [2 * DOLLAR]), (2, "a2", [DOLLAR // 2, DOLLAR // 4]),
    ]  # fmt: skip
    assert sum(line.input_tokens for line in found) == 50


def test_a_bounded_look_sums_calls_piece_by_piece(path, monkeypatch):
    """The pieces are the whole; so is a list of the calls since a time that moves up where there are too many."""
    monkeypatch.setattr(sessions, "LOOKED_MAX", 3)
    with connect.reading(path) as db:
        [whole] = sessions.one(db, "5e55-run", now=NOON)
        pieces = [sessions.newest(db, "reports", "5e55-run", below=2**62, now=NOON)]
        while pieces[-1].has_older:
            pieces.append(sessions.newest(db, "reports", "5e55-run", below=pieces[-1].calls[-1], now=NOON))
        assert sessions.newest(db, "reports", "5e55-run", below=pieces[-1].calls[-1], now=NOON) is None
        listed, since = sessions.lately(db, since=NOON - 3600, now=NOON)
    assert [len(each.calls) for each in pieces] == [3, 3, 1]
    for name in ("calls", "open", "refused", "spent_nano", "held_nano", "recent_nano", "hour_nano"):
        assert sum(getattr(each.session, name) for each in pieces) == getattr(whole.session, name), name
    assert sum(line.input_tokens for each in pieces for line in each.agents) == sum(line.input_tokens for line in whole.agents)
    assert min(each.session.started_at for each in pieces) == whole.session.started_at
    assert ([(each.session, each.calls, each.refused) for each in listed], since) == ([("5e55-run", 1, 1)], NOON - 60)


def line(agent, parent):
    return AgentLine(agent, parent, "m", 1, 0, 1, 0, 0, 0, 0, 0, "reports", None, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], [(0, None)]),
        ([line("a", None)], [(0, None), (1, "a")]),
        ([line("b", "a"), line("a", None), line(None, None)], [(0, None), (1, "a"), (2, "b")]),
        ([line("b", "gone")], [(0, None), (1, "b")]),
        ([line("a", "b"), line("b", "a"), line("c", "c")], [(0, None), (1, "a"), (2, "b"), (1, "c")]),
    ],
)
def test_the_tree_names_each_agent_once(lines, said):
    assert [(depth, agent) for depth, agent, _ in tree(lines)] == said


@pytest.mark.parametrize(
    ("by", "only", "lines"),
    [
        ("session", Only(), {"5e55-run": 875, "5e55-other": 100, "old": 300, "(none)": 100}),
        ("user", Only(), {"u1": 300, "(none)": 1075}),
        ("label.client", Only(), {"acme": 100, "beta": 300, "(none)": 975}),
        ("label.branch", Only(), {"a\"b'c": 300, "(none)": 1075}),
        ("label.none", Only(), {"(none)": 1375}),
        ("app", Only(session="5e55-run"), {"reports": 875}),
        ("user", Only(session="5e55-run"), {"u1": 200, "(none)": 675}),
        ("label.client", Only(user="u1"), {"acme": 100, "(none)": 200}),
        ("app", Only(labels=BETA), {"reports": 300}),
        ("app", Only(labels=(("branch", "x"), ("client", "beta"))), {}),
    ],
)
def test_spending_by_part_sums_to_the_calls(path, by, only, lines):
    """In cents less the correction of one, in a report and in an invoice."""
    span = {"since": NOON - 86_400, "until": NOON + 1}
    with connect.reading(path) as db:
        found = spending.report(db, by, only=only, **span)
        charged = invoice.invoice(db, by=by, only=only, **span)
    corrected = {key: (nano * CENT - (CENT if nano in (875, 675, 1075, 975, 1375) else 0)) for key, nano in lines.items()}
    assert {each.key: each.spent_nano for each in found.lines} == corrected
    assert {key: sum(each.spent_nano for each in charged if each.key == key) for key in lines} == corrected


def test_a_label_that_is_no_name_reaches_no_statement(path):
    with connect.reading(path) as db, pytest.raises(ValueError, match="is not the name of a label"):
        spending.report(db, "app", since=0, until=1, only=Only(labels=(("x') --", "1"),)))


def run(path, *arguments):
    result = CliRunner().invoke(main, [*arguments, "--ledger", url(path)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_a_session_is_found_by_the_beginning_of_its_id(path):
    for text, code, said in (
        ("5e55-r", 0, "session  5e55-run"), ("5e55", 2, "session '5e55' may be 5e55-other, 5e55-run; write more"),
        ("nobody", 2, "No session 'nobody' in this ledger"), ("old", 0, "(main)"), ("5e55-run", 0, "in 6 calls, 1 refused"), ("%", 2, "No session '%'"),
    ):  # fmt: skip
        assert (run(path, "sessions", text)[0], said in run(path, "sessions", text)[1]) == (code, True), text
    shown = run(path, "sessions", "5e55-run")[1]
    assert "\n└ a1 " in shown
    assert "\n└── a2 " in shown
    [found] = json.loads(run(path, "sessions", "5e55-run", "--json")[1])
    assert sum(each["spent_nano"] for each in found["by_agent"]) == found["spent_nano"]


def test_an_invoice_by_label_with_a_markup(path):
    month = ["--month", "2026-03"]
    shown = run(path, "invoice", *month, "--label", "client=beta", "--markup", "25%")[1]
    assert "All apps: $3.75 (25 % above the cost of $3.00)" in shown
    found = json.loads(run(path, "invoice", *month, "--by", "label.client", "--markup", "12.5%", "--json")[1])
    assert found["charge_nano"] == sum(each["charge_nano"] for each in found["lines"])
    assert found["markup_percent"] == 12.5
    [acme] = [each for each in found["lines"] if each["label.client"] == "acme"]
    assert (acme["spent_nano"], acme["charge_nano"], acme["charge_dollars"]) == (DOLLAR, 1_125_000_000, "1.125")
    for wrong, said in (["--markup", "x"], "is not a markup"), (["--by", "model"], "known are app, team"), (["--label", "client"], "NAME=VALUE"):
        code, output = run(path, "invoice", *month, *wrong)
        assert (code, said in output) == (2, True), output
