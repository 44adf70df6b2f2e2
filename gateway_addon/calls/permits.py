"""What the gate hands out beside tickets: who has arrived, and permission to forward what is not metered as it runs. Values only."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway_addon.calls.settlement import EndedBy
from gateway_addon.ledger import NewCall, Token
from gateway_addon.messages.request import ParsedRequest, Request
from gateway_addon.names import safe_name
from gateway_addon.policy import AppPolicy, GatewayPolicy

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""What an app's tracing says of the span in which it calls (https://www.w3.org/TR/trace-context/)."""


@dataclass(frozen=True, slots=True)
class AuthenticatedRequest:
    """A caller with a good token, at an endpoint that exists, under the policy in force when it came."""

    app: AppPolicy
    token: Token
    endpoint: str
    policy: GatewayPolicy
    monotonic_s: float
    """When its headers were here."""
    overruns: frozenset[str]
    """Models that are reserved in full, as the ledger said then."""


@dataclass(frozen=True, slots=True)
class PermitEnd:
    """How a forwarded call ended: `sent` once any of it was handed to the upstream's socket."""

    sent: bool
    ended_by: EndedBy
    status: int | None


@dataclass(frozen=True, slots=True)
class ResponseHook:
    """What else an answer is for, beside being passed on. Each part may be missing."""

    whole: Callable[[int, bytes], Awaitable[bytes]] | None = None
    """Hears a whole answer (status, body) before its client does, and returns the body that the client gets."""
    streamed: bool = False
    """A 200 may be of any length: it passes piece by piece."""
    tap: Callable[[bytes], None] | None = None
    """Reads along with what is streamed."""
    ended: Callable[[PermitEnd], None] | None = None


@dataclass(frozen=True, slots=True)
class Permit:
    """Permission to forward a call that costs nothing (count_tokens, models), or whose cost is settled later (a batch)."""

    arrived: AuthenticatedRequest
    call: NewCall
    admitted_at: float
    body: bytes | None = None
    """The body to send where the policy rewrote it, as in `Ticket`."""
    edited: str = ""
    """What was rewritten, as in `Ticket`; of a batch the names of the fields, whichever of its requests it was in."""
    flags: tuple[str, ...] = ()
    """What the policy did beside letting it pass, as in `Ticket`."""
    response_hook: ResponseHook = ResponseHook()
    reserved: bool = False
    """The ledger has an open call for it already; else one is written at its end, as free."""


def new_call(arrived: AuthenticatedRequest, read: ParsedRequest, request: Request, entrance: str) -> NewCall:
    """The row of a call that has not been quoted yet, with the labels by which Claude Code names its sessions and agents."""
    model, session, agent = (
        safe_name(text) or None
        for text in (read.model, *("".join(request.header(f"x-claude-code-{name}-id")[:1]) for name in ("session", "agent")))
    )
    trace = "".join(request.header("traceparent")[:1])
    return NewCall(
        arrived.app.name,
        arrived.app.team,
        arrived.token.id,
        entrance + arrived.endpoint,
        model,
        read.stream,
        read.max_tokens or None,
        session_id=session,
        agent_id=agent,
        traceparent=trace if TRACEPARENT.fullmatch(trace) else None,
    )
