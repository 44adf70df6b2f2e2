"""Write the overview's figures for Prometheus, for machines that draw and alarm.

Promises bounded label sets: scopes and codes of the policy, models that have a price; never a call, a session or a token. Amounts are
dollars. All are gauges: what a window holds falls back to nothing when the next one begins. Knows nothing of HTTP.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from gateway_addon import __version__
from gateway_addon.console.desk import Account, Desk
from gateway_addon.money import NANO_PER_DOLLAR
from gateway_addon.names import PROGRAM
from gateway_addon.operations.metrics import Gauges, Sample, gauge

WINDOW = ("scope", "window")


def exposition(seen: Desk, *, policy_broken: bool) -> bytes:
    """Return the text that a scraper reads."""
    registry = CollectorRegistry()
    registry.register(Gauges(_metrics(seen, policy_broken)))
    return generate_latest(registry)


def _metrics(seen: Desk, policy_broken: bool) -> Iterator[Any]:
    owners = (seen.total, *seen.teams, *seen.apps)
    accounts = [account for owner in owners for account in (owner.today, owner.month)]
    ages_s = [call.age_s for call in seen.live]
    yield gauge("build_info", "The version that answers.", [((__version__,), 1)], ("version",))
    yield gauge("spent_dollars", "Spent in the window so far.", [_of(each, each.spent_nano) for each in accounts], WINDOW)
    yield gauge("held_dollars", "Held for calls in flight and open batches.", [_of(each, each.held_nano) for each in accounts], WINDOW)
    capped = [_of(each, each.cap_nano) for each in accounts if each.cap_nano is not None]
    yield gauge("cap_dollars", "The window's cap, raises included. Scopes without a cap have no sample.", capped, WINDOW)
    paused = [((each.scope,), float(bool(each.pause))) for each in owners]
    yield gauge("paused", f"1 while {PROGRAM} pause refuses the scope's calls.", paused, ("scope",))
    spent = [((each.name,), each.figures.spent_nano / NANO_PER_DOLLAR) for each in seen.sheet.models]
    yield gauge("model_spent_dollars", "Spent this month, by the model asked for.", spent, ("model",))
    calls = [((each.name,), float(each.figures.calls)) for each in seen.sheet.models]
    yield gauge("model_calls", "Admitted calls of this month, by the model asked for.", calls, ("model",))
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
    yield gauge("policy_broken", "1 while the policy files on disk cannot be used.", [((), float(policy_broken))])


def _of(account: Account, amount_nano: int) -> Sample:
    return (account.scope, account.window), amount_nano / NANO_PER_DOLLAR
