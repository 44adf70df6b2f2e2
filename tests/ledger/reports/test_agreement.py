"""Whoever is asked what a month cost gives one answer, to the nano: report, invoice, /gateway/me, console, balances and entries."""

import random
from contextlib import closing
from dataclasses import replace
from datetime import date
from zoneinfo import ZoneInfo

import month
import pytest
from ledgers import CALL, Cap, Part, Tokens, writing

from gateway_addon.calls.responses import me
from gateway_addon.console import desk, ranges
from gateway_addon.ledger import Denied, Outcome, Settlement, admin, app_scope, connect, reservations
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.ledger.reports import daily_totals, spending
from gateway_addon.ledger.reports.call_sums import Only
from gateway_addon.ledger.reports.day_reader import DayReader
from gateway_addon.ledger.reports.forecast import forecasts
from gateway_addon.ledger.reports.invoice import invoice
from gateway_addon.policy.loading import parse_app
from gateway_addon.pricing import load
from gateway_addon.windows import starts

BERLIN = ZoneInfo("Europe/Berlin")
NOW = 1_796_040_000.0  # Monday 2026-11-30 12:00 UTC
DOLLAR = 10**9
PRICES = load()
TEAMS = {app: "content" if number % 3 == 1 else None for number, app in enumerate(month.APPS)}
ENTRIES = """SELECT calls.app, sum(entries.spent_nano) FROM calls JOIN entries ON entries.call_id = calls.id
WHERE calls.started_at >= $1 AND calls.started_at < $2 GROUP BY calls.app"""


def of(app, **facts):
    return replace(CALL, app=app, team=TEAMS[app], token_id=month.APPS.index(app) + 1, **facts)


def a_bad_month(db, chance, count):
    """Calls under raises and limits, batches of several parts, estimates, voids, and corrections of old and new calls."""
    admin.raise_cap(db, "app:reviews", "month", 5 * DOLLAR, until=NOW + 86_400, who="ops", now=NOW)
    admin.limit_cap(db, "app:pipeline", "day", DOLLAR // 100, who="ops", now=NOW)
    refused = 0
    for number in range(count):
        app, at = chance.choice(month.APPS[:4]), NOW - chance.uniform(0, 12 * 3600)
        call = of(app, endpoint=chance.choice(["messages", "batches"]), model_asked=chance.choice(month.MODELS))
        caps = [Cap("app:reviews", "month", 10**6 * DOLLAR), Cap("app:pipeline", "day", DOLLAR), Cap("total", "month", 10**6 * DOLLAR)]
        held = reservations.reserve(db, "me", call, 10**7, caps, now=at)
        if isinstance(held, Denied):
            refused += 1
            continue
        parts = tuple(Part(chance.randrange(10**6), tokens=Tokens(chance.randrange(999)), model=chance.choice(month.MODELS)) for _ in range(chance.randint(1, 4)))
        if number % 7 == 0:
            reservations.void(db, held.call_id, Outcome(status=529), now=at)
        elif number % 5 == 0:
            reservations.settle(db, held.call_id, Settlement(None, (), Outcome(flags=("estimated",))), now=at)
        else:
            tier = "batch" if call.endpoint == "batches" else None
            outcome = Outcome(status=200, model_served=parts[0].model, service_tier=tier, complete=True)
            reservations.settle(db, held.call_id, Settlement(sum(part.nano for part in parts), parts, outcome), now=at)
    settled = db.execute("SELECT call_id FROM entries GROUP BY call_id HAVING sum(spent_nano) >= 999 ORDER BY call_id").fetchall()
    for (number,) in chance.sample(settled, count // 4):
        admin.adjust(db, number, chance.randrange(-999, 999), who="ops", why="the bill", now=NOW)
    return refused


@pytest.mark.parametrize("calls", [2_000, pytest.param(200_000, marks=pytest.mark.soak)])
def test_all_agree_to_the_nano_after_a_bad_month(tmp_path, calls):
    """In UTC first, with its days kept for reports; then the policy's zone changes, and with it where each day and month begins."""
    path, chance = tmp_path / "gateway.db", random.Random(calls)
    month.make(path, calls, until=NOW, days=40)
    daily_totals.keep(path, since=NOW - 20 * 86_400, until=NOW, now=NOW)
    with closing(writing(path)) as db:
        assert a_bad_month(db, chance, calls // 20) > 0, "the limit binds"
    asked = {app: agreed(path, app) for app in month.APPS}
    with connect.changing(path) as db:
        admin.align(db, "Europe/Berlin", TEAMS | {"search": "content"}, who="ops", now=NOW)
    daily_totals.keep(path, since=starts(NOW, BERLIN).month, until=NOW, now=NOW)
    moved = {app: agreed(path, app) for app in month.APPS}
    assert 0 < sum(moved.values()) != sum(asked.values()), "an hour of October became November's"
    with connect.reading(path) as db:
        assert findings(db) == []


def agreed(path, app):
    """What everybody says that an app has spent this month."""
    policy = parse_app(f"apps/{app}.yaml", "models: {allow: [claude-haiku-4-5]}\ncaps: {month: $100}\n", PRICES, {})
    with connect.reading(path) as db:
        zone = reservations.zone(db)
        since = starts(NOW, zone).month
        said = {"entries": dict(map(tuple, db.execute(ENTRIES, (since, NOW)).fetchall()))[app]}
        report = spending.report(db, "app", since=since, until=NOW)
        said["report"] = next(line.spent_nano for line in report.lines if line.key == app)
        by_day = spending.report(db, "day", since=since, until=NOW, only=Only(app=app))
        said["report by day"] = by_day.spent_nano
        said["invoice"] = sum(line.spent_nano for line in invoice(db, since=since, until=NOW) if line.key == app)
        standings = reservations.standing(db, [app_scope(app)], [Cap(app_scope(app), "month", 100 * DOLLAR)], now=NOW)
        windows = me(policy, standings, forecasts(db, standings, now=NOW)).body["windows"]
        said["/gateway/me"] = next(each["spent_nano"] for each in windows if each["window"] == "month")
        seen = ranges.of_days(date(2026, 11, 1), date(2026, 11, 30), NOW, zone)
        found = desk.days_of(db, DayReader(), seen, NOW).sheet().apps
        said["console"] = next(each.figures.spent_nano for each in found if each.name == app)
    assert len(set(said.values())) == 1, (app, said)
    return said["entries"]

