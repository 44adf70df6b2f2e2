"""Look after open batches: ask now and then whether they have ended, and close those whose results no app fetches.

Promises that of all processes on a ledger one asks about a batch at a time (the ledger says whose turn it is), that nothing here
waits on the event loop (each question is asked in a thread), that a batch which is old or fails is asked about less often, and that
whatever becomes of a batch its reservation ends: settled by its results, or at what it held once they can never come.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Protocol

from gateway_addon.calls import batch_booking
from gateway_addon.calls.batches import PricedResults, object_of
from gateway_addon.clocks import SYSTEM, Clocks
from gateway_addon.http_client import PIECE_BYTES, whole
from gateway_addon.ledger import Ledger, LedgerUnavailable, app_scope, batches, ownership
from gateway_addon.ledger.batches import Batch, ResultRow
from gateway_addon.policy import GatewayPolicy

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # a lookup in the ledger; how often the API is asked is the policy's
OLDER = 20  # a batch is asked about again after this part of its age
KEPT_FOR_S = 30 * 86_400.0  # the API keeps results for 29 days
LOST_AFTER_S = 86_400.0  # so long the API must say that it has no such batch, or not all of its results, before a hold becomes a bill


class PolledAnswer(Protocol):
    """An answer of the upstream, read in a thread."""

    status: int
    encoding: str | None

    def read(self, size: int) -> bytes: ...


type Ask = Callable[[str], AbstractContextManager[PolledAnswer]]
"""GET a path of the upstream, with the real key. Whatever it raises is a failure to ask again after."""


class BatchLost(Exception):
    """The API has no such batch, or not all of its results, for now. `reason` is how a batch is flagged that stays so."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


class PollFailed(Exception):
    """The API gave no useful answer: ask again later."""


class BatchPoller:
    """One process's. `policy` returns the one in force."""

    def __init__(
        self, ledger: Ledger, policy: Callable[[], GatewayPolicy], ask: Ask, closed: batch_booking.OnBatchClosed, clocks: Clocks = SYSTEM
    ):  # fmt: skip
        self._ledger, self._policy, self._ask, self._closed, self._clocks = ledger, policy, ask, closed, clocks

    async def catch_up(self) -> None:
        """Ask about every batch that is due. Raises LedgerUnavailable."""
        while await self.look():
            pass

    async def look(self) -> bool:
        """Ask about one batch that is due; False where none is. Raises LedgerUnavailable."""
        if not await self._ledger.look(partial(batches.is_due, now=self._clocks.now())):
            return False
        batch = await self._ledger.write(partial(batches.claim_due, now=self._clocks.now()), "batches")
        if batch is None:
            return False
        try:
            await self._look_at(batch)
        except BatchLost as error:
            await self._lost(batch, error)
        except LedgerUnavailable:
            raise
        except Exception as error:
            await self._failed(batch, error)
        return True

    async def _look_at(self, batch: Batch) -> None:
        """Look at one batch, and settle it once it has ended. Raises BatchLost, PollFailed, LedgerUnavailable, and what `ask` raises."""
        shown = object_of(await asyncio.to_thread(self._whole, f"/v1/messages/batches/{batch.id}"))
        if shown is None or shown.id != batch.id:
            raise PollFailed("the answer shows no such batch")
        await self._ledger.keep(partial(ownership.seen, id=batch.id, content=shown.content), "workspace")
        if shown.status == "ended":
            await self._close(batch)
        else:
            pause_s = min(max(self._policy().timeouts.batch_poll_s, (self._clocks.now() - batch.made_at) / OLDER), batches.PAUSE_MAX_S)
            await self._again(batch, shown.status, pause_s, 0)

    async def _close(self, batch: Batch) -> None:
        """Read the results, a piece at a time, and settle by them. Raises as `_look_at`."""
        with ExitStack() as opened:
            path = f"/v1/messages/batches/{batch.id}/results"
            answer = await asyncio.to_thread(lambda: opened.enter_context(self._ask(path)))
            _expect(answer.status)
            results = await batch_booking.pricing(self._ledger, batch, self._policy().prices, answer.encoding)
            renew_monotonic_s = self._clocks.monotonic_s() + batches.TURN_S / 3
            while (rows := await asyncio.to_thread(_some, answer, results)) is not None:
                await batch_booking.write(self._ledger, batch, rows)
                if self._clocks.monotonic_s() >= renew_monotonic_s:
                    await self._again(batch, batch.status, batches.TURN_S, batch.failures, batch.lost_since)
                    renew_monotonic_s = self._clocks.monotonic_s() + batches.TURN_S / 3
            await batch_booking.write(self._ledger, batch, results.close())
        if not await batch_booking.close(self._ledger, batch, self._closed, flags=results.flags, now=self._clocks.now()):
            raise BatchLost("results_unreadable", "its results are not all there, or not to be read")

    def _whole(self, path: str) -> bytes:
        with self._ask(path) as answer:
            _expect(answer.status)
            return whole(answer)

    async def _lost(self, batch: Batch, error: BatchLost) -> None:
        """Look again for a day. An API that has lost sight of a batch for a moment would cost its app the whole hold."""
        now = self._clocks.now()
        since = min(now, batch.lost_since or now)
        if now - since < LOST_AFTER_S:
            return await self._failed(batch, error, since)
        logger.error("Batch %s of app %s: %s, for a day. It is settled at what it held.", batch.id, batch.app, error)
        await batch_booking.close(self._ledger, batch, self._closed, anyway=error.reason, now=now)
        return None

    async def _failed(self, batch: Batch, error: Exception, lost_since: float | None = None) -> None:
        if self._clocks.now() - batch.made_at > KEPT_FOR_S:
            logger.error("Batch %s of app %s never showed its results (%s). It is settled at what it held.", batch.id, batch.app, error)
            await batch_booking.close(self._ledger, batch, self._closed, anyway="results_gone", now=self._clocks.now())
            return
        failures = batch.failures + 1
        pause_s = min(self._policy().timeouts.batch_poll_s * 2.0 ** min(failures, 20), batches.PAUSE_MAX_S)
        logger.warning("Batch %s of app %s could not be looked at, again in %.0f s: %s.", batch.id, batch.app, pause_s, error)
        await self._again(batch, batch.status, pause_s, failures, lost_since or batch.lost_since)

    async def _again(self, batch: Batch, status: str, pause_s: float, failures: int, lost_since: float | None = None) -> None:
        look_at = self._clocks.now() + pause_s
        poll = partial(batches.record_poll, id=batch.id, status=status, look_at=look_at, failures=failures, lost_since=lost_since)
        await self._ledger.write(poll, app_scope(batch.app))


def _some(answer: PolledAnswer, results: PricedResults) -> list[ResultRow] | None:
    """Return the next results, read and priced in a thread; None at the end."""
    piece = answer.read(PIECE_BYTES)
    return results.feed(piece) if piece else None


def _expect(status: int) -> None:
    """Check that the API has answered. Raises BatchLost or PollFailed."""
    if status == 404:
        raise BatchLost("batch_gone", "the Claude API has no such batch (404)")
    if status != 200:
        raise PollFailed(f"the Claude API answered {status}")
