"""The application: who may send what, what it may cost, and what it did cost, in the order in which it happens.

Promises that nothing is permitted without a token, a policy that allows it, and a reservation that every cap allows; and that
each reservation is resolved once, however its call ends. Any doubt is a refusal. Knows nothing of mitmproxy, SQL or YAML: it
takes values, awaits the ledger, and returns values.

    arrive   headers are here     who is it, and is there such an endpoint?
    admit    the body is here     policy > quote > reservation; a budget that is only *held* is waited for
    running  the answer streams   input released when its tokens are known, output topped up before it is generated
    close    the call has ended   priced and settled, or voided (settlement.py)
"""

import asyncio
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from gateway_addon import identity, reading
from gateway_addon.bounds import Quote, quote
from gateway_addon.grants import TICK_S, Pace
from gateway_addon.ledger import Denied, Ledger, LedgerUnavailable, NewCall, Outcome, RateLimits, Reserved, Standing, Token
from gateway_addon.money import dollars
from gateway_addon.policy import AppPolicy, Cap, GatewayPolicy, caps, edits, judge, may_use
from gateway_addon.reading import Reading, Request
from gateway_addon.refusals import Refusal
from gateway_addon.running import Running, Ticket
from gateway_addon.sentences import cut_sentence, denied, over_request_cap
from gateway_addon.settlement import EndedBy, Void, settle

logger = logging.getLogger(__name__)

HELD_WAIT_S = 2.0  # how long a call waits at the door for budget that calls in flight hold
HELD_POLL_S = 0.05  # another process's settlement makes no sound here
COMFORT = 50  # `reserve: auto` reserves a stream whole while its quote is at most this part of each of its caps


@dataclass(frozen=True, slots=True)
class Answer:
    """What the gateway answers by itself."""

    body: Mapping[str, Any] | None
    status: int = 200


@dataclass(frozen=True, slots=True)
class Arrived:
    """A caller with a good token, at an endpoint that exists, under the policy in force when it came."""

    app: AppPolicy
    token: Token
    endpoint: str
    policy: GatewayPolicy


@dataclass(frozen=True, slots=True)
class Pass:
    """Permission to forward a call that costs nothing (count_tokens, models)."""

    arrived: Arrived
    call: NewCall
    body: bytes | None = None
    """The body to send where the policy rewrote it, as in `Ticket`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a call is to be reserved: whole (`pace` None), or in steps."""

    granted_tokens: int
    pace: Pace | None
    quantum_nano: int = 0


class Gate:
    """One process's door. `policy` is replaced whole by a reload; calls in flight keep the one they came under."""

    def __init__(self, ledger: Ledger, policy: GatewayPolicy, clock: Callable[[], float]):
        """`clock` returns unix seconds; it paces top-ups only, every decision takes its `now` from the caller."""
        self.ledger = ledger
        self._clock = clock
        self.policy = policy
        self.policy_problem: str | None = None
        """Why the files on disk are not in force, after a reload that failed."""
        self._running: set[Running] = set()
        self._settled = asyncio.Event()
        self._doors: dict[str, asyncio.Lock] = {}
        self._top_ups: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    # -- arrive

    async def arrive(
        self, method: str, target: str, headers: tuple[tuple[str, str], ...], peer: str, now: float
    ) -> Arrived | Answer | Refusal:
        """Find out who calls which endpoint, from the headers alone. `headers` have lower-case names; `peer` is an IP address."""
        endpoint = reading.endpoint(method, target)
        if endpoint == "hello":
            return Answer(None)
        if endpoint == "healthz":
            return Answer(self._health())
        try:
            token = await self._token(headers, now)
        except LedgerUnavailable as error:
            return _ledger_refusal(error)
        if isinstance(token, Refusal):
            self.ledger.noise(token.code, now=now)
            return token
        app = self.policy.apps.get(token.app)
        if app is None:
            sentence = f"App {token.app} has a token but no policy: write policies/apps/{token.app}.yaml (gateway init shows one)."
            return Refusal("app_unknown", sentence)
        if isinstance(endpoint, Refusal):
            return self._refused(app, token, "unknown", endpoint, now)
        if endpoint == "me":
            return await self._me(app, now)
        return Arrived(app, token, endpoint, self.policy)

    async def _token(self, headers: tuple[tuple[str, str], ...], now: float) -> Token | Refusal:
        secret = identity.credential(headers)
        if isinstance(secret, Refusal):
            return secret
        token = await self.ledger.token(identity.digest(secret))
        if token is None:
            return Refusal("token_unknown", f"No app has this token: it was issued for another gateway or ledger. {identity.ISSUE}.")
        if code := token.refusal(now):
            word = "revoked" if code == "token_revoked" else "expired"
            return Refusal(code, f"Token {token.label or token.id} of app {token.app} is {word}. {identity.ISSUE}.")
        return token

    # -- admit

    async def admit(self, arrived: Arrived, request: Request, now: float) -> Ticket | Pass | Answer | Refusal:
        """Judge a request by its policy and reserve what it can cost. On return the reservation is durable."""
        app = arrived.app
        read = reading.read(arrived.endpoint, request)
        if isinstance(read, Refusal):
            return self._refused(app, arrived.token, arrived.endpoint, read, now)
        call = _call(arrived, read, request)
        flags: tuple[str, ...] = ()
        body: bytes | None = None
        if changes := edits(app, read):
            request, read = reading.edited(arrived.endpoint, request, changes)
            if isinstance(read, Refusal):
                return self._refused(app, arrived.token, arrived.endpoint, read, now)
            flags, body = tuple(f"edited:{name}" for name in changes), request.body
        refusal = judge(app, read, arrived.policy.prices)
        if refusal is not None and app.mode == "observe":
            flags, refusal = (*flags, f"observed:{refusal.code}"), None
        if refusal is None and read.endpoint != "messages":
            return Pass(arrived, call, body)
        try:
            decision = refusal or await self._reserve(arrived, read, call, now)
        except LedgerUnavailable as error:
            decision = _ledger_refusal(error)
        if isinstance(decision, Refusal):
            self.ledger.refused(call, decision.code, now=now)
            return decision
        return replace(decision, flags=(*flags, *decision.flags), body=body)

    async def _reserve(self, arrived: Arrived, read: Reading, call: NewCall, now: float) -> Ticket | Refusal:
        app, limits = arrived.app, caps(arrived.policy, arrived.app)
        bound = quote(read, app, arrived.policy.prices, now)
        if isinstance(bound, Refusal):
            return bound
        call = replace(call, input_tokens=bound.input_tokens, quote_nano=bound.total_nano)
        overrun = read.model in await self.ledger.overruns()
        whole, steps = Plan(read.max_tokens, None), _steps(bound, app, arrived.policy, read, overrun=overrun, now=now)
        plan = whole if steps is None or (app.reserve == "auto" and _comfortable(bound, app, limits)) else steps
        result, plan = await self._hold(arrived, call, bound, plan, limits, now), plan
        if isinstance(result, Denied) and plan is whole and steps is not None:
            result, plan = await self._hold(arrived, call, bound, steps, limits, now), steps
        flags: tuple[str, ...] = ()
        if isinstance(result, Denied | Refusal) and app.mode == "observe":
            flags = (f"observed:{result.code if isinstance(result, Refusal) else result.reason}",)
            shared = tuple(cap for cap in limits if not cap.scope.startswith("app:"))
            result = await self._wait_in_line(arrived, call, bound, plan, shared, now)
        if isinstance(result, Denied):
            return denied(result, app, bound, bound.for_output(plan.granted_tokens))
        if isinstance(result, Refusal):
            return result
        prices = arrived.policy.prices
        return Ticket(result.call_id, app, prices, read, bound, plan.granted_tokens, plan.pace, now, result.standings, flags)

    async def _hold(
        self, arrived: Arrived, call: NewCall, bound: Quote, plan: Plan, limits: tuple[Cap, ...], now: float
    ) -> Reserved | Denied | Refusal:
        request_cap = arrived.app.caps.get("request")
        if request_cap is not None and bound.for_output(plan.granted_tokens) > request_cap:
            return over_request_cap(arrived.app, bound, request_cap)
        return await self._wait_in_line(arrived, call, bound, plan, limits, now)

    async def _wait_in_line(
        self, arrived: Arrived, call: NewCall, bound: Quote, plan: Plan, limits: tuple[Cap, ...], now: float
    ) -> Reserved | Denied:
        """Reserve; where the budget is only held by calls in flight, wait in line for their settlements, and try once more at the end.

        A line per cap: first come, first served among this process's callers. Newcomers do not overtake whoever waits.
        """

        async def attempt(waited_s: float) -> Reserved | Denied:
            rates = arrived.app.rates
            return await self.ledger.reserve(
                call,
                bound.for_output(plan.granted_tokens),
                limits,
                quantum_nano=plan.quantum_nano,
                rates=RateLimits(rates.requests_per_minute, rates.input_tokens_per_minute, rates.concurrent),
                now=now + waited_s,
            )

        lines = [self._doors[scope] for scope in call.scopes if scope in self._doors]
        if not any(line.locked() for line in lines):
            result = await attempt(0.0)
            if isinstance(result, Reserved) or result.reason != "cap_held" or result.standing is None:
                return result
            line = self._doors.setdefault(result.standing.scope, asyncio.Lock())
        else:
            line = next(line for line in lines if line.locked())
        loop = asyncio.get_running_loop()
        began = loop.time()
        with suppress(TimeoutError):
            async with asyncio.timeout(HELD_WAIT_S), line:
                while True:
                    result = await attempt(loop.time() - began)
                    if isinstance(result, Reserved) or result.reason != "cap_held":
                        return result
                    await self._next_settlement()
        return await attempt(loop.time() - began)

    async def _next_settlement(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), HELD_POLL_S)

    # -- running

    def run(self, ticket: Ticket) -> Running:
        """Start to account for an admitted call."""
        running = Running(ticket)
        self._running.add(running)
        return running

    def progressed(self, running: Running, now: float) -> None:
        """A running answer showed more: give back the input's surplus once it is known, and ask for output before it runs out."""
        back_nano = running.release_nano()
        if back_nano:
            self._later(self.ledger.release(running.ticket.call_id, back_nano, now=now))
        if running.runs_short(now):
            self._hurry.set()

    def start(self) -> None:
        """Begin to top running streams up, in the running loop."""
        self._top_ups = asyncio.ensure_future(self._keep_topping_up())

    async def stop(self) -> None:
        """Write what is waiting and let the ledger go."""
        if self._top_ups is not None:
            self._top_ups.cancel()
        await self.ledger.close()

    async def _keep_topping_up(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), TICK_S)
            self._hurry.clear()
            try:
                await self.top_up(self._clock())
            except LedgerUnavailable as error:
                logger.warning("Running streams could not be topped up: %s", error)
            except Exception:
                logger.exception("Topping up failed; running streams are cut where their grants end.")
            await asyncio.sleep(TICK_S / 4)  # however great the hurry: a few writes a second, not one per delta

    async def top_up(self, now: float) -> None:
        """Ask for more output for every running stream that will need it, in one ledger write. Raises LedgerUnavailable."""
        short = [(running, tokens) for running in self._running if (tokens := running.wanted_tokens(now))]
        wanted = [(running, tokens, nano) for running, tokens in short if (nano := running.extension_nano(tokens)) <= _room_nano(running)]
        if not wanted:
            return
        granted = await self.ledger.extend([(running.ticket.call_id, nano) for running, _, nano in wanted], now=now)
        for (running, tokens, _), ok in zip(wanted, granted, strict=True):
            if ok:
                running.granted_tokens += tokens

    def cut_refusal(self, running: Running) -> Refusal:
        """Why the gateway ends a running call, for a client that has no answer yet."""
        return Refusal("cap_spent", cut_sentence(running))

    def last_words(self, running: Running) -> bytes:
        """The same as the last event of a stream (an `error` event may come at any point of one)."""
        refusal = self.cut_refusal(running)
        error = {"type": "error", "error": {"type": refusal.error_type, "message": refusal.sentence}}
        return f"event: error\ndata: {json.dumps(error)}\n\n".encode()

    # -- close

    def close(self, running: Running, *, sent: bool, ended_by: EndedBy, now: float) -> None:
        """Resolve an ended call's reservation. Written for certain, though perhaps after the client has its answer."""
        self._running.discard(running)
        call_id = running.ticket.call_id
        result = settle(running, sent=sent, ended_by=ended_by)
        if isinstance(result, Void):
            self._later(self.ledger.void(call_id, result.outcome, now=now))
        else:
            self._later(self.ledger.settle(call_id, result, now=now))

    def close_free(self, free: Pass, status: int | None, now: float) -> None:
        """Keep a row of a call that cost nothing."""
        self.ledger.free(free.call, Outcome(status=status, complete=status is not None), now=now)

    def _later(self, written: "asyncio.Future[Any]") -> None:
        """Let whoever waits at the door look again once a settlement is written."""
        written.add_done_callback(self._wake)

    def _wake(self, written: "asyncio.Future[Any]") -> None:
        if not written.cancelled() and written.exception() is not None:
            logger.error("The ledger could not write a settlement: %s", written.exception())
        self._settled.set()
        self._settled = asyncio.Event()

    # -- answers of the gateway's own

    def _refused(self, app: AppPolicy, token: Token, endpoint: str, refusal: Refusal, now: float) -> Refusal:
        self.ledger.refused(NewCall(app.name, app.team, token.id, endpoint), refusal.code, now=now)
        return refusal

    def _health(self) -> dict[str, Any]:
        health: dict[str, Any] = {"status": "ok", "policy": self.policy.digest[:12], "apps": len(self.policy.apps)}
        return health if self.policy_problem is None else {**health, "policy_problem": self.policy_problem}

    async def _me(self, app: AppPolicy, now: float) -> Answer | Refusal:
        limits = tuple(cap for cap in caps(self.policy, app) if cap.scope == f"app:{app.name}")
        try:
            standings = await self.ledger.standing([f"app:{app.name}"], limits, now=now)
        except LedgerUnavailable as error:
            return _ledger_refusal(error)
        windows = [_shown(standing) for standing in standings]
        request_cap = app.caps.get("request")
        return Answer({"app": app.name, "models": list(app.models.allow), "request_cap_nano": request_cap, "windows": windows})

    def visible(self, free: Pass, body: bytes) -> bytes:
        """An answer of `GET /v1/models` with only the models that the app may use, in the API's paging shape."""
        if free.arrived.endpoint != "models":
            return body
        page = json.loads(body)
        app, prices = free.arrived.app, free.arrived.policy.prices
        page["data"] = [model for model in page["data"] if may_use(app, model["id"], prices)]
        if page["data"]:
            page["first_id"], page["last_id"] = page["data"][0]["id"], page["data"][-1]["id"]
        return json.dumps(page).encode()

    def upstream_headers(self, arrived: Arrived, status: int, headers: tuple[tuple[str, str], ...], now: float) -> None:
        """Keep what the upstream says of the shared key's limits; say so where it does not take the key."""
        limits = {name: value for name, value in headers if name.startswith("anthropic-ratelimit-")}
        if limits:
            self.ledger.ratelimits(limits, now=now)
        if status in (401, 403) and not arrived.policy.upstream.startswith("http://"):
            source = arrived.policy.key
            logger.error("The Claude API answered %d: does it take the key read from %s %s?", status, source.kind, source.value)

    def cap_headers(self, running: Running | None) -> list[tuple[str, str]]:
        """Where the app's own caps stood when its call was admitted, its reservation included."""
        if running is None:
            return []
        own = [s for s in running.ticket.standings if s.scope.startswith("app:") and s.cap_nano is not None]
        return [(f"x-gateway-cap-{s.window}", _header(s)) for s in own]


def _steps(bound: Quote, app: AppPolicy, policy: GatewayPolicy, read: Reading, *, overrun: bool, now: float) -> Plan | None:
    """How to reserve a stream in steps; None where the call cannot be cut, or must not be trusted to keep its model's pace."""
    row = policy.prices.row(read.model, now)
    if not read.stream or app.reserve == "full" or overrun or row is None:
        return None
    pace = Pace(row.output_tokens_per_second_max, row.lag_s)
    if pace.first_tokens >= read.max_tokens:
        return None
    quantum_nano = bound.for_output(pace.first_tokens + pace.quantum_tokens) - bound.for_output(pace.first_tokens)
    return Plan(pace.first_tokens, pace, quantum_nano)


def _comfortable(bound: Quote, app: AppPolicy, limits: Iterable[Cap]) -> bool:
    """Whether a call's whole quote is small beside each of its caps."""
    smallest_nano = min((cap.amount_nano for cap in limits if cap.window != "request"), default=math.inf)
    return bound.total_nano * COMFORT <= smallest_nano and bound.total_nano <= app.caps.get("request", math.inf)


def _room_nano(running: Running) -> float:
    """What a running stream may still be granted under its request cap."""
    cap_nano = running.ticket.app.caps.get("request")
    return math.inf if cap_nano is None else cap_nano - running.held_nano


def _call(arrived: Arrived, read: Reading, request: Request) -> NewCall:
    """The row of a call that has not been quoted yet, with the labels by which Claude Code names its sessions and agents."""
    session, agent = (next(iter(request.header(f"x-claude-code-{name}-id")), None) for name in ("session", "agent"))
    return NewCall(
        arrived.app.name,
        arrived.app.team,
        arrived.token.id,
        arrived.endpoint,
        read.model or None,
        read.stream,
        read.max_tokens or None,
        session_id=session,
        agent_id=agent,
    )


def _ledger_refusal(error: LedgerUnavailable) -> Refusal:
    logger.error("A call was refused because the ledger cannot be used: %s", error)
    return Refusal("ledger", "The gateway cannot reach its ledger, and does not forward what it cannot book. Try again shortly.", 1)


def _shown(standing: Standing) -> dict[str, Any]:
    """A standing for programs: amounts in nano-dollars and as dollars."""
    free = None if standing.cap_nano is None else max(0, standing.cap_nano - standing.spent_nano - standing.reserved_nano)
    amounts = {"cap": standing.cap_nano, "spent": standing.spent_nano, "held": standing.reserved_nano, "free": free}
    return {
        "window": standing.window,
        "resets_at": standing.resets_at,
        **{f"{name}_nano": nano for name, nano in amounts.items()},
        **{name: None if nano is None else dollars(nano) for name, nano in amounts.items()},
    }


def _header(standing: Standing) -> str:
    cap = dollars(standing.cap_nano or 0)
    reset = "" if standing.resets_at is None else f"; resets={standing.resets_at}"
    return f"spent={dollars(standing.spent_nano)}; held={dollars(standing.reserved_nano)}; cap={cap}{reset}"
