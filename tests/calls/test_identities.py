"""Workloads get in by their identity token, or by a session for it: through a real mitmproxy, with an issuer on this machine."""

import asyncio
import json
import os
import sys
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import anthropic
import httpx2
import pytest
from gateway import APP, gateway, write_policies
from issuers import AUDIENCE, ISSUER, SUBJECT, claims, jwk, jwks, key, published, token
from ledgers import ENGINES, new_ledger, url

from gateway_addon.calls import exchange
from gateway_addon.calls.admission import Caller
from gateway_addon.calls.gateway import Gateway
from gateway_addon.calls.identities import WorkloadIdentities
from gateway_addon.clocks import monotonic_s
from gateway_addon.http_client import STRAIGHT
from gateway_addon.identity import tokens
from gateway_addon.identity.key_cache import IssuerKeys
from gateway_addon.identity.throttle import FAILURES_PER_MINUTE
from gateway_addon.identity.workloads import Workload
from gateway_addon.ledger import Ledger, admin
from gateway_addon.messages.request import Request
from gateway_addon.operations import issuer_keys
from gateway_addon.policy import load
from gateway_addon.simulator import KEY, Behaviour, Simulator

HELLO = {"model": "claude-haiku-4-5", "max_tokens": 200, "messages": [{"role": "user", "content": "hi"}]}
RULE = "workloads:\n  - {issuer: here, claims: {repository_id: 456, ref: refs/heads/main}}\n"
TWIN = APP + "workloads:\n  - {issuer: here, claims: {repository_id: 456, environment: both}}\n"
GRANT = {"grant_type": exchange.GRANT_TYPE}


@asynccontextmanager
async def stage(folder, *, app=APP + RULE, apps=None, server=None, **options):
    """Run an issuer, the simulated API and a gateway with the app `app`, a workload of which is let in, and another."""
    async with Simulator(behaviour=options.pop("behaviour", Behaviour())) as api, published() as own:
        issuer = server or own
        policy = f"audience: {AUDIENCE}\nissuers: {{here: {{url: '{issuer.url}'}}}}\n"
        async with gateway(folder, api, {"app": app, "twin": TWIN} | (apps or {}), policy, **options) as gw:
            async with httpx2.AsyncClient(base_url=gw.url, timeout=30) as http:
                yield gw, http, issuer


def of(issuer, **changes):
    return token(claims(iss=issuer.url, **changes))


async def call(http, credential, *, name="authorization", **more):
    headers = {name: f"Bearer {credential}" if name == "authorization" else credential, "anthropic-version": "2023-06-01"}
    return await http.post("/v1/messages", headers=headers | more, json=HELLO)


async def exchanged(http, assertion, **more):
    return await http.post("/v1/oauth/token", json=GRANT | {"assertion": assertion, "federation_rule_id": "fdrl_x", "organization_id": "x"} | more)


async def rows(gw, sql):
    return await gw.gateway.ledger.change(lambda db: db.execute(sql).fetchall())


async def test_an_identity_token_is_a_credential_in_either_header(tmp_path):
    async with stage(tmp_path) as (gw, http, issuer):
        jwt = of(issuer)
        for headers in ({"name": "authorization"}, {"name": "x-api-key"}, {"name": "x-api-key", "authorization": f"Bearer {jwt}"}):
            answer = await call(http, jwt, **headers)
            assert answer.status_code == 200, answer.text
        another = await call(http, jwt, name="x-api-key", authorization=f"Bearer {gw.tokens['app']}")
        assert (another.status_code, another.headers["x-gateway-refusal"]) == (401, "token_conflict")
        assert (await call(http, gw.tokens["app"])).status_code == 200, "tokens work as before"
        await gw.quiet()
        found = await rows(gw, "SELECT calls.app, label, issuer FROM calls JOIN tokens ON tokens.id = token_id ORDER BY calls.id")
        assert found == [("app", SUBJECT, issuer.url)] * 3 + [("app", "test", None)]
        assert {sent.header("x-api-key") for sent in (await gw.api.settled()).messages()} == {KEY}
        assert not [sent for sent in (await gw.api.settled()).messages() if sent.header("authorization")]
        assert issuer.asked == ["/.well-known/openid-configuration", "/jwks"]
        trail = await gw.gateway.ledger.change(partial(admin.audit_trail, app="app", since=0))
        assert [(each["who"], each["after"]["subject"]) for each in trail if each["action"] == "workload first seen"] == [("gateway", SUBJECT)]


async def test_a_session_is_what_an_identity_token_is_exchanged_for(tmp_path):
    async with stage(tmp_path) as (gw, http, issuer):
        answers = [await exchanged(http, of(issuer)), await http.post("/v1/oauth/token?beta=true", data=GRANT | {"assertion": of(issuer)})]
        for answer in answers:
            assert answer.status_code == 200, answer.text
            assert answer.json().keys() == {"access_token", "token_type", "expires_in"}
            assert 295 <= answer.json()["expires_in"] <= 300
            assert answer.headers["cache-control"] == "no-store"
            assert (await call(http, answer.json()["access_token"])).status_code == 200
        lives = [(await exchanged(http, of(issuer, iat=int(time.time()) + at, exp=int(time.time()) + end))).json()["expires_in"] for at, end in ((0, 3500), (-300, 20), (0, 3600))]
        assert (3490 < lives[0] <= 3500, lives[1], lives[2] <= 3600) == (True, 180, True), "long enough for the SDKs to renew in time"
        await gw.quiet()
        assert await rows(gw, "SELECT DISTINCT calls.app, endpoint, label FROM calls JOIN tokens ON tokens.id = token_id") == [("app", "messages", SUBJECT)]
        assert await rows(gw, "SELECT count(*) FROM tokens WHERE issuer IS NOT NULL") == [(1,)]
        assert await rows(gw, "SELECT count(*) FROM sessions") == [(5,)]
        assert await rows(gw, "SELECT count(*) FROM calls") == [(2,)], "an exchange writes no row"


REFUSED = {
    # changes of a good token, the refusal, its status, OAuth's word
    "expired": ({"iat": 1_700_000_000, "exp": 1_700_000_300}, "identity_expired", 401, "invalid_grant"),
    "for somebody else": ({"aud": "account"}, "identity_invalid", 401, "invalid_grant"),
    "without a rule": ({"ref": "refs/heads/x"}, "identity_unknown", 403, "unauthorized_client"),
    "of two apps": ({"environment": "both"}, "identity_ambiguous", 403, "unauthorized_client"),
    "of a stranger": ({"iss": "https://evil.test"}, "identity_invalid", 401, "invalid_grant"),
}


async def test_a_refused_workload_gets_one_answer_in_both_ways(tmp_path):
    """In the API's envelope and in OAuth's; nothing is forwarded, minted or written in a row."""
    async with stage(tmp_path, app=APP + RULE + "mode: observe\n") as (gw, http, issuer):
        for changes, code, status, word in REFUSED.values():
            jwt = token(claims(**({"iss": issuer.url} | changes)))
            direct, traded = await call(http, jwt, **{"x-team-id": "app", "x-litellm-team": "app"}), await exchanged(http, jwt, federation_rule_id="app_app")
            assert (direct.status_code, direct.headers["x-gateway-refusal"]) == (status, code) == (traded.status_code, traded.headers["x-gateway-refusal"])
            assert direct.headers["x-should-retry"] == traded.headers["x-should-retry"] == "false"
            assert traded.json() == {"error": word, "error_description": direct.json()["error"]["message"]}
            if code == "identity_unknown":
                for seen in (f"iss {issuer.url}", f"sub {SUBJECT}", f"aud {AUDIENCE}"):
                    assert seen in traded.json()["error_description"]
        assert await rows(gw, "SELECT (SELECT count(*) FROM calls), (SELECT count(*) FROM sessions), (SELECT count(*) FROM tokens WHERE issuer IS NOT NULL)") == [(0, 0, 0)]
        noise = dict(await rows(gw, "SELECT reason, sum(calls) FROM noise GROUP BY reason"))
        assert noise == {"identity_expired": 2, "identity_invalid": 4, "identity_unknown": 2, "identity_ambiguous": 2}
        assert (await gw.api.settled()).messages() == []


MALFORMED = {
    "no JSON": ({"content": b"{"}, 400, "invalid_request"),
    "two assertions": ({"content": b'{"grant_type": "x", "assertion": "a", "assertion": "b"}'}, 400, "invalid_request"),
    "another grant": ({"json": {"grant_type": "refresh_token", "assertion": "x"}}, 400, "unsupported_grant_type"),
    "no assertion": ({"json": GRANT}, 400, "invalid_request"),
    "assertion a list": ({"json": GRANT | {"assertion": ["x"]}}, 400, "invalid_request"),
    "a form with a field twice": ({"content": b"grant_type=a&grant_type=b", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 400, "invalid_request"),
    "a gateway token": ({"json": GRANT | {"assertion": "gwt_" + "x" * 49}}, 401, "invalid_grant"),
}


async def test_an_exchange_that_cannot_be_read_says_why(tmp_path):
    async with stage(tmp_path) as (_gw, http, issuer):
        for what, (request, status, word) in MALFORMED.items():
            answer = await http.post("/v1/oauth/token", **request)
            assert (answer.status_code, answer.headers["x-should-retry"], answer.json()["error"]) == (status, "false", word), what
        assert issuer.asked == [], "nobody is asked for keys of what is no token"


@pytest.mark.parametrize("framing", ["content-length: 200000", "transfer-encoding: chunked"])
async def test_an_exchange_of_200_kb_is_not_read_to_its_end(tmp_path, framing):
    async with stage(tmp_path) as (gw, _http, _issuer):
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(f"POST /v1/oauth/token HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{framing}\r\n\r\n".encode())
        writer.write(b"%x\r\n%b\r\n" % (100_000, b"x" * 100_000) if "chunked" in framing else b"x" * 100_000)
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"\r\nconnection: close\r\n" in answer, "for clients that would send their next request on it"
        assert b"An exchange has at most 65,536 bytes" in answer
        assert not gw.addon.flow_states


async def test_attempts_by_identity_count_in_the_throttle(tmp_path):
    async with stage(tmp_path) as (_gw, http, issuer):
        for number in range(4 * FAILURES_PER_MINUTE):  # a minute may end meanwhile, and another begin
            refused = await (exchanged(http, "eyJ.x.y") if number % 2 else call(http, "eyJ.x.y"))
            if refused.status_code == 429 and number % 2:
                break
        assert (refused.json()["error"], refused.headers["x-gateway-refusal"]) == ("temporarily_unavailable", "token_noise")
        assert (await exchanged(http, of(issuer))).status_code == 200, "a good one is served at any time"


async def test_by_the_environment_alone_the_sdk_gets_in(tmp_path, monkeypatch):
    """Fifty threads of one client make one exchange; a session that is revoked is renewed once, and no more."""
    async with stage(tmp_path) as (gw, _http, issuer):
        path = tmp_path / "identity-token"
        path.write_text(of(issuer))
        for name in [name for name in os.environ if name.startswith("ANTHROPIC_")]:
            monkeypatch.delenv(name)
        for name, value in {"BASE_URL": gw.url, "IDENTITY_TOKEN_FILE": str(path), "FEDERATION_RULE_ID": "app", "ORGANIZATION_ID": "0" * 8}.items():
            monkeypatch.setenv(f"ANTHROPIC_{name}", value)
        client, answers = anthropic.Anthropic(max_retries=1), []
        threads = [threading.Thread(target=lambda: answers.append(client.messages.create(**HELLO))) for _ in range(50)]
        for each in threads:
            each.start()
        for each in threads:
            await asyncio.to_thread(each.join)
        assert len(answers) == 50
        assert await rows(gw, "SELECT count(*) FROM sessions") == [(1,)]
        await rows(gw, "DELETE FROM sessions RETURNING digest")
        assert (await asyncio.to_thread(client.messages.create, **HELLO)).content, "a 401 makes it exchange again"
        [(number,)] = await rows(gw, "SELECT id FROM tokens WHERE issuer IS NOT NULL")
        await gw.gateway.ledger.change(partial(admin.revoke_tokens, app="app", token_id=number, who="test", now=time.time()))
        with pytest.raises(anthropic.AnthropicError) as raised:
            await asyncio.to_thread(client.messages.create, **HELLO)
        assert "is revoked" in str(raised.value)
        client.close()


async def test_a_change_holds_at_the_next_call_in_every_process(tmp_path):
    """A second gateway on the ledger, as another process has one: a revoked workload, a session that has ended, a rule that is gone."""
    async with stage(tmp_path) as (gw, http, issuer):
        ledger = await Ledger.open(f"sqlite:///{tmp_path / 'gateway.db'}")
        second = Gateway(ledger, gw.gateway.policy, issuer_keys=gw.gateway.identities.keys)
        jwt, session = of(issuer), (await exchanged(http, of(issuer))).json()["access_token"]

        async def answers():
            found = [(await call(http, each)).headers.get("x-gateway-refusal") for each in (jwt, session)]
            for each in (jwt, session):
                headers, now = (("x-api-key", each), ("content-type", "application/json")), time.time()
                caller = await second.authenticate("POST", "/v1/messages", headers, "127.0.0.1", now)
                admitted = await second.admit(caller, Request("POST", "/v1/messages", headers, json.dumps(HELLO).encode()), now) if isinstance(caller, Caller) else caller
                found.append(getattr(admitted, "code", None))
            return found

        assert await answers() == [None] * 4
        [(number,)] = await rows(gw, "SELECT id FROM tokens WHERE issuer IS NOT NULL")
        await gw.gateway.ledger.change(partial(admin.revoke_tokens, app="app", token_id=number, who="test", now=time.time()))
        assert await answers() == ["token_revoked"] * 4
        refused = await exchanged(http, jwt)
        assert (refused.status_code, refused.json()["error"]) == (401, "invalid_grant")
        await rows(gw, "UPDATE tokens SET revoked_at = NULL RETURNING id")
        assert await answers() == [None] * 4
        await rows(gw, "UPDATE sessions SET expires_at = 1 RETURNING digest")
        assert await answers() == [None, "identity_expired"] * 2
        await rows(gw, "UPDATE sessions SET expires_at = 9e9 RETURNING digest")
        path = tmp_path / "policies" / "apps" / "app.yaml"
        path.write_text(APP + RULE.replace("456", "457"))
        gw.gateway.policy = second.policy = load(tmp_path / "policies")
        assert await answers() == ["identity_unknown", "identity_expired"] * 2
        second.stop()
        await ledger.close()


async def test_a_stream_outlives_its_session(tmp_path):
    async with stage(tmp_path, behaviour=Behaviour(tokens_per_s=200, output_tokens=150)) as (gw, http, issuer):
        session = (await exchanged(http, of(issuer))).json()["access_token"]
        client = gw.client(api_key=None, auth_token=session)
        async with client.messages.stream(**HELLO) as stream:
            await anext(aiter(stream))
            await rows(gw, "UPDATE sessions SET expires_at = 1 RETURNING digest")
            message = await stream.get_final_message()
        assert message.stop_reason is not None
        await gw.quiet()
        assert await rows(gw, "SELECT state, complete, flags FROM calls") == [("settled", 1, "")]
        assert await gw.spent_nano() == (await gw.api.settled()).billed_nano
        assert (await call(http, session)).headers["x-gateway-refusal"] == "identity_expired"


async def test_without_a_ledger_nothing_is_minted(tmp_path):
    async with stage(tmp_path) as (gw, http, issuer):
        await exchanged(http, of(issuer))
        (tmp_path / "gateway.db").rename(tmp_path / "away.db")
        for answer in (await exchanged(http, of(issuer)), await exchanged(http, of(issuer, sub="repo:o/new"))):
            assert (answer.status_code, answer.json()["error"], answer.headers["x-gateway-refusal"]) == (503, "temporarily_unavailable", "ledger")
            assert "gwt_" not in answer.text
        assert (await call(http, of(issuer))).headers["x-gateway-refusal"] == "ledger"
        (tmp_path / "away.db").rename(tmp_path / "gateway.db")
        assert await rows(gw, "SELECT count(*) FROM sessions") == [(1,)]


async def test_an_issuer_without_keys_is_503_and_never_open(tmp_path):
    """Tokens of the gateway's own work meanwhile; the issuer's do as soon as it is back, and a rotated key is fetched once."""
    async with published() as issuer:
        issuer.answer = b"HTTP/1.1 500 x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        async with stage(tmp_path, server=issuer) as (gw, http, _):
            for answer in (await call(http, of(issuer)), await exchanged(http, of(issuer))):
                assert (answer.status_code, answer.headers["x-gateway-refusal"], answer.headers["retry-after"]) == (503, "identity_unavailable", "5")
            assert "answers with status 500" in answer.json()["error_description"]
            assert not gw.gateway._throttle._failures, "the issuer's fault is not counted against the caller's address"
            assert (await call(http, gw.tokens["app"])).status_code == 200
            assert len(issuer.asked) == 1, "one question in the cooldown"
            [cache] = gw.gateway.identities.keys._caches.values()
            issuer.answer, cache._asked_s = None, -1e9
            assert (await call(http, of(issuer))).status_code == 200
            rotated = token(claims(iss=issuer.url), key("RSA", 2), kid="k2")
            issuer.keys, cache._asked_s = jwks(jwk(key(), "k1"), jwk(key("RSA", 2), "k2")), -1e9
            before = len(issuer.asked)
            assert [answer.status_code for answer in await asyncio.gather(*(call(http, rotated) for _ in range(10)))] == [200] * 10
            assert len(issuer.asked) == before + 2, "one discovery, one set"
            flood = [token(claims(iss=issuer.url), kid=f"random {number}") for number in range(30)]
            answers = await asyncio.gather(*(call(http, each) for each in flood), call(http, rotated))
            assert [answer.status_code for answer in answers] == [401] * 30 + [200]
            assert len(issuer.asked) == before + 2


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_look_up_is_one_read_by_token_session_and_workload(tmp_path, engine):
    """On both engines; and by the digest alone, as mitmweb sends a flow again."""
    issuers = f"audience: {AUDIENCE}\nissuers: {{here: {{url: {ISSUER}, keys: {{inline: '{jwks().decode()}'}}}}}}\n"
    policy = load(write_policies(tmp_path, "http://127.0.0.1:1", {"reports": APP + RULE}, issuers))
    ledger, secret = await Ledger.open(url(new_ledger(tmp_path, engine))), tokens.mint()
    try:
        await ledger.change(partial(admin.issue_token, app="reports", digest=tokens.digest(secret), who="test", now=time.time()))
        keys = IssuerKeys(partial(issuer_keys.fetch, way=lambda url: STRAIGHT), monotonic_s)
        gateway, jwt = Gateway(ledger, policy, issuer_keys=keys), token(claims())
        session = await gateway.identities.session(jwt, policy.trust, time.time())
        assert isinstance(session, tuple), session

        async def authenticated(*headers, digest=None):
            caller = await gateway.authenticate("POST", "/v1/messages", headers, "127.0.0.1", time.time(), digest)
            assert isinstance(caller, Caller), caller
            return caller

        looked, written, found = [], [], []
        look, write = ledger.look, ledger.write
        await authenticated(("x-api-key", jwt))
        ledger.look = lambda *values: looked.append(values) or look(*values)
        ledger.write = lambda *values: written.append(values) or write(*values)
        for each in (secret, session[0], jwt):
            caller = await authenticated(("authorization", f"Bearer {each}"))
            assert (await authenticated(digest=caller.digest)).token == caller.token
            found.append((caller.app.name, caller.token.issuer))
        assert (written, found) == ([], [("reports", None), ("reports", ISSUER), ("reports", ISSUER)])
        assert 2 <= len(looked) <= 6, "one for each request; a server is not asked twice in half a second, but for a session"
        gateway.stop()
    finally:
        await ledger.close()


async def test_a_token_costs_the_same_where_issuers_are_named(tmp_path):
    """Counted in function calls, Python's and C's, from the headers to the caller."""
    async with stage(tmp_path) as (gw, _http, _issuer):
        headers, counts = (("x-api-key", gw.tokens["app"]),), []

        async def authenticated():
            return await gw.gateway.authenticate("POST", "/v1/messages", headers, "127.0.0.1", time.time())

        for policy in (gw.gateway.policy, replace(gw.gateway.policy, trust=None)):
            gw.gateway.policy, calls = policy, []
            await authenticated()
            sys.setprofile(lambda frame, event, argument, calls=calls: calls.append(event) if event in ("call", "c_call") else None)
            try:
                caller = await authenticated()
            finally:
                sys.setprofile(None)
            assert caller.app.name == "app"
            counts.append(len(calls))
        assert counts[0] == counts[1]


async def test_without_issuers_identity_tokens_are_none(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api) as gw, httpx2.AsyncClient(base_url=gw.url) as http:
        direct, traded = await call(http, token(claims())), await exchanged(http, token(claims()))
        assert (direct.status_code, direct.headers["x-gateway-refusal"]) == (401, "token_malformed") == (traded.status_code, traded.headers["x-gateway-refusal"])
        assert "this gateway believes no issuer" in direct.json()["error"]["message"]
        assert (await call(http, gw.tokens["app"])).status_code == 200


async def test_what_a_process_remembers_of_workloads_is_bounded(monkeypatch):
    monkeypatch.setattr("gateway_addon.calls.identities.KNOWN_MAX", 2)
    writes = []

    class Book:
        async def write(self, change, scope):
            writes.append(change.keywords["subject"])

    identities = WorkloadIdentities(Book(), None)
    for subject in ("a", "a", "b", "c", "c", "a"):

        async def verified(token, trust, now, subject=subject):
            return Workload("app", "https://x.test", subject, 9e9, "r")

        monkeypatch.setattr(identities, "_verified", verified)
        await identities.digest("", None, 0)
    assert writes == ["a", "b", "c", "a"]
    assert len(identities._known) <= 2
