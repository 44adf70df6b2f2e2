"""Hold an issuer's public keys, and check signatures by them.

The one module that imports PyJWT: nothing imports it before an issuer's keys are read. Promises that only the public part of a key is
used, that a key serves the algorithms of its own type and curve alone, that RSA keys have at least 2,048 bits, and that no key comes
from a token. Pure.
"""

import hashlib
from collections import OrderedDict
from typing import Any, NamedTuple

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from gateway_addon.identity.assertion import Assertion, Malformed, strict_object
from gateway_addon.identity.trust import ALGORITHMS

KEYS_MAX = 64
RSA_BITS_MIN, RSA_BITS_MAX = 2048, 8192
"""Beyond the upper one a single signature takes the loop for too long."""
REMEMBERED_MAX = 2_000
_PUBLIC = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
_USES = (None, "sig", "jwt-svid")


class VerificationKey(NamedTuple):
    key_id: str | None
    algorithms: tuple[str, ...]
    """Algorithms whose signatures it may check."""
    key: Any


class KeySet:
    """The keys that an issuer publishes. It remembers which signatures it has found right: to check one takes a thousand times as long."""

    def __init__(self, text: bytes):
        """Read a JWK set (RFC 7517); keys for other uses and of other types are left out. Raises Malformed."""
        members = strict_object(text).get("keys")
        if not isinstance(members, list) or not all(isinstance(each, dict) for each in members):
            raise Malformed("has no list `keys`, as a JWK set has")
        if len(members) > KEYS_MAX:
            raise Malformed(f"has {len(members):,} keys, and the gateway reads {KEYS_MAX}")
        self.text = text
        self.keys = tuple(key for each in members if (key := _key(each)) is not None)
        if not self.keys:
            raise Malformed(f"has no key that checks signatures (RSA of {RSA_BITS_MIN:,} to {RSA_BITS_MAX:,} bits, EC, Ed25519)")
        self._right: OrderedDict[bytes, None] = OrderedDict()

    def has(self, key_id: str | None) -> bool:
        """Return whether a token with this `kid` can be checked. Without one it can where there is no choice."""
        return len(self.keys) == 1 if key_id is None else any(key.key_id == key_id for key in self.keys)

    def is_signed(self, assertion: Assertion) -> bool:
        """Return whether a key of this set has signed the token, by the algorithm that the token names."""
        digest = hashlib.sha256(b"%b.%b" % (assertion.signed, assertion.signature)).digest()
        if digest in self._right:
            return True
        right = any(
            _verifies(key.key, assertion)
            for key in self.keys
            if assertion.key_id in (None, key.key_id) and assertion.algorithm in key.algorithms
        )
        if right:
            self._right[digest] = None
            if len(self._right) > REMEMBERED_MAX:
                self._right.popitem(last=False)
        return right


def _key(member: dict[str, Any]) -> VerificationKey | None:
    """Return a member of a JWK set as a key, None for one that checks no signatures here."""
    kind, key_id, stated = member.get("kty"), member.get("kid"), member.get("alg")
    operations = member.get("key_ops")
    if not isinstance(kind, str) or kind not in _PUBLIC or not (key_id is None or isinstance(key_id, str)):
        return None
    if member.get("use") not in _USES or (isinstance(operations, list) and "verify" not in operations):
        return None
    fitting = [name for name, (its_kind, curve) in ALGORITHMS.items() if its_kind == kind and curve in (None, member.get("crv"))]
    algorithms = tuple(name for name in fitting if stated in (None, name))
    if not algorithms:
        return None
    public = {"kty": kind} | {name: member.get(name) for name in _PUBLIC[kind]}
    try:
        key = jwt.PyJWK(public, algorithm=algorithms[0]).key
    except (jwt.exceptions.PyJWTError, ValueError, TypeError, AttributeError):
        return None
    if isinstance(key, RSAPublicKey) and not RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX:
        return None
    return VerificationKey(key_id, algorithms, key)


_BY_NAME = jwt.algorithms.get_default_algorithms()


def _verifies(key: Any, assertion: Assertion) -> bool:
    return bool(_BY_NAME[assertion.algorithm].verify(assertion.signed, key, assertion.signature))
