"""Progressive reservations through a real mitmproxy: comfortable for Claude Code, cut where the budget ends, never passed."""

import asyncio
import json
import sqlite3
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import anthropic
import pytest
from gateway import gateway
from ledgers import until
from upstreams import chunked, event, upstream

from gateway_addon.ledger import admin, connect
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("idle_clock")

DOLLAR = 1_000_000_000
AGENT = """
models: {allow: [claude-opus-5-5, claude-haiku-4-5]}
caps: {day: $5}
"""


def big(simulate=None, *, kilobytes=60, max_tokens=128_000, model="claude-opus-5-5", **more):
    """A request as Claude Code makes them: much context, 128,000 tokens asked for."""
    tools = [{"name": "edit", "description": "Edits files. " * (kilobytes * 75), "input_schema": {"type": "object"}}]
    ask = f"simulate: {json.dumps(simulate)}" if simulate else "hello"
    return {"model": model, "max_tokens": max_tokens, "tools": tools, "messages": [{"role": "user", "content": ask}], **more}


def rows(folder, query):
    db = sqlite3.connect(folder / "gateway.db")
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


async def events(gw, body, app="app"):
    """The raw text of a stream, as far as it came."""
    received = b""
    async with gw.client(app).messages.with_streaming_response.create(**body, stream=True) as answer:
        async for chunk in answer.iter_bytes():
            received += chunk
    return received.decode()


async def test_claude_codes_hello_holds_cents_after_its_first_event(tmp_path):
    """A hello of Claude Code's size holds cents after its first event."""
    async with Simulator(behaviour=Behaviour(delay_ms=40, output_tokens=300)) as api, gateway(tmp_path, api, {"app": AGENT}) as gw:
        async with gw.client().messages.stream(**big()) as stream:
            async for event in stream:
                if event.type == "content_block_delta":
                    break
            await asyncio.sleep(0.1)
            held = await gw.held_nano()
            assert 0 < held < DOLLAR // 4, "the worst case of such a call is $2.86"
            await stream.get_final_message()
        await gw.quiet()
        assert await gw.spent_nano() == (await api.settled()).billed_nano


@pytest.mark.parametrize(("at_once", "written"), [(True, ["reserve", "settle"]), (False, ["reserve", "release", "settle"])])
async def test_input_surplus_is_released_once_not_for_whole_answers(tmp_path, at_once, written):
    """The settlement of a whole answer follows at once: one write of the ledger is enough."""
    opening = {"id": "msg_1", "type": "message", "model": "claude-haiku-4-5", "usage": {"input_tokens": 9, "output_tokens": 1}}
    rest = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 24}) + event("message_stop")
    body = chunked(event("message_start", message=opening), event("ping"), rest, more="connection: close\r\n")
    ask = {"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}
    async with upstream(body, piece_bytes=None if at_once else 200) as api, gateway(tmp_path, None, upstream=api.url) as gw:
        await events(gw, ask)
        await gw.quiet()
    assert [kind for (kind,) in rows(tmp_path, "SELECT kind FROM entries ORDER BY id")] == written


async def test_eight_agents_work_side_by_side_under_five_dollars_a_day(tmp_path):
    async with Simulator(behaviour=Behaviour(delay_ms=20, output_tokens=400, tokens_per_event=16)) as api, gateway(tmp_path, api, {"app": AGENT}) as gw:

        async def agent():
            for _ in range(2):
                async with gw.client().messages.stream(**big()) as stream:
                    await stream.get_final_message()

        await asyncio.gather(*(agent() for _ in range(8)))
        await gw.quiet()
        book = await api.settled()
        assert len(book.messages()) == 16
        assert await gw.spent_nano() == book.billed_nano <= 5 * DOLLAR


SMALL = """
models: {allow: [claude-opus-5-5]}
caps: {day: $0.16}
reserve: progressive
"""


@pytest.mark.parametrize("hostile", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["honest", "hostile"])
async def test_stream_over_budget_is_cut_after_a_whole_event(tmp_path, hostile):
    """A stream that outgrows its budget is cut after a whole event, and charged no less than its bill."""
    behaviour = Behaviour(hostile=hostile, output_tokens=60_000, tokens_per_s=380, tokens_per_event=40, ahead_s=0.5, after_disconnect_s=1.0)
    async with Simulator(behaviour=behaviour) as api, gateway(tmp_path, api, {"app": SMALL}) as gw:
        text = await asyncio.wait_for(events(gw, big(kilobytes=0)), 60)
        await gw.quiet()
        book = await api.settled()
        spent = await gw.spent_nano()
        last = text.rstrip("\n").split("\n\n")[-1]
        assert last.startswith("event: error\ndata: ")
        error = json.loads(last.split("data: ", 1)[1])["error"]
        assert error["type"] == "billing_error"
        assert "does not allow this answer to go on" in error["message"]
        for event in text.rstrip("\n").split("\n\n"):
            json.loads(event.split("data: ", 1)[1])
        assert 0 < book.billed_nano <= spent <= 0.16 * DOLLAR
        [(flags,)] = rows(tmp_path, "SELECT flags FROM calls")
        assert {"cut:budget", "estimated:cut"} <= set(flags.split())


@pytest.mark.parametrize("piece_bytes", [None, 65_536, 1_000, 7_777])
async def test_nothing_follows_the_last_word_of_a_cut_stream(tmp_path, piece_bytes):
    """An answer that comes at once, faster than any model writes: the pieces that were on their way when it was cut stay out."""
    opening = {"id": "msg_1", "type": "message", "model": "claude-opus-5-5", "usage": {"input_tokens": 9, "output_tokens": 1}}
    block = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    told = [event("content_block_delta", index=0, delta={"type": "text_delta", "text": "word " * (n % 40)}) for n in range(4_000)]
    whole = b"".join((event("message_start", message=opening), block, *told))
    pieces = [whole[at : at + 3_001] for at in range(0, len(whole), 3_001)]  # as the API does, chunks end in the middle of events
    async with upstream(chunked(*pieces), piece_bytes=piece_bytes) as api, gateway(tmp_path, None, {"app": SMALL}, upstream=api.url) as gw:
        text = await asyncio.wait_for(events(gw, big(kilobytes=0)), 60)
        parts = [json.loads(each.split("data: ", 1)[1]) for each in text.rstrip("\n").split("\n\n")]
        assert [part["type"] for part in parts].count("error") == 1
        assert parts[-1]["type"] == "error"


async def test_a_silent_stream_is_closed_where_its_grant_ends(tmp_path):
    """Nothing arrives, so everything may have been generated: the clock alone ends it."""
    silent = Behaviour(say_nothing_s=60, output_tokens=50_000, tokens_per_s=380)
    async with Simulator(behaviour=silent) as api, gateway(tmp_path, api, {"app": SMALL.replace("$0.16", "$0.05")}, lag_s=1) as gw:
        text = await asyncio.wait_for(events(gw, big(kilobytes=0)), 30)
        assert "event: error" in text
        await gw.quiet()
        assert (await api.settled()).billed_nano <= await gw.spent_nano() <= 0.05 * DOLLAR


@pytest.mark.parametrize(("cap", "leaves_after_s"), [(0.03, None), (1, 1.5)], ids=["cut", "left"])
async def test_a_clock_set_back_an_hour_does_not_pace_a_stream(tmp_path, idle_clock, cap, leaves_after_s):
    """A resumed laptop, or NTP, while the model thinks unseen: the stream ends where its cap does, or is booked to when it was left."""
    back_s = [0.0]
    clocks = replace(idle_clock, now=lambda: idle_clock.now() - back_s[0])
    thinks = Behaviour(tokens_per_s=380, output_tokens=50_000, thinking="hidden", thinking_tokens=49_000, ping_s=0.1)
    policy = SMALL.replace("$0.16", f"${cap}")
    async with Simulator(behaviour=thinks) as api, gateway(tmp_path, api, {"app": policy}, clocks=clocks, lag_s=0.3) as gw:
        stream = asyncio.ensure_future(events(gw, big(kilobytes=0)))
        await until(lambda: any(running.meter for running in gw.gateway.streams.running))
        back_s[0] = 3600.0
        with suppress(TimeoutError):
            text = await asyncio.wait_for(stream, leaves_after_s or 15)
        await gw.quiet()
        assert 0 < (await api.settled()).billed_nano <= await gw.spent_nano() <= cap * DOLLAR
        [(flags,)] = rows(tmp_path, "SELECT flags FROM calls")
        assert ("cut:budget" in flags.split()) == (leaves_after_s is None)
        assert leaves_after_s or "does not allow this answer to go on" in text


async def test_time_that_the_loop_lost_is_generating_time(tmp_path, monkeypatch, caplog):
    """The gateway cannot cut while it stands still: the stream ends when it wakes, booked at what was generated, and flagged.

    It stands still on the clocks that gateway, loop and provider go by: between two turns of the loop many seconds are gone.
    """
    loop, stalled_s = asyncio.get_running_loop(), [0.0]
    monkeypatch.setattr(loop, "time", partial(lambda loop_s: loop_s() + stalled_s[0], loop.time))
    chatty = Behaviour(tokens_per_s=380, output_tokens=50_000, tokens_per_event=8)
    async with Simulator(behaviour=chatty) as api, gateway(tmp_path, api, {"app": SMALL.replace("$0.16", "$0.10")}, lag_s=1) as gw:
        stream = asyncio.ensure_future(events(gw, big({"thinking": "off"}, kilobytes=0)))
        await until(lambda: any(running.progress.seen.content_events for running in gw.gateway.streams.running))
        stalled_s[0] = 20.0
        await asyncio.wait_for(stream, 15)
        await gw.quiet()
        assert 0.10 * DOLLAR < (await api.settled()).billed_nano <= await gw.spent_nano()
        [(flags,)] = rows(tmp_path, "SELECT flags FROM calls")
        assert {"cut:budget", "late", "overrun"} <= set(flags.split())
        assert await gw.gateway.ledger.overruns() == frozenset(), "the model kept its pace"
        await until(lambda: "the gateway stood still for" in caplog.text)


async def test_top_ups_are_few_writes_however_many_streams_run(tmp_path):
    """Top-ups are a few writes a second, however many streams run."""
    async with Simulator(behaviour=Behaviour(tokens_per_s=300, output_tokens=1800, tokens_per_event=30)) as api, gateway(tmp_path, api, {"app": AGENT}) as gw:
        gw.gateway.ledger.extend, writes = _counted(gw.gateway.ledger.extend)
        began_s = asyncio.get_running_loop().time()
        await asyncio.gather(*(events(gw, big(kilobytes=0)) for _ in range(6)))
        took_s = asyncio.get_running_loop().time() - began_s
        await gw.quiet()
        assert 1 <= len(writes) <= 4 * took_s + 2
        [(extends,)] = rows(tmp_path, "SELECT count(*) FROM entries WHERE kind = 'extend'")
        assert extends >= 6, "each stream was topped up"
        assert await gw.spent_nano() == (await api.settled()).billed_nano


def _counted(function):
    calls = []

    async def counting(top_ups, **options):
        calls.append(top_ups)
        return await function(top_ups, **options)

    return counting, calls


def pause(path):
    with connect.changing(path) as db:
        admin.pause(db, "app:app", cut=True, who="test", why="runaway loop", now=time.time())


async def test_a_pause_now_ends_streams_in_flight_with_a_reason(tmp_path):
    async with Simulator(behaviour=Behaviour(delay_ms=50, output_tokens=5_000)) as api, gateway(tmp_path, api, {"app": AGENT}) as gw:
        stream = asyncio.ensure_future(events(gw, big(kilobytes=0)))
        await until(lambda: api.book.in_flight)
        await asyncio.to_thread(pause, tmp_path / "gateway.db")  # as from another process: the loop does the ledger's work too
        text = await asyncio.wait_for(stream, 10)
        assert '"permission_error"' in text.split("event: error")[1]
        with pytest.raises(anthropic.PermissionDeniedError, match="paused until it is resumed \\(runaway loop\\)"):
            await gw.client().messages.create(**big(kilobytes=0, max_tokens=100))
        await gw.quiet()
        assert await gw.spent_nano() >= (await api.settled()).billed_nano > 0


async def test_overrun_set_meanwhile_is_seen_by_a_slow_body(tmp_path, monkeypatch):
    """What the ledger said at the headers is not what it says when a slow body is here at last."""
    monkeypatch.setattr("gateway_addon.calls.gateway.OVERRUNS_FRESH_S", 0.05)
    body = json.dumps(big(kilobytes=0, max_tokens=300_000) | {"stream": True}).encode()
    async with Simulator() as api, gateway(tmp_path, api, {"app": AGENT}) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {gw.tokens['app']}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode())
        await until(lambda: any(flow_state.caller for flow_state in gw.addon.flow_states.values()))
        with connect.changing(tmp_path / "gateway.db") as db:
            db.execute("INSERT INTO overruns VALUES ('claude-opus-5-5', 1, 0, 1)")
        await asyncio.sleep(0.06)
        writer.write(body)
        answer = await asyncio.wait_for(reader.read(-1), 10)
        writer.close()
    assert b"429" in answer.partition(b"\r\n")[0]
    assert b"largest max_tokens" in answer


async def test_bill_above_its_grant_is_posted_in_full_and_flagged(tmp_path, caplog):
    """The provider breaks the declared pace: it is not hidden, and not trusted again."""
    async with Simulator(behaviour=Behaviour(overrun=True, output_tokens=20_000, delay_ms=1, tokens_per_event=200)) as api, gateway(tmp_path, api, {"app": AGENT}) as gw:
        await events(gw, big(kilobytes=0) | {"messages": [{"role": "user", "content": 'simulate: {"thinking": "off"}'}]})
        await gw.quiet()
        book = await api.settled()
        flags = rows(tmp_path, "SELECT flags FROM calls")[0][0].split()
        if "overrun" in flags:
            assert await gw.spent_nano() == book.billed_nano
            assert await gw.gateway.ledger.overruns() == {"claude-opus-5-5"}
            with pytest.raises(anthropic.RateLimitError, match="largest max_tokens"):
                await events(gw, big(kilobytes=0, max_tokens=300_000))
        else:
            assert "cut:budget" in flags, "what outruns its grant is cut before it can end"


async def test_the_request_cap_limits_what_a_stream_may_grow_to(tmp_path):
    policy = AGENT.replace("{day: $5}", "{request: $0.12, day: $5}")
    async with Simulator(behaviour=Behaviour(output_tokens=60_000, tokens_per_s=390, tokens_per_event=40)) as api, gateway(tmp_path, api, {"app": policy}) as gw:
        text = await asyncio.wait_for(events(gw, big(kilobytes=0)), 60)
        await gw.quiet()
        assert "event: error" in text
        assert (await api.settled()).billed_nano <= await gw.spent_nano() <= 0.12 * DOLLAR


@pytest.mark.parametrize(("reserve", "refused"), [("full", True), ("auto", False), ("progressive", False)])
async def test_the_policy_chooses_how_a_stream_is_reserved(tmp_path, reserve, refused):
    policy = f"models: {{allow: [claude-opus-5-5]}}\ncaps: {{day: $2}}\nreserve: {reserve}\n"
    async with Simulator() as api, gateway(tmp_path, api, {"app": policy}) as gw:
        if refused:
            with pytest.raises(anthropic.RateLimitError) as said:
                await events(gw, big(kilobytes=0))
            assert said.value.response.headers["x-gateway-refusal"] == "quote_over_cap"
        else:
            assert "message_stop" in await events(gw, big(kilobytes=0))
