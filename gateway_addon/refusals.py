"""Every way in which the gateway says no, as values from one table.

Promises the API's own error shape, so that the official SDKs raise the right class, and on each refusal a status, a
retry advice and a code that a program can read. The sentences come from the rooms that refuse; this one imports nothing
of them. Why these statuses: Claude Code re-sends a 400 six times and waits out a 401 without `x-should-retry: false`.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class RefusalKind(NamedTuple):
    status: int
    error_type: str
    may_retry: bool
    """True only where waiting helps: everything else carries `x-should-retry: false`."""
    details: Mapping[str, Any] | None = None
    """The API's own `error.details`, where a client acts on them."""


TABLE: dict[str, RefusalKind] = {
    # who
    "token_missing": RefusalKind(401, "authentication_error", False),
    "token_malformed": RefusalKind(401, "authentication_error", False),
    "token_unknown": RefusalKind(401, "authentication_error", False),
    "token_revoked": RefusalKind(401, "authentication_error", False),
    "token_expired": RefusalKind(401, "authentication_error", False),
    "token_conflict": RefusalKind(401, "authentication_error", False),
    "token_address": RefusalKind(401, "authentication_error", False),
    "token_noise": RefusalKind(429, "rate_limit_error", False),
    "token_proxy": RefusalKind(407, "authentication_error", False),
    "identity_invalid": RefusalKind(401, "authentication_error", False),
    "identity_expired": RefusalKind(401, "authentication_error", False),
    "identity_unknown": RefusalKind(403, "permission_error", False),
    "identity_ambiguous": RefusalKind(403, "permission_error", False),
    "identity_unavailable": RefusalKind(503, "api_error", True),
    # what
    "app_unknown": RefusalKind(403, "permission_error", False),
    "app_paused": RefusalKind(403, "permission_error", False),
    "endpoint": RefusalKind(403, "permission_error", False),
    "browser": RefusalKind(403, "permission_error", False),
    "upgrade": RefusalKind(403, "permission_error", False),
    "model": RefusalKind(403, "permission_error", False),
    "model_unpriced": RefusalKind(403, "permission_error", False),
    "feature": RefusalKind(403, "permission_error", False),
    # the SDKs' tool_runner asks for a thread by itself, and goes on without one where it is told so
    "thread": RefusalKind(403, "permission_error", False, {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}),
    "unknown_field": RefusalKind(403, "permission_error", False),
    "max_tokens": RefusalKind(403, "permission_error", False),
    "requirement": RefusalKind(403, "permission_error", False),
    "label": RefusalKind(403, "permission_error", False),
    "replay": RefusalKind(403, "permission_error", False),
    "not_found": RefusalKind(404, "not_found_error", False),
    "unsettled": RefusalKind(409, "conflict_error", True),
    # how
    "body": RefusalKind(400, "invalid_request_error", False),
    "request": RefusalKind(400, "invalid_request_error", False),
    "too_large": RefusalKind(413, "request_too_large", False),
    # money
    "cap_spent": RefusalKind(429, "billing_error", False),
    "quote_over_cap": RefusalKind(429, "billing_error", False),
    "cap_held": RefusalKind(429, "rate_limit_error", True),
    "rate": RefusalKind(429, "rate_limit_error", True),
    "concurrency": RefusalKind(429, "rate_limit_error", True),
    "headroom": RefusalKind(429, "rate_limit_error", True),
    # the gateway itself
    "ledger": RefusalKind(503, "api_error", True),
    "crowded": RefusalKind(503, "api_error", True),
    "draining": RefusalKind(503, "api_error", True),
    "internal": RefusalKind(503, "api_error", False),
    "upstream_unreachable": RefusalKind(502, "api_error", True),
    "upstream_redirect": RefusalKind(502, "api_error", False),
    "upstream_timeout": RefusalKind(504, "timeout_error", True),
}

WORDS = {
    "token_missing": "no token was sent",
    "token_malformed": "not a token of this gateway",
    "token_unknown": "an unknown token",
    "token_revoked": "a revoked token",
    "token_expired": "an expired token",
    "token_conflict": "two tokens at once",
    "token_address": "an address that the app does not allow",
    "token_noise": "too many tries without a valid token",
    "token_proxy": "no token for the proxy",
    "identity_invalid": "an identity that cannot be verified",
    "identity_expired": "an expired identity",
    "identity_unknown": "an identity of no app",
    "identity_ambiguous": "an identity of several apps",
    "identity_unavailable": "the issuer's keys could not be read",
    "app_unknown": "the app has no policy file",
    "app_paused": "paused by the operator",
    "endpoint": "an endpoint that the policy does not allow",
    "browser": "called from a web page",
    "upgrade": "another protocol was asked for",
    "model": "a model that the policy does not allow",
    "model_unpriced": "a model without a price",
    "feature": "a feature that the policy does not allow",
    "thread": "a thread, which the policy does not allow",
    "unknown_field": "a field whose price is unknown",
    "max_tokens": "more max_tokens than the policy allows",
    "requirement": "lacks what the policy requires",
    "replay": "a replay of nobody's call",
    "label": "a label that the policy does not allow",
    "not_found": "not found, or another app's",
    "unsettled": "its batch is not settled yet",
    "body": "the body cannot be read",
    "request": "not a valid request",
    "too_large": "the body is too large",
    "cap_spent": "a cap is reached",
    "quote_over_cap": "the call alone could cost more than a cap",
    "cap_held": "calls in flight hold the rest of a cap",
    "rate": "more a minute than its rate allows",
    "concurrency": "more calls at once than the app may run",
    "headroom": "the shared key's own limit is near",
    "ledger": "the ledger could not be written",
    "crowded": "the gateway had too many calls at once",
    "draining": "the gateway was stopping",
    "internal": "a fault of the gateway",
    "upstream_unreachable": "the provider could not be reached",
    "upstream_redirect": "the provider answered with a redirect",
    "upstream_timeout": "the provider did not answer in time",
}
"""Each reason in words for a person, after "refused:"."""


ABOUT_LIMITS = frozenset({"app_paused", "cap_spent", "quote_over_cap", "cap_held", "rate", "concurrency", "headroom"})
"""Reasons whose sentence is kept with the call: it tells how matters stood at that moment, and nothing that stood in the request."""


def in_words(code: str) -> str:
    """Return the words for a code, also for one that a newer version has written."""
    return WORDS.get(code, code.replace("_", " "))


_FIRST_WORDS = frozenset({"a", "all", "an", "app", "batch", "call", "in", "no", "only", "team", "the", "there", "this"})
"""The words of English that begin a clause."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that goes no further. `sentence` names the thing, the limit and the way out."""

    code: str
    sentence: str
    retry_after_s: int | None = None
    more_headers: tuple[tuple[str, str], ...] = ()
    """Headers of this refusal beside those of every one."""

    @property
    def status(self) -> int:
        return TABLE[self.code].status

    @property
    def error_type(self) -> str:
        return TABLE[self.code].error_type

    def headers(self, request_id: str) -> dict[str, str]:
        headers = {"content-type": "application/json", "request-id": request_id, "x-gateway-refusal": self.code}
        if not TABLE[self.code].may_retry:
            headers["x-should-retry"] = "false"
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        return headers | dict(self.more_headers)

    def body(self, request_id: str) -> bytes:
        """Return the API's error envelope (platform documentation, "Errors")."""
        error: dict[str, Any] = {"type": self.error_type, "message": self.sentence}
        if (details := TABLE[self.code].details) is not None:
            error["details"] = details
        return json.dumps({"type": "error", "error": error, "request_id": request_id}).encode()


def stated(code: str, clause: str) -> Refusal:
    """Return the refusal for a rule's clause: `explain` lists the clause under its rule, a caller gets it as a full sentence.

    A field name (`max_tokens`, `tools`) keeps its spelling at the beginning, too.
    """
    return Refusal(code, f"{capitalised(clause)}.")


def capitalised(clause: str) -> str:
    """Begin a sentence: with a capital where the clause begins with a word of English, not with a field's name."""
    return clause[:1].upper() + clause[1:] if clause.partition(" ")[0] in _FIRST_WORDS else clause


def new_request_id() -> str:
    """Make an id for an answer of the gateway's own, which nobody mistakes for one of the API's (`req_...`)."""
    return f"req_gateway_{secrets.token_hex(10)}"
