"""How each way in which a call can end is settled: one table, in `RULES`, and the function that reads it.

Promises that a call is voided only on evidence that the provider did no work, is charged exactly where the answer says what
it used, and otherwise keeps an upper bound, flagged `estimated` with the reason. Knows nothing of mitmproxy or SQL.

    the call ended                                              | it is
    ------------------------------------------------------------|----------------------------------------------------------
    before its request reached the upstream (connect, DNS, TLS) | voided
    with a redirect (which the app does not get)                | voided
    with the API's error first, whatever its status             | voided
    the same, later than `lag_s`, where the provider may loop   | settled at the grant, estimated:late_error
    with a status that only an edge makes (EDGE_REFUSALS)       | voided
    with one that an edge makes on its own or for a lost origin | within 2 s voided, assumed_unbilled
    (EDGE_BREAKS), without the envelope                         | later settled at what can be by then, estimated:edge
    with any other status >= 400                                | settled at the grant, estimated:error_unreadable
    lost between request and status (cut, timeout)              | settled at the grant, estimated:no_status
    with an answer that reports its whole usage                 | settled at its exact cost
    the same, by a model without a price                        | settled at the grant, estimated:model_unpriced
    refused before any output                                   | settled at zero: usage is reported, and not charged
    after message_start: cut by upstream, client or gateway     | settled at exact input + output grant, estimated:cut
    after message_start: by an error event                      | settled at exact input + output grant, estimated:stream_error
    with a 200 whose usage cannot be read (pings only, junk)    | settled at the grant, estimated:usage_unreadable
    inside the gateway (a bug)                                  | as above by what is known, estimated:gateway_error

Where an answer did report its input before it went wrong, "at the grant" is that exact input and the output granted. Where the
gateway stood still and could not cut, the grant is passed by what can have been generated in that time, and the call flagged `late`.
"""

from dataclasses import dataclass
from typing import Literal

from gateway_addon.ledger import Outcome, Settlement
from gateway_addon.pricing import Cost, cost
from gateway_addon.running import Running
from gateway_addon.usage import Usage

EDGE_BREAKS = frozenset({502, 503, 520, 522})
"""Statuses that an edge makes when it cannot reach the origin, and also when the origin broke off after it took the request."""
EDGE_UNBILLED_S = 2.0
"""How soon such a status must come to be taken for a request that the origin never took (assumed)."""

EndedBy = Literal["whole", "client", "upstream", "gateway"]


@dataclass(frozen=True, slots=True)
class Void:
    """The provider did no work: everything held goes back."""

    outcome: Outcome


def drifted(running: Running, served: str) -> bool:
    """Another model answered than the one asked for (a dated id of the same model is the same model)."""
    canonical = running.ticket.prices.canonical
    return (canonical(served) or served) != canonical(running.ticket.reading.model)


def settle(running: Running, *, sent: bool, ended_by: EndedBy) -> Settlement | Void:
    """Judge an ended call by the table above.

    `sent`: the request was handed to the upstream's socket, in part or whole. `ended_by`: `whole` where the answer's body
    arrived to its end, else who broke it off.
    """
    ticket, usage = running.ticket, running.finished()
    served = usage.model if usage else None
    flags = ticket.flags if running.cut is None else (*ticket.flags, f"cut:{running.cut}")
    if served is not None and drifted(running, served):
        flags = (*flags, "drift")

    def outcome(*more: str, complete: bool = False, price_rows: str | None = None) -> Outcome:
        said = usage or Usage()
        return Outcome(
            running.status, served, said.stop_reason, running.request_id, running.first_byte_at, complete, price_rows, flags + more,
            said.service_tier, said.speed, said.inference_geo,
        )  # fmt: skip

    def estimated(reason: str) -> Settlement:
        """Exact input plus the output bound where the answer began and its input cannot have grown since; else all that is held."""
        most_nano = running.bound_nano(running.output_tokens_max)
        if usage is not None and usage.started and usage.prompt_known and ticket.quote.releasable:
            bound = priced(usage.assuming_output(running.output_tokens_max))
            if bound.nano is not None and bound.nano <= most_nano:
                more = (f"estimated:{reason}", *bound.flags, *late(bound.nano))
                return Settlement(bound.nano, bound.parts, outcome(*more, price_rows=bound.price_rows))
        nano = most_nano if most_nano > running.held_nano else None
        return Settlement(nano, (), outcome(f"estimated:{reason}", *late(most_nano)))

    def late(nano: int) -> tuple[str, ...]:
        """Flag what passed the grant only because the gateway stood still."""
        return ("late",) if running.held_nano < nano <= running.bound_nano(running.output_tokens_max) else ()

    def priced(used: Usage) -> Cost:
        return cost(ticket.prices, used, at=ticket.admitted_at, hour_ttl_requested=ticket.reading.hour_ttl)

    if not sent:
        return Void(outcome("not_sent"))
    if running.status is None:
        return estimated("no_status")
    if 300 <= running.status < 400:
        return Void(outcome("upstream:redirect"))
    if usage is not None and (why := usage.unbilled(running.status)) is not None:
        if usage.error_type is not None and _may_have_looped(running):
            return estimated("late_error")
        return Void(outcome(why, complete=ended_by == "whole"))
    if running.status in EDGE_BREAKS and not (usage and usage.started):
        if running.elapsed_s <= EDGE_UNBILLED_S:
            return Void(outcome("assumed_unbilled"))
        return Settlement(running.unseen_nano(), (), outcome("estimated:edge"))
    if running.status >= 400:
        return estimated("error_unreadable")
    if usage is None or not usage.readable:
        return estimated("usage_unreadable")
    if not usage.complete:
        if ended_by == "gateway" and running.cut is None:
            return estimated("gateway_error")
        return estimated("stream_error" if usage.error_type else "cut")
    bill = priced(usage)
    if bill.nano is None:
        return estimated("model_unpriced")
    return Settlement(bill.nano, bill.parts, outcome(*bill.flags, *late(bill.nano), complete=True, price_rows=bill.price_rows))


def _may_have_looped(running: Running) -> bool:
    """Whether turns of the provider's own can have been billed before its error came."""
    pace = running.declared()
    return not running.ticket.quote.releasable and (pace is None or running.elapsed_s > pace.lag_s)
