"""Check whom a policy trusts: issuers of identity tokens in gateway.yaml, and an app's workloads in its own file.

Promises that no rule is so wide that a stranger's token could match it: each names a subject or claims, a beginning of a subject stands
beside a claim that is an id, and two apps never have the same rule.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from urllib.parse import urlsplit

from yaml.nodes import Node

from gateway_addon.identity.assertion import Malformed, strict_object
from gateway_addon.identity.trust import ALGORITHMS, SPIFFE, AppRule, Issuer, KeySource, Trust, WorkloadRule
from gateway_addon.identity.workloads import described
from gateway_addon.names import NAME_FORM
from gateway_addon.policy.model import AppPolicy
from gateway_addon.yaml_file import FileError as PolicyError
from gateway_addon.yaml_file import Problems, Spot, items, suggestion

JUDGED = ("aud", "exp", "iat", "iss", "jti", "nbf", "sub")
"""Claims that are judged without a rule, or tell nothing of who it is."""
GITHUB = "https://token.actions.githubusercontent.com"
_ID = re.compile(r"(.*_)?o?id")
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")


def web_address(value: str) -> str:
    """Return an https address, or a plain http one of this machine, as it is written. Raises ValueError."""
    parts = urlsplit(value)
    plain = parts.scheme == "http" and _LOOPBACK.fullmatch(parts.hostname or "") is not None
    if not parts.hostname or not (parts.scheme == "https" or plain) or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{value!r} must be an https address without a query (plain http only to a loopback address)")
    return value


def issuer_address(value: str) -> str:
    """Return an issuer's `iss`, to the letter, or a trust domain of SPIFFE. Raises ValueError."""
    if value.startswith(SPIFFE):
        if re.fullmatch(r"[a-z0-9._-]+", value.removeprefix(SPIFFE)) is None:
            raise ValueError(f"{value!r} must be a trust domain alone, like spiffe://example.org")
        return value
    return web_address(value)


def inline_keys(value: str) -> str:
    """Return a JWK set that stands in the policy. Raises ValueError."""
    try:
        members = strict_object(value.encode()).get("keys")
    except Malformed as error:
        raise ValueError(f"the JWK set {error}") from None
    if not isinstance(members, list) or not members or not all(isinstance(each, dict) for each in members):
        raise ValueError('must be a JWK set with its keys, like {"keys": [{"kty": "RSA", ...}]}')
    return value


def issuer(url: str, keys: KeySource, algorithms: tuple[str, ...], lifetime: float, skew: float) -> Issuer:
    """Make an issuer that has no name yet: it stands in front of it."""
    return Issuer("", url, keys, algorithms, lifetime_s=lifetime, skew_s=skew)


def rule(issuer: str, subject: str | None, claims: Mapping[str, str]) -> WorkloadRule:
    """Make a rule that has its issuer's name in the place of the issuer's address."""
    return WorkloadRule(issuer, subject, tuple(sorted(claims.items())))


def named_issuers(file: str, found: Mapping[str, Issuer], audience: str | None, name_pattern: str) -> Mapping[str, Issuer]:
    """Return the issuers with their names. Raises PolicyError where they contradict each other, or lack what they need."""
    problems = Problems()

    def must(holds: object, where: str, sentence: str) -> None:
        with problems.noted():
            if not holds:
                raise PolicyError(f"{file}: {where}: {sentence}")

    must(audience or not found, "audience", "is missing: identity tokens are for somebody; name yourself, like https://gateway.internal")
    must(found or not audience, "audience", "has no effect without issuers; name them, or leave it out")
    named = {name: replace(each, name=name) for name, each in found.items()}
    for name, each in named.items():
        where = f"issuers.{name}"
        must(re.fullmatch(name_pattern, name), where, f"not a name; use {NAME_FORM}")
        must(each.algorithms, f"{where}.algorithms", f"names none; known: {', '.join(ALGORITHMS)}")
        spiffe = each.url.startswith(SPIFFE)
        must(not spiffe or each.keys.kind != "discovery", f"{where}.keys", "is missing: a trust domain has no document; name its bundle")
        twin = next((other for other, its in named.items() if other < name and its.url == each.url), None)
        must(twin is None, f"{where}.url", f"is that of {twin} too; keep one")
    problems.say()
    return MappingProxyType(named)


def workload_rules(
    node: Node, spot: Spot, found: Iterable[WorkloadRule], issuers: Mapping[str, Issuer]
) -> tuple[WorkloadRule, ...]:
    """Return an app's rules with their issuers' addresses. Raises PolicyError for a rule that admits too much, or nobody."""
    rules, problems = [], Problems()
    for item, each in zip(items(node, spot), found, strict=True):
        with problems.noted():
            if (wrong := _problem(each, issuers)) is not None:
                raise spot.error(item, wrong)
            rules.append(replace(each, issuer=issuers[each.issuer].url))
    problems.say()
    return tuple(rules)


def _problem(rule: WorkloadRule, issuers: Mapping[str, Issuer]) -> str | None:
    if rule.issuer not in issuers:
        return f"no issuer {rule.issuer!r} in gateway.yaml{suggestion(rule.issuer, issuers)}"
    names = [name for name, _ in rule.claims]
    if judged := [name for name in names if name in JUDGED]:
        return f"the claim {judged[0]} is judged by itself; write subject for sub, and leave the others out"
    if rule.subject is None and not names:
        return "names neither a subject nor claims, and would let everybody in to whom this issuer gives tokens; say who it is"
    if rule.subject is not None and rule.subject.endswith("*"):
        if rule.subject == "*":
            return "the subject * is any; leave it out, and name claims"
        if not any(_ID.fullmatch(name) for name in names):
            return (
                f"the subject {rule.subject} is a beginning, which other people's names can have too; name a claim beside it that is "
                "an id, like repository_id or project_id"
            )
    return None


def trust(audience: str | None, issuers: Mapping[str, Issuer], apps: Mapping[str, AppPolicy]) -> Trust | None:
    """Return whom the whole policy trusts, None where it names no issuers. Raises PolicyError where two apps have one rule."""
    if audience is None:
        return None
    rules: dict[str, list[AppRule]] = defaultdict(list)
    owners: dict[WorkloadRule, AppPolicy] = {}
    problems = Problems()
    for app in apps.values():
        for each in app.workloads:
            with problems.noted():
                if (owner := owners.setdefault(each, app)) is not app:
                    raise PolicyError(f"{app.file}: workloads: {described(each)} is in {owner.file} too; a workload is one app's")
            rules[each.issuer].append(AppRule(app.name, each))
    problems.say()
    by_url = {each.url: each for each in issuers.values()}
    return Trust(audience, MappingProxyType(by_url), MappingProxyType({url: tuple(each) for url, each in rules.items()}))


def doubtful(apps: Mapping[str, AppPolicy]) -> list[str]:
    """Return a sentence for each rule that names a repository by its name alone, which somebody else may have one day."""
    return [
        f"{app.file}: workloads: the subject {each.subject} is a repository's name, which somebody else can have once it is renamed or "
        "deleted; name repository_id beside it"
        for app in apps.values()
        for each in app.workloads
        if each.issuer == GITHUB and each.subject and "@" not in each.subject and not any(_ID.fullmatch(name) for name, _ in each.claims)
    ]
