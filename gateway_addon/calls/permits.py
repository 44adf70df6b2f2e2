"""Define what the gateway hands out besides admissions: authenticated requests, and permits to forward unmetered calls. Values only."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from gateway_addon.calls.settlement import EndedBy
from gateway_addon.identity.parts import parts_of
from gateway_addon.ledger import NewCall, Token
from gateway_addon.messages.request import ParsedRequest, Request
from gateway_addon.names import safe_name
from gateway_addon.policy import AppPolicy, GatewayPolicy
from gateway_addon.policy.labels import labels_in_force

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""The span in which an app calls, as its tracing sends it (https://www.w3.org/TR/trace-context/)."""


@dataclass(frozen=True, slots=True)
class AuthenticatedRequest:
    """A request with a token in force, at an endpoint that exists, and the policy in force when its headers arrived."""

    app: AppPolicy
    token: Token
    endpoint: str
    policy: GatewayPolicy
    monotonic_s: float
    """The moment at which its headers were complete."""
    overruns: frozenset[str]
    """Models that were to be reserved in full at that moment."""


@dataclass(frozen=True, slots=True)
class PermitEnd:
    """How a forwarded call ended: `sent` once any of it was handed to the upstream's socket."""

    sent: bool
    ended_by: EndedBy
    status: int | None


@dataclass(frozen=True, slots=True)
class ResponseHook:
    """Functions that see an answer besides the client. Each may be missing."""

    whole: Callable[[int, bytes], Awaitable[bytes]] | None = None
    """Called with a whole answer (status, body); returns the body that the client gets."""
    streamed: bool = False
    """Pass a 200 piece by piece, since it may be of any length."""
    tap: Callable[[bytes], None] | None = None
    """Called with each piece of a streamed answer."""
    ended: Callable[[PermitEnd], None] | None = None


@dataclass(frozen=True, slots=True)
class Permit:
    """Permission to forward a call that costs nothing (count_tokens, models), or whose cost is settled later (a batch)."""

    caller: AuthenticatedRequest
    call: NewCall
    admitted_at: float
    body: bytes | None = None
    """The body to send where the policy rewrote it, as in `Admission`."""
    edited: str = ""
    """The rewritten fields, as in `Admission`; for a batch their names alone, over all of its requests."""
    flags: tuple[str, ...] = ()
    """Flags for the call's row, as in `Admission`."""
    response_hook: ResponseHook = ResponseHook()
    reserved: bool = False
    """The ledger already has an open call for it; else a row is written at its end, with state `free`."""


def new_call(caller: AuthenticatedRequest, parsed: ParsedRequest, request: Request, endpoint_prefix: str) -> NewCall:
    """Return the row of a call that is not quoted yet, with what the request says of its session, agents, user and labels."""
    metadata = parsed.body.get("metadata")
    said = parts_of(request.headers, metadata.get("user_id") if isinstance(metadata, Mapping) else None)
    trace = "".join(request.header("traceparent")[:1])
    return NewCall(
        caller.app.name,
        caller.app.team,
        caller.token.id,
        endpoint_prefix + caller.endpoint,
        safe_name(parsed.model) or None,
        parsed.stream,
        parsed.max_tokens or None,
        session_id=said.session,
        agent_id=said.agent,
        parent_agent_id=said.parent_agent,
        user_id=said.user,
        labels=labels_in_force(caller.app, parsed),
        traceparent=trace if TRACEPARENT.fullmatch(trace) else None,
    )
