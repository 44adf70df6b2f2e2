"""Workloads with parts that nobody here wrote: an OpenID provider that rotates its keys, and Claude Code by its environment alone."""

import json
import time
from functools import partial
from pathlib import Path

import claude_code
import httpx2
import pytest
from gateway import APP, gateway
from issuers import AUDIENCE, ISSUER, SUBJECT, claims, jwks, token
from openid import identity, provider
from ports import free_port

from gateway_addon.calls.exchange import GRANT_TYPE
from gateway_addon.ledger import admin
from gateway_addon.simulator import Simulator

pytestmark = pytest.mark.npm

SHIPPED = (Path(__file__).parents[2] / "policies" / "examples" / "apps" / "claude-code.yaml").read_text()
HELLO = {"model": "claude-haiku-4-5", "max_tokens": 200, "messages": [{"role": "user", "content": "hi"}]}


async def test_a_real_providers_tokens_and_rotated_keys_are_taken(tmp_path):
    """Through an outage of the provider, and with a stranger's token that is as good and has no rule."""
    port = free_port()
    rule = "workloads: [{issuer: op, subject: nightly, claims: {client_id: nightly}}]\n"
    policy = f"audience: {AUDIENCE}\nissuers: {{op: {{url: 'http://127.0.0.1:{port}', algorithms: [RS256]}}}}\n"
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP + rule}, policy) as gw, httpx2.AsyncClient(base_url=gw.url) as http:

        async def call(credential):
            return (await http.post("/v1/messages", headers={"x-api-key": credential, "anthropic-version": "2023-06-01"}, json=HELLO)).status_code

        async def exchanged(assertion):
            return await http.post("/v1/oauth/token", json={"grant_type": GRANT_TYPE, "assertion": assertion})

        async with provider(tmp_path / "op", port, "first", AUDIENCE) as url:
            nightly, stranger = await identity(url, "nightly"), await identity(url, "stranger")
            assert await call(nightly) == 200
            session = (await exchanged(nightly)).json()["access_token"]
            assert await call(session) == 200
            refused = await exchanged(stranger)
            assert (refused.status_code, "sub stranger" in refused.json()["error_description"]) == (403, True)
        assert await call(nightly) == 200, "the provider is down, its keys are known"
        async with provider(tmp_path / "op", port, "second", AUDIENCE) as url:
            rotated = await identity(url, "nightly")
            [cache] = gw.gateway.identities.keys._caches.values()
            assert await call(rotated) == 401, "a new key is asked for once in a cooldown"
            cache._asked_s -= 30
            assert await call(rotated) == 200
            assert await call(nightly) == 401, "a key that is no longer published is none"
            assert await call(session) == 200


async def test_claude_code_gets_in_by_its_environment_alone(tmp_path):
    rule = "workloads: [{issuer: ci, claims: {repository_id: 456}}]\n"
    policy = f"audience: {AUDIENCE}\nissuers: {{ci: {{url: {ISSUER}, keys: {{inline: '{jwks().decode()}'}}}}}}\n"
    async with Simulator() as api, gateway(tmp_path, api, {"app": SHIPPED + rule}, policy) as gw:
        path = tmp_path / "identity-token"
        path.write_text(token(claims()))
        ask = partial(
            claude_code.ask, tmp_path / "home", "Say hello.", "--output-format", "json",
            ANTHROPIC_BASE_URL=gw.url, ANTHROPIC_IDENTITY_TOKEN_FILE=str(path), ANTHROPIC_FEDERATION_RULE_ID="app",
            ANTHROPIC_ORGANIZATION_ID="00000000-0000-0000-0000-000000000000", CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )  # fmt: skip
        code, printed = await ask()
        assert (code, json.loads(printed)["is_error"]) == (0, False), printed
        await gw.quiet()
        found = await gw.gateway.ledger.change(lambda db: db.execute("SELECT DISTINCT calls.app, state, label FROM calls JOIN tokens ON tokens.id = token_id").fetchall())
        assert found == [("app", "settled", SUBJECT)]
        [row] = await gw.gateway.ledger.change(lambda db: db.execute("SELECT id FROM tokens WHERE issuer IS NOT NULL").fetchall())
        await gw.gateway.ledger.change(partial(admin.revoke_tokens, app="app", token_id=row[0], who="test", now=time.time()))
        code, printed = await ask()
        assert code != 0
        assert "is revoked" in printed, printed
