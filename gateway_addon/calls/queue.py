"""Where a call waits for budget: reserve at once, or stand in line while calls in flight hold what is left.

Promises that waiting is bounded and fair within a process (first come, first served, per scope), that nobody is refused
without one last look, and that a caller who leaves while waiting leaves nothing behind. Knows the ledger and offers; no policy.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from gateway_addon.calls.progress import Pace
from gateway_addon.ledger import CapShape, Denied, Ledger, NewCall, RateLimits, Reserved, Standing, app_scope

WAIT_S = 2.0  # for budget that is held, not spent
LOOK_S = 0.05  # another process's settlement makes no sound here


@dataclass(frozen=True, slots=True)
class ReservationOption:
    """One way to reserve a call: whole, or in steps of which this is the first. `pace` None: nothing but its end bounds the call."""

    granted_tokens: int
    hold_nano: int
    pace: Pace | None = None
    quantum_nano: int = 0
    granted_turns: int | None = None
    """None: all that the provider may run."""


class BudgetQueue:
    """One process's door to a ledger."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._lines: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._settled = asyncio.Event()

    async def reserve(
        self, call: NewCall, reservation_options: Sequence[ReservationOption], limits: Sequence[CapShape], rates: RateLimits, now: float
    ) -> tuple[Reserved | Denied, ReservationOption]:
        """Reserve by the first offer that fits; where budget is only held, wait in line for it. Raises LedgerUnavailable.

        Newcomers do not overtake whoever waits in one of their scopes. The denial is that of the last, smallest offer.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def attempt() -> tuple[Reserved | Denied, ReservationOption]:
            for option in reservation_options:
                result = await self._ledger.reserve(
                    call, option.hold_nano, limits, quantum_nano=option.quantum_nano, rates=rates, now=now + loop.time() - began
                )
                if isinstance(result, Reserved):
                    return result, option
            return result, option

        scope = next((scope for scope in call.scopes if scope in self._lines and self._lines[scope].locked()), None)
        if scope is None:
            result, option = await attempt()
            if isinstance(result, Reserved) or result.reason != "cap_held" or result.standing is None:
                return result, option
            scope = result.standing.scope
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S), self._lines[scope]:
                while True:
                    result, option = await attempt()
                    if isinstance(result, Reserved) or result.reason != "cap_held":
                        return result, option
                    await self._next_settlement()
        return await attempt()

    async def observe(
        self,
        call: NewCall,
        reservation_options: Sequence[ReservationOption],
        limits: Sequence[CapShape],
        rates: RateLimits,
        now: float,
        *,
        caps: bool,
        its_rates: bool,
    ) -> tuple[Reserved | Denied, ReservationOption, tuple[str, ...]]:
        """The same where the app's own `caps` or `its_rates` are only observed: also the codes of what they would have said.

        Its own caps are then left out from the first, or a stream's later top-ups would still be judged by them; those that it shares
        hold all the same. Raises LedgerUnavailable.
        """
        own: tuple[Standing, ...] = ()
        if caps:
            own = await self._ledger.capped([cap for cap in limits if cap.scope == app_scope(call.app)], now=now)
            limits = [cap for cap in limits if cap.scope != app_scope(call.app)]
        codes = dict.fromkeys(code for standing in own if (code := _said(standing, reservation_options[-1].hold_nano)) is not None)
        result, option = await self.reserve(call, reservation_options, limits, rates, now)
        if its_rates and isinstance(result, Denied) and result.reason in ("rate", "concurrency"):
            codes[result.reason] = None
            result, option = await self.reserve(call, reservation_options, limits, RateLimits(), now)
        if own and isinstance(result, Reserved):
            result = replace(result, standings=(*result.standings, *own))
        return result, option, tuple(codes)

    def settled(self) -> None:
        """A settlement of this process is written: whoever waits may look again."""
        self._settled.set()
        self._settled = asyncio.Event()

    async def _next_settlement(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), LOOK_S)


def _said(standing: Standing, hold_nano: int) -> str | None:
    """What a cap would have said to a call."""
    cap_nano = standing.cap_nano or 0
    if hold_nano > cap_nano:
        return "quote_over_cap"
    if standing.spent_nano + hold_nano > cap_nano:
        return "cap_spent"
    return "cap_held" if standing.spent_nano + standing.reserved_nano + hold_nano > cap_nano else None
