"""Explain what would happen to a request: every rule's verdict, what the call is quoted at, which caps it fits. Nothing is sent or held.

Promises the verdict, code and sentence that the gateway would come to at that moment (where calls in flight hold what is missing: if
none of them ended during the wait, and how long that is), by the gateway's own judgements, as plain data and in words. Asked by
`gateway explain` and by the command of that name in mitmweb.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gateway_addon.calls.admission import Caller, new_call
from gateway_addon.calls.authentication import Rejected, judge_caller
from gateway_addon.calls.judging import judge_request
from gateway_addon.calls.planning import fits_request_cap, judge_plan, plan
from gateway_addon.calls.queue import wait_s
from gateway_addon.calls.quote import Quote, quote
from gateway_addon.calls.refusal_messages import denied
from gateway_addon.calls.reservation_options import ReservationOption, reservation_options, rewritten
from gateway_addon.calls.workspace import foreign_file
from gateway_addon.ledger import (
    CallFacts,
    Denied,
    LedgerUnavailable,
    NewCall,
    ServerAddress,
    Standing,
    Token,
    TokenLookup,
    connect,
    ownership,
    reservations,
    state,
)
from gateway_addon.ledger.denials import judge_caps
from gateway_addon.messages.request import ParsedRequest, Request, edited, is_fast, read
from gateway_addon.money import dollars
from gateway_addon.operations.tables import table
from gateway_addon.policy import AppPolicy, Cap, GatewayPolicy, RuleVerdict, caps, token_cap, trail
from gateway_addon.pricing import retired
from gateway_addon.refusals import Refusal

type FindToken = Callable[[connect.ReadConnection], Token | None]


class Known(NamedTuple):
    """All that the ledger knows that bears on a request. `problem`: why it could not be read; then it is taken to be empty."""

    lookup: TokenLookup
    facts: CallFacts
    upstream_limits: Mapping[str, tuple[str, float]]
    owners: Mapping[str, str]
    """Apps by the ids of the files that they uploaded."""
    call: NewCall
    limits: Sequence[Cap]
    """Every cap that the call stands under."""
    problem: str | None = None


def explain(
    policy: GatewayPolicy,
    app: AppPolicy,
    request: Request,
    ledger: Path | ServerAddress,
    now: float,
    find_token: FindToken | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Return everything that the gateway would find out about a request to /v1/messages, as plain data.

    `find_token` None: a token in force is assumed. `address` None: where it comes from is not judged.
    """
    asked = read("messages", request)
    files = set(asked.found.files) if isinstance(asked, ParsedRequest) else set()
    known = _known(policy, app, request, ledger, files, find_token, now)
    request = _sent_with(known.lookup.token, request)
    asked, limits = read("messages", request), known.limits
    caller = judge_caller(known.lookup, address, request.headers, "messages", policy, now)
    refused = caller.refusal if isinstance(caller, Rejected) else None
    explanation: dict[str, Any] = {
        "app": app.name, "rewritten": {}, "rules": [], "quote": None, "caps": [], "observed": [], "note": None,
        "assumed": _assumed(app, known, address), "waits_s": 0.0, "refused": None,
    }  # fmt: skip
    overruns = known.lookup.overruns
    judged = judge_request(app, policy.prices, "messages", request, overruns, now)
    if isinstance(judged, Refusal) or isinstance(asked, Refusal):
        return explanation | {"refused": _refusal(refused or _first_refusal(judged, asked))}
    changes = rewritten(app, policy.prices, asked, overrun=asked.model in overruns, now=now)
    _, parsed = edited("messages", request, changes) if changes else (request, asked)
    assert isinstance(parsed, ParsedRequest)
    verdicts = list(trail(app, parsed, policy.prices))
    observed: list[RuleVerdict | Refusal] = [verdict for verdict in verdicts if verdict.code and app.observes(verdict.rule)]
    quoted = judged.verdict if isinstance(judged.verdict, Quote) else quote(parsed, app, policy.prices, now)
    refused = refused or (judged.verdict if isinstance(judged.verdict, Refusal) else None) or foreign_file(app, files, known.owners)
    explanation |= {
        "rewritten": changes,
        "rules": [verdict._asdict() for verdict in verdicts],
        "note": retired(policy.prices, parsed.model, now, fast=is_fast(parsed.body)),
    }
    if isinstance(quoted, Quote):
        least = reservation_options(quoted, app, policy, parsed, limits, overrun=parsed.model in overruns, now=now)[-1]
        standings: dict[tuple[str, str], Standing] = {(standing.scope, standing.window): standing for standing in known.facts.standings}
        explanation["quote"] = _quote(quoted) | {"held_at_first": dollars(least.hold_nano) if least.hold_nano < quoted.total_nano else None}
        explanation["caps"] = [_cap(app, cap, quoted, least, standings.get((cap.scope, cap.window)), known.problem, now) for cap in limits]
        by_money, waits_s, seen = _judge_money(policy, app, parsed, quoted, known, now)
        explanation["waits_s"] = 0.0 if refused else waits_s
        refused, observed = refused or by_money, [*observed, *seen]
    return explanation | {"observed": [_refusal(each) for each in observed], "refused": refused and _refusal(refused)}


def _first_refusal(*found: object) -> Refusal:
    return next(each for each in found if isinstance(each, Refusal))


def _judge_money(
    policy: GatewayPolicy, app: AppPolicy, parsed: ParsedRequest, quoted: Quote, known: Known, now: float
) -> tuple[Refusal | None, float, list[Refusal]]:
    """Return the refusal of a quoted call by caps, rates and concurrency, the wait before it, and what observed ones would have said."""
    asked = plan(app, policy, known.call, parsed, quoted, known.upstream_limits, known.lookup.overruns, now)
    if isinstance(asked, Refusal):
        return asked, 0.0, []
    verdict = judge_plan(asked, known.facts, quoted.input_tokens, now)

    def said(denial: Denied) -> Refusal:
        return denied(denial, app, quoted, verdict.option, policy.zone)

    refused = None if verdict.denied is None else said(verdict.denied)
    waits_s = 0.0 if verdict.denied is None else wait_s(verdict.denied, app.rates.wait_s)
    return refused, waits_s, [*asked.notes, *map(said, verdict.observed)]


def _known(
    policy: GatewayPolicy,
    app: AppPolicy,
    request: Request,
    ledger: Path | ServerAddress,
    files: set[str],
    find_token: FindToken | None,
    now: float,
) -> Known:
    """Read all that the ledger knows, in one look."""
    assumed = Token(0, app.name, "", now, None, None)

    def call_of(token: Token | None) -> tuple[NewCall, tuple[Cap, ...]]:
        token = token or assumed
        sent = _sent_with(token, request)
        judged = judge_request(app, policy.prices, "messages", sent, frozenset(), now)
        if isinstance(judged, Refusal):
            return NewCall(app.name, app.team, token.id), caps(policy, app)
        call = new_call(Caller(app, token, "messages", policy, frozenset(), now), judged, sent, "")
        return call, caps_of(call)

    def caps_of(call: NewCall) -> tuple[Cap, ...]:
        return (*caps(policy, app, call.parts, last_call=call.last_call), *token_cap(call))

    try:
        with connect.reading(ledger) as db:
            token = assumed if find_token is None else find_token(db)
            call, limits = call_of(token)
            pauses = reservations.facts(db, call, (), now=now).pauses
            with suppress(LedgerUnavailable):  # the policy is not in force yet, and no balance is kept of what it caps
                call = reservations.counted_now(db, call, limits, now=now)
                limits = caps_of(call)
            facts = reservations.facts(db, call, limits, now=now)._replace(token=token, pauses=pauses)
            lookup = TokenLookup(token, state.pauses(db, now), state.overruns(db))
            return Known(lookup, facts, state.ratelimits(db), ownership.owners(db, files), call, limits)
    except LedgerUnavailable as error:
        call, limits = call_of(assumed)
        untouched = [Standing(cap.scope, cap.window, 0, None, cap.amount_nano, 0, 0, 0, 0, 0) for cap in limits if cap.window != "request"]
        return Known(TokenLookup(assumed), CallFacts(assumed, (), tuple(untouched)), {}, {}, call, limits, str(error))


def _sent_with(token: Token | None, request: Request) -> Request:
    """Return a request with the labels of the token that it is sent with."""
    return request if token is None or not token.labels else replace(request, fixed_labels=token.labels)


def _assumed(app: AppPolicy, known: Known, address: str | None) -> list[str]:
    """Say what the verdict takes for granted, a sentence each."""
    sentences = [] if known.problem is None else [f"nothing is spent, held or paused, because {known.problem}"]
    if app.addresses and address is None:
        sentences.append(f"the call comes from one of {', '.join(map(str, app.addresses))} ({app.file}: addresses)")
    return sentences


def _refusal(refused: RuleVerdict | Refusal) -> dict[str, Any]:
    return {"code": refused.code, "sentence": refused.sentence}


def _quote(bound: Quote) -> dict[str, Any]:
    return {
        "total": dollars(bound.total_nano),
        "total_nano": bound.total_nano,
        "parts": [{"name": part.name, "tokens": part.tokens, "rate": part.rate, "nano": part.nano} for part in bound.parts],
        "price_rows": bound.price_rows,
        "input_released_at_message_start": bound.releasable,
    }


def _cap(
    app: AppPolicy, cap: Cap, bound: Quote, least: ReservationOption, standing: Standing | None, problem: str | None, now: float
) -> dict[str, Any]:
    """Return one cap, what is left of it (all, where there is no ledger yet), and whether this call may start."""
    if standing is None:  # the cap of a request, which the ledger knows nothing of
        amount_nano = left_nano = cap.amount_nano
        fits = fits_request_cap(app, least.hold_nano)
    else:
        amount_nano = cap.amount_nano if standing.cap_nano is None else standing.cap_nano
        left_nano = amount_nano - standing.spent_nano - standing.reserved_nano - standing.quantum_nano
        fits = judge_caps((standing,), least.hold_nano, least.quantum_nano, now) is None
    counted = standing is not None and problem is None
    return {
        "cap": f"{cap.scope} {cap.window}",
        "amount": dollars(amount_nano),
        "raised": dollars(standing.raised_nano) if standing and standing.raised_nano else None,
        "limit": dollars(standing.limit_nano) if standing and standing.limit_nano is not None else None,
        "spent": dollars(standing.spent_nano) if standing and counted else None,
        "held": dollars(standing.reserved_nano) if standing and counted else None,
        "fits": fits,
        "largest_max_tokens": bound.output_within(left_nano),
    }


def written(explanation: dict[str, Any]) -> str:
    """Return the explanation for people: rules, quote, caps, verdict."""
    rules = [("no" if rule["code"] else "ok", rule["rule"], rule["sentence"]) for rule in explanation["rules"]]
    lines = [table(rules)]
    if explanation["rewritten"]:
        lines.append("rewritten by the policy: " + ", ".join(f"{name} = {value}" for name, value in explanation["rewritten"].items()))
    if explanation["quote"]:
        parts = [(p["name"], f"{p['tokens']:,}", p["rate"], dollars(p["nano"])) for p in explanation["quote"]["parts"]]
        parts.append(("at most", "", "", explanation["quote"]["total"]))
        lines += ["", table(parts, ("quote", "tokens", "price", "worst case"), right=("tokens", "worst case"))]
        if explanation["quote"]["held_at_first"]:
            lines.append(f"held in steps: {explanation['quote']['held_at_first']} to begin with")
        lines.append("prices: " + ", ".join(explanation["quote"]["price_rows"]))
    if explanation["caps"]:
        amounts = ("amount", "raised", "limit", "spent", "held")
        rows = [[cap["cap"], *(cap[name] for name in amounts), _fits(cap)] for cap in explanation["caps"]]
        lines += ["", table(rows, ("cap", *amounts, "this call"), right=amounts, drop_empty=("raised", "limit"))]
    refused = explanation["refused"]
    lines += ["", *(f"observed, so let pass and recorded: {each['code']}: {each['sentence']}" for each in explanation["observed"])]
    lines += [f"taken for granted: {each}" for each in explanation["assumed"]]
    if explanation["note"]:
        lines.append(f"the Claude API would refuse it: {explanation['note']}")
    if explanation["waits_s"]:
        lines.append(f"it waits up to {explanation['waits_s']:g} s in line for calls in flight to end; if that does not help:")
    lines.append(f"refused: {refused['code']}: {refused['sentence']}" if refused else "allowed by the policy")
    return "\n".join(lines).lstrip("\n")


def _fits(cap: dict[str, Any]) -> str:
    if cap["fits"]:
        return "fits"
    largest = cap["largest_max_tokens"]
    return f"too large; max_tokens {largest:,} would fit" if largest else "too large, whatever its max_tokens"
