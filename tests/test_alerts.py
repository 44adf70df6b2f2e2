"""Alerts: once, in time, without secrets, and never in a call's way."""

import asyncio
import http.server
import json
import logging
import threading
import time
from contextlib import contextmanager

import pytest
from gateway import gateway

from gateway_addon.alerts import THRESHOLDS_PERCENT, Alerter, due, payload, sentence
from gateway_addon.ledger import Standing
from gateway_addon.policy import Source
from gateway_addon.simulator import Behaviour, Simulator

DOLLAR = 1_000_000_000


def standing(spent_nano, cap_nano=DOLLAR, scope="app:reports"):
    return Standing(scope, "day", 0, 86400, cap_nano, 0, spent_nano, 0, 0, 0)


@pytest.mark.parametrize(
    ("spent_nano", "cap_nano", "reached"),
    [(0, DOLLAR, []), (499_999_999, DOLLAR, []), (500_000_000, DOLLAR, [50]), (DOLLAR, DOLLAR, [50, 80, 95, 100]), (5, None, []), (5, 0, [])],
)
def test_a_threshold_is_due_from_the_nano_dollar_that_reaches_it(spent_nano, cap_nano, reached):
    assert due(standing(spent_nano, cap_nano), THRESHOLDS_PERCENT) == reached


def test_an_alert_names_who_how_much_and_of_what():
    assert sentence(standing(800_000_000), 80) == "app reports spent $0.8000 of $1.00 today (80 % of the cap reached)"
    assert sentence(standing(800_000_000, scope="total"), 80).startswith("all apps together spent")


def test_slack_gets_a_text_alone_and_everybody_else_the_facts():
    assert json.loads(payload("https://hooks.slack.com/services/x", "t", {"a": 1})) == {"text": "gateway: t"}
    assert json.loads(payload("https://example.org/hook", "t", {"a": 1})) == {"text": "gateway: t", "a": 1}


@contextmanager
def hook(statuses=()):
    """A webhook that answers with these statuses, then 200; yields (address, bodies)."""
    bodies, left = [], list(statuses)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(left.pop(0) if left else 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret-path", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def until(condition):
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen")


APP = """
models: {allow: [claude-haiku-4-5]}
caps: {day: $0.002}
max_tokens: 100
alerts: {at: [20%], webhook: {env: HOOK}}
served: exact
"""


async def test_an_app_that_spends_is_told_once_and_its_calls_do_not_wait(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("gateway_addon.alerts.RETRY_AFTER_S", (0.01, 0.01))
    with hook([500]) as (address, bodies):
        async with Simulator(behaviour=Behaviour(output_tokens=100)) as api, gateway(tmp_path, api, {"app": APP}) as gw:
            gw.gate._alerter = Alerter(gw.gate.ledger, {Source("env", "HOOK"): address}.__getitem__, time.time)
            with caplog.at_level(logging.WARNING):
                await gw.client().messages.create(model="claude-haiku-4-5", max_tokens=100, messages=[{"role": "user", "content": "hi"}])
                await until(lambda: len(bodies) == 2)
                await gw.quiet()
            assert bodies[1]["threshold_percent"] == 20
            assert bodies[1]["scope"] == "app:app"
            assert "secret-path" not in caplog.text
            again = Alerter(gw.gate.ledger, lambda source: address, time.time)  # another process
            again.look(await gw.gate.ledger.standing(["app:app"], [type("C", (), {"scope": "app:app", "window": "day", "amount_nano": 2 * 10**6})()], now=time.time()), gw.gate.policy, gw.gate.policy.apps["app"])
            await asyncio.sleep(0.1)
            assert len(bodies) == 2
            await again.stop()


async def test_another_model_than_the_one_asked_is_flagged_and_said_at_once(tmp_path, caplog):
    async with Simulator(behaviour=Behaviour(served_model="claude-haiku-5-5", output_tokens=20)) as api, gateway(tmp_path, api, {"app": APP}) as gw:
        with caplog.at_level(logging.WARNING):
            await gw.client().messages.create(model="claude-haiku-4-5", max_tokens=50, messages=[{"role": "user", "content": "hi"}])
            await gw.quiet()
    assert "asked for claude-haiku-4-5 and claude-haiku-5-5 answered" in caplog.text
