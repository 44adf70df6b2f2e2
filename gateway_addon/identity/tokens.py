"""Tokens: mint, recognise, hash; and the one credential that a request carries.

Promises that a token is at least 256 bits of randomness behind a prefix that can be grepped for, with a checksum, so that
a truncated paste is told apart from a revoked one without asking the ledger; and that only its SHA-256 leaves this room.
Knows nothing of apps, storage or HTTP libraries.
"""

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Iterable

from gateway_addon.refusals import Refusal

PREFIX = "gwt_"
PATTERN = re.compile(r"gwt_[0-9A-Za-z]{1,64}")
"""What a token, or a piece of one, looks like in a text that must not show it."""

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET_DIGITS = 43  # 62^43 > 2^256
_CHECK_DIGITS = 6  # 62^6 > 2^32
_LENGTH = len(PREFIX) + _SECRET_DIGITS + _CHECK_DIGITS

ISSUE = "Ask the gateway's operator for one (gateway token issue APP)"


def mint() -> str:
    """A new token. It is shown once and never stored: keep `digest(token)`."""
    secret = _base62(secrets.randbits(256), _SECRET_DIGITS)
    return PREFIX + secret + _check(secret)


def digest(token: str) -> str:
    """The SHA-256 of a token in hex. A fast hash is enough: there is no dictionary of 256-bit random values to try."""
    return hashlib.sha256(token.encode()).hexdigest()


def well_formed(token: str) -> bool:
    """True if the token has the right prefix, length and checksum: it was pasted whole."""
    secret, check = token[len(PREFIX) : -_CHECK_DIGITS], token[-_CHECK_DIGITS:]
    return len(token) == _LENGTH and token.startswith(PREFIX) and PATTERN.fullmatch(token) is not None and _check(secret) == check


def masked(text: str) -> str:
    """A text that may be shown: whatever looks like a token, or a piece of one, is `gwt_***`."""
    return PATTERN.sub(f"{PREFIX}***", text) if PREFIX in text else text


def credential(headers: Iterable[tuple[str, str]]) -> str | Refusal:
    """The token that a request carries as `x-api-key`, as `Authorization: Bearer`, or as both if they are equal.

    `headers` are (lower-cased name, value). The 0.x SDKs send the first form, the 2.x SDKs the second, Claude Code's
    apiKeyHelper both.
    """
    found = set()
    for name, value in headers:
        if name == "x-api-key":
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
    if well_formed(token):
        return token
    return Refusal("token_malformed", _what_is_wrong(token))


def _what_is_wrong(token: str) -> str:
    if token.startswith("sk-ant-"):
        return f"This is a Claude API key; the gateway takes only its own tokens ({PREFIX}...). Put the app's token in its place. {ISSUE}."
    if token.startswith(PREFIX):
        return f"The token was cut or mistyped: it has {len(token)} of {_LENGTH} characters, or a wrong checksum. Paste it again, whole."
    return f"The credential is not a gateway token: those begin with {PREFIX}. {ISSUE}."


def _check(secret: str) -> str:
    return _base62(zlib.crc32(secret.encode()), _CHECK_DIGITS)


def _base62(number: int, digits: int) -> str:
    text = ""
    for _ in range(digits):
        number, digit = divmod(number, 62)
        text = _ALPHABET[digit] + text
    return text
