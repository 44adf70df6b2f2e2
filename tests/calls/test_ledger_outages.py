"""A ledger that fails under a running gateway: each call is refused with 503, nothing is forwarded, and it goes on by itself afterwards."""

import contextlib
import os
import sqlite3

import anthropic
import pytest
from broken_disk import Broken, disk_error
from gateway import gateway
from ledgers import reconnect, rows

from gateway_addon.ledger import Ledger, LedgerUnavailable
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.simulator import Behaviour, Simulator

HELLO = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}


@contextlib.contextmanager
def disk_says(code, ledger, path):
    """The disk answers each write with an error of SQLite's."""
    real = sqlite_files.writer_connection
    sqlite_files.writer_connection = lambda path: Broken(real(path), "COMMIT", disk_error(code))
    reconnect(ledger)
    try:
        yield
    finally:
        sqlite_files.writer_connection = real


@contextlib.contextmanager
def locked(ledger, path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        yield
        shell.execute("ROLLBACK")


@contextlib.contextmanager
def removed(ledger, path):
    path.rename(path.with_name("away.db"))
    yield
    path.with_name("away.db").rename(path)


@contextlib.contextmanager
def replaced(ledger, path):
    away = [(part, part.with_name(f"away-{part.name}")) for part in sorted(path.parent.glob("gateway.db*")) if part.is_file()]
    for part, kept in away:  # with its log: SQLite would read another file's as its own
        part.rename(kept)
    sqlite_files.create(path)
    yield
    for part, kept in away:
        os.replace(kept, part)


FAULTS = {
    "full": lambda *where: disk_says(sqlite3.SQLITE_FULL, *where),
    "read-only": lambda *where: disk_says(sqlite3.SQLITE_READONLY, *where),
    "broken": lambda *where: disk_says(sqlite3.SQLITE_IOERR, *where),
    "locked": locked,
    "removed": removed,
    "replaced": replaced,
}


async def test_failing_ledger_refuses_calls_until_it_is_back(tmp_path, monkeypatch):
    """A failing ledger refuses every call, and is used again when it is back."""
    path = tmp_path / "gateway.db"
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        monkeypatch.setattr(gw.gateway.ledger, "_timeout_s", 0.5)
        for number, (name, fault) in enumerate(FAULTS.items(), start=1):
            before = api.book.bytes_received
            with fault(gw.gateway.ledger, path):
                with pytest.raises(anthropic.InternalServerError) as refused:
                    await gw.client().messages.create(**HELLO)
                answer = refused.value.response
                assert (answer.status_code, answer.headers["x-gateway-refusal"], answer.headers["retry-after"]) == (503, "ledger", "1"), name
                assert api.book.bytes_received == before, f"{name}: nothing was forwarded"
            await gw.client().messages.create(**HELLO)  # nobody has restarted anything
            await gw.quiet()
            assert len((await api.settled()).messages()) == number, name
        assert await gw.spent_nano() == api.book.billed_nano
    assert rows(path, "SELECT count(*) FROM calls WHERE state = 'settled'") == [(len(FAULTS),)]


async def test_call_in_flight_at_a_full_disk_is_settled_once(tmp_path):
    """A call in flight when the disk fills up is settled once, as soon as there is room."""
    async with Simulator(behaviour=Behaviour(delay_ms=5)) as api, gateway(tmp_path, api) as gw:
        async with gw.client().messages.stream(**HELLO) as stream:
            with disk_says(sqlite3.SQLITE_FULL, gw.gateway.ledger, tmp_path / "gateway.db"):
                await stream.get_final_message()
        await gw.quiet()
        assert await gw.spent_nano() == (await api.settled()).billed_nano > 0
    assert rows(tmp_path / "gateway.db", "SELECT count(*) FROM entries WHERE kind = 'settle'") == [(1,)]


async def test_damaged_ledger_forwards_nothing_and_says_what_to_do(tmp_path, caplog):
    """A damaged ledger refuses every call with an instruction, and nothing is forwarded."""
    path = tmp_path / "gateway.db"
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        await gw.client().messages.create(**HELLO)
        await gw.quiet()
        before = api.book.bytes_received
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        with path.open("r+b") as file:  # in place: every page but the first
            file.seek(4096)
            file.write(os.urandom(path.stat().st_size - 4096))
        reconnect(gw.gateway.ledger)
        with pytest.raises(anthropic.InternalServerError) as refused:
            await gw.client().messages.create(**HELLO)
        assert refused.value.response.headers["x-gateway-refusal"] == "ledger"
        assert api.book.bytes_received == before
    assert "keep the file" in caplog.text
    with pytest.raises(LedgerUnavailable, match=r"is damaged: stop the gateway, keep the file, restore the last backup"):
        await Ledger.open(f"sqlite:///{path}")
