"""Send a span for each call, and its tokens and duration as metrics, to where the standard OTEL_* variables point.

Names follow OpenTelemetry's conventions for generative AI. A call stands below the span of which its app tells in `traceparent`. Promises
that the event loop never waits for the collector: the SDK's own threads send, and drop where it falls behind. An edge: it talks to a
network. Needs the extra `otel`.
"""

from collections.abc import Callable
from typing import Any

from gateway_addon.calls.record import CallRecord, OnCall
from gateway_addon.names import install

PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")
MISSING = f"--otel needs OpenTelemetry, which is not installed: {install(*PACKAGES)}"


TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
CALL_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
"""The buckets that the conventions ask for (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/)."""
INPUT, OUTPUT = {"gen_ai.token.type": "input"}, {"gen_ai.token.type": "output"}
MEASURED_BY = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "gen_ai.response.model", "error.type")


class OtelMissing(Exception):
    """OpenTelemetry is not installed. The message is a sentence with the way out."""


def start(exporter: Any = None, reader: Any = None) -> tuple[OnCall, Callable[[], None]]:
    """Return the function that takes calls, and the one that stops, which sends what is waiting. Raises OtelMissing.

    `exporter` (of spans) and `reader` (of metrics) None: OTLP over HTTP, to OTEL_EXPORTER_OTLP_ENDPOINT (http://localhost:4318).
    """
    try:
        from opentelemetry.context import Context
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError as error:
        raise OtelMissing(MISSING) from error
    resource = Resource.create({"service.name": "claude-gateway"}).merge(Resource.create())  # OTEL_SERVICE_NAME wins
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    tracer = provider.get_tracer("gateway_addon")
    meters = MeterProvider([reader or PeriodicExportingMetricReader(OTLPMetricExporter())], resource, shutdown_on_exit=False)
    meter = meters.get_meter("gateway_addon")
    histogram = meter.create_histogram
    tokens = histogram("gen_ai.client.token.usage", "{token}", "Billed tokens.", explicit_bucket_boundaries_advisory=TOKENS)
    duration = histogram("gen_ai.client.operation.duration", "s", "From admission.", explicit_bucket_boundaries_advisory=CALL_S)

    def emit(call: CallRecord) -> None:
        name = f"{operation(call)} {call['model'] or ''}".strip()
        within = TraceContextTextMapPropagator().extract({"traceparent": call["traceparent"]} if call["traceparent"] else {}, Context())
        span = tracer.start_span(name, within, SpanKind.CLIENT, attributes(call), start_time=_ns(call["started_at"]))
        if problem := error_type(call):
            span.set_status(Status(StatusCode.ERROR, problem))
        span.end(_ns(call["started_at"] + call["duration_s"]))
        if call["state"] == "settled":
            labels = measured(call)
            duration.record(call["duration_s"], labels)
            tokens.record(call["input_tokens"] + call["cache_read_tokens"] + call["cache_write_tokens"], labels | INPUT)
            tokens.record(call["output_tokens"], labels | OUTPUT)

    def stop() -> None:
        provider.shutdown()
        meters.shutdown()

    return emit, stop


def operation(call: CallRecord) -> str:
    return "chat" if call["endpoint"].endswith("messages") else str(call["endpoint"])


def measured(call: CallRecord) -> dict[str, Any]:
    """Return the attributes of a call's measurements: few values each, since every combination is a series."""
    found = {name: value for name, value in attributes(call).items() if name in MEASURED_BY}
    return found | {"gateway.app": call["app"]}


def error_type(call: CallRecord) -> str | None:
    """Return a refusal's code or a status: few values, as the conventions ask."""
    status = call["status"]
    failed = status is not None and status >= 400
    return call["refusal"] or (str(status) if failed else None) or (None if call["complete"] else "incomplete")


def attributes(call: CallRecord) -> dict[str, Any]:
    """Return the span's attributes: `gen_ai.*` by the conventions (their input_tokens include everything cached), `gateway.*` our own."""
    found = {
        "gen_ai.operation.name": operation(call),
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": call["model"],
        "gen_ai.request.max_tokens": call["max_tokens"],
        "gen_ai.request.stream": call["stream"],
        "gen_ai.response.time_to_first_chunk": call["first_byte_s"],
        "gen_ai.response.model": call["model_served"],
        "gen_ai.response.finish_reasons": [call["stop_reason"]] if call["stop_reason"] else None,
        "gen_ai.usage.input_tokens": call["input_tokens"] + call["cache_read_tokens"] + call["cache_write_tokens"],
        "gen_ai.usage.cache_read.input_tokens": call["cache_read_tokens"],
        "gen_ai.usage.cache_creation.input_tokens": call["cache_write_tokens"],
        "gen_ai.usage.output_tokens": call["output_tokens"],
        "gen_ai.conversation.id": call["session"],
        "gen_ai.agent.id": call["agent"],
        "error.type": error_type(call),
        "http.response.status_code": call["status"],
        "gateway.app": call["app"],
        "gateway.team": call["team"],
        "gateway.call": call["call"],
        "gateway.state": call["state"],
        "gateway.spent_nano": call["spent_nano"],
        "gateway.flags": call["flags"] or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _ns(at: float) -> int:
    return int(at * 1_000_000_000)
