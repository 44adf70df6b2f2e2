"""Keep the reports of closed days without being asked, so that a person's first report of a month is as quick as the second.

Promises that of all processes on a ledger one sums at a time (the ledger says whose turn it is), that calls do not feel it (a day is summed
in a thread that only reads; the writer takes a claim and a day's sums), that it leaves nine tenths of a processor to others, and that
it ends at once when it is cancelled. What a kept day is, and when one is closed, is the ledger's to say (daily_totals.py).
"""

import asyncio
from collections.abc import Callable
from functools import partial

from gateway_addon.ledger import Ledger, background
from gateway_addon.ledger.reports import daily_totals

LOOK_EVERY_S = 60.0
PAUSE_S = 1.0  # after each day, at least
REST = 9  # times as long as the day has taken


class DailyTotalsJob:
    """One process's. `clock` returns unix seconds."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        self._ledger, self._clock = ledger, clock

    async def catch_up(self) -> None:
        """Keep day by day, the newest first, until none is left or another process is at work. Raises LedgerUnavailable."""
        time = asyncio.get_running_loop().time
        began_at = time()
        while await self.keep():
            await asyncio.sleep(max(PAUSE_S, REST * (time() - began_at)))
            began_at = time()

    async def keep(self) -> bool:
        """Keep the newest closed day that nobody has kept; False where there is none, or another is at work. Raises LedgerUnavailable."""
        now = self._clock()
        span = await background.read(self._ledger.place, lambda db: next(daily_totals.missing(db, 0, now, now), None))
        if span is None or not await self._ledger.change(partial(daily_totals.claim, spans=[span], now=now, alone=True)):
            return False
        found = await background.read(self._ledger.place, partial(daily_totals.of_calls, span=span))
        await self._ledger.write(partial(daily_totals.put, span=span, day=found, claimed_at=now), "days")
        return True
