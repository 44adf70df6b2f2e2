"""Count a gateway's calls for Prometheus: over all its worker processes, at one address, `GET /gateway/metrics`.

Promises that one scrape answers for all workers, dead ones too (their counters stay, their calls in flight do not); that the series are
bounded (apps of the policy, models with a price, codes of the refusals' table); that no call, session, user or token is a label. Amounts
are dollars. An edge: each process writes files of its own in a folder beside the ledger (prometheus-client's multiprocess mode).
Loaded only where gateway.yaml names a `metrics_token`.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gateway_addon import __version__
from gateway_addon.calls.record import CallRecord, Exposition, Measures, OnCall
from gateway_addon.ledger import Standing
from gateway_addon.money import NANO_PER_DOLLAR
from gateway_addon.pricing import Prices

CALL_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
WAIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
KINDS = ("input", "output", "cache_read", "cache_write")
OTHER_MODEL = "other"

type Sample = tuple[tuple[str, ...], float]
"""The values of a gauge's labels, and its own."""

AMOUNTS: tuple[tuple[str, str, Callable[[Standing], int | None]], ...] = (
    ("spent", "Spent in the window so far.", lambda standing: standing.spent_nano),
    ("held", "Held for calls in flight and open batches.", lambda standing: standing.reserved_nano),
    ("cap", "The cap in force, raises and limits included.", lambda standing: standing.cap_nano),
)


def start(folder: Path, prices: Callable[[], Prices], *, fresh: bool) -> tuple[OnCall, Measures, Exposition]:
    """Begin to count in this process; return what takes calls and measurements, and what writes the page.

    `fresh`: it is the first process of its gateway, and what an earlier gateway left is swept.
    """
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # the library reads it when it is loaded, and then keeps values in files
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    own = CollectorRegistry()
    calls = Counter("gateway_calls", "Ended calls.", ["app", "model", "state"], registry=own)
    spend = Counter("gateway_spend_dollars", "What calls cost.", ["app", "model"], registry=own)
    tokens = Counter("gateway_tokens", "Billed tokens.", ["app", "model", "kind"], registry=own)
    refusals = Counter("gateway_refusals", "Calls refused, by code.", ["app", "code"], registry=own)
    top_ups = Counter("gateway_top_ups", "Steps that running streams asked for.", ["granted"], registry=own)
    first = Histogram("gateway_first_byte_seconds", "From admission to the first byte.", ["model"], registry=own, buckets=CALL_S)
    whole = Histogram("gateway_call_seconds", "From admission to the end.", ["model"], registry=own, buckets=CALL_S)
    waits = Histogram("gateway_reservation_seconds", "From quote to durable reservation.", registry=own, buckets=WAIT_S)
    in_flight = Gauge("gateway_calls_in_flight", "Calls in flight.", registry=own, multiprocess_mode="livesum")

    def on_call(call: CallRecord) -> None:
        app, model = call["app"], bounded(call["model"], prices())
        calls.labels(app, model, call["state"]).inc()
        if call["refusal"] is not None:
            refusals.labels(app, call["refusal"]).inc()
        if call["state"] != "settled":
            return
        spend.labels(app, model).inc(call["spent_nano"] / NANO_PER_DOLLAR)
        for kind in KINDS:
            tokens.labels(app, model, kind).inc(call[f"{kind}_tokens"])
        whole.labels(model).observe(call["duration_s"])
        if call["first_byte_s"] is not None:
            first.labels(model).observe(call["first_byte_s"])

    def on_top_up(granted: bool) -> None:
        top_ups.labels("yes" if granted else "no").inc()

    return on_call, Measures(waits.observe, on_top_up, in_flight.inc), partial(_exposition, folder)


def _exposition(folder: Path, standings: Sequence[Standing], policy_broken: bool) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    for path in folder.glob("gauge_live*_*.db"):
        if not _is_alive(int(path.stem.rpartition("_")[2])):
            path.unlink(missing_ok=True)
    shown = CollectorRegistry()
    MultiProcessCollector(shown, str(folder))  # type: ignore[no-untyped-call]
    shown.register(Gauges(standing_gauges(standings, policy_broken)))
    return generate_latest(shown)


def standing_gauges(standings: Sequence[Standing], policy_broken: bool) -> Iterator[Any]:
    """Yield what is the same in each process, and in the console: the version, the policy's state, the ledger's standings."""
    yield gauge("build_info", "The version that answers.", [((__version__,), 1)], ("version",))
    yield gauge("policy_broken", "1 while the policy's files cannot be used.", [((), policy_broken)])
    for name, text, amount_nano in AMOUNTS:
        amounts = ((each.scope, each.window, amount_nano(each)) for each in standings)
        samples = [((scope, window), nano / NANO_PER_DOLLAR) for scope, window, nano in amounts if nano is not None]
        yield gauge(f"{name}_dollars", text, samples, ("scope", "window"))


def gauge(name: str, text: str, samples: Iterable[Sample], labels: Sequence[str] = ()) -> Any:
    """Return a gauge as the library writes it; `samples` have the values of its labels in their order."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"gateway_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


class Gauges:
    """Gauges of one moment, for a registry."""

    def __init__(self, gauges: Iterable[Any]):
        self._gauges = [*gauges]

    def collect(self) -> Iterable[Any]:
        return self._gauges


def bounded(model: str | None, prices: Prices) -> str:
    """Return a model's name in the price table: each that clients invent, a date behind a known one too, would be a series of its own."""
    return (None if model is None else prices.canonical(model)) or OTHER_MODEL


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
