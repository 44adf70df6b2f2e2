"""Open batches are looked after: closed where nobody fetches them, by one process at a time, through kills, and whatever the API answers."""

import asyncio
import contextlib
import json
import time
from functools import partial

import anthropic
import postgresql
import pytest
import upstreams
from gateway import gateway
from ledgers import rows, until
from processes import buried, ledgered

from gateway_addon.clocks import Clocks
from gateway_addon.http_client import Unanswered
from gateway_addon.ledger import batches, connect
from gateway_addon.ledger.batches import PAUSE_MAX_S
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.operations.batch_poller import KEPT_FOR_S, LOST_AFTER_S, BatchPoller
from gateway_addon.policy import load
from gateway_addon.simulator import KEY, Behaviour, Simulator
from gateway_addon.upstreams import client as upstream

APP = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\nendpoints: [batches]\n"
SLOW = Behaviour(batch_s=60)
REQUESTS = [
    {"custom_id": f"r{number}", "params": {"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}}
    for number in range(3)
]


class Fake:
    """An upstream of which each path has an answer, or an exception."""

    encoding = None

    def __init__(self, **answers):
        self.answers, self.asked = answers, []
        self.status, self._body = 200, b""

    @contextlib.contextmanager
    def __call__(self, path):
        self.asked.append(path)
        answer = self.answers["results" if path.endswith("/results") else "batch"]
        if isinstance(answer, Exception):
            raise answer
        self.status, self._body = answer
        yield self

    def read(self, size):
        piece, self._body = self._body[:size], self._body[size:]
        return piece


@contextlib.asynccontextmanager
async def kept(folder, ask=None, behaviour=SLOW):
    """A gateway with one open batch, a keeper whose clock is `clock[0]`, and the batch's id."""
    async with Simulator(behaviour=behaviour) as api, gateway(folder, api, {"app": APP}, "timeouts: {batch_poll: 60s}") as gw:
        made = await gw.client().messages.batches.create(requests=REQUESTS)
        clock = [time.time() + 61]
        ask = ask or (lambda path: upstream.ask(api.url, path, KEY))
        batch_poller = BatchPoller(gw.gateway.ledger, lambda: gw.gateway.policy, ask, gw.gateway.batch_closed, Clocks(lambda: clock[0], lambda: clock[0]))
        yield gw, batch_poller, clock, made.id


async def line(gw):
    found = await gw.gateway.ledger.look(batches.open_batches)
    return found[0] if found else None


def shown(id, status):
    return 200, json.dumps({"id": id, "processing_status": status}).encode()


async def test_unfetched_batch_is_closed_at_the_apis_bill(tmp_path):
    """A batch that nobody fetches is closed at what the API billed."""
    async with kept(tmp_path) as (gw, batch_poller, _clock, id):
        gw.api.batches.made[id].ends_at = time.time()
        assert await batch_poller.look()
        assert not await batch_poller.look(), "nothing is left to look at"
        assert (await gw.spent_nano("app:app"), await gw.held_nano()) == (gw.api.book.billed_nano, 0)
        assert gw.api.book.billed_nano > 0
        [batch] = [batch async for batch in gw.client().messages.batches.list()]
        assert (batch.processing_status, batch.request_counts.succeeded) == ("ended", 3), "the list is fresh without anybody asking"


async def test_running_batch_is_polled_less_often_as_it_ages(tmp_path):
    """A batch that runs is looked at less often the older it is."""
    async with kept(tmp_path) as (gw, batch_poller, clock, _id):
        began = (await line(gw)).made_at
        pauses = []
        for age_s in (61, 3600, 80_000):
            clock[0] = began + age_s
            assert await batch_poller.look()
            pauses.append(round((await line(gw)).look_at - clock[0]))
        assert pauses == [60, 180, 900]
        assert (await line(gw)).status == "in_progress"


async def test_nobody_is_asked_before_it_is_time(tmp_path):
    fake = Fake()
    async with kept(tmp_path, fake) as (_gw, batch_poller, clock, _id):
        clock[0] = time.time() + 30
        assert not await batch_poller.look()
        assert fake.asked == []


FAILURES = {
    "an error of the API's": (500, b"{}"),
    "a rate limit": (429, b"{}"),
    "a key that is not taken": (401, b"{}"),
    "a redirect": (302, b""),
    "another program's page": (200, b"<html>"),
    "another batch": shown("msgbatch_another", "ended"),
    "silence": Unanswered("gone"),
    "no network": OSError("refused"),
    "a bug": RuntimeError("a bug"),
}


async def test_failed_polls_are_repeated_after_growing_pauses(tmp_path):
    """After a failure the API is asked again after longer and longer pauses."""
    fake = Fake()
    async with kept(tmp_path, fake) as (gw, batch_poller, clock, id):
        held = await gw.held_nano()
        for name, fake.answers["batch"] in FAILURES.items():
            pauses = []
            for _ in range(5):
                assert await batch_poller.look(), name
                pauses.append(round((await line(gw)).look_at - clock[0]))
                clock[0] = (await line(gw)).look_at
            assert pauses == [120, 240, 480, PAUSE_MAX_S, PAUSE_MAX_S], name
            assert (await gw.held_nano(), await gw.spent_nano()) == (held, 0), name
            await gw.gateway.ledger.write(partial(batches.record_poll, id=id, status="in_progress", look_at=clock[0], failures=0))


async def look_until_settled(gw, batch_poller, clock, held) -> float:
    """Look whenever it is time; return for how long the whole hold stood."""
    began = clock[0]
    while await line(gw) is not None:
        assert (await gw.held_nano(), await gw.spent_nano()) == (held, 0)
        clock[0] = max(clock[0], (await line(gw)).look_at)
        assert await batch_poller.look()
    return clock[0] - began


async def corrected(gw) -> bool:
    return (await gw.spent_nano(), await gw.held_nano()) == (gw.api.book.billed_nano, 0)


async def ended(client, id) -> bool:
    return (await client.messages.batches.retrieve(id)).processing_status == "ended"


async def fetch_results(gw, id) -> None:
    """As its app does, through the gateway, once the simulated API has them."""
    client = gw.client()
    await until(lambda: ended(client, id))
    assert len([each async for each in await client.messages.batches.results(id)]) == len(REQUESTS)
    await gw.quiet()


async def test_a_batch_that_the_api_has_no_more_is_billed_after_a_day(tmp_path):
    """One 404 settled a batch at its hold, 47 times its cost, for ever."""
    async with kept(tmp_path, Fake(batch=(404, b"{}"))) as (gw, batch_poller, clock, _id):
        held = await gw.held_nano()
        assert LOST_AFTER_S <= await look_until_settled(gw, batch_poller, clock, held) <= LOST_AFTER_S + 2 * PAUSE_MAX_S
        assert (await gw.spent_nano(), await gw.held_nano()) == (held, 0)


async def test_a_batch_that_is_found_again_has_a_day_again(tmp_path):
    fake = Fake(batch=(404, b"{}"))
    async with kept(tmp_path, fake) as (gw, batch_poller, clock, id):
        for answer, days in (((404, b"{}"), 0.9), (shown(id, "in_progress"), 0.1), ((404, b"{}"), 0.9)):
            fake.answers["batch"] = answer
            assert await batch_poller.look()
            clock[0] += days * LOST_AFTER_S
        assert await batch_poller.look()
        assert (await line(gw), await gw.spent_nano()) != (None, 0)
        assert await gw.spent_nano() == 0


async def test_results_that_come_after_all_correct_the_bill_once(tmp_path):
    async with kept(tmp_path, Fake(batch=(404, b"{}")), Behaviour()) as (gw, batch_poller, clock, id):
        held = await gw.held_nano()
        await look_until_settled(gw, batch_poller, clock, held)
        assert await gw.gateway.ledger.look(partial(batches.custom_ids, id=id)) is not None
        for _ in range(2):
            await fetch_results(gw, id)
            await until(lambda: corrected(gw))
        assert await gw.gateway.ledger.look(partial(batches.custom_ids, id=id)) is None, "they are needed no more"
        [(flags, adjustments)] = rows(
            tmp_path / "gateway.db",
            "SELECT flags, (SELECT count(*) FROM entries WHERE call_id = calls.id AND kind = 'adjust') FROM calls"
            " WHERE endpoint = 'batches.create'",
        )
        assert ("corrected" in flags.split(), "estimated" in flags, adjustments) == (True, False, 1)
        with connect.reading(tmp_path / "gateway.db") as db:
            assert invariants.findings(db) == []


async def test_one_that_fails_for_a_month_is_settled_at_what_it_held(tmp_path):
    async with kept(tmp_path, Fake(batch=(500, b"{}"))) as (gw, batch_poller, clock, _id):
        held = await gw.held_nano()
        clock[0] += KEPT_FOR_S
        assert await batch_poller.look()
        assert (await gw.spent_nano(), await gw.held_nano(), await line(gw)) == (held, 0, None)


@pytest.mark.parametrize("results", [b"", b"junk\n", b'{"custom_id": "r0", "result": {"type": "expired"}}\n'])
async def test_results_that_lack_some_are_read_again_for_a_day(tmp_path, results):
    fake = Fake(results=(200, results))
    async with kept(tmp_path, fake) as (gw, batch_poller, clock, id):
        fake.answers["batch"] = shown(id, "ended")
        held = await gw.held_nano()
        assert await look_until_settled(gw, batch_poller, clock, held) >= LOST_AFTER_S
        assert (await gw.spent_nano(), await gw.held_nano(), await line(gw)) == (held, 0, None)


def result(custom_id: str, kind: str = "succeeded", **usage: int) -> bytes:
    message = json.loads(upstreams.message(**usage))
    return json.dumps({"custom_id": custom_id, "result": {"type": kind} | ({"message": message} if kind == "succeeded" else {})}).encode() + b"\n"


@pytest.mark.parametrize("foreign", ["not_mine", "\ud800" * 99], ids=["of no request", "that is none"])
async def test_results_are_held_against_the_batchs_own_ids(tmp_path, foreign):
    """A line for a request that it does not have stood for one that was missing, at the price of that line."""
    fake, ids = Fake(), [each["custom_id"] for each in REQUESTS]
    async with kept(tmp_path, fake) as (gw, batch_poller, clock, id):
        fake.answers["batch"] = shown(id, "ended")
        fake.answers["results"] = 200, b"".join(result(each, output_tokens=2) for each in ids[1:]) + result(foreign, output_tokens=99)
        assert await batch_poller.look()
        assert (await gw.spent_nano(), (await line(gw)).results) == (0, len(ids) - 1)
        clock[0] = (await line(gw)).look_at
        fake.answers["results"] = 200, b"".join(result(each, output_tokens=2) for each in ids) + result(foreign, output_tokens=99)
        assert await batch_poller.look()
        assert await line(gw) is None
    assert rows(tmp_path / "gateway.db", "SELECT sum(output_tokens) FROM usage") == [(2 * len(ids),)]
    [(flags,)] = rows(tmp_path / "gateway.db", "SELECT flags FROM calls WHERE endpoint = 'batches.create'")
    assert "results_foreign" in flags.split()


async def test_result_that_errs_then_succeeds_is_billed_and_flagged(tmp_path):
    """The second line was left out as one that is there already: what the provider billed was free."""
    fake, ids = Fake(), [each["custom_id"] for each in REQUESTS]
    async with kept(tmp_path, fake) as (gw, batch_poller, _clock, id):
        fake.answers["batch"] = shown(id, "ended")
        fake.answers["results"] = 200, result(ids[0], "errored") + b"".join(result(each, output_tokens=2) for each in ids)
        assert await batch_poller.look()
        assert await line(gw) is None
    path = tmp_path / "gateway.db"
    assert rows(path, "SELECT sum(output_tokens) FROM usage") == [(2 * len(ids),)]
    [(flags,)] = rows(path, "SELECT flags FROM calls WHERE endpoint = 'batches.create'")
    assert "results_contradict" in flags.split()


async def test_results_that_break_off_are_read_again(tmp_path):
    async with kept(tmp_path, behaviour=Behaviour(cut_after_bytes=900)) as (gw, batch_poller, clock, _id):
        await asyncio.sleep(0.01)
        assert await batch_poller.look()
        assert ((await line(gw)).failures, await gw.spent_nano()) == (1, 0)
        gw.api.behaviour = Behaviour()
        clock[0] = (await line(gw)).look_at
        assert await batch_poller.look()
        assert (await gw.spent_nano(), await gw.held_nano()) == (gw.api.book.billed_nano, 0)


class Slow(Fake):
    """Each piece of the results takes half a turn."""

    clock = [0.0]  # noqa: RUF012

    def read(self, size):
        self.clock[0] += batches.TURN_S / 2 if self.asked[-1].endswith("/results") else 0
        return super().read(100)


async def test_a_reading_that_takes_long_keeps_its_turn(tmp_path, monkeypatch):
    lines = b"".join(json.dumps({"custom_id": f"r{number}", "result": {"type": "expired"}}).encode() + b"\n" for number in range(3))
    fake = Slow(results=(200, lines))
    async with kept(tmp_path, fake) as (gw, batch_poller, clock, id):
        fake.answers["batch"], fake.clock = shown(id, "ended"), clock
        wrote, turns = batch_poller._ledger.write, []

        async def watched(write, *scopes):
            answer = await wrote(write, *scopes)
            if (found := await line(gw)) is not None:
                turns.append(found.look_at > clock[0])
            return answer

        monkeypatch.setattr(batch_poller._ledger, "write", watched)
        assert await batch_poller.look()
        assert (len(turns) > 3, all(turns), await gw.held_nano()) == (True, True, 0)


async def test_a_batch_is_priced_by_the_table_of_its_admission(tmp_path):
    async with kept(tmp_path) as (gw, batch_poller, _clock, id):
        gw.api.batches.made[id].ends_at = time.time()
        dearer = tmp_path / "policies" / "prices.yaml"
        dearer.write_text("multiplier: 3\n")
        gw.gateway.policy = load(tmp_path / "policies")
        assert await batch_poller.look()
        assert await gw.spent_nano() == gw.api.book.billed_nano


async def open_batches(ledger):
    with connect.reading(ledger) as db:
        return batches.open_batches(db), invariants.findings(db)


async def all_settled(ledger) -> bool:
    return not (await open_batches(ledger))[0]


@pytest.mark.parametrize("engine", ["sqlite", pytest.param("postgresql", marks=[pytest.mark.soak, pytest.mark.xdist_group("postgresql")])])
async def test_killed_gateways_batch_is_settled_once_by_the_next(tmp_path, engine):
    """A killed gateway keeps the reservation, and the next one settles it once."""
    server = postgresql.shared().ledger() if engine == "postgresql" else None
    async with Simulator(behaviour=SLOW) as api:
        place = ledgered(tmp_path, api.url, {"app": APP}, "timeouts: {drain: 5s, batch_poll: 0.5s}\n", server)
        process, url = await place.serve()
        async with anthropic.AsyncAnthropic(base_url=url, api_key=place.tokens["app"], max_retries=0) as client:
            made = await client.messages.batches.create(requests=REQUESTS)
        process.kill()
        await buried(process)
        [before], _ = await open_batches(place.ledger)
        async with place.serving(1) as [url]:
            [after], _ = await open_batches(place.ledger)
            assert (after.id, after.held_nano) == (before.id, before.held_nano) == (made.id, before.held_nano)
            api.batches.made[made.id].ends_at = time.time()
            await until(lambda: all_settled(place.ledger))
            async with anthropic.AsyncAnthropic(base_url=url, api_key=place.tokens["app"], max_retries=0) as client:
                assert len([line async for line in await client.messages.batches.results(made.id)]) == 3
        found, wrong = await open_batches(place.ledger)
        with connect.reading(place.ledger) as db:
            spent, held = db.execute("""SELECT spent_nano, reserved_nano FROM balances WHERE scope = 'app:app' AND "window" = 'ever'""").fetchone()
        assert (found, wrong, spent, held) == ([], [], api.book.billed_nano, 0)


async def test_of_several_keepers_one_asks(tmp_path):
    async with kept(tmp_path) as (gw, batch_poller, clock, id):
        gw.api.batches.made[id].ends_at = time.time()
        fake_clock = clock[0]
        others = [BatchPoller(gw.gateway.ledger, lambda: gw.gateway.policy, partial(upstream.ask, gw.api.url, key=KEY), gw.gateway.batch_closed, Clocks(lambda: fake_clock)) for _ in range(3)]
        asked = await asyncio.gather(*(each.look() for each in (batch_poller, *others)))
        assert sorted(asked) == [False, False, False, True]
        assert await gw.spent_nano() == gw.api.book.billed_nano
