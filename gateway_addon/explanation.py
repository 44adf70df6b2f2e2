"""What would happen to a request: every rule's verdict, what the call is quoted at, which caps it fits. Nothing is sent or held.

Promises the verdict that admission would come to at that moment, as plain data and in words. Asked by `gateway explain` and by the
command of that name in mitmweb.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gateway_addon import reading
from gateway_addon.bounds import Quote, quote
from gateway_addon.ledger import LedgerUnavailable, Server, Standing, admin, book
from gateway_addon.money import dollars
from gateway_addon.policy import AppPolicy, Cap, GatewayPolicy, Verdict, caps, edits, trail
from gateway_addon.reading import Reading, Request
from gateway_addon.refusals import Refusal


def explain(policy: GatewayPolicy, app: AppPolicy, request: Request, ledger: Path | Server, now: float) -> dict[str, Any]:
    """Everything that admission would find out about a request to /v1/messages, as plain data."""
    read = reading.read("messages", request)
    changes = edits(app, read, policy.prices) if isinstance(read, Reading) else {}
    if changes:
        request, read = reading.edited("messages", request, changes)
    explanation: dict[str, Any] = {"app": app.name, "mode": app.mode, "rewritten": changes, "rules": [], "quote": None, "caps": []}
    if isinstance(read, Refusal):
        return explanation | {"refused": _refusal(read)}
    verdicts = list(trail(app, read, policy.prices))
    explanation["rules"] = [verdict._asdict() for verdict in verdicts]
    refused: Verdict | Refusal | None = next((verdict for verdict in verdicts if verdict.code), None)
    bound = quote(read, app, policy.prices, now)
    if isinstance(bound, Quote):
        limits = caps(policy, app)
        explanation["quote"] = _quote(bound)
        explanation["caps"] = [_cap(cap, bound, standing) for cap, standing in _standings(ledger, limits, now)]
        held_whole = not read.stream or app.reserve == "full"
        refused = refused or (_too_large(explanation["caps"], bound) if held_whole else None)
    else:
        refused = refused or bound
    return explanation | {"refused": refused and _refusal(refused)}


def _refusal(refused: Verdict | Refusal) -> dict[str, Any]:
    return {"code": refused.code, "sentence": refused.sentence}


def _quote(bound: Quote) -> dict[str, Any]:
    return {
        "total": dollars(bound.total_nano),
        "total_nano": bound.total_nano,
        "parts": [part._asdict() for part in bound.parts],
        "price_rows": bound.price_rows,
        "input_released_at_message_start": bound.releasable,
    }


def _cap(cap: Cap, bound: Quote, standing: Standing | None) -> dict[str, Any]:
    """One cap, what is left of it (of all of it, where there is no ledger yet), and whether this call fits."""
    taken_nano = standing.spent_nano + standing.reserved_nano if standing else 0
    amount_nano = standing.cap_nano if standing and standing.cap_nano is not None else cap.amount_nano
    left_nano = amount_nano - taken_nano
    return {
        "cap": f"{cap.scope} {cap.window}",
        "amount": dollars(amount_nano),
        "spent": dollars(standing.spent_nano) if standing else None,
        "held": dollars(standing.reserved_nano) if standing else None,
        "fits": bound.total_nano <= left_nano,
        "largest_max_tokens": bound.output_within(left_nano),
    }


def _too_large(standings: list[dict[str, Any]], bound: Quote) -> Refusal | None:
    """The cap that a call which is held whole does not fit. (A stream may be held in steps: only its first one must fit.)"""
    for cap in standings:
        if not cap["fits"]:
            largest = f"{cap['largest_max_tokens']:,}" if cap["largest_max_tokens"] else "none"
            sentence = f"the call can cost up to {dollars(bound.total_nano)}, more than is left of {cap['cap']} ({cap['amount']})"
            return Refusal("quote_over_cap", f"{sentence}; the largest max_tokens that fits: {largest}")
    return None


def _standings(ledger: Path | Server, limits: Sequence[Cap], now: float) -> list[tuple[Cap, Standing | None]]:
    """Each cap beside what the ledger says of it; nothing of it where there is no ledger to read."""
    try:
        with admin.reading(ledger) as db:
            standings = book.standing(db, sorted({cap.scope for cap in limits}), limits, now=now)
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
        lines.append("prices: " + ", ".join(explanation["quote"]["price_rows"]))
    if explanation["caps"]:
        rows = [[cap[name] for name in ("cap", "amount", "spent", "held")] + [_fits(cap)] for cap in explanation["caps"]]
        lines += ["", tabulate(rows, headers=("cap", "amount", "spent", "held", "this call"))]
    refused = explanation["refused"]
    observed = " (let pass and recorded: mode observe)" if refused and explanation["mode"] == "observe" else ""
    lines += ["", f"refused{observed}: {refused['code']}: {refused['sentence']}" if refused else "allowed by the policy"]
    return "\n".join(lines).lstrip("\n")


def _fits(cap: dict[str, Any]) -> str:
    if cap["fits"]:
        return "fits"
    return f"too large; max_tokens {cap['largest_max_tokens']:,} would fit" if cap["largest_max_tokens"] else "too large, its input alone"
