"""Write the overview's figures in Prometheus' text format, for machines that draw and alarm.

Promises bounded label sets: scopes and codes of the policy, models that have a price; never a call, a session or a token. Amounts
are dollars with every decimal of their nano-dollars. Knows nothing of HTTP.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gateway_addon import __version__
from gateway_addon.console.desk import Account, Desk
from gateway_addon.money import dollars
from gateway_addon.names import PROGRAM

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Sample(NamedTuple):
    labels: dict[str, str]
    value: str


class Metric(NamedTuple):
    """One gauge. All are gauges: what a window holds falls back to nothing when the next one begins."""

    name: str
    help: str
    samples: Iterable[Sample]


def exposition(seen: Desk, *, policy_broken: bool) -> str:
    """The text that a scraper reads."""
    lines = []
    for metric in _metrics(seen, policy_broken):
        lines += [f"# HELP gateway_{metric.name} {metric.help}", f"# TYPE gateway_{metric.name} gauge"]
        lines += [f"gateway_{metric.name}{_labels(sample.labels)} {sample.value}" for sample in metric.samples]
    return "\n".join([*lines, ""])


def _metrics(seen: Desk, policy_broken: bool) -> Iterator[Metric]:
    owners = (seen.total, *seen.teams, *seen.apps)
    accounts = [account for owner in owners for account in (owner.today, owner.month)]
    ages_s = [call.age_s for call in seen.live]
    yield Metric("build_info", "The version that answers.", [Sample({"version": __version__}, "1")])
    yield Metric("spent_dollars", "Spent in the window so far.", [_of(each, each.spent_nano) for each in accounts])
    yield Metric("held_dollars", "Held for calls in flight and open batches.", [_of(each, each.held_nano) for each in accounts])
    capped = [_of(each, each.cap_nano) for each in accounts if each.cap_nano is not None]
    yield Metric("cap_dollars", "The window's cap, raises included. Scopes without a cap have no sample.", capped)
    paused = [Sample({"scope": each.scope}, _flag(each.pause)) for each in owners]
    yield Metric("paused", f"1 while {PROGRAM} pause refuses the scope's calls.", paused)
    spent = [Sample({"model": each.name}, _dollars(each.figures.spent_nano)) for each in seen.sheet.models]
    yield Metric("model_spent_dollars", "Spent this month, by the model asked for.", spent)
    calls = [Sample({"model": each.name}, str(each.figures.calls)) for each in seen.sheet.models]
    yield Metric("model_calls", "Admitted calls of this month, by the model asked for.", calls)
    refused = [Sample({"reason": code}, str(count)) for code, count in seen.sheet.refusals]
    yield Metric("refused_calls", "Calls refused this month, by reason.", refused)
    yield Metric("drifted_calls", "Calls of this month that another model answered.", _one(sum(each.calls for each in seen.sheet.drift)))
    yield Metric("cache_saved_dollars", "Saved this month by prompt caching, at list prices.", _one(_dollars(seen.saved_nano)))
    yield Metric("open_calls", "Calls in flight.", _one(len(seen.live)))
    yield Metric("oldest_open_call_seconds", "Age of the oldest call in flight.", _one(max(ages_s, default=0)))
    orphans = sum(not each.alive for each in seen.live)
    yield Metric("orphaned_calls", "Calls in flight whose process is gone: the next start settles them.", _one(orphans))
    yield Metric("open_batches", "Message batches that are not settled yet.", _one(len(seen.batches)))
    yield Metric("policy_broken", "1 while the policy files on disk cannot be used.", _one(_flag(policy_broken)))


def _one(value: object) -> list[Sample]:
    return [Sample({}, str(value))]


def _of(account: Account, amount_nano: int) -> Sample:
    return Sample({"scope": account.scope, "window": account.window}, _dollars(amount_nano))


def _dollars(nano: int) -> str:
    return dollars(nano).replace("$", "").replace(",", "")


def _flag(truth: object) -> str:
    return "1" if truth else "0"


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
