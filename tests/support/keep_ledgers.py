"""Ledgers as versions of the gateway left them, kept as test data: `python tests/keep_ledgers.py NAME` makes one of each engine.

A kept ledger is never made again: it is what an operator's disk holds, and later versions have to open it (test_kept_ledgers.py). A
version that changes the tables adds one under a new name, for example that of its last migration.

NAME.db.xz is SQLite's file, NAME.sql.xz a plain pg_dump with INSERTs (no psql is needed to load it), NAME.json.xz what the version that
made them said of them. Both hold the same calls under the same numbers, so one document is right for both.
"""

import contextlib
import json
import lzma
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import postgresql
import psycopg
from ledgers import NOON, Cap, Part, Tokens

from gateway_addon.ledger import Alert, NewCall, Outcome, ServerAddress, Settlement, admin, batches, connect, reservations, state, workloads
from gateway_addon.ledger.maintenance import invariants, prune
from gateway_addon.ledger.orphans import settle_orphans
from gateway_addon.ledger.reports import daily_totals, spending
from gateway_addon.ledger.sql import Connection
from gateway_addon.windows import cycle, starts

FOLDER = Path(__file__).parents[1] / "ledger" / "kept_ledgers"
NAMES = sorted(path.name.removesuffix(".json.xz") for path in FOLDER.glob("*.json.xz"))

ZONE = "Europe/Berlin"
DAY_S = 86_400.0
JANUARY, FEBRUARY, MARCH = 1_767_222_000.0, 1_769_900_400.0, 1_772_319_600.0  # their first moments in the ledger's zone
DEAD = "host-7-dead"  # whose process is gone: what it held is an orphan's
GONE = "host-8-gone"  # the same, and not swept yet

PARTS = frozenset((("reports", "session", "ever"), ("reports", "model", "day"), ("reports", "label.client", "cycle:31")))
REPORTS = NewCall(
    "reports", "batch", 1, "messages", "claude-haiku-4-5", max_tokens=1000, input_tokens=700, session_id="s-1",
    model="claude-haiku-4-5", labels=(("client", "acme"),),
)  # fmt: skip
SEARCH = NewCall("search", None, 2, "messages", "claude-sonnet-5", stream=True, max_tokens=4096, agent_id="a-1")
DONE = Outcome(200, "claude-haiku-4-5", "end_turn", "req_1", complete=True, price_rows="claude-haiku-4-5", service_tier="standard")


def fill(path: Path | ServerAddress) -> None:
    """Make a ledger with whatever a ledger can have in it: of each kind of row at least one."""
    connect.create(path, ZONE)
    with connect.changing(path) as db:
        for app, digest in (("reports", "d1"), ("search", "d2"), ("old", "d3")):
            admin.issue_token(db, app, digest, label="first", expires_at=NOON + 90 * DAY_S, who="ops", now=JANUARY)
        admin.revoke_tokens(db, "old", who="ops", why="left", now=FEBRUARY)
        admin.align(db, ZONE, {"reports": "batch", "search": None}, [cycle(31)], PARTS, who="gateway", now=JANUARY)
        admin.issue_token(db, "search", "d0", cap_nano=4_000_000, who="ops", now=JANUARY)
        admin.keep_policy(db, "p1", {"gateway.yaml": "caps: {month: $50}\n"}, who="gateway", now=JANUARY)
        for day in range(3):
            _ordinary_day(db, JANUARY + day * DAY_S)
            _ordinary_day(db, FEBRUARY + day * DAY_S)
            _ordinary_day(db, MARCH + day * DAY_S)
    _prune(path, FEBRUARY)
    daily_totals.keep(path, since=FEBRUARY, until=MARCH, now=NOON)
    with connect.changing(path) as db:
        _odd_calls(db, NOON - 3 * DAY_S)
        _batches(db, NOON - 2 * DAY_S)
        _what_people_did(db, NOON - DAY_S)
        _held(db, NOON)


def _ordinary_day(db: Connection, at: float) -> None:
    for hour in range(0, 24, 6):
        now = at + 3600 * hour + 1 / 4
        cost = 120_345 + 1_001 * hour
        call_id = _reserve(db, "host-1", replace(REPORTS, session_id=f"s-{hour}"), 900_000, now=now)
        part = Part(cost, tokens=Tokens(600, 80, 2_000, 300, 20, 1), web_searches=hour // 6)
        reservations.settle(db, call_id, Settlement(cost, (part,), replace(DONE, first_byte_at=now + 0.5)), now=now + 2)
    reservations.refused(db, "host-1", REPORTS, "cap_spent", now=at + 60)
    reservations.free(db, "host-1", NewCall("search", None, 2, "count_tokens", "claude-sonnet-5"), Outcome(200), now=at + 61)
    reservations.failed_authentication(db, "token_unknown", now=at + 62)


def _odd_calls(db: Connection, at: float) -> None:
    """Every way in which a call ends that is not the ordinary one."""
    voided = _reserve(db, "host-1", SEARCH, 5_000_000, now=at)
    reservations.void(db, voided, Outcome(429, flags=("upstream_429",)), now=at + 1)
    grown = _reserve(db, "host-1", SEARCH, 2_000_000, now=at + 2, quantum_nano=50_000)
    assert reservations.extend(db, grown, 700_000, [], now=at + 3)
    assert reservations.release(db, grown, 300_000, now=at + 4)
    parts = (Part(900_001), Part(3_000_000, "fallback", "claude-opus-4-6", price_row="claude-opus-4-6"))
    outcome = replace(DONE, model_served="claude-opus-4-6", speed="fast", inference_geo="us", flags=("drift", "observed:cap_spent"))
    assert reservations.settle(db, grown, Settlement(3_900_001, parts, outcome), now=at + 9).overrun
    lost = _reserve(db, DEAD, REPORTS, 444_444, now=at + 10)
    settle_orphans(db, [DEAD], now=at + 60)
    reservations.settle(db, lost, Settlement(555_555, (Part(555_555),), DONE), now=at + 70)
    cut = _reserve(db, "host-1", replace(SEARCH, model_asked=None), 333_333, now=at + 11)
    reservations.settle(db, cut, Settlement(None, (Part(100_000),), Outcome(504)), now=at + 12)
    for seconds, code in enumerate(("model", "feature", "rate")):
        reservations.refused(db, "host-1", SEARCH, code, now=at + 20 + seconds)
    admin.adjust(db, voided, 77, who="ops", why="the invoice says so", now=at + 100)
    state.keep_ratelimits(db, {"anthropic-ratelimit-requests-remaining": "41"}, at)
    alert = Alert("overrun", "app:search", "claude-sonnet-5", "A call cost more than it held.", {"over_nano": 1_500_001})
    assert state.alert_once(db, alert, True, at)
    assert state.alert_once(db, replace(alert, kind="drift", once="x"), False, at)


def _batches(db: Connection, at: float) -> None:
    """One that is settled, and one of whose three requests one result was read."""
    for name, requests in (("msgbatch_done", 1), ("msgbatch_open", 3)):
        call = replace(REPORTS, endpoint="batches", session_id=None)
        call_id = _reserve(db, "host-1", call, 1_000_000 * requests, now=at)
        new = batches.NewBatch(
            name, call_id, "reports", at, requests, True, "digest", "prices: {}\n", f'{{"id": "{name}"}}', "in_progress", at + 60, "req_b"
        )
        assert batches.adopt(db, new)
        row = batches.ResultRow("first", 0, "message", "claude-haiku-4-5", 1_000, 50, 0, 0, 10, 0, 0, 432_100, "claude-haiku-4-5 batch", "")
        batches.book_results(db, call_id, [row])
    resolution = batches.close(db, "msgbatch_done", now=at + 300)
    assert resolution is not None
    assert resolution.spent_nano == 432_100


def _what_people_did(db: Connection, at: float) -> None:
    admin.raise_cap(db, "app:reports", "month", 7_000_000_000, until=NOON + 30 * DAY_S, who="ops", why="close of the books", now=at)
    admin.limit_cap(db, "app:reports", "day", 3_000_000, who="ops", why="a quiet week", now=at)
    admin.pause(db, "app:search", until=NOON + 20 * DAY_S, cut=True, who="ops", why="loops \N{SNOWMAN}", now=at)
    admin.keep_policy(db, "p2", {"gateway.yaml": "caps: {month: $60}\n"}, who="gateway", now=at)
    admin.keep_key(db, "f00d", "env:ANTHROPIC_API_KEY", who="gateway", now=at)
    admin.rotate_token(db, "reports", "d4", label="second", keep_old_s=30 * DAY_S, who="ops", now=at)
    workloads.open_session(db, "search", "https://issuer.test", "repo:o/r", "w1", session="s1", rule="r1", expires_at=at + DAY_S, now=at)


def _held(db: Connection, at: float) -> None:
    """Calls of a process that is gone, which nobody has swept."""
    _reserve(db, GONE, REPORTS, 250_000, now=at)
    running = _reserve(db, GONE, replace(REPORTS, stream=True, agent_id="a-2"), 100_000, now=at + 1, quantum_nano=20_000)
    assert reservations.extend(db, running, 30_000, [], now=at + 2)


def _reserve(db: Connection, owner: str, call: NewCall, grant_nano: int, *, now: float, quantum_nano: int = 0) -> int:
    reserved = reservations.reserve(db, owner, call, grant_nano, [], quantum_nano=quantum_nano, now=now)
    assert isinstance(reserved, reservations.Reserved), reserved
    return reserved.call_id


def _prune(path: Path | ServerAddress, before: float) -> None:
    with connect.changing(path) as db:
        prune.begin(db, before, prune.prunable(db, before), who="ops", now=NOON)
    since = 0.0
    while True:
        with connect.reading(path) as db:
            day = prune.next_day(db, since, before)
        if day is None:
            return
        with connect.changing(path) as db:
            prune.carry(db, day.groups, now=NOON)
        since = day.end


def said(path: Path | ServerAddress) -> dict[str, object]:
    """Return all that a version reports of a ledger, as JSON would: every report, standing, token, batch, alert and open call, to the nano."""
    spans = {"january": (JANUARY, FEBRUARY), "february": (FEBRUARY, MARCH), "march": (MARCH, NOON + DAY_S)}
    caps = [Cap("app:reports", "month", 1_000_000_000), Cap("total", "day", 5_000_000)]
    parts = [
        Cap("app:reports session:s-6", "ever", 2_000_000), Cap("app:reports model:claude-haiku-4-5", "day", 3_000_000),
        Cap("app:reports label.client:acme", "cycle:31", 4_000_000), Cap("app:search token:4", "ever", 4_000_000),
        Cap("total", "cycle:31", 5_000_000),
    ]  # fmt: skip
    with connect.reading(path) as db:
        document = {
            "findings": invariants.findings(db),
            "reports": {
                f"{month} by {by}": _report(spending.report(db, by, since=since, until=until))
                for month, (since, until) in spans.items()
                for by in spending.KEYS[:6]
            },
            "notable": {month: _plain(spending.notable(db, since=since, until=until)) for month, (since, until) in spans.items()},
            "drifts": [asdict(each) for each in spending.drifts(db, since=JANUARY, until=NOON)],
            "alerts": [dict(each) for each in spending.alerts(db, since=JANUARY, until=NOON)],
            "standings": [
                each._asdict() for each in reservations.standing(db, ("total", "team:batch", "app:reports", "app:search"), caps, now=NOON)
            ],
            "parts": [each._asdict() for each in reservations.capped(db, parts, now=NOON)],
            "tokens": [asdict(each) for each in admin.tokens(db)],
            "pauses": [asdict(each) for each in state.pauses(db, NOON)],
            "overruns": sorted(state.overruns(db)),
            "batches": [each._asdict() for each in batches.open_batches(db)],
            "open": [asdict(each) for each in invariants.open_calls(db, lambda owner: True, now=NOON)],
            "changes": [each._asdict() for each in admin.policy_changes(db, 10)],
            "calendar": starts(NOON, reservations.zone(db))[:4],
        }
    plain: dict[str, object] = json.loads(json.dumps(document))
    return plain


def _report(found: spending.Report) -> object:
    return asdict(found) | {"lines": [line._asdict() for line in found.lines]}


def _plain(found: spending.Notable | None) -> object:
    return found and asdict(found) | {"line": found.line._asdict(), "rest": found.rest._asdict()}


def kept(name: str, engine: str, folder: Path) -> Path | ServerAddress:
    """A kept ledger, to work on: in this folder, or in a new database of the shared server."""
    if engine == "postgresql":
        server = ServerAddress(postgresql.shared().database())
        with psycopg.connect(server.url, autocommit=True) as db:
            db.execute(lzma.decompress((FOLDER / f"{name}.sql.xz").read_bytes()))
        return server
    path = folder / "gateway.db"
    path.write_bytes(lzma.decompress((FOLDER / f"{name}.db.xz").read_bytes()))
    return path


def expected(name: str) -> dict[str, object]:
    document: dict[str, object] = json.loads(lzma.decompress((FOLDER / f"{name}.json.xz").read_bytes()))
    return document


def _dump(server: ServerAddress) -> bytes:
    """A plain dump that any client can send: what only psql knows (lines that begin with a backslash) left out."""
    program = postgresql.binaries().with_name("bin") / "pg_dump"
    dumped = subprocess.run([program, "--inserts", "--no-owner", "--no-privileges", server.url], check=True, capture_output=True).stdout
    return b"".join(line for line in dumped.splitlines(keepends=True) if not line.startswith((b"\\", b"--")))


def main(name: str) -> None:
    if name in NAMES:
        sys.exit(f"{FOLDER / name}.json.xz is there already, and what was kept is not made again: choose another name")
    with tempfile.TemporaryDirectory() as folder:
        path, server = Path(folder) / "gateway.db", ServerAddress(postgresql.shared().database())
        for ledger in (path, server):
            fill(ledger)
        document = said(path)
        assert document == said(server)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = DELETE")
            db.execute("VACUUM")
        (FOLDER / f"{name}.db.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
        (FOLDER / f"{name}.sql.xz").write_bytes(lzma.compress(_dump(server), preset=9 | lzma.PRESET_EXTREME))
        (FOLDER / f"{name}.json.xz").write_bytes(lzma.compress(json.dumps(document, indent=1).encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main(sys.argv[1])
