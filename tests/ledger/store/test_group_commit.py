"""From the loop to the writer's thread and back: nothing is lost, told twice or waited for by the loop on the way."""

import asyncio
import fcntl
import random
import sqlite3
import threading
from contextlib import contextmanager

import pytest
from ledgers import CALL, DAY_CAP, NOON, Part, balance, new_ledger, until, url
from stores import Store

from gateway_addon.ledger import Ledger, LedgerUnavailable, Settlement
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.ledger.store.locks import folder
from gateway_addon.ledger.store.sqlite import FileStore
from gateway_addon.ledger.store.writer import Operation, Writer


class Asked:
    """An operation that notes on which thread it ran, and its answers."""

    def __init__(self, store, name="row", *, lasting=False, wanted=lambda: True):
        self.answers, self.threads, self.name, self._store = [], [], name, store
        self.operation = Operation(self._apply, 0, lasting=lasting, wanted=wanted, emit=self.answers.append)

    def _apply(self, db):
        self.threads.append(threading.current_thread())
        if isinstance(self._store, Store):
            self._store._begun.append(self.name)
        return "written"

    async def answer(self):
        await until(lambda: self.answers)
        return self.answers[0]


def started(store) -> Writer:
    """A writer that answers on this loop."""
    loop = asyncio.get_running_loop()

    def emit(answers):
        for answer in answers:
            answer.operation.emit(answer.value)

    writer = Writer(store, lambda answers: loop.call_soon_threadsafe(emit, answers))
    writer.start()
    return writer


async def stopped(writer) -> bool:
    ended = await asyncio.to_thread(writer.stop, 20)
    await asyncio.sleep(0)
    return ended


async def ready(store) -> Writer:
    """A writer that has a connection."""
    writer = started(store)
    writer.put((first := Asked(store, "first")).operation)
    await first.answer()
    return writer


async def test_operations_that_wait_together_share_one_commit():
    """While one commit is on its way, thirty more arrive."""
    store, count, held = Store(scopes_max=None), 30, threading.Event()
    queue = await ready(store)
    commit = store.commit
    store.commit = lambda db: (held.wait(60), commit(db))
    before = queue._commits
    every = [Asked(store, "alone"), *(Asked(store, f"{number}") for number in range(count))]
    queue.put(every[0].operation)
    await until(lambda: every[0].threads)
    for asked in every[1:]:
        queue.put(asked.operation)
    held.set()
    assert await asyncio.gather(*(asked.answer() for asked in every)) == ["written"] * (count + 1)
    assert queue._commits - before == 2
    assert not {threading.main_thread()} & {thread for asked in every for thread in asked.threads}, "the loop ran statements"
    assert await stopped(queue)


async def test_what_nobody_waits_for_shares_the_next_commit(tmp_path, monkeypatch):
    """It lingers for a moment, and is written by itself if no other comes, and before the end."""
    monkeypatch.setattr("gateway_addon.ledger.ledger.LINGER_S", 20.0)
    path = new_ledger(tmp_path, "sqlite")
    ledger = await Ledger.open(url(path), now=NOON)
    held = [await ledger.reserve(CALL, 10, DAY_CAP, now=NOON) for _ in range(3)]
    before = ledger._writer._commits
    settled = ledger.settle(held[0], Settlement(1, (Part(1),)), now=NOON)
    await asyncio.sleep(0.02)
    assert not settled.done()
    await ledger.reserve(CALL, 10, DAY_CAP, now=NOON)
    assert settled.done(), "with the reservation, not after it"
    assert ledger._writer._commits - before <= 2, "the lease may be renewed in between"
    monkeypatch.setattr("gateway_addon.ledger.ledger.LINGER_S", 0.01)
    ledger._alarm.cancel()
    ledger._on_alarm()
    assert (await ledger.settle(held[1], Settlement(2, (Part(2),)), now=NOON)).first
    ledger.settle(held[2], Settlement(4, (Part(4),)), now=NOON)
    await ledger.close()
    assert balance(path) == (7, 10, 1)


async def test_what_its_caller_has_left_before_it_began_is_not_written():
    store = Store(scopes_max=None)
    queue = await ready(store)
    left = Asked(store, "left", wanted=lambda: False)
    queue.put(left.operation)
    lasting = Asked(store, "lasting", wanted=lambda: False, lasting=True)
    queue.put(lasting.operation)
    await lasting.answer()
    assert await stopped(queue)
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
    again = Asked(store, "again")
    queue.put(again.operation)
    assert await again.answer() == "written"
    assert await stopped(queue)
    assert store.rows == ["first", "kept", "again"]


@pytest.mark.parametrize("seed", range(20))
async def test_every_operation_gets_one_true_answer_whatever_fails(monkeypatch, seed):
    """Commits fail by chance."""
    monkeypatch.setattr("gateway_addon.ledger.store.writer.BACKOFF_S", (0.001, 0.01, 0.02))
    chance = random.Random(seed)
    fails = [chance.choice(["", "", "", "down", "carried out"]) for _ in range(40)]
    store = Store(*fails, scopes_max=None)
    queue = started(store)
    every = [Asked(store, f"{number}", lasting=chance.random() < 0.5) for number in range(40)]
    for asked in every:
        queue.put(asked.operation)
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.012]))
    assert await stopped(queue)
    assert [len(asked.answers) for asked in every if asked.operation.lasting] == [1] * sum(asked.operation.lasting for asked in every)
    assert len(store.rows) == len(set(store.rows)), "written twice"
    for asked in every:
        said = [answer for answer in asked.answers if answer == "written"]
        assert len(said) <= 1
        if asked.operation.lasting or said:
            assert (asked.name in store.rows) == bool(said)


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
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert asked.answers == [], "a loop that waited for the lock would have come round once, with an error"
    assert await asked.answer() == "written"
    assert await stopped(queue)
    await store.close()
