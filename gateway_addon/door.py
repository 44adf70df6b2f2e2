"""Where a call waits for budget: reserve at once, or stand in line while calls in flight hold what is left.

Promises that waiting is bounded and fair within a process (first come, first served, per scope), that nobody is refused
without one last look, and that a caller who leaves while waiting leaves nothing behind. Knows the ledger and offers; no policy.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from gateway_addon.grants import Pace
from gateway_addon.ledger import Cap, Denied, Ledger, NewCall, RateLimits, Reserved, app_scope

WAIT_S = 2.0  # for budget that is held, not spent
LOOK_S = 0.05  # another process's settlement makes no sound here


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to reserve a call: whole (`pace` None), or in steps of which this is the first."""

    granted_tokens: int
    hold_nano: int
    pace: Pace | None = None
    quantum_nano: int = 0


class Door:
    """One process's door to a ledger."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._lines: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._settled = asyncio.Event()

    async def reserve(
        self, call: NewCall, offers: Sequence[Offer], limits: Sequence[Cap], rates: RateLimits, now: float
    ) -> tuple[Reserved | Denied, Offer]:
        """Reserve by the first offer that fits; where budget is only held, wait in line for it. Raises LedgerUnavailable.

        Newcomers do not overtake whoever waits in one of their scopes. The denial is that of the last, smallest offer.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def attempt() -> tuple[Reserved | Denied, Offer]:
            for offer in offers:
                result = await self._ledger.reserve(
                    call, offer.hold_nano, limits, quantum_nano=offer.quantum_nano, rates=rates, now=now + loop.time() - began
                )
                if isinstance(result, Reserved):
                    return result, offer
            return result, offer

        scope = next((scope for scope in call.scopes if scope in self._lines and self._lines[scope].locked()), None)
        if scope is None:
            result, offer = await attempt()
            if isinstance(result, Reserved) or result.reason != "cap_held" or result.standing is None:
                return result, offer
            scope = result.standing.scope
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S), self._lines[scope]:
                while True:
                    result, offer = await attempt()
                    if isinstance(result, Reserved) or result.reason != "cap_held":
                        return result, offer
                    await self._next_settlement()
        return await attempt()

    async def observe(
        self, call: NewCall, offers: Sequence[Offer], limits: Sequence[Cap], rates: RateLimits, now: float
    ) -> tuple[Reserved | Denied, Offer, tuple[str, ...]]:
        """The same for an app that is only observed: what denies it is its flag, and only the caps that it shares with others hold it."""
        result, offer = await self.reserve(call, offers, limits, rates, now)
        if isinstance(result, Reserved):
            return result, offer, ()
        shared = [cap for cap in limits if cap.scope != app_scope(call.app)]
        again, offer = await self.reserve(call, offers, shared, RateLimits(), now)
        return again, offer, (f"observed:{result.reason}",)

    def settled(self) -> None:
        """A settlement of this process is written: whoever waits may look again."""
        self._settled.set()
        self._settled = asyncio.Event()

    async def _next_settlement(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), LOOK_S)
