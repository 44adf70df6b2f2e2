"""What is told of each call: the log's lines and the spans."""

import asyncio
import gzip
import json
import re
import subprocess
import sys

import anthropic
import pytest
from gateway import gateway
from handbook import page, section
from ledgers import CALL, Part
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from processes import buried, ledgered

from gateway_addon.calls.record import record
from gateway_addon.ledger import Outcome
from gateway_addon.operations import tracing
from gateway_addon.simulator import KEY, Behaviour, Simulator

HELLO = [{"role": "user", "content": "Say hello."}]
SETTLED = Outcome(status=200, model_served="claude-haiku-4-5", stop_reason="end_turn", first_byte_at=10.5, complete=True)


def test_the_fields_of_a_call_are_those_of_the_handbook():
    table = section(page("running"), "Logs")
    told = [field for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for field in re.findall(r"`(\w+)`", row)]
    assert set(record(CALL, "settled", started_at=1.0, ended_at=2.0)) == set(told)
    assert len(told) == len(set(told))


async def test_each_call_is_told_once_and_says_what_the_ledger_says(tmp_path):
    told = []
    async with Simulator() as api, gateway(tmp_path, api, on_call=told.append) as gw:
        labels = {"x-claude-code-session-id": "s1", "x-claude-code-agent-id": "a1"}
        client = gw.client()
        await client.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO, extra_headers=labels)
        await gw.quiet()  # a call is told once its settlement is written, which nobody waits for
        with pytest.raises(anthropic.PermissionDeniedError):
            await client.messages.create(model="claude-opus-4-6", max_tokens=50, messages=HELLO)
        with pytest.raises(anthropic.PermissionDeniedError):
            await gw.client(base_url=f"{gw.url}/nowhere").messages.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO)
        await client.messages.count_tokens(model="claude-haiku-4-5", messages=HELLO)
        await gw.quiet()
        spent_nano, book = await gw.spent_nano(), await api.settled()
    # A settled call is told once its cost is written, so perhaps after calls that came later.
    assert [(call["state"], call["refusal"]) for call in told if call["state"] != "settled"] == [
        ("refused", "model"), ("refused", "endpoint"), ("free", None),
    ]  # fmt: skip
    [settled] = [call for call in told if call["state"] == "settled"]
    [row] = [row for row in book.messages() if row.status == 200]
    assert settled["spent_nano"] == spent_nano == book.billed_nano
    assert (settled["session"], settled["agent"], settled["complete"], settled["status"]) == ("s1", "a1", True, 200)
    assert settled["request_id"] == row.request_id
    assert 0 < settled["first_byte_s"] <= settled["duration_s"] < 10


async def test_call_without_provider_work_is_recorded_as_voided(tmp_path):
    """A call that the provider did no work for is recorded as voided."""
    told = []
    async with Simulator(behaviour=Behaviour(status=529)) as api, gateway(tmp_path, api, on_call=told.append) as gw:
        with pytest.raises(anthropic.APIStatusError):
            await gw.client().messages.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO)
        await gw.quiet()
    assert [(call["state"], call["status"], call["spent_nano"]) for call in told] == [("voided", 529, 0)]


@pytest.mark.parametrize(
    ("state", "outcome", "refusal", "error"),
    [
        ("settled", SETTLED, None, None),
        ("refused", Outcome(), "cap_spent", "cap_spent"),
        ("voided", Outcome(status=529, complete=True), None, "529"),
        ("settled", Outcome(status=200), None, "incomplete"),
    ],
)
def test_a_span_says_how_a_call_failed(state, outcome, refusal, error):
    call = record(CALL, state, started_at=10.0, ended_at=12.0, outcome=outcome, refusal=refusal, parts=[Part(7)], spent_nano=7)
    assert tracing.attributes(call).get("error.type") == error


def test_span_attributes_have_the_conventions_names():
    """A span's attributes have the names of the OpenTelemetry conventions."""
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

    known = {value for value in vars(gen_ai_attributes).values() if isinstance(value, str)}
    own = tracing.attributes(record(CALL, "settled", started_at=10.0, ended_at=12.0, outcome=SETTLED, parts=[Part(7)], spent_nano=7))
    assert {name for name in own if name.startswith("gen_ai.")} <= known
    assert own["gen_ai.usage.input_tokens"] == 10
    assert own["gateway.spent_nano"] == 7


async def test_serve_logs_a_line_and_sends_a_span_without_a_secret(tmp_path):
    """Serve logs a line and sends a span for a call, and neither holds a secret."""
    received, measured = [], []

    async def collect(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))
        (measured if head.startswith("post /v1/metrics") else received).append(gzip.decompress(body) if "content-encoding: gzip" in head else body)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    collector = await asyncio.start_server(collect, "127.0.0.1", 0)
    where = f"http://127.0.0.1:{collector.sockets[0].getsockname()[1]}"
    async with Simulator() as api:
        gateways = ledgered(tmp_path, api.url, {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n"})
        process, url = await gateways.serve("--log", "json", "--otel", OTEL_EXPORTER_OTLP_ENDPOINT=where)
        token = gateways.tokens["app"]
        async with anthropic.AsyncAnthropic(base_url=url, api_key=token, max_retries=0) as client:
            labels = {"x-claude-code-session-id": token, "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
            await client.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO, extra_headers=labels)
        process.terminate()
        await buried(process)
    collector.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    [call] = [line for line in lines if line["event"] == "call"]
    assert (call["app"], call["state"], call["session"]) == ("app", "settled", "gwt_***")
    [span] = [
        span
        for body in received
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    points = {
        (metric.name, next((each.value.string_value for each in point.attributes if each.key == "gen_ai.token.type"), "")): point.sum
        for body in measured
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.histogram.data_points
    }
    usage, duration = "gen_ai.client.token.usage", "gen_ai.client.operation.duration"
    whole_input = call["input_tokens"] + call["cache_read_tokens"] + call["cache_write_tokens"]
    assert points == {(usage, "input"): whole_input, (usage, "output"): call["output_tokens"], (duration, ""): call["duration_s"]}
    said = {each.key: each.value for each in span.attributes}
    assert span.name == "chat claude-haiku-4-5"
    assert (span.trace_id, span.parent_span_id) == (b"\xab" * 16, b"\xcd" * 8)
    assert said["gen_ai.provider.name"].string_value == "anthropic"
    assert said["gateway.spent_nano"].int_value == call["spent_nano"]
    for secret in (KEY, token):
        assert secret not in (tmp_path / "log").read_text()
        assert not any(secret.encode() in body for body in received + measured)


def test_otel_without_its_packages_says_how_to_install_them(tmp_path):
    """Without its packages, --otel is refused with the way to get them."""
    hide = "import sys; sys.modules['opentelemetry'] = None; from gateway_addon.operations import tracing as otel; otel.start()"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=30)
    assert "OtelMissing: --otel needs OpenTelemetry, which is not installed: " in done.stderr
    assert "pip install opentelemetry-sdk " in done.stderr
