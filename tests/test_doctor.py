import json
import sqlite3
from contextlib import closing

import pytest
from click.testing import CliRunner
from ledgers import CALL, DAY_CAP, NOON, Part, new_ledger, rows

from gateway_addon.cli.doctor import doctor
from gateway_addon.ledger import Outcome, Settlement, admin, book, files
from gateway_addon.ledger.locks import OwnerLock


@pytest.fixture
def path(tmp_path):
    path = new_ledger(tmp_path)
    with closing(files.writer_connection(path)) as db:
        for nano in (100, 200):
            held = book.reserve(db, "gone", CALL, 300, DAY_CAP, now=NOON)
            book.settle(db, held.call_id, Settlement(nano, (Part(nano),)), now=NOON)
        book.void(db, book.reserve(db, "gone", CALL, 300, DAY_CAP, now=NOON).call_id, Outcome(), now=NOON)
        admin.adjust(db, 1, 5, who="ops", why="the bill", now=NOON)
    return path


def examine(path):
    result = CliRunner().invoke(doctor, ["--ledger", f"sqlite:///{path}"], catch_exceptions=False)
    return result.exit_code, result.output


def damage(path, sql):
    """As a person with a database tool would: past the triggers."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {trigger}")
        db.execute(sql)


def test_a_sound_ledger_passes(path):
    code, output = examine(path)
    assert code == 0, output
    assert "ok  ledger" in output
    assert "3 calls, 7 entries" in output


@pytest.mark.parametrize(
    ("sql", "finding"),
    [
        ("UPDATE balances SET spent_nano = spent_nano + 1 WHERE scope = 'total' AND window = 'day'", "balance total day"),
        ("UPDATE balances SET quantum_nano = 9 WHERE scope = 'app:reports' AND window = 'ever'", "balance app:reports ever"),
        ("DELETE FROM balances WHERE scope = 'team:batch' AND window = 'month'", "balance team:batch month"),
        ("INSERT INTO balances VALUES ('app:ghost', 'day', 0, 0, 0, 0, 0)", "balance app:ghost day"),
        ("UPDATE entries SET spent_nano = 99 WHERE kind = 'settle' AND call_id = 1", "call 1: its parts sum to $0.0000001"),
        ("UPDATE usage SET nano = 1 WHERE call_id = 2", "call 2: its parts sum to $0.000000001, it was settled at $0.0000002"),
        ("DELETE FROM usage WHERE call_id = 2", "call 2: its parts sum to $0.00"),
        ("UPDATE calls SET state = 'open' WHERE id = 3", "call 3 is open, but its entries leave 0 open"),
        ("DELETE FROM entries WHERE call_id = 3 AND kind = 'void'", "call 3 is voided, but its entries leave 1 open, $0.0000003 held"),
        ("DELETE FROM calls WHERE id = 2", "refers to a row that is missing"),
    ],
)
def test_every_lie_is_named(path, sql, finding):
    damage(path, sql)
    code, output = examine(path)
    assert code == 1, output
    assert finding in output, output


def test_open_reservations_are_listed_with_age_and_owner(path):
    lock = OwnerLock(path)
    with closing(files.writer_connection(path)) as db:
        book.reserve(db, lock.owner, CALL, 300, DAY_CAP, now=NOON)
        book.reserve(db, "gone", CALL, 300, DAY_CAP, now=NOON)
    code, output = examine(path)
    assert code == 0
    assert "(reports, claude-haiku-4-5) holds $0.0000003 for" in output
    assert f"by {lock.owner}\n" in output
    assert "by gone, which is gone: the next start settles it" in output
    lock.close()


def test_balances_can_be_computed_anew(path):
    damage(path, "DELETE FROM balances")
    with admin.changing(path) as db:
        admin.rebuild_balances(db)
    assert examine(path)[0] == 0


def test_json_says_the_same(path):
    damage(path, "DELETE FROM balances WHERE scope = 'total'")
    result = CliRunner().invoke(doctor, ["--ledger", f"sqlite:///{path}", "--json"])
    [ledger] = [check for check in json.loads(result.output) if check["name"] == "ledger"]
    assert (result.exit_code, len(ledger["findings"])) == (1, 4)


def test_no_ledger_is_a_wrong_use(tmp_path):
    code, output = examine(tmp_path / "none.db")
    assert code == 2
    assert "there is no ledger at" in output
    assert not (tmp_path / "none.db").exists()


def test_a_little_disk_is_named(path, monkeypatch):
    monkeypatch.setattr("gateway_addon.cli.doctor.DISK_FREE_BYTES_MIN", 2**60)
    code, output = examine(path)
    assert code == 1
    assert "a full disk refuses every call" in output


def test_looking_changes_nothing(path):
    before = rows(path, "SELECT * FROM balances"), rows(path, "SELECT * FROM entries")
    examine(path)
    assert (rows(path, "SELECT * FROM balances"), rows(path, "SELECT * FROM entries")) == before
