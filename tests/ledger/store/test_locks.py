"""Several processes on one file: one budget, fair turns, and what becomes of the dead."""

import asyncio
import json
import signal
import subprocess
import sys

import pytest
from ledgers import CALL, DAY_CAP, NOON, Part, balance, new_ledger, rows

from gateway_addon.ledger import Ledger, Reserved, Settlement
from gateway_addon.ledger.store.locks import OwnerLock, is_dead

WORKER = """
import asyncio, json, sys
sys.path.insert(0, {tests!r})
from ledgers import CALL, DAY_CAP, NOON, Cap
from gateway_addon.ledger import Ledger, Reserved, Settlement

async def main():
    ledger = await Ledger.open({url!r}, now=NOON)
    {body}

asyncio.run(main())
"""

HOLD_AND_WAIT = """
    held = [await ledger.reserve(CALL, 100, DAY_CAP, now=NOON) for _ in range(3)]
    print(json.dumps([each.call_id for each in held]), flush=True)
    await asyncio.sleep(60)
"""
SPEND = """
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    async def call():
        while getattr(answer := await ledger.reserve(CALL, 10, DAY_CAP, now=NOON), "reason", "") == "cap_held":
            await asyncio.sleep(0.02)
        if isinstance(answer, Reserved):
            await ledger.settle(answer, Settlement(7), now=NOON)
        return isinstance(answer, Reserved)
    for _ in range(4):
        print(json.dumps(sum(await asyncio.gather(*(call() for _ in range(25))))), flush=True)
    await ledger.close()
"""
CRASH_UNDER_LOAD = """
    print("ready", flush=True)
    async def call():
        while True:
            answer = await ledger.reserve(CALL, 10, [Cap("app:reports", "day", 100_000)], now=NOON)
            print(json.dumps(answer.call_id), flush=True)
            await ledger.settle(answer, Settlement(10), now=NOON)
    await asyncio.gather(*(call() for _ in range(8)))
"""


@pytest.fixture
def path(tmp_path):
    return new_ledger(tmp_path)


@pytest.fixture
def start(path, request):
    """Start a worker process on the ledger; each is ended with the test."""
    running = []

    def run(body):
        code = WORKER.format(tests=str(request.path.parents[2] / "support"), url=f"sqlite:///{path}", body=body.strip())
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def test_processes_share_one_cap_and_use_it_up(start, path):
    workers = [start(SPEND) for _ in range(3)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    admitted = sum(int(line) for worker in workers for line in worker.communicate(timeout=60)[0].split())
    spent, reserved, still_open = balance(path)
    assert (reserved, still_open) == (0, 0)
    assert spent == 7 * admitted
    assert 990 < spent <= 1000


async def test_a_killed_processs_calls_are_settled_a_siblings_are_not(start, path):
    """The living sibling's reservation stays open."""
    dying, living = start(HOLD_AND_WAIT), start(HOLD_AND_WAIT)
    orphans = json.loads(await asyncio.to_thread(dying.stdout.readline))
    alive = json.loads(await asyncio.to_thread(living.stdout.readline))
    dying.send_signal(signal.SIGKILL)
    dying.wait()
    ledger = await Ledger.open(f"sqlite:///{path}", now=NOON)
    states = dict(rows(path, "SELECT id, state || ' ' || flags FROM calls"))
    assert {states[call_id] for call_id in orphans} == {"settled estimated orphan"}
    assert {states[call_id] for call_id in alive} == {"open "}
    assert balance(path) == (300, 300, 3)
    assert await ledger.sweep(now=NOON) == 0
    living.kill()
    living.wait()
    assert await ledger.sweep(now=NOON) == 3
    assert balance(path) == (600, 0, 0)
    await ledger.close()
    assert rows(path, "SELECT count(*) FROM owners") == [(1,)]


@pytest.mark.parametrize("kills", [pytest.param(3, id="few"), pytest.param(100, id="many", marks=pytest.mark.soak)])
async def test_a_kill_at_any_instant_loses_no_answered_reservation(start, path, kills):
    answered = set()
    for number in range(kills):
        worker = start(CRASH_UNDER_LOAD)
        assert await asyncio.to_thread(worker.stdout.readline) == "ready\n"
        answered.add(int(await asyncio.to_thread(worker.stdout.readline)))
        await asyncio.sleep(0.013 * (number % 7))
        worker.kill()
        lines = (await asyncio.to_thread(worker.stdout.read)).split("\n")[:-1]
        answered |= {int(line) for line in lines}
    ledger = await Ledger.open(f"sqlite:///{path}", now=NOON)
    await ledger.close()
    settled = rows(path, "SELECT id FROM calls WHERE state = 'settled'")
    assert answered <= {call_id for (call_id,) in settled}
    assert balance(path) == (10 * len(settled), 0, 0)
    assert rows(path, "SELECT sum(spent_nano) FROM entries") == [(10 * len(settled),)]


def test_a_lock_dies_with_its_holder_and_not_before(tmp_path):
    lock = OwnerLock(tmp_path / "gateway.db")
    assert not is_dead(tmp_path / "gateway.db", lock.owner)
    lock.close()
    assert is_dead(tmp_path / "gateway.db", lock.owner)


async def test_a_childs_program_does_not_keep_its_parents_lock(path):
    ledger = await Ledger.open(f"sqlite:///{path}", now=NOON)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    owner = ledger.owner
    await ledger.close()
    lock_file = path.with_name("gateway.db-locks") / f"owner-{owner}"
    lock_file.touch()
    assert is_dead(path, owner)
    child.communicate(b"\n")


async def test_an_orphan_with_a_known_part_is_settled_at_all_it_held(path):
    held = await _reserve_and_vanish(path)
    ledger = await Ledger.open(f"sqlite:///{path}", now=NOON)
    assert not (await ledger.settle(held, Settlement(1, (Part(1),)), now=NOON)).first, "the sweep was first"
    await ledger.close()
    assert balance(path) == (250, 0, 0)


async def _reserve_and_vanish(path):
    """A process that ends without a word, in this one: its lock is let go, its reservation stays."""
    ledger = await Ledger.open(f"sqlite:///{path}", now=NOON)
    answer = await ledger.reserve(CALL, 250, DAY_CAP, now=NOON)
    assert isinstance(answer, Reserved)
    await ledger.close()
    return answer
