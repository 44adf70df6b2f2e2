"""Run the work beside the calls, each piece again and again, until the gateway ends.

Promises that a job which fails goes on and disturbs no other; that a failure is said once, and again only after the job has gone well or
fails in another way; that every job has ended when `running` has.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.upstreams.credentials import SecretUnavailable

logger = logging.getLogger(__name__)

EXPECTED = (LedgerUnavailable, SecretUnavailable)
"""Failures of something outside, whose sentence says all; any other is a fault of the gateway's, and is said with where it was."""


type Job = tuple[float, str, Callable[[], Awaitable[object]]]
"""Seconds before the work, and after each end of it; what it is about; the work."""


async def every(seconds: float, name: str, work: Callable[[], Awaitable[object]]) -> None:
    """Do a job until cancelled."""
    said: type[Exception] | None = None
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
            said = None
        except EXPECTED as error:
            if said is not type(error):
                logger.warning("Work on %s is tried again: %s", name, error)
            said = type(error)
        except Exception as error:
            if said is not type(error):
                logger.exception("Work on %s failed; it is tried again.", name)
            said = type(error)


@asynccontextmanager
async def running(*jobs: Job) -> AsyncIterator[None]:
    """Do jobs for as long as the block runs."""

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(every(*job), name=job[1])

    together = asyncio.ensure_future(all_of_them())  # a task of its own: a group would wrap the block's exceptions
    try:
        yield
    finally:
        together.cancel()
        await asyncio.gather(together, return_exceptions=True)
