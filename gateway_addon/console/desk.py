"""Gather the figures of the pages from one moment of the ledger and from the policy in force. Knows nothing of HTML."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from pathlib import Path
from typing import Any

from gateway_addon.console import charts, sums
from gateway_addon.console.ranges import Range
from gateway_addon.ledger import TOTAL, Pause, ServerAddress, Standing, admin, app_scope, connect, reservations, state, team_scope
from gateway_addon.ledger.batches import OpenBatch, open_batches
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.reports import call_detail, forecast, spending
from gateway_addon.ledger.reports.call_sums import EVERY, Billed, Day, Only
from gateway_addon.ledger.reports.day_reader import DayReader
from gateway_addon.ledger.reports.forecast import Forecast
from gateway_addon.ledger.scope import part_of
from gateway_addon.policy import GatewayPolicy, all_caps, part_caps
from gateway_addon.pricing import Prices
from gateway_addon.windows import Window

NEARLY = 0.8  # of a cap, spent and held: worth a glance
LATELY_S = 600
ALERTS_MAX = 1000
"""Alerts that a page looks at, the newest of its range."""


@dataclass(frozen=True, slots=True)
class Account:
    """One scope in one window. `scale_nano`: what a full bar means, the cap or, where there is none, the dearest account beside it."""

    scope: str
    window: Window
    spent_nano: int
    held_nano: int
    cap_nano: int | None
    raised_nano: int
    limit_nano: int | None
    resets_at: int | None
    scale_nano: int
    is_limited: bool = False

    @property
    def free_nano(self) -> int | None:
        return None if self.cap_nano is None else max(0, self.cap_nano - self.spent_nano - self.held_nano)

    @property
    def mood(self) -> str:
        """Return `full`, `nearly` or `fine`: the colour of its bar."""
        share = (self.spent_nano + self.held_nano) / self.cap_nano if self.cap_nano else 0.0
        if self.cap_nano == 0 or share >= 1:
            return "full"
        return "nearly" if share >= NEARLY else "fine"

    @property
    def bar(self) -> charts.Bar:
        return charts.bar(self.spent_nano, self.held_nano, self.scale_nano)


@dataclass(frozen=True, slots=True)
class Owner:
    """Everything together, a team or an app, in each window."""

    scope: str
    standings: tuple[Standing, ...]
    accounts: tuple[Account, ...]
    pause: Pause | None

    @property
    def name(self) -> str:
        return self.scope.partition(":")[2] or "all apps"

    def account(self, window: str) -> Account:
        return next(each for each in self.accounts if each.window == window)

    @property
    def today(self) -> Account:
        return self.account("day")

    @property
    def month(self) -> Account:
        return self.account("month")

    @property
    def full(self) -> tuple[Account, ...]:
        """Return the accounts whose cap is reached."""
        return tuple(each for each in self.accounts if each.cap_nano is not None and each.mood == "full")


@dataclass(frozen=True, slots=True)
class AlertGroup:
    """The alerts of one kind about one scope: the newest, and how many there are."""

    newest: dict[str, Any]
    count: int


@dataclass(frozen=True, slots=True)
class Desk:
    """The overview."""

    now: float
    range: Range
    total: Owner
    teams: tuple[Owner, ...]
    apps: tuple[Owner, ...]
    coming: Forecast
    """The total of this month, at its end."""
    sheet: sums.Sheet
    saved_nano: int
    paused_parts: tuple[Pause, ...]
    """Pauses of single sessions, agents, users and labels."""
    refused_now: tuple[call_detail.RefusedLately, ...]
    live: tuple[invariants.OpenCall, ...]
    batches: tuple[OpenBatch, ...]
    """As `gateway batches` lists them; they are not among the live calls."""
    alerts: tuple[AlertGroup, ...]
    """The newest groups of the range."""
    alerts_more: int

    @property
    def stopped(self) -> tuple[Owner, ...]:
        """Return who may not spend at all now: paused, or at a cap."""
        return tuple(each for each in (self.total, *self.teams, *self.apps) if each.pause or each.full)


@dataclass(frozen=True, slots=True)
class Days:
    """The days of a range, and of the range before."""

    zone: tzinfo
    days: tuple[Day, ...]
    before: tuple[Day, ...]

    def sheet(self, only: Only = EVERY, stacked: str = "asked") -> sums.Sheet:
        return sums.sheet(self.days, self.before, self.zone, only, stacked)


def days_of(db: connect.ReadConnection, memory: DayReader, asked: Range, now: float) -> Days:
    found = memory.between(db, min(asked.before_since, asked.since), asked.until, now)
    before = tuple(day for day in found if asked.before_since <= day.start < asked.before_until)
    return Days(reservations.zone(db), tuple(day for day in found if day.start >= asked.since), before)


def look(
    db: connect.ReadConnection, policy: GatewayPolicy, memory: DayReader, ledger: Path | ServerAddress, asked: Range, now: float
) -> Desk:
    """Return the whole desk at `now`. `ledger`: where it lies, to tell which processes are alive."""
    days = days_of(db, memory, asked, now)
    owned = owners(db, policy, now)
    batches = open_batches(db)
    held_by_batches = {batch.call_id for batch in batches}
    dearest = sorted(owned, key=lambda each: (-each.month.spent_nano, each.name))
    alerts = grouped(spending.alerts(db, since=asked.since, until=min(asked.until, now + 1), most=ALERTS_MAX))
    return Desk(
        now,
        asked,
        owned[0],
        tuple(each for each in dearest if each.scope.startswith("team:")),
        tuple(each for each in dearest if each.scope.startswith("app:")),
        forecast.forecasts(db, [each for each in owned[0].standings if each.window == "month"], now=now)[0],
        days.sheet(),
        cache_savings([billed for day in days.days for billed in day.billed], policy.prices, now),
        tuple(each for each in state.pauses(db, now) if part_of(each.scope)),
        tuple(call_detail.refused_lately(db, since=now - LATELY_S)),
        tuple(call for call in invariants.open_calls(db, connect.death_check(ledger, db), now=now) if call.call_id not in held_by_batches),
        tuple(batches),
        alerts[:10],
        max(0, len(alerts) - 10),
    )


def grouped(alerts: Sequence[dict[str, Any]]) -> tuple[AlertGroup, ...]:
    """Group alerts by kind and scope, the newest first."""
    found: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for each in alerts:
        found[each["kind"], each["scope"]].append(each)
    groups = [AlertGroup(each[-1], len(each)) for each in found.values()]
    return tuple(sorted(groups, key=lambda each: (-each.newest["at"], -each.newest["id"])))


def cache_savings(billed: Iterable[Billed], prices: Prices, now: float) -> int:
    """Return the money that the prompt cache saved, less the extra cost of its writes.

    At list prices, without the modifiers of single calls.
    """
    saved = 0
    for each in billed:
        row = prices.row(each.model, now)
        if row is not None:
            rate = row.rates
            gain = (rate.input - rate.cache_read) * each.cache_read_tokens
            extra = (rate.cache_write_5m - rate.input) * each.cache_write_5m_tokens
            extra += (rate.cache_write_1h - rate.input) * each.cache_write_1h_tokens
            saved += math.floor((gain - extra) * row.multiplier)
    return saved


def owners(db: connect.ReadConnection, policy: GatewayPolicy, now: float) -> tuple[Owner, ...]:
    """Return the total, then every team of the policy, then every app of the policy and every one that the ledger still knows."""
    names = sorted({*policy.apps, *admin.booked_apps(db)})
    scopes = [TOTAL, *(team_scope(team) for team in sorted(policy.teams)), *(app_scope(app) for app in names)]
    standings = reservations.standing(db, scopes, sorted(all_caps(policy)), now=now)
    pauses = {pause.scope: pause for pause in state.pauses(db, now)}
    largest: dict[str, int] = defaultdict(int)
    for each in standings:
        if each.scope.startswith("app:"):
            largest[each.window] = max(largest[each.window], each.spent_nano + each.reserved_nano)
    by_scope: dict[str, list[Standing]] = defaultdict(list)
    for each in standings:
        by_scope[each.scope].append(each)
    return tuple(
        Owner(scope, tuple(found), tuple(_account(each, largest[each.window]) for each in found), pauses.get(scope))
        for scope, found in by_scope.items()
    )


def session_accounts(db: connect.ReadConnection, policy: GatewayPolicy, app: str, session: str, now: float) -> list[Account]:
    """Return how a session stands at the caps that its app's policy sets each; those of them that have counted calls of its own."""
    known = policy.apps.get(app)
    capped = () if known is None else part_caps(known, [("session", session)], last_call=True)
    accounts = [_account(each, 0) for each in reservations.capped(db, tuple(capped), now=now)]
    return [each for each in accounts if each.spent_nano or each.held_nano]


def _account(standing: Standing, largest_nano: int) -> Account:
    scale = standing.cap_nano if standing.cap_nano is not None else max(largest_nano, standing.spent_nano + standing.reserved_nano)
    return Account(
        standing.scope, standing.window, standing.spent_nano, standing.reserved_nano, standing.cap_nano, standing.raised_nano,
        standing.limit_nano, standing.resets_at, scale, standing.is_limited,
    )  # fmt: skip
