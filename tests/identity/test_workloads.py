"""Which identity tokens are believed, and whose they are: hostile ones, ones at the edge, and the rules of apps."""

import hashlib
import hmac as mac
import json

import pytest
from issuers import AUDIENCE, ISSUER, SUBJECT, b64, claims, jwk, jwks, key, token

from gateway_addon.identity import key_set, workloads
from gateway_addon.identity.assertion import TOKEN_BYTES_MAX, Malformed, parse
from gateway_addon.identity.key_set import KeySet
from gateway_addon.identity.trust import AppRule, Issuer, KeySource, Trust, WorkloadRule
from gateway_addon.identity.workloads import Workload, rule_digest
from gateway_addon.refusals import Refusal

NOW = 1_795_000_000.0
RULE = WorkloadRule(ISSUER, None, (("ref", "refs/heads/main"), ("repository_id", "456")))
GITHUB = Issuer("github", ISSUER, KeySource("discovery"), ("RS256", "ES256"), 3600.0, 60.0)
SPIRE = Issuer("spire", "spiffe://example.org", KeySource("file", "bundle"), ("ES256",), 3600.0, 60.0)
KEYS = KeySet(jwks(jwk(key()), jwk(key("P-256"), "e1"), jwk(key("RSA-1024"), "weak"), jwk(key("P-384"), "e384")))
PEM = json.dumps(jwk(key())).encode()


def trust(*rules: AppRule) -> Trust:
    rules = rules or (AppRule("app", RULE), AppRule("batch", WorkloadRule(SPIRE.url, "spiffe://example.org/nightly", ())))
    return Trust(AUDIENCE, {each.url: each for each in (GITHUB, SPIRE)}, {url: tuple(r for r in rules if r.rule.issuer == url) for url in (ISSUER, SPIRE.url)})


def judged(text: str, *rules: AppRule, keys: KeySet = KEYS, now: float = NOW) -> Workload | Refusal:
    found = workloads.read(text, trust(*rules))
    return found if isinstance(found, Refusal) else workloads.judge(*found, keys, trust(*rules), now)


def good(**changes) -> dict:
    return claims(NOW, **changes)


def hmac(secret: bytes, algorithm: str = "HS256") -> str:
    """Sign with HMAC, as a library that takes the algorithm from the header would check it with the public key."""
    unsigned = token(good(), algorithm=algorithm, signature=b"x").rpartition(".")[0]
    return f"{unsigned}.{b64(mac.new(secret, unsigned.encode(), hashlib.sha256).digest())}"


FROM_ELSEWHERE = {"jwk": jwk(key("RSA", 2), "k1"), "jku": "https://evil.test/keys", "x5u": "https://evil.test/cert", "x5c": ["MIIB"]}

HOSTILE = {
    "HMAC by the public key as JSON": hmac(PEM),
    "HMAC by the modulus": hmac(jwk(key())["n"].encode()),
    "none": token(good(), algorithm="none", signature=b"x"),
    "none, without a signature": token(good(), algorithm="none", signature=b"x").rpartition(".")[0] + ".",
    "none in mixed case": token(good(), algorithm="NonE", signature=b"x"),
    "another algorithm of the same key": token(good(), algorithm="PS256"),
    "an algorithm that the issuer does not use": token(good(), key("P-384"), algorithm="ES384", kid="e384"),
    "a key of another type": token(good(), key("P-256"), algorithm="ES256", kid="k1"),
    "a key in its own header": token(good(), key("RSA", 2), header=FROM_ELSEWHERE),
    "a key in its own header, without kid": token(good(), key("RSA", 2), kid=None, header=FROM_ELSEWHERE),
    "a weak key": token(good(), key("RSA-1024"), kid="weak"),
    "an unknown kid": token(good(), kid="k2"),
    "no kid, several keys": token(good(), kid=None),
    "a kid that is no text": token(good(), header={"kid": 1}),
    "crit": token(good(), header={"crit": ["exp"]}),
    "an unencoded payload": token(good(), header={"b64": False}),
    "typ of another use": token(good(), header={"typ": "logout+jwt"}),
    "typ that is no text": token(good(), header={"typ": []}),
    "alg twice": token(good(), header=b'{"alg":"none","alg":"RS256","kid":"k1"}'),
    "two sub": token(json.dumps(good()).replace('"sub"', '"sub": "repo:evil/r", "sub"').encode()),
    "two sub inside an object": token(json.dumps(good(act={"sub": "a"})).replace('{"sub": "a"}', '{"sub": "a", "sub": "b"}').encode()),
    "a list for a payload": token(b"[]"),
    "a payload that is no JSON": token(b"{"),
    "a payload in another UTF": token(json.dumps(good()).encode("utf-16")),
    "a payload behind a byte order mark": token(b"\xef\xbb\xbf" + json.dumps(good()).encode()),
    "NaN": token(json.dumps(good(exp=float("nan"))).encode()),
    "an infinite exp": token(json.dumps(good()).replace(f'"exp": {int(NOW) + 300}', '"exp": 1e999').encode()),
    "an exp of a thousand digits": token(json.dumps(good()).replace(f'"exp": {int(NOW) + 300}', f'"exp": 1{"0" * 1000}').encode()),
    "a payload of lists in lists": token(b"[" * 6000),
    "exp as text": token(good(exp=str(int(NOW) + 300))),
    "exp true": token(good(exp=True)),
    "no exp": token(good(exp=None)),
    "no iat": token(good(iat=None)),
    "iat as text": token(good(iat=str(int(NOW)))),
    "nbf as text": token(good(nbf=str(int(NOW)))),
    "a life above the limit": token(good(exp=int(NOW) + 3601)),
    "iat 61 s ahead": token(good(iat=int(NOW) + 61)),
    "nbf 61 s ahead": token(good(nbf=int(NOW) + 61)),
    "no aud": token(good(aud=None)),
    "another aud": token(good(aud="account")),
    "aud in another case": token(good(aud=AUDIENCE.upper())),
    "aud with a slash": token(good(aud=f"{AUDIENCE}/")),
    "a list of other aud": token(good(aud=["account", "api"])),
    "aud a number": token(good(aud=7)),
    "aud nested": token(good(aud=[[AUDIENCE]])),
    "aud a list with a number": token(good(aud=[AUDIENCE, 7])),
    "aud an object": token(good(aud={AUDIENCE: True})),
    "no sub": token(good(sub=None)),
    "an empty sub": token(good(sub="")),
    "a list for sub": token(good(sub=[SUBJECT])),
    "a sub with a NUL": token(good(sub="a\0b")),
    "half of a pair in sub": token(json.dumps(good()).replace(SUBJECT, r"\ud800").encode()),
    "an issuer nobody trusts": token(good(iss="https://evil.test")),
    "an issuer with a slash": token(good(iss=f"{ISSUER}/")),
    "an issuer in a list": token(good(iss=[ISSUER])),
    "no issuer": token(good(iss=None)),
    "iss null": token(json.dumps(good() | {"iss": None}).encode()),
    "a trust domain as iss": token(good(iss=SPIRE.url, sub="spiffe://example.org/nightly"), key("P-256"), algorithm="ES256", kid="e1"),
    "a signature of nothing": token(good(), signature=b"\0"),
    "a signature over something else": token(good(), signature=b"\1" * 256),
    "a signature with padding": token(good()) + "==",
    "another spelling of a signature": token(good())[:-1] + "B",
    "four parts": token(good()) + ".eyJ",
    "a space behind it": token(good()) + " ",
    "200 KB": token(good(pad="x" * 200_000)),
    "200 KB of signature": token(good(), signature=b"x" * 150_000),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_token_is_invalid(text):
    found = judged(text)
    assert isinstance(found, Refusal), found
    assert (found.code, found.status, found.headers("r")["x-should-retry"]) == ("identity_invalid", 401, "false"), found.sentence
    assert len(found.sentence) < 700
    assert "eyJ" not in found.sentence, "no piece of a token is repeated"


PASSING = {
    "plain": {},
    "59 s past its end": {"iat": int(NOW) - 359, "exp": int(NOW) - 59},
    "iat 59 s ahead": {"iat": int(NOW) + 59, "exp": int(NOW) + 359},
    "nbf 59 s ahead": {"nbf": int(NOW) + 59},
    "times with fractions": {"iat": NOW - 0.5, "exp": NOW + 10.5},
    "aud in a list": {"aud": ["account", AUDIENCE]},
    "a claim more": {"act": {"sub": "x"}},
}


@pytest.mark.parametrize("changes", PASSING.values(), ids=PASSING)
def test_a_good_token_is_its_apps_workload(changes):
    payload = good(**changes)
    assert judged(token(payload)) == Workload("app", ISSUER, SUBJECT, payload["exp"], rule_digest(RULE))


@pytest.mark.parametrize(
    ("private", "algorithm", "kid", "header"),
    [
        (("P-256",), "ES256", "e1", {}),
        (("RSA",), "RS256", "k1", {"typ": "at+jwt"}),
        (("RSA",), "RS256", "k1", {"typ": None}),
        (("RSA",), "RS256", "k1", FROM_ELSEWHERE | {"jwk": jwk(key("RSA", 2), "k1")}),
    ],
    ids=["EC", "at+jwt", "no typ", "a key in its header that is not used"],
)
def test_a_token_passes_by_the_issuers_key_alone(private, algorithm, kid, header):
    assert isinstance(judged(token(good(), key(*private), algorithm=algorithm, kid=kid, header=header)), Workload)


def test_each_algorithm_is_checked_by_a_key_of_its_own_type():
    """The same message is signed in each way; no signature is right for another algorithm's name."""
    private = {"RS": key(), "PS": key(), "ES": key("P-256"), "Ed": key("Ed25519")}
    keys = KeySet(jwks(*(jwk(each, name) for name, each in private.items()), jwk(key("P-384"), "ES384")))
    for name in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"):
        kid = "ES384" if name == "ES384" else name[:2]
        signed = parse(token(good(), key("P-384") if kid == "ES384" else private[kid], algorithm=name, kid=kid))
        assert keys.is_signed(signed), name
        forged = bytes([signed.signature[0] ^ 1]) + signed.signature[1:]
        assert not keys.is_signed(parse(token(good(), algorithm=name, kid=kid, signature=forged))), name
    assert not keys.is_signed(parse(token(good(), key(), algorithm="RS256", kid="ES")))


def test_a_key_that_names_its_algorithm_or_use_serves_no_other():
    sets = [{"alg": "RS512"}, {"use": "enc"}, {"key_ops": ["sign"]}, {"use": "sig", "alg": "RS256", "key_ops": ["verify"]}]
    right = []
    for more in sets:
        keys = KeySet(jwks(jwk(key(), **more), jwk(key("P-256"), "e1")))
        right.append(keys.is_signed(parse(token(good()))))
    assert right == [False, False, False, True]


def test_of_a_key_with_its_private_part_the_public_one_is_used():
    numbers = key().private_numbers()
    whole = jwk(key()) | {"d": b64(numbers.d.to_bytes(256, "big")), "p": "AQ", "q": "AQ"}
    assert KeySet(jwks(whole)).is_signed(parse(token(good())))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[]", "is not a JSON object"),
        (b'{"keys": {}}', "has no list `keys`"),
        (b'{"keys": [], "keys": []}', "gives 'keys' twice"),
        (jwks(jwk(key("RSA-1024"))), "has no key that checks signatures"),
        (jwks({"kty": "oct", "k": "c2VjcmV0", "kid": "k1"}), "has no key that checks signatures"),
        (jwks({"kty": "RSA", "n": "AQ", "e": 3}, {"kty": "EC", "crv": "P-256", "x": "AQ", "y": "AQ"}), "has no key that checks signatures"),
        (jwks(*[{"kty": "oct"}] * 65), "has 65 keys, and the gateway reads 64"),
    ],
)
def test_a_key_set_without_a_good_key_is_none(text, why):
    with pytest.raises(Malformed, match=why.replace("[", r"\[")):
        KeySet(text)


def test_an_expired_token_is_told_apart_so_that_clients_renew():
    found = judged(token(good(iat=int(NOW) - 400, exp=int(NOW) - 61)))
    assert (found.code, found.status, found.headers("r")["x-should-retry"]) == ("identity_expired", 401, "false")
    assert "expired 61 s ago" in found.sentence
    assert judged(token(good(exp=int(NOW) - 61), signature=b"x")).code == "identity_invalid", "its end is not believed before it is verified"


def test_a_clock_that_is_wrong_is_said_with_the_difference():
    assert "iat is 90 s ahead of this gateway's clock, and 60 s are allowed" in judged(token(good(iat=int(NOW) + 90))).sentence


def test_a_subject_of_a_trust_domain_needs_no_issuer():
    svid = {"sub": "spiffe://example.org/nightly", "aud": [AUDIENCE], "iat": int(NOW), "exp": int(NOW) + 300}
    bundle = KeySet(jwks(jwk(key("P-256"), "e1", use="jwt-svid")))

    def asked(subject):
        return judged(token(svid | {"sub": subject}, key("P-256"), algorithm="ES256", kid="e1"), keys=bundle)

    assert asked("spiffe://example.org/nightly").app == "batch"
    assert asked("spiffe://example.org/nightly/x").code == "identity_unknown"
    assert asked("spiffe://example.org.evil.test/nightly").code == "identity_invalid"


RULES = {
    # a rule, a token's claims, why they do not match
    "all of it": (RULE, {}, None),
    "the old form of sub": (WorkloadRule(ISSUER, SUBJECT, ()), {}, None),
    "the new form of sub": (WorkloadRule(ISSUER, "repo:o@1/r@456:ref:refs/heads/main", ()), {"sub": "repo:o@1/r@456:ref:refs/heads/main"}, None),
    "the new form where the old is meant": (WorkloadRule(ISSUER, SUBJECT, ()), {"sub": "repo:o@1/r@456:ref:refs/heads/main"}, "sub is repo:o@1/r@456"),
    "another branch": (RULE, {"ref": "refs/heads/x"}, "ref is refs/heads/x, not refs/heads/main"),
    "a pull request": (WorkloadRule(ISSUER, SUBJECT, ()), {"sub": "repo:o/r:pull_request"}, "sub is repo:o/r:pull_request"),
    "a number for a text": (RULE, {"repository_id": 456}, "repository_id is 456, which is no text"),
    "a list with the text": (RULE, {"repository_id": ["456"]}, r"repository_id is [456], which is no text"),
    "a claim that is missing": (RULE, {"ref": None}, "ref is missing"),
    "another case": (RULE, {"ref": "refs/heads/Main"}, "ref is refs/heads/Main"),
    "overage": (WorkloadRule(ISSUER, None, (("groups", "eng"),)), {"_claim_names": {"groups": "src1"}}, "groups is left out by the issuer"),
    "a beginning": (WorkloadRule(ISSUER, "repo:o/r*", (("repository_id", "456"),)), {}, None),
    "a beginning of somebody else": (WorkloadRule(ISSUER, "repo:o/r*", (("repository_id", "456"),)), {"sub": "repo:o/r-evil:x", "repository_id": "9"}, "repository_id is 9"),
    "a star within": (WorkloadRule(ISSUER, "repo:*/r:x", ()), {"sub": "repo:o/r:x"}, "sub is repo:o/r:x"),
}


@pytest.mark.parametrize(("rule", "changes", "why"), RULES.values(), ids=RULES)
def test_a_rule_matches_to_the_letter_or_says_why_not(rule, changes, why):
    found = workloads.mismatch(rule, good(**changes))
    assert (found or "").startswith(why or "")
    assert (found is None) == (why is None)
    judgement = judged(token(good(**changes)), AppRule("app", rule))
    assert getattr(judgement, "code", None) == (None if why is None else "identity_unknown")


def test_a_workload_without_a_rule_is_told_what_to_write():
    found = judged(token(good(sub="repo:o/r:pull_request", ref="refs/pull/7/merge")))
    assert (found.code, found.status) == ("identity_unknown", 403)
    for seen in (f"iss {ISSUER}", "sub repo:o/r:pull_request", f"aud {AUDIENCE}", "workloads: [{issuer: github, subject: 'repo:o/r:pull_request'}]"):
        assert seen in found.sentence


def test_a_workload_of_two_apps_is_neithers():
    other = WorkloadRule(ISSUER, SUBJECT, ())
    found = judged(token(good()), AppRule("app", RULE), AppRule("other", other))
    assert (found.code, found.status) == ("identity_ambiguous", 403)
    assert "app and other at once" in found.sentence
    assert judged(token(good()), AppRule("app", RULE), AppRule("app", other)).app == "app", "two rules of one app are no doubt"


def test_a_right_signature_is_checked_once_a_wrong_one_always(monkeypatch):
    """A signature's memory belongs to its key set, and is bounded."""
    checked = []
    monkeypatch.setattr(key_set, "_verifies", lambda key, each, real=key_set._verifies: checked.append(each) or real(key, each))
    monkeypatch.setattr(key_set, "REMEMBERED_MAX", 2)
    keys, signed, wrong = KeySet(KEYS.text), parse(token(good())), parse(token(good(), signature=b"\1" * 256))
    assert [keys.is_signed(each) for each in (signed, signed, wrong, wrong)] == [True, True, False, False]
    assert len(checked) == 3
    others = [parse(token(good(jti=str(each)))) for each in range(3)]
    assert all(keys.is_signed(each) for each in others)
    keys.is_signed(signed)
    assert len(checked) == 7, "the oldest was forgotten"
    assert KeySet(KEYS.text).is_signed(signed)
    assert len(checked) == 8, "another set knows nothing of it"


def test_a_token_as_large_as_allowed_is_read():
    room = TOKEN_BYTES_MAX - len(token(good(pad="")))
    text = token(good(pad="x" * (room * 3 // 4 - 4)))
    assert TOKEN_BYTES_MAX - 8 < len(text) <= TOKEN_BYTES_MAX
    assert isinstance(judged(text), Workload)
