"""An issuer's keys through rotations, floods and outages: counted in fetches, by a clock that the test sets."""

import asyncio
import math

import pytest
from issuers import ISSUER, jwk, jwks, key

from gateway_addon.identity import key_cache
from gateway_addon.identity.key_cache import COOLDOWN_S, STALE_S_MAX, Fetched, IssuerKeys, KeyCache, KeysUnavailable, fresh_s
from gateway_addon.identity.key_set import KeySet
from gateway_addon.identity.trust import Issuer, KeySource
from gateway_addon.refusals import Refusal

GITHUB = Issuer("github", ISSUER, KeySource("discovery"), ("RS256",), 3600.0, 60.0)
OLD, NEW = KeySet(jwks(jwk(key(), "old"))), KeySet(jwks(jwk(key(), "new")))


class Source:
    """Where keys come from: what each fetch returns, and how many there were."""

    def __init__(self, keys=OLD, fresh_s=300.0):
        self.keys, self.fresh_s, self.fetches, self.at = keys, fresh_s, 0, 1000.0
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, issuer, before):
        self.fetches += 1
        await self.gate.wait()
        if self.keys is None:
            raise KeysUnavailable(f"{issuer.url} answers with status 500")
        return Fetched(self.keys, self.fresh_s)

    def cache(self, issuer=GITHUB):
        return KeyCache(issuer, self.fetch, lambda: self.at)


async def test_callers_that_come_together_ask_once():
    source = Source()
    source.gate.clear()
    cache = source.cache()
    callers = [asyncio.ensure_future(cache.keys("old")) for _ in range(50)]
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.sleep(0)
    source.gate.set()
    assert await asyncio.gather(*callers[1:]) == [OLD] * 49
    assert source.fetches == 1, "and the one that left took the answer from nobody"


async def test_a_rotated_key_passes_within_one_fetch():
    source = Source()
    cache = source.cache()
    assert await cache.keys("old") is OLD
    source.keys, source.at = NEW, source.at + COOLDOWN_S
    assert await cache.keys("new") is NEW
    assert source.fetches == 2
    assert not (await cache.keys("old")).has("old"), "a key that is no longer published is refused from then on"


async def test_a_thousand_unknown_kids_ask_once_in_a_cooldown():
    """And tokens whose key is known wait for nothing meanwhile, though the issuer does not answer."""
    source = Source()
    cache = source.cache()
    await cache.keys("old")
    source.at += COOLDOWN_S
    source.gate.clear()
    flood = [asyncio.ensure_future(cache.keys(f"kid {each}")) for each in range(1000)]
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        assert await cache.keys("old") is OLD
    source.gate.set()
    assert set(await asyncio.gather(*flood)) == {OLD}
    for each in range(1000):
        source.at += 0.01
        await cache.keys(f"other kid {each}")
    assert source.fetches == 2
    assert (await cache.keys(None)) is OLD, "a token without a kid is no reason to ask"
    source.at += COOLDOWN_S
    await cache.keys(None)
    assert source.fetches == 2


async def test_an_outage_takes_no_key_away_for_a_day():
    source = Source()
    cache = source.cache()
    await cache.keys("old")
    fetched_at, source.keys = source.at, None
    source.at += 400
    await cache.refresh()
    assert (await cache.keys("old"), cache.is_stale, cache.problem) == (OLD, True, f"{ISSUER} answers with status 500")
    source.at = fetched_at + STALE_S_MAX
    assert await cache.keys("old") is OLD
    source.at += 1
    refused = await cache.keys("old")
    assert (refused.code, refused.status, refused.retry_after_s) == ("identity_unavailable", 503, 5)
    assert refused.headers("r").get("x-should-retry") is None, "to wait helps"
    assert f"for a day: {ISSUER} answers with status 500" in refused.sentence
    source.keys, source.at = OLD, source.at + COOLDOWN_S
    assert (await cache.keys("old"), cache.problem) == (OLD, None)


async def test_an_issuer_that_was_down_at_the_start_is_asked_again():
    """Failed questions count in the cooldown too."""
    source = Source(None)
    cache = source.cache()
    for _ in range(20):
        assert isinstance(await cache.keys("old"), Refusal)
        source.at += 1
    assert source.fetches == 1
    source.keys, source.at = OLD, source.at + COOLDOWN_S - 20
    assert await cache.keys("old") is OLD


async def test_an_issuer_that_hangs_keeps_callers_for_some_seconds(monkeypatch):
    monkeypatch.setattr(key_cache, "WAIT_S", 0.01)
    source = Source()
    source.gate.clear()
    cache = source.cache()
    refused = await cache.keys("old")
    assert (refused.code, source.fetches) == ("identity_unavailable", 1)
    source.at += 10 * COOLDOWN_S
    await cache.keys("old")
    assert source.fetches == 1, "one question is under way, and stays the only one"
    cache.close()


async def test_keys_are_renewed_before_they_cease_to_be_fresh():
    source = Source(fresh_s=1000.0)
    keys = IssuerKeys(source.fetch, lambda: source.at)
    fetches = []
    for _ in range(10):
        await keys.follow([GITHUB])
        fetches.append(source.fetches)
        source.at += 100
    assert fetches == [1, 1, 1, 1, 1, 1, 1, 1, 2, 2]


async def test_a_file_is_looked_at_each_second_and_the_policy_once():
    for kind, fresh, fetches in (("file", 0.0, 10), ("inline", math.inf, 1)):
        source = Source(fresh_s=fresh)
        keys = IssuerKeys(source.fetch, lambda source=source: source.at)
        issuer = Issuer("cluster", ISSUER, KeySource(kind, "x"), ("RS256",), 3600.0, 60.0)
        for _ in range(10):
            await keys.follow([issuer])
            source.at += 1
        assert source.fetches == fetches
        source.at += 10 * STALE_S_MAX
        assert (await keys.of(issuer).keys("old") is OLD) is True


async def test_an_issuer_that_the_policy_drops_or_changes_is_forgotten():
    source = Source()
    keys = IssuerKeys(source.fetch, lambda: source.at)
    await keys.follow([GITHUB])
    cache = keys.of(GITHUB)
    await keys.follow([])
    assert keys.of(GITHUB) is not cache


@pytest.mark.parametrize(("said", "kept"), [(None, 300), (0, 300), (60, 300), (900, 900), (86_400, 3600)])
def test_freshness_is_what_the_server_says_within_bounds(said, kept):
    assert fresh_s(said) == kept
