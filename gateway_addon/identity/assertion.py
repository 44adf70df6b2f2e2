"""Parse an identity token (a JWT) strictly, before any library sees it, so that it has one reading.

Promises to refuse every token that two parsers could read differently: a name given twice, numbers that are none, padding or other
spellings of base64url, a form that is not the three parts of a signed token. Parsed is not verified. Pure.
"""

import base64
import binascii
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Never

TOKEN_BYTES_MAX = 16 * 1024
"""The SDKs send no larger one."""

_SHAPE = re.compile(r"(eyJ[A-Za-z0-9_-]*)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_TYPES = (None, "jwt", "at+jwt", "jose", "application/jwt", "application/at+jwt")
_INTEGER_DIGITS_MAX = 32


@dataclass(frozen=True, slots=True)
class Assertion:
    """A parsed identity token; nothing in it is believed yet."""

    algorithm: str
    key_id: str | None
    claims: dict[str, Any]
    signed: bytes = field(repr=False)
    """The bytes that the signature is over."""
    signature: bytes = field(repr=False)


class Malformed(ValueError):
    """A text that is no identity token. The message is the end of a sentence, and holds nothing of the token but names."""


def is_shaped(credential: str) -> bool:
    """Return whether a credential is meant as an identity token: it begins like one, and has two dots."""
    return credential.startswith("eyJ") and credential.count(".") == 2


def parse(token: str) -> Assertion:
    """Parse an identity token. Raises Malformed."""
    if len(token) > TOKEN_BYTES_MAX:
        raise Malformed(f"has {len(token):,} characters, and the gateway reads {TOKEN_BYTES_MAX:,}")
    parts = _SHAPE.fullmatch(token)
    if parts is None:
        raise Malformed("is not three parts of base64url between two dots, as a signed one is")
    header, claims = _object("header", parts[1]), _object("payload", parts[2])
    algorithm, key_id, kind = header.get("alg"), header.get("kid"), header.get("typ")
    if "crit" in header:
        raise Malformed("has `crit` in its header: extensions that must be understood, and none is")
    if "b64" in header or header.get("enc") is not None:
        raise Malformed("is not a plain signed one (its header has b64 or enc)")
    if not isinstance(algorithm, str) or (key_id is not None and not isinstance(key_id, str)):
        raise Malformed("has an `alg` or `kid` that is no text")
    if not (kind is None or isinstance(kind, str)) or (kind and kind.lower()) not in _TYPES:
        raise Malformed("has a `typ` that is not JWT or at+jwt: it was made for another use")
    return Assertion(algorithm, key_id, claims, f"{parts[1]}.{parts[2]}".encode(), _decoded("signature", parts[3]))


def strict_object(text: bytes) -> dict[str, Any]:
    """Parse JSON as one object without a name given twice. Raises Malformed."""
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite, parse_int=_integer
        )  # fmt: skip
    except Malformed:
        raise
    except (ValueError, RecursionError):
        raise Malformed("is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise Malformed("is not a JSON object")
    return value


def _object(what: str, part: str) -> dict[str, Any]:
    try:
        return strict_object(_decoded(what, part))
    except Malformed as error:
        raise Malformed(f"has a {what} that {error}") from None


def _decoded(what: str, part: str) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except binascii.Error:
        raw = b""
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != part.encode():
        raise Malformed(f"has a {what} that is not base64url as everybody writes it")
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Malformed(f"gives {twice[:40]!r} twice")
    return found


def _constant(name: str) -> Never:
    raise Malformed(f"holds {name}, which is no number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise Malformed("holds a number beyond all bounds")
    return number


def _integer(text: str) -> int:
    if len(text) > _INTEGER_DIGITS_MAX:
        raise Malformed("holds a number beyond all bounds")
    return int(text)
