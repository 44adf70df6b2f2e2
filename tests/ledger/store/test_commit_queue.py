"""The queue from the loop to the writer's thread: what begins where, and that nothing is lost, told twice or waited for on the way."""

import asyncio
import fcntl
import random
import sqlite3
import threading
import time
from contextlib import contextmanager

import pytest
from ledgers import until
from stores import Store

from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.ledger.store.commit_queue import CommitQueue
from gateway_addon.ledger.store.locks import folder
from gateway_addon.ledger.store.sqlite import FileStore
from gateway_addon.ledger.store.writer import BegunCommit, Operation


class Asked:
    """An operation that notes on which thread it ran, and its answers."""

    def __init__(self, store, name="row", *, lasting=False, wanted=lambda: True, may_linger=False):
        self.answers, self.threads, self.name, self._store = [], [], name, store
        self.operation = Operation(self._apply, 0, lasting=lasting, may_linger=may_linger, wanted=wanted, emit=self.answers.append)

    def _apply(self, db):
        self.threads.append(threading.current_thread())
        if isinstance(self._store, Store):
            self._store._begun.append(self.name)
        return "written"

    async def answer(self):
        await until(lambda: self.answers)
        return self.answers[0]


@contextmanager
def handed_over(queue):
    """Record the kinds of work that the thread is given meanwhile."""
    given, put = [], queue.writer.put
    queue.writer.put = lambda work: (given.append(type(work)), put(work))
    yield given
    queue.writer.put = put


async def ready(store):
    """A queue whose thread has a connection and rests."""
    queue = CommitQueue(store)
    queue.start()
    first = Asked(store, "first")
    queue.put(first.operation)
    await first.answer()
    await until(lambda: queue._thread == "rests")
    return queue


@pytest.mark.parametrize("count", [1, 30])
async def test_operations_of_one_turn_are_handed_over_once(count):
    """Their statements have run on the loop."""
    store = Store(scopes_max=None)
    queue = await ready(store)
    with handed_over(queue) as given:
        every = [Asked(store, f"{number}") for number in range(count)]
        for asked in every:
            queue.put(asked.operation)
        assert await asyncio.gather(*(asked.answer() for asked in every)) == ["written"] * count
    assert given == [BegunCommit]
    assert [asked.threads for asked in every] == [[threading.main_thread()]] * count
    assert await queue.stop(5)


async def test_an_operation_nobody_waits_for_lingers_to_share_a_commit():
    """It is written by itself if no other comes."""
    store = Store(scopes_max=None)
    queue = await ready(store)
    with handed_over(queue) as given:
        settled, reserved = Asked(store, "settled", lasting=True, may_linger=True), Asked(store, "reserved")
        queue.put(settled.operation)
        await asyncio.sleep(0)
        assert given == []
        queue.put(reserved.operation)
        await asyncio.gather(settled.answer(), reserved.answer())
        assert given == [BegunCommit]
        alone = Asked(store, "alone", lasting=True, may_linger=True)
        queue.put(alone.operation)
        await alone.answer()
    assert given == [BegunCommit, BegunCommit]
    last = Asked(store, "last", lasting=True, may_linger=True)
    queue.put(last.operation)
    assert await queue.stop(5)
    assert store.rows == ["first", "settled", "reserved", "alone", "last"]


async def test_what_its_caller_has_left_before_it_began_is_not_written():
    store = Store(scopes_max=None)
    queue = await ready(store)
    left = Asked(store, "left", wanted=lambda: False)
    queue.put(left.operation)
    lasting = Asked(store, "lasting", wanted=lambda: False, lasting=True)
    queue.put(lasting.operation)
    await lasting.answer()
    assert await queue.stop(5)
    assert (store.rows, left.answers, left.threads) == (["first", "lasting"], [], [])


async def test_after_a_failed_commit_the_thread_answers_all():
    """In the thread's hands a failure is told at once, and what must last is kept until it is written."""
    store = Store("", "down", "down", scopes_max=None)
    queue = await ready(store)
    gone, kept = Asked(store, "gone"), Asked(store, "kept", lasting=True)
    queue.put(gone.operation)
    queue.put(kept.operation)
    await asyncio.sleep(0)
    while_it_commits = Asked(store, "while it commits")
    queue.put(while_it_commits.operation)
    assert isinstance(await gone.answer(), LedgerUnavailable)
    assert isinstance(await while_it_commits.answer(), LedgerUnavailable)
    assert await kept.answer() == "written"
    await until(lambda: queue._thread == "rests")
    again = Asked(store, "again")
    queue.put(again.operation)
    assert await again.answer() == "written"
    assert await queue.stop(5)
    assert store.rows == ["first", "kept", "again"]


async def test_the_thread_rests_only_once_all_its_work_is_done():
    """The thread's report that it rests may cross new work: the connection would be used from both sides."""
    queue = CommitQueue(Store(free=[False], scopes_max=None))
    asked = Asked(Store(), "on its way")
    queue._to_the_thread()
    queue.put(asked.operation)
    queue._receive((), 0)
    assert queue._thread == "works"
    queue._receive((), 1)
    assert queue._thread == "rests"


@pytest.mark.parametrize("seed", range(20))
async def test_every_operation_gets_one_true_answer_whatever_fails(seed):
    """Turns and commits fail by chance."""
    chance = random.Random(seed)
    fails = [chance.choice(["", "", "", "down", "carried out"]) for _ in range(40)]
    free = [chance.random() < 0.7 for _ in range(40)]
    store = Store(*fails, scopes_max=None, free=free)
    queue = CommitQueue(store)
    queue.start()
    every = [Asked(store, f"{number}", lasting=chance.random() < 0.5, may_linger=chance.random() < 0.3) for number in range(40)]
    for asked in every:
        queue.put(asked.operation)
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.012]))
    assert await queue.stop(20)
    assert [len(asked.answers) for asked in every if asked.operation.lasting] == [1] * sum(asked.operation.lasting for asked in every)
    assert len(store.rows) == len(set(store.rows)), "written twice"
    for asked in every:
        said = [answer for answer in asked.answers if answer == "written"]
        assert len(said) <= 1
        if asked.operation.lasting or said:
            assert (asked.name in store.rows) == bool(said)


async def longest_pause_s(during):
    """The longest time for which the loop did not come round while `during` was awaited."""
    pauses, task = [0.0], asyncio.ensure_future(during)
    while not task.done():
        before = time.monotonic()
        await asyncio.sleep(0.001)
        pauses.append(time.monotonic() - before)
    return max(pauses), task.result()


@contextmanager
def another_writers_turn(path):
    with (folder(path) / "write").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def a_shell_that_takes_no_turn(path):
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    yield
    db.execute("ROLLBACK")
    db.close()


@pytest.mark.parametrize("holding", [another_writers_turn, a_shell_that_takes_no_turn])
async def test_the_loop_goes_round_while_another_holds_the_ledger(tmp_path, holding):
    path = tmp_path / "gateway.db"
    sqlite_files.create(path)
    store = FileStore(path)
    queue = await ready(store)
    asked = Asked(store)
    with holding(path):
        queue.put(asked.operation)
        pause_s, _ = await longest_pause_s(asyncio.sleep(0.3))
        assert asked.answers == []
    pause_too_s, answer = await longest_pause_s(asked.answer())
    assert answer == "written"
    assert max(pause_s, pause_too_s) < 0.2
    await until(lambda: queue._thread == "rests")  # and the thread gives it back
    assert await queue.stop(5)
    await store.close()
