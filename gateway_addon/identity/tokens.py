"""Mint, recognise and hash tokens; find the one credential that a request carries.

Promises that a token is at least 256 bits of randomness behind a prefix that can be grepped for, with a checksum, so that
a truncated paste is told apart from a revoked one without asking the ledger; and that only its SHA-256 leaves this module.
Knows nothing of apps, storage or HTTP libraries.
"""

import hashlib
import secrets
import string
import zlib
from collections.abc import Iterable

from gateway_addon.identity.assertion import is_shaped
from gateway_addon.names import PROGRAM, TOKEN_PATTERN, TOKEN_PREFIX
from gateway_addon.refusals import Refusal

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET_DIGITS = 43  # 62^43 > 2^256
_CHECK_DIGITS = 6  # 62^6 > 2^32
_LENGTH = len(TOKEN_PREFIX) + _SECRET_DIGITS + _CHECK_DIGITS

ISSUE = f"Ask the gateway's operator for one ({PROGRAM} token issue APP)"


def mint() -> str:
    """Mint a token. It is shown once and never stored: keep `digest(token)`."""
    secret = _base62(secrets.randbits(256), _SECRET_DIGITS)
    return TOKEN_PREFIX + secret + _check(secret)


def digest(token: str) -> str:
    """Return the SHA-256 of a token in hex. A fast hash is enough: there is no dictionary of 256-bit random values to try."""
    return hashlib.sha256(token.encode()).hexdigest()


def well_formed(token: str) -> bool:
    """Return whether a token has the right prefix, length and checksum, so that it was pasted whole."""
    secret, check = token[len(TOKEN_PREFIX) : -_CHECK_DIGITS], token[-_CHECK_DIGITS:]
    shaped = len(token) == _LENGTH and TOKEN_PATTERN.fullmatch(token) is not None
    return shaped and _check(secret) == check


def credential(headers: Iterable[tuple[str, str]]) -> str | Refusal:
    """Return the token, or the identity token, that a request carries as `x-api-key`, as `Authorization: Bearer`, or as both if equal.

    `headers` are (lower-cased name, value). The 0.x SDKs send the first form, the 2.x SDKs the second, Claude Code's
    apiKeyHelper both.
    """
    found = set()
    for name, value in headers:
        if name == "x-api-key" and value.strip():  # some clients send it empty beside the other
            found.add(value.strip())
        elif name == "authorization":
            scheme, _, rest = value.strip().partition(" ")
            found.add(rest.strip() if scheme.lower() == "bearer" else "")
    if not found:
        return Refusal("token_missing", f"No token: send the app's gateway token as x-api-key or Authorization: Bearer. {ISSUE}.")
    if len(found) > 1:
        sentence = "x-api-key and Authorization carry different credentials. Send the app's gateway token in one of them."
        return Refusal("token_conflict", sentence)
    token = found.pop()
    if well_formed(token) or is_shaped(token):
        return token
    return Refusal("token_malformed", _what_is_wrong(token))


def _what_is_wrong(token: str) -> str:
    if token.startswith("sk-ant-"):
        own = f"the gateway takes only its own tokens ({TOKEN_PREFIX}...)"
        return f"This is a Claude API key; {own}. Put the app's token in its place. {ISSUE}."
    if token.startswith(TOKEN_PREFIX):
        return f"The token was cut or mistyped: it has {len(token)} of {_LENGTH} characters, or a wrong checksum. Paste it again, whole."
    return f"The credential is not a gateway token: those begin with {TOKEN_PREFIX}. {ISSUE}."


def _check(secret: str) -> str:
    return _base62(zlib.crc32(secret.encode()), _CHECK_DIGITS)


def _base62(number: int, digits: int) -> str:
    text = ""
    for _ in range(digits):
        number, digit = divmod(number, 62)
        text = _ALPHABET[digit] + text
    return text
