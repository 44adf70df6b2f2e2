"""Plan how a quoted call is asked of the ledger, and judge the plan by the ledger's facts. Pure.

One judgement for the gateway, for `explain` and for `replay`. It enforces nothing: the queue asks the ledger, whose statement does.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway_addon.calls.quote import Quote
from gateway_addon.calls.refusal_messages import headroom, over_request_cap
from gateway_addon.calls.reservation_options import ReservationOption, ReservationPlan, planned, reservation_options
from gateway_addon.ledger import CallFacts, Denied, NewCall, RateLimits, Standing
from gateway_addon.ledger.denials import judge, judge_caps
from gateway_addon.messages.request import ParsedRequest
from gateway_addon.policy import AppPolicy, GatewayPolicy, caps, token_cap
from gateway_addon.refusals import Refusal
from gateway_addon.upstreams.rate_limits import shortage

RATES = ("rate", "concurrency")
"""The reasons of denials that `observe: [rates]` lets pass."""


def plan(
    app: AppPolicy,
    policy: GatewayPolicy,
    call: NewCall,
    parsed: ParsedRequest,
    quote: Quote,
    upstream_limits: Mapping[str, tuple[str, float]],
    overruns: frozenset[str],
    now: float,
) -> ReservationPlan | Refusal:
    """Return how a quoted call is asked of the ledger, or why not even that.

    `upstream_limits`: the shared key's, as the ledger keeps them; looked at where the app has a headroom. A request cap limits what
    must be held to start: the whole call, or the first step of one that is held in steps.
    """
    notes: list[Refusal] = []
    keep_percent = app.rates.headroom_percent
    short = None if keep_percent is None else shortage(upstream_limits, keep_percent, now)
    if short is not None and not app.observes("rates"):
        return headroom(app, short)
    if short is not None:
        notes.append(headroom(app, short))
    limits = caps(policy, app, call.parts, last_call=call.last_call)
    options = reservation_options(quote, app, policy, parsed, (*limits, *token_cap(call)), overrun=parsed.model in overruns, now=now)
    fitting = [option for option in options if fits_request_cap(app, option.hold_nano)]
    if not fitting:
        too_large = over_request_cap(app, quote, app.caps["request"])
        if not app.observes("caps"):
            return too_large
        notes.append(too_large)
    rates = RateLimits(app.rates.requests_per_minute, app.rates.input_tokens_per_minute, app.rates.concurrent)
    return planned(app, limits, call, options if app.observes("caps") else fitting, rates, notes)


def fits_request_cap(app: AppPolicy, hold_nano: int) -> bool:
    """Tell whether an app's cap for one request lets a call hold an amount."""
    return "request" not in app.caps or hold_nano <= app.caps["request"]


class Verdict(NamedTuple):
    """The verdict of the ledger's facts on a planned call. `denied` None: it would be held by `option`."""

    denied: Denied | None
    option: ReservationOption
    observed: tuple[Denied, ...]
    """Refusals of rules in observe mode."""


def judge_plan(asked: ReservationPlan, facts: CallFacts, input_tokens: int, now: float) -> Verdict:
    """Judge a planned call by the ledger's facts, with the standings of every cap: as the queue would find it after any wait."""
    enforced = {(cap.scope, cap.window) for cap in asked.limits}
    own = [standing for standing in facts.standings if (standing.scope, standing.window) not in enforced]
    standings = tuple(standing for standing in facts.standings if (standing.scope, standing.window) in enforced)
    observed = observed_denials(own, asked.options[-1], now)
    known = facts._replace(standings=standings)
    denied, option = _first_that_fits(asked.options, known, asked.rates, input_tokens, now)
    if asked.observes_rates and denied is not None and denied.reason in RATES:
        observed.append(denied)
        denied, option = _first_that_fits(asked.options, known, RateLimits(), input_tokens, now)
    return Verdict(denied, option, tuple(observed))


def _first_that_fits(
    options: Sequence[ReservationOption], facts: CallFacts, rates: RateLimits, input_tokens: int, now: float
) -> tuple[Denied | None, ReservationOption]:
    """Return the option that would be held; else the last, smallest one and its denial."""
    for option in options:
        denied = judge(facts, rates, option.hold_nano, option.quantum_nano, input_tokens, now)
        if denied is None:
            break
    return denied, option


def observed_denials(own: Sequence[Standing], option: ReservationOption, now: float) -> list[Denied]:
    """Return what an app's own caps would have said to its smallest option, where they are only observed."""
    said = (judge_caps((standing,), option.hold_nano, option.quantum_nano, now) for standing in own)
    return [denied for denied in said if denied is not None]
