"""A disk that fails, a file that goes, a lock that stays: refused at once, written when it is back, nothing lost, nothing twice."""

import asyncio
import fcntl
import os
import sqlite3
from contextlib import closing

import pytest
from broken_disk import Broken, disk_error
from ledgers import CALL, DAY_CAP, NOON, balance, new_ledger, reconnect, rows, until

from gateway_addon.ledger import Ledger, LedgerUnavailable, Reserved, Settlement, connect
from gateway_addon.ledger.store import sqlite_files, writer


@pytest.fixture
def path(tmp_path):
    return new_ledger(tmp_path)


@pytest.fixture(params=[60])
async def ledger(path, request):
    opened = await Ledger.open(f"sqlite:///{path}", timeout_s=request.param, now=NOON)
    yield opened
    await opened.close()


IMPATIENT = pytest.mark.parametrize("ledger", [0.6], indirect=True)


@pytest.fixture
def broken_disk(monkeypatch):
    """Break every connection that the writer opens while the switch is on."""
    real = sqlite_files.writer_connection
    switch = {}

    def connect(path):
        db = real(path)
        return Broken(db, **switch) if switch else db

    monkeypatch.setattr(sqlite_files, "writer_connection", connect)
    return switch


async def refused(ledger, text):
    async with asyncio.timeout(60):
        with pytest.raises(LedgerUnavailable, match=text):
            await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)


FAULTS = [
    (sqlite3.SQLITE_FULL, "is full"),
    (sqlite3.SQLITE_READONLY, "cannot be written"),
    (sqlite3.SQLITE_IOERR, "reports an error"),
    (sqlite3.SQLITE_CORRUPT, "restore the last backup"),
    (sqlite3.SQLITE_CANTOPEN, "cannot be opened"),
]


@pytest.mark.parametrize(("code", "text"), FAULTS)
@pytest.mark.parametrize("statement", ["BEGIN", "\nINSERT INTO calls", "INSERT INTO entries", "COMMIT"])
async def test_a_failing_disk_refuses_at_once_and_keeps_settlements(ledger, path, broken_disk, code, text, statement):
    """The ledger recovers with the disk."""
    held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
    reconnect(ledger)
    broken_disk.update(statement=statement.strip(), error=disk_error(code))
    settled = ledger.settle(held, Settlement(200), now=NOON)
    await refused(ledger, text)
    assert not settled.done() or "calls" in statement, "a settlement inserts no call, so its next try is written"
    broken_disk.clear()
    assert (await asyncio.wait_for(settled, 60)).first
    assert isinstance(await ledger.reserve(CALL, 800, DAY_CAP, now=NOON), Reserved)
    assert balance(path) == (200, 800, 1)


@pytest.mark.parametrize("carried_out", [True, False])
async def test_after_a_commit_in_doubt_the_truth_is_looked_up(ledger, path, broken_disk, carried_out):
    """An error at COMMIT may come after the frames are on disk. The settlement is written once; a reservation answered as refused is
    given back."""
    held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
    reconnect(ledger)
    broken_disk.update(statement="COMMIT", error=disk_error(), after=carried_out)
    settled = ledger.settle(held, Settlement(200), now=NOON)
    await refused(ledger, "reports an error")
    broken_disk.clear()
    assert (await asyncio.wait_for(settled, 60)).first
    await until(lambda: balance(path) == (200, 0, 0))
    assert rows(path, "SELECT count(*) FROM entries WHERE kind = 'settle'") == [(1,)]


async def test_a_commit_in_doubt_is_looked_up_if_no_work_follows(ledger, path, broken_disk):
    """A reservation that was answered as refused does not hold the budget of an idle gateway."""
    reconnect(ledger)
    broken_disk.update(statement="COMMIT", error=disk_error(), after=True)
    await refused(ledger, "reports an error")
    assert balance(path) == (0, 100, 1)
    broken_disk.clear()
    await until(lambda: balance(path) == (0, 0, 0))


async def test_a_full_disk_is_survived(ledger, path):
    """The real thing: SQLite may grow the file no further."""
    held = await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)
    pages = await ledger.change(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    await ledger.change(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchall())

    async def fill():
        for _ in range(500):
            call = await ledger.reserve(CALL, 0, DAY_CAP, now=NOON)
            await ledger.settle(call, Settlement(0), now=NOON)

    with pytest.raises(LedgerUnavailable, match="is full"):
        await fill()
    settled = await asyncio.wait_for(ledger.settle(held, Settlement(60), now=NOON), 60)  # the new connection has no such limit
    assert settled.first
    assert balance(path)[:2] == (60, 0)


@IMPATIENT
async def test_a_foreign_lock_delays_then_refuses_and_loses_nothing(ledger, path):
    held = await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        settled = ledger.settle(held, Settlement(60), now=NOON)
        await refused(ledger, "did not answer within 0.6 s")
        shell.execute("ROLLBACK")
    assert (await asyncio.wait_for(settled, 60)).first
    await asyncio.sleep(0.05)
    assert balance(path) == (60, 0, 0), "the refused reservation was not written afterwards"


@IMPATIENT
async def test_a_stuck_sibling_in_its_turn_delays_and_then_refuses(ledger, path):
    turn = os.open(path.with_name("gateway.db-locks") / "write", os.O_RDWR)
    fcntl.flock(turn, fcntl.LOCK_EX)
    await refused(ledger, "did not answer within")
    os.close(turn)
    assert isinstance(await ledger.reserve(CALL, 100, DAY_CAP, now=NOON), Reserved)


async def test_a_short_lock_only_delays(ledger, path):
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(ledger.reserve(CALL, 100, DAY_CAP, now=NOON))
        await asyncio.sleep(0.1)
        shell.execute("ROLLBACK")
    assert isinstance(await waiting, Reserved)


async def test_a_removed_file_refuses_calls_until_it_is_put_back(ledger, path):
    held = await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)
    path.rename(path.with_name("away.db"))
    await refused(ledger, "was removed while the gateway runs")
    with pytest.raises(LedgerUnavailable, match="was removed"):
        await ledger.look_up_token("d1", now=NOON)
    settled = ledger.settle(held, Settlement(60), now=NOON)
    assert not path.exists(), "nothing makes a new ledger"
    path.with_name("away.db").rename(path)
    assert (await asyncio.wait_for(settled, 60)).first
    assert balance(path) == (60, 0, 0)


async def test_a_replaced_file_refuses(ledger, path):
    for each in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        each.rename(each.with_name(f"away-{each.name}"))
    sqlite_files.create(path)
    await refused(ledger, "was replaced while the gateway runs")
    with pytest.raises(LedgerUnavailable, match="was replaced"):
        await ledger.look_up_token("d1", now=NOON)


async def test_a_damaged_file_says_what_to_do(tmp_path, caplog):
    path = tmp_path / "gateway.db"
    path.write_bytes(b"not a ledger at all" * 500)
    with pytest.raises(LedgerUnavailable, match="not a ledger or is damaged: stop the gateway, keep the file"):
        await Ledger.open(f"sqlite:///{path}")
    assert not caplog.records, "who opens it says why it cannot be opened"
    with pytest.raises(LedgerUnavailable, match="not a ledger or is damaged"), connect.changing(path):
        pass


async def test_another_programs_database_is_no_ledger(tmp_path):
    path = tmp_path / "gateway.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(LedgerUnavailable, match="another program's file, not a ledger"):
        await Ledger.open(f"sqlite:///{path}")
    assert rows(path, "SELECT name FROM sqlite_master") == [("theirs",)]


async def test_an_outage_is_logged_once_not_once_a_call(ledger, path, caplog):
    path.rename(path.with_name("away.db"))
    for _ in range(5):
        await refused(ledger, "was removed")
    assert sum("was removed" in record.message for record in caplog.records) == 1
    path.with_name("away.db").rename(path)


async def test_a_backlog_lets_records_go_but_never_money(ledger, path, monkeypatch, caplog):
    monkeypatch.setattr("gateway_addon.ledger.ledger.BACKLOG_MAX", 10)
    held = await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)
    turn = os.open(path.with_name("gateway.db-locks") / "write", os.O_RDWR)
    fcntl.flock(turn, fcntl.LOCK_EX)
    for _ in range(100):
        ledger.refused(CALL, "rate", now=NOON)
    settled = ledger.settle(held, Settlement(60), now=NOON)
    os.close(turn)
    assert (await settled).first
    kept = rows(path, "SELECT count(*) FROM calls WHERE state = 'refused'")[0][0]
    assert kept <= 10 + writer.BATCH_MAX
    assert kept < 100
    assert "is behind" in caplog.text
