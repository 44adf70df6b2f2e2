"""Batches and belongings in the ledger, on both engines: whose they are, held through any death, booked once each, settled once."""

import asyncio
import json
import re
from contextlib import closing
from functools import partial

import pytest
from click.testing import CliRunner
from ledgers import CALL, NOON, balance, new_ledger, rows, url, writing

from gateway_addon.cli.batches import batches as batches_command
from gateway_addon.ledger import Ledger, batches, connect, ownership
from gateway_addon.ledger.batches import NewBatch, ResultRow
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.ownership import OwnedObject

CAPS = []


def new(call_id, id="msgbatch_1", requests=2, **more):
    return NewBatch(id, call_id, "reports", NOON, requests, False, "digest", "{}", '{"id": "msgbatch_1"}', "in_progress", NOON + 60, **more)


def result(custom_id, nano=0, kind="message", part=0):
    return ResultRow(custom_id, part, kind, "claude-haiku-4-5" if nano else None, 10, 5, 0, 0, 0, 0, 0, nano, None, "")


async def opened(path, **options):
    return await Ledger.open(url(path), **options)


async def a_batch(ledger, hold_nano=1000, **more):
    """A reserved and adopted batch; its call's id."""
    reserved = await ledger.reserve(CALL, hold_nano, CAPS, now=NOON)
    assert await ledger.keep(partial(batches.adopt, new=new(reserved.call_id, **more)), "workspace")
    return reserved.call_id


async def booked(ledger, call_id, *results):
    await ledger.write(partial(batches.book_results, call_id=call_id, rows=results), "app:reports")


async def closed(ledger, id="msgbatch_1", **more):
    return await ledger.keep(partial(batches.close, id=id, now=NOON + 99, **more), "app:reports")


async def test_a_batch_outlives_its_process_and_is_no_orphan(path):
    first = await opened(path)
    await a_batch(first)
    beside = await first.reserve(CALL, 7, CAPS, now=NOON)
    assert beside.call_id
    await first.close()
    second = await opened(path, now=NOON + 10)
    try:
        assert balance(path) == (7, 1000, 1), "the call beside it is an orphan, the batch is not"
        with connect.reading(path) as db:
            assert invariants.findings(db) == []
            [call] = invariants.open_calls(db, connect.death_check(path, db), now=NOON + 10)
            assert (call.alive, call.owner) == (True, "batch msgbatch_1")
    finally:
        await second.close()


async def test_results_are_booked_once_and_settle_a_batch_at_their_sum(path):
    """However often they are read."""
    ledger = await opened(path)
    try:
        call_id = await a_batch(ledger)
        await booked(ledger, call_id, result("a", 300), result("a", 30, part=1))
        assert await closed(ledger) is None, "one of two is missing"
        await booked(ledger, call_id, result("a", 999), result("b", 0, "errored"))
        resolution = await closed(ledger)
        assert (resolution.first, resolution.spent_nano, resolution.held_nano) == (True, 330, 1000)
        assert (await closed(ledger)).first is False
        assert balance(path) == (330, 0, 0)
        assert rows(path, "SELECT kind, model, input_tokens, nano FROM usage") == [("message", "claude-haiku-4-5", 20, 330)]
        assert rows(path, "SELECT state, complete, service_tier FROM calls") == [("settled", 1, "batch")]
        with connect.reading(path) as db:
            assert (invariants.findings(db), batches.open_batches(db)) == ([], [])
    finally:
        await ledger.close()


async def test_two_who_read_the_results_at_once_settle_once(path):
    one, other = await opened(path), await opened(path)
    try:
        call_id = await a_batch(one)
        rows_of_it = [result("a", 300), result("b", 30)]
        await asyncio.gather(*(booked(ledger, call_id, *rows_of_it) for ledger in (one, other, one, other)))
        ended = await asyncio.gather(*(closed(ledger) for ledger in (one, other, one, other)))
        assert sorted(each.first for each in ended) == [False, False, False, True]
        assert balance(path) == (330, 0, 0)
    finally:
        await one.close()
        await other.close()


async def test_a_batch_without_results_is_settled_at_the_held_amount(path):
    ledger = await opened(path)
    try:
        call_id = await a_batch(ledger)
        await booked(ledger, call_id, result("a", 300))
        resolution = await closed(ledger, anyway="batch_gone")
        assert (resolution.first, resolution.spent_nano) == (True, 1000)
        assert "estimated:batch_gone" in rows(path, "SELECT flags FROM calls")[0][0]
    finally:
        await ledger.close()


async def test_a_batch_that_cost_more_than_it_held_is_posted_in_full(path):
    ledger = await opened(path)
    try:
        call_id = await a_batch(ledger, requests=1)
        await booked(ledger, call_id, result("a", 5000))
        resolution = await closed(ledger)
        assert (resolution.overrun, resolution.spent_nano, balance(path)) == (True, 5000, (5000, 0, 0))
    finally:
        await ledger.close()


@pytest.mark.parametrize(("back_s", "due"), [(800, False), (3600, True)])
async def test_a_clock_set_back_does_not_hide_a_batch(path, back_s, due):
    """A look is arranged fifteen minutes ahead at most: one further ahead says that the clock was set back since."""
    ledger = await opened(path)
    try:
        await a_batch(ledger)
        assert await ledger.look(partial(batches.is_due, now=NOON - back_s)) == due
        taken = await ledger.write(partial(batches.claim_due, now=NOON - back_s), "batches")
        assert (taken is not None) == due
    finally:
        await ledger.close()


async def test_a_batch_is_one_process_s_to_look_at_for_its_turn(path):
    one, other = await opened(path), await opened(path)
    try:
        await a_batch(one)
        assert not await one.look(partial(batches.is_due, now=NOON + 59))
        assert await one.look(partial(batches.is_due, now=NOON + 60))
        take = partial(batches.claim_due, now=NOON + 60)
        taken = await asyncio.gather(one.write(take, "batches"), other.write(take, "batches"))
        assert sorted(each is None for each in taken) == [False, True]
        again = await other.write(partial(batches.claim_due, now=NOON + 60 + batches.TURN_S), "batches")
        assert (again.id, again.open, again.requests) == ("msgbatch_1", True, 2)
        poll = partial(batches.record_poll, id="msgbatch_1", status="canceling", look_at=NOON + 900, failures=2)
        await one.write(poll, "app:reports")
        with connect.reading(path) as db:
            [line] = batches.open_batches(db)
        assert (line.held_nano, line.status, line.look_at, line.failures, line.results) == (1000, "canceling", NOON + 900, 2, 0)
    finally:
        await one.close()
        await other.close()


async def test_an_id_that_was_given_before_is_not_given_again(path):
    ledger = await opened(path)
    try:
        await a_batch(ledger)
        reserved = await ledger.reserve(CALL, 5, CAPS, now=NOON)
        assert await ledger.keep(partial(batches.adopt, new=new(reserved.call_id)), "workspace") is False
        assert rows(path, "SELECT count(*) FROM calls WHERE owner = 'batches'") == [(1,)]
    finally:
        await ledger.close()


def test_what_is_made_belongs_to_one_app_for_good(path):
    with connect.changing(path) as db:
        for app, id, at in (("a", "file_1", 1.0), ("a", "file_2", 2.0), ("a", "file_3", 2.0), ("b", "file_4", 3.0)):
            assert ownership.own(db, OwnedObject(id, "file", app, at, "{}"))
        assert not ownership.own(db, OwnedObject("file_1", "file", "b", 9.0, "{}"))
        ownership.gone(db, "file_2", 4.0)
        assert not ownership.own(db, OwnedObject("file_2", "file", "b", 9.0, "{}")), "an id stays taken"
        ownership.seen(db, "file_1", '{"seen": 1}')
    with closing(writing(path)) as db:
        assert ownership.find(db, "file_1") == OwnedObject("file_1", "file", "a", 1.0, '{"seen": 1}')
        assert (ownership.find(db, "file_2").gone, ownership.find(db, "file_9")) == (True, None)
        assert ownership.owners(db, ["file_1", "file_2", "file_4", "file_9"]) == {"file_1": "a", "file_4": "b"}
        assert ownership.owners(db, []) == {}
        assert [each.id for each in ownership.chosen(db, "a", "file", ["file_4", "file_3", "file_2", "file_3"])] == ["file_3"]


def test_a_list_has_pages_in_both_directions(path):
    with connect.changing(path) as db:
        for number in range(5):
            ownership.own(db, OwnedObject(f"file_{number}", "file", "a", float(number // 2), "{}"))
        ownership.own(db, OwnedObject("msgbatch_1", "batch", "a", 1.0, "{}"))
    with closing(writing(path)) as db:

        def page(**where):
            found = ownership.page(db, "a", "file", 2, **{name: ownership.find(db, id) for name, id in where.items()})
            return [each.id for each in found.items], found.more

        assert page() == (["file_4", "file_3"], True)
        assert page(after="file_3") == (["file_2", "file_1"], True)
        assert page(after="file_1") == (["file_0"], False)
        assert page(before="file_1") == (["file_3", "file_2"], True)
        assert page(before="file_3") == (["file_4"], False)


def test_a_ledger_of_before_takes_batches_once_it_is_read(tmp_path):
    """The tables come as a migration of their own, to ledgers that hold money already. (On a server, `gateway init` brings them.)"""
    path = new_ledger(tmp_path)
    with closing(writing(path)) as db:
        for table in ("belongings", "price_tables", "batches", "batch_usage"):
            db.execute(f"DROP TABLE {table}")
        db.execute("DELETE FROM _sqlite_migrations WHERE name = 'm003_shared_workspace'")
    early = CliRunner().invoke(batches_command, ["--ledger", url(path)])
    assert early.exit_code == 0, early.output
    with closing(writing(path)) as db:
        assert batches.open_batches(db) == []


def test_no_statement_of_a_batchs_path_reads_more_than_it_names(tmp_path):
    with closing(writing(new_ledger(tmp_path))) as db:
        for sql in (batches.FIND, batches.WAITS.numbered, batches.TAKE.numbered, batches.READ, batches.SUMS, batches.CLOSING, ownership.FIND, ownership.AFTER.numbered):
            steps = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", [1] * 9)]
            assert [step for step in steps if step.startswith("SCAN") and "CONSTANT" not in step] == [], sql


async def test_what_is_open_is_listed_for_people_and_for_programs(path):
    ledger = await opened(path)
    try:
        await a_batch(ledger)
        plain, as_json = (CliRunner().invoke(batches_command, ["--ledger", url(path), *more]) for more in ((), ("--json",)))
        await closed(ledger, anyway="batch_gone")
        nothing = CliRunner().invoke(batches_command, ["--ledger", url(path)])
    finally:
        await ledger.close()
    assert [result.exit_code for result in (plain, as_json, nothing)] == [0, 0, 0]
    assert re.search(r"reports  msgbatch_1 +2  \$0.0000", plain.output)
    [listed] = json.loads(as_json.output)
    assert {name: listed[name] for name in ("id", "app", "requests", "held_nano", "status")} == {
        "id": "msgbatch_1", "app": "reports", "requests": 2, "held_nano": 1000, "status": "in_progress",
    }  # fmt: skip
    assert listed["age_s"] > 0
    assert nothing.output == "No batch is open.\n"
