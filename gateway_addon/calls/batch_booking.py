"""Book a batch's results in the ledger as they are fetched, by an app through the gateway or by the gateway itself.

Promises constant memory however long the file is, that a batch is settled once and by a whole file alone, and that a stream never
waits for the ledger. Where the ledger cannot keep up with a stream, booking gives up: the file can be fetched again.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from gateway_addon.calls.batches import PricedResults
from gateway_addon.ledger import Ledger, LedgerUnavailable, Resolution, app_scope
from gateway_addon.ledger import batches as book
from gateway_addon.ledger.batches import Batch, ResultRow, SettledBatch
from gateway_addon.pricing import Prices, restored

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1_000  # rows in one transaction: other writes wait for it, some milliseconds
ROWS_WAITING_MAX = 20_000  # some ten megabytes

type OnBatchClosed = Callable[[Batch, SettledBatch, Resolution], None]
"""Called once, for a batch that this process has settled."""


async def priced_by(ledger: Ledger, batch: Batch, current: Prices) -> Prices:
    """Return the price table of a batch's admission. Raises LedgerUnavailable."""
    if batch.prices_digest == current.digest:
        return current
    return restored(await ledger.look(partial(book.prices, digest=batch.prices_digest)))


async def pricing(ledger: Ledger, batch: Batch, current: Prices, content_encoding: str | None = None) -> PricedResults:
    """Return a reader of a batch's results, with the prices of its admission and the ids of its requests. Raises LedgerUnavailable."""
    prices, ids = await priced_by(ledger, batch, current), await ledger.look(partial(book.custom_ids, id=batch.id))
    return PricedResults(prices, batch.made_at, hour_ttl=batch.hour_ttl, custom_ids=ids, content_encoding=content_encoding)


async def close(
    ledger: Ledger, batch: Batch, closed: OnBatchClosed, *, anyway: str | None = None, flags: tuple[str, ...] = (), now: float
) -> bool:
    """Settle a batch from its booked results; return False where some are missing. Raises LedgerUnavailable."""
    resolution = await ledger.keep(partial(book.close, id=batch.id, anyway=anyway, flags=flags, now=now), app_scope(batch.app))
    if resolution is not None and resolution.first:
        closed(batch, await ledger.look(partial(book.settled, call_id=batch.call_id)), resolution)
    return resolution is not None


class BatchBooking:
    """Book the results of one batch from one pass over its file."""

    def __init__(self, ledger: Ledger, batch: Batch, results: PricedResults, closed: OnBatchClosed, clock: Callable[[], float]):
        self._ledger, self._batch, self._results, self._closed, self._clock = ledger, batch, results, closed, clock
        self._waiting: list[ResultRow] = []
        self._given_up = False
        self._writing: asyncio.Task[None] | None = None

    def tap(self, chunk: bytes) -> None:
        """Take the next bytes of the file."""
        if not self._given_up:
            self._take(self._results.feed(chunk))

    def ended(self, whole: bool) -> None:
        """End the file. Settles in the background where it was `whole` and no result is missing."""
        if whole and not self._given_up:
            self._take(self._results.close())
            self._writing = asyncio.ensure_future(self._finish(self._writing))

    def _take(self, rows: list[ResultRow]) -> None:
        self._waiting += rows
        if len(self._waiting) > ROWS_WAITING_MAX:
            self._given_up, self._waiting = True, []
            logger.warning("The ledger is behind the results of batch %s: they are read again later.", self._batch.id)
        elif len(self._waiting) >= ROWS_AT_ONCE and (self._writing is None or self._writing.done()):
            self._writing = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        try:
            while self._waiting:
                rows, self._waiting = self._waiting[:ROWS_AT_ONCE], self._waiting[ROWS_AT_ONCE:]
                await write(self._ledger, self._batch, rows)
        except LedgerUnavailable as error:
            self._given_up = True
            logger.warning("The results of batch %s could not be booked, and are read again later: %s", self._batch.id, error)

    async def _finish(self, before: "asyncio.Task[None] | None") -> None:
        if before is not None:
            await before
        await self._write()
        if not self._given_up:
            await close(self._ledger, self._batch, self._closed, flags=self._results.flags, now=self._clock())


async def write(ledger: Ledger, batch: Batch, rows: list[ResultRow]) -> None:
    """Write results to the ledger, `ROWS_AT_ONCE` in a transaction. Raises LedgerUnavailable."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        few = rows[start : start + ROWS_AT_ONCE]
        await ledger.write(partial(book.book_results, call_id=batch.call_id, rows=few), app_scope(batch.app))
