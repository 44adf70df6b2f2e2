"""The simulated API's answers and bills, held against the official SDK and against its own promises."""

import ast
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anthropic
import pytest
from rawhttp import MODEL, ask, events, last_row, post

from gateway_addon import simulator
from gateway_addon.simulator import KEY, Behaviour, Simulator, Usage
from gateway_addon.simulator.delivery import made
from gateway_addon.simulator.messages import Step
from gateway_addon.simulator.prices import MODELS, billed_nano

PACKAGE = Path(simulator.__file__).parent


@pytest.fixture
async def api() -> AsyncIterator[Simulator]:
    async with asyncio.timeout(60), Simulator() as running:
        yield running


@pytest.fixture
async def client(api: Simulator) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=api.url, api_key=KEY, max_retries=0) as sdk:
        yield sdk


def said(block) -> tuple:
    """What a content block says, without the ids and the fields that only one of the SDK's two ways fills in."""
    return block.type, *(getattr(block, name, None) for name in ("text", "thinking", "signature", "name", "input"))


class TestIndependence:
    """Two books agree for a reason only if neither was copied from the other."""

    ALLOWED = {"h11", "brotli", "zstandard", "click"} | sys.stdlib_module_names

    @pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
    def test_nothing_of_the_gateway_is_imported(self, path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and node.module.partition(".")[0] in self.ALLOWED), ast.unparse(node)
            elif isinstance(node, ast.Import):
                assert all(name.name.partition(".")[0] in self.ALLOWED for name in node.names), ast.unparse(node)


class TestPrices:
    @pytest.mark.parametrize(
        ("model", "usage", "nano"),
        [
            ("claude-opus-5-5", Usage(input_tokens=1_000_000), 4_000_000_000),
            ("claude-opus-5-5", Usage(1, 1, 1, 1, 1), 4_000 + 20_000 + 200 + 5_000 + 8_000),
            ("claude-opus-5-5", Usage(1, 1, speed="fast"), 2 * 24_000),
            ("claude-sonnet-5-5", Usage(cache_read_tokens=10), 1_000),
            ("claude-sonnet-5-5", Usage(input_tokens=1, inference_geo="us"), 2_200),
            ("claude-sonnet-5-5", Usage(input_tokens=1, inference_geo="not_available"), 2_000),
            ("claude-haiku-5-5", Usage(cache_write_5m_tokens=1, inference_geo="us"), 138),  # 137.5, rounded up once
            ("claude-haiku-5-5", Usage(cache_write_5m_tokens=2, inference_geo="us"), 275),  # and not once a token
            ("claude-haiku-5-5", Usage(input_tokens=100_000, output_tokens=1), 10_000_500),
            ("claude-haiku-5-5", Usage(input_tokens=100_001, output_tokens=1), 50_003_000),
            ("claude-haiku-5-5", Usage(50_001, 0, 25_000, 15_000, 10_000), 50_001 * 500 + 25_000 * 50 + 15_000 * 625 + 10_000 * 1_000),
            ("claude-haiku-5-5", Usage(input_tokens=1, output_tokens=200_000), 100_000_100),
            ("claude-sonnet-5-5", Usage(input_tokens=1, web_searches=3, inference_geo="us"), 2_200 + 30_000_000),
        ],
    )
    def test_a_bill_is_exact(self, model, usage, nano):
        assert billed_nano(model, usage) == nano

    def test_every_price_keeps_the_published_ratios(self):
        """Output is five times input; a write for five minutes costs 1.25 times, for an hour twice the input."""
        for name, model in MODELS.items():
            for price in filter(None, (model.price, model.long_price)):
                assert price.output == 5 * price.input, name
                assert price.cache_write_5m * 4 == price.input * 5, name
                assert price.cache_write_1h == 2 * price.input, name
                assert price.cache_read < price.input, name


class TestGeneration:
    STEPS = (Step(0, b"start"), Step(10, b"a"), Step(100, None), Step(10, b"b"))

    @pytest.mark.parametrize(
        ("elapsed_s", "tokens"), [(0, 0), (0.5, 5), (1, 10), (6, 60), (10.99, 109), (11, 110), (12, 120), (99, 120)]
    )
    def test_a_hidden_step_is_generated_bit_by_bit(self, elapsed_s, tokens):
        assert made(self.STEPS, Behaviour(tokens_per_s=10), elapsed_s).tokens == tokens

    def test_without_a_pace_all_is_generated_at_once(self):
        assert made(self.STEPS, Behaviour(), 0).tokens == 120

    def test_a_delay_comes_before_each_delta(self):
        assert [made(self.STEPS, Behaviour(delay_ms=1000), at).tokens for at in (0.99, 1, 2, 3)] == [9, 10, 110, 120]


class TestMessages:
    @pytest.mark.parametrize("body", [ask(), ask(stream=True), ask(simulate={"status": 529}), {}], ids=["JSON", "stream", "overloaded", "invalid"])
    async def test_it_answers_in_chunks_like_the_real_api(self, api, body):
        """All recorded answers did, JSON and streams, and most errors."""
        _, headers, _ = await post(api, body)
        assert (headers["transfer-encoding"], "content-length" in headers, headers["server"]) == ("chunked", False, "cloudflare")

    async def test_a_json_answer_is_what_the_book_says(self, api, client):
        message = await client.messages.create(**ask())
        row = await last_row(api)
        assert (row.message_id, row.model_served, row.stop_reason) == (message.id, message.model, message.stop_reason)
        assert (row.usage.input_tokens, row.usage.output_tokens) == (message.usage.input_tokens, message.usage.output_tokens)
        assert row.billed_nano == message.usage.input_tokens * 2_000 + message.usage.output_tokens * 10_000
        assert message._request_id == row.request_id
        assert row.delivered
        assert not row.stream

    def test_the_sync_client_reads_both_forms_alike(self):
        async def serve(use):
            async with Simulator() as api:
                client = anthropic.Anthropic(base_url=api.url, auth_token=KEY, max_retries=0)
                return await asyncio.to_thread(use, client), await api.settled()

        def use(client):
            with client, client.messages.stream(**ask()) as stream:
                return client.messages.create(**ask()), stream.get_final_message()

        (whole, streamed), book = asyncio.run(serve(use))
        assert whole.content[0].text[:40] == streamed.content[0].text[:40] != ""
        assert [row.header("authorization") for row in book.all()] == [f"Bearer {KEY}"] * 2
        assert book.billed_nano == sum(row.billed_nano for row in book.messages()) > 0

    @pytest.mark.parametrize("thinking", ["off", "hidden", "summarised", "full"])
    @pytest.mark.parametrize("extra", [{}, {"tool_use": True}, {"web_searches": 2}, {"late_cache_write_tokens": 5, "late_input_tokens": 9}])
    async def test_a_stream_adds_up_to_the_json_answer(self, client, thinking, extra):
        tools = [{"name": "note", "input_schema": {"type": "object"}}]
        body = ask(simulate={"thinking": thinking, "output_tokens": 300, "input_tokens": 100, **extra}, tools=tools)
        whole = await client.messages.create(**body)
        async with client.messages.stream(**body) as stream:
            streamed = await stream.get_final_message()
        assert (whole.model, whole.stop_reason, whole.usage) == (streamed.model, streamed.stop_reason, streamed.usage)
        assert [said(block) for block in whole.content] == [said(block) for block in streamed.content]

    async def test_the_order_of_a_stream(self, api):
        _, headers, body = await post(api, ask(stream=True, simulate={"output_tokens": 16, "late_cache_write_tokens": 7}))
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        start, *_, delta, stop = seen = events(body)
        assert [event["type"] for event in seen] == [
            "message_start",
            "content_block_start",
            "ping",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert start["message"]["usage"].keys() >= {"cache_creation", "service_tier", "inference_geo"}
        assert delta["usage"] == {"input_tokens": start["message"]["usage"]["input_tokens"], "output_tokens": 16,
                                  "cache_creation_input_tokens": 7, "cache_read_input_tokens": 0}  # fmt: skip
        assert "cache_creation" not in delta["usage"]
        assert stop == {"type": "message_stop"}

    @pytest.mark.parametrize(
        ("wish", "opened", "closed"),
        [
            ({"opening_usage": "absent"}, None, 100),
            ({"opening_usage": "zeroes"}, 0, 100),
            ({"closing_zeroes": True}, 100, 0),
        ],
    )
    async def test_the_prompt_may_be_told_at_one_end_only(self, api, wish, opened, closed):
        _, _, body = await post(api, ask(stream=True, simulate={"input_tokens": 100, "output_tokens": 9, **wish}))
        start, *_, delta, _ = events(body)
        usage = start["message"]["usage"]
        assert (usage and usage["input_tokens"], delta["usage"]["input_tokens"]) == (opened, closed)
        assert delta["usage"]["output_tokens"] == 9
        assert (await last_row(api)).usage.input_tokens == 100

    async def test_a_message_may_come_whole_in_its_start(self, api, client):
        body = ask(simulate={"whole_start": True, "tool_use": True, "input_tokens": 9, "output_tokens": 40}, tools=[{"name": "note", "input_schema": {"type": "object"}}])
        _, _, raw = await post(api, body | {"stream": True})
        assert [event["type"] for event in events(raw)] == ["message_start", "message_stop"]
        async with client.messages.stream(**body) as stream:
            streamed = await stream.get_final_message()
        whole = await client.messages.create(**body)
        assert (streamed.stop_reason, streamed.usage, len(streamed.content)) == ("tool_use", whole.usage, len(whole.content))

    async def test_hidden_thinking_is_billed_and_not_shown(self, api, client):
        message = await client.messages.create(**ask(simulate={"thinking": "hidden", "thinking_tokens": 900, "output_tokens": 1000}))
        assert (message.content[0].thinking, len(message.content[1].text)) == ("", 400)
        assert message.usage.output_tokens_details.thinking_tokens == 900
        assert (await last_row(api)).usage.output_tokens == 1000

    @pytest.mark.parametrize(("display", "characters"), [("omitted", 0), ("summarized", 50)])
    async def test_thinking_follows_the_request(self, client, display, characters):
        body = ask(simulate={"output_tokens": 200}, thinking={"type": "adaptive", "display": display})
        assert len((await client.messages.create(**body)).content[0].thinking) == characters

    async def test_max_tokens_is_never_passed(self, client):
        message = await client.messages.create(**ask(max_tokens=7, simulate={"output_tokens": 100}))
        assert (message.usage.output_tokens, message.stop_reason) == (7, "max_tokens")

    async def test_tool_choice_forces_the_call(self, client):
        tools = [{"name": name, "input_schema": {"type": "object"}} for name in ("one", "two")]
        message = await client.messages.create(**ask(tools=tools, tool_choice={"type": "tool", "name": "two"}))
        assert (message.content[-1].name, message.stop_reason) == ("two", "tool_use")

    async def test_a_tool_is_called_several_times_in_one_answer(self, client):
        given = {"tool_name": "two", "tool_calls": 3, "tool_input": {"note": "x"}, "output_tokens": 40}
        message = await client.messages.create(**ask(simulate=given, tools=[{"name": "two", "input_schema": {"type": "object"}}]))
        called = [block for block in message.content if block.type == "tool_use"]
        assert [block.input for block in called] == [{"note": "x"}] * 3
        assert len({block.id for block in called}) == 3
        assert message.usage.output_tokens == 40

    async def test_a_cached_prefix_is_written_once_and_read_after(self, api, client):
        def body(text):
            return ask(text, system=[{"type": "text", "text": "s" * 4000, "cache_control": {"type": "ephemeral", "ttl": "1h"}}])

        first, second = [(await client.messages.create(**body(text))).usage for text in ("hello", "world")]
        assert first.cache_creation.ephemeral_1h_input_tokens == second.cache_read_input_tokens > 900
        assert first.cache_read_input_tokens == second.cache_creation_input_tokens == 0
        assert [row.usage.prompt_tokens for row in api.book.all()] == [first.cache_creation_input_tokens + first.input_tokens] * 2

    async def test_image_costs_its_own_tokens_not_those_of_its_base64(self, api, client):
        """An image costs its own tokens and not those of its base64."""
        source = {"type": "base64", "media_type": "image/png", "data": "A" * 100_000}
        await client.messages.create(**ask(messages=[{"role": "user", "content": [{"type": "image", "source": source}]}]))
        assert 1_568 < (await last_row(api)).usage.input_tokens < 1_700

    async def test_iterations_are_billed_beside_the_message(self, api, client):
        part = {"type": "compaction", "input_tokens": 60_385, "output_tokens": 522}
        other = {"type": "advisor_message", "model": "claude-opus-5", "input_tokens": 10, "output_tokens": 10}
        body = ask(simulate={"input_tokens": 600, "output_tokens": 100, "iterations": [part, other]})
        message = await client.beta.messages.create(**body)
        assert [one.type for one in message.usage.iterations] == ["message", "compaction", "advisor_message"]
        message_nano, compaction_nano = 600 * 2_000 + 100 * 10_000, 60_385 * 2_000 + 522 * 10_000
        assert (await last_row(api)).billed_nano == message_nano + compaction_nano + 10 * 5_000 + 10 * 25_000

    async def test_a_refusal_before_any_output_is_free(self, api, client):
        message = await client.messages.create(**ask(simulate={"stop_reason": "refusal", "output_tokens": 0}))
        assert (message.stop_reason, message.content) == ("refusal", [])
        assert (await last_row(api)).billed_nano == 0

    @pytest.mark.parametrize(
        ("model", "fields", "speed", "geo", "times"),
        [
            ("claude-opus-5-5", {"speed": "fast"}, "fast", "global", 2),
            ("claude-opus-4-6", {"speed": "fast"}, "standard", "global", 1),
            ("claude-opus-4-5", {}, "standard", "not_available", 1),
            ("claude-sonnet-5-5", {"inference_geo": "us"}, "standard", "us", 1.1),
        ],
    )
    async def test_speed_and_region_are_billed_as_served(self, api, model, fields, speed, geo, times):
        wishes = {"input_tokens": 1000, "output_tokens": 0}
        await post(api, ask(model=model, simulate=wishes, **fields))
        row = await last_row(api)
        assert (row.usage.speed, row.usage.inference_geo) == (speed, geo)
        assert row.billed_nano == MODELS[row.model_served].price.input * 1000 * times

    async def test_an_alias_is_answered_by_the_dated_model(self, api, client):
        message = await client.messages.create(**ask(model="claude-haiku-4-5"))
        row = await last_row(api)
        assert (row.model_asked, row.model_served, message.model) == ("claude-haiku-4-5", *["claude-haiku-4-5-20251001"] * 2)


class TestHostile:
    """The dearest answer that the declared bounds allow, and not a token more."""

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_token_a_byte_both_ways(self, api, stream):
        api.behaviour = Behaviour(hostile=True)
        body = json.dumps(ask(stream=stream)).encode()
        _, _, answer = await post(api, body)
        row = await last_row(api)
        assert (row.usage.input_tokens, row.usage.output_tokens) == (len(body) + 350, 1000)
        deltas = [event["delta"]["text"] for event in events(answer) if event["type"] == "content_block_delta"] if stream else None
        assert len("".join(deltas) if stream else json.loads(answer)["content"][0]["text"]) == 1000

    async def test_each_delta_shows_as_many_bytes_as_it_has_tokens(self, api):
        """Else a meter that counts the bytes it has seen could fall behind what was generated."""
        api.behaviour = Behaviour(hostile=True, tokens_per_event=7)
        _, _, answer = await post(api, ask(stream=True, max_tokens=100))
        sizes = [len(event["delta"]["text"]) for event in events(answer) if event["type"] == "content_block_delta"]
        assert sum(sizes) == 100
        assert max(sizes) <= 7

    @pytest.mark.parametrize(("ttl", "kind"), [("5m", "cache_write_5m_tokens"), ("1h", "cache_write_1h_tokens")])
    async def test_the_cache_is_written_and_never_read(self, api, ttl, kind):
        api.behaviour = Behaviour(hostile=True)
        body = ask(cache_control={"type": "ephemeral", "ttl": ttl})
        for _ in range(2):
            await post(api, body)
        for row in (await api.settled()).all():
            assert getattr(row.usage, kind) == row.usage.prompt_tokens == row.body_bytes + 350


class TestOtherEndpoints:
    async def test_count_tokens_is_free_and_counts_like_the_bill(self, api, client):
        counted = await client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "x" * 4000}])
        assert 1000 < counted.input_tokens < 1100
        assert (await last_row(api)).billed_nano == 0

    async def test_models_come_in_pages(self, client):
        first = await client.models.list(limit=5)
        assert [model.id for model in first.data] == list(MODELS)[:5]
        assert [model.id async for model in first] == list(MODELS)
        before = await client.models.list(limit=2, before_id=list(MODELS)[4])
        assert ([model.id for model in before.data], before.has_more) == (list(MODELS)[2:4], True)

    async def test_one_model(self, client):
        model = await client.models.retrieve("claude-haiku-4-5")
        assert (model.id, model.display_name, model.max_tokens) == ("claude-haiku-4-5-20251001", "Claude Haiku 4.5", 64_000)
        with pytest.raises(anthropic.NotFoundError, match="model: claude-none"):
            await client.models.retrieve("claude-none")

    @pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after_id=none"])
    async def test_a_query_that_makes_no_sense(self, client, query):
        with pytest.raises(anthropic.BadRequestError, match=query.partition("=")[0]):
            await client.get(f"/v1/models?{query}", cast_to=object)
