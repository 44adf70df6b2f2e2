"""The ways in which a call may be reserved: whole, in steps, or the one where the other does not fit. Pure."""

import math
from collections.abc import Iterable

from gateway_addon.bounds import Quote
from gateway_addon.door import Offer
from gateway_addon.grants import Pace
from gateway_addon.policy import AppPolicy, Cap, GatewayPolicy
from gateway_addon.reading import Reading

COMFORT = 50  # `reserve: auto` reserves a stream whole while its quote is at most this part of each of its caps


def offers(
    bound: Quote, app: AppPolicy, policy: GatewayPolicy, read: Reading, limits: Iterable[Cap], *, overrun: bool, now: float
) -> list[Offer]:
    """The ways to reserve a call, the largest first: whole, in steps, or whole while that is little and in steps when it is not.

    Only a stream can be cut, so only a stream can run on less than its whole quote; and only on a model that keeps its pace.
    """
    whole = Offer(read.max_tokens, bound.total_nano)
    row = policy.prices.row(read.model, now)
    if not read.stream or app.reserve == "full" or overrun or row is None:
        return [whole]
    pace = Pace(row.output_tokens_per_second_max, row.lag_s)
    if pace.first_tokens >= read.max_tokens:
        return [whole]
    first_nano = bound.for_output(pace.first_tokens)
    steps = Offer(pace.first_tokens, first_nano, pace, bound.for_output(pace.first_tokens + pace.quantum_tokens) - first_nano)
    smallest_nano = min((cap.amount_nano for cap in limits if cap.window != "request"), default=math.inf)
    comfortable = app.reserve == "auto" and bound.total_nano * COMFORT <= smallest_nano
    return [whole, steps] if comfortable else [steps]
