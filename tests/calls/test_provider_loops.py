"""The provider's own loops through the whole gateway: what each turn may write and read is held before the first of them runs."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import anthropic
import pytest
from gateway import gateway
from ledgers import rows
from quotes import NOW, PRICES, app, quoted, reading

from gateway_addon.calls import progress, running, top_ups
from gateway_addon.calls.quote import quote
from gateway_addon.calls.reservation_options import reservation_options
from gateway_addon.ledger import connect
from gateway_addon.ledger.reports import entry_history
from gateway_addon.policy import load
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("idle_clock")

DOLLAR = 1_000_000_000
HAIKU = "claude-haiku-4-5"
POLICIES = Path(__file__).parents[2] / "policies" / "examples"
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
POLICY = """
models: {allow: [claude-opus-5-5]}
caps: {day: CAP}
features: {web_search: {max_uses: 5, tokens_per_use: 10k}}
reserve: RESERVE
"""


def ask(version="20250305", *, max_tokens=32_000, max_uses=5, simulate=None, **more):
    tool = {"type": f"web_search_{version}", "name": "web_search", "max_uses": max_uses, **more}
    text = f"simulate: {json.dumps(simulate)}" if simulate else "hello"
    return {"model": "claude-opus-5-5", "max_tokens": max_tokens, "tools": [tool], "messages": [{"role": "user", "content": text}]}


HOSTILE = Behaviour(hostile=True, result_tokens=10_000)


async def create(gw, body, app="app"):
    return await gw.client(app).with_options(timeout=60).messages.create(**body)


async def streamed(gw, body, app="app"):
    """The raw text of a stream, as far as it came."""
    async with gw.client(app).messages.with_streaming_response.create(**body, stream=True) as answer:
        return "".join([chunk.decode() async for chunk in answer.iter_bytes()])


def policy(cap, reserve="full"):
    return {"app": POLICY.replace("CAP", cap).replace("RESERVE", reserve)}


@pytest.mark.parametrize(("version", "largest"), [("20250305", "9,859."), ("20260209", None)])
async def test_a_loop_that_would_pass_its_cap_is_refused(tmp_path, version, largest):
    """Held as one answer, the call with code between its searches took $3.43 of a cap of $8, and was billed $18.67."""
    async with Simulator(behaviour=HOSTILE) as api, gateway(tmp_path, api, policy("$3")) as gw:
        with pytest.raises(anthropic.RateLimitError) as said:
            await create(gw, ask(version))
        await gw.quiet()
        assert said.value.response.headers["x-gateway-refusal"] == "quote_over_cap"
        if largest is None:
            assert 'by itself is too dear (web_search): leave it out, or allow fewer uses (max_uses), called directly only' in str(said.value)
        else:
            assert f"The largest max_tokens that fits is {largest}" in str(said.value)
        assert (await api.settled()).messages() == []


@pytest.mark.parametrize("version", ["20250305", "20260209"])
async def test_the_dearest_loop_stays_within_its_quote(tmp_path, version):
    """The simulated API fills every turn, reads all of it again each time, and runs code between searches where it may."""
    async with Simulator(behaviour=HOSTILE) as api, gateway(tmp_path, api, policy("$30")) as gw:
        await create(gw, ask(version, max_tokens=3_000))
        await gw.quiet()
        billed_nano = (await api.settled()).billed_nano
        [(quote_nano,)] = rows(tmp_path / "gateway.db", "SELECT quote_nano FROM calls")
        assert await gw.spent_nano() == billed_nano
        assert 0.8 * quote_nano < billed_nano <= quote_nano


async def test_a_streamed_loop_is_cut_where_its_budget_ends(tmp_path):
    """Eleven turns of a tool search: what one writes is read by all later ones, so a token of the grant costs seventy rather than twenty."""
    declare(tmp_path, lag_s=1)
    behaviour = replace(HOSTILE, turns=1, tokens_per_s=380, tokens_per_event=40, ahead_s=0.2, after_disconnect_s=0.5)
    search = {"type": "tool_search_tool_bm25", "name": "tool_search_tool_bm25"}
    apps = {"app": policy("$0.68", "progressive")["app"].replace("features: {", "features: {tool_search: true, ")}
    async with Simulator(behaviour=behaviour) as api, gateway(tmp_path, api, apps) as gw:
        answer = await asyncio.wait_for(streamed(gw, ask() | {"tools": [search]}), 60)
        await gw.quiet()
        written = (await api.settled()).messages()[0].usage.output_tokens
        assert "does not allow this answer to go on" in answer
        assert 1_000 < written < 2_800
        assert await gw.spent_nano() <= 0.68 * DOLLAR


CLAUDE_CODE = (POLICIES / "apps" / "claude-code.yaml").read_text()


def claude_codes(kind, simulate=None):
    """What Claude Code sends for its WebSearch, in 893 bytes: eight uses, 128,000 tokens a turn."""
    tool = {"type": kind, "name": kind[:-9], "max_uses": 8}
    text = f"simulate: {json.dumps(simulate)}" if simulate else "hello"
    system = [{"type": "text", "text": "You are an assistant for performing a web search tool use. " * 10}]
    return {"model": "claude-opus-5-5", "max_tokens": 128_000, "system": system, "tools": [tool], "messages": [{"role": "user", "content": text}]}


@pytest.mark.parametrize("kind", ["web_search_20250305", "web_fetch_20250910"])
async def test_claude_codes_search_runs_with_five_dollars_left(tmp_path, kind):
    """Quoted at $56 under the example policy: held by the turns that can have run, it needs less than $3 to start."""
    assert "caps: {day: $20," in CLAUDE_CODE
    apps = {"app": CLAUDE_CODE.replace("caps: {day: $20,", "caps: {day: $5,")}
    searches = Behaviour(turns=3, result_tokens=9_000, turn_s=0.7, output_tokens=60, tokens_per_s=60)
    async with Simulator(behaviour=searches) as api, gateway(tmp_path, api, apps) as gw:
        answer = await asyncio.wait_for(streamed(gw, claude_codes(kind)), 60)
        assert "event: message_stop" in answer, answer[-500:]
        await gw.quiet()
        assert 0 < await gw.spent_nano() == (await api.settled()).billed_nano


def declare(folder, **constants):
    """Lay other constants over the price table of a gateway that is not there yet."""
    (folder / "policies").mkdir()
    text = ", ".join(f"{name}: {value}" for name, value in constants.items())
    (folder / "policies" / "prices.yaml").write_text(f"assumed: {{{text}}}\n")


@pytest.mark.parametrize("say_nothing_s", [0, 60], ids=["each turn as it runs", "all turns in one piece"])
async def test_turns_are_cut_where_their_budget_ends(tmp_path, say_nothing_s):
    """A provider that searches as fast as declared and brings all that the operator said: nine turns of it are billed $7.70."""
    declare(tmp_path, lag_s=1, turn_s_min=1)
    fast = Behaviour(
        hostile=True, output_tokens=40, tokens_per_s=390, turn_s=1.0, result_tokens=40_000, say_nothing_s=say_nothing_s, after_disconnect_s=0.8
    )  # fmt: skip
    async with Simulator(behaviour=fast) as api, gateway(tmp_path, api, {"app": CLAUDE_CODE.replace("$20", "$3")}) as gw:
        answer = await asyncio.wait_for(streamed(gw, claude_codes("web_search_20250305")), 60)
        await gw.quiet()
        billed_nano = (await api.settled()).billed_nano
        assert "does not allow this answer to go on" in answer
        assert DOLLAR // 2 < billed_nano <= await gw.spent_nano() <= 3 * DOLLAR


def test_the_example_policy_needs_three_dollars_for_a_search():
    policy = load(POLICIES)
    asked = reading(**claude_codes("web_search_20250305"), stream=True)
    bound = quote(asked, policy.apps["claude-code"], policy.prices, NOW)
    [option] = reservation_options(bound, policy.apps["claude-code"], policy, asked, [], overrun=False, now=NOW)
    assert (bound.total_nano // DOLLAR, option.granted_turns) == (56, 4)
    assert option.hold_nano + option.quantum_nano < 3 * DOLLAR


@pytest.mark.parametrize(
    ("tools", "more", "turns"),
    [
        ([SEARCH], {}, 4),
        ([SEARCH | {"type": "web_search_20260209", "allowed_callers": ["direct"]}], {}, 4),
        ([SEARCH, {"type": "web_fetch_20250910", "name": "web_fetch", "max_uses": 1}], {}, 4),
        ([SEARCH | {"max_uses": 2}], {}, 3),
        ([SEARCH | {"type": "web_search_20260209"}], {}, None),
        ([SEARCH, {"type": "code_execution_20250825", "name": "code_execution"}], {}, None),
        ([SEARCH, {"type": "mcp_toolset", "mcp_server_name": "m"}], {"mcp_servers": [{"type": "url", "name": "m", "url": "https://m"}]}, None),
        ([SEARCH, {"type": "tool_search_tool_bm25", "name": "tool_search_tool_bm25"}], {}, 11),  # in memory: no time that one could count
        ([SEARCH], {"fallbacks": [{"model": "claude-haiku-4-5"}]}, 6),
        ([], {}, 1),
    ],
)
def test_only_turns_that_show_are_held_as_they_run(tools, more, turns):
    """Whatever may run turns unseen is held whole (None), for its answer may come in one piece."""
    asked = reading(model="claude-opus-5-5", max_tokens=128_000, stream=True, tools=tools, **more)
    policy = replace(load(POLICIES), prices=PRICES)
    [option] = reservation_options(quoted(asked), replace(app(), reserve="progressive"), policy, asked, [], overrun=False, now=NOW)
    assert option.granted_turns == turns
    assert (turns is None) == (option.granted_tokens == quoted(asked).output_tokens)


CROWD_CAP_NANO = 6 * DOLLAR
CROWD = f"""
models: {{allow: [{HAIKU}]}}
caps: {{day: $6}}
features: {{web_search: {{max_uses: 4, tokens_per_use: 4k}}}}
reserve: progressive
"""


async def search_once(gw, app, chance, said, *, least=False):
    """One call with searches, in one of the ways in which they come, every seventh left. Returns the code of its refusal."""
    said["calls"] += 1
    leaves_s = chance.uniform(0.05, 1.5) if said["calls"] % 7 == 4 else None
    tool = SEARCH | {"max_uses": 1 if least else chance.randint(1, 4)}
    if not least and leaves_s is None and chance.random() < 0.2:
        tool["type"] = "web_search_20260209"
    wishes = {"say_nothing_s": 3} if chance.random() < 0.2 else {}
    text = f"{'a' * 40_000} simulate: {json.dumps(wishes)}"  # a prompt whose tokens are known well: the provider counts one a byte
    body = {"model": HAIKU, "max_tokens": 5_000, "tools": [tool], "messages": [{"role": "user", "content": text}]}
    stream = least or leaves_s is not None or chance.random() < 0.8
    try:
        async with asyncio.timeout(leaves_s):
            await (streamed if stream else create)(gw, body, app)
        said["answered"] += 1
    except TimeoutError:
        said["left"] += 1
    except anthropic.RateLimitError as error:
        code = error.response.headers["x-gateway-refusal"]
        said[code] += 1
        return code
    return None


@pytest.mark.longest
@pytest.mark.parametrize("seeds", [pytest.param(range(i, i + 3), marks=[pytest.mark.soak] if i else []) for i in range(0, 30, 3)])
async def test_a_crowd_that_searches_never_passes_its_cap(tmp_path, monkeypatch, seeds):
    """Held by turns, in steps and whole, answered at once and late, a seventh of the streams left: until nothing more fits.

    Each seed is an app with a cap of its own.
    """
    for module in (progress, running, top_ups):
        monkeypatch.setattr(module, "TICK_S", 0.2)
    declare(tmp_path, lag_s=0.6, turn_s_min=0.4)
    fast = Behaviour(
        hostile=True, output_tokens=60, tokens_per_s=390, turn_s=0.4, result_tokens=4_000, ahead_s=0.1, after_disconnect_s=0.4
    )  # fmt: skip
    said = {f"seed-{seed}": Counter() for seed in seeds}
    async with Simulator(behaviour=fast) as api, gateway(tmp_path, api, dict.fromkeys(said, CROWD)) as gw:

        async def caller(app, chance):
            for least in (False, True):
                while await search_once(gw, app, chance, said[app], least=least) not in ("cap_spent", "quote_over_cap"):
                    await asyncio.sleep(chance.uniform(0, 0.2))

        async with asyncio.timeout(120):
            await asyncio.gather(*(caller(app, random.Random(f"{app} {i}")) for app in said for i in range(5)))
        await gw.quiet()
        billed_nano, held_nano = (await api.settled()).billed_nano, await gw.held_nano()
        spent_nano = [await gw.spent_nano(f"app:{app}") for app in said]
        flags = " ".join(flags for (flags,) in rows(tmp_path / "gateway.db", "SELECT flags FROM calls WHERE flags IS NOT NULL"))
        with connect.reading(tmp_path / "gateway.db") as db:
            exact_nano = sum(call.spent_nano for call in entry_history.forwarded(db) if not call.estimated)
    assert held_nano == 0
    assert 0 < exact_nano <= billed_nano <= sum(spent_nano), said
    assert min(spent_nano) >= 0.85 * CROWD_CAP_NANO, "used up: the bill itself is less, the more so the slower the machine"
    assert max(spent_nano) <= CROWD_CAP_NANO or " late" in flags, "only a machine that stood still explains more"
    assert all(each["answered"] > 10 and each["left"] for each in said.values()), said
