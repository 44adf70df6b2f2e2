"""Comment flows in mitmweb with the gateway's verdict and cost, and judge the flows that a person edits or replays.

Promises that an edited or replayed flow passes the same admission as any call, as the app whose token first came with it and
only while that token is in force; that it is judged as it is sent, with every edit; and that a flow carries no secret: a random
word, which only this process can resolve, refers to its caller.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from mitmproxy import command, contentviews, ctx, exceptions, http
from mitmproxy import flow as mflow
from mitmproxy.hooks import UpdateHook

from gateway_addon.calls.admission import Caller, EndedBy
from gateway_addon.calls.exchange import ExchangeRequest
from gateway_addon.calls.record import CallRecord
from gateway_addon.calls.responses import OwnResponse
from gateway_addon.identity.client_address import origin
from gateway_addon.ledger import (
    TOTAL,
    LedgerUnavailable,
    ServerAddress,
    Standing,
    Token,
    app_scope,
    connect,
    reservations,
    scopes,
    state,
    team_scope,
)
from gateway_addon.messages import Usage
from gateway_addon.money import cents, dollars
from gateway_addon.operations import explain as explanation
from gateway_addon.policy import AppPolicy, all_caps, caps
from gateway_addon.pricing import cost
from gateway_addon.proxy.flow_values import request_of
from gateway_addon.proxy.hooks import GatewayAddon, guarded
from gateway_addon.proxy.web import pretty
from gateway_addon.proxy.web.lockdown import FIXED, LOOKING, NO_SCRIPTS
from gateway_addon.proxy.web.view import ClaudeContentview
from gateway_addon.refusals import Refusal
from gateway_addon.windows import Window

REFUSED = ":no_entry:"
WITHIN: dict[Window, str] = {"day": "today", "week": "this week", "month": "this month", "ever": "in all"}
CALLER = "gateway_caller"
"""The key in a flow's metadata for the word of its caller: copied with the flow, so that a duplicate can be replayed too."""


class FlowCaller(NamedTuple):
    digest: str
    app: str


@dataclass(slots=True, eq=False)
class LastAdmission:
    """Admit a request after every other addon, so that their changes are judged, those of an interception too."""

    gateway: "DebugAddon"

    async def request(self, flow: http.HTTPFlow) -> None:
        if flow.intercepted:
            ctx.master.addons.trigger(UpdateHook([flow]))
            await flow.wait_for_resume()
        await self.gateway.admit(flow)


class DebugAddon(GatewayAddon):
    """The gateway's addon under mitmweb. `place`: the ledger, for commands that read it."""

    def __init__(self, *arguments: Any, place: Path | ServerAddress, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.place = place
        self.fixed: dict[str, Any] = {}
        """Options as they were when the proxy was running, where they must stay so."""
        self.callers: dict[str, FlowCaller] = {}
        self.booked: WeakKeyDictionary[http.HTTPFlow, CallRecord] = WeakKeyDictionary()
        self._awaited: dict[int, http.HTTPFlow] = {}
        self._comments: set[asyncio.Task[None]] = set()
        self._next_listener, self.gateway.on_call = self.gateway.on_call, self._ended
        contentviews.add(ClaudeContentview(self.priced))

    # -- mitmweb's own life

    def configure(self, updated: set[str]) -> None:
        super().configure(updated)
        if ctx.options.scripts:
            raise exceptions.OptionsError(NO_SCRIPTS)
        for name in updated & self.fixed.keys():
            if getattr(ctx.options, name) != self.fixed[name]:
                raise exceptions.OptionsError(FIXED.format(name))

    def running(self) -> None:
        super().running()
        self.fixed = {name: getattr(ctx.options, name) for name in ctx.options.keys() - LOOKING}

    # -- a request, perhaps not for the first time

    @guarded("request")
    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        flow.marked = flow.comment = ""
        await super().requestheaders(flow)

    async def _authenticate(
        self, flow: http.HTTPFlow, headers: tuple[tuple[str, str], ...]
    ) -> Caller | ExchangeRequest | OwnResponse | Refusal:
        if flow.is_replay:
            return await self._again(flow) or await super()._authenticate(flow, headers)
        flow.metadata.pop(CALLER, None)
        caller = await super()._authenticate(flow, headers)
        if isinstance(caller, Caller):
            flow.metadata[CALLER] = self._word(FlowCaller(caller.digest, caller.app.name))
        return caller

    def _word(self, caller: FlowCaller) -> str:
        """Return the word for a caller: always the same one, so that there are as many words as tokens."""
        known = next((word for word, each in self.callers.items() if each == caller), None)
        if known is None:
            known = secrets.token_hex(8)
            self.callers[known] = caller
        return known

    def caller(self, flow: mflow.Flow) -> FlowCaller | None:
        """Return the caller whose token came with this flow, or with the one that it is a copy of. None where no token was seen."""
        return self.callers.get(str(flow.metadata.get(CALLER)))

    async def _again(self, flow: http.HTTPFlow) -> Caller | ExchangeRequest | OwnResponse | Refusal | None:
        """Authenticate the flow again, as it is now, as its caller."""
        caller = self.caller(flow)
        return caller and await self._authenticate_with(flow, request_of(flow).headers, caller.digest)

    @guarded("request")
    async def request(self, flow: http.HTTPFlow) -> None:
        """Answer an exchange; for all else do nothing yet: `LastAdmission` admits, after all other addons."""
        if (flow_state := self.flow_states.get(flow.id)) is not None and flow_state.exchange is not None:
            await super().request(flow)

    @guarded("request")
    async def admit(self, flow: http.HTTPFlow) -> None:
        flow_state = self.flow_states.get(flow.id)
        if flow.response or flow.error or flow_state is None:
            return
        caller = await self._again(flow)
        if not isinstance(caller, Caller):
            nobodys = Refusal("replay", "Nobody's token came with this flow. Send the call from its app.")
            return self.answer(flow, caller if isinstance(caller, OwnResponse | Refusal) else nobodys)
        flow_state.caller = caller
        await super().request(flow)
        if flow_state.running is not None:
            admission, hold = flow_state.running.admission, flow_state.running.hold
            if flow.is_replay:
                flow_state.running.admission = replace(admission, flags=(*admission.flags, "replayed"))
            self._awaited[hold.reserved.call_id] = flow
            flow.comment = _line(caller.app.name, f"{cents(hold.quote.total_nano)} at most", admission.parsed.model)

    # -- what became of it

    def answer(self, flow: http.HTTPFlow, said: OwnResponse | Refusal) -> None:
        caller = self.caller(flow)
        if isinstance(said, Refusal):
            flow.marked = REFUSED
            model = pretty.model(flow.request.raw_content or b"")
            flow.comment = _line(caller and caller.app, f"refused, {said.code}", model, said.sentence)
        super().answer(flow, said)

    def finish(self, flow_id: str, ended_by: EndedBy) -> None:
        flow_state = self.flow_states.get(flow_id)
        super().finish(flow_id, ended_by)
        if flow_state is not None and flow_state.admission is not None and flow_state.running is None:
            flow_state.flow.comment = _line(flow_state.admission.app.name, flow_state.admission.caller.endpoint, "free")

    def _ended(self, call: CallRecord) -> None:
        """Put a call's cost on its flow, once it is written."""
        if self._next_listener is not None:
            self._next_listener(call)
        flow = self._awaited.pop(call["call"], None)
        if flow is not None:
            self.booked[flow] = call
            task = asyncio.ensure_future(self._comment(flow, call))
            self._comments.add(task)
            task.add_done_callback(self._comments.discard)

    async def _comment(self, flow: http.HTTPFlow, call: CallRecord) -> None:
        flags = f" ({', '.join(call['flags'])})" if call["flags"] else ""
        flow.comment = _line(call["app"], f"{cents(call['spent_nano'])}{flags}", call["model"], await self._left(call["app"]))
        ctx.master.addons.trigger(UpdateHook([flow]))

    async def _left(self, name: str) -> str:
        """Return what the tightest of an app's caps leaves it, and until when, in words."""
        policy = self.gateway.policy
        limits = caps(policy, policy.apps[name]) if name in policy.apps else ()
        try:
            standings = await self.gateway.ledger.capped(limits, now=self.clocks.now())
        except LedgerUnavailable:
            return "what is left is not known"
        left = [(nano, each.window) for each in standings if (nano := _left_nano(each)) is not None]
        if not left:
            return "no cap"
        nano, window = min(left, key=lambda each: each[0])
        return f"{cents(max(0, nano))} left {WITHIN[window]}"

    def priced(self, flow: http.HTTPFlow | None, usage: Usage) -> str:
        """Return the cost of an answer in words, for its content view."""
        call = self.booked.get(flow) if flow is not None else None
        if call is not None:
            flags = f" ({', '.join(call['flags'])})" if call["flags"] else ""
            return f"{dollars(call['spent_nano'])}, booked as call {call['call']}{flags}"
        hour = flow is not None and b'"1h"' in (flow.request.raw_content or b"")
        bill = cost(self.gateway.policy.prices, usage, at=self.clocks.now(), hour_ttl_requested=hour)
        return "cannot be priced" if bill.nano is None else f"{dollars(bill.nano)} at today's prices; not booked by this process"

    # -- commands: lists of sentences, because the page's command bar shows a text's line ends as \n

    @command.command("gateway.spend")  # type: ignore[untyped-decorator]
    def spend(self, app: str = "") -> Sequence[str]:
        """Show the amounts spent, held and left today and this month, for an app or for all."""
        policy = self.gateway.policy
        names = [app] if app else sorted(policy.apps)
        known = [policy.apps.get(name) for name in names]
        if None in known:
            return [f"No app {app!r}; there: {', '.join(sorted(policy.apps))}."]
        wanted = scopes(app, policy.apps[app].team) if app else [TOTAL, *map(team_scope, policy.teams), *map(app_scope, names)]
        try:
            with connect.reading(self.place) as db:
                standings = reservations.standing(db, wanted, all_caps(policy), now=self.clocks.now())
        except LedgerUnavailable as error:
            return [f"The ledger cannot be read: {error}."]
        return [_standing(each) for each in standings if each.window in ("day", "month")]

    @command.command("gateway.explain")  # type: ignore[untyped-decorator]
    def explain(self, flow: mflow.Flow) -> Sequence[str]:
        """Explain what would happen to this request if it were sent now: every rule, the quote, the caps."""
        caller = self.caller(flow)
        app: AppPolicy | None = self.gateway.policy.apps.get(caller.app) if caller else None
        if caller is None or app is None or not isinstance(flow, http.HTTPFlow):
            return ["No app's token came with this flow while this process ran, so there is no policy to judge it by."]
        request, policy, now = request_of(flow), self.gateway.policy, self.clocks.now()
        address = origin(flow.client_conn.peername[0], request.headers, policy.trusted_proxies) if flow.client_conn.peername else None

        def find_token(db: connect.ReadConnection) -> Token | None:
            return state.look_up_token(db, caller.digest, now).token

        found = explanation.explain(policy, app, request, self.place, now, find_token, address)
        return [" ".join(line.split()) for line in explanation.written(found).splitlines() if line.strip(" -")]


def _left_nano(standing: Standing) -> int | None:
    return None if standing.cap_nano is None else standing.cap_nano - standing.spent_nano - standing.reserved_nano


def _standing(standing: Standing) -> str:
    left_nano = _left_nano(standing)
    left = "no cap" if left_nano is None else f"{cents(left_nano)} left of {cents(standing.cap_nano or 0)}"
    return f"{standing.scope} {standing.window}: {cents(standing.spent_nano)} spent, {cents(standing.reserved_nano)} held, {left}"


def _line(*parts: str | None) -> str:
    """Return `app · cost or refusal · model · ...`, as the list has room for the beginning, without the parts that are not known."""
    return " · ".join(part for part in parts if part)
