"""Explain what would happen to an identity token: every check, every rule of every app, and whose it is.

Promises the verdict that the gateway would come to at that moment, by the gateway's own judgements, as plain data and in words; nothing
is minted, and nothing is written. The token itself is in neither.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway_addon.calls.refusal_messages import in_force
from gateway_addon.identity import workloads
from gateway_addon.identity.assertion import Assertion
from gateway_addon.identity.key_cache import KeysUnavailable
from gateway_addon.identity.trust import AppRule, Issuer, Trust
from gateway_addon.identity.workloads import Workload
from gateway_addon.ledger import LedgerUnavailable, ServerAddress, connect, state
from gateway_addon.operations.tables import table
from gateway_addon.refusals import Refusal

if TYPE_CHECKING:
    from gateway_addon.identity.key_set import KeySet


def explain(
    token: str, trust: Trust, keys_of: Callable[[Issuer], "KeySet"], ledger: Path | ServerAddress, now: float
) -> dict[str, Any]:
    """Return everything that the gateway would find out about an identity token. `keys_of` raises KeysUnavailable."""
    explanation: dict[str, Any] = {"checks": [], "claims": {}, "rules": [], "assumed": [], "app": None, "refused": None}
    found = workloads.read(token, trust)
    if isinstance(found, Refusal):
        return explanation | {"checks": [_check("form and issuer", found)], "refused": _refusal(found)}
    assertion, issuer = found
    explanation |= {"claims": assertion.claims, "rules": _rules(assertion, trust.rules.get(issuer.url, ()))}
    try:
        keys = keys_of(issuer)
    except KeysUnavailable as error:
        unavailable = Refusal("identity_unavailable", f"The keys of the issuer {issuer.name} cannot be fetched: {error}.")
        return explanation | {"checks": [_known(assertion, issuer), _check("key", unavailable)], "refused": _refusal(unavailable)}
    checks = [(name, step(assertion, issuer, keys, trust, now)) for name, step in workloads.STEPS]
    verdict = workloads.judge(assertion, issuer, keys, trust, now)
    if isinstance(verdict, Workload):
        verdict, explanation["assumed"] = _not_revoked(verdict, ledger, now)
    refused = verdict if isinstance(verdict, Refusal) else None
    return explanation | {
        "checks": [_known(assertion, issuer), *(_check(name, refusal or _facts(name, assertion)) for name, refusal in checks)],
        "app": verdict.app if isinstance(verdict, Workload) else None,
        "refused": refused and _refusal(refused),
    }


def _known(assertion: Assertion, issuer: Issuer) -> dict[str, str | None]:
    signed = f"{assertion.algorithm}, key {assertion.key_id or 'not named'}"
    return _check("form and issuer", f"{signed}, from {issuer.name} ({issuer.url})")


def _check(name: str, found: Refusal | str) -> dict[str, str | None]:
    if isinstance(found, Refusal):
        return {"check": name, "code": found.code, "sentence": found.sentence}
    return {"check": name, "code": None, "sentence": found}


def _facts(name: str, assertion: Assertion) -> str:
    """Return what a check that passed has found."""
    claims = assertion.claims
    match name:
        case "times":
            return f"from {_time(claims['iat'])} to {_time(claims['exp'])}"
        case "audience":
            return workloads.shown(claims["aud"])
        case "subject":
            return workloads.shown(claims["sub"])
    return {"key": f"{assertion.key_id or 'the only one'} is published", "signature": "is right"}[name]


def _rules(assertion: Assertion, rules: Iterable[AppRule]) -> list[dict[str, Any]]:
    return [
        {"app": app, "rule": workloads.described(rule), "mismatch": workloads.mismatch(rule, assertion.claims)} for app, rule in rules
    ]


def _not_revoked(workload: Workload, ledger: Path | ServerAddress, now: float) -> tuple[Workload | Refusal, list[str]]:
    """Look whether the operator has revoked a workload; where the ledger cannot be read, say what is assumed."""
    try:
        with connect.reading(ledger) as db:
            token = state.look_up_token(db, workload.digest, now).token
    except LedgerUnavailable as error:
        return workload, [f"nobody has revoked it, because {error}"]
    refused = None if token is None else in_force(token, now)
    return (refused if isinstance(refused, Refusal) else workload), []


def _refusal(refusal: Refusal) -> dict[str, str]:
    return {"code": refusal.code, "sentence": refusal.sentence}


def _time(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{at:g}"


def written(explanation: dict[str, Any]) -> str:
    """Return the explanation for people: checks, claims, rules, verdict."""
    checks = [("no" if each["code"] else "ok", each["check"], each["sentence"]) for each in explanation["checks"]]
    lines = [table(checks)]
    if explanation["claims"]:
        claims = [(name, workloads.shown(value)) for name, value in explanation["claims"].items()]
        lines += ["", table(claims, ("claim", "value"))]
        rules = [(each["app"], each["rule"], each["mismatch"] or "matches") for each in explanation["rules"]]
        lines += ["", table(rules, ("app", "rule", "verdict")) if rules else "no app has a rule for this issuer (workloads)"]
    lines += ["", *(f"taken for granted: {each}" for each in explanation["assumed"])]
    refused = explanation["refused"]
    lines.append(f"refused: {refused['code']}: {refused['sentence']}" if refused else f"let in as app {explanation['app']}")
    return "\n".join(lines)
