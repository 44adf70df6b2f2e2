"""Write the sentences of refusals, for the person who reads them at night.

Each names the app, the limit with its amounts, and the way out. Knows the ledger's values and the quote; decides nothing.
"""

from dataclasses import replace
from datetime import tzinfo
from typing import NamedTuple

from gateway_addon.calls.quote import Quote
from gateway_addon.calls.reservation_options import ReservationOption
from gateway_addon.calls.responses import kept_for_last_calls, standing_headers
from gateway_addon.calls.running import InFlightCall
from gateway_addon.calls.spend_limit import rejected_headers
from gateway_addon.identity.client_address import FORWARDED_FOR
from gateway_addon.identity.throttle import FAILURES_PER_MINUTE
from gateway_addon.identity.tokens import ISSUE
from gateway_addon.ledger import TOTAL, Denied, Pause, Standing, Token, part_of
from gateway_addon.ledger.scope import cap_command, named_in_full, paused_as
from gateway_addon.money import cents, dollars
from gateway_addon.names import PROGRAM, app_named
from gateway_addon.policy import AppPolicy
from gateway_addon.refusals import Refusal, capitalised
from gateway_addon.upstreams.rate_limits import Shortage
from gateway_addon.windows import shown

EXCHANGE = "Exchange an identity token again; the SDKs do so by themselves."
_WHEN = {"day": "for today", "week": "for this week", "month": "for this month", "cycle": "for this cycle", "ever": "for ever"}


class BatchQuote(NamedTuple):
    """The worst case of a whole batch."""

    requests: int
    total_nano: int


def in_force(token: Token | None, now: float) -> Token | Refusal:
    """Return the token if it is in force, else the refusal that says why it is not."""
    if token is None:
        return _out_of_force(None, "token_unknown")
    code = token.refusal(now)
    return token if code is None else _out_of_force(token, code)


def _out_of_force(token: Token | None, code: str) -> Refusal:
    if token is None:
        return Refusal(code, f"No app has this token: it was issued for another gateway or ledger. {ISSUE}.")
    if token.issuer is not None:
        return _workload_out(token, code)
    word = "revoked" if code == "token_revoked" else "expired"
    return Refusal(code, f"Token {token.label or token.id} of {app_named(token.app)} is {word}. {ISSUE}.")


def _workload_out(token: Token, code: str) -> Refusal:
    """Return the refusal for a workload that is revoked, or a session that has ended."""
    whose = f"workload {token.label} of {app_named(token.app)}"
    if code == "token_revoked":
        way_out = f"{PROGRAM} token restore {token.app} --id {token.id}"
        return Refusal(code, f"The {whose} is revoked. The operator can let it in again: {way_out}.")
    return Refusal("identity_expired", f"The session of the {whose} has ended. {EXCHANGE}")


def rule_gone(token: Token, app: AppPolicy) -> Refusal:
    """Return the refusal for a session whose rule is no longer in its app's policy."""
    whose = f"{app_named(app.name)} ({app.file}: workloads)"
    sentence = f"The rule that let the workload {token.label} in is no longer one of {whose}. {EXCHANGE}"
    return Refusal("identity_expired", sentence)


def denied(denial: Denied, app: AppPolicy, quote: Quote | BatchQuote, option: ReservationOption, zone: tzinfo) -> Refusal:
    """Return the refusal for a reservation that the ledger denied. `option` is what was asked for. It says how all caps stand."""
    refusal = _denied(denial, app, quote, option, zone)
    return replace(refusal, more_headers=(*standing_headers(app, denial.standings), *refusal.more_headers))


def _denied(denial: Denied, app: AppPolicy, quote: Quote | BatchQuote, option: ReservationOption, zone: tzinfo) -> Refusal:
    if denial.standing is not None:
        return _denied_by_cap(denial, denial.standing, app, quote, option, zone)
    if denial.pause is not None:
        return paused(denial.pause, zone)
    if denial.reason in ("token_unknown", "token_revoked", "token_expired"):
        return _out_of_force(denial.token, denial.reason)
    if denial.reason == "concurrency":
        return _too_many_in_flight(denial, app)
    return rate_reached(denial, app)


def _too_many_in_flight(denial: Denied, app: AppPolicy) -> Refusal:
    """Return the refusal for a call whose turn did not come while it waited in its app's line."""
    place = f"({app.file}: rates.concurrent)"
    if not denial.limit_max:
        return Refusal("concurrency", f"{capitalised(str(app))} may have no call in flight {place}. Raise it there.")
    calls = "1 call" if denial.limit_max == 1 else f"{denial.limit_max:,} calls"
    waited = f", and none ended for this one within {app.rates.wait_s:g} s (rates.wait)" if app.rates.wait_s else ""
    expected = "" if denial.retry_after_s is None else f" Expect its turn in about {denial.retry_after_s} s."
    sentence = f"{capitalised(str(app))} has {calls} in flight, as many as it may have at once {place}{waited}."
    return Refusal("concurrency", f"{sentence}{expected} Make fewer at once, or raise it there.", denial.retry_after_s or 1)


def rate_reached(denial: Denied, app: AppPolicy) -> Refusal:
    """Return the refusal for a request that exceeds a rate of its app."""
    limit = (denial.limit or "").replace("_", " ")
    limit = f"1 {limit.replace('s per', ' per')}" if denial.limit_max == 1 else f"{denial.limit_max:,} {limit}"
    if denial.retry_after_s is None:
        sentence = f"This call alone is more than the {limit} of {app} ({app.file}: rates). Send less at once, or raise it there."
    else:
        sentence = f"{capitalised(str(app))} is at its limit of {limit} ({app.file}: rates). Slow down, or raise it there."
    return Refusal(denial.reason, sentence, denial.retry_after_s)


def _denied_by_cap(
    denial: Denied, cap: Standing, app: AppPolicy, quote: Quote | BatchQuote, option: ReservationOption, zone: tzinfo
) -> Refusal:
    if denial.reason == "quote_over_cap":
        return Refusal("quote_over_cap", _too_large(app, quote, cap.cap_nano or 0, _cap_name(cap), _place(app, cap), cap.spent_nano))
    if denial.reason == "cap_held":
        held = f"{cents(cap.reserved_nano)} held by calls in flight"
        kept = f", {cents(cap.quantum_nano)} kept for their next steps" if cap.quantum_nano else ""
        left = f"Of the {_cap_name(cap)} ({dollars(cap.cap_nano or 0)}) {cents(cap.spent_nano)} is spent, {held}{kept}"
        sentence = f"{left}; {_needs(option)}. Try again shortly."
        return Refusal("cap_held", sentence, denial.retry_after_s or 1)
    reset = "" if cap.resets_at is None else f" It resets at {shown(cap.resets_at, zone)}."
    sentence = f"{_spent(cap, option)}{reset}{_smaller(cap, quote)} {_way_on(app, cap)}"
    return Refusal("cap_spent", sentence, denial.retry_after_s, rejected_headers(app.name, cap))


def _spent(cap: Standing, option: ReservationOption) -> str:
    """Name all amounts that do not fit: what is spent, and what the call asks for."""
    amount_nano = cap.cap_nano or 0
    if part_of(cap.scope) is not None:
        spent = f"{cents(cap.spent_nano)} of its {dollars(amount_nano)} {_WHEN[cap.window.partition(':')[0]]}"
        needs = "" if cap.spent_nano >= amount_nano else f"; {_needs(option)}"
        return f"{named_in_full(cap.scope)} has spent {spent}{needs}."
    spent = f"{cents(cap.spent_nano)} spent of {dollars(amount_nano)}"
    if cap.spent_nano >= amount_nano:
        return f"The {_cap_name(cap)} is used up: {spent}."
    return f"The {_cap_name(cap)} would be passed: {spent}; {_needs(option)}."


def _smaller(cap: Standing, quote: Quote | BatchQuote) -> str:
    """Name the largest `max_tokens` with which the call fits beside what is spent."""
    left_nano = (cap.cap_nano or 0) - cap.spent_nano
    fits = quote.output_within(left_nano) if isinstance(quote, Quote) and left_nano > 0 else 0
    return f" The largest max_tokens that still fits is {fits:,}." if fits else ""


def _needs(option: ReservationOption) -> str:
    """Say what a call asks of a cap: what it holds at first, and what it keeps free for its next step."""
    if not option.quantum_nano:
        return f"this call needs {cents(option.hold_nano)}"
    asked_nano = option.hold_nano + option.quantum_nano
    return f"this call needs {cents(asked_nano)}, {cents(option.hold_nano)} to start and {cents(option.quantum_nano)} for its next step"


def _way_on(app: AppPolicy, cap: Standing) -> str:
    """Name what lets calls through before the reset: a last call, another session or agent, the operator's command."""
    part, last, instead, place = part_of(cap.scope), "", "", ""
    if part is not None:
        last_nano = kept_for_last_calls(app, cap)
        last = f"Its last {dollars(last_nano)} is kept for requests with the header x-gateway-last-call: 1. " if last_nano else ""
        instead = {"session": "Begin another session", "agent": "Let another agent go on"}.get(part[0], "")
        place = f" ({_place(app, cap)})"
    if cap.is_limited:
        lifted = cap_command("limit", cap.scope, cap.window, "--lift")
        return f"{last}{instead and f'{instead}. '}The operator's limit holds ({PROGRAM} cap list); to lift it: {lifted}."
    whose = f"{instead}, or let the operator" if instead else "The operator can"
    return f"{last}{whose} raise it{place}: {cap_command('raise', cap.scope, cap.window, 'AMOUNT --until DATE')}."


def paused(pause: Pause, zone: tzinfo) -> Refusal:
    """Return the refusal for a scope that the operator has paused."""
    until = "until it is resumed" if pause.until is None else f"until {shown(pause.until, zone)}"
    why = f" ({pause.why})" if pause.why else ""
    what = "Every app is" if pause.scope == TOTAL else f"{capitalised(named_in_full(pause.scope))} is"
    return Refusal("app_paused", f"{what} paused {until}{why}. The operator can end it: {PROGRAM} resume {paused_as(pause.scope)}.")


def elsewhere(app: AppPolicy, address: str, headers: tuple[tuple[str, str], ...]) -> Refusal:
    """Return the refusal for a token that is used from an address which its app does not allow."""
    sentence = f"{capitalised(str(app))} may not call from {address} ({app.file}: addresses). Call from another, or add this one there."
    if any(name == FORWARDED_FOR for name, _ in headers):
        sentence += " If that is a proxy in front of the gateway, name it in gateway.yaml (trusted_proxies)."
    return Refusal("token_address", sentence)


def throttled(address: str, monotonic_s: float) -> Refusal:
    """Return the refusal for an address with too many requests without a valid token in this minute."""
    wait_s = 60 - int(monotonic_s) % 60
    sentence = f"{address} has sent more than {FAILURES_PER_MINUTE} requests without a valid token in this minute"
    return Refusal("token_noise", f"{sentence}. Stop what sends them; a valid token is served at any time. {ISSUE}.", wait_s)


def headroom(app: AppPolicy, short: Shortage) -> Refusal:
    """Return the refusal for an app that must leave the rest of the shared key's own limit to the others."""
    left = f"{short.remaining:,} of {short.limit:,} {short.kind.replace('-', ' ')}"
    sentence = f"The shared key has {left} left for now, and {app} keeps {app.rates.headroom_percent} % of them free for the others"
    return Refusal("headroom", f"{sentence} ({app.file}: rates.headroom). Try again in {short.wait_s} s.", short.wait_s)


def over_request_cap(app: AppPolicy, quote: Quote, cap_nano: int) -> Refusal:
    """Return the refusal for a call that could cost more than the app's cap for one request."""
    return Refusal("quote_over_cap", _too_large(app, quote, cap_nano, f"cap for one request of {app}", f"{app.file}: caps"))


def cut_sentence(running: InFlightCall) -> str:
    """Return the sentence that says why the gateway ended a running answer."""
    app = running.admission.app
    if running.cut == "paused":
        whom = f"{app}, or the part of it that asked"
        return f"The operator paused {whom}, so the gateway ended this answer here. What was generated so far is charged."
    if running.cut == "lease_expiring":
        return (
            "The gateway has lost its ledger and must end running answers before another gateway books them, so this one ends here; "
            "what was generated so far is charged. Send the call again in a moment."
        )
    return (
        f"The budget of {app} does not allow this answer to go on, so the gateway ended it here; what was generated so far is charged. "
        f"Ask for fewer tokens, or raise the cap that ran out ({app.file}: caps; {PROGRAM} cap list shows what is left of each)."
    )


def _too_large(app: AppPolicy, quote: Quote | BatchQuote, cap_nano: int, cap_name: str, place: str, spent_nano: int = 0) -> str:
    if isinstance(quote, BatchQuote):
        what = f"This batch of {quote.requests:,} requests"
        way_out = "Send fewer requests in one batch, or ask for fewer max_tokens in each."
    else:
        what = "This call"
        if spent_nano > cap_nano:
            way_out = f"{cents(spent_nano)} is spent already, so nothing of it is left."
        elif fits := quote.output_within(cap_nano):
            way_out = f"The largest max_tokens that fits is {fits:,}."
        elif quote.prompt_nano > cap_nano or not quote.by_itself:
            way_out = "Its input alone is too dear: send less."
        else:
            directly = ', called directly only (allowed_callers: ["direct"])' if quote.turns.uncounted else ""
            what_loops = f"What the provider may do by itself is too dear ({', '.join(quote.by_itself)})"
            way_out = f"{what_loops}: leave it out, or allow fewer uses (max_uses){directly}."
    return f"{what} can cost up to {cents(quote.total_nano)}, more than the {cap_name} ({dollars(cap_nano)}, {place}). {way_out}"


def _cap_name(standing: Standing) -> str:
    when = "" if standing.window == "ever" else f" {_WHEN[standing.window.partition(':')[0]]}"
    return f"cap{when} of {named_in_full(standing.scope)}"


def _place(app: AppPolicy, cap: Standing) -> str:
    """Name the place where a cap is set."""
    if cap.is_limited:
        return f"the operator's limit: {PROGRAM} cap list"
    if (part := part_of(cap.scope)) is not None:
        if part[0] == "model" and part[1] in app.models.caps:
            return f"{app.file}: models.caps"
        return f"{app.file}: each.{part[0]}" if part[0] in app.each else "issued with the token"
    kind, _, name = cap.scope.partition(":")
    places = {"total": f"{app.beside('gateway.yaml')}: caps", "team": f"{app.beside('gateway.yaml')}: teams.{name}.caps"}
    return places.get(kind, f"{app.file}: caps")
