"""List the ways in which a call may be reserved: whole, in steps, or in steps where the whole does not fit. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway_addon.calls.progress import Pace
from gateway_addon.calls.quote import Quote, comes_whole
from gateway_addon.ledger import CapShape, NewCall, RateLimits, app_scope, enclosing
from gateway_addon.messages.request import ParsedRequest
from gateway_addon.policy import CLAMPED, AppPolicy, Cap, GatewayPolicy, edits, token_cap
from gateway_addon.pricing import Prices
from gateway_addon.refusals import Refusal


@dataclass(frozen=True, slots=True)
class ReservationOption:
    """One way to reserve a call: whole, or in steps of which this is the first. `pace` None: nothing but its end bounds the call."""

    granted_tokens: int
    hold_nano: int
    pace: Pace | None = None
    quantum_nano: int = 0
    granted_turns: int | None = None
    """None: all that the provider may run."""


@dataclass(frozen=True, slots=True)
class ReservationPlan:
    """The options, limits and rates by which one call is to be reserved."""

    options: Sequence[ReservationOption]
    """The largest first; the first that fits is taken."""
    limits: Sequence[CapShape]
    rates: RateLimits
    observed_caps: Sequence[CapShape] = ()
    """The app's own caps in observe mode."""
    observes_rates: bool = False
    notes: Sequence[Refusal] = ()
    """Refusals of rules in observe mode that need no ledger."""


COMFORT = 50  # `reserve: auto` reserves a stream whole while its quote is at most this part of each of its caps


def reservation_options(
    quote: Quote, app: AppPolicy, policy: GatewayPolicy, parsed: ParsedRequest, limits: Iterable[Cap], *, overrun: bool, now: float
) -> list[ReservationOption]:
    """Return the ways to reserve a call, the largest first: whole, in steps, or both where the whole is little.

    Only a stream can be cut, so only a stream can run on less than its whole quote; and only on a model that keeps its pace.
    Turns of the provider's own that a stream does not show are held whole; where each shows, those that can have run so far are held.
    """
    pace = _pace(app, policy.prices, parsed, parsed.model, overrun=overrun, now=now)
    whole = ReservationOption(quote.output_tokens, quote.total_nano, pace)
    if pace is None or comes_whole(parsed):
        return [whole]
    turns = min(pace.first_turns, quote.turns.count) if quote.turns.shown else quote.turns.count
    tokens = min(pace.first_tokens, quote.output_tokens)
    if (tokens, turns) == (quote.output_tokens, quote.turns.count):
        return [whole]
    first_nano = quote.for_output(tokens, turns)
    next_nano = quote.for_output(min(tokens + pace.quantum_tokens, quote.output_tokens), turns + 1)
    steps = ReservationOption(tokens, first_nano, pace, next_nano - first_nano, turns)
    smallest_nano = min((cap.amount_nano for cap in limits if cap.window != "request"), default=math.inf)
    comfortable = app.reserve == "auto" and quote.total_nano * COMFORT <= smallest_nano
    return [whole, steps] if comfortable else [steps]


def planned(
    app: AppPolicy, limits: Sequence[Cap], call: NewCall, options: Sequence[ReservationOption], rates: RateLimits,
    notes: Sequence[Refusal] = (),
) -> ReservationPlan:  # fmt: skip
    """Return the plan for a call of these options, under the `limits` of its policy.

    What an app shares with others, and what its token was issued with, is enforced even where the caps of its own file are observed.
    """
    enforced, observed = divided(app, limits)
    return ReservationPlan(options, [*enforced, *token_cap(call)], rates, observed, app.observes("rates"), notes)


def divided(app: AppPolicy, limits: Sequence[Cap]) -> tuple[list[Cap], list[Cap]]:
    """Divide the caps of a policy into those that are enforced and those of the app's own file that are only observed."""
    if not app.observes("caps"):
        return [*limits], []
    observed = [cap for cap in limits if enclosing(cap.scope) == app_scope(app.name)]
    return [cap for cap in limits if cap not in observed], observed


def rewritten(app: AppPolicy, prices: Prices, parsed: ParsedRequest, *, overrun: bool, now: float) -> dict[str, Any]:
    """Return the top-level fields that the policy rewrites in a call outside a batch.

    A stream that is held in steps keeps its `max_tokens`: no more than one step is ever at stake.
    """
    changes = edits(app, parsed, prices)
    pace = _pace(app, prices, parsed, changes.get("model", parsed.model), overrun=overrun, now=now)
    if "max_tokens" in changes and pace is not None and _steps(pace, parsed):
        return {name: value for name, value in changes.items() if name not in CLAMPED}
    return changes


def _pace(app: AppPolicy, prices: Prices, parsed: ParsedRequest, model: str, *, overrun: bool, now: float) -> Pace | None:
    """Return the pace that bounds what a call can have generated by any moment, None where nothing does."""
    row = prices.row(model, now)
    if not parsed.stream or app.reserve == "full" or overrun or row is None:
        return None
    return Pace(row.output_tokens_per_second_max, row.lag_s, row.turn_s_min)


def _steps(pace: Pace, parsed: ParsedRequest) -> bool:
    """Tell whether a step is less than the whole."""
    return pace.first_tokens < parsed.max_tokens and not comes_whole(parsed)
