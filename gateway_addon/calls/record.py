"""Describe an ended call as one flat record, for logs, traces and metrics. Pure.

Promises the same fields for every call, however it ended, and nothing of its content. The handbook's chapter `running` explains the
fields; a test keeps chapter and record together.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from gateway_addon.ledger import NewCall, Outcome, PartShape, Standing

type CallRecord = dict[str, Any]
type OnCall = Callable[[CallRecord], None]
type Exposition = Callable[[Sequence[Standing], bool], bytes]
"""Takes how the caps stand and whether the policy's files are broken; returns a scraper's text. Reads files: not for the event loop."""


def _nothing(value: Any) -> None:
    """Take a measurement that nobody asked for."""


class Measures(NamedTuple):
    """Functions that take what a gateway measures as it works, for its metrics. Each returns at once."""

    on_reservation: Callable[[float], None] = _nothing
    """Takes how many seconds a call waited for its reservation: for the ledger, and for budget."""
    on_top_up: Callable[[bool], None] = _nothing
    """Takes whether a running stream got the step that it asked for."""
    on_in_flight: Callable[[int], None] = _nothing
    """Takes 1 when a metered call begins, -1 when it has ended."""


METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Scrape(NamedTuple):
    """The metrics page: who may read it, and how it is written."""

    token: Callable[[], str]
    """Returns the bearer token that opens it: the newest, after a rotation."""
    exposition: Exposition


NOTHING = Outcome()


def record(
    call: NewCall,
    state: str,
    *,
    started_at: float,
    ended_at: float,
    call_id: int | None = None,
    refusal: str | None = None,
    outcome: Outcome = NOTHING,
    parts: Iterable[PartShape] = (),
    spent_nano: int = 0,
) -> CallRecord:
    """Return the record of an ended call. Times are unix seconds, amounts nano-dollars; tokens are summed over the billed parts."""
    tokens = [part.tokens for part in parts]
    first_byte_at = outcome.first_byte_at
    return {
        "event": "call",
        "call": call_id,
        "state": state,
        "app": call.app,
        "team": call.team,
        "token": call.token_id,
        "session": call.session_id,
        "agent": call.agent_id,
        "parent_agent": call.parent_agent_id,
        "user": call.user_id,
        "labels": dict(call.labels),
        "traceparent": call.traceparent,
        "endpoint": call.endpoint,
        "model": call.model_asked,
        "model_served": outcome.model_served,
        "stream": call.stream,
        "max_tokens": call.max_tokens,
        "status": outcome.status,
        "refusal": refusal,
        "stop_reason": outcome.stop_reason,
        "complete": outcome.complete,
        "request_id": outcome.request_id,
        "started_at": round(started_at, 3),
        "first_byte_s": None if first_byte_at is None else round(first_byte_at - started_at, 3),
        "duration_s": round(ended_at - started_at, 3),
        "quote_nano": call.quote_nano,
        "spent_nano": spent_nano,
        "input_tokens": sum(each.input_tokens for each in tokens),
        "output_tokens": sum(each.output_tokens for each in tokens),
        "cache_read_tokens": sum(each.cache_read_tokens for each in tokens),
        "cache_write_tokens": sum(
            each.cache_write_5m_tokens + each.cache_write_1h_tokens + each.cache_write_unsplit_tokens for each in tokens
        ),
        "flags": list(outcome.flags),
    }  # fmt: skip
