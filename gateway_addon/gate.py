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
import ipaddress
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gateway_addon import alerts, identity, reading
from gateway_addon.answers import Answer, me
from gateway_addon.bounds import Quote, quote
from gateway_addon.calls import Tell, record
from gateway_addon.door import Door, Offer
from gateway_addon.grants import TICK_S, Pace
from gateway_addon.herald import Herald
from gateway_addon.ledger import (
    Alert,
    Denied,
    Ledger,
    LedgerUnavailable,
    NewCall,
    Outcome,
    RateLimits,
    Resolution,
    Settlement,
    Token,
    app_scope,
    scopes,
)
from gateway_addon.noise import Noise
from gateway_addon.policy import AppPolicy, Cap, GatewayPolicy, caps, edits, judge
from gateway_addon.rates import shortage
from gateway_addon.reading import Reading, Request
from gateway_addon.refusals import Refusal
from gateway_addon.running import Running, Ticket
from gateway_addon.sentences import cut_sentence, denied, headroom, noisy, over_request_cap, paused
from gateway_addon.settlement import EndedBy, Void, drifted, settle

logger = logging.getLogger(__name__)

LIMITS_EVERY_S = 1.0  # how often the shared key's limits are written down, however many answers carry them
READY_FOR_S = 1.0
SMALL_BODY = 1_000_000  # bytes; a body up to this is always taken: most are, and a thousand of them are no danger
COMFORT = 50  # `reserve: auto` reserves a stream whole while its quote is at most this part of each of its caps


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
    admitted_at: float
    body: bytes | None = None
    """The body to send where the policy rewrote it, as in `Ticket`."""


class Gate:
    """One process's door. `policy` is replaced whole by a reload; calls in flight keep the one they came under."""

    def __init__(
        self, ledger: Ledger, policy: GatewayPolicy, clock: Callable[[], float], herald: Herald | None = None, entrance: str = "",
        on_call: Tell | None = None,
    ):  # fmt: skip
        """`clock` returns unix seconds; it paces top-ups only, every decision takes its `now` from the caller.

        `on_call` hears of each call once it has ended and what it cost is written.
        `entrance` stands before the endpoint in each call's row: which door it came by, where there are several.
        """
        self._entrance = entrance
        self.on_call = on_call
        self.ledger = ledger
        self._clock = clock
        self.policy = policy
        self.policy_problem: str | None = None
        """Why the files on disk are not in force, after a reload that failed."""
        self._running: dict[Running, Callable[[str], None]] = {}
        self._door = Door(ledger)
        self._herald = herald
        self._entrance = entrance
        self._heralding: asyncio.Task[None] | None = None
        self._limits_at = -math.inf
        self._top_ups: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._noise = Noise()
        self._ready_at = -math.inf

    # -- arrive

    async def arrive(
        self, method: str, target: str, headers: tuple[tuple[str, str], ...], peer: str, now: float, digest: str | None = None
    ) -> Arrived | Answer | Refusal:
        """Find out who calls which endpoint, from the headers alone. `headers` have lower-case names; `peer` is an IP address.

        `digest`: of the token that a replayed request came with the first time; it must be in force now.
        """
        endpoint = reading.endpoint(method, target)
        if endpoint == "hello":
            return Answer(None)
        if endpoint == "healthz":
            return Answer(self._health())
        try:
            if endpoint == "readyz":
                return await self._readiness(now)
            token, pauses = await self._token(headers, digest, now), await self.ledger.pauses(now=now)
        except LedgerUnavailable as error:
            return _ledger_refusal(error)
        if isinstance(token, Refusal):
            noise = noisy(peer, now) if self._noise.too_much(peer, now) else token
            self.ledger.noise(noise.code, now=now)
            return noise
        app = self.policy.apps.get(token.app)
        if app is not None and (pause := next((each for each in pauses if each.scope in scopes(app.name, app.team)), None)):
            return self._refused(app, token, str(endpoint), paused(pause), now)
        if app is None:
            sentence = f"App {token.app} has a token but no policy: write policies/apps/{token.app}.yaml (gateway init shows one)."
            return Refusal("app_unknown", sentence)
        if isinstance(endpoint, Refusal):
            return self._refused(app, token, "unknown", endpoint, now)
        if app.addresses and not any(ipaddress.ip_address(peer) in network for network in app.addresses):
            sentence = f"App {app.name} may not call from {peer} ({app.file}: addresses). Call from another, or add this one there."
            return self._refused(app, token, str(endpoint), Refusal("token_address", sentence), now)
        if endpoint == "me":
            return await self._me(app, now)
        return Arrived(app, token, endpoint, self.policy)

    async def _token(self, headers: tuple[tuple[str, str], ...], digest: str | None, now: float) -> Token | Refusal:
        if digest is None:
            secret = identity.credential(headers)
            if isinstance(secret, Refusal):
                return secret
            digest = identity.digest(secret)
        token = await self.ledger.token(digest)
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
        call = _call(arrived, read, request, self._entrance)
        flags: tuple[str, ...] = ()
        body: bytes | None = None
        if changes := edits(app, read, arrived.policy.prices):
            request, read = reading.edited(arrived.endpoint, request, changes)
            if isinstance(read, Refusal):
                return self._refused(app, arrived.token, arrived.endpoint, read, now)
            flags, body = tuple(f"edited:{name}" for name in changes), request.body
        refusal = judge(app, read, arrived.policy.prices)
        if refusal is not None and app.mode == "observe":
            flags, refusal = (*flags, f"observed:{refusal.code}"), None
        if refusal is None and read.endpoint != "messages":
            return Pass(arrived, call, now, body)
        try:
            decision = refusal or await self._reserve(arrived, read, call, now)
        except LedgerUnavailable as error:
            decision = _ledger_refusal(error)
        if isinstance(decision, Refusal):
            self._turned_away(call, decision.code, now)
            return decision
        return replace(decision, flags=(*flags, *decision.flags), body=body)

    async def _reserve(self, arrived: Arrived, read: Reading, call: NewCall, now: float) -> Ticket | Refusal:
        app, limits = arrived.app, caps(arrived.policy, arrived.app)
        bound = quote(read, app, arrived.policy.prices, now)
        if isinstance(bound, Refusal):
            return bound
        call = replace(call, input_tokens=bound.input_tokens, quote_nano=bound.total_nano)
        if app.rates.headroom_percent is not None:
            short = shortage(await self.ledger.upstream_limits(), app.rates.headroom_percent, now)
            if short is not None and app.mode == "enforce":
                return headroom(app, short)
        overrun = read.model in await self.ledger.overruns()
        offers = _offers(bound, app, arrived.policy, read, limits, overrun=overrun, now=now)
        request_cap = app.caps.get("request", math.inf)
        flags: tuple[str, ...] = ()
        if offers[-1].hold_nano > request_cap:
            if app.mode == "enforce":
                return over_request_cap(app, bound, int(request_cap))
            flags = ("observed:quote_over_cap",)
        else:
            offers = [offer for offer in offers if offer.hold_nano <= request_cap]
        rates = RateLimits(app.rates.requests_per_minute, app.rates.input_tokens_per_minute, app.rates.concurrent)
        result, offer = await self._door.reserve(call, offers, limits, rates, now)
        if isinstance(result, Denied) and app.mode == "observe":  # the caps that it shares with others hold all the same
            flags = (*flags, f"observed:{result.reason}")
            shared = [cap for cap in limits if cap.scope != app_scope(app.name)]
            result, offer = await self._door.reserve(call, offers, shared, RateLimits(), now)
        if isinstance(result, Denied):
            return denied(result, app, bound, offer.hold_nano)
        prices = arrived.policy.prices
        return Ticket(result.call_id, call, app, prices, read, bound, offer.granted_tokens, offer.pace, now, result.standings, flags)

    # -- running

    def run(self, ticket: Ticket, cut: Callable[[str], None]) -> Running:
        """Start to account for an admitted call. `cut` ends it before its time, given the reason (`paused`)."""
        running = Running(ticket)
        self._running[running] = cut
        return running

    def progressed(self, running: Running, now: float) -> None:
        """A running answer showed more: give back the input's surplus once it is known, and ask for output before it runs out."""
        back_nano = running.release_nano()
        if back_nano:
            self._later(self.ledger.release(running.ticket.call_id, back_nano, now=now))
        if running.runs_short(now):
            self._hurry.set()

    def start(self) -> None:
        """Begin to top running streams up and to tell alerts, in the running loop."""
        self._top_ups = asyncio.ensure_future(self._keep_topping_up())
        if self._herald is not None:
            self._heralding = asyncio.ensure_future(self._herald.run(lambda: self.policy))

    async def stop(self) -> None:
        """Write what is waiting and let the ledger go."""
        for task in (self._top_ups, self._heralding):
            if task is not None:
                task.cancel()
        if self._herald is not None:
            await self._herald.stop()
        await self.ledger.close()

    async def _keep_topping_up(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), TICK_S)
            self._hurry.clear()
            try:
                await self.top_up(self._clock())
                await self._cut_paused(self._clock())
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

    async def _cut_paused(self, now: float) -> None:
        """End the running calls of whoever was paused `--now`. Raises LedgerUnavailable."""
        paused_now = {pause.scope for pause in await self.ledger.pauses(now=now) if pause.cut}
        for running, cut in list(self._running.items()) if paused_now else ():
            if paused_now & set(running.ticket.scopes):
                cut("paused")

    def cut_refusal(self, running: Running) -> Refusal:
        """Why the gateway ends a running call."""
        return Refusal("app_paused" if running.cut == "paused" else "cap_spent", cut_sentence(running))

    # -- close

    def close(self, running: Running, *, sent: bool, ended_by: EndedBy, now: float) -> None:
        """Resolve an ended call's reservation. Written for certain, though perhaps after the client has its answer."""
        self._running.pop(running, None)
        call_id = running.ticket.call_id
        result = settle(running, sent=sent, ended_by=ended_by)
        if isinstance(result, Void):
            written = self.ledger.void(call_id, result.outcome, now=now)
            self._later(written)
            written.add_done_callback(partial(self._tell_of, running.ticket, result, now))
            return
        written = self.ledger.settle(call_id, result, now=now)
        self._later(written)
        written.add_done_callback(partial(self._look_for_overrun, running, now))
        written.add_done_callback(partial(self._tell_of, running.ticket, result, now))
        app, served = running.ticket.app, result.outcome.model_served
        if app.served == "exact" and served is not None and drifted(running, served):
            self.tell(alerts.drift(app.name, running.ticket.reading.model, served, call_id, now))

    def _tell_of(self, ticket: Ticket, end: Settlement | Void, now: float, written: "asyncio.Future[Resolution]") -> None:
        if self.on_call is None or written.cancelled() or written.exception() is not None or not written.result().first:
            return
        state, parts = ("settled", end.parts) if isinstance(end, Settlement) else ("voided", ())
        told = record(
            ticket.call, state, started_at=ticket.admitted_at, ended_at=now, call_id=ticket.call_id, outcome=end.outcome, parts=parts,
            spent_nano=written.result().spent_nano,
        )  # fmt: skip
        self.on_call(told)

    def _look_for_overrun(self, running: Running, now: float, written: "asyncio.Future[Resolution]") -> None:
        if not written.cancelled() and written.exception() is None and written.result().overrun:
            ticket = running.ticket
            self.tell(alerts.overrun(ticket.app.name, ticket.reading.model, ticket.call_id, written.result(), now))

    def tell(self, alert: Alert) -> None:
        """Let a person hear of something. Never waits."""
        if self._herald is not None:
            self._herald.tell(alert)
        else:
            logger.warning("%s", alert.sentence)

    def close_free(self, free: Pass, status: int | None, now: float) -> None:
        """Keep a row of a call that cost nothing."""
        outcome = Outcome(status=status, complete=status is not None)
        self.ledger.free(free.call, outcome, now=now)
        if self.on_call is not None:
            self.on_call(record(free.call, "free", started_at=free.admitted_at, ended_at=now, outcome=outcome))

    def _later(self, written: "asyncio.Future[Any]") -> None:
        """Let whoever waits at the door look again once a settlement is written."""
        written.add_done_callback(self._wake)

    def _wake(self, written: "asyncio.Future[Any]") -> None:
        if not written.cancelled() and written.exception() is not None:
            logger.error("The ledger could not write a settlement: %s", written.exception())
        self._door.settled()

    # -- answers of the gateway's own

    def crowded(self, arrived: Arrived, body_bytes: int, held_bytes: int, now: float) -> Refusal | None:
        """A body for which there is no memory beside those held is refused before it is read; small ones always find room."""
        limit = arrived.policy.bodies_in_flight
        if body_bytes <= SMALL_BODY or held_bytes + body_bytes <= limit:
            return None
        sentence = (
            f"The gateway holds {held_bytes:,} bytes of requests in flight and takes {limit:,} at once (bodies_in_flight); "
            f"this one has up to {body_bytes:,}. Send it again in a moment."
        )
        return self._refused(arrived.app, arrived.token, arrived.endpoint, Refusal("crowded", sentence, retry_after_s=1), now)

    def _refused(self, app: AppPolicy, token: Token, endpoint: str, refusal: Refusal, now: float) -> Refusal:
        self._turned_away(NewCall(app.name, app.team, token.id, self._entrance + endpoint), refusal.code, now)
        return refusal

    def _turned_away(self, call: NewCall, code: str, now: float) -> None:
        self.ledger.refused(call, code, now=now)
        if self.on_call is not None:
            self.on_call(record(call, "refused", started_at=now, ended_at=now, refusal=code))

    async def _readiness(self, now: float) -> Answer:
        """For a load balancer: 200 while calls would be taken. Asked at most once a second of the ledger, whoever asks here.

        Raises LedgerUnavailable.
        """
        if not 0 <= now - self._ready_at < READY_FOR_S:
            await self.ledger.ready()
            self._ready_at = now
        return Answer({"status": "ready"})

    def _health(self) -> dict[str, Any]:
        health: dict[str, Any] = {"status": "ok", "policy": self.policy.digest[:12], "apps": len(self.policy.apps)}
        return health if self.policy_problem is None else {**health, "policy_problem": self.policy_problem}

    async def _me(self, app: AppPolicy, now: float) -> Answer | Refusal:
        limits = tuple(cap for cap in caps(self.policy, app) if cap.scope == f"app:{app.name}")
        try:
            standings = await self.ledger.standing([f"app:{app.name}"], limits, now=now)
        except LedgerUnavailable as error:
            return _ledger_refusal(error)
        return me(app, standings)

    def upstream_headers(self, arrived: Arrived, status: int, headers: tuple[tuple[str, str], ...], now: float) -> None:
        """Keep what the upstream says of the shared key's limits; say so where it does not take the key."""
        limits = {name: value for name, value in headers if name.startswith("anthropic-ratelimit-")}
        if limits and (status == 429 or now - self._limits_at >= LIMITS_EVERY_S):
            self._limits_at = now
            self.ledger.ratelimits(limits, now=now)
        if status == 401:
            self.tell(alerts.key_refused(arrived.policy.key, now))


def _offers(
    bound: Quote, app: AppPolicy, policy: GatewayPolicy, read: Reading, limits: Iterable[Cap], *, overrun: bool, now: float
) -> list[Offer]:
    """The ways to reserve a call, the largest first: whole, in steps, or whole while that is little and in steps when it is not.

    Only a stream can be cut, so only a stream can run on less than its whole quote; and only on a model that keeps its pace.
    """
    whole = Offer(read.max_tokens, bound.total_nano)
    row = policy.prices.row(read.model, now)
    if not read.stream or app.reserve == "full" or overrun or row is None:
        return [whole]
    pace = Pace(row.output_tokens_per_second_max, row.lag_s)
    if pace.first_tokens >= read.max_tokens:
        return [whole]
    first_nano = bound.for_output(pace.first_tokens)
    steps = Offer(pace.first_tokens, first_nano, pace, bound.for_output(pace.first_tokens + pace.quantum_tokens) - first_nano)
    smallest_nano = min((cap.amount_nano for cap in limits if cap.window != "request"), default=math.inf)
    comfortable = app.reserve == "auto" and bound.total_nano * COMFORT <= smallest_nano
    return [whole, steps] if comfortable else [steps]


def _room_nano(running: Running) -> float:
    """What a running stream may still be granted under its request cap."""
    cap_nano = running.ticket.app.caps.get("request")
    return math.inf if cap_nano is None else cap_nano - running.held_nano


def _call(arrived: Arrived, read: Reading, request: Request, entrance: str) -> NewCall:
    """The row of a call that has not been quoted yet, with the labels by which Claude Code names its sessions and agents.

    What the client chose freely is masked: a token that was pasted in the wrong place stays out of ledger, log and traces.
    """
    model, session, agent = (
        identity.masked(text) or None
        for text in (read.model, *("".join(request.header(f"x-claude-code-{name}-id")[:1]) for name in ("session", "agent")))
    )
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
    )


def _ledger_refusal(error: LedgerUnavailable) -> Refusal:
    logger.error("A call was refused because the ledger cannot be used: %s", error)
    return Refusal("ledger", "The gateway cannot reach its ledger, and does not forward what it cannot book. Try again shortly.", 1)
