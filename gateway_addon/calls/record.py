"""Describe an ended call as one flat record, for logs and traces. Pure.

Promises the same fields for every call, however it ended, and nothing of its content. The handbook's chapter `running` explains the
fields; a test keeps chapter and record together.
"""

from collections.abc import Callable, Iterable
from typing import Any

from gateway_addon.ledger import NewCall, Outcome, PartShape

type CallRecord = dict[str, Any]
type OnCall = Callable[[CallRecord], None]

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
