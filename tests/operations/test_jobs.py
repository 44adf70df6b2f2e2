"""The work beside the calls: each job goes on, says a failure once, and has ended before what it stands on is closed."""

import asyncio
import logging

import pytest
from gateway import write_policies
from ledgers import new_file, until

from gateway_addon.ledger import Ledger, LedgerUnavailable
from gateway_addon.operations import jobs
from gateway_addon.proxy.server import assembled
from gateway_addon.simulator import KEY
from gateway_addon.upstreams.credentials import SecretUnavailable

NAMES = {"streams without a ledger", "running streams", "the policy", "the key", "open batches", "closed days", "alerts", "webhooks"}


def failing(*outcomes):
    """Work that fails as listed, None for once that goes well, and then for ever well; and how often it was done."""
    done, left = [], list(outcomes)

    async def work():
        done.append(1)
        if left and (error := left.pop(0)):
            raise error

    return work, done


AWAY, LOCKED, BUG = LedgerUnavailable("the disk is slow"), SecretUnavailable("It is locked."), ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([AWAY] * 5, ["Work on it is tried again: the disk is slow"]),
        ([AWAY, AWAY, None, AWAY], ["Work on it is tried again: the disk is slow"] * 2),
        ([AWAY, LOCKED], ["Work on it is tried again: the disk is slow", "Work on it is tried again: It is locked."]),
        ([BUG] * 5, ["Work on it failed; it is tried again."]),
        ([BUG, None, BUG], ["Work on it failed; it is tried again."] * 2),
    ],
)
async def test_a_failing_job_goes_on_and_says_it_once(caplog, outcomes, said):
    """A fault of the gateway's own is said with where it was; another's failure in its own sentence alone."""
    (work, done), (other, others_done) = failing(*outcomes), failing()
    async with jobs.running((0, "it", work), (0, "another", other)):
        await until(lambda: len(done) > len(outcomes) and len(others_done) > len(outcomes))
    assert [record.getMessage() for record in caplog.records] == said
    assert all((record.exc_info is not None) == (record.levelno == logging.ERROR) == (BUG in outcomes) for record in caplog.records)


async def test_work_is_repeated_after_a_pause_never_twice_at_once():
    """Work is done again after a pause and never twice at once."""
    at_work, most = [], []

    async def work():
        at_work.append(1)
        most.append(len(at_work))
        await asyncio.sleep(0.01)
        at_work.pop()

    async with jobs.running((0, "it", work)):
        await until(lambda: len(most) > 5)
    assert max(most) == 1


async def test_every_job_has_ended_after_the_block_whose_error_passes():
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append(1)

    async def block():
        async with jobs.running((0, "one", work), (0, "two", work)):
            await asyncio.sleep(0.05)
            raise ValueError("the block's own")

    with pytest.raises(ValueError, match="the block's own"):
        await block()
    assert len(ended) == 2


async def test_all_jobs_of_a_gateway_end_before_its_ledger_is_closed(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMULATED_KEY", KEY)
    policies = write_policies(tmp_path / "policies", "http://127.0.0.1:1", {})
    close, at_close = Ledger.close, []

    def at_work():
        return {task.get_name() for task in asyncio.all_tasks()} & NAMES

    async def closing(ledger, *arguments):
        at_close.append(at_work())
        await close(ledger, *arguments)

    monkeypatch.setattr(Ledger, "close", closing)
    async with assembled(policies, f"sqlite:///{new_file(tmp_path)}"):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert at_work() == NAMES
    assert at_close == [set()]
