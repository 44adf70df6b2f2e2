"""Exchange an identity token for a session (RFC 7523), as the official SDKs ask for it by environment variables alone.

Pure: reads the request, and shapes the answers in OAuth's own form (RFC 6749, section 5). The sentences are those of the refusals.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from gateway_addon.calls.responses import OwnResponse
from gateway_addon.identity.assertion import Malformed, strict_object
from gateway_addon.policy import GatewayPolicy
from gateway_addon.refusals import Refusal

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:jwt-bearer"
PATH = "/v1/oauth/token"
BODY_BYTES_MAX = 64 * 1024
TOO_LARGE = Refusal("too_large", f"An exchange has at most {BODY_BYTES_MAX:,} bytes: grant_type, and the identity token as assertion.")
NO_CACHE = (("pragma", "no-cache"),)
_FORM = "application/x-www-form-urlencoded"
_LATER = "temporarily_unavailable"
_ERRORS = {400: "invalid_request", 403: "unauthorized_client", 413: "invalid_request", 429: _LATER, 503: _LATER}
"""OAuth's words by status; any other refusal is an `invalid_grant`."""


@dataclass(frozen=True, slots=True)
class ExchangeRequest:
    """A request for a session, from its headers: its body is the credential. `address`: who asks."""

    address: str
    policy: GatewayPolicy


def assertion_of(body: bytes, content_type: str) -> str | Refusal:
    """Return the identity token that a request brings as JSON or as a form. Other fields that the SDKs send are ignored."""
    try:
        fields = _form(body) if content_type.partition(";")[0].strip().lower() == _FORM else strict_object(body)
    except Malformed as error:
        return _wrong(f"the body {error}; send JSON or a form with grant_type and assertion")
    if fields.get("grant_type") != GRANT_TYPE:
        return _wrong(f"grant_type must be {GRANT_TYPE}: an identity token is all that is exchanged here")
    assertion = fields.get("assertion")
    return assertion if isinstance(assertion, str) and assertion else _wrong("assertion is missing: it holds the identity token")


def _form(body: bytes) -> dict[str, Any]:
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, strict_parsing=True, max_num_fields=20)
    except ValueError:
        raise Malformed("is not a form") from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise Malformed("gives a field twice")
    return fields


def _wrong(clause: str) -> Refusal:
    return Refusal("request", f"The exchange cannot be read: {clause}.")


def granted(session: str, life_s: int) -> OwnResponse:
    """Return the answer with a session's token, which nothing but its client may see."""
    body = {"access_token": mask(session), "token_type": "Bearer", "expires_in": life_s}
    return OwnResponse(body, headers=NO_CACHE, secret=session)


def mask(secret: str) -> str:
    """Return what stands in a secret's place wherever an answer is shown: it is as long."""
    return secret[:4] + "*" * (len(secret) - 4)


def refused(refusal: Refusal) -> OwnResponse:
    """Return a refusal in OAuth's form, with the headers of every refusal."""
    error = "unsupported_grant_type" if "grant_type must be" in refusal.sentence else _ERRORS.get(refusal.status, "invalid_grant")
    headers = tuple((name, value) for name, value in refusal.headers("").items() if name not in ("content-type", "request-id"))
    return OwnResponse({"error": error, "error_description": refusal.sentence}, refusal.status, headers=(*NO_CACHE, *headers))
