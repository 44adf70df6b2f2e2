"""Fetch the keys of issuers: from their discovery document, an address, a file, or the policy itself.

Promises that an issuer is asked over https (over plain http inside this machine alone), by the way that the policy names, without a
credential, without following redirects, and never at an address of a cloud's metadata service, whatever its discovery document says;
that the document is the named issuer's; that an answer is read up to a quarter of a megabyte. Does I/O, in threads.
"""

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gateway_addon import http_client
from gateway_addon.calls.alerts import keys_unavailable
from gateway_addon.calls.gateway import Gateway
from gateway_addon.http_client import Egress, Unanswered
from gateway_addon.identity.assertion import Malformed, strict_object
from gateway_addon.identity.key_cache import Fetched, KeysUnavailable, fresh_s
from gateway_addon.identity.trust import Issuer

if TYPE_CHECKING:
    from gateway_addon.identity.key_set import KeySet

LOOK_EVERY_S = 1.0
TIMEOUT_S = 5.0
BODY_BYTES_MAX = 256 * 1024
PIECE_BYTES = 16 * 1024
DISCOVERY = "/.well-known/openid-configuration"
_MAX_AGE = re.compile(r"(?:^|[\s,])max-age=(\d{1,9})(?:$|[\s,])")

type Way = Callable[[str], Egress]
"""Return the way to an address."""


class KeyRefresher:
    """Keep the keys of the issuers in force fresh, apart from the calls, and say where they cannot be fetched."""

    def __init__(self, gateway: Gateway):
        self._gateway = gateway
        self._told: frozenset[str] = frozenset()

    async def look(self) -> None:
        """Fetch the keys that are due; log once for each issuer whose keys cannot be fetched."""
        trust = self._gateway.policy.trust
        failing = await self._gateway.identities.keys.follow(() if trust is None else trust.issuers.values())
        now = time.time()
        for cache in failing:
            if cache.issuer.name not in self._told:
                self._gateway.emit(keys_unavailable(cache.issuer.name, cache.problem or "", cache.age_s, now))
        self._told = frozenset(cache.issuer.name for cache in failing)
        self._gateway.issuer_problem = f"No keys from: {', '.join(sorted(self._told))}. The log says why." if failing else None


async def fetch(issuer: Issuer, before: "KeySet | None", way: Way) -> Fetched:
    """Fetch an issuer's keys as its policy says; `before`: those of the last time. Raises KeysUnavailable."""
    return await asyncio.to_thread(fetched, issuer, before, way)


def fetched(issuer: Issuer, before: "KeySet | None", way: Way) -> Fetched:
    """Fetch an issuer's keys, and wait for them. Raises KeysUnavailable."""
    from gateway_addon.identity.key_set import KeySet  # PyJWT takes a tenth of a second, and most gateways have no issuers

    try:
        text, good_for_s = _READ[issuer.keys.kind](issuer, way)
        return Fetched(before if before is not None and before.text == text else KeySet(text), good_for_s)
    except Unanswered as error:
        raise KeysUnavailable(str(error)) from None
    except Malformed as error:
        raise KeysUnavailable(f"the key set of {issuer.name} {error}") from None
    except (OSError, ValueError) as error:
        raise KeysUnavailable(f"{_place(issuer)} cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})") from None


def _place(issuer: Issuer) -> str:
    return issuer.keys.value if issuer.keys.kind in ("url", "file") else f"the keys of {issuer.name}"


def _discovered(issuer: Issuer, way: Way) -> tuple[bytes, float]:
    place = issuer.url.rstrip("/") + DISCOVERY
    text, _ = _asked(place, way, plain=_is_plain(issuer.url))
    try:
        document = strict_object(text)
    except Malformed as error:
        raise Unanswered(f"{place} {error}") from None
    if document.get("issuer") != issuer.url:
        raise Unanswered(f"{place} is the document of another issuer than {issuer.url}")
    address = document.get("jwks_uri")
    if not isinstance(address, str):
        raise Unanswered(f"{place} names no jwks_uri")
    return _asked(address, way, plain=_is_plain(issuer.url))


def _published(issuer: Issuer, way: Way) -> tuple[bytes, float]:
    return _asked(issuer.keys.value, way, plain=_is_plain(issuer.keys.value))


def _in_file(issuer: Issuer, way: Way) -> tuple[bytes, float]:
    path = Path(issuer.keys.value)
    if not path.is_file():  # a device may have no end, a pipe no writer
        raise Unanswered(f"{path} is no file")
    with path.open("rb") as file:
        text = file.read(BODY_BYTES_MAX + 1)
    if len(text) > BODY_BYTES_MAX:
        raise Unanswered(f"{issuer.keys.value} has more than {BODY_BYTES_MAX:,} bytes")
    return text, 0.0


def _in_policy(issuer: Issuer, way: Way) -> tuple[bytes, float]:
    return issuer.keys.value.encode(), float("inf")


_READ = {"discovery": _discovered, "url": _published, "file": _in_file, "inline": _in_policy}


def _is_plain(url: str) -> bool:
    return urlsplit(url).scheme == "http"


def _asked(url: str, way: Way, *, plain: bool) -> tuple[bytes, float]:
    """Return an answer's body, and how long it is fresh. `plain`: plain http is good enough, as the policy says. Raises Unanswered."""
    if _is_plain(url) and not plain:
        raise Unanswered(f"{url[:200]} is not https, as the address of keys must be")
    headers = {"accept": "application/json"}
    with http_client.ask(url, url[:200], timeout_s=TIMEOUT_S, way=way(url), headers=headers, guarded=True) as answer:
        if answer.status != 200:
            raise Unanswered(f"{url[:200]} answers with status {answer.status}")
        body = bytearray()
        while piece := answer.read(PIECE_BYTES):
            body += piece
            if len(body) > BODY_BYTES_MAX:
                raise Unanswered(f"{url[:200]} answers with more than {BODY_BYTES_MAX:,} bytes")
        age = _MAX_AGE.search(answer.header("cache-control") or "")
    return bytes(body), fresh_s(float(age[1]) if age else None)
