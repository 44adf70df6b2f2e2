"""What would happen to a request: every rule's verdict, what the call is quoted at, which caps it fits. Nothing is sent or held.

Promises the verdict that admission would come to at that moment, as plain data and in words. Asked by `gateway explain` and by the
command of that name in mitmweb.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gateway_addon.calls.quote import Quote, quote
from gateway_addon.calls.reservation_options import reservation_options, rewritten
from gateway_addon.ledger import LedgerUnavailable, ServerAddress, Standing, admin, reservations
from gateway_addon.messages import request as reading
from gateway_addon.messages.request import ParsedRequest, Request, is_fast
from gateway_addon.money import dollars
from gateway_addon.policy import AppPolicy, Cap, GatewayPolicy, RuleVerdict, caps, trail
from gateway_addon.pricing import retired
from gateway_addon.refusals import Refusal


def explain(policy: GatewayPolicy, app: AppPolicy, request: Request, ledger: Path | ServerAddress, now: float) -> dict[str, Any]:
    """Everything that admission would find out about a request to /v1/messages, as plain data."""
    read = reading.read("messages", request)
    changes = rewritten(app, policy.prices, read, overrun=False, now=now) if isinstance(read, ParsedRequest) else {}
    if changes:
        request, read = reading.edited("messages", request, changes)
    explanation: dict[str, Any] = {"app": app.name, "rewritten": changes, "rules": [], "quote": None, "caps": [], "observed": []}
    if isinstance(read, Refusal):
        return explanation | {"note": None, "refused": _refusal(read)}
    explanation["note"] = retired(policy.prices, read.model, now, fast=is_fast(read.body))
    verdicts = list(trail(app, read, policy.prices))
    explanation["rules"] = [verdict._asdict() for verdict in verdicts]
    refusing = [verdict for verdict in verdicts if verdict.code]
    observed: list[RuleVerdict | Refusal] = [verdict for verdict in refusing if app.observes(verdict.rule)]
    refused: RuleVerdict | Refusal | None = next((verdict for verdict in refusing if not app.observes(verdict.rule)), None)
    bound = quote(read, app, policy.prices, now)
    if isinstance(bound, Quote):
        limits = caps(policy, app)
        explanation["quote"] = _quote(bound)
        explanation["caps"] = [_cap(cap, bound, standing) for cap, standing in _standings(ledger, limits, now)]
        least = reservation_options(bound, app, policy, read, limits, overrun=False, now=now)[-1]
        if least.hold_nano < bound.total_nano:  # only the first step must fit
            explanation["quote"]["held_at_first"] = dollars(least.hold_nano)
        else:
            own = [cap["cap"].startswith("app:") and app.observes("caps") for cap in explanation["caps"]]
            too_large = [_too_large(cap, bound) for cap in explanation["caps"]]
            observed += [each for each, only_seen in zip(too_large, own, strict=True) if each and only_seen]
            refused = refused or next((each for each, only_seen in zip(too_large, own, strict=True) if each and not only_seen), None)
    else:
        refused = refused or bound
    return explanation | {"observed": [_refusal(each) for each in observed], "refused": refused and _refusal(refused)}


def _refusal(refused: RuleVerdict | Refusal) -> dict[str, Any]:
    return {"code": refused.code, "sentence": refused.sentence}


def _quote(bound: Quote) -> dict[str, Any]:
    return {
        "total": dollars(bound.total_nano),
        "total_nano": bound.total_nano,
        "parts": [{"name": part.name, "tokens": part.tokens, "rate": part.rate, "nano": part.nano} for part in bound.parts],
        "price_rows": bound.price_rows,
        "input_released_at_message_start": bound.releasable,
        "held_at_first": None,
    }


def _cap(cap: Cap, bound: Quote, standing: Standing | None) -> dict[str, Any]:
    """One cap, what is left of it (of all of it, where there is no ledger yet), and whether this call fits."""
    taken_nano = standing.spent_nano + standing.reserved_nano if standing else 0
    amount_nano = standing.cap_nano if standing and standing.cap_nano is not None else cap.amount_nano
    left_nano = amount_nano - taken_nano
    return {
        "cap": f"{cap.scope} {cap.window}",
        "amount": dollars(amount_nano),
        "raised": dollars(standing.raised_nano) if standing and standing.raised_nano else None,
        "limit": dollars(standing.limit_nano) if standing and standing.limit_nano is not None else None,
        "spent": dollars(standing.spent_nano) if standing else None,
        "held": dollars(standing.reserved_nano) if standing else None,
        "fits": bound.total_nano <= left_nano,
        "largest_max_tokens": bound.output_within(left_nano),
    }


def _too_large(cap: dict[str, Any], bound: Quote) -> Refusal | None:
    """What a cap says to a call that is held whole and does not fit it."""
    if cap["fits"]:
        return None
    largest = f"{cap['largest_max_tokens']:,}" if cap["largest_max_tokens"] else "none"
    sentence = f"the call can cost up to {dollars(bound.total_nano)}, more than is left of {cap['cap']} ({cap['amount']})"
    return Refusal("quote_over_cap", f"{sentence}; the largest max_tokens that fits: {largest}")


def _standings(ledger: Path | ServerAddress, limits: Sequence[Cap], now: float) -> list[tuple[Cap, Standing | None]]:
    """Each cap beside what the ledger says of it; nothing of it where there is no ledger to read."""
    try:
        with admin.reading(ledger) as db:
            standings = reservations.standing(db, sorted({cap.scope for cap in limits}), limits, now=now)
    except LedgerUnavailable:
        standings = ()
    found: dict[tuple[str, str], Standing] = {(standing.scope, standing.window): standing for standing in standings}
    return [(cap, found.get((cap.scope, cap.window))) for cap in limits]


def written(explanation: dict[str, Any]) -> str:
    """The explanation for people: rules, quote, caps, verdict."""
    rules = [("no" if rule["code"] else "ok", rule["rule"], rule["sentence"]) for rule in explanation["rules"]]
    lines = [tabulate(rules, tablefmt="plain")]
    if explanation["rewritten"]:
        lines.append("rewritten by the policy: " + ", ".join(f"{name} = {value}" for name, value in explanation["rewritten"].items()))
    if explanation["quote"]:
        parts = [(p["name"], f"{p['tokens']:,}", p["rate"], dollars(p["nano"])) for p in explanation["quote"]["parts"]]
        parts.append(("at most", "", "", explanation["quote"]["total"]))
        lines += ["", tabulate(parts, headers=("quote", "tokens", "price", "worst case"), colalign=("left", "right", "left", "right"))]
        if explanation["quote"]["held_at_first"]:
            lines.append(f"held in steps: {explanation['quote']['held_at_first']} to begin with")
        lines.append("prices: " + ", ".join(explanation["quote"]["price_rows"]))
    if explanation["caps"]:
        rows = [[cap[name] for name in ("cap", "amount", "spent", "held")] + [_fits(cap)] for cap in explanation["caps"]]
        lines += ["", tabulate(rows, headers=("cap", "amount", "spent", "held", "this call"))]
    refused = explanation["refused"]
    lines += ["", *(f"observed, so let pass and recorded: {each['code']}: {each['sentence']}" for each in explanation["observed"])]
    if explanation["note"]:
        lines.append(f"the Claude API would refuse it: {explanation['note']}")
    lines.append(f"refused: {refused['code']}: {refused['sentence']}" if refused else "allowed by the policy")
    return "\n".join(lines).lstrip("\n")


def _fits(cap: dict[str, Any]) -> str:
    if cap["fits"]:
        return "fits"
    largest = cap["largest_max_tokens"]
    return f"too large; max_tokens {largest:,} would fit" if largest else "too large, whatever its max_tokens"
