"""Test what is recorded of a call's part of its app, through a real mitmproxy: session, agents, user, labels from three places."""

import json
from collections import Counter
from functools import partial

import anthropic
import pytest
from gateway import APP, gateway
from ledgers import until

from gateway_addon.identity import tokens
from gateway_addon.ledger import admin
from gateway_addon.simulator import Simulator

LABELLED = APP + "labels: {client: {values: [acme, beta]}, branch: {}, pr: {from: token}}\nendpoints: [messages, count_tokens, models, batches]\n"
ASKED = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hello"}]}
SUBAGENT = {"x-claude-code-session-id": "s-1", "x-claude-code-agent-id": "a-2", "x-claude-code-parent-agent-id": "a-1"}


PARTS = "SELECT session_id, agent_id, parent_agent_id, user_id, labels FROM calls"


async def issue(gw, labels):
    secret = tokens.mint()
    await gw.gateway.ledger.change(partial(admin.issue_token, app="app", digest=tokens.digest(secret), labels=labels, who="test", now=1.0))
    return secret


async def test_a_call_is_recorded_with_its_parts(tmp_path):
    """One gateway for each way to say them; nothing of it leaves to the upstream, and the path is the API's own."""
    reported = []
    async with Simulator() as api, gateway(tmp_path, api, {"app": LABELLED}, on_call=reported.append) as gw:
        header = {"x-gateway-label-client": "acme"}
        fixed = await issue(gw, (("client", "beta"), ("pr", "41")))
        in_path, marked = gw.client(base_url=f"{gw.url}/l/client=acme,branch=a%2Fb"), gw.client(api_key=fixed)
        await gw.client().messages.create(**ASKED, metadata={"user_id": "u-1"}, extra_headers=SUBAGENT)
        await gw.client().messages.create(**ASKED, extra_headers=header)
        await in_path.messages.create(**ASKED)
        await in_path.beta.messages.create(**ASKED)
        await marked.messages.create(**ASKED, extra_headers=header)
        with pytest.raises(anthropic.PermissionDeniedError, match="may not say client=nobody; allowed: acme, beta"):
            await gw.client().messages.create(**ASKED, extra_headers={"x-gateway-label-client": "nobody", "x-claude-code-session-id": "s-2"})
        with pytest.raises(anthropic.PermissionDeniedError, match="set the client's base URL"):
            await gw.client(base_url=f"{gw.url}/l/nonsense").messages.create(**ASKED)
        await in_path.messages.count_tokens(model=ASKED["model"], messages=ASKED["messages"])
        await marked.messages.batches.create(requests=[{"custom_id": "1", "params": ASKED}])
        await until(lambda: len(reported) == 8)  # all but the batch
        recorded = await gw.gateway.ledger.change(lambda db: db.execute(PARTS).fetchall())
        sent = (await api.settled()).all()
    acme, path, token = '{"client": "acme"}', '{"branch": "a/b", "client": "acme"}', '{"client": "beta", "pr": "41"}'
    nobody = (None, None, None, None)
    assert Counter(recorded) == Counter([
        ("s-1", "a-2", "a-1", "u-1", None), (*nobody, acme), (*nobody, path), (*nobody, path), (*nobody, token),
        ("s-2", None, None, None, None), (None,) * 5, (*nobody, path), (*nobody, token),
    ])  # fmt: skip
    assert {each.target.partition("?")[0] for each in sent} == {"/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches"}
    assert not [name for each in sent for name, _ in each.headers if name.lower().startswith("x-gateway-")]
    assert ("s-1", "a-2", "a-1", "u-1") in [tuple(each[name] for name in ("session", "agent", "parent_agent", "user")) for each in reported]
    assert json.loads(token) in [each["labels"] for each in reported]
