"""The connection to a server breaks in the middle of a batch, whose one round trip brings it and its commit: each call is held once or not at all."""

import asyncio
from contextlib import closing

import postgresql
import psycopg
import pytest
from ledgers import CALL, NOON, Cap, Part, balance, new_ledger, rows, until, url

from gateway_addon.ledger import Ledger, LedgerUnavailable, Outcome, Reserved, Settlement, connect
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.store import postgres, postgres_batch
from gateway_addon.ledger.types import RecordedEnd, Reservation

CAP = [Cap("app:reports", "day", 1_000)]


@pytest.fixture
def server():
    return new_ledger(None, "postgresql")


async def reserve(ledger, nano):
    try:
        return await ledger.reserve(CALL, nano, CAP, now=NOON)
    except LedgerUnavailable as error:
        return error


def places(every):
    """Bytes into the question (4,000 or so) and into the answer (1,000): before, within and behind each of its messages."""
    up = [0, 4, 60, 1_000, 3_000, 9_999] if not every else range(0, 6_000, 97)
    down = [0, 4, 5, 30, 200, 500, 9_999] if not every else range(0, 1_500, 23)
    return [("up", count) for count in up] + [("down", count) for count in down]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)])
async def test_a_batch_that_is_cut_anywhere_takes_place_once_or_never(server, every):
    async with postgresql.Relay(postgresql.shared()) as relay:
        ledger = await Ledger.open(relay.url(server), now=NOON)
        spent_nano, seen = 0, set()
        for direction, count in places(every):
            held = await ledger.reserve(CALL, 300, [], now=NOON)
            relay.cut_after(direction, count)
            ending = ledger.settle(held, Settlement(2, (Part(2),), Outcome(status=200)), now=NOON)
            answers = await asyncio.gather(*(reserve(ledger, nano) for nano in (400, 450, 470)))
            relay.left[direction] = None
            bill = await ending
            assert (bill.first, bill.spent_nano, bill.held_nano) == (True, 2, 300), (direction, count)
            spent_nano += 2
            reserved = [answer for answer in answers if isinstance(answer, Reserved)]
            seen |= {type(answer) for answer in answers}
            booked = (spent_nano, sum(each.standings[0].reserved_nano for each in reserved[-1:]), len(reserved))
            await until(lambda expected=booked: balance(server) == expected)
            assert {number for (number,) in rows(server, "SELECT id FROM calls WHERE state = 'open'")} == {each.call_id for each in reserved}
            await asyncio.gather(*(ledger.void(each, now=NOON) for each in reserved))
        await ledger.close()
    assert seen >= {Reserved, LedgerUnavailable}
    assert balance(server) == (spent_nano, 0, 0)
    with connect.reading(server) as db:
        assert invariants.findings(db) == []


async def test_a_lost_batch_that_still_waits_for_its_turn_is_too_late(server):
    """The server does not notice that its client is gone: it waits for a lock, and would then write what nobody asks for any more."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with postgresql.Relay(postgresql.shared()) as relay:
        ledger = await Ledger.open(relay.url(server), now=NOON)
        await ledger.void(await ledger.reserve(CALL, 1, CAP, now=NOON), now=NOON)
        before = rows(server, "SELECT commits FROM owners")
        with closing(psycopg.connect(url(server))) as shell:
            shell.execute("SELECT 1 FROM gateway.turns FOR UPDATE")
            lost = asyncio.ensure_future(reserve(ledger, 400))
            await until(lambda: rows(server, waiting) == [(1,)])
            for way in list(relay._ways):
                way.cancel()
            assert isinstance(await lost, LedgerUnavailable)
            asked_again = asyncio.ensure_future(reserve(ledger, 500))
            await until(lambda: rows(server, "SELECT commits FROM owners") > before)
            shell.rollback()
        held = await asked_again
        await until(lambda: rows(server, "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND datname = current_database()") == [(1,)])
        assert isinstance(held, Reserved)
        assert rows(server, "SELECT id, grant_nano FROM calls WHERE state = 'open'") == [(held.call_id, 500)]
        await ledger.close()


def test_the_answers_of_a_lost_batch_are_found_in_what_it_wrote(server, tmp_path):
    """Each row goes to the call that it was written for; what was refused wrote nothing, and is asked again."""
    store = postgres.ServerStore(server, 2, tmp_path)
    with closing(store.connect()) as db:
        [first] = store.batch(db, {"app:reports"}, [Reservation(CALL, 10, CAP, now=NOON)], 1)
        late = RecordedEnd("settle", 999, store.owner, Settlement(1), NOON)
        ends = [RecordedEnd("settle", first.call_id, store.owner, Settlement(50), NOON)] * 2
        asked = [*ends, late, *(Reservation(CALL, nano, CAP, now=NOON) for nano in (600, 700, 100, 600, 100))]
        said = store.batch(db, {"app:reports"}, asked, 2)
        assert store.took_place(db, 2)
        found = store.found(db, asked)
        assert [getattr(each, "call_id", None) for each in found] == [getattr(each, "call_id", None) for each in said]
        assert found[:3] == said[:3]
        assert [each is None for each in found] == [isinstance(each, postgres_batch.Denied) for each in said] == [False] * 4 + [True, False, True, False]
        assert not store.took_place(db, 3)
        with pytest.raises(Exception, match="out of touch"):
            store.batch(db, {"app:reports"}, asked, 3)
