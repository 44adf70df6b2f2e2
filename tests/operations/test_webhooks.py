"""Alerts: once, in time, without secrets, and never in a call's way."""

import asyncio
import http.server
import json
import logging
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
from gateway import gateway, write_policies
from ledgers import CALL, NOON, new_ledger, rows, spend, until, url

from gateway_addon.calls import alerts
from gateway_addon.ledger import Alert, Ledger, LedgerUnavailable, Resolution, Standing, admin, connect
from gateway_addon.operations import jobs
from gateway_addon.operations.reload import PolicyWatcher
from gateway_addon.operations.webhooks import AlertDelivery
from gateway_addon.policy import Source, load
from gateway_addon.simulator import Behaviour, Simulator

DOLLAR = 1_000_000_000
HI = [{"role": "user", "content": "hi"}]


def standing(spent_nano, cap_nano=DOLLAR, scope="app:reports"):
    return Standing(scope, "day", 0, 86400, cap_nano, 0, spent_nano, 0, 0, 0)


@pytest.mark.parametrize(
    ("spent_nano", "cap_nano", "reached"),
    [(0, DOLLAR, []), (499_999_999, DOLLAR, []), (500_000_000, DOLLAR, [50]), (DOLLAR, DOLLAR, [50, 80, 95, 100]), (5, None, []), (5, 0, [])],
)
def test_threshold_is_passed_at_the_nano_dollar_that_reaches_it(spent_nano, cap_nano, reached):
    """A threshold is passed from the nano dollar that reaches it."""
    found = alerts.passed(standing(spent_nano, cap_nano), alerts.THRESHOLDS_PERCENT)
    assert [alert.facts["threshold_percent"] for alert in found] == reached
    assert len({alert.once for alert in found}) == len(reached)


def test_an_alert_names_who_how_much_and_of_what():
    def says(scope):
        return alerts.passed(standing(800_000_000, scope=scope), [80])[0].sentence

    assert says("app:reports") == "app reports spent $0.8000 of $1.00 today (80 % of the cap reached)"
    assert says("team:batch").startswith("team batch spent")
    assert says("total").startswith("all apps together spent")
    assert says("app:reports label.client:acme").startswith("client acme of app reports spent")


NEWS = Alert("drift", "app:reports", "x", "a < b & c", {"asked": "a"})


@pytest.mark.parametrize(
    ("address", "form", "slack"),
    [
        ("https://hooks.slack.com/services/x", None, True),
        ("https://example.org/hook", None, False),
        ("https://hooks.slack.com.example.org/x", None, False),
        ("https://example.org/hook", "slack", True),
        ("https://hooks.slack.com/services/x", "json", False),
    ],
)
def test_slack_gets_its_own_form_and_everybody_else_the_facts(address, form, slack):
    plain = {"text": "gateway: a < b & c", "kind": "drift", "scope": "app:reports", "at": "2026-03-10T12:00:00+00:00", "asked": "a"}
    escaped = {"text": "gateway: a &lt; b &amp; c"}
    assert json.loads(alerts.payload(NEWS, NOON, address, form)) == (escaped if slack else plain)


@pytest.mark.parametrize(
    "problem",
    [
        "policies/gateway.yaml:3: key: 'sk-ant-api03-oops' is not the name of an environment variable",
        "policies/apps/Shop.yaml: an app's file is named APP.yaml, not sk-ant-api03-oops",
        "The policies cannot be read (sk-ant-api03-oops).",
    ],
)
def test_what_is_wrong_with_a_policy_is_told_without_quoting_it(problem):
    alert = alerts.policy_broken(problem, "0123456789abcdef", NOON)
    assert "sk-ant" not in repr(alert)
    assert "gateway check" in alert.sentence
    assert f"({problem.split(': ')[0] if problem.startswith('policies/') else 'policies'}), " in alert.sentence


def policy(tmp_path, common="", app=""):
    (tmp_path / "apps").mkdir()
    (tmp_path / "gateway.yaml").write_text(f"upstream: http://127.0.0.1:1\n{common}\n")
    (tmp_path / "apps" / "reports.yaml").write_text(f"models: {{allow: [claude-haiku-4-5]}}\ncaps: {{day: $1}}\n{app}\n")
    return load(tmp_path)


@pytest.mark.parametrize(
    ("common", "app", "scope", "heard"),
    [
        ("", "", "app:reports", ((50, 80, 95, 100), None)),
        ("alerts: {at: [70%]}", "", "app:reports", ((70,), None)),
        ("alerts: {at: [70%], webhook: {env: ALL}}", "alerts: {at: [20%]}", "app:reports", ((20,), "ALL")),
        ("alerts: {webhook: {env: ALL}}", "alerts: {webhook: {env: OWN}}", "app:reports", ((50, 80, 95, 100), "OWN")),
        ("alerts: {webhook: {env: ALL}}", "alerts: {at: [20%], webhook: {env: OWN}}", "total", ((50, 80, 95, 100), "ALL")),
        ("alerts: {webhook: {env: ALL}}", "alerts: {webhook: {env: OWN}}", "team:batch", ((50, 80, 95, 100), "ALL")),
        ("alerts: {webhook: {env: ALL}}", "", "app:gone", ((50, 80, 95, 100), "ALL")),
    ],
)
def test_an_apps_own_rule_comes_before_everybodys(tmp_path, common, app, scope, heard):
    found = alerts.rule(policy(tmp_path, common, app), scope)
    assert (found.at_percent, found.webhook and found.webhook.value) == heard


@contextmanager
def hook(statuses=()):
    """A webhook that answers with these statuses, then 200; yields (address, bodies)."""
    bodies, left = [], list(statuses)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status = left.pop(0) if left else 200
            self.send_response(status)
            if status == 302:
                self.send_header("location", "/elsewhere")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret-path", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def look_until(alert_delivery, policy, condition):
    async def looked():
        await alert_delivery.look(policy)
        await alert_delivery.deliver(policy)
        return condition()

    await until(looked)


@pytest.fixture
async def ledger(tmp_path):
    ledger = await Ledger.open(f"sqlite:///{new_ledger(tmp_path)}")
    yield ledger
    await ledger.close()


HOOKED = "alerts: {webhook: {env: HOOK}}"


def herald_of(ledger, address="", **options):
    return AlertDelivery(ledger, {Source("env", "HOOK"): address}.__getitem__, time.time, **{"retry_s": 0.01, **options})


def delivered(folder):
    return rows(folder / "gateway.db", "SELECT delivered_at IS NOT NULL, try_at IS NULL, tries FROM alerts ORDER BY id")


@pytest.mark.parametrize("status", [500, 404, 302])
async def test_failed_delivery_is_retried_until_it_arrives_once(tmp_path, ledger, caplog, status):
    """A delivery that fails is tried again until it arrives once."""
    with hook([status, status]) as (address, bodies):
        alert_delivery = herald_of(ledger, address)
        alert_delivery.emit(NEWS)
        await look_until(alert_delivery, policy(tmp_path, HOOKED), lambda: delivered(tmp_path) == [(1, 1, 3)])
        assert [body["text"] for body in bodies] == ["gateway: a < b & c"] * 3
    assert f"the webhook answered {status}" in caplog.text
    assert "secret-path" not in caplog.text


async def test_undelivered_alerts_are_delivered_after_a_restart(tmp_path, ledger):
    """Alerts that were not delivered before a restart are delivered after it."""
    in_force = policy(tmp_path, HOOKED)
    before = herald_of(ledger, "http://127.0.0.1:1/nobody-listens")
    before.emit(NEWS)
    await look_until(before, in_force, lambda: delivered(tmp_path)[0][2] >= 1)
    assert delivered(tmp_path)[0][:2] == (0, 0)
    with hook() as (address, bodies):
        after = herald_of(ledger, address)
        await look_until(after, in_force, lambda: delivered(tmp_path)[0][:2] == (1, 1))
        assert len(bodies) == 1


async def test_two_processes_send_an_alert_once(tmp_path, ledger):
    in_force = policy(tmp_path, HOOKED)
    sibling = await Ledger.open(f"sqlite:///{tmp_path / 'gateway.db'}")
    with hook() as (address, bodies):
        heralds = [herald_of(each, address, retry_s=10) for each in (ledger, sibling)]
        for alert_delivery in heralds:
            alert_delivery.emit(NEWS)
        await asyncio.gather(*(look_until(alert_delivery, in_force, lambda: delivered(tmp_path) == [(1, 1, 1)]) for alert_delivery in heralds))
        assert len(bodies) == 1
    await sibling.close()


async def test_a_delivery_is_given_up_after_a_day(tmp_path, ledger):
    in_force, yesterday = policy(tmp_path, HOOKED), time.time() - 90_000
    await ledger.alert_once(NEWS, send=True, now=yesterday)
    alert_delivery = herald_of(ledger, "http://127.0.0.1:1/nobody-listens")
    await look_until(alert_delivery, in_force, lambda: delivered(tmp_path) == [(0, 1, 1)])


@pytest.mark.parametrize(("back_s", "due"), [(600, False), (3600, True)])
async def test_a_clock_set_back_does_not_hold_an_alert_up(ledger, back_s, due):
    now = time.time()
    await ledger.alert_once(NEWS, send=True, now=now)
    taken = await ledger.take_alert(retry_s=10, give_up_s=86_400, now=now - back_s)
    assert (taken is not None) == due


@pytest.mark.parametrize(
    ("address", "said"),
    [("http://8.8.8.8/secret-path", "use https"), ("file:///etc/secret-path", "not of the form https://HOST/PATH"), (None, "KeyError")],
)
async def test_an_address_that_is_none_is_said_without_showing_it(tmp_path, ledger, caplog, address, said):
    alert_delivery = herald_of(ledger, address, retry_s=60)
    if address is None:
        alert_delivery = AlertDelivery(ledger, {}.__getitem__, time.time)
    alert_delivery.emit(NEWS)
    await look_until(alert_delivery, policy(tmp_path, HOOKED), lambda: said in caplog.text)
    assert "secret-path" not in caplog.text
    assert delivered(tmp_path) == [(0, 0, 1)]


async def test_without_a_webhook_an_alert_is_in_log_and_ledger(tmp_path, ledger, caplog):
    """Without a webhook an alert stands in the log and the ledger."""
    alert_delivery = herald_of(ledger)
    alert_delivery.emit(NEWS)
    alert_delivery.emit(NEWS)
    await alert_delivery.look(policy(tmp_path))
    assert caplog.text.count("Alert: a < b & c.") == 1
    assert delivered(tmp_path) == [(0, 1, 0)]


async def test_news_waits_for_a_ledger_that_is_away(tmp_path, ledger, monkeypatch):
    async def away(*args, **options):
        raise LedgerUnavailable("away")

    alert_delivery, in_force = herald_of(ledger), policy(tmp_path)
    alert_delivery.emit(NEWS)
    with monkeypatch.context() as broken:
        broken.setattr(ledger, "alert_once", away)
        with pytest.raises(LedgerUnavailable):
            await alert_delivery.look(in_force)
    await alert_delivery.look(in_force)
    assert delivered(tmp_path) == [(0, 1, 0)]


APP = """
models: {allow: [claude-haiku-4-5]}
caps: {day: $0.002}
max_tokens: 100
alerts: {at: [10%, 20%], webhook: {env: HOOK}}
served: exact
"""


async def ask(gw):
    return await gw.client().messages.create(model="claude-haiku-4-5", max_tokens=100, messages=HI)


async def test_spending_is_told_once_by_the_highest_threshold(tmp_path, monkeypatch):
    """An app that spends is told of once, by the highest threshold, and its calls do not wait."""
    with hook() as (address, bodies):
        async with Simulator(behaviour=Behaviour(output_tokens=100)) as api, gateway(tmp_path, api, {"app": APP}) as gw:
            alert_delivery = herald_of(gw.gateway.ledger, address, retry_s=60)
            await ask(gw)
            await gw.quiet()
            for each in (alert_delivery, herald_of(gw.gateway.ledger, address, retry_s=60), alert_delivery):  # another process, or this one after a restart
                await each.look(gw.gateway.policy)
            with monkeypatch.context() as unwritten:
                unwritten.delattr(Ledger, "alert_once")  # what is known to be told is not written again, each second
                await alert_delivery.look(gw.gateway.policy)
            await look_until(alert_delivery, gw.gateway.policy, lambda: bodies)
            assert [(body["kind"], body["scope"], body["threshold_percent"]) for body in bodies] == [("threshold", "app:app", 20)]
            assert rows(tmp_path / "gateway.db", "SELECT once FROM alerts ORDER BY id")[-1][0].endswith(" 20")
            assert len(delivered(tmp_path)) == 2


async def test_a_cap_that_would_be_reached_is_told_once(tmp_path, ledger):
    """A week of days that used a tenth of a cap each; a restart, another process and the next hour tell it no second time."""
    found = policy(tmp_path, "alerts: {webhook: {env: HOOK}, at: [99%]}\ncaps: {ever: $1}")
    with connect.changing(tmp_path / "gateway.db") as db:
        for day in range(4):
            spend(db, time.time() - day * 86_400, DOLLAR // 10)
    with hook() as (address, bodies):
        for hours in (0, 0, 2):
            delivery = AlertDelivery(ledger, {Source("env", "HOOK"): address}.__getitem__, lambda hours=hours: time.time() + hours * 3600)
            await delivery.look(found)
            await delivery.look(found)
            await delivery.deliver(found)
    [body] = bodies
    assert (body["kind"], body["scope"], body["window"], body["cap_nano"]) == ("forecast", "total", "ever", DOLLAR)
    assert body["text"].startswith("gateway: all apps together would reach the cap in all, $1.00, on ")
    assert body["cap_reached_on"] in body["text"]


@pytest.fixture
def news(monkeypatch):
    kept = []
    monkeypatch.setattr("gateway_addon.calls.gateway.log_alert", kept.append)
    return kept


@pytest.mark.parametrize(("served", "kinds"), [("claude-haiku-5-5", ["drift"]), ("claude-haiku-4-5-20251001", [])])
async def test_another_model_raises_an_alert_a_dated_id_does_not(tmp_path, news, served, kinds):
    """Another model than the one asked for raises an alert, and a dated id of it does not."""
    async with Simulator(behaviour=Behaviour(served_model=served, output_tokens=20)) as api, gateway(tmp_path, api, {"app": APP}) as gw:
        await ask(gw)
        await ask(gw)
        await gw.quiet()
    assert list(dict.fromkeys(alert.kind for alert in news)) == kinds
    assert all("asked for claude-haiku-4-5 and claude-haiku-5-5 answered" in alert.sentence for alert in news)
    assert len({alert.once for alert in news}) == len(kinds)


async def test_a_key_that_the_provider_does_not_take_is_told(tmp_path, news, monkeypatch):
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP}) as gw:
        monkeypatch.setattr(gw.addon, "key", lambda: "sk-ant-revoked")
        with pytest.raises(Exception, match="401"):
            await ask(gw)
        await gw.quiet()
    assert [(alert.kind, alert.scope) for alert in news] == [("key_refused", "total")]
    assert "sk-ant" not in repr(news)


async def test_a_bill_above_its_grant_is_told(tmp_path, news):
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP}) as gw:
        settle = gw.gateway.ledger.settle

        def dearer(call_id, settlement, *, now):
            written = settle(call_id, settlement, now=now)
            over = asyncio.get_running_loop().create_future()
            written.add_done_callback(lambda done: over.set_result(Resolution(True, 3 * DOLLAR, DOLLAR, overrun=True)))
            return over

        gw.gateway.ledger.settle = dearer
        await ask(gw)
        await gw.quiet()
    [alert] = news
    assert alert.kind == "overrun"
    assert alert.sentence.startswith("a call of the app 'app' cost $3.00, more than the $1.00 held for it: its quote was too low. claude-haiku-4-5")


async def test_a_policy_that_is_not_in_force_is_told(tmp_path, news):
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP}) as gw:
        watcher = PolicyWatcher(tmp_path / "policies", gw.gateway, gw.addon.key)
        (tmp_path / "policies" / "apps" / "app.yaml").write_text(APP + "capz: {}\n")
        await watcher.look()
        await watcher.look()  # by now the file rests
    [alert] = news
    assert (alert.kind, alert.facts["place"].rpartition("/")[2]) == ("policy", "app.yaml:7")


async def test_a_running_gateway_tells_by_itself(tmp_path, caplog):
    with hook() as (address, bodies), caplog.at_level(logging.WARNING):
        async with Simulator(behaviour=Behaviour(output_tokens=100)) as api, gateway(tmp_path, api, {"app": APP}) as gw:
            delivery = herald_of(gw.gateway.ledger, address)
            gw.gateway.emit = delivery.emit
            look, deliver = (partial(work, gw.gateway.policy) for work in (delivery.look, delivery.deliver))
            async with jobs.running((0.02, "alerts", look), (0.02, "webhooks", deliver)):
                await ask(gw)
                await until(lambda: bodies)
        assert bodies[0]["scope"] == "app:app"
    assert "Alert: the app 'app' spent" in caplog.text


async def test_a_session_that_spends_fast_is_told_once_an_hour(tmp_path):
    """By what was booked in the last hour, in its own app; a slow one, and one without a limit, are not told. A client chose the name, and a
    person pastes the commands."""
    app = "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\neach: {session: {ever: $100, per_hour: $5}}\n"
    other = app.replace(", per_hour: $5", "")
    policy = load(write_policies(tmp_path / "policies", "https://api.anthropic.com", {"reports": app, "drafts": other}))
    path = new_ledger(tmp_path)
    with connect.changing(path) as db:
        admin.issue_token(db, "drafts", "d2", who="test", now=NOON - 86_400)
        for minutes, session, call_app, dollars in (
            (90, "fast; reboot", "reports", 50), (50, "fast; reboot", "reports", 3), (5, "fast; reboot", "reports", 3), (5, "slow", "reports", 5), (5, "fast; reboot", "drafts", 9)
        ):
            call = replace(CALL, app=call_app, team=None, session_id=session, token_id=2 if call_app == "drafts" else 1)
            spend(db, NOON - minutes * 60, dollars * DOLLAR, call)
    ledger = await Ledger.open(url(path), now=NOON)
    clock = [NOON]
    try:
        delivery = AlertDelivery(ledger, lambda source: "", lambda: clock[0])
        for seconds in (0, 60, 60):
            clock[0] += seconds
            await delivery.look(policy)
        told = rows(path, "SELECT scope, sentence FROM alerts WHERE kind = 'speed'")
        assert [scope for scope, _ in told] == ["app:reports session:fast; reboot"]
        assert "session fast; reboot of app reports spent $6.00 in the last hour, more than $5.00" in told[0][1]
        assert "pause reports --session 'fast; reboot' --now" in told[0][1]
        clock[0] += 3600
        await delivery.look(policy)
        assert len(rows(path, "SELECT 1 FROM alerts WHERE kind = 'speed'")) == 1, "an hour later it was slow"
    finally:
        await ledger.close()
