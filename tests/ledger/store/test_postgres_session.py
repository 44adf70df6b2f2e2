"""The session on a PostgreSQL server: what an address may say, what every wait is limited by, what its failures are called."""

import asyncio
import sys
import time
from contextlib import closing

import postgresql
import psycopg
import pytest
from click.testing import CliRunner
from ledgers import CALL, DAY_CAP, NOON, balance, new_ledger, rows, url
from sealed import certificate

import gateway_addon.ledger.store
from gateway_addon.cli import main
from gateway_addon.ledger import Ledger, LedgerUnavailable, Reserved, Settlement
from gateway_addon.ledger.store import postgres_session


@pytest.fixture
def server():
    return new_ledger(None, "postgresql")


# --- the address


async def test_tls_is_as_the_address_asks_and_the_server_is_verified(server, tmp_path):
    cert, context = certificate(tmp_path)
    async with postgresql.Relay(postgresql.shared(), tls=context) as relay:
        trusted = f"{relay.url(server)}?sslmode=verify-full&sslrootcert={cert}"
        ledger = await Ledger.open(trusted, now=NOON)
        assert isinstance(await ledger.reserve(CALL, 100, DAY_CAP, now=NOON), Reserved)
        assert (await ledger.look_up_token("d1", now=NOON)).token.app == "reports"
        await ledger.close()
        assert relay.sealed >= 3, "the writer, a reader and the goodbye"
        for refused, why in (
            (trusted.replace("127.0.0.1", "db.internal") + "&hostaddr=127.0.0.1", 'does not match host name "db.internal"'),
            (f"{relay.url(server)}?sslmode=verify-full&sslrootcert=/dev/null", "gives no connection"),
        ):
            with pytest.raises(LedgerUnavailable, match=why):
                await Ledger.open(refused, now=NOON)


async def test_an_address_with_tls_sends_nothing_to_a_server_without(server):
    async with postgresql.Relay(postgresql.shared()) as relay:
        with pytest.raises(LedgerUnavailable, match="does not support SSL"):
            await Ledger.open(f"{relay.url(server)}?sslmode=require", now=NOON)


async def test_another_host_of_the_address_takes_over_in_running(server):
    """Both ways lead to one database, as a primary and the standby that takes its place do."""
    async with postgresql.Relay(postgresql.shared()) as first, postgresql.Relay(postgresql.shared()) as second:
        both = first.url(server).replace("/test", f",{second.url(server).partition('@')[2].partition('/')[0]}/test", 1)
        ledger = await Ledger.open(f"{both}?target_session_attrs=read-write", now=NOON)
        held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
        assert (first.joined > 0, second.joined) == (True, 0)
        await first.close()
        settled = ledger.settle(held, Settlement(200), now=NOON)
        assert (await asyncio.wait_for(settled, 60)).first
        assert isinstance(await ledger.reserve(CALL, 100, DAY_CAP, now=NOON), Reserved)
        assert second.joined > 0
        await ledger.close()


@pytest.mark.parametrize(("said", "name"), [("", "gateway "), ("&application_name=desk", "desk")])
async def test_every_connection_of_a_gateway_says_whose_it_is(server, said, name):
    ledger = await Ledger.open(url(server) + said, now=NOON)
    await ledger.look_up_token("d1", now=NOON)
    with closing(psycopg.connect(url(server))) as shell:
        query = "SELECT application_name FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        named = [row[0] for row in shell.execute(query)]
    await ledger.close()
    assert len(named) >= 2
    assert all(each.startswith(name) for each in named), named


def test_without_the_driver_the_sentence_says_what_to_install(monkeypatch):
    for module in ("postgres", "postgres_session"):
        monkeypatch.delitem(sys.modules, f"gateway_addon.ledger.store.{module}")
        monkeypatch.delattr(gateway_addon.ledger.store, module)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    result = CliRunner().invoke(main, ["doctor", "--offline", "--ledger", "postgresql://db.internal/gateway"])
    assert result.exit_code == 2
    assert "pip install 'psycopg[binary]'" in result.output


# --- limits and failures


async def test_a_slow_statement_is_ended_on_the_server_too(server, monkeypatch):
    monkeypatch.setitem(postgres_session.SESSION, "statement_timeout", "300")
    ledger = await Ledger.open(url(server), now=NOON)
    began = time.monotonic()
    with pytest.raises(LedgerUnavailable, match="is too slow"):
        await ledger.change(lambda db: db.execute("SELECT pg_sleep(30)"))
    assert time.monotonic() - began < 20
    assert isinstance(await ledger.reserve(CALL, 100, DAY_CAP, now=NOON), Reserved)
    await ledger.close()


FAILS = """
CREATE SEQUENCE gateway.tries;
CREATE FUNCTION gateway.fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  IF nextval('gateway.tries') <= {times} THEN RAISE EXCEPTION 'as a test wants it' USING ERRCODE = '{code}'; END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER fail BEFORE INSERT ON gateway.entries FOR EACH ROW EXECUTE FUNCTION gateway.fail();
"""


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03"])
async def test_a_conflict_is_retried_without_the_callers_notice(server, code):
    """A serialization failure, a deadlock, a lock that was held too long."""
    with closing(psycopg.connect(url(server), autocommit=True)) as shell:
        shell.execute(FAILS.format(times=2, code=code).encode())
    ledger = await Ledger.open(url(server), now=NOON)
    held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
    assert (await ledger.settle(held, Settlement(200), now=NOON)).first
    await ledger.close()
    assert balance(server) == (200, 0, 0)
    assert rows(server, "SELECT last_value FROM tries")[0][0] > 2


async def test_a_full_server_disk_is_named_and_settled_on_later(server, tmp_path, monkeypatch):
    """The settlement is written when there is room."""
    monkeypatch.setenv("HOME", str(tmp_path))
    ledger = await Ledger.open(url(server), now=NOON)
    held = await ledger.reserve(CALL, 300, DAY_CAP, now=NOON)
    with closing(psycopg.connect(url(server), autocommit=True)) as shell:
        shell.execute(FAILS.format(times=10**9, code="53100").encode())
        settled = ledger.settle(held, Settlement(200), now=NOON)
        with pytest.raises(LedgerUnavailable, match="the disk of the ledger's server"):
            await ledger.reserve(CALL, 100, DAY_CAP, now=NOON)
        shell.execute("DROP TRIGGER fail ON gateway.entries")
    assert (await asyncio.wait_for(settled, 60)).first
    await ledger.close()
    assert balance(server) == (200, 0, 0)


# --- these tests' own server


def test_without_postgresql_these_tests_skip_and_ci_fails(monkeypatch):
    monkeypatch.setattr(postgresql, "_shared", lambda: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install postgresql"):
        postgresql.shared()
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("GATEWAY_TEST_POSTGRESQL", "skip")
    with pytest.raises(AssertionError, match="apt-get install postgresql"):
        postgresql.shared()
