"""The ledger's server goes away in the middle of the work: what ended meanwhile is on this machine's disk, and written once."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time

import anthropic
import postgresql
import pytest
from gateway import gateway
from ledgers import CALL, DAY_CAP, NOON, balance, die, rows, until, url

from gateway_addon.ledger import Ledger, LedgerUnavailable, Reserved, Settlement, admin, connect
from gateway_addon.ledger import ledger as ledger_module
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.store import postgres
from gateway_addon.ledger.store.journal import Journal
from gateway_addon.ledger.types import RecordedEnd
from gateway_addon.simulator import Simulator


@pytest.fixture
def server():
    with postgresql.crashing() as mine:
        yield mine


@pytest.fixture
def place(server):
    made = server.ledger()
    with connect.changing(made) as db:
        admin.issue_token(db, "reports", "d1", who="test", now=NOON)
    return made


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    return tmp_path


def journals(home):
    return sorted(path.name for path in home.glob(".local/state/gateway/unwritten/*/*"))


def journal_of(place, home, owner):
    """Where a process on this ledger would keep its journal."""
    [(identity,)] = rows(place, "SELECT value FROM settings WHERE name = 'identity'")
    return Journal(home / ".local/state/gateway" / "unwritten" / identity, owner)


def sound(place):
    with connect.reading(place) as db:
        return invariants.findings(db) == []


async def refused(ledger, text):
    async with asyncio.timeout(60):
        with pytest.raises(LedgerUnavailable, match=text):
            await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)


async def test_a_crashed_server_refuses_at_once_and_settles_once_later(server, place, home):
    """It takes the settlement when it is back."""
    ledger = await Ledger.open(url(place), now=NOON)
    held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
    assert (await ledger.look_up_token("d1", now=NOON)).token.app == "reports"
    await asyncio.to_thread(server.stop)
    settled = ledger.settle(held, Settlement(200), now=NOON)
    await refused(ledger, "gives no connection|shutting down")
    with pytest.raises(LedgerUnavailable, match=r"gives no connection|shutting down"):
        await ledger.look_up_token("d1", now=NOON)
    await until(lambda: len(journals(home)) == 1)
    await asyncio.to_thread(server.start)
    assert (await ledger.look_up_token("d1", now=NOON)).token.app == "reports", "no read waits for an earlier one's next try"
    assert (await asyncio.wait_for(settled, 60)).first
    assert isinstance(await ledger.reserve(CALL, 800, DAY_CAP, now=NOON), Reserved)
    assert balance(place) == (200, 800, 1)
    assert journals(home) == []
    await ledger.close()


DYING = """
import asyncio, json, sys
sys.path.insert(0, {tests!r})
from ledgers import CALL, DAY_CAP, NOON, Part
from gateway_addon.ledger import Ledger, Outcome, Settlement

async def main():
    ledger = await Ledger.open({url!r}, now=NOON)
    held = [await ledger.reserve(CALL, 100, DAY_CAP, now=NOON) for _ in range(4)]
    print(json.dumps([each.call_id for each in held]), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    ledger.settle(held[0], Settlement(30, (Part(30),), Outcome(200, request_id="req_1")), now=NOON)
    ledger.settle(held[1], Settlement(170, (Part(170),)), now=NOON)
    ledger.void(held[2], now=NOON)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_killed_gateways_journal_is_booked_once_it_is_back(server, place, home, request):
    """The gateway was killed while the server was down; both come back."""
    code = DYING.format(tests=str(request.path.parents[2] / "support"), url=url(place))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    exact, dear, voided, unknown = json.loads(await asyncio.to_thread(process.stdout.readline))
    await asyncio.to_thread(server.stop)
    process.stdin.write("\n")
    process.stdin.flush()
    await until(lambda: [path.read_bytes().count(b"\n") for path in home.glob(".local/state/gateway/unwritten/*/*")] == [3])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    await asyncio.to_thread(server.start)
    for _ in range(2):
        ledger = await Ledger.open(url(place), now=NOON)
        states = {number: (state, flags) for number, state, flags in rows(place, "SELECT id, state, flags FROM calls")}
        assert states[exact] == ("settled", "")
        assert states[dear] == ("settled", "overrun")
        assert states[voided] == ("voided", "")
        assert states[unknown][0] == "open"  # its process's lease still runs
        assert balance(place) == (200, 100, 1)
        await ledger.close()
    assert journals(home) == []
    assert rows(place, "SELECT request_id FROM calls WHERE id = $1", exact) == [("req_1",)]
    assert sound(place)


@pytest.mark.parametrize(("cost_nano", "booked_nano"), [(200, 300), (450, 450)])
async def test_a_journal_after_the_sweep_adds_once_and_never_subtracts(place, home, cost_nano, booked_nano):
    """The survivors had settled its calls at the held amount."""
    survivor = await Ledger.open(url(place), now=NOON)
    gone = await Ledger.open(url(place), now=NOON)
    held = await gone.reserve(CALL, 300, DAY_CAP, now=NOON)
    await gone.close()
    assert await survivor.sweep(now=NOON) == 1
    kept = journal_of(place, home, "gone")
    kept.keep([RecordedEnd("settle", held.call_id, held.owner, Settlement(cost_nano), NOON)])
    die(kept)
    again = kept._path.with_suffix(".copy")
    shutil.copy(kept._path, again)
    await survivor.sweep(now=NOON)
    assert balance(place) == (booked_nano, 0, 0)
    with connect.changing(place) as db:  # a person corrects it; the same line, read again, does not correct him
        admin.adjust(db, held.call_id, -50, who="test", why="the invoice shows less", now=NOON)
    again.rename(kept._path)
    await survivor.sweep(now=NOON)
    assert balance(place) == (booked_nano - 50, 0, 0)
    await survivor.close()
    assert journals(home) == []
    assert sound(place)


async def test_another_ledgers_journal_is_left_alone(place, home, caplog):
    """The journal of a restored ledger is set aside."""
    ledger = await Ledger.open(url(place), now=NOON)
    held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
    other = Journal(home / ".local/state/gateway" / "unwritten" / "another", "theirs")
    for kept in (other, journal_of(place, home, "restored")):
        kept.keep([RecordedEnd("settle", held.call_id, "somebody", Settlement(1), NOON)])
        die(kept)
    await ledger.sweep(now=NOON)
    assert balance(place) == (0, 300, 1)
    assert journals(home) == ["restored.unread", "theirs.jsonl"]
    assert "1 calls are not in this ledger" in caplog.text
    await ledger.close()


async def test_a_home_that_cannot_be_written_is_said_at_the_start(place, monkeypatch, caplog):
    monkeypatch.setenv("HOME", "/dev/null")
    await (await Ledger.open(url(place), now=NOON)).close()
    assert "will wait in memory alone" in caplog.text


# --- the lease


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(postgres, "LEASE_S", 4.0)
    monkeypatch.setattr(ledger_module, "CUT_AHEAD_S", 2.2)


async def stream(gw, **simulate):
    """The text of a stream, as far as it came, and when it ended."""
    ask = {"role": "user", "content": f"simulate: {json.dumps({"output_tokens": 4000, **simulate})}"}
    received = b""
    async with gw.client().messages.with_streaming_response.create(model="claude-haiku-4-5", max_tokens=4000, messages=[ask], stream=True) as answer:
        async for chunk in answer.iter_bytes():
            received += chunk
    return received.decode(), time.time()


@pytest.mark.parametrize("way", ["stopped", "silent"])
async def test_a_gateway_that_loses_its_lease_cuts_its_streams_before(server, place, home, short_lease, way):
    async with Simulator() as api, postgresql.Relay(server) as relay, gateway(home, api, ledger_url=relay.url(place)) as gw:
        running = asyncio.ensure_future(stream(gw, tokens_per_s=200, tokens_per_event=5, after_disconnect_s=0.5))
        whole = asyncio.ensure_future(gw.client().messages.create(
            model="claude-haiku-4-5", max_tokens=800, messages=[{"role": "user", "content": 'simulate: {"tokens_per_s": 280, "output_tokens": 800}'}]
        ))  # fmt: skip
        await until(lambda: len(gw.gateway.streams.running) == 2)
        await asyncio.sleep(0.3)
        [(lease_until,)] = rows(place, "SELECT lease_until FROM owners")
        if way == "stopped":
            await asyncio.to_thread(server.stop)
        relay.silent = way == "silent"
        text, ended_at = await asyncio.wait_for(running, 60)
        assert ended_at < lease_until
        assert "lost its ledger" in text
        assert text.endswith("\n\n")
        with pytest.raises(anthropic.InternalServerError, match="ledger") as caught:
            await gw.client().messages.create(model="claude-haiku-4-5", max_tokens=10, messages=[{"role": "user", "content": "hi"}])
        assert caught.value.response.headers["x-gateway-refusal"] == "ledger"
        await asyncio.sleep(max(0, lease_until + 0.1 - time.time()))
        if way == "stopped":
            await asyncio.to_thread(server.start)
        survivor = await Ledger.open(place.url)
        await survivor.sweep(now=time.time())
        assert {state for (state,) in rows(place, "SELECT state FROM calls")} == {"settled"}
        relay.silent = False
        assert (await whole).usage.output_tokens == 800, "its answer is paid for in any case"
        await until(lambda: journals(home) == [])
        book = await api.settled()
        assert sum(nano for (nano,) in rows(place, "SELECT spent_nano FROM entries")) >= book.billed_nano
        await survivor.close()
        assert sound(place)


async def test_a_gateway_frozen_beyond_its_lease_cuts_its_streams(place, home, short_lease):
    """The clock of its own that it would have kept to stood still with it."""
    async with Simulator() as api, gateway(home, api, ledger_url=place.url) as gw:
        running = asyncio.ensure_future(stream(gw, tokens_per_s=200, tokens_per_event=5))
        await until(lambda: len(gw.gateway.streams.running) == 1)
        before = gw.gateway.ledger.owner
        with connect.changing(place) as db:
            db.execute("DELETE FROM owners WHERE id = $1", (before,))
        text, _ = await asyncio.wait_for(running, 60)
        assert "lost its ledger" in text
        assert gw.gateway.ledger.owner != before
        answer = await gw.client().messages.create(model="claude-haiku-4-5", max_tokens=10, messages=[{"role": "user", "content": "hi"}])
        assert answer.usage.output_tokens
