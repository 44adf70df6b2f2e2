"""Issuers' keys as they are fetched: from a real server on this machine, a file, the policy; and servers that do what they should not."""

from dataclasses import replace
from math import inf
from types import SimpleNamespace

import pytest
from issuers import jwk, jwks, key, published

from gateway_addon.http_client import STRAIGHT
from gateway_addon.identity.key_cache import IssuerKeys, KeysUnavailable
from gateway_addon.identity.trust import Issuer, KeySource
from gateway_addon.operations import issuer_keys


def issuer(url, kind="discovery", value=""):
    return Issuer("x", url, KeySource(kind, value), ("RS256",), 3600.0, 60.0)


async def fetch(of, before=None):
    return await issuer_keys.fetch(of, before, lambda url: STRAIGHT)


def ids(found):
    return [each.key_id for each in found.keys.keys]


async def test_keys_come_from_where_the_discovery_document_says():
    async with published() as server:
        server.max_age = 900
        found = await fetch(issuer(server.url))
        assert (ids(found), found.fresh_s) == (["k1"], 900)
        assert server.asked == ["/.well-known/openid-configuration", "/jwks"]
        again = await fetch(issuer(server.url), found.keys)
        assert again.keys is found.keys, "what has not changed keeps what it remembers"
        server.keys = jwks(jwk(key(), "k2"))
        assert ids(await fetch(issuer(server.url, "url", f"{server.url}/other"), found.keys)) == ["k2"]
        assert server.asked[-1] == "/other"


def answer(status, body=b"", more=""):
    return f"HTTP/1.1 {status} x\r\n{more}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


BROKEN = {
    "an error": ({"answer": answer(500)}, "answers with status 500"),
    "a redirect": ({"answer": answer(302, more="location: http://127.0.0.1:1/keys\r\n")}, "answers with status 302"),
    "5 MB": ({"answer": answer(200, b"x" * 5_000_000)}, "answers with more than 262,144 bytes"),
    "a page": ({"answer": answer(200, b"<html>")}, "is not JSON in UTF-8"),
    "half an answer": ({"answer": b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"}, "broke off the answer"),
    "no HTTP": ({"answer": b"hello"}, "cannot be reached"),
    "the document of another issuer": ({"document": {"issuer": "https://evil.test"}}, "is the document of another issuer"),
    "the issuer with a slash": ({"document": {"issuer": "SLASH"}}, "is the document of another issuer"),
    "no address of keys": ({"document": {"jwks_uri": None}}, "names no jwks_uri"),
    "keys in a file": ({"document": {"jwks_uri": "file:///etc/passwd"}}, "is not of the form https"),
    "keys in plain elsewhere": ({"document": {"jwks_uri": "http://10.0.0.1/keys"}}, "plain http, which is for this machine alone"),
    "keys at a metadata service": ({"document": {"jwks_uri": "https://169.254.169.254/keys"}}, "at the address of a cloud's metadata service"),
    "65 keys": ({"keys": jwks(*[{"kty": "oct"}] * 65)}, "the key set of x has 65 keys"),
    "weak keys": ({"keys": jwks(jwk(key("RSA-1024")))}, "has no key that checks signatures"),
}


@pytest.mark.parametrize(("does", "said"), BROKEN.values(), ids=BROKEN)
async def test_a_server_that_does_not_answer_as_it_should_is_named(does, said):
    async with published() as server:
        for name, value in does.items():
            setattr(server, name, {"issuer": f"{server.url}/"} if value == {"issuer": "SLASH"} else value)
        with pytest.raises(KeysUnavailable) as raised:
            await fetch(issuer(server.url))
    assert said in str(raised.value)


async def test_an_https_issuer_has_no_keys_in_plain(monkeypatch):
    """A document that came over https cannot lead to keys that anybody on the way may replace."""
    document = b'{"issuer": "https://x.test", "jwks_uri": "http://127.0.0.1/keys"}'
    monkeypatch.setattr(issuer_keys, "_asked", lambda url, way, plain, real=issuer_keys._asked: (document, 300) if "well-known" in url else real(url, way, plain=plain))
    with pytest.raises(KeysUnavailable, match="is not https, as the address of keys must be"):
        await fetch(issuer("https://x.test"))


async def test_a_server_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(issuer_keys, "TIMEOUT_S", 0.05)
    async with published() as server:
        server.hang = True
        with pytest.raises(KeysUnavailable, match="cannot be reached"):
            await fetch(issuer(server.url))


async def test_a_file_is_read_again_and_missing_ones_are_named(tmp_path):
    path = tmp_path / "jwks.json"
    of = issuer("https://cluster.test", "file", str(path))
    for wrong, said in ((None, "is no file"), (b"{", "is not JSON"), (b" " * 262_145, "has more than 262,144 bytes")):
        if wrong is not None:
            path.write_bytes(wrong)
        with pytest.raises(KeysUnavailable, match=said):
            await fetch(of)
    path.write_bytes(jwks())
    found = await fetch(of)
    assert (found.fresh_s, (await fetch(of, found.keys)).keys is found.keys) == (0, True)
    path.write_bytes(jwks(jwk(key(), "rotated")))
    assert ids(await fetch(of, found.keys)) == ["rotated"]


async def test_keys_in_the_policy_are_fresh_for_ever():
    found = await fetch(replace(issuer("https://cluster.test"), keys=KeySource("inline", jwks().decode())))
    assert (ids(found), found.fresh_s) == (["k1"], inf)


class Watched:
    """As much of a gateway as a refresher looks at."""

    def __init__(self, issuers, at):
        self.policy = SimpleNamespace(trust=SimpleNamespace(issuers={each.url: each for each in issuers}))
        self.identities = SimpleNamespace(keys=IssuerKeys(fetch_now, lambda: at[0]))
        self.issuer_problem, self.told = None, []

    def emit(self, alert):
        self.told.append(alert)


async def fetch_now(of, before):
    return await fetch(of, before)


async def test_an_issuer_that_fails_is_told_once_until_it_is_back(tmp_path):
    """Warm at the start, before any token comes; stale keys and missing ones are told, with what becomes of tokens."""
    path, at = tmp_path / "jwks.json", [1000.0]
    gateway = Watched([issuer("https://cluster.test", "file", str(path))], at)
    refresher = issuer_keys.KeyRefresher(gateway)

    async def look():
        at[0] += 2
        await refresher.look()
        return len(gateway.told)

    assert [await look(), await look()] == [1, 1]
    assert "the keys of the issuer x cannot be fetched" in gateway.told[0].sentence
    assert "its tokens are refused (503)" in gateway.told[0].sentence
    assert gateway.issuer_problem.startswith("No keys from: x.")
    path.write_bytes(jwks())
    assert (await look(), gateway.issuer_problem) == (1, None)
    assert gateway.identities.keys.of(issuer("https://cluster.test", "file", str(path))).current is not None
    path.unlink()
    assert [await look(), await look()] == [2, 2]
    assert "checked by the keys of 0 min ago, for a day at most" in gateway.told[1].sentence
    gateway.policy.trust = None
    assert (await look(), gateway.issuer_problem) == (2, None)
