"""The ledger for the gateway: asynchronous, on a store that every gateway of the fleet shares.

Promises that the event loop never waits for a disk or a server, that a reservation is durable before it is answered, and that it is
refused with `LedgerUnavailable` within `timeout_s` where it cannot be written. Settlements, voids and releases are never dropped.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Literal, NamedTuple, Self, cast

from gateway_addon.clocks import monotonic_s
from gateway_addon.ledger import connect, orphans, reservations, state
from gateway_addon.ledger.reports.forecast import Forecast, forecasts
from gateway_addon.ledger.scope import app_scope, enclosing
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.ledger.store.interface import EVERYTHING, Asked, Store
from gateway_addon.ledger.store.writer import Operation, Writer, Written
from gateway_addon.ledger.types import (
    Alert,
    CapShape,
    Denied,
    DueAlert,
    LedgerUnavailable,
    NewCall,
    Outcome,
    Pause,
    RateLimits,
    RecordedEnd,
    Reservation,
    Reserved,
    Resolution,
    ServerAddress,
    Settlement,
    Standing,
    TokenLookup,
)

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
CUT_AHEAD_S = 2.0  # before the lease ends: time for a cut stream to end, and for the clocks of two machines to differ in pace
# On a server the writer's thread lets go of the interpreter at each statement, and must ask a busy event loop to get it back. A file's
# ledger leaves it to Python (5 ms): each time that the loop is made to let go costs more than it gains (16 callers: a fifth more calls).
SWITCH_INTERVAL_S = 0.0001
LINGER_S = 0.01  # how long what nobody waits for (a settlement, a row) waits for a reservation to share its commit
BACKLOG_MAX = 10_000  # rows that only record (refusals, free calls) are let go beyond it; nothing that moves money is
UNSTORABLE = Settlement(cost_nano=None, outcome=Outcome(flags=("estimated", "unstorable")))
FRESH_S = 0.5  # a look at a token: for so long a model that passed a grant in another process may still be held progressively
LOOKED_UP_MAX = 1_000
RESUMED_AT_ONCE = 100  # endings of a dead process in one go: a server's time for it is limited
RESOLVE, EXTEND, RESERVE, RECORD = range(4)  # in a batch, money that comes back goes first and top-ups before admissions

type Change = Callable[[Connection], object]


class _LookedUp(NamedTuple):
    """A look at a token, and when it began (`monotonic_s`)."""

    at: float
    found: TokenLookup


class Ledger:
    """An open ledger. Call `open` in the process that uses it (after a fork) and on the loop that uses it."""

    def __init__(self, place: Path | ServerAddress, store: Store, timeout_s: float) -> None:
        self.place = place
        self._store = store
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._looked_up: dict[str, _LookedUp] = {}
        self._writer = Writer(store, self._deliver)
        self._letting_go = False
        self._lingering: list[Operation] = []
        self._lingers_until_s = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._heartbeat: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, url: str, *, create: bool = False, timeout_s: float = TIMEOUT_S, now: float | None = None) -> Self:
        """Open `sqlite:///PATH` or `postgresql://...`, enter this process as an owner and sweep the dead ones' reservations.

        Only `create` (`gateway init`, `gateway demo`) makes a ledger. Raises LedgerUnavailable; ValueError for another address.
        """
        path = sqlite_files.ledger_path(url)
        if create:
            await asyncio.to_thread(connect.create, path)
        ledger = cls(path, connect.store(path, timeout_s), timeout_s)
        if not ledger._store.near:
            sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        ledger._writer.start()
        try:
            if ledger._store.heartbeat_s:
                await ledger.ready()  # only the server knows which ledger this is, and so which journals are its own
            await ledger._sweep_at_start(time.time() if now is None else now)
            ledger._heartbeat = asyncio.ensure_future(ledger._keep_alive()) if ledger._store.heartbeat_s else None
        except BaseException:
            await ledger.close()
            raise
        return ledger

    async def close(self, timeout_s: float = 5.0) -> None:
        """Write the waiting operations, then close. The next sweep settles the calls that are open then."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._put_lingering()
        ended = await asyncio.to_thread(self._writer.stop, timeout_s)
        await asyncio.sleep(0)  # the last batch's answers
        if not ended:
            kept = self._store.journal
            then = f"writes them from {kept}" if kept is not None else "settles these calls at what they hold"
            log.error("the ledger %s did not take the last settlements; the next start %s", self._store, then)
        await self._store.close()

    @property
    def owner(self) -> str:
        """Return this process's name in the ledger."""
        return self._store.owner

    # money

    async def reserve(
        self,
        call: NewCall,
        grant_nano: int,
        caps: Sequence[CapShape],
        *,
        quantum_nano: int = 0,
        rates: RateLimits | None = None,
        now: float,
    ) -> Reserved | Denied:
        """Hold `grant_nano` for a call, durably, where all caps, rates and pauses allow it. Raises LedgerUnavailable.

        A caller that is cancelled while it waits leaves no reservation behind.
        """
        held = tuple(cap for cap in caps if cap.window != "request")
        asked = Reservation(call, grant_nano, held, quantum_nano, rates or RateLimits(), self._at(now))

        def write(db: Connection) -> Reserved | Denied:  # the owner's name is read when it is written: a fenced node has a new one
            return reservations.write(db, self.owner, asked)

        return cast(Reserved | Denied, await self._ask(RESERVE, write, _touched(call.app, held), asked=asked))

    async def admit_request(self, name: str, per_minute: int, *, now: float) -> Denied | None:
        """Count a request that costs nothing against a rate, over all processes, or return why not. Raises LedgerUnavailable."""
        count = partial(reservations.admit_request, name=name, per_minute=per_minute, now=self._at(now))
        return cast(Denied | None, await self._ask(RECORD, count, frozenset((name,))))

    async def extend(self, top_ups: Sequence[tuple[Reserved, int]], *, now: float) -> list[bool]:
        """Hold so much more for each of these running calls, in one write. Raises LedgerUnavailable."""

        def write(db: Connection) -> list[bool]:
            return [reservations.extend(db, held.call_id, more_nano, held.caps, now=self._at(now)) for held, more_nano in top_ups]

        touched = frozenset[str]().union(*(_touched(held.app, held.caps) for held, _ in top_ups))
        return cast(list[bool], await self._ask(EXTEND, write, touched))

    def release(self, held: Reserved, back_nano: int, *, now: float) -> asyncio.Future[bool]:
        """Give back a part of what a call holds. Count on the smaller amount from here on: the write may follow later."""
        write = partial(reservations.release, call_id=held.call_id, back_nano=back_nano, now=self._at(now))
        return cast("asyncio.Future[bool]", self._lasting(write, _touched(held.app)))

    def settle(self, held: Reserved, settlement: Settlement, *, now: float) -> asyncio.Future[Resolution]:
        """Book what a call cost. Written for certain, though perhaps later; a second resolution of a call changes nothing."""
        return self._end("settle", held, settlement, now)

    def void(self, held: Reserved, outcome: Outcome | None = None, *, now: float) -> asyncio.Future[Resolution]:
        """Give back all that a call holds: the provider did no work. As certain as `settle`."""
        return self._end("void", held, Settlement(0, (), outcome or Outcome()), now)

    def _end(self, kind: Literal["settle", "void"], held: Reserved, settlement: Settlement, now: float) -> asyncio.Future[Resolution]:
        ending = RecordedEnd(kind, held.call_id, held.owner, settlement, self._at(now))
        return cast("asyncio.Future[Resolution]", self._lasting(partial(reservations.end, ending=ending), _touched(held.app), ending))

    def lease_expires(self, held: Reserved) -> bool:
        """Return whether another gateway may soon settle a running call, or has settled it. Never waits for the ledger.

        It may where this gateway's lease is about to end, and did where this gateway is back under a new name.
        """
        return self._store.heartbeat_s is not None and (self._store.lease_left_s < CUT_AHEAD_S or held.owner != self.owner)

    # records

    def refused(self, call: NewCall, code: str, *, said: str | None = None, now: float) -> None:
        """Keep a row for a request that went no further, with the sentence that its caller was told; nobody waits for it."""
        self._record(partial(reservations.refused, owner=self.owner, call=call, code=code, said=said, now=self._at(now)))

    def free(self, call: NewCall, outcome: Outcome, *, now: float) -> None:
        """Keep a row for a forwarded request that costs nothing; nobody waits for it."""
        self._record(partial(reservations.free, owner=self.owner, call=call, outcome=outcome, now=self._at(now)))

    def failed_authentication(self, reason: str, *, now: float) -> None:
        """Count a request without a valid token."""
        self._record(partial(reservations.failed_authentication, reason=reason, now=self._at(now)), "noise")

    def ratelimits(self, headers: Mapping[str, str], *, now: float) -> None:
        """Keep the upstream's latest `anthropic-ratelimit-*` headers."""
        self._record(partial(state.keep_ratelimits, headers=dict(headers), now=now), "ratelimits")

    async def alert_once(self, alert: Alert, *, send: bool, now: float) -> bool:
        """Return True for the first caller, over all processes, with this alert. `send`: keep it until sent.

        Raises LedgerUnavailable.
        """
        return cast(bool, await self._ask(RECORD, partial(state.alert_once, alert=alert, send=send, now=now)))

    async def take_alert(self, *, retry_s: float, give_up_s: float, now: float) -> DueAlert | None:
        """Claim one alert that is due, for this process alone until it is time to retry. Raises LedgerUnavailable."""
        if not await self.look(partial(state.is_alert_due, retry_s=retry_s, now=now)):
            return None
        take = partial(state.take_alert, retry_s=retry_s, give_up_s=give_up_s, now=now)
        return cast(DueAlert | None, await self._ask(RECORD, take, frozenset(("alerts",))))

    def alert_done(self, number: int, delivered_at: float | None) -> None:
        """Note that an alert was delivered (unix seconds), or is given up (None)."""
        self._record(partial(state.alert_done, number=number, delivered_at=delivered_at))

    async def _sweep_at_start(self, now: float) -> None:
        try:
            await self.sweep(now=now)
        except LedgerUnavailable as error:
            if self._store.heartbeat_s is None:
                raise
            log.warning("the calls of processes that died are settled later: %s", error)  # by this process's heartbeat, or another's

    async def sweep(self, *, now: float) -> int:
        """Settle the open calls of dead processes; call it when a worker dies. Raises LedgerUnavailable."""
        await self._resume()
        swept, some = 0, orphans.SWEPT_AT_ONCE
        while some == orphans.SWEPT_AT_ONCE:
            some = cast(int, await self._ask(RESOLVE, partial(self._store.sweep, now=self._at(now)), frozenset((EVERYTHING,))))
            swept += some
        if swept:
            log.warning("%d calls of a process that died were settled at what they held (flagged estimated)", swept)
        return swept

    async def _resume(self) -> None:
        """Write the journals of this machine's dead processes, before their calls are settled at their held amounts."""
        with self._store.unwritten_journals() as journals:
            for left in journals:
                known = 0
                for some in batched(left.endings, RESUMED_AT_ONCE):
                    known += sum(found is not None for found in await asyncio.gather(*(self._resume_one(ending) for ending in some)))
                log.warning("%d of %d calls of a process that died were settled as its journal says", known, len(left.endings))
                left.done(len(left.endings) - known)

    async def _resume_one(self, ending: RecordedEnd) -> object:
        write = partial(orphans.resume, ending=ending)
        instead = partial(orphans.resume, ending=replace(ending, settlement=UNSTORABLE))
        return await self._ask(RESOLVE, write, frozenset((EVERYTHING,)), instead)

    async def change[T](self, write: Callable[[Connection], T]) -> T:
        """Run a change of `ledger.admin` in a transaction of its own. Raises the change's own error, or LedgerUnavailable."""
        return cast(T, await self._ask(RECORD, write, frozenset((EVERYTHING,))))

    async def write[T](self, write: Callable[[Connection], T], *scopes: str) -> T:
        """Run a small change of another ledger module, alone in these scopes. Raises LedgerUnavailable."""
        return cast(T, await self._ask(RECORD, write, frozenset(scopes)))

    def keep[T](self, write: Callable[[Connection], T], *scopes: str) -> "asyncio.Future[T]":
        """Run a small change like `write`, but as certain as a settlement: perhaps later, never dropped."""
        return cast("asyncio.Future[T]", self._lasting(write, frozenset(scopes)))

    async def ready(self) -> None:
        """Return once the ledger has taken a write. Raises LedgerUnavailable."""
        await self._ask(RECORD, lambda db: None)

    # reads, on the request's path

    async def look_up_token(self, digest: str, *, now: float, judged_again: bool = False) -> TokenLookup:
        """Look up the token with this SHA-256 (hexadecimal), the pauses and the overruns. Raises LedgerUnavailable.

        `judged_again`: nothing is forwarded before a reservation has judged the token and the pauses once more, so a look that was made
        a moment ago will do. A session is looked up each time: a reservation does not know which one it is for.
        """
        if judged_again and (seen := self._looked_up.get(digest)) is not None and monotonic_s() - seen.at < FRESH_S:
            return seen.found
        at = monotonic_s()
        found = await self.look(partial(state.look_up_token, digest=digest, now=self._at(now)))
        token = found.token
        if token is not None and token.rule is None and token.refusal(now) is None:
            if len(self._looked_up) >= LOOKED_UP_MAX:
                self._looked_up.clear()
            self._looked_up[digest] = _LookedUp(at, replace(found, pauses=()))  # a pause that ends is over at the next call too
        return found

    async def standing(self, scopes: Iterable[str], caps: Sequence[CapShape], *, now: float) -> tuple[Standing, ...]:
        """Return the standing of each scope in each window, with its cap among `caps`. Raises LedgerUnavailable."""
        return await self.look(partial(reservations.standing, scopes=scopes, caps=caps, now=self._at(now)))

    async def capped(self, caps: Sequence[CapShape], *, now: float) -> tuple[Standing, ...]:
        """Return the standing of each of these caps. Raises LedgerUnavailable."""
        return await self.look(partial(reservations.capped, caps=caps, now=self._at(now)))

    async def observed(self, call: NewCall, caps: Sequence[CapShape], *, now: float) -> tuple[Standing, ...]:
        """Return the standing of each cap that a call is only observed by, where it would count now. Raises LedgerUnavailable."""
        return await self.look(partial(reservations.observed, call=call, caps=caps, now=self._at(now)))

    async def counted_now(self, call: NewCall, caps: Sequence[CapShape], *, now: float) -> NewCall:
        """Return a call with the names under which its parts would count if it came now. Raises LedgerUnavailable."""
        return await self.look(partial(reservations.counted_now, call=call, caps=caps, now=self._at(now)))

    async def forecasts(self, standings: Sequence[Standing], *, now: float) -> tuple[Forecast, ...]:
        """Return the forecast of each standing. Raises LedgerUnavailable."""
        return await self.look(partial(forecasts, standings=standings, now=self._at(now)))

    async def pauses(self, *, now: float) -> tuple[Pause, ...]:
        """Return the pauses in force. Raises LedgerUnavailable."""
        return await self.look(partial(state.pauses, now=self._at(now)))

    async def overruns(self) -> frozenset[str]:
        """Return the models that passed a grant and are reserved in full until cleared. Raises LedgerUnavailable."""
        return await self.look(state.overruns)

    async def upstream_limits(self) -> dict[str, tuple[str, float]]:
        """Return the upstream's latest rate-limit headers, each with its time. Raises LedgerUnavailable."""
        return await self.look(state.ratelimits)

    async def look[T](self, read: Callable[[Connection], T]) -> T:
        """Run a read of `ledger.batches` or `ledger.ownership`. Raises LedgerUnavailable."""
        return await self._store.read(read)

    async def others(self) -> list[str]:
        """Return the other processes that use this ledger now, by name. Raises LedgerUnavailable."""

        def living(db: Connection) -> list[str]:
            return sorted({*orphans.known(db)} - {*self._store.dead(db), self.owner})

        return await self.look(living)

    def _at(self, now: float) -> float:
        """Return the ledger's time: the server's clock, not each machine's, decides which day a call belongs to."""
        return now + self._store.skew_s

    async def _keep_alive(self) -> None:
        """Renew this process's lease again and again, and settle the open calls of dead processes."""
        while True:
            await asyncio.sleep(self._store.heartbeat_s or 0)
            try:
                if await self._ask(RECORD, self._store.dead):
                    await self.sweep(now=time.time())
            except LedgerUnavailable as error:
                log.debug("no sign of life could be given: %s", error)

    # the way to the writer and back

    async def _ask(
        self, rank: int, apply: Change, scopes: frozenset[str] = frozenset(), instead: Change | None = None, asked: Asked | None = None
    ) -> object:
        future: asyncio.Future[object] = self._loop.create_future()
        emit = partial(self._set_answer, future)
        self._put_lingering()
        self._writer.put(Operation(apply, rank, scopes, asked, instead=instead, wanted=lambda: not future.done(), emit=emit))
        too_late = self._loop.call_later(self._timeout_s, self._give_up, future)
        try:
            return await future
        except asyncio.CancelledError:
            self._undo_unreceived(future)
            raise
        finally:
            too_late.cancel()

    def _give_up(self, future: asyncio.Future[object]) -> None:
        if not future.done():
            sentence = f"the ledger {self._store} did not answer within {self._timeout_s:g} s: it is slow or another process holds it"
            future.set_exception(LedgerUnavailable(sentence))

    def _undo_unreceived(self, future: asyncio.Future[object]) -> None:
        """Undo an answer whose caller was cancelled in the instant in which it came."""
        if future.done() and not future.cancelled() and future.exception() is None:
            self._give_back(future.result())

    def _lasting(self, apply: Change, scopes: frozenset[str], record: RecordedEnd | None = None) -> asyncio.Future[object]:
        future: asyncio.Future[object] = self._loop.create_future()
        instead = partial(_end_unstorable, ending=record) if record and record.kind == "settle" else None
        emit = partial(self._set_answer, future)
        self._put_soon(Operation(apply, RESOLVE, scopes, record, lasting=True, instead=instead, record=record, emit=emit))
        return future

    def _record(self, apply: Change, *scopes: str) -> None:
        full = self._writer.waiting + len(self._lingering) >= BACKLOG_MAX
        if full and not self._letting_go:
            log.error("the ledger %s is behind: refused and free calls are not recorded until it catches up", self._store)
        self._letting_go = full
        if not full:
            self._put_soon(Operation(apply, RECORD, frozenset(scopes)))

    def _put_soon(self, operation: Operation) -> None:
        """Hand over what nobody waits for together with the next operation that somebody does: the thread wakes and commits once for both.

        Where none comes, it goes by itself when it has lingered for `LINGER_S`.
        """
        if not self._lingering:
            self._lingers_until_s = self._loop.time() + LINGER_S
        self._lingering.append(operation)
        if self._alarm is None:
            self._alarm = self._loop.call_at(self._lingers_until_s, self._on_alarm)

    def _on_alarm(self) -> None:
        """Hand over what has lingered. Calls in quick succession keep one alarm going, and each of them none of its own."""
        self._alarm = None
        if self._lingering and self._loop.time() < self._lingers_until_s:
            self._alarm = self._loop.call_at(self._lingers_until_s, self._on_alarm)
        else:
            self._put_lingering()

    def _put_lingering(self) -> None:
        for operation in self._lingering:
            self._writer.put(operation)
        self._lingering.clear()

    def _deliver(self, answers: Sequence[Written]) -> None:
        """Bring a batch's answers to the loop, on the writer's thread."""
        try:
            self._loop.call_soon_threadsafe(_emit, answers)
        except RuntimeError:
            log.debug("the loop ended before %d answers of the ledger", len(answers))

    def _set_answer(self, future: asyncio.Future[object], answer: object) -> None:
        if future.done():
            self._give_back(answer)
        elif isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            if isinstance(answer, Resolution) and answer.overrun:
                self._looked_up.clear()  # this process holds the model in full from its next call on
            future.set_result(answer)

    def _give_back(self, answer: object) -> None:
        """Void a reservation that no caller received: its request was never forwarded."""
        if isinstance(answer, Reserved):
            self.void(answer, Outcome(flags=("abandoned",)), now=time.time())


def _touched(app: str, caps: Sequence[CapShape] = ()) -> frozenset[str]:
    """Return the scopes that a write changes. A resolution judges nothing, so the app's balance is enough."""
    return frozenset((app_scope(app), *(enclosing(cap.scope) for cap in caps)))


def _end_unstorable(db: Connection, ending: RecordedEnd) -> Resolution:
    return reservations.end(db, replace(ending, settlement=UNSTORABLE))


def _emit(answers: Sequence[Written]) -> None:
    for answer in answers:
        answer.operation.emit(answer.value)
