"""Looks after open batches: asks now and then whether they have ended, and closes those whose results no app fetches.

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
from gateway_addon.ledger import Ledger, LedgerUnavailable, app_scope, ownership
from gateway_addon.ledger import batches as book
from gateway_addon.ledger.batches import Batch, ResultRow
from gateway_addon.policy import GatewayPolicy

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # a lookup in the ledger; how often the API is asked is the policy's
OLDER = 20  # a batch is asked about again after this part of its age
KEPT_FOR_S = 30 * 86_400.0  # the API keeps results for 29 days
PIECE = 64 * 1024
UNREADABLE_TIMES = 3  # results never change: a file that lacks some after so many readings will always lack them


class PolledAnswer(Protocol):
    """An answer of the upstream, read in a thread."""

    status: int
    encoding: str | None

    def read(self, size: int) -> bytes: ...


type Ask = Callable[[str], AbstractContextManager[PolledAnswer]]
"""GET a path of the upstream, with the real key. Whatever it raises is a failure to ask again after."""


class BatchGone(Exception):
    """The API has no such batch any more, or no results of it."""


class PollFailed(Exception):
    """The API gave no useful answer: ask again later."""


class BatchPoller:
    """One process's. `policy` returns the one in force."""

    def __init__(
        self, ledger: Ledger, policy: Callable[[], GatewayPolicy], ask: Ask, closed: batch_booking.OnBatchClosed, clocks: Clocks = SYSTEM
    ):  # fmt: skip
        self._ledger, self._policy, self._ask, self._closed, self._clocks = ledger, policy, ask, closed, clocks

    async def run(self) -> None:
        """Look after batches until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                while await self.look():
                    pass
            except LedgerUnavailable as error:
                logger.debug("Open batches wait for the ledger: %s", error)  # which has said so itself
            except Exception:
                logger.exception("Looking after batches failed; it is tried again.")

    async def look(self) -> bool:
        """Ask about one batch that is due; False where none is. Raises LedgerUnavailable."""
        if not await self._ledger.look(partial(book.waits, now=self._clocks.now())):
            return False
        batch = await self._ledger.write(partial(book.take, now=self._clocks.now()), "batches")
        if batch is None:
            return False
        try:
            await self._look_at(batch)
        except BatchGone as error:
            logger.error("Batch %s of app %s: %s. It is settled at what it held.", batch.id, batch.app, error)
            await batch_booking.close(self._ledger, batch, self._closed, anyway="batch_gone", now=self._clocks.now())
        except LedgerUnavailable:
            raise
        except Exception as error:
            await self._failed(batch, error)
        return True

    async def _look_at(self, batch: Batch) -> None:
        """Raises Gone, Failed, what `ask` raises, LedgerUnavailable."""
        shown = object_of(await asyncio.to_thread(self._whole, f"/v1/messages/batches/{batch.id}"))
        if shown is None or shown.id != batch.id:
            raise PollFailed("the answer shows no such batch")
        await self._ledger.keep(partial(ownership.seen, id=batch.id, content=shown.content), "workspace")
        if shown.status == "ended":
            await self._close(batch)
        else:
            pause_s = min(max(self._policy().timeouts.batch_poll_s, (self._clocks.now() - batch.made_at) / OLDER), book.PAUSE_MAX_S)
            await self._again(batch, shown.status, pause_s, 0)

    async def _close(self, batch: Batch) -> None:
        """Read the results, a piece at a time, and settle by them; in the end without them. Raises as `_look_at`."""
        prices = await batch_booking.priced_by(self._ledger, batch, self._policy().prices)
        with ExitStack() as opened:
            path = f"/v1/messages/batches/{batch.id}/results"
            answer = await asyncio.to_thread(lambda: opened.enter_context(self._ask(path)))
            _expect(answer.status)
            results = PricedResults(prices, batch.made_at, hour_ttl=batch.hour_ttl, content_encoding=answer.encoding)
            renew_monotonic_s = self._clocks.monotonic_s() + book.TURN_S / 3
            while (rows := await asyncio.to_thread(_some, answer, results)) is not None:
                await batch_booking.write(self._ledger, batch, rows)
                if self._clocks.monotonic_s() >= renew_monotonic_s:
                    await self._again(batch, batch.status, book.TURN_S, batch.failures)
                    renew_monotonic_s = self._clocks.monotonic_s() + book.TURN_S / 3
            await batch_booking.write(self._ledger, batch, results.close())
        anyway = "results_unreadable" if batch.failures >= UNREADABLE_TIMES else None
        if not await batch_booking.close(self._ledger, batch, self._closed, anyway=anyway, now=self._clocks.now()):
            raise PollFailed("its results are not all there, or not to be read")

    def _whole(self, path: str) -> bytes:
        with self._ask(path) as answer:
            _expect(answer.status)
            body = b""
            while piece := answer.read(PIECE):
                body += piece
            return body

    async def _failed(self, batch: Batch, error: Exception) -> None:
        if self._clocks.now() - batch.made_at > KEPT_FOR_S:
            logger.error("Batch %s of app %s never showed its results (%s). It is settled at what it held.", batch.id, batch.app, error)
            await batch_booking.close(self._ledger, batch, self._closed, anyway="results_gone", now=self._clocks.now())
            return
        failures = batch.failures + 1
        pause_s = min(self._policy().timeouts.batch_poll_s * 2.0 ** min(failures, 20), book.PAUSE_MAX_S)
        logger.warning("Batch %s of app %s could not be looked at, again in %.0f s: %s.", batch.id, batch.app, pause_s, error)
        await self._again(batch, batch.status, pause_s, failures)

    async def _again(self, batch: Batch, status: str, pause_s: float, failures: int) -> None:
        looked = partial(book.looked, id=batch.id, status=status, look_at=self._clocks.now() + pause_s, failures=failures)
        await self._ledger.write(looked, app_scope(batch.app))


def _some(answer: PolledAnswer, results: PricedResults) -> list[ResultRow] | None:
    """The next results, read and priced in a thread; None at the end."""
    piece = answer.read(PIECE)
    return results.feed(piece) if piece else None


def _expect(status: int) -> None:
    """Raises Gone or Failed unless the API has answered."""
    if status == 404:
        raise BatchGone("the Claude API has no such batch any more (404)")
    if status != 200:
        raise PollFailed(f"the Claude API answered {status}")
