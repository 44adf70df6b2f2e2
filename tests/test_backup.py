"""Backups: one consistent moment while gateways write, and nothing put in a living ledger's place."""

import asyncio
import sqlite3
import time
from contextlib import closing

import pytest
from click.testing import CliRunner
from ledgers import CALL, Part, balance, new_ledger, rows

from gateway_addon.cli.backup import backup, restore
from gateway_addon.ledger import Ledger, LedgerUnavailable, Settlement, admin, copies, proof


def run(command, file, ledger):
    result = CliRunner().invoke(command, [str(file), "--ledger", f"sqlite:///{ledger}"])
    return result.exit_code, result.output


async def spend(ledger, calls):
    for _ in range(calls):
        held = await ledger.reserve(CALL, 100, [], now=time.time())
        await ledger.settle(held.call_id, Settlement(10, (Part(10),)), now=time.time())


async def test_a_backup_under_load_is_a_sound_ledger_and_stops_nobody(tmp_path):
    path = new_ledger(tmp_path)
    ledger = await Ledger.open(f"sqlite:///{path}")
    working = [asyncio.ensure_future(spend(ledger, 25)) for _ in range(4)]
    seen = []
    while not all(task.done() for task in working):
        copy = tmp_path / f"copy-{len(seen)}.db"
        seen.append(await asyncio.to_thread(copies.backup, path, copy))
        with admin.reading(copy) as db:
            assert proof.findings(db) == []
    await asyncio.gather(*working)
    await ledger.close()
    assert len(seen) >= 2
    assert seen == sorted(seen)
    assert balance(path) == (1000, 0, 0)


def test_what_is_restored_is_what_was_backed_up_and_what_was_there_is_kept(tmp_path):
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    assert run(backup, copy, path)[0] == 0
    assert copy.stat().st_mode & 0o777 == 0o600
    with admin.changing(path) as db:
        admin.pause(db, "app:reports", why="later", who="test", now=1.0)
    code, output = run(restore, copy, path)
    assert code == 0, output
    assert rows(path, "SELECT count(*) FROM pauses") == [(0,)]
    [kept] = tmp_path.glob("gateway.db.before-*")
    assert str(kept) in output
    assert rows(kept, "SELECT why FROM pauses") == [("later",)]


async def test_what_was_open_in_a_backup_is_settled_at_what_it_held_when_a_gateway_starts_on_it(tmp_path):
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    ledger = await Ledger.open(f"sqlite:///{path}")
    await ledger.reserve(CALL, 100, [], now=time.time())
    copies.backup(path, copy)
    await ledger.close()
    elsewhere = tmp_path / "elsewhere.db"
    copies.restore(copy, elsewhere, now=1.0)
    assert balance(elsewhere) == (0, 100, 1)
    await (await Ledger.open(f"sqlite:///{elsewhere}")).close()
    assert balance(elsewhere) == (100, 0, 0)


async def test_a_ledger_in_use_is_not_replaced(tmp_path):
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    copies.backup(path, copy)
    ledger = await Ledger.open(f"sqlite:///{path}")
    try:
        with pytest.raises(LedgerUnavailable, match=r"is in use by .*: stop the gateway"):
            copies.restore(copy, path, now=1.0)
        await spend(ledger, 1)
    finally:
        await ledger.close()


def test_a_copy_that_is_not_sound_replaces_nothing(tmp_path):
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    copies.backup(path, copy)
    with closing(sqlite3.connect(copy)) as db:
        db.execute("INSERT INTO balances VALUES ('total', 'ever', 0, 5, 0, 0, 0)")
        db.commit()
    before = path.stat().st_ino
    code, output = run(restore, copy, path)
    assert (code, path.stat().st_ino) == (2, before)
    assert "balance total ever" in output


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is another program's file, not a ledger"), (b"not a database" * 100, "is not a ledger or is damaged"), (None, "there is no backup at")],
)
def test_what_is_no_backup_is_named(tmp_path, content, sentence):
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    if content is not None:
        copy.write_bytes(content)
    code, output = run(restore, copy, path)
    assert code == 2
    assert sentence in output
    assert not list(tmp_path.glob(".gateway.db*")) + list(tmp_path.glob("*before*"))


@pytest.mark.parametrize(("name", "sentence"), [("there.db", "exists already"), ("no/folder.db", "does not exist: make it")])
def test_a_backup_goes_where_nothing_is(tmp_path, name, sentence):
    path = new_ledger(tmp_path)
    (tmp_path / "there.db").write_text("precious")
    code, output = run(backup, tmp_path / name, path)
    assert code == 2
    assert sentence in output
    assert (tmp_path / "there.db").read_text() == "precious"
