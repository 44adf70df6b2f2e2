"""Describe whom the operator trusts beside tokens: issuers of identity tokens, and the workloads that are an app's. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

SPIFFE = "spiffe://"

ALGORITHMS: Mapping[str, tuple[str, str | None]] = MappingProxyType({
    "RS256": ("RSA", None), "RS384": ("RSA", None), "RS512": ("RSA", None),
    "PS256": ("RSA", None), "PS384": ("RSA", None), "PS512": ("RSA", None),
    "ES256": ("EC", "P-256"), "ES384": ("EC", "P-384"), "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
})  # fmt: skip
"""Algorithms by which an identity token may be signed, with the type and curve of their keys. None has a secret that two sides share."""


class KeySource(NamedTuple):
    """Where an issuer's keys are: what its discovery document names, at a `url`, in a `file`, or `inline` in the policy (JSON)."""

    kind: Literal["discovery", "url", "file", "inline"]
    value: str = ""


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer of identity tokens. `url` is its `iss` to the letter, or `spiffe://DOMAIN` for tokens that may come without one."""

    name: str
    url: str
    keys: KeySource
    algorithms: tuple[str, ...]
    lifetime_s: float
    """The longest time from `iat` to `exp`."""
    skew_s: float
    """By how much its clock and ours may differ."""


@dataclass(frozen=True, slots=True)
class WorkloadRule:
    """A workload that is an app: tokens of this issuer whose subject and claims are these, to the letter.

    `subject` ends in `*` for a beginning; None: any.
    """

    issuer: str
    """The issuer's `url`."""
    subject: str | None
    claims: tuple[tuple[str, str], ...]
    """Names and values, in the order of the names."""


class AppRule(NamedTuple):
    app: str
    rule: WorkloadRule


@dataclass(frozen=True, slots=True)
class Trust:
    """Every issuer and rule in force, and the one `audience` that an identity token must be for."""

    audience: str
    issuers: Mapping[str, Issuer]
    """By `url`."""
    rules: Mapping[str, tuple[AppRule, ...]]
    """By the issuer's `url`."""
