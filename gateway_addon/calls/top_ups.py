"""Top up the running streams of one process before their grants run out, and cut those that must end early.

Promises that output is reserved ahead of need, in a few ledger writes a second however many streams run; that a stream whose grant
cannot grow ends where its grant ends (flows.py enforces that); and that streams are cut when their app is paused or their lease on the
ledger expires. Knows the ledger and running calls; nothing of mitmproxy or policy.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from gateway_addon.calls.progress import TICK_S
from gateway_addon.calls.record import Measures
from gateway_addon.calls.refusal_messages import cut_sentence
from gateway_addon.calls.running import InFlightCall
from gateway_addon.clocks import Clocks
from gateway_addon.ledger import Ledger, Reserved
from gateway_addon.refusals import Refusal

LOOK_AT_LEASE_S = 0.25
TOP_UP_EVERY_S = TICK_S / 4  # however great the hurry: a few writes a second, not one per delta
LATE_S = 0.5  # the lease check may be this late: declared lags have room for that
CUT_CODES = {"budget": "cap_spent", "paused": "app_paused", "lease_expiring": "ledger"}


class RunningFlow(Protocol):
    """A flow whose call may be running."""

    running: InFlightCall | None

    def cut(self, why: str) -> None:
        """End the running call early; `why` is a key of `CUT_CODES`."""


class RunningStreams:
    """Top up and cut the running calls of one process: those of `flows`, a table that the proxy keeps up to date."""

    def __init__(self, ledger: Ledger, clocks: Clocks, judged: Callable[[InFlightCall], Reserved]):
        """`judged` returns what a running call holds, with the caps that judge its top-ups now."""
        self._ledger = ledger
        self._clocks = clocks
        self._judged = judged
        self.flows: Mapping[str, RunningFlow] = {}
        self.on_top_up = Measures().on_top_up
        self._hurry = asyncio.Event()
        self._looked_monotonic_s = clocks.monotonic_s()
        self._stalled_s = 0.0

    @property
    def running(self) -> list[InFlightCall]:
        return [flow.running for flow in self.flows.values() if flow.running is not None]

    def stalled_s(self, monotonic_s: float) -> float:
        """Return how long the event loop has stood still until now, in all, as measured by lease checks that came late.

        Nothing was read, topped up or cut in that time. A check that is overdue at this moment counts as well.
        """
        since_s = monotonic_s - self._looked_monotonic_s
        return self._stalled_s + (since_s if since_s > LOOK_AT_LEASE_S + LATE_S else 0.0)

    def _measure_stall(self) -> None:
        monotonic_s = self._clocks.monotonic_s()
        self._stalled_s, self._looked_monotonic_s = self.stalled_s(monotonic_s), monotonic_s

    def hurry_if_short(self, running: InFlightCall, monotonic_s: float) -> None:
        """Hasten the next top-up where a running answer needs it before the next tick."""
        if running.runs_short(monotonic_s):
            self._hurry.set()

    async def keep_topped_up(self) -> None:
        """Wait for a stream that runs short, or a moment; top up, and cut the calls of paused scopes. Raises LedgerUnavailable."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), TICK_S)
        self._hurry.clear()
        await self.top_up()
        await self._cut_paused()

    async def top_up(self) -> None:
        """Reserve more output for every running stream that will need it, in one ledger write. Raises LedgerUnavailable.

        Further turns are reserved after that, each on its own: they are dear, and no output is to be refused because of them.
        """
        monotonic_s = self._clocks.monotonic_s()
        await self._extend([(running, tokens, 0) for running in self.running if (tokens := running.wanted_tokens(monotonic_s))])
        await self._extend([(running, 0, turn) for running in self.running for turn in range(1, running.wanted_turns(monotonic_s) + 1)])

    async def _extend(self, asked: Sequence[tuple[InFlightCall, int, int]]) -> None:
        """Reserve so many tokens of output more, or one turn more (the first, second, ... from now), for each stream.

        No turn costs less than the one before it: where one is refused, so are those after it.
        """
        wanted = [
            (running, tokens, turn, nano - running.extension_nano(0, turn - 1) if turn else nano)
            for running, tokens, turn in asked
            if (nano := running.extension_nano(tokens, turn)) <= _room_nano(running)
        ]
        if not wanted:
            return
        granted = await self._ledger.extend([(self._judged(running), nano) for running, _, _, nano in wanted], now=self._clocks.now())
        for (running, tokens, turn, _), ok in zip(wanted, granted, strict=True):
            self.on_top_up(ok)
            if ok:
                running.granted_tokens += tokens
                running.granted_turns += turn > 0

    async def _cut_paused(self) -> None:
        """End the running calls in scopes that were paused with `--now`. Raises LedgerUnavailable."""
        paused_now = {pause.scope for pause in await self._ledger.pauses(now=self._clocks.now()) if pause.cut}
        for flow in list(self.flows.values()) if paused_now else ():
            if flow.running is not None and paused_now & set(flow.running.admission.call.pause_scopes):
                flow.cut("paused")

    async def keep_to_the_lease(self) -> None:
        """Measure the loop's stalls, and cut streams whose lease expires. Never waits for the ledger: it may not answer."""
        self._measure_stall()
        self._cut_lease_expiring()

    def _cut_lease_expiring(self) -> None:
        """End the streams whose lease expires, before another gateway settles them at what they hold.

        A call that does not stream runs to its end: the provider bills it in any case, within what it holds.
        """
        for flow in list(self.flows.values()):
            if (running := flow.running) and running.admission.call.stream and self._ledger.lease_expires(running.hold.reserved):
                flow.cut("lease_expiring")


def cut_refusal(running: InFlightCall) -> Refusal:
    """Return the refusal that tells a client why the gateway ends its running call."""
    return Refusal(CUT_CODES[running.cut or "budget"], cut_sentence(running))


def _room_nano(running: InFlightCall) -> float:
    """Return how much more a running stream may be granted under its request cap."""
    cap_nano = None if running.admission.app.observes("caps") else running.admission.app.caps.get("request")
    return math.inf if cap_nano is None else cap_nano - running.held_nano
