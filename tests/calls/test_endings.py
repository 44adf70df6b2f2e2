"""Each row of settlement's table, through a real mitmproxy: however a call ends, it is resolved once, at no less than its bill."""

import asyncio
import contextlib
import sqlite3
from dataclasses import replace

import anthropic
import pytest
from call_rows import calls
from gateway import gateway
from upstreams import START, answer, event, message, upstream

from gateway_addon.calls import settlement
from gateway_addon.simulator import Behaviour, Simulator, delivery

pytestmark = pytest.mark.usefixtures("idle_clock")

ASK = {"model": "claude-haiku-4-5", "max_tokens": 120, "messages": [{"role": "user", "content": "Say hello."}]}
APPS = {"app": "models: {allow: [claude-haiku-4-5, claude-sonnet-5]}\ncaps: {day: $100}\nreserve: full\n"}


async def ask(gw, *, stream: bool = False, leave_after: int | None = None, **more) -> bytes | Exception:
    """The bytes of an answer, or how it failed. `leave_after`: hang up after so many events."""
    received = b""
    try:
        async with gw.client().messages.with_streaming_response.create(**(ASK | more), stream=stream) as said:
            if leave_after == 0:
                return b""
            async for chunk in said.iter_bytes():
                received += chunk
                if leave_after is not None and received.count(b"\n\n") >= leave_after:
                    return received
    except Exception as error:
        return error
    return received


ENDINGS = [
    # (what, the upstream's answer, stream, state, flag, exact spend: "nothing", "grant" or None for anything up to the grant)
    ("an error envelope", answer(529, "application/json", b'{"type":"error","error":{"type":"overloaded_error","message":"x"}}'), False,
     "voided", "upstream:overloaded_error", "nothing"),
    ("an error page", answer(504, "text/html", b"<html>Timed out</html>"), False, "settled", "estimated:error_unreadable", "grant"),
    ("an edge's refusal", answer(429, "text/html", b"<html>Slow down</html>"), False, "voided", "edge:429", "nothing"),
    ("an edge that found no origin", answer(502, "text/html", b"<html>Bad gateway</html>"), False, "voided", "assumed_unbilled", "nothing"),
    ("an error envelope with 200", answer(200, "application/json", b'{"type":"error","error":{"type":"overloaded_error","message":"x"}}'),
     False, "voided", "upstream:overloaded_error", "nothing"),
    ("an error without a body", answer(500, "application/json", b""), False, "settled", "estimated:error_unreadable", "grant"),
    ("an error envelope cut short", answer(500, "application/json", b'{"type":"error","error":{"type":', announce=99), False,
     "settled", "estimated:error_unreadable", "grant"),
    ("an error that is an answer", answer(500, "application/json", message()), False, "settled", "estimated:error_unreadable", None),
    ("a hang-up before the status", b"", False, "settled", "estimated:no_status", "grant"),
    ("half of a status line", b"HTTP/1.1 2", False, "settled", "estimated:no_status", "grant"),
    ("no HTTP at all", b"SSH-2.0-OpenSSH_9.6\r\n", False, "settled", "estimated:no_status", "grant"),
    ("junk for JSON", answer(200, "application/json", b"\x00\x01junk"), False, "settled", "estimated:usage_unreadable", "grant"),
    ("an empty 200", answer(200, "application/json", b""), False, "settled", "estimated:usage_unreadable", "grant"),
    ("JSON cut in the middle", answer(200, "application/json", message()[:-30], announce=len(message())), False,
     "settled", "estimated:usage_unreadable", "grant"),
    ("JSON without usage", answer(200, "application/json", b'{"type":"message","model":"claude-haiku-4-5","content":[]}'), False,
     "settled", "estimated:usage_unreadable", "grant"),
    ("a model without a price", answer(200, "application/json", message("claude-unheard-of-9")), False,
     "settled", "estimated:model_unpriced", "grant"),
    ("a web page for a stream", answer(200, "text/html", b"<html>Welcome to the hotel</html>"), True,
     "settled", "estimated:usage_unreadable", "grant"),
    ("pings only", answer(200, "text/event-stream", event("ping") * 3), True, "settled", "estimated:usage_unreadable", "grant"),
    ("a stream that ends after its start", answer(200, "text/event-stream", START), True, "settled", "estimated:cut", None),
    ("an error event at the start", answer(200, "text/event-stream", event("error", error={"type": "api_error", "message": "x"})), True,
     "voided", "upstream:api_error", "nothing"),
    ("an error event behind a ping", answer(200, "text/event-stream", event("ping") + event("error", error={"type": "api_error"})), True,
     "voided", "upstream:api_error", "nothing"),
    ("an error event after the start",
     answer(200, "text/event-stream", START + event("error", error={"type": "overloaded_error", "message": "x"})), True,
     "settled", "estimated:stream_error", None),
]  # fmt: skip


@pytest.mark.parametrize(("said", "stream", "state", "flag", "spent"), [row[1:] for row in ENDINGS], ids=[row[0] for row in ENDINGS])
async def test_an_ending_has_its_rule(tmp_path, said, stream, state, flag, spent):
    async with upstream(said) as api, gateway(tmp_path, None, APPS, upstream=api.url) as gw:
        await ask(gw, stream=stream)
        await gw.quiet()
        [call] = calls(tmp_path)
        assert (call.state, call.resolutions) == (state, 1)
        assert flag in call.flags
        assert await gw.held_nano() == 0
        assert await gw.spent_nano() == call.spent_nano
        if spent is None:
            assert 0 < call.spent_nano < call.grant_nano, "the input is known exactly, only the output is as granted"
        else:
            assert call.spent_nano == {"nothing": 0, "grant": call.grant_nano}[spent]


async def test_an_upstream_that_cannot_be_reached_costs_nothing(tmp_path):
    async with upstream() as api:
        nowhere = api.url
    async with gateway(tmp_path, None, APPS, upstream=nowhere) as gw:
        said = await ask(gw)
        assert isinstance(said, anthropic.APIStatusError)
        assert (said.status_code, said.body["error"]["type"]) == (502, "api_error")
        assert said.response.headers["x-gateway-refusal"] == "upstream_unreachable"
        await gw.quiet()
        [call] = calls(tmp_path)
        assert (call.state, call.flags, call.spent_nano, await gw.held_nano()) == ("voided", ["not_sent"], 0, 0)


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_a_refusal_by_the_api_costs_nothing_and_passes_unchanged(tmp_path, stream):
    async with Simulator() as api, gateway(tmp_path, api, APPS) as gw:
        for status in (400, 401, 403, 404, 413, 429, 500, 529):
            api.behaviour = Behaviour(status=status)
            said = await ask(gw, stream=stream)
            assert isinstance(said, anthropic.APIStatusError)
            assert (said.status_code, "x-gateway-refusal" in said.response.headers) == (status, False)
        await gw.quiet()
        assert {(call.state, call.resolutions, call.spent_nano) for call in calls(tmp_path)} == {("voided", 1, 0)}
        assert (await gw.spent_nano(), await gw.held_nano(), api.book.billed_nano) == (0, 0, 0)


FIRST = [
    (True, {"error": "overloaded_error", "error_after_events": 0}),
    (True, {"error": "overloaded_error", "error_after_events": 1, "ping_first": True}),
    (False, {"error": "overloaded_error", "status": 200}),
    (True, {"error": "overloaded_error", "status": 200}),
]


async def test_a_storm_of_errors_that_come_first_spends_nothing(tmp_path):
    """Each once kept its whole grant, so that an overloaded provider used an app's day up."""
    policy = {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $0.50}\n"}
    async with Simulator() as api, gateway(tmp_path, api, policy) as gw:
        for _ in range(5):
            for stream, wishes in FIRST:
                api.behaviour = Behaviour(**wishes)
                await ask(gw, stream=stream, max_tokens=20_000)
        await gw.quiet()
        assert {(call.state, *call.flags) for call in calls(tmp_path)} == {("voided", "upstream:overloaded_error")}
        assert (len(calls(tmp_path)), await gw.spent_nano(), (await api.settled()).billed_nano) == (20, 0, 0)
        api.behaviour = Behaviour()
        assert isinstance(await ask(gw, max_tokens=20_000), bytes), "the app's day is untouched"


async def test_late_edge_break_is_booked_at_no_less_than_its_bill(tmp_path, monkeypatch):
    """A third of those calls were taken by the API all the same, and ran until the edge gave up."""
    monkeypatch.setattr(delivery, "EDGE_LATE_S", 0.2)
    monkeypatch.setattr(settlement, "EDGE_UNBILLED_S", 0.2)
    policy = {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\n"}
    async with Simulator(behaviour=Behaviour(hostile=True, tokens_per_s=300)) as api, gateway(tmp_path, api, policy) as gw:
        for status, delay_s in ((502, 0.0), (502, 0.4), (520, 0.4), (530, 0.4)):
            api.behaviour = replace(api.behaviour, edge=status, delay_headers_s=delay_s)
            await asyncio.gather(*(ask(gw, stream=stream, max_tokens=20_000) for stream in (False, True, False)))
        await gw.quiet()
        billed = [row.billed_nano for row in (await api.settled()).messages()]
        found = calls(tmp_path)
        assert [call.flags for call in found[:3]] == [["assumed_unbilled"]] * 3
        assert [call.flags for call in found[9:]] == [["edge:530"]] * 3
        assert all("estimated:edge" in call.flags and 0 < call.spent_nano < call.grant_nano for call in found[3:9])
        assert sum(nano > 0 for nano in billed) == 2
        assert min(call.spent_nano for call in found[3:9]) >= max(billed), "each is booked as if it were the dearest"
        assert await gw.held_nano() == 0


async def test_a_refusal_before_any_output_is_free(tmp_path):
    async with Simulator(behaviour=Behaviour(stop_reason="refusal", output_tokens=0)) as api, gateway(tmp_path, api, APPS) as gw:
        for stream in (False, True):
            await ask(gw, stream=stream)
        await gw.quiet()
        assert {(call.state, call.spent_nano) for call in calls(tmp_path)} == {("settled", 0)}
        assert (await api.settled()).billed_nano == 0


SHAPES = [
    {"whole_start": True, "tool_use": True},
    {"whole_start": True, "input_tokens": 0, "output_tokens": 0},
    {"opening_usage": "absent"},
    {"opening_usage": "zeroes"},
    {"closing_zeroes": True, "cache_read_tokens": 300},
    {"iterations": ({"type": "compaction", "input_tokens": 60_385, "output_tokens": 522},),},
]


async def test_each_shape_of_a_whole_stream_is_booked_exactly(tmp_path):
    """Whatever holds the usage: message_start, message_delta, both, or iterations; none leaves an overrun or an estimate."""
    policy = {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\nfeatures: {compaction: true}\nreserve: progressive\n"}
    edits = {"context_management": {"edits": [{"type": "compact_20260112"}]}}
    async with Simulator() as api, gateway(tmp_path, api, policy) as gw:
        for shape in SHAPES:
            api.behaviour = Behaviour(**{"output_tokens": 40} | shape)
            more = {"extra_body": edits} if "iterations" in shape else {}
            await ask(gw, stream=True, **more, tools=[{"name": "note", "input_schema": {"type": "object"}}])
        await gw.quiet()
        await api.settled()
        for shape, call, row in zip(SHAPES, calls(tmp_path), api.book.messages(), strict=True):
            assert (shape, call.spent_nano, call.flags) == (shape, row.billed_nano, [])
        assert await gw.held_nano() == 0


async def test_stream_cut_by_the_upstream_settles_at_least_its_bill(tmp_path):
    """A stream that the upstream cuts, at any event, is settled at no less than its bill."""
    async with Simulator(behaviour=Behaviour(output_tokens=40)) as api, gateway(tmp_path, api, APPS) as gw:
        whole = await ask(gw, stream=True)
        for index in range(whole.count(b"\n\n") + 1):
            api.behaviour = Behaviour(output_tokens=40, cut_after_events=index)
            await ask(gw, stream=True)
        await gw.quiet()
        await api.settled()
        done, *cut = calls(tmp_path)
        assert (done.spent_nano, done.flags) == (api.book.messages()[0].billed_nano, [])
        for call, row in zip(cut, api.book.messages()[1:], strict=True):
            assert (call.state, call.resolutions) == ("settled", 1)
            assert call.spent_nano >= row.billed_nano > 0
        assert cut[0].reason == "estimated:usage_unreadable", "the headers alone tell nothing"
        assert cut[1].reason == "estimated:cut"
        assert cut[1].spent_nano < cut[0].spent_nano, "from message_start on the input is known"
        assert await gw.held_nano() == 0


async def test_client_that_leaves_is_charged_at_least_the_bill(tmp_path):
    """What was generated after it left included: the provider takes a moment to notice."""
    behaviour = Behaviour(output_tokens=64, delay_ms=8, after_disconnect_s=0.05)
    async with Simulator(behaviour=behaviour) as api, gateway(tmp_path, api, APPS) as gw:
        for index in range(12):
            await ask(gw, stream=True, leave_after=index)
            await gw.quiet()
            await api.settled()
            call, row = calls(tmp_path)[-1], api.book.messages()[-1]
            assert (call.state, call.resolutions) == ("settled", 1)
            assert call.spent_nano >= row.billed_nano > 0
            if call.reason != "estimated:cut":  # it left before the first byte, or the last one had left before it
                assert index == 0 or (row.delivered and call.spent_nano == row.billed_nano)
        assert len(calls(tmp_path)) == len(api.book.messages()) == 12
        assert await gw.held_nano() == 0


LEFT_APPS = {
    name: f"models: {{allow: [claude-haiku-4-5]}}\ncaps: {{day: $100}}\nreserve: {name}\nfeatures: {{web_search: {{max_uses: 2}}}}\n"
    for name in ("auto", "progressive", "full")
}
SEARCHES = {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]}


async def test_a_stream_that_is_left_is_booked_by_then(tmp_path):
    """Esc in Claude Code: cents, however the call is held, before the status too; but a loop keeps what is held, as `full` does."""
    behaviour = Behaviour(output_tokens=20_000, tokens_per_s=380, after_disconnect_s=1.0)
    async with Simulator(behaviour=behaviour) as api, gateway(tmp_path, api, LEFT_APPS) as gw:

        async def leave(app, *, delay_headers_s=0.0, **more):
            api.behaviour = replace(behaviour, delay_headers_s=delay_headers_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5), gw.client(app).messages.stream(**(ASK | {"max_tokens": 64_000} | more)) as stream:
                    await stream.get_final_message()
            await gw.quiet()
            call, bill = calls(tmp_path)[-1], (await api.settled()).messages()[-1].billed_nano
            assert 0 < bill <= call.spent_nano <= call.grant_nano
            return call

        for app in ("auto", "progressive"):
            call = await leave(app)
            assert (call.reason, call.spent_nano < 0.03 * 1e9) == ("estimated:cut", True)
            call = await leave(app, delay_headers_s=5.0)
            assert (call.reason, call.spent_nano < 0.03 * 1e9) == ("estimated:no_status", True)
        kept = [await leave("full"), await leave("full", delay_headers_s=5.0), await leave("auto", **SEARCHES)]
        assert all(call.spent_nano > 0.3 * 1e9 for call in kept)


async def test_a_stream_left_before_the_status_is_charged_the_grant(tmp_path):
    async with Simulator(behaviour=Behaviour(delay_headers_s=5)) as api, gateway(tmp_path, api, APPS) as gw:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await gw.client().messages.create(**ASK, stream=True)
        await gw.quiet()
        [call] = calls(tmp_path)
        assert (call.state, call.reason, call.spent_nano) == ("settled", "estimated:no_status", call.grant_nano)
        assert call.spent_nano >= (await api.settled()).billed_nano


async def test_mid_stream_error_passes_and_is_charged_the_grant(tmp_path):
    """An error in the middle of a stream passes, and the call is charged at its grant."""
    async with Simulator(behaviour=Behaviour(error="overloaded_error")) as api, gateway(tmp_path, api, APPS) as gw:
        said = await ask(gw, stream=True)
        assert said.count(b"event: error") == 1
        await gw.quiet()
        [call] = calls(tmp_path)
        assert (call.state, call.reason) == ("settled", "estimated:stream_error")
        assert call.grant_nano > call.spent_nano >= (await api.settled()).billed_nano > 0


@pytest.mark.parametrize("bytes_sent", [0, 1, 200], ids=lambda count: f"{count} bytes")
async def test_a_json_answer_cut_in_its_middle_is_charged_the_grant(tmp_path, bytes_sent):
    async with Simulator(behaviour=Behaviour(cut_after_bytes=bytes_sent)) as api, gateway(tmp_path, api, APPS) as gw:
        assert isinstance(await ask(gw), Exception), "a broken answer does not look like a whole one"
        await gw.quiet()
        [call] = calls(tmp_path)
        assert (call.state, call.resolutions, call.spent_nano) == ("settled", 1, call.grant_nano)
        assert call.reason
        assert call.spent_nano >= (await api.settled()).billed_nano > 0


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_the_answering_model_is_charged_not_the_asked_one(tmp_path, stream):
    """The model that answered is charged not the one that was asked."""
    async with Simulator(behaviour=Behaviour(served_model="claude-sonnet-5")) as api, gateway(tmp_path, api, APPS) as gw:
        await ask(gw, stream=stream)
        await gw.quiet()
        assert await gw.spent_nano() == (await api.settled()).billed_nano
        with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
            assert db.execute("SELECT model_asked, model_served FROM calls").fetchall() == [("claude-haiku-4-5", "claude-sonnet-5")]
