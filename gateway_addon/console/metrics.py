"""Write the overview's figures for Prometheus, for machines that draw and alarm.

Promises bounded label sets: scopes and codes of the policy, models that have a price; never a call, a session or a token. Amounts are
dollars. All are gauges: what a window holds falls back to nothing when the next one begins. Knows nothing of HTTP.
"""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from gateway_addon.console.desk import Desk
from gateway_addon.console.sums import Sum
from gateway_addon.money import NANO_PER_DOLLAR
from gateway_addon.names import PROGRAM
from gateway_addon.operations.metrics import Gauges, Sample, bounded, gauge, standing_gauges
from gateway_addon.pricing import Prices


def exposition(seen: Desk, prices: Prices, *, policy_broken: bool) -> bytes:
    """Return the text that a scraper reads."""
    registry = CollectorRegistry()
    registry.register(Gauges(_metrics(seen, prices, policy_broken)))
    return generate_latest(registry)


def _metrics(seen: Desk, prices: Prices, policy_broken: bool) -> Iterator[Any]:
    owners = (seen.total, *seen.teams, *seen.apps)
    ages_s = [call.age_s for call in seen.live]
    standings = [each for owner in owners for each in owner.standings if each.window in ("day", "month")]
    yield from standing_gauges(standings, policy_broken)
    paused = [((each.scope,), float(bool(each.pause))) for each in owners]
    yield gauge("paused", f"1 while {PROGRAM} pause refuses the scope's calls.", paused, ("scope",))
    yield gauge("model_spent_dollars", "Spent this month, by the model asked for.", _by_model(seen, prices, _spent_dollars), ("model",))
    yield gauge("model_calls", "Admitted calls of this month, by the model asked for.", _by_model(seen, prices, _calls), ("model",))
    refused = [((code,), float(count)) for code, count in seen.sheet.refusals]
    yield gauge("refused_calls", "Calls refused this month, by reason.", refused, ("reason",))
    drifted = sum(each.calls for each in seen.sheet.drift)
    yield gauge("drifted_calls", "Calls of this month that another model answered.", [((), drifted)])
    saved = seen.saved_nano / NANO_PER_DOLLAR
    yield gauge("cache_saved_dollars", "Saved this month by prompt caching, at list prices.", [((), saved)])
    yield gauge("open_calls", "Calls in flight.", [((), len(seen.live))])
    yield gauge("oldest_open_call_seconds", "Age of the oldest call in flight.", [((), max(ages_s, default=0))])
    orphans = sum(not each.alive for each in seen.live)
    yield gauge("orphaned_calls", "Calls in flight whose process is gone: the next start settles them.", [((), orphans)])
    yield gauge("open_batches", "Message batches that are not settled yet.", [((), len(seen.batches))])


def _by_model(seen: Desk, prices: Prices, amount: Callable[[Sum], float]) -> list[Sample]:
    """Sum the models under the names that are series: those of the price table, and one for all others."""
    found: dict[str, float] = {}
    for each in seen.sheet.models:
        name = bounded(each.name, prices)
        found[name] = found.get(name, 0) + amount(each)
    return [((name,), value) for name, value in found.items()]


def _spent_dollars(each: Sum) -> float:
    return each.figures.spent_nano / NANO_PER_DOLLAR


def _calls(each: Sum) -> float:
    return each.figures.calls
