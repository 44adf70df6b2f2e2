"""A span per call, by OpenTelemetry's conventions for generative AI, sent to where the standard OTEL_* variables point.

A call stands below the span of which its app tells in `traceparent`. Promises that the event loop never waits for the
collector: spans are handed to the SDK's own thread, and dropped where it falls behind. An edge: it talks to a network.
Needs the extra `otel`.
"""

from collections.abc import Callable
from typing import Any

from gateway_addon.calls.record import CallRecord, OnCall

PACKAGES = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
MISSING = f"--otel needs OpenTelemetry, which is not installed: .venv/bin/pip install {PACKAGES}"


class OtelMissing(Exception):
    """OpenTelemetry is not installed. The message is a sentence with the way out."""


def start(exporter: Any = None) -> tuple[OnCall, Callable[[], None]]:
    """How to tell of a call, and how to stop, which sends what is waiting. Raises OtelMissing.

    `exporter` None: OTLP over HTTP, to OTEL_EXPORTER_OTLP_ENDPOINT (http://localhost:4318).
    """
    try:
        from opentelemetry.context import Context
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
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

    def emit(call: CallRecord) -> None:
        name = f"{operation(call)} {call['model'] or ''}".strip()
        within = TraceContextTextMapPropagator().extract({"traceparent": call["traceparent"]} if call["traceparent"] else {}, Context())
        span = tracer.start_span(name, within, SpanKind.CLIENT, attributes(call), start_time=_ns(call["started_at"]))
        if problem := error_type(call):
            span.set_status(Status(StatusCode.ERROR, problem))
        span.end(_ns(call["started_at"] + call["duration_s"]))

    return emit, provider.shutdown


def operation(call: CallRecord) -> str:
    return "chat" if call["endpoint"].endswith("messages") else str(call["endpoint"])


def error_type(call: CallRecord) -> str | None:
    """Low in cardinality, as the conventions ask: a refusal's code or a status."""
    status = call["status"]
    failed = status is not None and status >= 400
    return call["refusal"] or (str(status) if failed else None) or (None if call["complete"] else "incomplete")


def attributes(call: CallRecord) -> dict[str, Any]:
    """The span's attributes: `gen_ai.*` by the conventions (their input_tokens include everything cached), `gateway.*` our own."""
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
