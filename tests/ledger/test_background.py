"""Long work on a ledger is done apart: the loop serves on, the gateway's own limits do not end it, and it ends with whoever wanted it."""

import asyncio
import threading
from functools import partial
from types import SimpleNamespace

import pytest
from ledgers import CALL, DAY_CAP, ENGINES, NOON, Part, balance, new_ledger, until, url

from gateway_addon.ledger import Ledger, LedgerUnavailable, Reserved, ServerAddress, Settlement, admin, background, connect, reservations
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.store import balances
from gateway_addon.operations.reload import align

FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
NO_CAPS = SimpleNamespace(caps={})
REPORTS = SimpleNamespace(name="reports", team="editors", caps={}, each={}, models=NO_CAPS)
EDITORS = SimpleNamespace(
    apps={"reports": REPORTS}, caps={}, teams={"editors": NO_CAPS}, timezone="UTC", digest="d", texts={}, ledger_mode=0o600
)
TIMEOUT_S = 1.0


@pytest.fixture(params=ENGINES)
def path(tmp_path, request, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = new_ledger(tmp_path, request.param)
    with connect.changing(found) as db:
        reservations.settle(db, reservations.reserve(db, "me", CALL, 100, [], now=NOON).call_id, Settlement(100, (Part(100),)), now=NOON)
    return found


@pytest.fixture
async def ledger(path):
    opened = await Ledger.open(url(path), now=NOON, timeout_s=TIMEOUT_S)
    yield opened
    await opened.close()


@pytest.fixture
def long(monkeypatch):
    """A move that takes until `may_end` is set."""
    began, may_end, rebuild = threading.Event(), threading.Event(), balances.rebuild

    def waiting(db):
        began.set()
        assert may_end.wait(60)
        rebuild(db)

    monkeypatch.setattr(balances, "rebuild", waiting)
    yield began, may_end
    may_end.set()


async def test_while_past_calls_move_the_loop_serves_and_settles_later(ledger, path, long):
    began, may_end = long
    held = await ledger.reserve(CALL, 30, DAY_CAP, now=NOON)
    moving = asyncio.ensure_future(align(ledger, EDITORS, "ana"))
    await until(began.is_set)
    assert (await ledger.look_up_token("d1", now=NOON)).token is not None
    with pytest.raises(LedgerUnavailable):
        await ledger.reserve(CALL, 30, DAY_CAP, now=NOON)
    settled = ledger.settle(held, Settlement(10, (Part(10),)), now=NOON)
    await asyncio.sleep(2 * TIMEOUT_S)
    assert (moving.done(), settled.done()) == (False, False), "neither is given up for taking longer than a call may wait"
    may_end.set()
    await moving
    assert (await settled).first
    assert balance(path, "team:editors") == (110, 0, 0)
    assert isinstance(await ledger.reserve(CALL, 30, DAY_CAP, now=NOON), Reserved)
    with connect.reading(path) as db:
        assert invariants.findings(db) == []


async def test_a_look_at_a_token_is_new_once_a_bill_passes_its_grant(ledger, monkeypatch):
    """Calls look at their token again after half a second, unless this process itself has learned more."""
    monkeypatch.setattr("gateway_addon.ledger.ledger.FRESH_S", 60)
    looks, look = [], ledger.look
    monkeypatch.setattr(ledger, "look", lambda read: looks.append(read) or look(read))
    for cost_nano, seen in ((30, 1), (40, 2)):
        held = await ledger.reserve(CALL, 30, DAY_CAP, now=NOON)
        await ledger.settle(held, Settlement(cost_nano, (Part(cost_nano),)), now=NOON)
        found = [(await ledger.look_up_token("d1", now=NOON, judged_again=True)).overruns for _ in range(3)]
        assert len(looks) == seen
    assert found == [{CALL.model_asked}] * 3
    monkeypatch.setattr("gateway_addon.ledger.ledger.LOOKED_UP_MAX", 1)
    await ledger.change(partial(admin.issue_token, app="reports", digest="d2", who="test", now=NOON))
    await ledger.look_up_token("d2", now=NOON)
    assert list(ledger._looked_up) == ["d2"], "memory of looks is bounded"


async def test_one_gateway_moves_the_calls_and_the_others_wait(path, ledger, long):
    began, may_end = long
    other = await Ledger.open(url(path), now=NOON)
    moving = [asyncio.ensure_future(align(each, EDITORS, "ana")) for each in (ledger, other)]
    await until(began.is_set)
    may_end.set()
    await asyncio.gather(*moving)
    await other.close()
    with connect.reading(path) as db:
        assert [row[0] for row in db.execute("SELECT count(*) FROM audit WHERE action = 'align'").fetchall()] == [1]


async def test_where_nothing_moves_no_turn_is_taken(ledger, monkeypatch):
    await align(ledger, EDITORS, "ana")
    monkeypatch.delattr(background, "change")
    await align(ledger, EDITORS, "ana")


@pytest.mark.parametrize("path", ["postgresql"], indirect=True)
async def test_a_server_lets_a_move_take_longer_than_a_call_may(ledger, path):
    assert isinstance(path, ServerAddress)
    await background.change(path, lambda db: db.execute("SELECT pg_sleep(2)"))


@pytest.mark.parametrize("path", ["sqlite"], indirect=True)
async def test_a_files_long_statement_ends_with_its_caller(path):
    forever = asyncio.ensure_future(background.read(path, lambda db: db.execute(FOREVER).fetchone()))
    await asyncio.sleep(0.1)
    forever.cancel()
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name == background.NAME])


async def test_an_error_of_the_work_is_raised_and_undoes_it(path):
    def half(db):
        db.execute("UPDATE settings SET value = 'Asia/Tokyo' WHERE name = 'zone'")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await background.change(path, half)
    assert await background.read(path, lambda db: str(reservations.zone(db))) == "UTC"
