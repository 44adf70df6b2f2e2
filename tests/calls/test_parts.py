"""Test what is recorded of a call's part of its app, through a real mitmproxy: session, agents, user, labels from three places."""

import asyncio
import json
import re
from collections import Counter
from functools import partial

import anthropic
import pytest
from click.testing import CliRunner
from gateway import APP, gateway
from ledgers import until

from gateway_addon.cli import main
from gateway_addon.identity import tokens
from gateway_addon.ledger import admin
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("idle_clock")

LABELLED = APP + "each: {session: {ever: $2}}\nlabels: {client: {values: [acme, beta]}, branch: {}, pr: {from: token}}\nendpoints: [messages, count_tokens, models, batches]\n"
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
        with pytest.raises(anthropic.PermissionDeniedError, match="its labels cannot be read"):
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


async def command(gw, *arguments):
    """A command as an operator types it, in another thread: its exit code, and all that it printed."""
    line = [*arguments, "--ledger", f"sqlite:///{gw.folder}/gateway.db", "--policies", str(gw.folder / "policies")]
    done = await asyncio.to_thread(CliRunner().invoke, main, line)
    return done.exit_code, done.output


async def streamed(gw, session, **more):
    """The text of a stream of one session, as far as it came."""
    received, said = b"", {"x-claude-code-session-id": session, **more}
    async with gw.client().messages.with_streaming_response.create(**ASKED | {"max_tokens": 5_000}, stream=True, extra_headers=said) as answer:
        async for chunk in answer.iter_bytes():
            received += chunk
    return received.decode()


async def test_a_paused_session_is_cut_and_the_others_go_on(tmp_path):
    """From the next call on, by the beginning of its id; with --now its stream ends too, and what it generated is booked."""
    async with Simulator(behaviour=Behaviour(delay_ms=20, output_tokens=800)) as api, gateway(tmp_path, api, {"app": LABELLED}) as gw:
        loops, goes_on = (asyncio.ensure_future(streamed(gw, session)) for session in ("loops-1111", "fine-2222"))
        await until(lambda: len(api.book.all()) == 2)
        assert re.findall(r"^(loops-1111|fine-2222) +app +1 ", (await command(gw, "sessions"))[1], re.MULTILINE)
        code, printed = await command(gw, "pause", "--session", "loops", "--now", "--why", "runaway")
        listed = {each["session"]: each for each in json.loads((await command(gw, "sessions", "--json"))[1])}
        for name, paused in (("loops-1111", True), ("fine-2222", False)):
            [cap] = listed[name]["caps"]
            assert (listed[name]["paused"], cap["window"], cap["in_force_nano"]) == (paused, "ever", 2_000_000_000)
            assert cap["left_nano"] + cap["spent_nano"] + cap["held_nano"] == 2_000_000_000
        assert re.search(r"^loops-1111 +app .* \$2\.00 +\$1\.\d\d +paused +20", (await command(gw, "sessions"))[1], re.MULTILINE)
        assert (code, bool(re.match(r"session loops-1111 of any app is paused until .+ Calls in flight are cut\.", printed))) == (0, True), printed
        assert "The operator paused the app 'app', or the part of it that asked" in (await asyncio.wait_for(loops, 10)).split("event: error")[1]
        with pytest.raises(anthropic.PermissionDeniedError, match=r"[Ss]ession loops-1111 of any app is paused .*\(runaway\).*resume --session loops-1111\."):
            await gw.client().messages.create(**ASKED, extra_headers={"x-claude-code-session-id": "loops-1111"})
        assert "event: message_stop" in await goes_on
        assert (await command(gw, "resume", "--session", "loops"))[0] == 0
        assert "event: message_stop" in await streamed(gw, "loops-1111", **{"x-gateway-label-client": "acme"})
        await gw.quiet()
        assert await gw.spent_nano() >= (await api.settled()).billed_nano > 0


async def refusal(gw, **more):
    """The sentence by which a call is refused, "" where it is not."""
    try:
        await gw.client().messages.create(**ASKED, **more)
    except anthropic.PermissionDeniedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("option", "value", "hit"),
    [("--user", "u-1", {"user"}), ("--label", "client=acme", {"label"}), ("--agent", "a-1", {"agent", "child"})],
)
async def test_a_paused_part_refuses_its_calls_at_once(tmp_path, option, value, hit):
    calls = {
        "user": {"metadata": {"user_id": "u-1"}},
        "label": {"extra_headers": {"x-gateway-label-client": "acme"}},
        "agent": {"extra_headers": {"x-claude-code-agent-id": "a-1"}},
        "child": {"extra_headers": {"x-claude-code-agent-id": "a-2", "x-claude-code-parent-agent-id": "a-1"}},
        "plain": {},
    }
    async with Simulator() as api, gateway(tmp_path, api, {"app": LABELLED}) as gw:
        code, printed = await command(gw, "pause", "app", option, value)
        assert (code, "None of the last 100,000 calls had it" in printed) == (0, True), printed
        refused = {name: await refusal(gw, **more) for name, more in calls.items()}
        assert {name for name, sentence in refused.items() if sentence} == hit
        assert all(f"{value.rpartition('=')[2]} of the app 'app' is paused" in refused[name] for name in hit)
        assert (await command(gw, "resume", "app", option, value))[0] == 0
        assert (await command(gw, "resume", "app", option, value))[0] == 1


async def test_what_cannot_be_paused_is_said_in_a_sentence(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": LABELLED}) as gw:
        for arguments, said in (
            (["--session", "nobody"], "No session 'nobody' in this ledger"),
            (["--session", "a", "--user", "b"], "Name one part of an app"),
            (["--label", "a=1", "--label", "b=2"], "Name one part of an app"),
            (["--label", "client"], "write NAME=VALUE like client=acme"),
            (["app", "--session", ""], "is empty"),
            (["app", "--user", " "], "is empty"),
            (["app", "--all"], "Say which: an APP, team:NAME, --all, or --session"),
            ([], "Say which: an APP, team:NAME, --all, or --session"),
        ):
            code, printed = await command(gw, "pause", *arguments)
            assert (code, said in printed) == (2, True), printed
