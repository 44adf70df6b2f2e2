"""Each guard taken away in turn: the property that it keeps must then be seen to fail. A guard whose loss nobody notices is none."""

import asyncio
import contextlib
import sqlite3
import time
from types import SimpleNamespace

import anthropic
import pytest
from gateway import gateway

from gateway_addon.calls.running import InFlightCall
from gateway_addon.identity import tokens
from gateway_addon.ledger import Ledger, NewCall, Outcome, Settlement, admin, connect, orphans, reservations
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.proxy import flow_values, hooks
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("idle_clock")

NOW = 1_790_000_000.0
CAP = SimpleNamespace(scope="app:app", window="day", amount_nano=1_000)


@pytest.fixture
def db(tmp_path):
    sqlite_files.create(tmp_path / "gateway.db")
    with connect.changing(tmp_path / "gateway.db") as db:
        admin.issue_token(db, "app", "0" * 64, who="test", now=NOW)
        yield db


def held_nano(db) -> int:
    return db.execute("""SELECT reserved_nano + spent_nano FROM balances WHERE scope = 'app:app' AND "window" = 'day'""").fetchone()[0]


def reserve_ten(db):
    for _ in range(10):
        reservations.reserve(db, "owner", NewCall("app", None, 1), 300, [CAP], now=NOW)


def test_the_where_of_the_reservation_keeps_the_cap(db, monkeypatch):
    reserve_ten(db)
    assert held_nano(db) == 900
    monkeypatch.setattr(reservations, "RESERVE", reservations.RESERVE.split("WHERE NOT EXISTS")[0])
    reserve_ten(db)
    assert held_nano(db) > CAP.amount_nano


def test_the_where_of_a_top_up_keeps_the_cap(db, monkeypatch):
    call = reservations.reserve(db, "owner", NewCall("app", None, 1), 300, [CAP], now=NOW)
    assert not reservations.extend(db, call.call_id, 800, [CAP], now=NOW)
    assert held_nano(db) == 300
    monkeypatch.setattr(reservations, "EXTEND", reservations.EXTEND.split("AND NOT EXISTS")[0])
    assert reservations.extend(db, call.call_id, 800, [CAP], now=NOW)
    assert held_nano(db) > CAP.amount_nano


def test_the_unique_index_keeps_a_call_from_being_resolved_twice(db):
    reserved = reservations.reserve(db, "owner", NewCall("app", None, 1), 300, [CAP], now=NOW)
    assert reservations.settle(db, reserved.call_id, Settlement(200), now=NOW).first
    assert not reservations.void(db, reserved.call_id, Outcome(), now=NOW).first
    assert held_nano(db) == 200
    db.execute("DROP INDEX entries_resolve_once")
    assert reservations.void(db, reserved.call_id, Outcome(), now=NOW).first
    assert db.execute("SELECT min(open) FROM balances").fetchone() == (-1,)


async def test_the_sweep_settles_what_a_dead_process_held(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'gateway.db'}"

    async def open_after_a_crash() -> int:
        ledger = await Ledger.open(url)
        standings = await ledger.standing(["app:app"], (), now=time.time())
        await ledger.close()
        return next(standing.open for standing in standings if standing.window == "ever")

    ledger = await Ledger.open(url, create=True)
    await ledger.change(lambda db: admin.issue_token(db, "app", tokens.digest("t"), who="test", now=NOW))
    await ledger.reserve(NewCall("app", None, 1), 300, [], now=time.time())
    await ledger.close()  # without a settlement, and without its lock: as good as dead
    with monkeypatch.context() as patched:
        patched.setattr(orphans, "settle_orphans", lambda db, dead, now: 0)
        assert await open_after_a_crash() == 1
    assert await open_after_a_crash() == 0


HELLO = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("guarded", [True, False])
async def test_the_wrapper_of_a_hook_keeps_a_failure_from_forwarding(tmp_path, monkeypatch, guarded):
    """mitmproxy logs an exception of an addon and lets the flow go on. (inject.py would still stop it: it has no grant.)"""

    async def failing(self, flow):
        if not guarded:
            flow_state = self.flow_states[flow.id]
            asked = flow_values.request_of(flow)
            flow_state.admission = await self.gateway.admit(flow_state.caller, asked, time.time())  # what a hook that fails late leaves behind
            flow_state.grant = self._grant(flow_state.caller, asked, flow.request.headers.fields, flow.request.raw_content)
        raise RuntimeError("a bug")

    monkeypatch.setattr(hooks.GatewayAddon, "request", hooks.guarded("request")(failing) if guarded else failing)
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        with contextlib.suppress(anthropic.APIError):
            await gw.client().messages.create(**HELLO)
        gw.addon.flow_states.clear()
        assert (len((await api.settled()).messages()) == 0) is guarded


@pytest.mark.parametrize("guarded", [True, False])
async def test_the_cut_keeps_a_stream_within_its_grant(tmp_path, monkeypatch, guarded):
    if not guarded:
        monkeypatch.setattr(InFlightCall, "covers", lambda self, now: True)
        monkeypatch.setattr(InFlightCall, "covered_until", lambda self: float("inf"))
    policy = "models: {allow: [claude-opus-5-5]}\ncaps: {day: $0.15}\nreserve: progressive\n"
    behaviour = Behaviour(output_tokens=9_000, tokens_per_s=2_500, tokens_per_event=50)
    async with Simulator(behaviour=behaviour) as api, gateway(tmp_path, api, {"app": policy}) as gw:
        body = HELLO | {"model": "claude-opus-5-5", "max_tokens": 60_000, "stream": True}
        async with gw.client().messages.with_streaming_response.create(**body) as answer:
            with contextlib.suppress(Exception):
                async for _ in answer.iter_bytes():
                    pass
        await gw.quiet()
        billed_nano, booked_nano = (await api.settled()).billed_nano, await gw.spent_nano()
    if guarded:
        assert billed_nano <= booked_nano <= 150_000_000
    else:
        assert billed_nano > 150_000_000


async def test_only_an_input_that_cannot_grow_is_released_early(tmp_path, monkeypatch):
    """Server tools raise the input after `message_start`: released on its word, the call would cost more than it holds."""
    policy = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $50}\nfeatures: {web_search: {max_uses: 3}}\n"
    body = HELLO | {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}], "stream": True}
    behaviour = Behaviour(late_input_tokens=60_000, output_tokens=40, delay_ms=5)

    async def overruns(folder) -> bool:
        folder.mkdir()
        async with Simulator(behaviour=behaviour) as api, gateway(folder, api, {"app": policy}) as gw:
            async with gw.client().messages.with_streaming_response.create(**body) as answer:
                async for _ in answer.iter_bytes():
                    pass
            await gw.quiet()
        with contextlib.closing(sqlite3.connect(folder / "gateway.db")) as db:
            return "overrun" in db.execute("SELECT flags FROM calls").fetchone()[0]

    assert not await overruns(tmp_path / "kept")
    release = InFlightCall.release_nano

    def released_on_its_word(self):
        from dataclasses import replace

        self.hold = self.hold._replace(quote=replace(self.hold.quote, releasable=True))
        return release(self)

    monkeypatch.setattr(InFlightCall, "release_nano", released_on_its_word)
    assert await overruns(tmp_path / "removed")
    await asyncio.sleep(0)
