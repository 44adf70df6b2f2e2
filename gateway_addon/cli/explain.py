"""`gateway explain`: what would happen to a request, rule by rule, before anything is sent."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from gateway_addon import reading
from gateway_addon.bounds import Quote, quote
from gateway_addon.cli.common import FINE, PROBLEM, WRONG_USAGE, ledger_option, policies_option, says_errors, stop
from gateway_addon.ledger import LedgerUnavailable, Standing, admin, book, files
from gateway_addon.money import dollars
from gateway_addon.policy import AppPolicy, Cap, GatewayPolicy, PolicyError, Verdict, caps, edits, load, trail
from gateway_addon.reading import Reading, Request
from gateway_addon.refusals import Refusal


@click.command(epilog="Example: gateway explain request.json --app reviews")
@click.argument("request_file", metavar="REQUEST.json", type=click.File("rb"))
@click.option("--app", "app_name", required=True, help="Whose policy judges the request.")
@click.option("--beta", "betas", multiple=True, help="A value of anthropic-beta sent with it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@policies_option
@ledger_option
@says_errors(PolicyError)
def explain(request_file: Any, app_name: str, betas: tuple[str, ...], as_json: bool, policies: Path, ledger: str) -> None:
    """Say what would happen to the body in REQUEST.json (`-`: standard input), sent to /v1/messages by an app: every rule's
    verdict, what the call is quoted at, and which caps it fits.

    Exits 1 where the request would be refused.
    """
    policy = load(policies)
    if app_name not in policy.apps:
        stop(f"No app {app_name!r} in {policies}; there: {', '.join(policy.apps) or 'none'}.", WRONG_USAGE)
    headers = tuple(("anthropic-beta", beta) for beta in betas)
    explanation = _explain(policy, policy.apps[app_name], Request("POST", "/v1/messages", headers, request_file.read()), ledger)
    click.echo(json.dumps(explanation, indent=2) if as_json else _written(explanation))
    sys.exit(PROBLEM if explanation["refused"] else FINE)


def _explain(policy: GatewayPolicy, app: AppPolicy, request: Request, ledger: str) -> dict[str, Any]:
    """Everything that admission would find out, as plain data."""
    now = time.time()
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
        "parts": [{"name": part.name, "tokens": part.tokens, "rate": part.rate, "nano": part.nano} for part in bound.parts],
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


def _standings(ledger: str, limits: Sequence[Cap], now: float) -> list[tuple[Cap, Standing | None]]:
    """Each cap beside what the ledger says of it; nothing of it where there is no ledger to read."""

    try:
        with admin.reading(files.ledger_path(ledger)) as db:
            standings = book.standing(db, sorted({cap.scope for cap in limits}), limits, now=now)
    except LedgerUnavailable:
        standings = ()
    found: dict[tuple[str, str], Standing] = {(standing.scope, standing.window): standing for standing in standings}
    return [(cap, found.get((cap.scope, cap.window))) for cap in limits]


def _written(explanation: dict[str, Any]) -> str:
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
