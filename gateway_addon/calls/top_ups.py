"""The running calls of one process: topped up before they run out, and ended before their time where they must be.

Promises that output is asked for ahead of need, a few ledger writes a second however many streams run; that a stream whose grant may
not grow ends where it ends (flows.py holds it to that); and that calls of a lost ledger, or of an app that was paused, are cut. Knows
the ledger and running calls; nothing of mitmproxy, nor of who may ask for what.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from gateway_addon.calls.progress import TICK_S
from gateway_addon.calls.refusal_messages import cut_sentence
from gateway_addon.calls.running import InFlightCall
from gateway_addon.clocks import Clocks
from gateway_addon.ledger import Ledger
from gateway_addon.refusals import Refusal

LOOK_AT_LEASE_S = 0.25
TOP_UP_EVERY_S = TICK_S / 4  # however great the hurry: a few writes a second, not one per delta
LATE_S = 0.5  # by how much a look may be late: declared lags have room for that
CUT_CODES = {"budget": "cap_spent", "paused": "app_paused", "adrift": "ledger"}

type Cut = Callable[[str], None]
"""Ends a running call before its time, given the reason: a key of `CUT_CODES`."""


class RunningStreams:
    """Look after the running calls of one process."""

    def __init__(self, ledger: Ledger, clocks: Clocks):
        self._ledger = ledger
        self._clocks = clocks
        self.running: dict[InFlightCall, Cut] = {}
        self._hurry = asyncio.Event()
        self._looked_monotonic_s = clocks.monotonic_s()
        self._lost_s = 0.0

    def lost_s(self, monotonic_s: float) -> float:
        """Return how long the event loop has stood still until now, in all: a step of a computation, or of the machine, held it.

        Nothing was read in that time, topped up or cut. It is told by looks that come late, the one that is due now among them.
        """
        since_s = monotonic_s - self._looked_monotonic_s
        return self._lost_s + (since_s if since_s > LOOK_AT_LEASE_S + LATE_S else 0.0)

    def _look_at_the_clock(self) -> None:
        monotonic_s = self._clocks.monotonic_s()
        self._lost_s, self._looked_monotonic_s = self.lost_s(monotonic_s), monotonic_s

    def look_after(self, running: InFlightCall, monotonic_s: float) -> None:
        """A running answer showed more: if it will need more than it holds, ask for that soon."""
        if running.runs_short(monotonic_s):
            self._hurry.set()

    async def keep_topped_up(self) -> None:
        """Wait for a stream that runs short, or a moment; top up, and cut whoever was paused. Raises LedgerUnavailable."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), TICK_S)
        self._hurry.clear()
        await self.top_up()
        await self._cut_paused()

    async def top_up(self) -> None:
        """Ask for more output for every running stream that will need it, in one ledger write. Raises LedgerUnavailable.

        Further turns are asked for after that, each on its own: they are dear, and output shall not be refused because of them.
        """
        monotonic_s = self._clocks.monotonic_s()
        await self._extend([(running, tokens, 0) for running in self.running if (tokens := running.wanted_tokens(monotonic_s))])
        await self._extend([(running, 0, turn) for running in self.running for turn in range(1, running.wanted_turns(monotonic_s) + 1)])

    async def _extend(self, asked: Sequence[tuple[InFlightCall, int, int]]) -> None:
        """Ask for so much more output, or for one more turn, the first, second, ... from now, for each stream.

        No turn costs less than the one before it: where one is refused, so are those after it.
        """
        wanted = [
            (running, tokens, turn, nano - running.extension_nano(0, turn - 1) if turn else nano)
            for running, tokens, turn in asked
            if (nano := running.extension_nano(tokens, turn)) <= _room_nano(running)
        ]
        if not wanted:
            return
        granted = await self._ledger.extend([(running.admission.call_id, nano) for running, _, _, nano in wanted], now=self._clocks.now())
        for (running, tokens, turn, _), ok in zip(wanted, granted, strict=True):
            if ok:
                running.granted_tokens += tokens
                running.granted_turns += turn > 0

    async def _cut_paused(self) -> None:
        """End the running calls of whoever was paused `--now`. Raises LedgerUnavailable."""
        paused_now = {pause.scope for pause in await self._ledger.pauses(now=self._clocks.now()) if pause.cut}
        for running, cut in list(self.running.items()) if paused_now else ():
            if paused_now & set(running.admission.scopes):
                cut("paused")

    async def keep_to_the_lease(self) -> None:
        """Look at the clock and cut what is adrift. Never waits for the ledger, as top-ups do: it is for when that does not answer."""
        self._look_at_the_clock()
        self._cut_adrift()

    def _cut_adrift(self) -> None:
        """End the running streams whose calls another gateway will settle at what they hold. What does not stream runs to its end:
        the provider bills it in any case, within what it holds."""
        lease_expiring = self._ledger.lease_expiring()
        for running, cut in list(self.running.items()) if lease_expiring else ():
            if running.admission.call_id in lease_expiring and running.admission.call.stream:
                cut("adrift")


def cut_refusal(running: InFlightCall) -> Refusal:
    """Why the gateway ends a running call."""
    return Refusal(CUT_CODES[running.cut or "budget"], cut_sentence(running))


def _room_nano(running: InFlightCall) -> float:
    """What a running stream may still be granted under its request cap."""
    cap_nano = None if running.admission.app.observes("caps") else running.admission.app.caps.get("request")
    return math.inf if cap_nano is None else cap_nano - running.held_nano
