"""Write the sentences of refusals, for the person who reads them at night.

Each names the app, the limit with its amounts, and the way out. Knows the ledger's values and the quote; decides nothing.
"""

from datetime import tzinfo
from typing import NamedTuple

from gateway_addon.calls.quote import Quote
from gateway_addon.calls.reservation_options import ReservationOption
from gateway_addon.calls.running import InFlightCall
from gateway_addon.calls.spend_limit import rejected_headers
from gateway_addon.identity.client_address import FORWARDED_FOR
from gateway_addon.identity.throttle import FAILURES_PER_MINUTE
from gateway_addon.identity.tokens import ISSUE
from gateway_addon.ledger import Denied, Pause, Standing, Token
from gateway_addon.money import cents, dollars
from gateway_addon.names import PROGRAM
from gateway_addon.policy import AppPolicy
from gateway_addon.refusals import Refusal
from gateway_addon.upstreams.rate_limits import Shortage
from gateway_addon.windows import shown


class BatchQuote(NamedTuple):
    """The worst case of a whole batch."""

    requests: int
    total_nano: int


def in_force(token: Token | None, now: float) -> Token | Refusal:
    """Return the token if it is in force, else the refusal that says why it is not."""
    if token is None:
        return Refusal("token_unknown", f"No app has this token: it was issued for another gateway or ledger. {ISSUE}.")
    if code := token.refusal(now):
        word = "revoked" if code == "token_revoked" else "expired"
        return Refusal(code, f"Token {token.label or token.id} of app {token.app} is {word}. {ISSUE}.")
    return token


def denied(denial: Denied, app: AppPolicy, quote: Quote | BatchQuote, option: ReservationOption, zone: tzinfo) -> Refusal:
    """Return the refusal for a reservation that the ledger denied. `option` is what was asked for."""
    if denial.standing is not None:
        return _denied_by_cap(denial, denial.standing, app, quote, option, zone)
    if denial.pause is not None:
        return paused(denial.pause, zone)
    if denial.reason in ("token_unknown", "token_revoked", "token_expired"):
        return Refusal(denial.reason, f"The token of app {app.name} has just been revoked or expired. Ask the operator for a new one.")
    if denial.reason == "concurrency":
        return _too_many_in_flight(denial, app)
    return rate_reached(denial, app)


def _too_many_in_flight(denial: Denied, app: AppPolicy) -> Refusal:
    """Return the refusal for a call whose turn did not come while it waited in its app's line."""
    place = f"({app.file}: rates.concurrent)"
    if not denial.limit_max:
        return Refusal("concurrency", f"App {app.name} may have no call in flight {place}. Raise it there.")
    calls = "1 call" if denial.limit_max == 1 else f"{denial.limit_max:,} calls"
    waited = f", and none ended for this one within {app.rates.wait_s:g} s (rates.wait)" if app.rates.wait_s else ""
    expected = "" if denial.retry_after_s is None else f" Expect its turn in about {denial.retry_after_s} s."
    sentence = f"App {app.name} has {calls} in flight, as many as it may have at once {place}{waited}."
    return Refusal("concurrency", f"{sentence}{expected} Make fewer at once, or raise it there.", denial.retry_after_s or 1)


def rate_reached(denial: Denied, app: AppPolicy) -> Refusal:
    """Return the refusal for a request that exceeds a rate of its app."""
    limit = (denial.limit or "").replace("_", " ")
    sentence = f"App {app.name} is at its limit of {denial.limit_max:,} {limit} ({app.file}: rates). Slow down, or raise it there."
    return Refusal(denial.reason, sentence, denial.retry_after_s)


def _denied_by_cap(
    denial: Denied, standing: Standing, app: AppPolicy, quote: Quote | BatchQuote, option: ReservationOption, zone: tzinfo
) -> Refusal:
    if denial.reason == "quote_over_cap":
        return Refusal("quote_over_cap", _too_large(app, quote, standing.cap_nano or 0, _cap_name(standing)))
    stands = f"{_stands(standing)}; this call needs {cents(option.hold_nano)} to start"
    if denial.reason == "cap_held":
        return Refusal("cap_held", f"{stands}, and calls in flight hold what is left. Try again shortly.", denial.retry_after_s or 1)
    reset = "" if standing.resets_at is None else f" It resets at {shown(standing.resets_at, zone)}."
    kind, _, name = standing.scope.partition(":")
    whom = f"{name or kind}" if kind != "team" else standing.scope
    if standing.is_limited:
        way_out = f"the operator's limit holds ({PROGRAM} cap list), and {PROGRAM} cap limit {whom} {standing.window} --lift takes it away"
    else:
        way_out = f"{PROGRAM} cap raise {whom} {standing.window} AMOUNT --until DATE"
    headers = rejected_headers(app.name, standing)
    return Refusal("cap_spent", f"{stands}.{reset} To go on before: {way_out}.", denial.retry_after_s, headers)


def paused(pause: Pause, zone: tzinfo) -> Refusal:
    """Return the refusal for a scope that the operator has paused."""
    until = "until it is resumed" if pause.until is None else f"until {shown(pause.until, zone)}"
    why = f" ({pause.why})" if pause.why else ""
    return Refusal("app_paused", f"{_scope(pause.scope)} is paused {until}{why}. The operator can end it: {PROGRAM} resume.")


def elsewhere(app: AppPolicy, address: str, headers: tuple[tuple[str, str], ...]) -> Refusal:
    """Return the refusal for a token that is used from an address which its app does not allow."""
    sentence = f"App {app.name} may not call from {address} ({app.file}: addresses). Call from another, or add this one there."
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
    sentence = f"The shared key has {left} left for now, and app {app.name} keeps {app.rates.headroom_percent} % of it free for others"
    return Refusal("headroom", f"{sentence} ({app.file}: rates.headroom). Try again in {short.wait_s} s.", short.wait_s)


def over_request_cap(app: AppPolicy, quote: Quote, cap_nano: int) -> Refusal:
    """Return the refusal for a call that could cost more than the app's cap for one request."""
    return Refusal("quote_over_cap", _too_large(app, quote, cap_nano, f"cap for one request of app {app.name}"))


def cut_sentence(running: InFlightCall) -> str:
    """Return the sentence that says why the gateway ended a running answer."""
    app = running.admission.app.name
    if running.cut == "paused":
        return f"The operator paused app {app}, so the gateway ended this answer here. What was generated so far is charged."
    if running.cut == "lease_expiring":
        return (
            "The gateway has lost its ledger and must end running answers before another gateway books them, so this one ends here; "
            "what was generated so far is charged. Send the call again in a moment."
        )
    return (
        f"The budget of app {app} does not allow this answer to go on, so the gateway ended it here; what was generated so far is charged. "
        f"Ask for fewer tokens, or raise the cap: {PROGRAM} cap raise {app} day AMOUNT --until DATE."
    )


def _too_large(app: AppPolicy, quote: Quote | BatchQuote, cap_nano: int, cap_name: str) -> str:
    if isinstance(quote, BatchQuote):
        what = f"This batch of {quote.requests:,} requests"
        way_out = "Send fewer requests in one batch, or ask for fewer max_tokens in each."
    else:
        what = "This call"
        if fits := quote.output_within(cap_nano):
            way_out = f"The largest max_tokens that fits is {fits:,}."
        elif quote.prompt_nano > cap_nano or not quote.by_itself:
            way_out = "Its input alone is too dear: send less."
        else:
            directly = ', called directly only (allowed_callers: ["direct"])' if quote.turns.uncounted else ""
            what_loops = f"What the provider may do by itself is too dear ({', '.join(quote.by_itself)})"
            way_out = f"{what_loops}: leave it out, or allow fewer uses (max_uses){directly}."
    limit = f"{dollars(cap_nano)}, {app.file}: caps"
    return f"{what} can cost up to {cents(quote.total_nano)}, more than the {cap_name} ({limit}). {way_out}"


def _stands(standing: Standing) -> str:
    held = f", {cents(standing.reserved_nano)} held" if standing.reserved_nano else ""
    return f"The {_cap_name(standing)} is used up: {cents(standing.spent_nano)} spent{held} of {dollars(standing.cap_nano or 0)}"


def _cap_name(standing: Standing) -> str:
    windows = {"day": "cap for today", "week": "cap for this week", "month": "cap for this month", "ever": "cap"}
    return f"{windows[standing.window]} of {_scope(standing.scope)}"


def _scope(scope: str) -> str:
    kind, _, name = scope.partition(":")
    return f"{kind} {name}" if name else "the gateway"
