"""Test caps on the parts of an app as its clients meet them: through a real mitmproxy, in the answers and in the refusals."""

import time

import anthropic
import httpx2
import pytest
from gateway import gateway
from ledgers import rows

from gateway_addon.identity import tokens as identity
from gateway_addon.ledger import admin
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.simulator import Behaviour, Simulator

HAIKU, SONNET = "claude-haiku-4-5", "claude-sonnet-5"
CODER = f"""
models:
  allow: [{HAIKU}*, {SONNET}]
  aliases: {{fast: {HAIKU}}}
  caps: {{{SONNET}: {{day: $9}}}}
caps: {{day: $5, cycle: {{amount: $50, from: 17}}}}
features: {{fallbacks: true}}
endpoints: [messages, batches]
labels: {{client: {{values: [acme, beta]}}}}
each:
  session: {{ever: $0.004, last_call: 25%}}
  user: {{day: $0.0035}}
  model: {{day: $0.5}}
  label.client: {{month: $0.003}}
"""
BODY = {"model": HAIKU, "max_tokens": 300, "messages": [{"role": "user", "content": "hello"}]}  # quoted at some $0.0026, costs $0.0013


async def call(client, body=BODY, **headers):
    return await client.messages.with_raw_response.create(**body, extra_headers={name.replace("_", "-"): value for name, value in headers.items()})


async def refused(client, body=BODY, **headers):
    with pytest.raises(anthropic.APIStatusError) as error:
        await call(client, body, **headers)
    return error.value.response.headers["x-gateway-refusal"], error.value.response.json()["error"]["message"]


async def read(stream):
    async with stream as answer:
        await answer.get_final_message()


def session(name):
    return {"x_claude_code_session_id": name}


async def test_each_part_of_an_app_meets_its_own_cap(tmp_path):
    """One gateway, in the order of a day: sessions, last calls, users, labels, models, a token, and what `/gateway/me` says of them."""
    async with Simulator(behaviour=Behaviour(output_tokens=250)) as api, gateway(tmp_path, api, {"coder": CODER}) as gw:
        client = gw.client("coder")
        first = await call(client, **session("s1"))
        await gw.quiet()
        assert first.headers["x-gateway-cap-session"].startswith("spent=$0.00; held=$0.00")
        assert first.headers["x-gateway-cap-session"].endswith("cap=$0.003; window=ever; last_call=$0.001")
        assert first.headers["x-gateway-cap-cycle"].startswith("spent=$0.00")

        code, sentence = await refused(client, **session("s1"))
        assert code == "cap_spent"
        assert sentence.startswith("session s1 of app coder has spent $0.00")
        assert "of its $0.003 for ever; this call needs $0.00" in sentence
        assert sentence.endswith(
            "Its last $0.001 is kept for requests with the header x-gateway-last-call: 1. "
            "Begin another session, or let the operator raise it (policies/apps/coder.yaml: each.session): "
            "gateway cap raise coder ever AMOUNT --until DATE --session s1."
        )
        await call(client, **session("s1"), x_gateway_last_call="1")
        await call(client, **session("s2"))
        await gw.quiet()

        user = BODY | {"metadata": {"user_id": "u1"}}
        await call(client, user)
        await gw.quiet()
        assert (await refused(client, user))[1].startswith("user u1 of app coder has spent $0.00")
        await call(client, BODY | {"metadata": {"user_id": "u2"}})

        await call(client, x_gateway_label_client="acme")
        await gw.quiet()
        assert (await refused(client, x_gateway_label_client="acme"))[1].startswith("client acme of app coder has spent")
        await call(client, x_gateway_label_client="beta")

        async with httpx2.AsyncClient(base_url=gw.url, headers={"x-api-key": gw.tokens["coder"]}) as http:
            assert (await http.get("/gateway/me?model=fast")).json()["parts"][0]["value"] == HAIKU, "an alias is its model"
            me = (await http.get("/gateway/me?session=s1&model=claude-sonnet-5")).json()
            assert [(each["part"], each["value"], each["window"], each["cap"]) for each in me["parts"]] == [
                ("session", "s1", "ever", "$0.004"), ("model", SONNET, "day", "$9.00")
            ]
            assert 0 < me["parts"][0]["spent_nano"] <= 4_000_000
            assert me["parts"][0]["last_call_percent"] == 25
            assert {each["window"]: each["cap"] for each in me["windows"]}["cycle:17"] == "$50.00"
        await gw.quiet()
        assert await gw.gateway.ledger.look(findings) == []


async def test_a_raised_session_goes_on_and_its_refusals_tell_its_cap(tmp_path):
    """The agent that needs more at night: refused, raised, let through; a limit stops it again."""
    async with Simulator(behaviour=Behaviour(output_tokens=250)) as api, gateway(tmp_path, api, {"coder": CODER}) as gw:
        client, scope = gw.client("coder"), "app:coder session:s1"

        async def change(action, nano, **more):
            await gw.gateway.ledger.change(lambda db: action(db, scope, "ever", nano, who="test", now=time.time(), **more))

        await call(client, **session("s1"))
        await gw.quiet()
        with pytest.raises(anthropic.RateLimitError) as refusal:
            await call(client, **session("s1"))
        stands = refusal.value.response.headers["x-gateway-cap-session"]
        assert stands.startswith("spent=$0.0012")
        assert stands.endswith("; held=$0.00; cap=$0.003; window=ever; last_call=$0.001")
        assert refusal.value.response.headers["x-gateway-cap-day"].startswith("spent=$0.0012")
        assert refusal.value.response.headers["anthropic-ratelimit-unified-status"] == "rejected"

        await change(admin.raise_cap, 5_000_000, until=time.time() + 60)
        let_in = await call(client, **session("s1"))
        assert let_in.headers["x-gateway-cap-session"].endswith("cap=$0.008; window=ever; last_call=$0.001")
        await gw.quiet()
        async with httpx2.AsyncClient(base_url=gw.url, headers={"x-api-key": gw.tokens["coder"]}) as http:
            [mine] = (await http.get("/gateway/me?session=s1")).json()["parts"]
        assert (mine["raised"], mine["cap"]) == ("$0.005", "$0.009")

        await change(admin.limit_cap, 3_000_000)
        code, sentence = await refused(client, **session("s1"))
        assert code == "cap_spent"
        assert sentence.endswith(
            "Begin another session. The operator's limit holds (gateway cap list); "
            "to lift it: gateway cap limit coder ever --lift --session s1."
        )


async def test_a_model_is_a_wall_by_whatever_name_it_is_asked(tmp_path):
    """An alias, a dated name, a fallback and a batch of many models: none of them counts elsewhere than under its model."""
    text = CODER.replace("model: {day: $0.5}", "model: {day: $0.004}")
    async with Simulator(behaviour=Behaviour(output_tokens=250)) as api, gateway(tmp_path, api, {"coder": text}) as gw:
        client = gw.client("coder")
        await call(client, BODY | {"model": "fast"})
        await gw.quiet()
        for name in (HAIKU, "fast", f"{HAIKU}-20251001"):
            code, sentence = await refused(client, BODY | {"model": name, "max_tokens": 500})
            assert (code, sentence.partition(" has ")[0]) == ("cap_spent", f"model {HAIKU} of app coder")
        other = {"extra_body": {"fallbacks": [{"model": HAIKU}]}}
        code, sentence = await refused(client, BODY | {"model": SONNET} | other)
        assert code == "model"
        assert "has caps on each model, and a call counts under one: fallbacks[0].model asks for" in sentence
        asked = [{"custom_id": name, "params": BODY | {"model": name}} for name in (HAIKU, SONNET)]
        with pytest.raises(anthropic.PermissionDeniedError, match="a batch counts under one: send one batch for each model"):
            await client.messages.batches.create(requests=asked)
        headers = {"x-claude-code-session-id": "s1"}
        made = await client.messages.batches.with_raw_response.create(requests=asked[1:], extra_headers=headers)
        assert made.headers["x-gateway-cap-session"].endswith("cap=$0.003; window=ever; last_call=$0.001"), "a batch's answer says it too"
        await call(client, BODY | {"model": SONNET})


async def test_a_token_has_a_cap_of_its_own_without_any_policy(tmp_path):
    apps = {"coder": f"models: {{allow: [{HAIKU}]}}\ncaps: unlimited\nmode: observe\n"}
    async with Simulator(behaviour=Behaviour(output_tokens=250)) as api, gateway(tmp_path, api, apps) as gw:
        token = identity.mint()
        await gw.gateway.ledger.change(
            lambda db: admin.issue_token(db, "coder", identity.digest(token), cap_nano=3_000_000, who="test", now=1.0)
        )
        client = gw.client("coder", api_key=token)
        answer = await call(client)
        await gw.quiet()
        assert "cap=$0.003; window=ever" in answer.headers["x-gateway-cap-token"]
        code, sentence = await refused(client)
        assert code == "cap_spent", "an app whose caps are only observed, too"
        assert sentence.endswith("raise it (issued with the token): gateway cap raise coder ever AMOUNT --until DATE --token 2.")
        await call(gw.client("coder"))
        async with httpx2.AsyncClient(base_url=gw.url, headers={"x-api-key": token}) as http:
            [mine] = (await http.get("/gateway/me")).json()["parts"]
        assert (mine["part"], mine["cap_nano"]) == ("token", 3_000_000)


async def test_an_observed_cap_is_looked_at_where_a_call_counts(tmp_path):
    """A session beyond a day's new names counts with the others in observe mode too: the second of them is told so."""
    apps = {"coder": f"models: {{allow: [{HAIKU}]}}\ncaps: unlimited\nmode: observe\nparts_max: 1\neach: {{session: {{ever: $0.003}}}}\n"}
    async with Simulator(behaviour=Behaviour(output_tokens=250)) as api, gateway(tmp_path, api, apps) as gw:
        for name in ("s1", "s2", "s3"):
            answer = await call(gw.client("coder"), **session(name))
            await gw.quiet()
        assert answer.headers["x-gateway-cap-session"].startswith("spent=$0.0012"), "what s2 has spent"
        found = rows(tmp_path / "gateway.db", "SELECT session_id, flags FROM calls ORDER BY id")
        assert found == [("s1", ""), ("s2", ""), ("s3", "observed:cap_spent")]


async def test_a_streams_top_ups_are_judged_by_its_sessions_cap(tmp_path):
    """A stream that is held in steps is cut where its session's cap is, however much its app may spend."""
    text = f"models: {{allow: [{SONNET}]}}\ncaps: {{day: $90}}\nreserve: progressive\neach: {{session: {{ever: $0.03}}}}\n"
    behaviour = Behaviour(output_tokens=9_000, delay_ms=2)
    async with Simulator(behaviour=behaviour) as api, gateway(tmp_path, api, {"coder": text}, lag_s=0.5) as gw:
        body = BODY | {"model": SONNET, "max_tokens": 9_000}
        stream = gw.client("coder").messages.stream(**body, extra_headers={"x-claude-code-session-id": "s1"})
        with pytest.raises(anthropic.APIStatusError, match="budget"):
            await read(stream)
        await gw.quiet()
        assert 0 < await gw.spent_nano() <= 30_000_000
