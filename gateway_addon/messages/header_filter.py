"""Choose the headers that cross between an app and the provider: which of a request leave, which of an answer come in.

Promises that only those request headers leave that the API knows or the policy adds by name: cookies, a caller's address and a front
proxy's headers stay here, and so does a beta that belongs to the app's own credential. Answer headers about the account that all apps
share, headers that only the gateway sets, and hop-by-hop headers stay out. Pure; values stay as they came.
"""

import re
from collections.abc import Iterable

type Fields = tuple[tuple[bytes, bytes], ...]

OWN = frozenset({
    b"host", b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade",
    b"http2-settings", b"expect", b"x-api-key", b"authorization", b"proxy-authorization", b"x-forwarded-for",
})  # fmt: skip
"""Request headers that the gateway writes itself, or that end here: no policy lets them leave."""
OWN_PREFIX = b"x-gateway-"
"""Begins the headers that apps say to the gateway alone (labels), and those that it says to them."""
_KNOWN = frozenset({
    b"content-type", b"content-encoding", b"accept", b"accept-encoding", b"user-agent",
    b"x-app", b"x-client-request-id", b"idempotency-key",
})  # fmt: skip
_KNOWN_PREFIXES = (b"anthropic-", b"x-anthropic-", b"x-stainless-", b"x-claude-", b"x-cc-", b"x-environment-")
_STAYS_OUT = frozenset({
    b"x-should-retry", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"te", b"trailer", b"upgrade", b"alt-svc",
})  # fmt: skip
_STAYS_OUT_PREFIXES = (
    OWN_PREFIX, b"anthropic-ratelimit-", b"anthropic-priority-", b"anthropic-organization-id", b"anthropic-workspace-id",
)  # fmt: skip
_CREDENTIAL_BETAS = (b"oauth-", b"oidc-")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]+")


def leaving(fields: Fields, passed: Iterable[str]) -> tuple[Fields, tuple[bytes, ...]]:
    """Return the request headers that leave, and the names of dropped ones that are worth a line in the log.

    `passed`: names that the policy adds, in lower case.
    """
    known, kept, dropped = _KNOWN.union(name.encode() for name in passed), [], []
    for name, value in fields:
        lower = name.lower()
        if lower in OWN or lower.startswith(OWN_PREFIX):
            continue
        if lower in known or lower.startswith(_KNOWN_PREFIXES):
            kept.append((name, value))
        else:
            dropped.append(lower)
    return tuple(kept), tuple(dropped)


def without_credential_betas(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Drop the betas that go with an OAuth or OIDC credential: it ends here, and the real key is none."""
    kept = []
    for name, value in fields:
        if name.lower() == b"anthropic-beta" and any(beta in value.lower() for beta in _CREDENTIAL_BETAS):
            value = b",".join(beta for beta in value.split(b",") if not beta.strip().lower().startswith(_CREDENTIAL_BETAS))
            if not value.strip():
                continue
        kept.append((name, value))
    return tuple(kept)


def coming_in(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Return the answer headers that the app gets; one whose value holds control characters is dropped."""
    return tuple([
        (name, value) for name, value in fields
        if (lower := name.lower()) not in _STAYS_OUT and not lower.startswith(_STAYS_OUT_PREFIXES) and not _CONTROL.search(value)
    ])  # fmt: skip


def plain_reason(reason: bytes) -> bytes:
    """Return a reason phrase with a blank for each run of control characters: an app's log shows it as it is."""
    return _CONTROL.sub(b" ", reason)
