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

    Exits 1 where the request would be refused. What a rule that is only observed would refuse is said, and passes.
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
    explanation: dict[str, Any] = {"app": app.name, "rewritten": changes, "rules": [], "quote": None, "caps": [], "observed": []}
    if isinstance(read, Refusal):
        return explanation | {"refused": _refusal(read)}
    verdicts = list(trail(app, read, policy.prices))
    explanation["rules"] = [verdict._asdict() for verdict in verdicts]
    refusing = [verdict for verdict in verdicts if verdict.code]
    observed: list[Verdict | Refusal] = [verdict for verdict in refusing if app.observes(verdict.rule)]
    refused: Verdict | Refusal | None = next((verdict for verdict in refusing if not app.observes(verdict.rule)), None)
    bound = quote(read, app, policy.prices, now)
    if isinstance(bound, Quote):
        limits = caps(policy, app)
        explanation["quote"] = _quote(bound)
        explanation["caps"] = [_cap(cap, bound, standing) for cap, standing in _standings(ledger, limits, now)]
        if not read.stream or app.reserve == "full":  # a stream may be held in steps: only its first one must fit
            own = [cap["cap"].startswith("app:") and app.observes("caps") for cap in explanation["caps"]]
            too_large = [_too_large(cap, bound) for cap in explanation["caps"]]
            observed += [each for each, only_seen in zip(too_large, own, strict=True) if each and only_seen]
            refused = refused or next((each for each, only_seen in zip(too_large, own, strict=True) if each and not only_seen), None)
    else:
        refused = refused or bound
    return explanation | {"observed": [_refusal(each) for each in observed], "refused": refused and _refusal(refused)}


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


def _too_large(cap: dict[str, Any], bound: Quote) -> Refusal | None:
    """What a cap says to a call that is held whole and does not fit it."""
    if cap["fits"]:
        return None
    largest = f"{cap['largest_max_tokens']:,}" if cap["largest_max_tokens"] else "none"
    sentence = f"the call can cost up to {dollars(bound.total_nano)}, more than is left of {cap['cap']} ({cap['amount']})"
    return Refusal("quote_over_cap", f"{sentence}; the largest max_tokens that fits: {largest}")


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
    lines += ["", *(f"observed, so let pass and recorded: {each['code']}: {each['sentence']}" for each in explanation["observed"])]
    lines.append(f"refused: {refused['code']}: {refused['sentence']}" if refused else "allowed by the policy")
    return "\n".join(lines).lstrip("\n")


def _fits(cap: dict[str, Any]) -> str:
    if cap["fits"]:
        return "fits"
    return f"too large; max_tokens {cap['largest_max_tokens']:,} would fit" if cap["largest_max_tokens"] else "too large, its input alone"
