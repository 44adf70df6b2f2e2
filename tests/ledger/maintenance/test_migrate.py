"""A ledger moved from a file to a server: the same one there, however often the move was cut off, and never two that take calls."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import month
import postgresql
import psycopg
import pytest
from click.testing import CliRunner
from ledgers import NOON, Cap, balance, new_ledger, rows

from gateway_addon.cli import main
from gateway_addon.cli import migrate as command
from gateway_addon.ledger import Ledger, LedgerUnavailable, NewCall, Reserved, ServerAddress, admin, connect, reservations, workloads
from gateway_addon.ledger.maintenance import invariants, migrate
from gateway_addon.ledger.store import engines, sqlite_files

pytestmark = pytest.mark.xdist_group("postgresql")
ROOT = Path(__file__).parents[3]
ODD = "tab\t line\n return\r slash\\ \\N quote' \N{SNOWMAN}"


@pytest.fixture
def target():
    return ServerAddress(postgresql.shared().database())


@pytest.fixture
def source(tmp_path):
    """Some hundred calls, one that a dead process left open, and whatever else a ledger keeps."""
    path = tmp_path / "gateway.db"
    month.make(path, 130, until=NOON)
    with connect.changing(path) as db:
        token = admin.issue_token(db, "reports", "d1", who="test", now=NOON)
        call = NewCall("reports", "batch", token.id, model_asked="claude-haiku-4-5", max_tokens=100)
        assert isinstance(reservations.reserve(db, "gone", call, 700, [], now=NOON + 1 / 3), Reserved)
        reservations.refused(db, "gone", NewCall("reports", None, token.id, model_asked=ODD), "model", now=NOON)
        admin.pause(db, "team:batch", why=ODD, who="test", now=NOON)
        admin.raise_cap(db, "total", "day", 2**62, until=NOON + 1e6, who="test", now=NOON)
        reservations.failed_authentication(db, "token_unknown", now=NOON)
        workloads.open_session(db, "reports", "https://issuer.test", ODD, "w1", session="s1", rule="r1", expires_at=NOON + 60, now=NOON)
    return path


def move(source, target, **options):
    return migrate.move(source, target, who="test", now=NOON, **options)


def everything(path, tables):
    """Every row of these tables, in one order on both engines."""
    found = {}
    for table, columns in tables.items():
        names = ", ".join(f'"{column}"' for column in columns)
        found[table] = sorted(rows(path, f"SELECT {names} FROM {table}"), key=repr)
    return found


def content(path, tables):
    """Return all rows of a ledger, but for the notes of the move on each side."""
    found = everything(path, tables)
    return found | {"audit": [row for row in found["audit"] if "migrate" not in row], "settings": [row for row in found["settings"] if row[0] != "moved_to"]}


def tables_of(source):
    with closing(sqlite3.connect(source)) as db:
        return migrate._columns(sqlite_files.FileConnection(db))


def test_every_row_is_there_as_it_was(source, target, monkeypatch):
    monkeypatch.setattr(migrate, "CALLS_AT_ONCE", 50)
    tables, heard = tables_of(source), []
    before = content(source, tables)
    proved = move(source, target, emit=lambda done, of: heard.append((done, of)))
    assert content(target, tables) == before == content(source, tables)
    assert heard == [(0, 132), (50, 132), (100, 132), (132, 132)]
    assert (proved.rows("calls"), proved.kept_calls, proved.spent_nano) == (132, 0, balance(source, "total")[0])
    for scope in ("total", "app:reports", "team:batch", "team:content"):
        assert balance(target, scope) == balance(source, scope)
    with connect.reading(target) as db:
        assert invariants.findings(db) == []


def test_no_table_is_forgotten(source, target):
    """A table of a later version has to be moved, or be named as one that stays."""
    move(source, target)
    there = {name for (name,) in rows(target, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'gateway' AND table_type = 'BASE TABLE'")}
    assert there - {"migrations", "turns", "owners", "app_balances", "part_balances"} == set(tables_of(source))


async def test_a_gateway_goes_on_there_under_the_same_caps(source, target):
    move(source, target)
    token_id = rows(source, "SELECT id FROM tokens WHERE app = 'reports'")[0][0]
    call, last = NewCall("reports", "batch", token_id), rows(source, "SELECT max(id) FROM calls")[0][0]
    with connect.changing(target) as db:
        assert admin.resume(db, "team:batch", who="test", now=NOON)
        assert admin.issue_token(db, "new", "d2", who="test", now=NOON).id == token_id + 2, "behind the app's token and its workload"
    ledger = await Ledger.open(target.url, now=NOON)  # which settles the orphan at what it held
    held = await ledger.reserve(call, 300, [Cap("app:reports", "ever", 1000)], now=NOON)
    refused = await ledger.reserve(call, 1, [Cap("app:reports", "ever", 1000)], now=NOON)
    await ledger.close()
    assert (held.call_id, isinstance(refused, Reserved)) == (last + 1, False)
    assert balance(target) == (700, 300, 1)


async def test_after_a_move_every_command_names_the_new_place(source, target):
    """Each refuses the file and says where the ledger is."""
    move(source, target)
    with pytest.raises(LedgerUnavailable, match=rf"was moved to {target}"):
        await Ledger.open(f"sqlite:///{source}")
    for typed in (["token", "issue", "reviews", "--policies", str(ROOT / "policies" / "examples")], ["report"], ["backup", str(source.with_name("copy.db"))]):
        done = CliRunner().invoke(main, [*typed, "--ledger", f"sqlite:///{source}"])
        assert (done.exit_code, "was moved to" in done.output) == (2, True)
    with closing(sqlite3.connect(source)) as db:
        assert invariants.findings(sqlite_files.FileConnection(db)) == []


def test_a_move_is_audited_on_both_sides_and_done_once(source, target):
    """A second move finds nothing to do."""
    move(source, target)
    assert move(source, target) is None
    note = "SELECT who, action, before, after FROM audit WHERE action = 'migrate'"
    assert rows(source, note) == [("test", "migrate", f'{{"ledger": "{source}"}}', f'{{"ledger": "{target}"}}')]
    assert rows(target, note) == [("test", "migrate", f'{{"ledger": "{source}"}}', '{"ledger": "here"}')]
    elsewhere = ServerAddress(postgresql.shared().database())
    with pytest.raises(LedgerUnavailable, match="nothing is left to move"):
        move(source, elsewhere)


async def test_a_ledger_in_use_is_not_moved(source, target):
    ledger = await Ledger.open(f"sqlite:///{source}")
    try:
        with pytest.raises(LedgerUnavailable, match=r"is in use by .*: stop the gateway"):
            move(source, target)
    finally:
        await ledger.close()
    assert not rows(source, "SELECT 1 FROM settings WHERE name = 'moved_to'")
    assert move(source, target) is not None


async def test_a_gateway_that_starts_during_a_move_does_not_write(source, target):
    """It waits for its turn, which the move has, and by then the ledger is gone."""
    loop, starting = asyncio.get_running_loop(), []

    def start(done, of):
        if done:
            starting.append(asyncio.run_coroutine_threadsafe(Ledger.open(f"sqlite:///{source}", timeout_s=20), loop))
            while not list(source.with_name("gateway.db-locks").glob("owner-*")):
                pass

    await asyncio.to_thread(move, source, target, emit=start)
    with pytest.raises(LedgerUnavailable, match="was moved to"):
        await asyncio.wrap_future(starting[0])
    assert rows(source, "SELECT count(*) FROM owners") == [(0,)]


def test_a_ledger_that_is_not_sound_is_not_moved(source, target):
    with closing(sqlite3.connect(source)) as db:
        db.execute("""UPDATE balances SET spent_nano = spent_nano + 1 WHERE scope = 'total' AND "window" = 'ever'""")
        db.commit()
    with pytest.raises(LedgerUnavailable, match="not a sound ledger, so nothing was moved: balance total ever"):
        move(source, target)


@pytest.mark.parametrize("broken", ["a number", "a row too few"])
def test_what_does_not_agree_is_thrown_away(source, target, monkeypatch, broken):
    def line(row, real=migrate._line):
        if row[0] != 5:
            return real(row)
        return "" if broken == "a row too few" and len(row) == 9 else real((*row[:-1], "x") if isinstance(row[-1], str) else row)

    monkeypatch.setattr(migrate, "_line", line)
    with pytest.raises(LedgerUnavailable, match="is not what was there, so it was thrown away"):
        move(source, target)
    monkeypatch.undo()
    assert move(source, target).kept_calls == 0


def test_a_move_takes_an_empty_ledger_and_refuses_one_with_rows(source, target):
    """An empty one is what `gateway init` makes."""
    connect.create(target)
    with pytest.raises(LedgerUnavailable, match=r"has another ledger's rows \(audit, tokens\)"):
        move(source, new_ledger(None, "postgresql"))
    assert move(source, target) is not None


@pytest.mark.parametrize("ends", [False, True])
def test_a_move_waits_for_the_last_ones_session_to_end(source, target, monkeypatch, ends):
    """A session ends, and its lock goes, some time after its client has closed it. One that goes on is another move."""
    monkeypatch.setattr(migrate, "LAST_MOVE_MS", "30000" if ends else "10")
    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with psycopg.connect(target.url, autocommit=True) as other, ThreadPoolExecutor(1) as thread:
        other.execute("SELECT pg_advisory_lock(hashtext('gateway migrate'))")
        moved = thread.submit(move, source, target)
        if not ends:
            with pytest.raises(LedgerUnavailable, match="another ledger is being moved"):
                moved.result()
            return
        while other.execute(waits).fetchone() == (0,):
            assert not moved.done(), moved.result()
            time.sleep(0.01)
        other.execute("SELECT pg_advisory_unlock_all()")
        assert moved.result() is not None


def test_a_ledger_begun_there_meanwhile_is_kept(source, target):
    def begin(done, of):
        if done == of:
            connect.create(target)
            with connect.changing(target) as db:
                admin.issue_token(db, "first", "d9", who="test", now=NOON)

    with pytest.raises(LedgerUnavailable, match="another ledger was begun there meanwhile"):
        move(source, target, emit=begin)
    assert rows(target, "SELECT app FROM tokens") == [("first",)]
    with connect.changing(source) as db:
        admin.issue_token(db, "still-here", "d8", who="test", now=NOON)


def test_calls_made_between_two_tries_are_moved_too(source, target):
    class Cut(Exception):
        pass

    def cut(done, of):
        if done:
            raise Cut

    with pytest.raises(Cut):
        move(source, target, emit=cut)
    with connect.changing(source) as db:
        assert admin.adjust(db, 1, 5, who="test", why="later", now=NOON)
    assert move(source, target).kept_calls == 0, "what had been brought was of another state of the file"
    assert balance(target, "total") == balance(source, "total")


KILLED = """
import os, signal, sys
from pathlib import Path
from gateway_addon.ledger import ServerAddress
from gateway_addon.ledger.maintenance import migrate
from gateway_addon.ledger.store import postgres

migrate.CALLS_AT_ONCE = 50
real = postgres.ServerConnection.execute

def dying(left, when):
    def execute(self, statement, values=()):
        nonlocal left
        left -= statement == "COMMIT"
        if left == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = real(self, statement, values)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return execute

for commit, when in ((1, "before"), (2, "before"), (2, "after"), (2, "before"), (1, "after")):
    child = os.fork()
    if child == 0:
        postgres.ServerConnection.execute = dying(commit, when)
        migrate.move(Path(sys.argv[1]), ServerAddress(sys.argv[2]), who="test", now=0.0)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_move_killed_at_any_point_is_finished_by_the_next(source, target):
    """Killed around commits: of the first tables, of some calls, the file's mark without the server's, the end without a word."""
    tables = tables_of(source)
    before = content(source, tables)
    killed = subprocess.run([sys.executable, "-c", KILLED, source, target.url], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert killed.stdout.split() == [str(int(signal.SIGKILL))] * 5, killed.stderr
    assert move(source, target) is None
    assert content(target, tables) == before
    assert balance(target, "total") == balance(source, "total")


def test_between_the_two_last_commits_neither_side_takes_calls(source, target, monkeypatch):
    """The file's last commit comes first, then the server's; a second run ends the move."""

    def cut(db, *names, real=migrate.admin.moved, **options):
        real(db, *names, **options)
        if db.engine is engines.SQLITE:
            db.execute("COMMIT")
            raise psycopg.OperationalError("cut off")

    monkeypatch.setattr(migrate.admin, "moved", cut)
    with pytest.raises(LedgerUnavailable):
        move(source, target)
    monkeypatch.undo()
    with pytest.raises(LedgerUnavailable, match="was moved to"), connect.changing(source):
        pass
    with pytest.raises(LedgerUnavailable, match="has no ledger"), connect.changing(target) as db:
        db.execute("SELECT 1 FROM calls")
    assert move(source, target).kept_calls == 132


# --- the command


def run(*arguments):
    done = CliRunner().invoke(main, ["migrate", *map(str, arguments)])
    return done.exit_code, done.output


def test_the_command_moves_and_says_what_it_proved(source, target):
    code, output = run(f"sqlite:///{source}", target.url)
    assert code == 0, output
    assert "132 of 132 calls" in output
    assert "132 calls, 253 entries" in output
    assert "Proved: the rows of" in output
    assert run(f"sqlite:///{source}", target.url)[1].endswith(f"{source} was moved to {target} already: nothing is left to do.\n")


@pytest.mark.parametrize(
    ("one", "other", "sentence"),
    [
        ("sqlite:///a.db", "sqlite:///b.db", "gateway backup FILE --ledger sqlite:///a.db, then gateway restore FILE --ledger sqlite:///b.db"),
        ("postgresql://h/a", "postgresql://h/b", "pg_dump"),
        ("postgresql://h/a", "sqlite:///b.db", "gateway restore FILE"),
        ("sqlite:////nowhere/a.db", "postgresql://h/b", "There is no ledger at /nowhere/a.db"),
        ("mysql://h/a", "postgresql://h/b", "is not supported"),
    ],
)
def test_what_it_does_not_do_is_said_with_the_way_to_it(one, other, sentence):
    code, output = run(one, other)
    assert (code, sentence in output) == (2, True), output


def test_a_server_that_is_not_there_is_a_sentence(source, tmp_path):
    code, output = run(f"sqlite:///{source}", f"postgresql://gateway:secret@/none?host={tmp_path}")
    assert (code, "gives no connection" in output, "secret" in output) == (2, True, False)


def test_a_terminal_sees_a_bar(monkeypatch):
    written = []

    class Terminal:
        def isatty(self):
            return True

        def write(self, text):
            written.append(text)

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stderr", Terminal())
    with command._progress() as emit:
        emit(0, 10)
        emit(5, 10)
        emit(10, 10)
    assert "10/10" in "".join(written)


@pytest.mark.soak
def test_a_hundred_thousand_calls_move_in_seconds(tmp_path, target):
    month.make(tmp_path / "gateway.db", 100_000, until=NOON)
    began = os.times()
    assert move(tmp_path / "gateway.db", target).rows("calls") == 100_000
    assert os.times().user - began.user < 30
