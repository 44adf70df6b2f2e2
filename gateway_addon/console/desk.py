"""Gather the figures of the overview from one moment of the ledger and from the policy in force. Knows nothing of HTML."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gateway_addon.console import charts
from gateway_addon.ledger import Pause, ServerAddress, Standing, app_scope, connect, reservations, state, team_scope
from gateway_addon.ledger.batches import OpenBatch, open_batches
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.reports import day_cache, spending
from gateway_addon.ledger.reports.day_cache import Cached, CachedDay, DayCache, ReadConnection
from gateway_addon.policy import GatewayPolicy, caps
from gateway_addon.pricing import Prices
from gateway_addon.windows import Window, starts

CHART_DAYS = 30
DAY_S = 86_400
NEARLY = 0.8  # of a cap, spent and held: worth a glance


@dataclass(frozen=True, slots=True)
class Account:
    """One scope in one window. `scale_nano`: what a full bar means, the cap or, where there is none, the dearest account beside it."""

    scope: str
    window: Window
    spent_nano: int
    held_nano: int
    cap_nano: int | None
    raised_nano: int
    resets_at: int | None
    scale_nano: int
    is_limited: bool = False

    @property
    def free_nano(self) -> int | None:
        return None if self.cap_nano is None else max(0, self.cap_nano - self.spent_nano - self.held_nano)

    @property
    def mood(self) -> str:
        """`full`, `nearly` or `fine`: the colour of its bar."""
        share = (self.spent_nano + self.held_nano) / self.cap_nano if self.cap_nano else 0.0
        if self.cap_nano == 0 or share >= 1:
            return "full"
        return "nearly" if share >= NEARLY else "fine"

    @property
    def bar(self) -> charts.Bar:
        return charts.bar(self.spent_nano, self.held_nano, self.scale_nano)


@dataclass(frozen=True, slots=True)
class Owner:
    """Everything together, a team or an app: today and this month."""

    name: str
    today: Account
    month: Account
    pause: Pause | None


@dataclass(frozen=True, slots=True)
class ModelLine:
    name: str
    calls: int
    spent_nano: int
    share: float


@dataclass(frozen=True, slots=True)
class DriftedModel:
    app: str
    asked: str
    served: str
    calls: int
    last_day: int


@dataclass(frozen=True, slots=True)
class Desk:
    now: float
    total: Owner
    teams: tuple[Owner, ...]
    apps: tuple[Owner, ...]
    models: tuple[ModelLine, ...]
    chart: charts.Stack
    saved_nano: int
    cache_hit_share: float | None
    refusals: tuple[tuple[str, int], ...]
    drift: tuple[DriftedModel, ...]
    live: tuple[invariants.OpenCall, ...]
    batches: tuple[OpenBatch, ...]
    """As `gateway batches` lists them; they are not among the live calls."""
    alerts: tuple[dict[str, Any], ...]


def look(db: ReadConnection, policy: GatewayPolicy, memory: DayCache, ledger: Path | ServerAddress, now: float) -> Desk:
    """The whole desk at `now`. `ledger`: where it lies, to tell which processes are alive."""
    calendar = reservations.zone(db)
    month_start = starts(now, calendar).month
    found = memory.between(db, min(month_start, now - (CHART_DAYS - 1) * DAY_S), now)
    month = [day for day in found if day.start >= month_start]
    accounts = _accounts(db, policy, now)
    pauses = {pause.scope: pause for pause in state.pauses(db, now)}

    def owner(scope: str) -> Owner:
        return Owner(scope.partition(":")[2] or "all apps", accounts[scope, "day"], accounts[scope, "month"], pauses.get(scope))

    batches = open_batches(db)
    held_by_batches = {batch.call_id for batch in batches}
    owners = [owner(scope) for scope, window in accounts if window == "day"]
    dearest = sorted(owners, key=lambda each: (-each.month.spent_nano, each.name))
    saved_nano, hit_share = cache_savings([cached for day in month for cached in day.cached], policy.prices, now)
    return Desk(
        now,
        owner("total"),
        tuple(each for each in dearest if each.today.scope.startswith("team:")),
        tuple(each for each in dearest if each.today.scope.startswith("app:")),
        _models(month),
        charts.stack([(datetime.fromtimestamp(day.start, calendar).strftime("%-d %b"), _by_model(day)) for day in found[-CHART_DAYS:]]),
        saved_nano,
        hit_share,
        tuple(day_cache.refusals(month)),
        _drift(month),
        tuple(call for call in invariants.open_calls(db, connect.death_check(ledger, db), now=now) if call.call_id not in held_by_batches),
        tuple(batches),
        tuple(reversed(spending.alerts(db, since=month_start, until=now + 1)[-20:])),
    )


def cache_savings(cached: Iterable[Cached], prices: Prices, now: float) -> tuple[int, float | None]:
    """Return the money that the prompt cache saved (less the extra cost of its writes), and the share of prompt tokens read from it.

    At list prices, without the modifiers of single calls.
    """
    saved, read, prompt = 0, 0, 0
    for each in cached:
        writes = each.cache_write_5m_tokens + each.cache_write_1h_tokens
        read += each.cache_read_tokens
        prompt += each.input_tokens + each.cache_read_tokens + writes
        row = prices.row(each.model, now)
        if row is not None:
            rate = row.rates
            gain = (rate.input - rate.cache_read) * each.cache_read_tokens
            extra = (rate.cache_write_5m - rate.input) * each.cache_write_5m_tokens
            extra += (rate.cache_write_1h - rate.input) * each.cache_write_1h_tokens
            saved += math.floor((gain - extra) * row.multiplier)
    return saved, read / prompt if prompt else None


def _accounts(db: ReadConnection, policy: GatewayPolicy, now: float) -> dict[tuple[str, str], Account]:
    """Every scope of the policy, and every app that the ledger still knows, today and this month."""
    names = sorted({*policy.apps, *day_cache.apps(db)})
    scopes = ["total", *(team_scope(team) for team in sorted(policy.teams)), *(app_scope(app) for app in names)]
    limits = {cap for app in policy.apps.values() for cap in caps(policy, app)}
    standings = [each for each in reservations.standing(db, scopes, sorted(limits), now=now) if each.window in ("day", "month")]
    largest: dict[str, int] = defaultdict(int)
    for each in standings:
        if each.scope.startswith("app:"):
            largest[each.window] = max(largest[each.window], each.spent_nano + each.reserved_nano)
    return {(each.scope, each.window): _account(each, largest[each.window]) for each in standings}


def _account(standing: Standing, largest_nano: int) -> Account:
    scale = standing.cap_nano if standing.cap_nano is not None else max(largest_nano, standing.spent_nano + standing.reserved_nano)
    return Account(
        standing.scope, standing.window, standing.spent_nano, standing.reserved_nano, standing.cap_nano, standing.raised_nano,
        standing.resets_at, scale, standing.is_limited,
    )  # fmt: skip


def _by_model(day: CachedDay) -> Mapping[str, int]:
    amounts: dict[str, int] = defaultdict(int)
    for each in day.spending:
        amounts[each.asked] += each.spent_nano
    return amounts


def _models(month: list[CachedDay]) -> tuple[ModelLine, ...]:
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, int] = defaultdict(int)
    for each in (each for day in month for each in day.spending):
        calls[each.asked] += each.calls
        spent[each.asked] += each.spent_nano
    total = sum(spent.values())
    names = sorted(spent, key=lambda name: (-spent[name], name))
    return tuple(ModelLine(name, calls[name], spent[name], spent[name] / total if total else 0.0) for name in names)


def _drift(month: list[CachedDay]) -> tuple[DriftedModel, ...]:
    """Where another model answered than was asked for, the latest first."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for day in month:
        for each in day.spending:
            if each.drifted and each.served is not None:
                key = (each.app, each.asked, each.served)
                found[key] = (found.get(key, (0, 0))[0] + each.calls, day.start)
    return tuple(DriftedModel(*key, *facts) for key, facts in sorted(found.items(), key=lambda item: (-item[1][1], item[0])))
