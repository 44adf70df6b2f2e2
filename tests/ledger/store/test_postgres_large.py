"""A server's ledger of many calls: a batch costs there what it costs in an empty one, in rows read and in the server's processor time."""

import statistics
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import postgresql
import psycopg
import pytest
from ledgers import CALL, Cap, Part, new_ledger

from gateway_addon.ledger import Settlement, admin, connect, part_scope
from gateway_addon.ledger.store import postgres
from gateway_addon.ledger.types import RecordedEnd, Reservation

DAY_S = 86_400
YEAR = 365
SESSION = ("session", "s7")
CAPS = [Cap("app:reports", "day", 10**15), Cap("total", "month", 10**15), Cap(part_scope("reports", SESSION), "ever", 10**15)]
READ = """
SELECT coalesce(sum(seq_tup_read), 0), coalesce(sum(idx_tup_fetch), 0) FROM pg_stat_xact_user_tables
WHERE relname NOT IN ('settings', 'migrations', 'kept_cycles', 'kept_parts')
"""
"""Without the tables of a few rows, whatever happened."""
APPS = 12  # each has a row among the balances of a window, of which two caps look at one each

# What the triggers do call by call is done for all at once: 27,000 calls a day of twelve apps, every tenth of a session of its own.
FILLED = """
SET session_replication_role = replica;
INSERT INTO calls (id, state, owner, app, token_id, endpoint, model_asked, stream, session_id, day_start, week_start, month_start,
    started_at, ended_at, quote_nano, grant_nano, status, complete)
  SELECT n, 'settled', 'me', CASE n % 12 WHEN 0 THEN 'reports' ELSE 'app' || n % 12 END, 1, 'messages', 'claude-haiku-4-5', 0,
    CASE n % 10 WHEN 0 THEN 's' || n END, day, day - day % (7 * {day}), day - day % (30 * {day}), day + n % {day}, day + n % {day} + 2,
    1000, 1000, 200, 1
  FROM (SELECT n, ({today} - {day} * ({year} - 1 - n * {year} / ({calls} + 1)))::bigint AS day
        FROM generate_series(1::bigint, {calls}) AS n) AS each_call;
SELECT setval(pg_get_serial_sequence('calls', 'id'), {calls});
INSERT INTO entries (call_id, at, kind, reserved_nano, open) SELECT id, started_at, 'reserve', 1000, 1 FROM calls;
INSERT INTO entries (call_id, at, kind, reserved_nano, spent_nano, open) SELECT id, ended_at, 'settle', -1000, 700, -1 FROM calls;
INSERT INTO app_balances SELECT "window", window_start, app, '', sum(700 * calls), 0, 0, 0
  FROM (SELECT day_start, week_start, month_start, app, count(*) AS calls FROM calls GROUP BY 1, 2, 3, 4) AS days
  CROSS JOIN LATERAL (VALUES ('day', day_start), ('week', week_start), ('month', month_start), ('ever', 0)) AS w ("window", window_start)
  GROUP BY 1, 2, 3;
INSERT INTO part_balances SELECT 'app:reports session:s' || n, 'ever', 0, 700, 0, 0, 0 FROM generate_series(1, {calls} / 10) AS n;
SET session_replication_role = origin;
ANALYZE;
"""


@contextmanager
def opened(place, folder):
    """A gateway's connection that writes, and how to send it one settlement and one reservation."""
    store, number, held = postgres.ServerStore(place, 2, folder), 0, []
    with closing(store.connect()) as db:

        def batch():
            nonlocal number
            now, number = time.time(), number + 1
            ends = [RecordedEnd("settle", held.pop().call_id, store.owner, Settlement(700, (Part(700),)), now)] if held else []
            asked = [*ends, Reservation(replace(CALL, session_id="s7"), 1_000, CAPS, now=now)]
            held.append(store.batch(db, {"app:reports", "total"}, asked, number)[-1])

        for _ in range(20):
            batch()
        yield db, batch


def rows_read(db, batch):
    """Rows that one batch reads, by scan and by key."""
    db.execute("BEGIN")
    before = db.execute(READ).fetchone()
    batch()
    by_scan, by_key = (after - start for after, start in zip(db.execute(READ).fetchone(), before, strict=True))
    db.execute("COMMIT")
    return by_scan, by_key


def processor_us(db, batch):
    """The backend's processor time of one batch, over ten."""
    clock = Path(f"/proc/{db.raw.info.backend_pid}/schedstat")
    before = int(clock.read_text().split()[0])
    for _ in range(10):
        batch()
    return (int(clock.read_text().split()[0]) - before) / 10_000


@pytest.mark.parametrize("calls", [2_000, pytest.param(10_000_000, marks=pytest.mark.soak)])
def test_a_batch_reads_as_little_in_a_large_ledger(tmp_path, calls):
    empty, large = new_ledger(None, "postgresql"), new_ledger(None, "postgresql")
    for place in (empty, large):
        with connect.changing(place) as db:
            admin.align(db, "UTC", {"reports": "batch"}, (), [("reports", "session", "ever")], who="test", now=time.time())
    today = int(time.time()) // DAY_S * DAY_S
    with closing(psycopg.connect(large.url, autocommit=True, options="-c search_path=gateway")) as shell:
        shell.execute(FILLED.format(calls=calls, today=today, day=DAY_S, year=YEAR).encode())
    with opened(empty, tmp_path) as of_empty, opened(large, tmp_path) as of_large:
        few, many = rows_read(*of_empty), rows_read(*of_large)
        assert many[0] == 0, "no table is read from end to end"
        assert many[1] <= few[1] + 2 * APPS
        if calls > 1_000_000:
            rounds = [(processor_us(*of_empty), processor_us(*of_large)) for _ in range(40)]
            one, other = (statistics.median(column) for column in zip(*rounds, strict=True))
            ratio = statistics.median(large_us / empty_us for empty_us, large_us in rounds)
            print(f"{calls:,} calls: {other:.0f} us of the server's a batch, {one:.0f} in an empty ledger: {ratio:.2f}x", file=sys.stderr)
            assert ratio <= 1.2
    with closing(psycopg.connect(postgresql.shared().url("postgres"), autocommit=True)) as shell:
        shell.execute(f"DROP DATABASE {large.url.partition('@/')[2].partition('?')[0]} WITH (FORCE)".encode())
