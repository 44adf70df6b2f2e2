"""A ledger of an earlier version opens in this one and says the same; one of a later version is refused; a migration is whole or not there."""

import asyncio
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from keep_ledgers import DAY_S, FOLDER, GONE, MARCH, NAMES, expected, kept, said
from ledgers import ENGINES, NOON, Cap, balance, rows, url, writing

from gateway_addon.cli import main
from gateway_addon.cli.doctor import check_ledger
from gateway_addon.ledger import (
    Denied,
    Ledger,
    LedgerUnavailable,
    NewCall,
    Reserved,
    ServerAddress,
    Settlement,
    admin,
    connect,
    reservations,
)
from gateway_addon.ledger.reports import daily_totals

ROOT = Path(__file__).parents[2]
MINE = NewCall("reports", "batch", 1)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Journals go here, not into the home of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


def within(known, found):
    """Whether `found` says all that is known, whatever a later version says besides."""
    if isinstance(known, dict):
        return isinstance(found, dict) and all(name in found and within(value, found[name]) for name, value in known.items())
    if isinstance(known, list):
        return isinstance(found, list) and len(known) == len(found) and all(map(within, known, found))
    return known == found


def up_to_date(ledger):
    """As an operator does it: a file's tables follow by themselves, a server's by `gateway init`."""
    if isinstance(ledger, ServerAddress):
        connect.create(ledger)
    return ledger


def test_kept_ledgers_stay_small():
    assert NAMES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 200_000


@pytest.mark.parametrize("name", ["m005_observed", "m008_nano_in_views"])
def test_calls_of_older_versions_are_of_no_known_part(name, engine, tmp_path):
    """A cap on a part begins with nothing spent; a cycle, which needs no part, knows all of its calls."""
    ledger = up_to_date(kept(name, engine, tmp_path))
    month, new = Cap("total", "cycle:1", 10**12), replace(MINE, session_id="s-6")
    with connect.changing(ledger) as db:
        wanted = {("reports", "session", "ever")}
        assert admin.align(db, "Europe/Berlin", {"reports": "batch", "search": None}, ["cycle:1"], wanted, who="test", now=NOON)
        [of_cycle] = reservations.capped(db, [month], now=NOON)
        assert of_cycle.spent_nano == reservations.capped(db, [Cap("total", "month", 10**12)], now=NOON)[0].spent_nano > 0
        assert isinstance(reservations.reserve(db, "me", new, 40, [Cap("app:reports session:s-6", "ever", 40)], now=NOON), Reserved)
        assert isinstance(reservations.reserve(db, "me", new, 1, [Cap("app:reports session:s-6", "ever", 40)], now=NOON), Denied)
    assert check_ledger(ledger, now=NOON).findings == []


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_ledger_opens_and_says_the_same(name, engine, tmp_path):
    ledger, known = up_to_date(kept(name, engine, tmp_path)), expected(name)
    check = check_ledger(ledger, now=NOON)
    assert check.findings == []
    assert len([line for line in check.seen if "which is gone: the next start settles it" in line]) == len(known["open"]) - len(
        known["batches"]
    )
    found = said(ledger)
    assert {part for part in known if not within(known[part], found[part])} == set()
    daily_totals.keep(ledger, since=MARCH, until=NOON + DAY_S, now=NOON + DAY_S)
    assert within(known["reports"], said(ledger)["reports"]), "the sums of closed days are the same"


@pytest.mark.parametrize("name", NAMES)
async def test_a_gateway_goes_on_with_a_kept_ledger(name, engine, tmp_path):
    """It settles what the dead process held at what it held, keeps the batch's hold, and takes calls under the raise and the pause."""
    ledger = up_to_date(kept(name, engine, tmp_path))
    before = balance(ledger)
    orphans = rows(ledger, "SELECT sum(reserved_nano), count(*) FROM entries JOIN calls ON calls.id = call_id WHERE owner = $1", GONE)[0][0]
    opened = await Ledger.open(url(ledger), now=NOON)
    try:
        assert balance(ledger) == (before[0] + orphans, before[1] - orphans, 1), "the batch holds on"
        assert isinstance(await opened.reserve(MINE, 1000, [], now=NOON), Reserved)
        paused = await opened.reserve(NewCall("search", None, 2), 1000, [], now=NOON)
        assert (paused.reason, paused.pause.scope) == ("paused", "app:search")
    finally:
        await opened.close()
    assert check_ledger(ledger, now=NOON).findings == []


def test_who_raised_and_why_is_read_from_the_audit(engine, tmp_path):
    """An older version kept both there alone."""
    ledger = up_to_date(kept("m005_observed", engine, tmp_path))
    with connect.reading(ledger) as db:
        [raised] = admin.raises(db, now=NOON)
    assert (raised.scope, raised.window, raised.who, raised.why) == ("app:reports", "month", "ops", "close of the books")


def test_the_views_amounts_can_be_summed(engine, tmp_path):
    ledger = up_to_date(kept("m005_observed", engine, tmp_path))
    writing(ledger).close()  # a file's tables follow then
    prefix = "gateway." if engine == "postgresql" else ""
    total = [balance(ledger, "total")[:2]]
    assert rows(ledger, f"SELECT sum(spent_nano), sum(held_nano) FROM {prefix}spend") == total
    assert rows(ledger, f"SELECT spent_nano, held_nano FROM {prefix}standings WHERE scope = 'total' AND since = 'the beginning'") == total


def change_tables(ledger):
    """Change the tables as a newer version's first start, or its `gateway init`, does."""
    with closing(writing(ledger)) as db:
        if isinstance(ledger, ServerAddress):
            db.execute("INSERT INTO migrations (name) VALUES ('m999_later')")
        else:
            db.execute("INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('gateway_ledger', 'm999_later', 'now')")


NEWER = r"is a newer gateway's \(m999_later changed its tables\): update this gateway"


async def test_an_older_gateway_refuses_a_newer_ones_ledger(engine, tmp_path):
    """One that runs refuses from its next call on: its statements would write what the new tables no longer mean."""
    ledger = up_to_date(kept(NAMES[-1], engine, tmp_path))
    running = await Ledger.open(url(ledger), now=NOON)
    try:
        held = await running.reserve(MINE, 700, [], now=NOON)
        change_tables(ledger)
        before = balance(ledger)
        with pytest.raises(LedgerUnavailable, match=NEWER):
            await running.reserve(MINE, 300, [], now=NOON)
        settled = running.settle(held, Settlement(500), now=NOON)
        with pytest.raises(LedgerUnavailable, match=NEWER):
            await running.change(lambda db: admin.resume(db, "app:search", who="test", now=NOON))
        assert not settled.done()
        assert balance(ledger) == before
    finally:
        await running.close(timeout_s=0.2)  # its settlement cannot be written
    with pytest.raises(LedgerUnavailable, match=NEWER):
        await Ledger.open(url(ledger), now=NOON)


@pytest.mark.parametrize("typed", [["report"], ["doctor", "--offline"], ["prune", "--before", "400d"]], ids=lambda typed: typed[0])
def test_a_command_refuses_a_newer_gateways_ledger(typed, engine, tmp_path):
    ledger = kept(NAMES[-1], engine, tmp_path)
    change_tables(ledger)
    done = CliRunner().invoke(main, [*typed, "--ledger", url(ledger)])
    assert (done.exit_code, "is a newer gateway's (m999_later" in done.output) == (2, True), done.output
    with pytest.raises(LedgerUnavailable, match=NEWER):
        connect.create(ledger)


def test_an_older_ledger_on_a_server_waits_for_init(tmp_path):
    """Gateways of the old version may be at work on it: only `gateway init` changes its tables."""
    ledger = kept(NAMES[-1], "postgresql", tmp_path)
    with closing(writing(ledger)) as db:
        db.execute("DELETE FROM migrations WHERE name = 'm005_observed'")
        db.execute("DROP INDEX calls_observed")
    with pytest.raises(LedgerUnavailable, match="is an older version's: `gateway init` brings it up to date"):
        said(ledger)
    connect.create(ledger)
    assert within(expected(NAMES[-1])["reports"], said(ledger)["reports"])


UPGRADE = """
import os, signal, sys
from gateway_addon.ledger import connect
from gateway_addon.ledger.store import migrations, postgres, postgres_session, sqlite_files

CHANGES = (("m901_first", ("ALTER TABLE calls ADD COLUMN later BIGINT", "UPDATE calls SET later = 1")), ("m902_second", ("CREATE TABLE laters (id BIGINT)",)))
ledger, point = sqlite_files.ledger_path(sys.argv[1]), sys.argv[2]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def dying(script, run=migrations.runner):
    def change(db):
        if point == "between" and "laters" in script:
            die()
        if point == "before the commit":
            db.conn.set_trace_callback(lambda statement: statement == "COMMIT" and die())
        run(script)(db)
    return change

migrations.runner = dying
for name, statements in CHANGES:
    in_file = "".join(f"{each};\\n" for each in statements).replace("BIGINT)", "INTEGER) STRICT").replace("BIGINT", "INTEGER")
    migrations.MIGRATIONS += (migrations.Migration(name, in_file, None),)
    postgres.ON_SERVER += ((name, "SET LOCAL search_path = gateway; " + "; ".join(statements)),)
if point != "never":
    postgres_session.ServerConnection.execute = die  # on a server: the zone is kept last, in the same transaction
connect.create(ledger)
"""


def test_a_migration_killed_midway_leaves_the_old_ledger(engine, tmp_path):
    """kill -9 between two migrations of one upgrade and right before its commit: all of it is undone; the next try does all of it."""
    ledger = up_to_date(kept(NAMES[-1], engine, tmp_path))

    def upgrade(point):
        return subprocess.run([sys.executable, "-c", UPGRADE, url(ledger), point], cwd=ROOT, capture_output=True, text=True, timeout=60)

    for point in ["between", "before the commit"][engine == "postgresql" :]:
        done = upgrade(point)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert within(expected(NAMES[-1]), said(ledger))
    assert upgrade("never").returncode == 0
    prefix = "gateway." if engine == "postgresql" else ""
    assert rows(ledger, f"SELECT count(*) FROM {prefix}calls WHERE later IS NULL") == [(0,)]
    with pytest.raises(LedgerUnavailable, match=r"m901_first, m902_second changed its tables"):
        said(ledger)


async def test_two_processes_bring_a_file_up_to_date_at_once(tmp_path):
    """The second process waits for the first and finds it done."""
    ledger = kept(NAMES[-1], "sqlite", tmp_path)
    with closing(writing(ledger)) as db:
        db.execute("DROP INDEX calls_observed")
        db.execute("DELETE FROM _sqlite_migrations WHERE name = 'm005_observed'")
    both = [asyncio.to_thread(lambda: writing(ledger).close()) for _ in range(8)]
    await asyncio.gather(*both)
    assert within(expected(NAMES[-1]), said(ledger))
