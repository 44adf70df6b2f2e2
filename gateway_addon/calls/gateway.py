"""Authenticate, admit, account for and close each call: the gateway's business, in the order in which it happens.

Promises that nothing is permitted without a token, a policy that allows it, and a reservation that every cap allows; and that
each reservation is resolved once, however its call ends. Any doubt is a refusal. Knows nothing of mitmproxy, SQL or YAML: it
takes values, awaits the ledger, and returns values.

    authenticate  the headers are here  who calls, and is there such an endpoint?
    admit         the body is here      policy > quote > reservation; a budget that is only *held* is waited for
    run           the answer streams    input released when its tokens are known, output topped up before it is generated
    close         the call has ended    priced and settled, or voided (settlement.py)

Batches and files are admitted by workspace.py.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from gateway_addon.calls import alerts, exchange, own_endpoints
from gateway_addon.calls.admission import Admission, Caller, EndedBy, Hold, ResponseHook, new_call
from gateway_addon.calls.authentication import Headers, Rejected, authenticate
from gateway_addon.calls.exchange import ExchangeRequest, assertion_of
from gateway_addon.calls.identities import WorkloadIdentities
from gateway_addon.calls.judging import Judgement, judge_request
from gateway_addon.calls.judging_process import JudgingProcess
from gateway_addon.calls.planning import plan
from gateway_addon.calls.queue import BudgetQueue
from gateway_addon.calls.quote import Quote
from gateway_addon.calls.record import Measures, OnCall, Scrape, record
from gateway_addon.calls.refusal_messages import denied, rate_reached, throttled
from gateway_addon.calls.reservation_options import ReservationPlan
from gateway_addon.calls.responses import OwnResponse, visible_models
from gateway_addon.calls.running import InFlightCall
from gateway_addon.calls.settlement import drifted, settle
from gateway_addon.calls.top_ups import RunningStreams
from gateway_addon.calls.workspace import Workspace
from gateway_addon.clocks import SYSTEM, Clocks
from gateway_addon.identity.client_address import origin
from gateway_addon.identity.key_cache import IssuerKeys, no_keys
from gateway_addon.identity.throttle import FailedAuthenticationThrottle
from gateway_addon.ledger import (
    Alert,
    Denied,
    Ledger,
    LedgerUnavailable,
    NewCall,
    Outcome,
    Reserved,
    Resolution,
    Settlement,
    Token,
)
from gateway_addon.ledger.batches import Batch, SettledBatch
from gateway_addon.messages import wrong_paths
from gateway_addon.messages.request import ParsedRequest, Request, endpoint_of
from gateway_addon.money import dollars
from gateway_addon.names import safe_name
from gateway_addon.policy import AppPolicy, GatewayPolicy, still_kept
from gateway_addon.refusals import ABOUT_LIMITS, Refusal

logger = logging.getLogger(__name__)

LIMITS_EVERY_S = 1.0  # the shared key's limits are written at most once in this time, however many answers carry them
READY_FOR_S = 1.0
# A body that arrives later than this after its headers has the overruns looked up again; the look itself may be half a second old.
OVERRUNS_FRESH_S = 0.5
BROWSER = Refusal(
    "browser",
    "OPTIONS is how a browser asks whether a page may call this gateway, and it may not: anybody who opens a page can read the token in "
    "it and spend this app's money. Call the gateway from a server of your own, and let the page call that.",
)
SMALL_BODY = 1_000_000  # bytes; a body up to this is always taken: most are smaller, and a thousand of them fit


def log_alert(alert: Alert) -> None:
    """Write an alert to the log alone."""
    logger.warning("%s", alert.sentence)


class Gateway:
    """Admit and account for the calls of one process.

    A reload replaces `policy` whole; a call in flight keeps the policy that it was authenticated under.
    """

    def __init__(
        self, ledger: Ledger, policy: GatewayPolicy, clocks: Clocks = SYSTEM, emit: Callable[[Alert], None] | None = None,
        endpoint_prefix: str = "", on_call: OnCall | None = None, issuer_keys: IssuerKeys | None = None,
    ):  # fmt: skip
        """Take the ledger and the policy in force.

        `clocks` time the waiting; each method that concerns windows or rows is given its `now` (unix seconds).
        `emit` delivers an alert, and never waits; without it alerts go to the log.
        `on_call` is called with the record of each call, once its cost is written.
        `issuer_keys` has the keys of the policy's issuers; without it no identity token can be verified.
        `endpoint_prefix` stands before the endpoint in each call's row, where a ledger has several gateways.
        """
        self._endpoint_prefix = endpoint_prefix
        self.on_call = on_call
        self.ledger = ledger
        self._clocks = clocks
        self.policy = policy
        self.policy_problem: str | None = None
        """Why the files on disk are not in force, after a reload that failed."""
        self.key_problem: str | None = None
        self.streams = RunningStreams(ledger, clocks, self._judged)
        self.measures = Measures()
        self.scrape: Scrape | None = None
        """The metrics page; None: the policy names no token for it."""
        self._queue = BudgetQueue(ledger)
        self.emit = log_alert if emit is None else emit
        self._judging = JudgingProcess()
        self.workspace = Workspace(ledger, self._queue, clocks.now, self.batch_closed, self._resolve, self._judging)
        self._limits_monotonic_s = -math.inf
        self._throttle = FailedAuthenticationThrottle()
        self.identities = WorkloadIdentities(ledger, issuer_keys or IssuerKeys(no_keys, clocks.monotonic_s))
        self.issuer_problem: str | None = None
        """Which issuers' keys cannot be fetched."""
        self._ready_monotonic_s = -math.inf

    # -- authenticate

    async def authenticate(
        self, method: str, target: str, headers: Headers, peer: str, now: float, digest: str | None = None,
        base_url: Callable[[], str] = str,
    ) -> Caller | ExchangeRequest | OwnResponse | Refusal:  # fmt: skip
        """Find out who calls which endpoint, from the headers alone. `headers` have lower-case names; `peer` is an IP address.

        `digest`: the digest of the token that a replayed request first came with; that token must be in force now.
        `base_url` returns where the client reaches this gateway, "" where that is not known.
        """
        endpoint = endpoint_of(method, target)
        if endpoint == "hello":
            return OwnResponse(None)
        if endpoint == "healthz":
            problems = {"policy_problem": self.policy_problem, "key_problem": self.key_problem, "issuer_problem": self.issuer_problem}
            return own_endpoints.health(self.policy, problems)
        address = origin(peer, headers, self.policy.trusted_proxies)
        if endpoint == "exchange":
            return ExchangeRequest(address, self.policy)
        named = "unknown" if isinstance(endpoint, Refusal) else endpoint
        look_up = partial(self.ledger.look_up_token, now=now, judged_again=named == "messages")
        try:
            if endpoint == "readyz":
                return await self._readiness()
            if endpoint == "metrics":
                page = await own_endpoints.metrics(
                    self.scrape, self.ledger, self.policy, self.policy_problem is not None, headers, now
                )  # fmt: skip
                return self._rejected(page, address, named, now) if isinstance(page, Rejected) else page
            caller = (
                Rejected(BROWSER)
                if method == "OPTIONS"
                else await authenticate(headers, digest, address, named, self.policy, look_up, self.identities.digest, now)
            )
            if named in ("me", "usage") and isinstance(caller, Caller):
                return await own_endpoints.standing(self.ledger, self.policy, caller.app, caller.token, named, target, now)
        except LedgerUnavailable as error:
            return _ledger_refusal(error)
        if isinstance(caller, Rejected):
            return self._rejected(caller, address, named, now)
        if isinstance(endpoint, Refusal):
            better = wrong_paths.refusal(method, target, base_url())
            return self._refused(caller.app, caller.token, named, better or endpoint, now)
        return caller

    def _rejected(self, caller: Rejected, address: str, endpoint: str, now: float) -> Refusal:
        """Record a caller that is refused: in a row of its app where that is known, else in a count."""
        if caller.token is None:
            monotonic_s = self._clocks.monotonic_s()
            is_callers = caller.refusal.code != "identity_unavailable"
            refusal = throttled(address, monotonic_s) if is_callers and self._throttle.too_much(address, monotonic_s) else caller.refusal
            self.ledger.failed_authentication(refusal.code, now=now)
            return refusal
        if caller.app is None:
            return caller.refusal
        return self._refused(caller.app, caller.token, endpoint, caller.refusal, now)

    async def exchange(self, asked: ExchangeRequest, body: bytes, content_type: str, now: float) -> OwnResponse:
        """Exchange the identity token in a body for a session. A refused one counts like any other attempt to get in."""
        token = assertion_of(body, content_type)
        try:
            session = token if isinstance(token, Refusal) else await self.identities.session(token, asked.policy.trust, now)
        except LedgerUnavailable as error:
            return exchange.refused(_ledger_refusal(error))
        if isinstance(session, Refusal):
            return exchange.refused(self._rejected(Rejected(session), asked.address, "exchange", now))
        return exchange.granted(*session)

    # -- admit

    async def admit(self, caller: Caller, request: Request, now: float) -> Admission | OwnResponse | Refusal:
        """Judge a request by its policy, and reserve what it can cost. On return the reservation is durable."""
        app, prices, endpoint = caller.app, caller.policy.prices, caller.endpoint
        if caller.token.labels:
            request = replace(request, fixed_labels=caller.token.labels)
        judged = await self._judging.judge(
            endpoint, request.body, judge_request, app, prices, endpoint, request, caller.overruns, now
        )  # fmt: skip
        if isinstance(judged, Refusal):
            return self._refused(app, caller.token, endpoint, judged, now)
        verdict = judged.verdict
        call = new_call(caller, judged, request, self._endpoint_prefix)
        try:
            decision = verdict if isinstance(verdict, Refusal) else await self._decide(caller, judged, request, call, verdict, now)
        except LedgerUnavailable as error:
            decision = _ledger_refusal(error)
        if isinstance(decision, Refusal):
            self._record_refusal(call, decision, now)
        return decision

    async def _decide(
        self, caller: Caller, judged: Judgement, request: Request, call: NewCall, quote: Quote | None, now: float
    ) -> Admission | OwnResponse | Refusal:
        """Reserve for a request that the policy allows, or let it pass as one that costs nothing. Raises LedgerUnavailable."""
        app, parsed, flags, hold, response_hook = caller.app, judged.parsed, judged.flags, None, ResponseHook()
        if parsed.shared:
            return await self.workspace.admit(caller, judged, request, call, now)
        if (foreign := await self.workspace.foreign_file(app, parsed.found.files)) is not None:
            return foreign
        if quote is not None:
            reserved = await self._reserve(caller, parsed, call, quote, now)
            if isinstance(reserved, Refusal):
                return reserved
            hold, passed = reserved
            flags += passed
        elif parsed.endpoint == "models":
            response_hook = ResponseHook(whole=partial(_visible, caller))
        elif parsed.endpoint == "count_tokens" and (denial := await self._too_many_counts(app, now)) is not None:
            if not app.observes("rates"):
                return rate_reached(denial, app)
            flags += ("observed:rate",)
        return Admission(caller, call, parsed, now, flags, judged.body, judged.edited, hold, response_hook)

    async def _too_many_counts(self, app: AppPolicy, now: float) -> Denied | None:
        """Count a request to count_tokens against a rate of its own, as large as the app's: the API also counts these apart."""
        limit = app.rates.requests_per_minute
        denial = None if limit is None else await self.ledger.admit_request(f"{app.name} count_tokens", limit, now=now)
        return denial and replace(denial, limit="requests per minute to count tokens")

    async def _reserve(
        self, caller: Caller, parsed: ParsedRequest, call: NewCall, quote: Quote, now: float
    ) -> tuple[Hold, tuple[str, ...]] | Refusal:
        """Reserve as planned; return also a flag for each rule in observe mode that would have refused."""
        app = caller.app
        began_monotonic_s = self._clocks.monotonic_s()
        attempt = await self._queue.reserve(call, partial(self._plan, caller, call, parsed, quote, now), now, app.rates.wait_s)
        self.measures.on_reservation(self._clocks.monotonic_s() - began_monotonic_s)
        if isinstance(attempt, Refusal):
            return attempt
        result, option, observed = attempt
        if isinstance(result, Denied):
            return denied(result, app, quote, option, caller.policy.zone)
        return Hold(result, quote, option), tuple(f"observed:{code}" for code in observed)

    async def _plan(self, caller: Caller, call: NewCall, parsed: ParsedRequest, quote: Quote, now: float) -> ReservationPlan | Refusal:
        """Plan a quoted call by what the ledger knows at this moment. Raises LedgerUnavailable."""
        upstream_limits = {} if caller.app.rates.headroom_percent is None else await self.ledger.upstream_limits()
        known = caller.overruns if 0 <= self._clocks.now() - caller.arrived_at < OVERRUNS_FRESH_S else await self.ledger.overruns()
        return plan(caller.app, caller.policy, call, parsed, quote, upstream_limits, known, now)

    # -- running

    def _judged(self, running: InFlightCall) -> Reserved:
        """Return what a call holds, with the caps that judge its top-ups: those of its admission, but for any that a reload dropped."""
        reserved, admission = running.hold.reserved, running.admission
        if admission.caller.policy is self.policy:
            return reserved
        return replace(reserved, caps=still_kept(self.policy, admission.call, reserved.caps))

    def run(self, admission: Admission, monotonic_s: float) -> InFlightCall | None:
        """Start to account for an admitted call; None where there is nothing to account for."""
        if admission.hold is None:
            return None
        self.measures.on_in_flight(1)
        return InFlightCall(admission, admission.hold, monotonic_s, self.streams.stalled_s(monotonic_s))

    def progressed(self, running: InFlightCall, monotonic_s: float) -> None:
        """Take note of a running answer's progress: release what the input turned out not to need, request output before it runs out."""
        back_nano = running.release_nano()
        if back_nano:
            written = self.ledger.release(running.hold.reserved, back_nano, now=self._clocks.now())
            written.add_done_callback(partial(self._wake, running.admission.call))
        self.streams.hurry_if_short(running, monotonic_s)

    def stop(self) -> None:
        """Stop topping streams up and judging large bodies. The ledger stays open: its opener closes it."""
        self._judging.close()
        self.identities.keys.close()

    # -- close

    def close(self, running: InFlightCall, *, sent: bool, ended_by: EndedBy, now: float) -> None:
        """Resolve an ended call's reservation. Written for certain, though perhaps after the client has its answer."""
        self.measures.on_in_flight(-1)
        monotonic_s = self._clocks.monotonic_s()
        running.ended(monotonic_s, self.streams.stalled_s(monotonic_s))
        end, admission, held = settle(running, sent=sent, ended_by=ended_by), running.admission, running.hold.reserved
        app, model, outcome = admission.app, admission.parsed.model, end.outcome if isinstance(end, Settlement) else end
        self._resolve(held, admission.call, admission.admitted_at, end, now, partial(self._alert_of_overrun, running, outcome, now))
        if (why := running.refused_as_retired()) is not None:
            self.emit(alerts.refused_as_retired(app.name, model, why, held.call_id, now))
        served = outcome.model_served if isinstance(end, Settlement) else None
        if app.served == "exact" and served is not None and drifted(running, served):
            self.emit(alerts.drift(app.name, model, served, held.call_id, now))

    def _resolve(
        self, held: Reserved, call: NewCall, started_at: float, end: Settlement | Outcome, now: float,
        on_resolution: Callable[[Resolution], None] = lambda resolution: None,
    ) -> "asyncio.Future[Resolution]":  # fmt: skip
        """Settle a call, or void it where `end` is an outcome alone. Once that is written: wake the queue, and report the call."""
        if isinstance(end, Settlement):
            written, state, outcome, parts = self.ledger.settle(held, end, now=now), "settled", end.outcome, end.parts
        else:
            written, state, outcome, parts = self.ledger.void(held, end, now=now), "voided", end, ()

        def on_written(written: "asyncio.Future[Resolution]") -> None:
            self._wake(call, written)
            if written.cancelled() or written.exception() is not None:
                return
            resolution = written.result()
            if self.on_call is not None and resolution.first:
                self.on_call(record(
                    call, state, started_at=started_at, ended_at=now, call_id=held.call_id, outcome=outcome, parts=parts,
                    spent_nano=resolution.spent_nano,
                ))  # fmt: skip
            on_resolution(resolution)

        written.add_done_callback(on_written)
        return written

    def batch_closed(self, batch: Batch, end: SettledBatch, resolution: Resolution) -> None:
        """Report a batch that this process has settled. Another process may have admitted it."""
        logger.info("Batch %s of app %s is settled at %s.", batch.id, batch.app, dollars(resolution.spent_nano))
        self._queue.settled(end.call)
        if self.on_call is not None:
            self.on_call(record(
                end.call, "settled", started_at=end.started_at, ended_at=self._clocks.now(), call_id=batch.call_id, outcome=end.outcome,
                parts=end.parts, spent_nano=resolution.spent_nano,
            ))  # fmt: skip
        if resolution.overrun:
            self.emit(alerts.batch_overrun(batch.app, batch.id, batch.call_id, resolution, self._clocks.now()))

    def _alert_of_overrun(self, running: InFlightCall, outcome: Outcome, now: float, resolution: Resolution) -> None:
        app_name, model, call_id = running.admission.app.name, running.admission.parsed.model, running.hold.reserved.call_id
        if resolution.overrun and "late" in outcome.flags:
            self.emit(alerts.late(app_name, model, call_id, resolution, running.stalled_s, now))
        elif resolution.overrun:
            self.emit(alerts.overrun(app_name, model, call_id, resolution, now, in_steps=running.in_steps))

    def close_unmetered(self, admission: Admission, status: int | None, *, sent: bool, ended_by: EndedBy, now: float) -> None:
        """End a call that was forwarded without a hold of its own: call its hook, and write the row of one that cost nothing."""
        if admission.response_hook.ended is not None:
            admission.response_hook.ended(sent, ended_by, status)
        if admission.settled_by_hook:
            return
        outcome = Outcome(status=status, complete=status is not None, flags=admission.flags)
        self.ledger.free(admission.call, outcome, now=now)
        if self.on_call is not None:
            self.on_call(record(admission.call, "free", started_at=admission.admitted_at, ended_at=now, outcome=outcome))

    def _wake(self, call: NewCall, written: "asyncio.Future[Any]") -> None:
        """Wake the calls that wait in this one's scopes, once its settlement or a release is written."""
        if not written.cancelled() and written.exception() is not None:
            logger.error("The ledger could not write a settlement: %s", written.exception())
        self._queue.settled(call)

    # -- refusals, and answers of the gateway's own

    def overloaded(self, caller: Caller, body_bytes: int, held_bytes: Callable[[], int], now: float) -> Refusal | None:
        """Refuse a body for which there is no memory beside those in flight, before it is read or as it grows; small ones always fit.

        `held_bytes` counts what has arrived of all the others; it is called for a large body alone.
        """
        limit = caller.policy.bodies_in_flight
        if body_bytes <= SMALL_BODY or (held := held_bytes()) + body_bytes <= limit:
            return None
        sentence = (
            f"The gateway holds {held:,} bytes of requests in flight and takes {limit:,} at once (bodies_in_flight); "
            f"this one has {body_bytes:,} or more. Send it again in a moment."
        )
        return self._refused(caller.app, caller.token, caller.endpoint, Refusal("crowded", sentence, retry_after_s=1), now)

    def _refused(self, app: AppPolicy, token: Token, endpoint: str, refusal: Refusal, now: float) -> Refusal:
        self._record_refusal(NewCall(app.name, app.team, token.id, self._endpoint_prefix + endpoint), refusal, now)
        return refusal

    def _record_refusal(self, call: NewCall, refusal: Refusal, now: float) -> None:
        code = refusal.code
        self.ledger.refused(call, code, said=refusal.sentence if code in ABOUT_LIMITS else None, now=now)
        if self.on_call is not None:
            self.on_call(record(call, "refused", started_at=now, ended_at=now, refusal=code))

    async def _readiness(self) -> OwnResponse:
        """Tell a load balancer whether calls would be taken: 200 where they would. Asks the ledger at most once a second.

        Raises LedgerUnavailable.
        """
        if self._clocks.monotonic_s() - self._ready_monotonic_s >= READY_FOR_S:
            await self.ledger.ready()
            self._ready_monotonic_s = self._clocks.monotonic_s()
        return OwnResponse({"status": "ready"})

    def upstream_headers(self, caller: Caller, status: int, headers: Headers, now: float) -> None:
        """Record the shared key's limits; emit an alert where the upstream refuses the key, or redirects."""
        monotonic_s = self._clocks.monotonic_s()
        if status == 429 or monotonic_s - self._limits_monotonic_s >= LIMITS_EVERY_S:
            limits = {safe_name(name): safe_name(value) for name, value in headers if name.startswith("anthropic-ratelimit-")}
            if limits:
                self._limits_monotonic_s = monotonic_s
                self.ledger.ratelimits(limits, now=now)
        if status == 401:
            self.emit(alerts.key_refused(caller.policy.key, now))
        elif 300 <= status < 400:
            self.emit(alerts.redirected(caller.policy.upstream, status, now))


async def _visible(caller: Caller, status: int, body: bytes) -> bytes:
    return visible_models(caller.app, caller.policy.prices, body) if status == 200 else body


def _ledger_refusal(error: LedgerUnavailable) -> Refusal:
    logger.error("A call was refused because the ledger cannot be used: %s", error)
    return Refusal("ledger", "The gateway cannot reach its ledger, and does not forward what it cannot book. Try again shortly.", 1)
