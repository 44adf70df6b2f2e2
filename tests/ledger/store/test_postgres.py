"""A ledger on a server: what happens when the server, or a gateway, is slow, gone, full, or back again."""

import asyncio
import signal
import subprocess
import threading
import time
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import anthropic
import postgresql
import psycopg
import pytest
from gateway import gateway
from ledgers import CALL, DAY_CAP, NOON, Cap, balance, new_ledger, rows, until, url

from gateway_addon.ledger import (
    Ledger,
    LedgerUnavailable,
    Reserved,
    ServerAddress,
    Settlement,
    admin,
    connect,
    orphans,
    reservations,
    state,
)
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.store import postgres, postgres_session
from gateway_addon.ledger.types import Reservation
from gateway_addon.simulator import Simulator


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Journals go here, not into the home of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def server():
    return new_ledger(None, "postgresql")


@pytest.fixture
async def ledger(server):
    opened = await Ledger.open(url(server), now=NOON)
    yield opened
    await opened.close()


async def refused(ledger, text):
    async with asyncio.timeout(60):
        with pytest.raises(LedgerUnavailable, match=text):
            await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)


def test_a_server_of_the_tests_dies_with_their_process(tmp_path):
    """Killed, a test's process closes this pipe as it is closed here: a stand-in of the server ends, and its folder is gone."""
    folder = tmp_path / "pg"
    (folder / "data").mkdir(parents=True)
    with subprocess.Popen(["sleep", "600"]) as server, postgresql.removed_with_this_process(folder) as watcher:
        (folder / "data" / "postmaster.pid").write_text(f"{server.pid}\n{folder}\n")
        watcher.stdin.close()
        assert server.wait(300) == -signal.SIGQUIT
    assert not folder.exists()


# --- failure is refusal, quickly


async def test_a_slow_server_refuses_in_time_and_leaves_nothing_open(server, ledger):
    """Somebody's transaction sits on the app's balance: a lock is waited for, not for ever."""
    held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
    with closing(psycopg.connect(url(server))) as shell:
        shell.execute("SELECT 1 FROM gateway.app_balances FOR UPDATE")
        settled = ledger.settle(held, Settlement(200), now=NOON)
        await refused(ledger, "did not answer within 2 s")
        shell.rollback()
    assert (await asyncio.wait_for(settled, 60)).first
    await until(lambda: balance(server) == (200, 0, 0))


async def test_a_silent_server_is_given_up_and_found_again(server, monkeypatch):
    """Neither TCP nor the server's own limits notice it: what is sent is acknowledged, and no answer comes."""
    monkeypatch.setattr(postgres_session, "SILENCE_S", 0.9)
    async with postgresql.Relay(postgresql.shared()) as relay:
        ledger = await Ledger.open(relay.url(server), timeout_s=0.6, now=NOON)
        held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
        assert (await ledger.look_up_token("d1", now=NOON)).token.app == "reports"
        relay.silent = True
        settled = ledger.settle(held, Settlement(200), now=NOON)
        await refused(ledger, "did not answer within 0.6 s")
        with pytest.raises(LedgerUnavailable, match="did not answer within"):
            await ledger.look_up_token("d1", now=NOON)
        await asyncio.sleep(postgres_session.SILENCE_S)  # the threads that hang in it give up too
        relay.silent = False
        assert (await asyncio.wait_for(settled, 60)).first
        assert (await ledger.look_up_token("d1", now=NOON)).token.app == "reports"
        await ledger.close()
    assert balance(server) == (200, 0, 0)


async def test_a_read_only_server_is_named_and_recovered_from(server, ledger):
    name = url(server).partition("@/")[2].partition("?")[0]
    with closing(psycopg.connect(url(server), autocommit=True)) as shell:
        shell.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
        shell.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
        await refused(ledger, "postgresql:")
        await refused(ledger, "read-only")
        shell.execute("SET default_transaction_read_only = off")
        shell.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only".encode())
        shell.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
    await asyncio.sleep(0.3)
    for _ in range(3):
        try:
            assert isinstance(await ledger.reserve(CALL, 100, DAY_CAP, now=NOON), Reserved)
            break
        except LedgerUnavailable:
            continue
    else:
        raise AssertionError("it did not recover")


async def test_a_server_without_connections_is_named(server):
    with closing(psycopg.connect(url(server), autocommit=True)) as shell:
        shell.execute("CREATE ROLE modest LOGIN CONNECTION LIMIT 0")
        try:
            with pytest.raises(LedgerUnavailable, match="too many connections for role"):
                await Ledger.open(url(server).replace("gateway@", "modest@"))
        finally:
            shell.execute("DROP ROLE modest")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda address: address.replace("/test_", "/nowhere_"), "nowhere_.* does not exist"),
        (lambda address: address.replace("gateway@", "stranger@"), "role \"stranger\" does not exist"),
        (lambda address: "postgresql://gateway:secret@127.0.0.1:1/x", "gives no connection"),
    ],
)
async def test_a_wrong_address_is_a_sentence_without_the_password(server, change, sentence):
    with pytest.raises(LedgerUnavailable, match=sentence) as caught:
        await Ledger.open(change(url(server)))
    assert "secret" not in str(caught.value)


async def test_an_empty_database_is_no_ledger_until_init():
    place = ServerAddress(postgresql.shared().database())
    with pytest.raises(LedgerUnavailable, match="has no ledger: `gateway init` makes one"):
        await Ledger.open(place.url)
    connect.create(place)
    connect.create(place)
    await (await Ledger.open(place.url)).close()


# --- nodes and leases


async def test_a_node_without_a_lease_is_fenced_and_gets_a_new_name(server, ledger):
    held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
    before = ledger.owner
    other = await Ledger.open(url(server), now=NOON)
    with closing(psycopg.connect(url(server), autocommit=True)) as shell:
        shell.execute("UPDATE gateway.owners SET lease_until = 0 WHERE id = %s", (before,))
    assert await other.sweep(now=NOON) == 1
    assert rows(server, "SELECT state, flags FROM calls") == [("settled", "estimated orphan")]
    await refused(ledger, "out of touch")
    assert isinstance(await ledger.reserve(CALL, 100, DAY_CAP, now=NOON), Reserved)
    assert ledger.owner != before
    assert await ledger.extend([(held, 1)], now=NOON) == [False]
    await other.close()


@pytest.mark.parametrize(("cost_nano", "booked_nano"), [(200, 300), (450, 450)])
async def test_a_late_settlement_only_ever_adds_and_adds_once(server, ledger, cost_nano, booked_nano):
    held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
    other = await Ledger.open(url(server), now=NOON)
    with closing(psycopg.connect(url(server), autocommit=True)) as shell:
        shell.execute("UPDATE gateway.owners SET lease_until = 0 WHERE id = %s", (ledger.owner,))
    await other.sweep(now=NOON)
    for _ in range(2):
        assert not (await asyncio.wait_for(ledger.settle(held, Settlement(cost_nano), now=NOON), 60)).first
    assert balance(server) == (booked_nano, 0, 0)
    await other.close()
    with connect.reading(server) as db:
        assert invariants.findings(db) == []


async def test_a_token_revoked_elsewhere_ends_at_the_next_call(server, tmp_path, monkeypatch):
    """The look at it is remembered for a moment: the reservation judges the token, and what makes none looks each time."""
    monkeypatch.setattr("gateway_addon.ledger.ledger.FRESH_S", 60)
    ask = {"model": "claude-haiku-4-5", "messages": [{"role": "user", "content": "hi"}]}
    async with Simulator() as api, gateway(tmp_path, api, ledger_url=server.url) as gw:
        looks, look = [], gw.gateway.ledger.look
        monkeypatch.setattr(gw.gateway.ledger, "look", lambda read: looks.append(getattr(read, "func", read)) or look(read))
        for _ in range(3):
            await gw.client().messages.create(max_tokens=10, **ask)
        assert looks.count(state.look_up_token) == 1  # a job of the gateway's may look for pauses meanwhile
        sent = api.book.requests
        for change, undo, refused in (
            (partial(admin.pause, scope="app:app"), partial(admin.resume, scope="app:app"), "app_paused"),
            (partial(admin.revoke_tokens, app="app"), None, "token_revoked"),
        ):
            with connect.changing(server) as db:
                change(db, who="test", now=time.time())
            for call in (partial(gw.client().messages.create, max_tokens=10), gw.client().messages.count_tokens):
                with pytest.raises(anthropic.APIStatusError) as caught:
                    await call(**ask)
                assert caught.value.response.headers["x-gateway-refusal"] == refused
            if undo:
                with connect.changing(server) as db:
                    undo(db, who="test", now=time.time())
        assert api.book.requests == sent, "nothing was forwarded"


async def test_a_read_of_a_closed_ledger_is_a_sentence(server):
    """A background job that outlives the readers is told so, without a traceback."""
    leaving = await Ledger.open(url(server), now=NOON)
    await leaving.look_up_token("d1", now=NOON)
    await leaving.close()
    with pytest.raises(LedgerUnavailable, match="is closed"):
        await leaving.look_up_token("d1", now=NOON)


async def test_a_sweep_lets_other_writers_in_between_its_parts(server, ledger, monkeypatch):
    """A server's ledger with many open calls of a dead gateway is never held for longer than a part takes."""
    monkeypatch.setattr(orphans, "SWEPT_AT_ONCE", 3)
    leaving = await Ledger.open(url(server), now=NOON)
    for _ in range(8):
        await leaving.reserve(CALL, 10, DAY_CAP, now=NOON)
    await leaving.close()
    parts, settle = [], orphans.settle_orphans
    monkeypatch.setattr(orphans, "settle_orphans", lambda db, dead, *, now: parts.append(settle(db, dead, now=now)) or parts[-1])
    assert await ledger.sweep(now=NOON) == 8
    assert parts == [3, 3, 2]
    assert rows(server, "SELECT count(*) FROM owners WHERE lease_until = 0") == [(0,)]


async def test_a_gateway_starts_although_the_dead_ones_calls_must_wait(server, caplog):
    """Somebody holds the ledger; the heartbeat settles them later."""
    with closing(psycopg.connect(url(server))) as shell:
        shell.execute("LOCK TABLE gateway.turns IN EXCLUSIVE MODE")
        ledger = await Ledger.open(url(server), timeout_s=0.5, now=NOON)
        assert "are settled later" in caplog.text
        shell.rollback()
    assert isinstance(await ledger.reserve(CALL, 100, DAY_CAP, now=NOON), Reserved)
    await ledger.close()


async def test_a_closed_node_leaves_its_open_calls_to_the_others(server, ledger):
    leaving = await Ledger.open(url(server), now=NOON)
    await leaving.reserve(CALL, 300, DAY_CAP, now=NOON)
    await leaving.close()
    assert await ledger.sweep(now=NOON) == 1


async def test_the_servers_clock_decides_which_day_a_call_belongs_to(server, monkeypatch):
    """This gateway's is three days behind."""
    behind_s = 3 * 86400
    wrong = SimpleNamespace(**{**vars(time), "time": lambda: time.time() - behind_s})
    monkeypatch.setattr(postgres, "time", wrong)
    ledger = await Ledger.open(url(server), now=wrong.time())
    cap = [Cap("app:reports", "day", 500)]
    held = await ledger.reserve(CALL, 300, cap, now=wrong.time())
    assert (await ledger.reserve(CALL, 300, cap, now=wrong.time())).reason == "cap_held"
    await ledger.settle(held, Settlement(300), now=wrong.time())
    [(started_at, day_start, ended_at)] = rows(server, "SELECT started_at, day_start, ended_at FROM calls WHERE id = $1", held.call_id)
    assert abs(started_at - time.time()) < 10
    assert abs(ended_at - time.time()) < 10
    assert day_start == started_at // 86400 * 86400
    assert [each.spent_nano for each in await ledger.capped(cap, now=wrong.time())] == [300]
    await ledger.close()


# --- turns


def test_apps_without_a_common_cap_never_wait_for_each_other(server):
    with connect.changing(server) as db:
        admin.issue_token(db, "other", "d2", who="test", now=NOON)
    with closing(postgres.connect(server)) as mine, closing(postgres.connect(server)) as theirs:
        for db, app, token_id in ((mine, "reports", 1), (theirs, "other", 2)):
            postgres._begin(db, [f"app:{app}"])
            call = type(CALL)(app, "batch", token_id)
            assert isinstance(reservations.reserve(db, "me", call, 10, [Cap(f"app:{app}", "day", 100)], now=NOON), Reserved)
        theirs.execute("COMMIT")
        mine.execute("COMMIT")
    assert balance(server, "total")[1] == 20


def test_a_common_cap_is_judged_by_one_at_a_time(server):
    """Both want 60 of 100: whoever comes second waits for the first one's commit, and sees it."""
    cap, answers = [Cap("total", "day", 100)], []

    def reserve(app_db):
        with closing(app_db) as db:
            postgres._begin(db, ["app:reports", "total"])
            answers.append(reservations.reserve(db, "me", CALL, 60, cap, now=NOON))
            time.sleep(0.1)
            db.execute("COMMIT")

    threads = [threading.Thread(target=reserve, args=(postgres.connect(server),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(isinstance(answer, Reserved) for answer in answers) == [False, True]


@pytest.mark.parametrize("by", ["statements", "batch"])
def test_a_commits_turns_are_taken_in_the_order_of_names(server, tmp_path, by):
    """Whoever waits for the first holds none of the others, however they were asked for and wherever their rows lie."""
    asked = ["app:b", "app:reports", "app:a"]
    with connect.changing(server) as db:
        db.execute("INSERT INTO turns SELECT unnest(CAST($1 AS text[]))", (asked,))
    store = postgres.ServerStore(server, 2, tmp_path)
    take = {
        "statements": lambda db: postgres._begin(db, asked),
        "batch": lambda db: store.batch(db, asked, [Reservation(CALL, 1, [], now=NOON)], 1),
    }[by]
    with closing(postgres.connect(server)) as first, closing(store.connect()) as waiting:
        postgres._begin(first, ["app:a"])
        thread = threading.Thread(target=take, args=(waiting,))
        thread.start()
        waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        while not rows(server, waits):
            time.sleep(0.01)
        free = [scope for (scope,) in rows(server, "SELECT scope FROM turns ORDER BY scope FOR UPDATE SKIP LOCKED")]
        first.execute("COMMIT")
        thread.join()
        waiting.execute("COMMIT")
    assert free == ["app:b", "app:reports"]
