"""Models end on a day: said a month before to whom it concerns, and afterwards where the provider refuses them."""

import contextlib
import json
import sqlite3
from datetime import UTC, datetime

import anthropic
import pytest
from checkouts import ROOT
from click.testing import CliRunner
from gateway import gateway, write_policies
from ledgers import new_ledger, rows

from gateway_addon.cli import check as check_module
from gateway_addon.cli.check import check
from gateway_addon.cli.prices import prices as prices_command
from gateway_addon.ledger import Ledger
from gateway_addon.messages.request import Request
from gateway_addon.operations.doctor import check_models
from gateway_addon.operations.explain import explain, written
from gateway_addon.operations.webhooks import AlertDelivery
from gateway_addon.policy import load, retiring
from gateway_addon.pricing import kept, restored, retired
from gateway_addon.pricing import load as load_prices
from gateway_addon.simulator import Behaviour, Simulator

PRICES = load_prices()
CAPS = "caps: {day: $5}\n"


def at(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()


DAYS = [
    # model, fast, the first day without it
    ("claude-sonnet-4-5", False, "2026-11-30"),
    ("claude-sonnet-4-5-20250929", False, "2026-11-30"),
    ("claude-opus-4-5", False, "2027-01-22"),
    ("claude-opus-4-8", True, "2026-11-30"),
    ("claude-mythos-preview", False, "2026-06-30"),
]


@pytest.mark.parametrize(("model", "fast", "day"), DAYS)
def test_a_model_ends_with_its_day(model, fast, day):
    assert retired(PRICES, model, at(day) - 1, fast=fast) is None
    assert f"on {day}; ask for another model" in (retired(PRICES, model, at(day), fast=fast) or "")
    assert fast is (retired(PRICES, model, at(day), fast=False) is None)


def test_a_long_retired_model_has_no_day_and_a_served_one_no_end():
    assert retired(PRICES, "claude-opus-4-1", at("2026-11-28"), fast=False) == "the provider has retired claude-opus-4-1; ask for another model"
    for model in ("claude-opus-5-5", "claude-haiku-4-5", "claude-opus-4-8", "claude-no-such"):
        assert retired(PRICES, model, at("2027-06-01"), fast=False) is None


def test_a_price_stays_when_its_model_ends():
    for model, _, day in DAYS[:-1]:
        before, after = PRICES.row(model, at(day) - 1), PRICES.row(model, at(day))
        assert before == after is not None
    rates = [PRICES.row("claude-mythos-preview", at(day)).rates for day in ("2026-06-29", "2026-06-30")]
    assert [(rate.input, rate.output) for rate in rates] == [(25_000, 125_000), (10_000, 50_000)]


def test_a_table_that_was_kept_before_there_were_days_is_read():
    table = json.loads(kept(PRICES))
    for model in table["rows"].values():
        for row in model:
            row["retired"] = row["retired"] == ""
            del row["fast_retired"], row["turn_s_min"]
    again = restored(json.dumps(table))
    assert again.row("claude-opus-4-1", 0).retired == ""
    assert again.row("claude-sonnet-4-5", 0).retired is None
    assert restored(kept(PRICES)) == PRICES


APPS = {
    "named": "models: {allow: [claude-sonnet-4-5, claude-opus-5-5]}\n" + CAPS,
    "dated": "models: {allow: [claude-sonnet-4-5-20250929]}\n" + CAPS,
    "pattern": "models: {allow: ['claude-*'], deny: [claude-opus-4-5]}\n" + CAPS,
    "alias": "models: {allow: [claude-sonnet-5, claude-sonnet-4-5], aliases: {old: claude-sonnet-4-5}}\n" + CAPS,
    "fast": "models: {allow: [claude-opus-4-8]}\nfeatures: {fast: true}\n" + CAPS,
    "slow": "models: {allow: [claude-opus-4-8]}\n" + CAPS,
    "new": "models: {allow: [claude-sonnet-5-5]}\n" + CAPS,
}
CONCERNED = [
    ("2026-10-30", set()),
    ("2026-10-31", {"named", "dated", "pattern", "alias", "fast"}),
    ("2026-11-29", {"named", "dated", "pattern", "alias", "fast"}),
    ("2026-11-30", {"named", "dated", "alias", "fast"}),
    ("2027-06-01", {"named", "dated", "alias", "fast"}),
]


@pytest.fixture
def policies(tmp_path):
    return write_policies(tmp_path / "policies", "https://api.anthropic.com", APPS)


@pytest.mark.parametrize(("day", "apps"), CONCERNED)
def test_an_end_concerns_who_may_use_it_and_then_who_names_it(policies, day, apps):
    """A pattern that means other models too needs no change once one of them is no more."""
    found = retiring(load(policies), at(day))
    assert {each.app for each in found} == apps
    assert all(each.what.is_past(at(day)) is (day >= "2026-11-30") for each in found)
    for each in found:
        assert each.sentence(at(day)).endswith(f"ask for another (policies/apps/{each.app}.yaml models)")


@pytest.mark.parametrize(("day", "words"), [("2026-11-28", "retires"), ("2026-12-01", "retired")])
def test_check_and_doctor_say_the_same(policies, monkeypatch, day, words):
    monkeypatch.setattr(check_module.time, "time", lambda: at(day))
    said = CliRunner().invoke(check, [str(policies)])
    sentence = f"app named may use claude-sonnet-4-5, and the provider {words} claude-sonnet-4-5 on 2026-11-30"
    assert (said.exit_code, f"warning: {sentence}" in said.output) == (0, True)
    as_json = json.loads(CliRunner().invoke(check, [str(policies), "--json"]).output)["retiring"]
    found = check_models(load(policies), at(day))
    assert sorted(as_json) == sorted(found.findings or found.seen)
    assert bool(found.findings) is (words == "retired"), "what is still to come is no fault yet"


def test_nothing_is_said_where_nothing_ends(tmp_path):
    folder = write_policies(tmp_path / "policies", "https://api.anthropic.com", {"new": APPS["new"]})
    assert "warning" not in CliRunner().invoke(check, [str(folder)]).output
    assert check_models(load(folder), at("2026-11-28")).findings == []
    assert retiring(load(ROOT / "policies" / "examples"), at("2026-11-28")) == (), "the examples name models that live on"


async def test_an_alert_is_told_once_for_each_app_and_model(tmp_path, policies):
    path = new_ledger(tmp_path)
    now = at("2026-11-28")
    async with contextlib.AsyncExitStack() as stack:
        ledger = await Ledger.open(f"sqlite:///{path}")
        stack.push_async_callback(ledger.close)
        for clock in (now, now + 1, now + 86_400):
            await AlertDelivery(ledger, lambda source: "", lambda clock=clock: clock).look(load(policies))
    alerts = rows(path, "SELECT kind, scope FROM alerts ORDER BY scope")
    assert [tuple(row) for row in alerts] == [("retirement", f"app:{app}") for app in ("alias", "dated", "fast", "named", "pattern")]


def test_explain_says_what_the_provider_will_say(policies):
    policy = load(policies)
    body = {"model": "claude-sonnet-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    request = Request("POST", "/v1/messages", (("anthropic-version", "2023-06-01"),), json.dumps(body).encode())
    for day, note in (("2026-11-29", None), ("2026-11-30", "the provider retired claude-sonnet-4-5 on 2026-11-30; ask for another model")):
        found = explain(policy, policy.apps["named"], request, policies / "none.db", at(day))
        assert (found["note"], found["refused"]) == (note, None)
        assert ("the Claude API would refuse it" in written(found)) is (note is not None)


@pytest.mark.filterwarnings("ignore:The model 'claude-mythos-preview' is deprecated:DeprecationWarning")
async def test_the_providers_404_is_explained(tmp_path):
    """The 404's body passes as it came; a header and an alert carry the sentence of `explain`."""
    policy = {"app": "models: {allow: [claude-mythos-preview, claude-haiku-4-5]}\n" + CAPS}
    ask = {"max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    async with Simulator(behaviour=Behaviour(status=404)) as api, gateway(tmp_path, api, policy) as gw:
        notes = []
        for model in ("claude-mythos-preview", "claude-haiku-4-5"):
            with pytest.raises(anthropic.NotFoundError) as said:
                await gw.client().messages.create(model=model, **ask)
            assert said.value.body["error"]["type"] == "not_found_error"
            notes.append(said.value.response.headers.get("x-gateway-note"))
        await gw.quiet()
        assert notes == ["the provider retired claude-mythos-preview on 2026-06-30; ask for another model", None]
        assert notes[0] == retired(PRICES, "claude-mythos-preview", at("2026-11-28"), fast=False)
        with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
            assert db.execute("SELECT DISTINCT state FROM calls").fetchall() == [("voided",)]


def test_prices_show_when_a_model_ends(tmp_path):
    def line(model, day):
        said = CliRunner().invoke(prices_command, ["--policies", str(tmp_path), "--at", day]).output
        return next((line for line in said.splitlines() if line.startswith(f"{model} ")), None)

    assert line("claude-sonnet-4-5", "2026-11-29").endswith("until 2026-11-30")
    assert line("claude-sonnet-4-5", "2026-11-30") is None
    assert line("claude-opus-4-8", "2026-11-29").endswith("fast x2 until 2026-11-30")
