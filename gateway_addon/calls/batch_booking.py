"""Reading a batch's results into the ledger, by whoever happens to fetch them: an app through the gateway, or the gateway itself.

Promises constant memory however long the file is, that a batch is settled by a whole file alone and once, and that nobody who passes
bytes on ever waits for the ledger. Where the ledger cannot keep up with a stream this reading gives up: the file can be read again.
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

ROWS_AT_ONCE = 1_000  # of one transaction: some milliseconds, which others wait for
ROWS_WAITING_MAX = 20_000  # some ten megabytes

type OnBatchClosed = Callable[[Batch, SettledBatch, Resolution], None]
"""Hears of a batch that was settled here, the first time."""


async def priced_by(ledger: Ledger, batch: Batch, current: Prices) -> Prices:
    """The price table of a batch's admission. Raises LedgerUnavailable."""
    if batch.prices_digest == current.digest:
        return current
    return restored(await ledger.look(partial(book.prices, digest=batch.prices_digest)))


async def pricing(ledger: Ledger, batch: Batch, current: Prices, content_encoding: str | None = None) -> PricedResults:
    """Make ready to read a batch's results: by the prices of its admission, held against its own ids. Raises LedgerUnavailable."""
    prices, ids = await priced_by(ledger, batch, current), await ledger.look(partial(book.custom_ids, id=batch.id))
    return PricedResults(prices, batch.made_at, hour_ttl=batch.hour_ttl, custom_ids=ids, content_encoding=content_encoding)


async def close(
    ledger: Ledger, batch: Batch, closed: OnBatchClosed, *, anyway: str | None = None, flags: tuple[str, ...] = (), now: float
) -> bool:
    """Settle a batch from the results that were booked; False where some are missing. Raises LedgerUnavailable."""
    resolution = await ledger.keep(partial(book.close, id=batch.id, anyway=anyway, flags=flags, now=now), app_scope(batch.app))
    if resolution is not None and resolution.first:
        closed(batch, await ledger.look(partial(book.settled, call_id=batch.call_id)), resolution)
    return resolution is not None


class BatchBooking:
    """One reading of one batch's results."""

    def __init__(self, ledger: Ledger, batch: Batch, results: PricedResults, closed: OnBatchClosed, clock: Callable[[], float]):
        self._ledger, self._batch, self._results, self._closed, self._clock = ledger, batch, results, closed, clock
        self._waiting: list[ResultRow] = []
        self._given_up = False
        self._writing: asyncio.Task[None] | None = None

    def tap(self, chunk: bytes) -> None:
        """Some of the file has passed."""
        if not self._given_up:
            self._take(self._results.feed(chunk))

    def ended(self, whole: bool) -> None:
        """The file has ended, or broken off. Settles in the background where it was whole and nothing is missing."""
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
    """Book some results, a transaction at a time. Raises LedgerUnavailable."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        few = rows[start : start + ROWS_AT_ONCE]
        await ledger.write(partial(book.book_results, call_id=batch.call_id, rows=few), app_scope(batch.app))
