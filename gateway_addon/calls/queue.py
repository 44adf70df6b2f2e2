"""Reserve budget for a call at once, or queue the call while calls in flight hold what it needs: budget, or its app's concurrency.

Promises that waiting is bounded and fair within a process (first come, first served, per scope), that no call is refused without a
last attempt, that a call which has waited is planned anew, and that one that is cancelled while it waits leaves nothing behind.
Knows the ledger; no policy.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gateway_addon.calls.planning import RATES, observed_denials
from gateway_addon.calls.reservation_options import ReservationOption, ReservationPlan
from gateway_addon.ledger import TOTAL, Denied, Ledger, NewCall, RateLimits, Reserved, part_scope
from gateway_addon.ledger.parts import OTHERS
from gateway_addon.refusals import Refusal

HELD_WAIT_S = 2.0  # for budget that calls in flight hold
LOOK_S = 0.05  # another process's settlement wakes nobody here, so attempts are repeated, ever more rarely
LOOK_MAX_S = 0.5
EXPECTED_MAX_S = 60  # an SDK sleeps as long as it is told to, and stands in no line meanwhile

type Plan = Callable[[], Awaitable[ReservationPlan | Refusal]]
"""Plans a call by what is known at the moment. May raise LedgerUnavailable."""


def wait_s(denied: Denied, concurrency_wait_s: float) -> float:
    """Return how long a call waits for what it was denied; 0 where no call that ends can bring it."""
    if denied.reason == "concurrency" and denied.limit_max:
        return concurrency_wait_s
    return HELD_WAIT_S if denied.reason == "cap_held" else 0.0


class Attempt(NamedTuple):
    """The ledger's answer to a planned call. `option` is what is held, or the last, smallest one, of which `result` is the denial."""

    result: Reserved | Denied
    option: ReservationOption
    observed: tuple[str, ...]
    """The codes that rules in observe mode would have refused with."""


class BudgetQueue:
    """Queue the calls of one process that wait for budget, in a line for each scope."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._lines: dict[str, _Line] = {}

    async def reserve(self, call: NewCall, plan: Plan, now: float, concurrency_wait_s: float = 0.0) -> Attempt | Refusal:
        """Reserve by the first option of the plan that fits, and wait for what is only held. Raises LedgerUnavailable.

        A new call does not overtake one that waits in one of its scopes. Returns a refusal where the plan is one.
        """
        loop = asyncio.get_running_loop()
        began_s = loop.time()

        async def attempt() -> Attempt | Refusal:
            return await self._attempt(call, plan, now + loop.time() - began_s)

        place = _Place(self._lines, call, began_s, concurrency_wait_s)
        lines = place.occupied()
        if not lines:
            found = await attempt()
            if (hindrance := place.hindrance(found)) is None:
                return found
            lines = place.lines_for(hindrance)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(began_s + max(HELD_WAIT_S, concurrency_wait_s)):
                    return await place.wait(lines, attempt)
            return place.left_with(await attempt())
        finally:
            place.leave()

    async def _attempt(self, call: NewCall, plan: Plan, now: float) -> Attempt | Refusal:
        """Ask the ledger once for each option, the largest first; note what rules in observe mode would have refused.

        Caps in observe mode are left out of the reservation, or a stream's later top-ups would be refused by them.
        """
        asked = await plan()
        if isinstance(asked, Refusal):
            return asked
        own = await self._ledger.observed(call, asked.observed_caps, now=now) if asked.observed_caps else ()
        observed = dict.fromkeys([note.code for note in asked.notes])
        observed |= dict.fromkeys([denied.reason for denied in observed_denials(own, asked.options[-1], now)])
        result, option = await self._first_that_fits(call, asked, asked.rates, now)
        if asked.observes_rates and isinstance(result, Denied) and result.reason in RATES:
            observed[result.reason] = None
            result, option = await self._first_that_fits(call, asked, RateLimits(), now)
        if own and isinstance(result, Reserved):
            result = replace(result, standings=(*result.standings, *own))
        return Attempt(result, option, tuple(observed))

    async def _first_that_fits(
        self, call: NewCall, asked: ReservationPlan, rates: RateLimits, now: float
    ) -> tuple[Reserved | Denied, ReservationOption]:
        for option in asked.options:
            result = await self._ledger.reserve(
                call, option.hold_nano, asked.limits, quantum_nano=option.quantum_nano, rates=rates, now=now
            )
            if isinstance(result, Reserved):
                break
        return result, option

    def settled(self, call: NewCall) -> None:
        """Wake the first calls in the lines of a call's scopes: its settlement, or a release, is written.

        The lines of other parts stay asleep: of a hundred sessions that wait, one has got something back.
        """
        shared = (part_scope(call.app, (kind, OTHERS)) for kind, _ in call.parts)
        for scope in (*call.scopes, *call.part_scopes, *shared) if self._lines else ():
            if (line := self._lines.get(scope)) is not None:
                line.freed.set()


@dataclass(slots=True)
class _Line:
    """The calls of one scope that wait. There is one while any does."""

    began_s: float
    first: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the call whose turn it is."""
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when something of this scope is settled."""
    calls: int = 0
    admitted: int = 0


@dataclass(slots=True)
class _Place:
    """One call's place: in the lines of its scopes from the narrowest on, up to the scope that stands in its way.

    So a call that waits for its app's concurrency is in no other app's way, and all calls take their lines in one order. One that a part
    of its app stands in the way of (its session's cap) is in that part's line alone, and in no other part's way.
    """

    lines: dict[str, _Line]
    call: NewCall
    began_s: float
    concurrency_wait_s: float
    joined: list[str] = field(default_factory=list)

    @property
    def scopes(self) -> tuple[str, ...]:
        return (*self.call.scopes[1:], TOTAL)

    def occupied(self) -> tuple[str, ...]:
        """Return the lines that a new call joins, so as to overtake nobody: at most one of a part, and then none beside it."""
        if not self.lines:  # nearly always
            return ()
        depth = max((number for number, scope in enumerate(self.scopes, 1) if scope in self.lines), default=0)
        return self.scopes[:depth] or tuple(scope for scope in self.call.part_scopes if scope in self.lines)[:1]

    def hindrance(self, found: Attempt | Refusal) -> Denied | None:
        """Return the denial that waiting may turn into a reservation, if it is one."""
        denied = found.result if isinstance(found, Attempt) else None
        return denied if isinstance(denied, Denied) and wait_s(denied, self.concurrency_wait_s) else None

    def lines_for(self, denied: Denied) -> tuple[str, ...]:
        """Return the lines that a call stands in that waits after this denial."""
        scope = self.scopes[0] if denied.standing is None else denied.standing.scope  # concurrency: in the app's line
        return self.scopes[: self.scopes.index(scope) + 1] if scope in self.scopes else (scope,)

    async def wait(self, lines: tuple[str, ...], attempt: Callable[[], Awaitable[Attempt | Refusal]]) -> Attempt | Refusal:
        """Make attempts when it is this call's turn, until one succeeds, waiting does not help, or its time is over."""
        loop, look_s, held_since_s = asyncio.get_running_loop(), LOOK_S, self.began_s
        while True:
            await self._join(lines)
            found = await attempt()
            if (hindrance := self.hindrance(found)) is None:
                return self.left_with(found)
            if hindrance.reason == "concurrency":  # its time in the app's line is no time in which budget was held
                since_s, held_since_s = self.began_s, math.inf
            else:
                since_s = held_since_s = min(held_since_s, loop.time())
            left_s = since_s + wait_s(hindrance, self.concurrency_wait_s) - loop.time()
            if left_s <= 0:
                return self.left_with(found)
            await self._join(lines := self.lines_for(hindrance))
            await self._freed(min(look_s, left_s))
            look_s = min(2 * look_s, LOOK_MAX_S)

    async def _join(self, lines: tuple[str, ...]) -> None:
        """Stand first in these lines; leave the others before."""
        while self.joined and tuple(self.joined) != lines[: len(self.joined)]:
            self._leave_last()
        for scope in lines[len(self.joined) :]:
            line = self.lines.setdefault(scope, _Line(asyncio.get_running_loop().time()))
            line.calls += 1
            try:
                await line.first.acquire()
            except BaseException:
                self._forget(scope)
                raise
            self.joined.append(scope)

    async def _freed(self, most_s: float) -> None:
        """Wait until something is settled in the widest of its scopes, for a while at most."""
        freed = self.lines[self.joined[-1]].freed
        with suppress(TimeoutError):
            await asyncio.wait_for(freed.wait(), most_s)
        freed.clear()

    def left_with(self, found: Attempt | Refusal) -> Attempt | Refusal:
        """Count an admission in the lines; give a denial by concurrency the wait to expect, by how fast its line moves."""
        if not isinstance(found, Attempt):
            return found
        if isinstance(found.result, Reserved):
            for scope in self.joined:
                self.lines[scope].admitted += 1
            return found
        line = self.lines.get(self.scopes[0])
        if found.result.reason != "concurrency" or line is None or not line.admitted:
            return found
        each_s = (asyncio.get_running_loop().time() - line.began_s) / line.admitted
        expected_s = min(math.ceil(max(1, line.calls) * each_s), EXPECTED_MAX_S)
        return found._replace(result=replace(found.result, retry_after_s=expected_s))

    def leave(self) -> None:
        while self.joined:
            self._leave_last()

    def _leave_last(self) -> None:
        scope = self.joined.pop()
        self.lines[scope].first.release()
        self._forget(scope)

    def _forget(self, scope: str) -> None:
        line = self.lines[scope]
        line.calls -= 1
        if not line.calls:
            del self.lines[scope]
