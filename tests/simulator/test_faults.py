"""The simulated API when things go wrong: errors, cuts, clients that leave; and the HTTP under it."""

import asyncio
import gzip
import hashlib
import json
import ssl
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import anthropic
import brotli
import pytest
import zstandard
from ledgers import until
from mitmproxy.certs import CertStore
from rawhttp import MODEL, ask, events, head, last_row, post, raw, read_answer

from gateway_addon.simulator import KEY, Behaviour, Row, Simulator, delivery
from gateway_addon.simulator.errors import STATUS

pytestmark = pytest.mark.usefixtures("idle_clock")


@pytest.fixture
async def api() -> AsyncIterator[Simulator]:
    async with asyncio.timeout(60), Simulator() as running:
        yield running


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "status", "said"),
        [
            ({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}, 400, "max_tokens: Field required"),
            (ask(max_tokens=True), 400, "max_tokens: Input should be a valid integer"),
            (ask(max_tokens=-1), 400, "max_tokens: Input should be greater than or equal to 0"),
            (ask(max_tokens=128_001), 400, "max_tokens: 128001 > 128000"),
            (ask(model="claude-haiku-4-5", max_tokens=64_001), 400, "max_tokens: 64001 > 64000"),
            (ask(model="gpt-4"), 404, "model: gpt-4"),
            (ask(model=None), 400, "model: Field required"),
            (ask(model=["claude-opus-5"]), 400, "model: Input should be a valid string"),
            (ask(messages=None), 400, "messages: Field required"),
            (ask(messages=[]), 400, "messages: at least one"),
            (ask(messages=[{"role": "user", "content": 1}]), 400, "messages.0.content"),
            (ask(system=1), 400, "system"),
            (ask(tools={}), 200, ""),
            (ask(tools="x"), 400, "tools"),
            (ask(thinking="x"), 400, "thinking"),
            (ask(model="claude-opus-4-7", speed="fast"), 400, "speed"),
            (ask(model="claude-opus-4-5", inference_geo="us"), 400, "inference_geo"),
            (ask(model="claude-haiku-4-5", text="x" * 900_000), 400, "prompt is too long: 225"),
            (ask(simulate={"no_such": 1}), 400, "no_such: no such behaviour"),
            (ask(simulate={"output_tokens": "many"}), 400, "output_tokens: 'many'"),
            (ask(simulate={"thinking": "loud"}), 400, "thinking: 'loud' is none of"),
            (ask(simulate={"encoding": "rot13"}), 400, "encoding: 'rot13' is none of"),
            (ask(simulate={"served_model": "gpt-4"}), 400, "'gpt-4' serves nothing here"),
            (ask("simulate: nothing"), 400, "simulate: must be followed by a JSON object"),
            (b"{", 400, "not valid JSON"),
            (b"[]", 400, "must be an object"),
            (b"[" * 100_000, 400, "not valid JSON"),
        ],
    )
    async def test_a_request_that_the_api_refuses_costs_nothing(self, api, body, status, said):
        got, _, answer = await post(api, body)
        assert (got, said in answer.decode()) == (status, True), answer
        if status != 200:
            row = await last_row(api)
            assert json.loads(answer)["type"] == "error"
            assert json.loads(answer)["request_id"] == row.request_id
            assert (row.status, row.billed_nano, row.message_id) == (status, 0, None)

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 401),
            ({"x-api-key": KEY}, 200),
            ({"authorization": f"Bearer {KEY}"}, 200),
            ({"x-api-key": KEY, "authorization": f"Bearer {KEY}"}, 200),
            ({"authorization": KEY}, 401),
            ({"x-api-key": f"Bearer {KEY}"}, 401),
            ({"x-api-key": KEY, "authorization": "Bearer gwt_an_internal_token"}, 401),
            ({"x-api-key": "sk-ant-é"}, 401),
        ],
    )
    async def test_only_the_real_key_opens(self, api, headers, status):
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        async with raw(api) as (reader, writer):
            writer.write(f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{lines}connection: close\r\n\r\n".encode("latin-1"))
            answer = await reader.read(-1)
        assert int(answer.split()[1]) == status
        row = await last_row(api)
        assert [row.header(name) for name in headers] == list(headers.values())

    @pytest.mark.parametrize("path", ["/v1/messages/", "//v1/messages", "/v1/Messages", "/v1/complete", "/v1/skills", "/v1/files/x/y/z", "/"])
    async def test_an_unknown_path_is_404(self, api, path):
        assert (await post(api, ask(), path=path))[0] == 404

    async def test_the_version_header_is_required(self, api):
        body = json.dumps(ask()).encode()
        async with raw(api) as (reader, writer):
            writer.write(head(body, "connection: close").replace(b"anthropic-version", b"x-version") + body)
            assert b"anthropic-version: header is required" in await reader.read(-1)

    async def test_an_encoded_body_is_refused_by_its_code(self, api):
        status, _, answer = await post(api, gzip.compress(json.dumps(ask()).encode()), "content-encoding: gzip")
        assert (status, json.loads(answer)["error"]["details"]) == (400, {"error_code": "request_body_encoding_unsupported"})

    async def test_a_body_over_32_mb_is_413_and_the_connection_lives_on(self, api):
        body = b" " * (32 * 1024 * 1024 + 1)
        async with raw(api) as (reader, writer):
            for sent, status in ((body, b"413"), (json.dumps(ask()).encode(), b"200")):
                writer.write(head(sent) + sent)
                assert (await read_answer(reader)).split()[1] == status

    @pytest.mark.parametrize(("kind", "status"), STATUS.items())
    async def test_an_error_on_demand_has_the_right_class_for_the_sdk(self, api, kind, status):
        async with anthropic.AsyncAnthropic(base_url=api.url, api_key=KEY, max_retries=0) as client:
            with pytest.raises(anthropic.APIStatusError) as caught:
                await client.messages.create(**ask(simulate={"status": status, "retry_after_s": 3}))
        assert (caught.value.status_code, caught.value.body["error"]["type"]) == (status, kind)
        assert caught.value.response.headers["retry-after"] == "3"
        assert (await last_row(api)).billed_nano == 0

    async def test_mid_stream_error_bills_the_generated_part(self, api):
        """An error in the middle of a stream bills what was generated."""
        wishes = {"output_tokens": 800, "input_tokens": 0, "error": "overloaded_error"}
        status, _, answer = await post(api, ask(stream=True, simulate=wishes))
        assert (status, events(answer)[-1]) == (200, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
        row = await last_row(api)
        assert (row.usage.output_tokens, row.billed_nano, row.delivered) == (400, 4_000_000, True)

    @pytest.mark.parametrize("count", [0, 1, 3, 6])
    async def test_the_error_can_come_after_any_event(self, api, count):
        _, _, answer = await post(api, ask(stream=True, simulate={"error": "api_error", "error_after_events": count}))
        assert [event["type"] for event in events(answer)].index("error") == count == len(events(answer)) - 1

    @pytest.mark.parametrize("ping_first", [False, True])
    async def test_an_error_first_bills_nothing(self, api, ping_first):
        wishes = {"error": "overloaded_error", "error_after_events": int(ping_first), "ping_first": ping_first}
        status, _, answer = await post(api, ask(stream=True, simulate=wishes))
        assert (status, [event["type"] for event in events(answer)]) == (200, ["ping"] * ping_first + ["error"])
        row = await last_row(api)
        assert (row.billed_nano, row.delivered) == (0, True)

    async def test_a_late_error_bills_the_turns_before_it(self, api, monkeypatch):
        monkeypatch.setattr(delivery, "LOOPS_AFTER_S", 0.05)
        wishes = {"error": "overloaded_error", "error_after_events": 0, "delay_headers_s": 0.1, "web_searches": 2}
        await post(api, ask(stream=True, simulate=wishes))
        assert (await last_row(api)).billed_nano > 0

    @pytest.mark.parametrize("stream", [False, True])
    async def test_an_error_may_come_with_a_status_of_200(self, api, stream):
        status, _, answer = await post(api, ask(stream=stream, simulate={"error": "overloaded_error", "status": 200}))
        assert (status, json.loads(answer)["error"]["type"]) == (200, "overloaded_error")
        assert (await last_row(api)).billed_nano == 0

    async def test_an_edge_bills_a_third_of_the_calls_that_it_loses_late(self, api, monkeypatch):
        billed = {}
        for status, late_s in ((502, 60), (502, 0.01), (429, 0.01)):
            monkeypatch.setattr(delivery, "EDGE_LATE_S", late_s)
            for _ in range(6):
                got, headers, answer = await post(api, ask(simulate={"edge": status, "delay_headers_s": 0.02}))
                assert (got, headers["content-type"], answer[:6]) == (status, "text/html", b"<html>")
                billed[status, late_s] = billed.get((status, late_s), 0) + ((await last_row(api)).billed_nano > 0)
        assert list(billed.values()) == [0, 2, 0]

    async def test_a_json_call_gets_the_error_as_its_status(self, api):
        assert (await post(api, ask(simulate={"error": "rate_limit_error"})))[0] == 429


class TestLeaving:
    """The bill follows generation, not delivery."""

    async def leave(self, api: Simulator, *, stream: bool = True, **wishes) -> Row:
        """Listen for a while, then go; tokens come at 1,000 a second, so that milliseconds are tokens."""
        wishes = {"tokens_per_s": 1000, "output_tokens": 10_000, **wishes}
        body = json.dumps(ask(stream=stream, max_tokens=10_000, simulate=wishes)).encode()
        async with raw(api) as (_, writer):
            writer.write(head(body) + body)
            await until(lambda: api.book.all())
            await asyncio.sleep(0.2)
        return await last_row(api)

    @pytest.mark.parametrize(
        ("wishes", "tokens_min", "tokens_max"),
        [
            ({}, 190, 1500),
            ({"after_disconnect_s": 2}, 2190, 3500),
            ({"ahead_s": 60}, 190, 1500),
            ({"thinking": "hidden", "thinking_tokens": 9000}, 190, 1500),
            ({"say_nothing_s": 60}, 190, 1500),
            ({"delay_headers_s": 60}, 190, 1500),
            ({"overrun": True}, 10_000, 10_000),
            ({"tokens_per_s": None}, 10_000, 10_000),
            ({"stream": False}, 190, 1500),
        ],
    )
    async def test_whoever_leaves_pays_for_what_was_generated(self, api, wishes, tokens_min, tokens_max):
        row = await self.leave(api, **wishes)
        assert tokens_min <= row.usage.output_tokens <= tokens_max
        assert row.billed_nano == row.usage.input_tokens * 2_000 + row.usage.output_tokens * 10_000
        assert not row.in_flight

    @pytest.mark.parametrize("stream", [False, True])
    async def test_delivery_runs_behind_generation(self, api, stream):
        began_s = asyncio.get_running_loop().time()
        await post(api, ask(stream=stream, simulate={"output_tokens": 10, "tokens_per_s": 100, "ahead_s": 0.2}))
        assert 0.3 <= asyncio.get_running_loop().time() - began_s < 0.5

    async def test_what_was_generated_in_a_silence_comes_at_once_after_it(self, api):
        began_s = asyncio.get_running_loop().time()
        await post(api, ask(stream=True, simulate={"output_tokens": 50, "tokens_per_s": 100, "say_nothing_s": 0.5}))
        assert 0.5 <= asyncio.get_running_loop().time() - began_s < 0.6

    async def test_pings_fill_a_hidden_phase(self, api):
        wishes = {"thinking": "hidden", "output_tokens": 50, "thinking_tokens": 50, "tokens_per_s": 200, "ping_s": 0.005}
        _, _, answer = await post(api, ask(stream=True, simulate=wishes))
        assert [event["type"] for event in events(answer)].count("ping") >= 4

    async def test_stopping_the_server_bills_what_is_in_flight(self):
        async with Simulator(behaviour=Behaviour(tokens_per_s=1, output_tokens=100)) as api:
            call = asyncio.create_task(post(api, ask()))
            await until(lambda: api.book.all())
        await asyncio.wait([call])
        [row] = api.book.all()
        assert (row.in_flight, row.delivered, row.billed_nano > 0) == (False, False, True)


class TestCuts:
    @pytest.mark.parametrize("count", [0, 1, 4, 9])
    async def test_a_stream_cut_after_some_events(self, api, count):
        _, _, answer = await post(api, ask(stream=True, simulate={"cut_after_events": count, "output_tokens": 80}))
        assert len(events(answer)) == count
        row = await last_row(api)
        assert (row.delivered, row.usage.output_tokens) == (False, 80)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("count", [0, 1, 100])
    async def test_a_body_cut_after_some_bytes(self, api, stream, count):
        status, _, answer = await post(api, ask(stream=stream, simulate={"cut_after_bytes": count}))
        assert (status, len(answer)) == (200, count)
        row = await last_row(api)
        assert row.answer_sha256 == hashlib.sha256(answer).hexdigest()
        assert not row.delivered

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_connection_closed_before_any_status_is_billed(self, api, stream):
        async with raw(api) as (reader, writer):
            body = json.dumps(ask(stream=stream, simulate={"hang_up": True})).encode()
            writer.write(head(body) + body)
            assert await reader.read(-1) == b""
        row = await last_row(api)
        assert (row.status, row.delivered) == (None, False)
        assert row.billed_nano > 0


DECODERS = {
    "identity": bytes,
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
    "br": brotli.decompress,
    "zstd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
}


class TestHttp:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("encoding", DECODERS)
    async def test_an_encoding_is_forced(self, api, encoding, stream):
        wishes = {"encoding": encoding, "output_tokens": 40}
        _, headers, answer = await post(api, ask(stream=stream, simulate=wishes), "accept-encoding: identity")
        assert headers.get("content-encoding", "identity") == encoding
        plain = DECODERS[encoding](answer)
        assert events(plain)[-1] == {"type": "message_stop"} if stream else json.loads(plain)["usage"]["output_tokens"] == 40

    @pytest.mark.parametrize(
        ("offered", "encoding"), [("gzip, deflate, br, zstd", "gzip"), ("br, gzip", "gzip"), ("br, zstd", None), ("identity", None)]
    )
    @pytest.mark.parametrize("body", [ask(), ask(stream=True), ask(model="none")], ids=["json", "sse", "error"])
    async def test_gzip_comes_to_whoever_offers_it(self, api, body, offered, encoding):
        _, headers, _ = await post(api, body, f"accept-encoding: {offered}")
        assert headers.get("content-encoding") == encoding

    async def test_each_event_is_readable_as_soon_as_it_is_sent(self, api):
        body = json.dumps(ask(stream=True, simulate={"encoding": "gzip", "say_nothing_s": 5})).encode()
        async with raw(api) as (reader, writer):
            writer.write(head(body) + body)
            await reader.readuntil(b"\r\n\r\n")
            size = int(await reader.readline(), 16)
            assert b'"type": "message_start"' in zlib.decompressobj(31).decompress(await reader.readexactly(size))

    async def test_the_headers_of_the_shared_account(self, api):
        _, headers, _ = await post(api, ask(simulate={"ratelimit_remaining_percent": 20}))
        assert headers["request-id"] == (await last_row(api)).request_id
        assert {"anthropic-organization-id", "anthropic-workspace-id"} <= headers.keys()
        for kind in ("requests", "tokens", "input-tokens", "output-tokens"):
            limit, remaining = (int(headers[f"anthropic-ratelimit-{kind}-{name}"]) for name in ("limit", "remaining"))
            assert remaining * 5 == limit > 0

    async def test_one_connection_serves_many_requests_and_pipelined_ones(self, api):
        slow, fast = (json.dumps(ask(simulate={"delay_headers_s": delay, "output_tokens": 1})).encode() for delay in (0.1, 0))
        async with raw(api) as (reader, writer):
            writer.write(head(slow) + slow)
            await asyncio.sleep(0.05)
            writer.write(head(fast) + fast + head(slow, "connection: close") + slow)
            assert (await reader.read(-1)).count(b"HTTP/1.1 200") == 3
        assert (api.book.connections, api.book.requests) == (1, 3)

    async def test_a_body_fed_byte_by_byte(self, api):
        body = json.dumps(ask()).encode()
        async with raw(api) as (reader, writer):
            for byte in head(body, "connection: close", "expect: 100-continue"):
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            for byte in body:
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            assert (await reader.read(-1)).startswith(b"HTTP/1.1 200")
        row = await last_row(api)
        assert (row.body_bytes, row.body_sha256) == (len(body), hashlib.sha256(body).hexdigest())

    async def test_the_door_counts_the_bytes_of_a_request_that_never_ends(self, api):
        async with raw(api) as (_, writer):
            sent = b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc"
            writer.write(sent)
            await until(lambda: api.book.bytes_received >= len(sent))
        assert (api.book.requests, api.book.connections, api.book.bytes_received) == (0, 1, len(sent))

    async def test_what_is_not_http_is_400(self, api):
        async with raw(api) as (reader, writer):
            writer.write(b"no such thing\r\n\r\n")
            assert (await reader.read(-1)).startswith(b"HTTP/1.1 400")

    async def test_hello_is_open_and_head_has_no_body(self, api):
        async with raw(api) as (reader, writer):
            writer.write(b"HEAD /api/hello HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            answer = await reader.read(-1)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\n")

    async def test_wishes_in_metadata(self, api):
        user_id = json.dumps({"device_id": "d", "simulate": {"output_tokens": 3}})
        for said in (user_id, "someone", "[]", "{}"):
            assert (await post(api, ask(metadata={"user_id": said})))[0] == 200
        tokens = [row.usage.output_tokens for row in (await api.settled()).all()]
        assert tokens[0] == 3
        assert 3 not in tokens[1:]

    async def test_tls_when_given_a_context(self, tmp_path):
        CertStore.from_store(tmp_path, "simulated", 2048)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "simulated-ca.pem")
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        async with Simulator(tls=context) as api:
            scheme, _, address = api.url.partition("://")
            reader, writer = await asyncio.open_connection(*address.split(":"), ssl=trusting)
            writer.write(b"GET /api/hello HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert (scheme, (await reader.read(-1))[:12]) == ("https", b"HTTP/1.1 200")
            writer.close()


class TestProcess:
    @pytest.fixture
    def start(self):
        started = []

        def start(*options: str) -> subprocess.Popen:
            command = [sys.executable, "-m", "gateway_addon.simulator", *options]
            root = Path(__file__).parents[2]
            started.append(subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
            return started[-1]

        yield start
        for process in started:
            process.kill()
            process.communicate()

    def test_it_prints_its_url_shows_its_book_and_stops_when_told(self, start, tmp_path):
        key_file = tmp_path / "key"
        key_file.write_text("sk-ant-another\n")
        process = start("--key-file", str(key_file), "--behaviour", '{"hostile": true}')
        url = process.stdout.readline().strip()
        with anthropic.Anthropic(base_url=url, api_key="sk-ant-another") as client:
            message = client.messages.create(**ask(max_tokens=17))
        with urllib.request.urlopen(f"{url}/_simulator/book") as answer:
            book = json.load(answer)
        assert [row["usage"]["output_tokens"] for row in book["rows"]] == [message.usage.output_tokens] == [17]
        assert (book["requests"], book["in_flight"], book["billed_nano"]) == (1, 0, book["rows"][0]["billed_nano"])
        process.terminate()
        assert process.wait(60) == 0

    @pytest.mark.parametrize(
        ("options", "code", "said"),
        [
            (["--behaviour", "{"], 2, "--behaviour"),
            (["--behaviour", '{"nope": 1}'], 2, "nope: no such behaviour"),
            (["--host", "192.0.2.1"], 1, "cannot listen on 192.0.2.1:0"),
        ],
    )
    def test_a_wrong_option_is_explained(self, start, options, code, said):
        process = start(*options)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, said in errors) == (code, True), errors


async def test_a_call_costs_little_enough_for_hundreds_a_second(api):
    """In CPU time, the test's own client included, since other tests may hold the machine."""
    body = json.dumps(ask(simulate={"output_tokens": 20})).encode()

    async def call_many(count: int) -> None:
        async with raw(api) as (reader, writer):
            for _ in range(count):
                writer.write(head(body) + body)
                await read_answer(reader)

    began_s = time.process_time()
    await asyncio.gather(*(call_many(40) for _ in range(5)))
    assert (time.process_time() - began_s) / 200 < 0.003
