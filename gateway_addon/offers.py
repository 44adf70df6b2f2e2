"""The ways in which a call may be reserved: whole, in steps, or the one where the other does not fit. Pure."""

import math
from collections.abc import Iterable
from typing import Any

from gateway_addon.bounds import Quote
from gateway_addon.door import Offer
from gateway_addon.grants import Pace
from gateway_addon.policy import CLAMPED, AppPolicy, Cap, GatewayPolicy, edits
from gateway_addon.pricing import Prices
from gateway_addon.reading import Reading

COMFORT = 50  # `reserve: auto` reserves a stream whole while its quote is at most this part of each of its caps


def offers(
    bound: Quote, app: AppPolicy, policy: GatewayPolicy, read: Reading, limits: Iterable[Cap], *, overrun: bool, now: float
) -> list[Offer]:
    """The ways to reserve a call, the largest first: whole, in steps, or whole while that is little and in steps when it is not.

    Only a stream can be cut, so only a stream can run on less than its whole quote; and only on a model that keeps its pace.
    """
    whole = Offer(bound.output_tokens, bound.total_nano)
    pace = _pace(app, policy.prices, read, read.model, overrun=overrun, now=now)
    if pace is None:
        return [whole]
    first_nano = bound.for_output(pace.first_tokens)
    steps = Offer(pace.first_tokens, first_nano, pace, bound.for_output(pace.first_tokens + pace.quantum_tokens) - first_nano)
    smallest_nano = min((cap.amount_nano for cap in limits if cap.window != "request"), default=math.inf)
    comfortable = app.reserve == "auto" and bound.total_nano * COMFORT <= smallest_nano
    return [whole, steps] if comfortable else [steps]


def rewritten(app: AppPolicy, prices: Prices, read: Reading, *, overrun: bool, now: float) -> dict[str, Any]:
    """Return the top-level fields that the policy rewrites in a call of its own.

    A stream that is held in steps keeps its `max_tokens`: no more than a step of it is ever at stake.
    """
    changes = edits(app, read, prices)
    if "max_tokens" in changes and _pace(app, prices, read, changes.get("model", read.model), overrun=overrun, now=now) is not None:
        return {name: value for name, value in changes.items() if name not in CLAMPED}
    return changes


def _pace(app: AppPolicy, prices: Prices, read: Reading, model: str, *, overrun: bool, now: float) -> Pace | None:
    """Return the pace at which a call may be held in steps, None where it is held whole."""
    row = prices.row(model, now)
    if not read.stream or app.reserve == "full" or overrun or row is None:
        return None
    pace = Pace(row.output_tokens_per_second_max, row.lag_s)
    return pace if pace.first_tokens < read.max_tokens else None
