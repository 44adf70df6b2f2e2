"""Issuers of identity tokens for tests: keys, tokens with any header and claims, and a server that publishes, rotates and fails."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from upstreams import served

AUDIENCE = "https://gateway.internal"
SUBJECT = "repo:o/r:ref:refs/heads/main"
ISSUER = "https://issuer.test"


def key(kind: str = "RSA", number: int = 1) -> Any:
    """Return a private key, made once for each kind and number: `RSA`, `RSA-1024`, `P-256`, `P-384`, `Ed25519`."""
    return _key(kind, number)


@cache
def _key(kind: str, number: int) -> Any:
    match kind:
        case "RSA":
            return rsa.generate_private_key(65537, 2048)
        case "RSA-1024":
            return rsa.generate_private_key(65537, 1024)
        case "P-256":
            return ec.generate_private_key(ec.SECP256R1())
        case "P-384":
            return ec.generate_private_key(ec.SECP384R1())
        case _:
            return ed25519.Ed25519PrivateKey.generate()


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def number(value: int, octets: int | None = None) -> str:
    return b64(value.to_bytes(octets or (value.bit_length() + 7) // 8, "big"))


def jwk(private: Any, kid: str | None = "k1", **more: Any) -> dict[str, Any]:
    """Return the public part of a key as a member of a JWK set."""
    public = private.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        found = {"kty": "RSA", "n": number(public.public_numbers().n), "e": number(public.public_numbers().e)}
    elif isinstance(public, ec.EllipticCurvePublicKey):
        octets, numbers = public.curve.key_size // 8, public.public_numbers()
        found = {"kty": "EC", "crv": f"P-{public.curve.key_size}", "x": number(numbers.x, octets), "y": number(numbers.y, octets)}
    else:
        found = {"kty": "OKP", "crv": "Ed25519", "x": b64(public.public_bytes_raw())}
    return found | ({} if kid is None else {"kid": kid}) | more


def jwks(*members: dict[str, Any]) -> bytes:
    return json.dumps({"keys": list(members or (jwk(key()),))}).encode()


def sign(private: Any, message: bytes, algorithm: str) -> bytes:
    hashed = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}.get(algorithm[2:])
    if isinstance(private, rsa.RSAPrivateKey):
        pad = padding.PSS(padding.MGF1(hashed), hashed.digest_size) if algorithm.startswith("PS") else padding.PKCS1v15()
        return private.sign(message, pad, hashed)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        octets = private.curve.key_size // 8
        return b"".join(each.to_bytes(octets, "big") for each in decode_dss_signature(private.sign(message, ec.ECDSA(hashed))))
    return private.sign(message)


def claims(now: float | None = None, **changes: Any) -> dict[str, Any]:
    """Return claims of a good token; a change to None leaves one out."""
    at = int(time.time() if now is None else now)
    found = {"iss": ISSUER, "sub": SUBJECT, "aud": AUDIENCE, "iat": at, "exp": at + 300, "repository_id": "456", "ref": "refs/heads/main"}
    return {name: value for name, value in (found | changes).items() if value is not None}


def token(
    payload: dict[str, Any] | bytes, private: Any = None, *, algorithm: str = "RS256", kid: str | None = "k1", header: Any = None, signature: bytes | None = None
) -> str:
    """Return a signed token. `header`: changes, or the whole of it as bytes; `signature`: another one in its place."""
    head = header if isinstance(header, bytes) else json.dumps({"alg": algorithm, "typ": "JWT", **({} if kid is None else {"kid": kid}), **(header or {})}).encode()
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    signed = f"{b64(head)}.{b64(body)}"
    return f"{signed}.{b64(sign(private or key(), signed.encode(), algorithm) if signature is None else signature)}"


class Publisher:
    """A server that publishes a discovery document and keys. `answer`: another answer than that, as raw bytes; `hang`: none."""

    def __init__(self) -> None:
        self.url = ""
        self.keys = jwks()
        self.answer: bytes | None = None
        self.hang = False
        self.max_age: int | None = None
        self.document: dict[str, Any] = {}
        """Changes of the discovery document."""
        self.asked: list[str] = []

    def _body(self, path: str) -> bytes:
        if path.endswith("/openid-configuration"):
            return json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/jwks"} | self.document).encode()
        return self.keys

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ", 2)[1].decode()
        self.asked.append(path)
        if self.hang:
            await asyncio.sleep(60)
        body = self._body(path)
        age = "" if self.max_age is None else f"cache-control: public, max-age={self.max_age}\r\n"
        writer.write(self.answer or f"HTTP/1.1 200 OK\r\n{age}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def published() -> AsyncIterator[Publisher]:
    publisher, tasks = Publisher(), set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await publisher.talk(reader, writer)
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            writer.close()

    async with served(talk, tasks) as publisher.url:
        yield publisher
