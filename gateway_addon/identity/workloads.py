"""Verify identity tokens, and find the app whose workload one is.

Promises one order, for the gateway and for `explain`: form, issuer, key, signature, times, audience, subject, rule; any doubt is a
refusal. Nothing of a token is believed before its signature is right; no key, and no address of one, is read from a token. A token
whose workload is two apps' is nobody's. Pure: the keys are given, and the clock is.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gateway_addon.identity.assertion import Assertion, Malformed, parse
from gateway_addon.identity.trust import SPIFFE, Issuer, Trust, WorkloadRule
from gateway_addon.names import PROGRAM, safe_name
from gateway_addon.refusals import Refusal

if TYPE_CHECKING:
    from gateway_addon.identity.key_set import KeySet

SUBJECT_CHARS_MAX = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """A verified workload, as which it is known, until when (unix seconds), and by which rule it is an app's."""

    app: str
    issuer: str
    subject: str
    expires_at: float
    rule: str
    """The rule's digest."""

    @property
    def digest(self) -> str:
        """Return the digest by which the ledger finds the token row of this workload."""
        return workload_digest(self.app, self.issuer, self.subject)


def workload_digest(app: str, issuer: str, subject: str) -> str:
    """Return the digest of a workload's token row: no token has it, since no token is this text."""
    return hashlib.sha256(f"workload\0{app}\0{issuer}\0{subject}".encode()).hexdigest()


@lru_cache(1024)
def rule_digest(rule: WorkloadRule) -> str:
    """Return a digest of all that a rule says: a session is in force while its app has the rule that it came in by."""
    return hashlib.sha256(repr((rule.issuer, rule.subject, rule.claims)).encode()).hexdigest()[:32]


def read(token: str, trust: Trust) -> tuple[Assertion, Issuer] | Refusal:
    """Parse a token, and find its issuer among those trusted: nobody else is asked for keys."""
    try:
        assertion = parse(token)
    except Malformed as error:
        return invalid(f"The identity token {error}. Send the token that the issuer gave out, whole and unchanged")
    issuer = _issuer(assertion.claims, trust)
    if issuer is None:
        return invalid(
            f"The identity token is from the issuer {shown(assertion.claims.get('iss'))}, which is none of {_listed(trust.issuers)} "
            "(gateway.yaml: issuers). Name its `iss` there to the letter, or get the token from one of these"
        )
    if assertion.algorithm not in issuer.algorithms:
        return invalid(
            f"The identity token is signed by {shown(assertion.algorithm)}, and {issuer.name} signs by {_listed(issuer.algorithms)} "
            f"(gateway.yaml: issuers.{issuer.name}.algorithms)"
        )
    return assertion, issuer


def _issuer(claims: Mapping[str, Any], trust: Trust) -> Issuer | None:
    """Return the issuer that a token names, or, where it names none, the one whose trust domain its SPIFFE id is in."""
    if "iss" in claims:
        named = claims["iss"]
        return trust.issuers.get(named) if isinstance(named, str) and not named.startswith(SPIFFE) else None
    subject = claims.get("sub")
    if not isinstance(subject, str) or not subject.startswith(SPIFFE):
        return None
    return trust.issuers.get(SPIFFE + subject.removeprefix(SPIFFE).partition("/")[0])


type Step = Callable[[Assertion, Issuer, "KeySet", Trust, float], Refusal | None]


def _key(assertion: Assertion, issuer: Issuer, keys: "KeySet", trust: Trust, now: float) -> Refusal | None:
    if keys.has(assertion.key_id):
        return None
    which = "names no key (kid), and there are several" if assertion.key_id is None else f"is signed with the key {shown(assertion.key_id)}"
    return invalid(f"The identity token {which}; the issuer {issuer.name} publishes {_listed(key.key_id or '?' for key in keys.keys)}")


def _signature(assertion: Assertion, issuer: Issuer, keys: "KeySet", trust: Trust, now: float) -> Refusal | None:
    if keys.is_signed(assertion):
        return None
    return invalid(f"The identity token's signature is not that of a key of {issuer.name}. Send the token whole and unchanged")


def _times(assertion: Assertion, issuer: Issuer, keys: "KeySet", trust: Trust, now: float) -> Refusal | None:
    times: dict[str, float] = {}
    for name in ("exp", "iat", "nbf"):
        value = assertion.claims.get(name)
        if value is None and name == "nbf":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            what = "missing" if value is None else "no time"
            return invalid(f"The identity token's {name} is {what}; it must be a number of unix seconds")
        times[name] = value
    if (over_s := now - times["exp"]) > issuer.skew_s:
        return Refusal(
            "identity_expired",
            f"The identity token expired {over_s:,.0f} s ago. Get a new one from {issuer.name}; the SDKs do so by themselves where the "
            "token is in a file that is kept fresh.",
        )
    for name in ("iat", "nbf"):
        if (ahead_s := times.get(name, 0) - now) > issuer.skew_s:
            return invalid(
                f"The identity token's {name} is {ahead_s:,.0f} s ahead of this gateway's clock, and {issuer.skew_s:g} s are allowed "
                f"(gateway.yaml: issuers.{issuer.name}.skew). Set the clock of the gateway, or of the issuer"
            )
    if (lifetime_s := times["exp"] - times["iat"]) > issuer.lifetime_s:
        return invalid(
            f"The identity token is good for {lifetime_s:,.0f} s, and {issuer.lifetime_s:,.0f} s are allowed (gateway.yaml: "
            f"issuers.{issuer.name}.lifetime). Ask for a shorter one, or raise it there"
        )
    return None


def _audience(assertion: Assertion, issuer: Issuer, keys: "KeySet", trust: Trust, now: float) -> Refusal | None:
    if trust.audience in audiences(assertion.claims):
        return None
    return invalid(
        f"The identity token is for {shown(assertion.claims.get('aud'))}, and this gateway takes those for {trust.audience} (gateway.yaml: "
        "audience). Ask the issuer for a token for that audience"
    )


def _subject(assertion: Assertion, issuer: Issuer, keys: "KeySet", trust: Trust, now: float) -> Refusal | None:
    subject = assertion.claims.get("sub")
    if isinstance(subject, str) and 0 < len(subject) <= SUBJECT_CHARS_MAX and subject.isprintable():
        return None
    return invalid(f"The identity token's sub must be a text of 1 to {SUBJECT_CHARS_MAX} characters that can be seen")


STEPS: tuple[tuple[str, Step], ...] = (
    ("key", _key), ("signature", _signature), ("times", _times), ("audience", _audience), ("subject", _subject),
)  # fmt: skip
"""Checks of a token between its issuer and the rules, in this order."""


def judge(assertion: Assertion, issuer: Issuer, keys: "KeySet", trust: Trust, now: float) -> Workload | Refusal:
    """Verify a token that `read` has parsed, and find whose it is."""
    for _, step in STEPS:
        if (refusal := step(assertion, issuer, keys, trust, now)) is not None:
            return refusal
    return whose(assertion.claims, issuer, trust)


def whose(claims: Mapping[str, Any], issuer: Issuer, trust: Trust) -> Workload | Refusal:
    """Find the one app whose workload these verified claims are of."""
    found = [each for each in trust.rules.get(issuer.url, ()) if mismatch(each.rule, claims) is None]
    apps = dict.fromkeys(each.app for each in found)
    if len(apps) > 1:
        return Refusal(
            "identity_ambiguous",
            f"The workload {shown(claims['sub'])} is {' and '.join(apps)} at once: rules of both match it (workloads). Make them exclude "
            "each other: what is two apps' is booked for none.",
        )
    if not found:
        return Refusal("identity_unknown", _unknown(claims, issuer, trust))
    app, rule = found[0]
    return Workload(app, issuer.url, claims["sub"], claims["exp"], rule_digest(rule))


def mismatch(rule: WorkloadRule, claims: Mapping[str, Any]) -> str | None:
    """Return why a rule does not match claims, None where it does. Values are compared to the letter."""
    subject = claims.get("sub")
    if rule.subject is not None:
        fits = subject == rule.subject
        if rule.subject.endswith("*"):
            fits = isinstance(subject, str) and subject.startswith(rule.subject[:-1])
        if not fits:
            return f"sub is {shown(subject)}, not {rule.subject}"
    for name, wanted in rule.claims:
        value = claims.get(name)
        if value != wanted:
            return f"{name} is {_found(name, value, claims)}, not {wanted}"
    return None


def described(rule: WorkloadRule) -> str:
    """Return a rule in words."""
    subject = [] if rule.subject is None else [f"subject {rule.subject}"]
    return ", ".join([*subject, *(f"{name} {value}" for name, value in rule.claims)])


def _found(name: str, value: object, claims: Mapping[str, Any]) -> str:
    """Describe a claim's value, and why a value that looks right does not match."""
    if value is None:
        left_out = claims.get("_claim_names")
        overage = isinstance(left_out, dict) and name in left_out
        return "left out by the issuer, because it has too many values (overage)" if overage else "missing"
    return shown(value) if isinstance(value, str) else f"{shown(value)}, which is no text (only texts match)"


def audiences(claims: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the audiences of a token; none where they are anything but a text or a list of texts."""
    found = claims.get("aud")
    several: list[Any] = found if isinstance(found, list) else [found]
    return tuple(several) if all(isinstance(each, str) for each in several) else ()


def _unknown(claims: Mapping[str, Any], issuer: Issuer, trust: Trust) -> str:
    seen = f"iss {shown(issuer.url)}, sub {shown(claims['sub'])}, aud {shown(claims.get('aud'))}"
    overage = " The issuer left out claims that have too many values (overage); none of them can match." if "_claim_names" in claims else ""
    return (
        f"The identity token is good, and no app has a rule for its workload: {seen}.{overage} To let it in, add to an app's file: "
        f"workloads: [{{issuer: {issuer.name}, subject: {shown(claims['sub'])!r}}}]. {PROGRAM} explain --identity FILE shows the rest."
    )


def invalid(clause: str) -> Refusal:
    """Return the refusal of a token that is not believed."""
    return Refusal("identity_invalid", f"{clause}.")


def shown(value: object) -> str:
    """Return a claim as a sentence may show it: cut, and without control characters."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(each) for each in value[:5])}]"
    return safe_name(value if isinstance(value, str) else repr(value)) or "empty"


def _listed(names: Any) -> str:
    several = [safe_name(each) for each in names]
    return ", ".join(several[:8]) + (" and more" if len(several) > 8 else "") if several else "none"
