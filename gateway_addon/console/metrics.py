"""Write the overview's figures for Prometheus, for machines that draw and alarm.

Promises bounded label sets: scopes and codes of the policy, models that have a price; never a call, a session or a token. Amounts are
dollars. All are gauges: what a window holds falls back to nothing when the next one begins. Knows nothing of HTTP.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from gateway_addon import __version__
from gateway_addon.console.desk import Account, Desk
from gateway_addon.money import NANO_PER_DOLLAR
from gateway_addon.names import PROGRAM

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

WINDOW = ("scope", "window")

type Sample = tuple[tuple[str, ...], float]
"""The values of a gauge's labels, and its own."""


class _Seen:
    """Collect what the desk has seen at one moment."""

    def __init__(self, seen: Desk, policy_broken: bool):
        self._seen, self._policy_broken = seen, policy_broken

    def collect(self) -> Iterator[GaugeMetricFamily]:
        return _metrics(self._seen, self._policy_broken)


def exposition(seen: Desk, *, policy_broken: bool) -> bytes:
    """Return the text that a scraper reads."""
    registry = CollectorRegistry()
    registry.register(_Seen(seen, policy_broken))
    return generate_latest(registry)


def _metrics(seen: Desk, policy_broken: bool) -> Iterator[GaugeMetricFamily]:
    owners = (seen.total, *seen.teams, *seen.apps)
    accounts = [account for owner in owners for account in (owner.today, owner.month)]
    ages_s = [call.age_s for call in seen.live]
    yield _gauge("build_info", "The version that answers.", ("version",), [((__version__,), 1)])
    yield _gauge("spent_dollars", "Spent in the window so far.", WINDOW, [_of(each, each.spent_nano) for each in accounts])
    yield _gauge("held_dollars", "Held for calls in flight and open batches.", WINDOW, [_of(each, each.held_nano) for each in accounts])
    capped = [_of(each, each.cap_nano) for each in accounts if each.cap_nano is not None]
    yield _gauge("cap_dollars", "The window's cap, raises included. Scopes without a cap have no sample.", WINDOW, capped)
    paused = [((each.scope,), float(bool(each.pause))) for each in owners]
    yield _gauge("paused", f"1 while {PROGRAM} pause refuses the scope's calls.", ("scope",), paused)
    spent = [((each.name,), each.figures.spent_nano / NANO_PER_DOLLAR) for each in seen.sheet.models]
    yield _gauge("model_spent_dollars", "Spent this month, by the model asked for.", ("model",), spent)
    calls = [((each.name,), float(each.figures.calls)) for each in seen.sheet.models]
    yield _gauge("model_calls", "Admitted calls of this month, by the model asked for.", ("model",), calls)
    refused = [((code,), float(count)) for code, count in seen.sheet.refusals]
    yield _gauge("refused_calls", "Calls refused this month, by reason.", ("reason",), refused)
    drifted = sum(each.calls for each in seen.sheet.drift)
    yield GaugeMetricFamily("gateway_drifted_calls", "Calls of this month that another model answered.", value=drifted)
    saved = seen.saved_nano / NANO_PER_DOLLAR
    yield GaugeMetricFamily("gateway_cache_saved_dollars", "Saved this month by prompt caching, at list prices.", value=saved)
    yield GaugeMetricFamily("gateway_open_calls", "Calls in flight.", value=len(seen.live))
    yield GaugeMetricFamily("gateway_oldest_open_call_seconds", "Age of the oldest call in flight.", value=max(ages_s, default=0))
    orphans = sum(not each.alive for each in seen.live)
    yield GaugeMetricFamily("gateway_orphaned_calls", "Calls in flight whose process is gone: the next start settles them.", value=orphans)
    yield GaugeMetricFamily("gateway_open_batches", "Message batches that are not settled yet.", value=len(seen.batches))
    yield GaugeMetricFamily("gateway_policy_broken", "1 while the policy files on disk cannot be used.", value=float(policy_broken))


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: Iterable[Sample]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"gateway_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _of(account: Account, amount_nano: int) -> Sample:
    return (account.scope, account.window), amount_nano / NANO_PER_DOLLAR
