"""Backups: one consistent moment while gateways write, and nothing put in a living ledger's place."""

import asyncio
import fcntl
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing

import pytest
from click.testing import CliRunner
from ledgers import CALL, Part, balance, new_ledger, rows

from gateway_addon.cli.backup import backup, restore
from gateway_addon.ledger import Ledger, LedgerUnavailable, Settlement, access, admin, connect
from gateway_addon.ledger.maintenance import backup as ledger_backup
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.store import sqlite_files


def run(command, file, ledger):
    result = CliRunner().invoke(command, [str(file), "--ledger", f"sqlite:///{ledger}"])
    return result.exit_code, result.output


async def spend(ledger, calls):
    for _ in range(calls):
        held = await ledger.reserve(CALL, 100, [], now=time.time())
        await ledger.settle(held, Settlement(10, (Part(10),)), now=time.time())


async def test_a_backup_under_load_is_a_sound_ledger_and_stops_nobody(tmp_path):
    path = new_ledger(tmp_path)
    ledger = await Ledger.open(f"sqlite:///{path}")
    working = [asyncio.ensure_future(spend(ledger, 25)) for _ in range(4)]
    seen = []
    while not all(task.done() for task in working):
        copy = tmp_path / f"copy-{len(seen)}.db"
        seen.append(await asyncio.to_thread(ledger_backup.backup, path, copy))
        with connect.reading(copy) as db:
            assert invariants.findings(db) == []
    await asyncio.gather(*working)
    await ledger.close()
    assert len(seen) >= 2
    assert seen == sorted(seen)
    assert balance(path) == (1000, 0, 0)


def test_restore_brings_the_backup_and_keeps_the_replaced_files(tmp_path):
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    assert run(backup, copy, path)[0] == 0
    assert copy.stat().st_mode & 0o777 == 0o600
    with connect.changing(path) as db:
        admin.pause(db, "app:reports", why="later", who="test", now=1.0)
    code, output = run(restore, copy, path)
    assert code == 0, output
    assert rows(path, "SELECT count(*) FROM pauses") == [(0,)]
    [kept] = tmp_path.glob("gateway.db.before-*")
    assert str(kept) in output
    assert rows(kept, "SELECT why FROM pauses") == [("later",)]


async def test_an_open_call_in_a_backup_is_settled_at_the_held_amount(tmp_path):
    """The next gateway that starts on the restored ledger settles it."""
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    ledger = await Ledger.open(f"sqlite:///{path}")
    await ledger.reserve(CALL, 100, [], now=time.time())
    ledger_backup.backup(path, copy)
    await ledger.close()
    elsewhere = tmp_path / "elsewhere.db"
    ledger_backup.restore(copy, elsewhere, now=1.0)
    assert balance(elsewhere) == (0, 100, 1)
    await (await Ledger.open(f"sqlite:///{elsewhere}")).close()
    assert balance(elsewhere) == (100, 0, 0)


async def test_a_ledger_in_use_is_not_replaced(tmp_path):
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    ledger_backup.backup(path, copy)
    ledger = await Ledger.open(f"sqlite:///{path}")
    try:
        with pytest.raises(LedgerUnavailable, match=r"is in use by .*: stop the gateway"):
            ledger_backup.restore(copy, path, now=1.0)
        await spend(ledger, 1)
    finally:
        await ledger.close()


def test_a_copy_that_is_not_sound_replaces_nothing(tmp_path):
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    ledger_backup.backup(path, copy)
    with closing(sqlite3.connect(copy)) as db:
        db.execute("INSERT INTO balances VALUES ('total', 'ever', 0, 5, 0, 0, 0)")
        db.commit()
    before = path.stat().st_ino
    code, output = run(restore, copy, path)
    assert (code, path.stat().st_ino) == (2, before)
    assert "balance total ever" in output


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is an empty file, not a ledger"), (b"not a database" * 100, "is not a ledger or is damaged"), (None, "There is no backup at")],
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


@pytest.mark.parametrize("name", ["gateway.db-wal", "gateway.db-shm", "x.db-journal"])
def test_a_backup_is_not_given_the_name_of_a_log(tmp_path, name):
    code, output = run(backup, tmp_path / name, new_ledger(tmp_path))
    assert (code, (tmp_path / name).exists()) == (2, False)
    assert "is how SQLite calls a part of another database" in output


@pytest.mark.parametrize("left", ["-wal", "-journal"])
def test_nothing_is_made_beside_the_log_of_another_database(tmp_path, left):
    path = new_ledger(tmp_path)
    for name, make in (("copy.db", ledger_backup.backup), ("new.db", lambda _, new: sqlite_files.create(new))):
        (log := tmp_path / f"{name}{left}").write_text("frames")
        with pytest.raises(LedgerUnavailable, match="is left of another database"):
            make(path, tmp_path / name)
        assert (log.read_text(), (tmp_path / name).exists()) == ("frames", False)


def test_the_next_backup_removes_a_killed_ones_file(tmp_path):
    """The files of running backups stay, and so do files that only have a similar name."""
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    left, living, alike = tmp_path / ".copy.db.4711", tmp_path / ".copy.db.4712", tmp_path / ".copy.db.notes"
    for each in (left, left.with_name(left.name + "-wal"), living, alike):
        each.touch()
    with living.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ledger_backup.backup(path, copy)
    assert sorted(each.name for each in tmp_path.glob(".*")) == [".copy.db.4712", ".copy.db.notes"]


# A restore that is killed. The old ledger's last change is in its log alone, as a gateway that was killed leaves it.


def torn(folder) -> None:
    """A folder with such a ledger, `gateway.db`, and a backup that was made before the change, `copy.db`."""
    path = new_ledger(folder)
    ledger_backup.backup(path, folder / "copy.db")
    with closing(sqlite_files.writer_connection(path)) as db:
        db.execute("PRAGMA wal_autocheckpoint = 0")
        admin.pause(db, "app:reports", why="in the log", who="test", now=1.0)
        (folder / "as-killed").mkdir()
        for beside in access.BESIDE:
            shutil.copy(f"{path}{beside}", folder / "as-killed" / f"gateway.db{beside}")
    for each in (folder / "as-killed").iterdir():
        each.replace(folder / each.name)
    (folder / "as-killed").rmdir()


def whole(path) -> bool:
    """Whether a database, with its log, is the old ledger and has its last change. Looks at a copy: opening it changes files."""
    with tempfile.TemporaryDirectory() as place:
        for beside in ("", "-wal"):
            if (part := path.with_name(path.name + beside)).exists():
                shutil.copy(part, f"{place}/x{beside}")
        with closing(sqlite3.connect(f"{place}/x")) as db:
            return db.execute("SELECT why FROM pauses").fetchall() == [("in the log",)]


KILLED = """
import os, shutil, sys
from pathlib import Path
from gateway_addon.ledger.maintenance import backup

folder, steps = Path(sys.argv[1]), 0
DURABLE = ("os.link", "os.rename", "os.remove")

def die(event, arguments):
    global steps
    if event in DURABLE and "gateway.db" in str(arguments[0]):
        steps -= 1
        if steps == 0:
            os._exit(9)

for n in range(1, 30):
    shutil.copytree(folder / "torn", folder / str(n))
    child = os.fork()
    if child == 0:
        steps = n
        sys.addaudithook(die)
        backup.restore(folder / str(n) / "copy.db", folder / str(n) / "gateway.db", now=1.0)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(n)
"""


def test_a_restore_that_is_killed_at_any_step_loses_nothing(tmp_path):
    """Killed before each link, rename and removal: the name holds the whole old ledger, or the new one, or nothing that a gateway
    would open; the old one is whole somewhere; and the next restore ends well."""
    (tmp_path / "torn").mkdir()
    torn(tmp_path / "torn")
    made = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True)
    steps = int(made.stdout)
    assert steps > 6  # a link, two renames and a removal of what was there, the new one's rename, its leftovers
    seen = set()
    for n in range(1, steps):
        folder = tmp_path / str(n)
        path, asides = folder / "gateway.db", list(folder.glob("gateway.db.before-1"))
        state = "none" if not path.exists() else "old" if not asides else "new"
        seen.add(state)
        assert whole(path if state == "old" else asides[0]), (n, state)
        if state == "new":
            assert rows(path, "SELECT count(*) FROM pauses") == [(0,)], n
        assert run(restore, folder / "copy.db", path)[0] == 0
        assert rows(path, "SELECT count(*) FROM pauses") == [(0,)], n
        assert not list(folder.glob(".gateway.db*")), n
        assert any(whole(each) for each in folder.glob("gateway.db.before-*") if not each.name.endswith(("-wal", "-shm"))), n
    assert seen == {"old", "none", "new"}


def test_a_removed_databases_log_is_not_played_into_the_next(tmp_path):
    """As after `mv gateway.db elsewhere`, or a restore of an older version that was killed between its renames."""
    torn(tmp_path)
    path = tmp_path / "gateway.db"
    path.rename(tmp_path / "elsewhere.db")
    code, output = run(restore, tmp_path / "copy.db", path)
    assert code == 0, output
    assert rows(path, "SELECT count(*) FROM pauses") == [(0,)]
    assert [each.name[-4:] for each in tmp_path.glob("gateway.db.before-*")] != []


def test_a_restore_proves_the_file_in_place_not_the_copy(tmp_path, monkeypatch):
    """With the log left where it is, SQLite would show the old ledger under the new one's name, and `restore` called that proved."""
    torn(tmp_path)
    path, real = tmp_path / "gateway.db", ledger_backup._aside
    monkeypatch.setattr(ledger_backup, "_aside", lambda ledger, tag: real(ledger, tag) if tag.startswith("unsound") else [])
    with pytest.raises(LedgerUnavailable, match=r"what was restored is not sound and is now .*gateway.db.unsound-1"):
        ledger_backup.restore(tmp_path / "copy.db", path, now=1.0)
    assert not path.exists()


def test_a_restored_ledger_keeps_a_log_from_its_first_moment(tmp_path):
    path, copy = new_ledger(tmp_path), tmp_path / "copy.db"
    ledger_backup.backup(path, copy)
    ledger_backup.restore(copy, path, now=1.0)
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]
