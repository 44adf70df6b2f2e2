"""One scrape for all workers of a gateway: the figures are the ledger's, dead workers' included, and only the scraper reads them."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import anthropic
import httpx2
import pytest
from gateway import gateway
from ledgers import rows, until
from processes import buried, ledgered
from prometheus_client.parser import text_string_to_metric_families

from gateway_addon.money import NANO_PER_DOLLAR
from gateway_addon.operations import deploy, metrics
from gateway_addon.pricing import load as load_prices
from gateway_addon.simulator import Simulator

PROMTOOL = shutil.which("promtool")
APP = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $5}\n"
HELLO = {"model": "claude-haiku-4-5", "max_tokens": 40, "messages": [{"role": "user", "content": "Say hello."}]}


def samples(text):
    """Each series by its name and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, *(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


async def test_one_scrape_answers_for_three_workers_one_killed(tmp_path):
    token = tmp_path / "metrics.token"
    token.write_text("a-scrapers-own-token\n")
    async with Simulator() as api:
        place = ledgered(tmp_path, api.url, {"app": APP}, f"timeouts: {{drain: 5s}}\nmetrics_token: {{file: {token}}}\n")
        process, url = await place.serve("--workers", "3")
        try:
            await until(lambda: len(children(process)) == 3)
            async with httpx2.AsyncClient(base_url=url) as http:

                async def scrape(bearer="a-scrapers-own-token"):
                    return await http.get("/gateway/metrics", headers={"authorization": f"Bearer {bearer}", "connection": "close"})

                async def call(model="claude-haiku-4-5"):
                    async with anthropic.AsyncAnthropic(base_url=url, api_key=place.tokens["app"], max_retries=2) as client:
                        await client.messages.create(**HELLO | {"model": model})

                await asyncio.gather(*(call() for _ in range(12)))
                with pytest.raises(anthropic.PermissionDeniedError):
                    await call("claude-opus-5-5")
                with pytest.raises(anthropic.PermissionDeniedError):
                    await call("claude-of-my-own")
                for pid in children(process)[:1]:
                    os.kill(pid, signal.SIGKILL)
                await until(lambda: len(children(process)) == 3)
                await asyncio.gather(*(call() for _ in range(4)))
                settled = "SELECT count(*), sum(spent_nano) FROM calls JOIN entries ON call_id = calls.id WHERE state = 'settled' AND kind = 'settle'"
                await until(lambda: rows(place.ledger, settled)[0][0] == 16)
                found = samples((await scrape()).text)
                wrong = [(await scrape(bearer)).status_code for bearer in ("another", "a-scrapers-own-tokens", place.tokens["app"])]
        finally:
            process.send_signal(signal.SIGTERM)
            await buried(process)
    spent_nano = rows(place.ledger, settled)[0][1]
    assert found["gateway_calls_total", "app", "claude-haiku-4-5", "settled"] == 16
    assert found["gateway_spend_dollars_total", "app", "claude-haiku-4-5"] == pytest.approx(spent_nano / NANO_PER_DOLLAR)
    assert found["gateway_spent_dollars", "app:app", "day"] == pytest.approx(spent_nano / NANO_PER_DOLLAR)
    assert found["gateway_cap_dollars", "app:app", "day"] == 5
    assert (found["gateway_refusals_total", "app", "model"], found["gateway_calls_total", "app", "other", "refused"]) == (2, 1)
    assert found["gateway_calls_in_flight",] == 0
    assert found["gateway_reservation_seconds_count",] == 16
    assert found["gateway_call_seconds_count", "claude-haiku-4-5"] == 16
    assert found["gateway_tokens_total", "app", "output", "claude-haiku-4-5"] > 0
    assert wrong == [401, 401, 401]
    used = {name for text in ("alerts.yaml", "dashboard.json") for name in re.findall(r"gateway_[a-z_]+", deploy.text(text))}
    assert used - {name for name, *_ in found} == {"gateway_top_ups_total"}, "no stream ran long enough for that one"


RULE_TESTS = """
rule_files: [alerts.yaml]
tests:
  - interval: 1m
    input_series:
      - {series: 'gateway_spent_dollars{scope="app:app", window="day"}', values: '4.5x10'}
      - {series: 'gateway_cap_dollars{scope="app:app", window="day"}', values: '5x10'}
      - {series: 'gateway_spent_dollars{scope="app:free", window="day"}', values: '4.5x10'}
      - {series: 'gateway_refusals_total{app="app", code="cap_spent"}', values: '0+1x10'}
      - {series: 'gateway_calls_total{app="app", model="m", state="settled"}', values: '0+100x10'}
    alert_rule_test:
      - eval_time: 5m
        alertname: GatewayCapNearlySpent
        exp_alerts: [{exp_labels: {scope: app:app, window: day}, exp_annotations: {summary: "app:app has spent 90% of its cap (day)."}}]
      - eval_time: 5m
        alertname: GatewayCapReached
        exp_alerts: [{exp_labels: {app: app}, exp_annotations: {summary: "Calls of app are refused because its cap, its team's or the total is spent."}}]
      - {eval_time: 10m, alertname: GatewayRefusesMany, exp_alerts: []}
"""


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian's package prometheus)")
def test_prometheus_takes_the_alert_rules_and_they_fire(tmp_path):
    (tmp_path / "alerts.yaml").write_text(deploy.text("alerts.yaml"))
    (tmp_path / "tests.yaml").write_text(RULE_TESTS)
    for words in (("check", "rules", "alerts.yaml"), ("test", "rules", "tests.yaml")):
        done = subprocess.run([PROMTOOL, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_json_with_a_question_in_each_panel():
    panels = json.loads(deploy.text("dashboard.json"))["panels"]
    assert all(target["expr"] for panel in panels for target in panel["targets"])


@pytest.mark.parametrize(
    ("model", "label"),
    [("claude-haiku-4-5", "claude-haiku-4-5"), ("claude-haiku-4-5-20991231", "claude-haiku-4-5"), ("claude-mine", "other"), (None, "other")],
)
def test_names_that_clients_invent_make_no_series(model, label):
    assert metrics.bounded(model, load_prices()) == label


async def test_without_a_token_in_the_policy_there_is_no_page(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api) as gw, httpx2.AsyncClient(base_url=gw.url) as http:
        answer = await http.get("/gateway/metrics", headers={"authorization": f"Bearer {gw.tokens['app']}"})
    assert answer.status_code == 404
    assert "metrics_token" in answer.json()["error"]["message"]
