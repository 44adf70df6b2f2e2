"""Yesterday's calls against tomorrow's policy."""

import json
from collections import Counter
from dataclasses import replace
from random import Random

import anthropic
import pytest
from click.testing import CliRunner
from gateway import gateway, write_policies
from ledgers import new_file

from gateway_addon.cli.replay import replay as command
from gateway_addon.ledger import Denied, NewCall, Outcome, Settlement, admin, connect, reservations
from gateway_addon.ledger.reports.entry_history import Recorded, recorded
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.operations.policy_replay import Tally, replay, tallied
from gateway_addon.policy import caps, load
from gateway_addon.simulator import Behaviour, Simulator
from gateway_addon.windows import WINDOWS

MONDAY = 1_773_043_200.0
DAY_S = 86_400
CALL = Recorded(1, "app", "messages", "claude-haiku-4-5", 100, None, 500_000, 0, 400_000, MONDAY, ())
ALLOWED = "models: {allow: [claude-haiku-4-5]}\n"


def policy(folder, text, common=""):
    return load(write_policies(folder, "http://127.0.0.1:1", {"app": text}, common))


@pytest.mark.parametrize(
    ("text", "call", "code"),
    [
        (ALLOWED + "caps: unlimited\n", CALL, None),
        ("models: {allow: [claude-sonnet-5]}\ncaps: unlimited\n", CALL, "model"),
        (ALLOWED + "caps: unlimited\nendpoints: [models]\n", CALL, "endpoint"),
        (ALLOWED + "caps: unlimited\nmax_tokens: 99\n", CALL, "max_tokens"),
        (ALLOWED + "caps: unlimited\nmax_tokens: {limit: 99, over: clamp}\n", CALL, None),
        ("models: {allow: [claude-haiku-4-5], aliases: {small: claude-haiku-4-5}}\ncaps: unlimited\n", replace(CALL, model="small"), None),
        (ALLOWED + "caps: {request: $0.0004}\n", CALL, "quote_over_cap"),
        (ALLOWED + "caps: {request: $0.0005}\n", CALL, None),
        (ALLOWED + "caps: {request: $0.0003}\n", replace(CALL, grant_nano=300_000, spent_nano=200_000), None),  # held in steps
        (ALLOWED + "caps: {request: $0.0003}\n", replace(CALL, grant_nano=300_000), "quote_over_cap"),  # and topped up
        (ALLOWED + "caps: {request: $0.0003}\nobserve: [caps]\n", CALL, None),
        (ALLOWED + "caps: {day: $0.0003}\n", CALL, "quote_over_cap"),
        (ALLOWED + "caps: {day: $0.0005}\n", replace(CALL, quantum_nano=1), "quote_over_cap"),
        (ALLOWED + "caps: {day: $0.0003}\nobserve: [caps]\n", CALL, None),
        ("models: {allow: [claude-sonnet-5]}\nobserve: [models]\ncaps: unlimited\n", CALL, None),
        (ALLOWED + "caps: unlimited\n", replace(CALL, app="gone"), "app_unknown"),
        (ALLOWED + "caps: unlimited\nrequire: [system]\n", CALL, None),  # not judged: the body is not kept
        (ALLOWED + "caps: {day: $0}\n", replace(CALL, endpoint="count_tokens", max_tokens=None, spent_nano=0, grant_nano=0), None),
    ],
)
def test_a_call_is_judged_by_what_the_ledger_keeps_of_it(tmp_path, text, call, code):
    assert [verdict.code for verdict in replay([call], policy(tmp_path, text))] == [code]


def test_cap_fills_with_passed_calls_and_empties_by_window(tmp_path):
    """A cap fills with the calls that pass, and empties with its window."""
    in_force = policy(tmp_path, ALLOWED + "caps: {day: $0.001}\n")
    days = [CALL] * 3 + [replace(CALL, grant_nano=200_000, spent_nano=100_000)] + [replace(CALL, started_at=MONDAY + DAY_S)]
    assert [verdict.code for verdict in replay(days, in_force)] == [None, None, "cap_spent", None, None]


def test_a_shared_cap_counts_every_app(tmp_path):
    apps = dict.fromkeys(("app", "other"), ALLOWED + "caps: unlimited\n")
    in_force = load(write_policies(tmp_path, "http://127.0.0.1:1", apps, "caps: {month: $0.001}\n"))
    calls = [CALL, replace(CALL, app="other"), CALL]
    assert [verdict.code for verdict in replay(calls, in_force)] == [None, None, "cap_spent"]


def test_the_sums_tell_what_is_saved_and_who_is_let_in(tmp_path):
    in_force = policy(tmp_path, ALLOWED + "caps: unlimited\n")
    refused = [replace(CALL, refusal=code, spent_nano=0) for code in ("model", "cap_spent")]
    calls = [CALL, replace(CALL, model="claude-opus-5-5"), *refused]
    apps, reasons = tallied(replay(calls, in_force))
    assert apps == {"app": Tally(calls=2, refused=1, saved_nano=400_000, let_in=1)}
    [(app, sentence)] = reasons
    assert (app, "may not use claude-opus-5-5" in sentence) == ("app", True)


async def test_real_calls_are_replayed_from_their_ledger(tmp_path):
    async with Simulator(behaviour=Behaviour(output_tokens=50)) as api, gateway(tmp_path, api) as gw:
        for model in ("claude-haiku-4-5", "claude-sonnet-5"):
            await gw.client().messages.create(model=model, max_tokens=50, messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(anthropic.PermissionDeniedError):
            await gw.client().messages.create(model="claude-opus-4-6", max_tokens=50, messages=[{"role": "user", "content": "hi"}])
        await gw.quiet()
        dear = (await api.settled()).messages()[1].billed_nano
    policy(tmp_path / "new", "models: {allow: [claude-haiku-4-5, claude-opus-4-6]}\ncaps: {day: $1}\n")
    where = ["--ledger", f"sqlite:///{tmp_path / 'gateway.db'}", "--policy", str(tmp_path / "new"), "--since", "1h"]
    told = json.loads(CliRunner().invoke(command, [*where, "--json"], catch_exceptions=False).output)
    assert told["apps"] == {"app": {"calls": 2, "refused": 1, "saved_nano": dear, "let_in": 1}}
    shown = CliRunner().invoke(command, where, catch_exceptions=False).output
    assert "Refused, because:\n  1 call of app" in shown
    assert "Not judged" in shown


WEEK_S = 7 * DAY_S
AMOUNTS = (0, 100_000_000, 300_000_000, 900_000_000)


def calls_of(random: Random) -> list[tuple[float, str, int, int, int]]:
    """Moments, apps, grants, quanta and costs of calls that follow each other."""
    moments = sorted(MONDAY + random.randrange(WEEK_S) for _ in range(12))
    grants = [random.choice(AMOUNTS[1:]) for _ in moments]
    return [
        (at, random.choice(("app", "other")), grant, random.choice((0, 50_000_000)), random.randrange(grant + 1))
        for at, grant in zip(moments, grants, strict=True)
    ]


def made_under(policy, folder, calls) -> list[str | None]:
    """Make the calls one after the other, under a policy's caps or none; return why each was denied."""
    said: list[str | None] = []
    folder.mkdir()
    with connect.changing(new_file(folder)) as db:
        ids = {app: admin.issue_token(db, app, app, who="test", now=MONDAY).id for app in ("app", "other")}
        for at, app, grant, quantum, cost in calls:
            limits = caps(policy, policy.apps[app]) if policy else ()
            call = NewCall(app, None, ids[app], model_asked="claude-haiku-4-5", max_tokens=100)
            held = reservations.reserve(db, "test", call, grant, limits, quantum_nano=quantum, now=at)
            said.append(held.reason if isinstance(held, Denied) else None)
            if not isinstance(held, Denied):
                reservations.settle(db, held.call_id, Settlement(cost, (), Outcome()), now=at)
    return said


def test_replay_refuses_what_the_ledger_would_have_refused(tmp_path):
    """Random caps over random calls: one ledger has the caps in force, the other records all calls and is replayed."""
    all_said: Counter[str | None] = Counter()
    for seed in range(20):
        random, folder = Random(seed), tmp_path / str(seed)
        folder.mkdir()
        windows = random.sample(WINDOWS, 2)
        own = ", ".join(f"{window}: ${random.choice(AMOUNTS) / 1e9:g}" for window in windows)
        apps = {"app": ALLOWED + f"caps: {{{own}}}\n", "other": ALLOWED + "caps: unlimited\n"}
        strict = load(write_policies(folder, "http://127.0.0.1:1", apps, f"caps: {{{random.choice(WINDOWS)}: $1.2}}\n"))
        calls = calls_of(random)
        capped, uncapped = folder / "capped", folder / "uncapped"
        expected = made_under(strict, capped, calls)
        made_under(None, uncapped, calls)
        with connect.reading(uncapped / "gateway.db") as db:
            verdicts = list(replay(recorded(db, since=MONDAY, until=MONDAY + WEEK_S), strict))
        assert [verdict.code for verdict in verdicts] == expected, f"seed {seed}"
        all_said.update(expected)
    assert all(all_said[code] > 5 for code in (None, "cap_spent", "quote_over_cap")), all_said


def test_empty_time_and_broken_policy_are_sentences(tmp_path):
    """An empty time and a broken policy are said in a sentence."""
    sqlite_files.create(tmp_path / "gateway.db")
    policy(tmp_path / "new", ALLOWED + "caps: unlimited\n")
    where = ["--ledger", f"sqlite:///{tmp_path / 'gateway.db'}", "--policy", str(tmp_path / "new")]
    assert "No call was recorded" in CliRunner().invoke(command, where).output
    (tmp_path / "new" / "apps" / "app.yaml").write_text("models: {alow: []}\n")
    broken = CliRunner().invoke(command, where)
    assert (broken.exit_code, "did you mean allow?" in broken.output) == (2, True)
