"""Keep each issuer's keys: fetched apart from the calls, kept through an outage for a day, asked for again where a token has a new one.

Promises that an issuer is asked at most once in a cooldown, however many tokens name keys that nobody has, and by one question at a
time; that tokens whose keys are known wait for nothing; that a fetch which fails takes no key away, and one that succeeds takes away
those which are no longer published; that keys older than a day verify nothing. One cache for each issuer and process. Pure: how keys
are fetched is given, and the clock is.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from gateway_addon.identity.trust import Issuer
from gateway_addon.refusals import Refusal

if TYPE_CHECKING:
    from gateway_addon.identity.key_set import KeySet

FRESH_S_MIN, FRESH_S_MAX = 300.0, 3600.0
REFRESH_AT = 0.8
COOLDOWN_S = 30.0
STALE_S_MAX = 24 * 3600.0
WAIT_S = 5.0
FILE_S = 1.0
"""A file is no server: it is looked at each second."""
RETRY_S = 5


class KeysUnavailable(Exception):
    """An issuer's keys cannot be fetched. The message is a clause that begins with whom was asked."""


class Fetched(NamedTuple):
    keys: "KeySet"
    fresh_s: float
    """How long the keys are fresh; infinite for those that stand in the policy."""


type Fetch = Callable[[Issuer, "KeySet | None"], Awaitable[Fetched]]
"""Fetch an issuer's keys; given those of the time before, return the very same where nothing has changed. Raises KeysUnavailable."""


async def no_keys(issuer: Issuer, before: "KeySet | None") -> Fetched:
    """Fetch nothing, in a process that asks nobody. Raises KeysUnavailable."""
    raise KeysUnavailable("this process fetches none")


def fresh_s(max_age_s: float | None) -> float:
    """Return how long keys are fresh whose server says this of its answer (Cache-Control), or nothing."""
    return FRESH_S_MIN if max_age_s is None else max(FRESH_S_MIN, min(max_age_s, FRESH_S_MAX))


class KeyCache:
    """The keys of one issuer."""

    def __init__(self, issuer: Issuer, fetch: Fetch, monotonic_s: Callable[[], float]):
        self.issuer = issuer
        self._fetch, self._monotonic_s = fetch, monotonic_s
        self._cooldown_s = FILE_S if issuer.keys.kind == "file" else COOLDOWN_S
        self._keys: KeySet | None = None
        self._fetched_s = self._asked_s = -math.inf
        self._fresh_s = 0.0
        self._asking: asyncio.Task[None] | None = None
        self.problem: str | None = None
        """Why the last fetch failed; None once one has succeeded."""

    async def keys(self, key_id: str | None) -> "KeySet | Refusal":
        """Return the keys to check a token by that names this one. They may lack it: then it was asked for, or may not be yet."""
        keys = self.current
        if keys is None or (key_id is not None and not keys.has(key_id)):
            await self._ask()
            keys = self.current
        if keys is not None:
            return keys
        since = "" if self._keys is None else " for a day"
        sentence = f"The keys of the issuer {self.issuer.name} cannot be fetched{since}: {self.problem or 'they have not come yet'}"
        return Refusal("identity_unavailable", f"{sentence}. Try again shortly; tokens of the gateway's own work meanwhile.", RETRY_S)

    @property
    def current(self) -> "KeySet | None":
        """Return the keys that may be used now."""
        return self._keys if self.age_s <= max(STALE_S_MAX, self._fresh_s) else None

    @property
    def age_s(self) -> float:
        """Return how long ago the keys were fetched; infinite where they never were."""
        return self._monotonic_s() - self._fetched_s

    @property
    def is_stale(self) -> bool:
        """Return whether the keys, if there are any, should have been renewed by now, and could not be."""
        return self.problem is not None and self.age_s > self._fresh_s

    async def refresh(self) -> None:
        """Fetch the keys where they are due: before they cease to be fresh."""
        if self.age_s >= self._fresh_s * REFRESH_AT:
            await self._ask()

    async def _ask(self) -> None:
        """Ask the issuer, or wait for the answer to a question under way. Within the cooldown do nothing."""
        if self._asking is None:
            if self._monotonic_s() - self._asked_s < self._cooldown_s:
                return
            self._asked_s = self._monotonic_s()
            self._asking = asyncio.ensure_future(self._fetch_once())
        await asyncio.wait([self._asking], timeout=WAIT_S)

    async def _fetch_once(self) -> None:
        try:
            asked_s = self._monotonic_s()
            self._keys, self._fresh_s = await self._fetch(self.issuer, self._keys)
            self._fetched_s, self.problem = asked_s, None
        except KeysUnavailable as error:
            self.problem = str(error)
        finally:
            self._asking = None

    def close(self) -> None:
        """Wait for no answer any more."""
        if self._asking is not None:
            self._asking.cancel()


class IssuerKeys:
    """The caches of all issuers in force."""

    def __init__(self, fetch: Fetch, monotonic_s: Callable[[], float]):
        self._fetch, self._monotonic_s = fetch, monotonic_s
        self._caches: dict[Issuer, KeyCache] = {}

    def of(self, issuer: Issuer) -> KeyCache:
        """Return the cache of an issuer; another one as soon as anything that the policy says of it is another."""
        if issuer not in self._caches:
            self._caches[issuer] = KeyCache(issuer, self._fetch, self._monotonic_s)
        return self._caches[issuer]

    async def follow(self, issuers: Collection[Issuer]) -> list[KeyCache]:
        """Forget issuers that are no longer trusted, and fetch the keys that are due. Return the caches whose keys are stale."""
        for gone in [each for each in self._caches if each not in issuers]:
            self._caches.pop(gone).close()
        await asyncio.gather(*(self.of(each).refresh() for each in issuers))
        return [cache for cache in self._caches.values() if cache.is_stale]

    def close(self) -> None:
        """Wait for no answer any more."""
        for cache in self._caches.values():
            cache.close()
