"""Define who is admitted with what: the caller of a request, and the permission to forward its call. Values only."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gateway_addon.calls.judging import Judgement
from gateway_addon.calls.quote import Quote
from gateway_addon.calls.reservation_options import ReservationOption
from gateway_addon.identity.parts import parts_of
from gateway_addon.ledger import NewCall, Reserved, Token
from gateway_addon.messages.request import ParsedRequest, Request
from gateway_addon.names import safe_name
from gateway_addon.policy import AppPolicy, GatewayPolicy, name_limit
from gateway_addon.policy.labels import labels_in_force
from gateway_addon.pricing import Prices

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""The span in which an app calls, as its tracing sends it (https://www.w3.org/TR/trace-context/)."""

LAST_CALL = "x-gateway-last-call"
"""The header of a client that ends with this request, as `each.KIND.last_call` lets it."""

EndedBy = Literal["whole", "client", "upstream", "gateway"]


@dataclass(frozen=True, slots=True)
class Caller:
    """An app that calls an endpoint, with a token in force, under the policy in force when its headers arrived."""

    app: AppPolicy
    token: Token
    endpoint: str
    policy: GatewayPolicy
    overruns: frozenset[str]
    """Models that were to be reserved in full then."""
    arrived_at: float
    digest: str = ""
    """The digest by which the ledger found its token."""


@dataclass(frozen=True, slots=True)
class ResponseHook:
    """Functions that see an answer besides the client. Each may be missing."""

    whole: Callable[[int, bytes], Awaitable[bytes]] | None = None
    """Called with a whole answer (status, body); returns the body that the client gets."""
    streamed: bool = False
    """Pass a 200 piece by piece, since it may be of any length."""
    tap: Callable[[bytes], None] | None = None
    """Called with each piece of a streamed answer."""
    ended: Callable[[bool, EndedBy, int | None], None] | None = None
    """Called at the end: whether any of the call was handed to the upstream's socket, who ended it, and the answer's status."""
    headers: tuple[tuple[str, str], ...] = ()
    """Headers of the answer beside the API's."""


class Hold(NamedTuple):
    """The reservation of one call in the ledger."""

    reserved: Reserved
    quote: Quote
    option: ReservationOption
    """How much of the quote it covers, and for how long."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Permission to forward one call: as what it is sent, and by which policy, prices and reservation it is settled."""

    caller: Caller
    call: NewCall
    parsed: ParsedRequest
    admitted_at: float
    flags: tuple[str, ...] = ()
    """Flags for the call's row: `edited:FIELD` and `observed:CODE` by the policy, `replayed` by a person."""
    body: bytes | None = None
    """The body to send where the policy rewrote it (an alias, a clamp); None: as received."""
    edited: str = ""
    """The rewritten fields, as the header `x-gateway-edited` names them (responses.py); for a batch their names alone."""
    hold: Hold | None = None
    """None: it costs nothing (count_tokens, models), or its hook settles it (a batch)."""
    response_hook: ResponseHook = ResponseHook()
    settled_by_hook: bool = False
    """The ledger has an open call for it that its hook resolves; else a call without a hold gets a row at its end, with state `free`."""

    @property
    def app(self) -> AppPolicy:
        return self.caller.app

    @property
    def prices(self) -> Prices:
        return self.caller.policy.prices

    @property
    def streams(self) -> bool:
        """Tell whether the answer passes piece by piece: it is then never read to its end without a client."""
        return self.parsed.stream if self.hold is not None else self.response_hook.streamed


def new_call(caller: Caller, judged: Judgement, request: Request, endpoint_prefix: str) -> NewCall:
    """Return the row of a call, with what the request says of its session, agents, user and labels."""
    asked, quote = judged.asked, judged.verdict if isinstance(judged.verdict, Quote) else None
    metadata = asked.body.get("metadata")
    said = parts_of(request.headers, metadata.get("user_id") if isinstance(metadata, dict) else None)
    trace = "".join(request.header("traceparent")[:1])
    return NewCall(
        caller.app.name,
        caller.app.team,
        caller.token.id,
        endpoint_prefix + caller.endpoint,
        safe_name(asked.model) or None,
        asked.stream,
        asked.max_tokens or None,
        0 if quote is None else quote.input_tokens,
        0 if quote is None else quote.total_nano,
        model=None if quote is None else caller.policy.prices.canonical(judged.parsed.model),
        session_id=said.session,
        agent_id=said.agent,
        parent_agent_id=said.parent_agent,
        user_id=said.user,
        labels=labels_in_force(caller.app, asked),
        names=name_limit(caller.app),
        token_cap_nano=caller.token.cap_nano,
        last_call=request.header(LAST_CALL) == ("1",),
        traceparent=trace if TRACEPARENT.fullmatch(trace) else None,
    )
