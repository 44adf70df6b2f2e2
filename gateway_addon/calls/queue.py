"""Reserve budget for a call at once, or queue the call while calls in flight hold what is left.

Promises that waiting is bounded and fair within a process (first come, first served, per scope), that no call is refused without a
last attempt, and that a call that is cancelled while it waits leaves nothing behind. Knows the ledger; no policy.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from gateway_addon.calls.planning import RATES, observed_denials
from gateway_addon.calls.reservation_options import ReservationOption, ReservationPlan
from gateway_addon.ledger import CapShape, Denied, Ledger, NewCall, RateLimits, Reserved

WAIT_S = 2.0  # for budget that is held, not spent
LOOK_S = 0.05  # another process's settlement wakes nobody here, so attempts are repeated


class BudgetQueue:
    """Queue the calls of one process that wait for budget, one queue per scope."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._lines: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._settled = asyncio.Event()

    async def reserve(
        self, call: NewCall, reservation_options: Sequence[ReservationOption], limits: Sequence[CapShape], rates: RateLimits, now: float
    ) -> tuple[Reserved | Denied, ReservationOption]:
        """Reserve by the first option that fits; where budget is only held, wait for it. Raises LedgerUnavailable.

        A new call does not overtake one that waits in one of its scopes. The denial is the last, smallest option's.
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
        self, call: NewCall, asked: ReservationPlan, now: float
    ) -> tuple[Reserved | Denied, ReservationOption, tuple[str, ...]]:
        """Reserve as planned; also return the codes that rules in observe mode would have refused with.

        Caps in observe mode are left out of the reservation, or a stream's later top-ups would be refused by them.
        Raises LedgerUnavailable.
        """
        own = await self._ledger.capped(asked.observed_caps, now=now) if asked.observed_caps else ()
        codes = dict.fromkeys(denied.reason for denied in observed_denials(own, asked.options[-1], now))
        result, option = await self.reserve(call, asked.options, asked.limits, asked.rates, now)
        if asked.observes_rates and isinstance(result, Denied) and result.reason in RATES:
            codes[result.reason] = None
            result, option = await self.reserve(call, asked.options, asked.limits, RateLimits(), now)
        if own and isinstance(result, Reserved):
            result = replace(result, standings=(*result.standings, *own))
        return result, option, tuple(codes)

    def settled(self) -> None:
        """Wake the waiting calls: a settlement of this process is written."""
        self._settled.set()
        self._settled = asyncio.Event()

    async def _next_settlement(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), LOOK_S)
