import asyncio
import json
import sqlite3
import ssl
import subprocess
from contextlib import closing

import pytest
from click.testing import CliRunner
from gateway import write_policies
from issuers import jwks
from ledgers import CALL, DAY_CAP, NOON, Part, new_ledger, rows
from upstreams import upstream

from gateway_addon.cli.doctor import doctor
from gateway_addon.ledger import Outcome, Settlement, admin, connect, reservations
from gateway_addon.ledger.store import balances, sqlite_files, sqlite_schema
from gateway_addon.ledger.store.locks import OwnerLock
from gateway_addon.simulator import KEY, Simulator


@pytest.fixture
def path(tmp_path):
    path = new_ledger(tmp_path)
    with closing(sqlite_files.writer_connection(path)) as db:
        for nano in (100, 200):
            held = reservations.reserve(db, "gone", CALL, 300, DAY_CAP, now=NOON)
            reservations.settle(db, held.call_id, Settlement(nano, (Part(nano),)), now=NOON)
        reservations.void(db, reservations.reserve(db, "gone", CALL, 300, DAY_CAP, now=NOON).call_id, Outcome(), now=NOON)
        admin.adjust(db, 1, 5, who="ops", why="the bill", now=NOON)
    return path


@pytest.fixture(autouse=True)
def policies(tmp_path_factory, monkeypatch):
    """A policy whose upstream is not asked unless a test says so."""
    folder = write_policies(tmp_path_factory.mktemp("policies"), "http://127.0.0.1:1", {"reports": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n"})
    monkeypatch.setenv("GATEWAY_POLICIES", str(folder))
    monkeypatch.setenv("SIMULATED_KEY", KEY)
    return folder


def examine(path, *options):
    result = CliRunner().invoke(doctor, ["--ledger", f"sqlite:///{path}", *(options or ["--offline"])], catch_exceptions=False)
    return result.exit_code, result.output


def test_issuers_without_keys_are_a_finding(path, policies):
    named = "issuers: {here: {url: https://a.test, keys: {file: KEYS}}, web: {url: https://b.test}}"
    write_policies(policies, "http://127.0.0.1:1", {}, f"audience: x\n{named.replace('KEYS', str(policies / 'jwks.json'))}")
    code, output = examine(path)
    assert (code, "BAD issuers: web: not asked (--offline)" in output) == (1, True), output
    assert "here: its keys cannot be fetched" in output
    (policies / "jwks.json").write_bytes(jwks())
    code, output = examine(path)
    assert (code, "ok  issuers: here: 1 keys that check signatures" in output) == (0, True), output


def damage(path, sql):
    """As a person with a database tool would: past the triggers."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {trigger}")
        db.execute(sql)


def test_a_sound_ledger_passes(path):
    code, output = examine(path)
    assert code == 0, output
    assert "ok  ledger" in output
    assert "3 calls, 7 entries" in output


@pytest.mark.parametrize(
    ("sql", "finding"),
    [
        ("""UPDATE balances SET spent_nano = spent_nano + 1 WHERE scope = 'total' AND "window" = 'day'""", "balance total day"),
        ("""UPDATE balances SET quantum_nano = 9 WHERE scope = 'app:reports' AND "window" = 'ever'""", "balance app:reports ever"),
        ("""DELETE FROM balances WHERE scope = 'team:batch' AND "window" = 'month'""", "balance team:batch month"),
        ("INSERT INTO balances VALUES ('app:ghost', 'day', 0, 0, 0, 0, 0)", "balance app:ghost day"),
        ("UPDATE entries SET spent_nano = 99 WHERE kind = 'settle' AND call_id = 1", "call 1: its parts sum to $0.0000001"),
        ("UPDATE usage SET nano = 1 WHERE call_id = 2", "call 2: its parts sum to $0.000000001, it was settled at $0.0000002"),
        ("DELETE FROM usage WHERE call_id = 2", "call 2: its parts sum to $0.00"),
        ("UPDATE calls SET state = 'open' WHERE id = 3", "call 3 is open, but its entries leave 0 open"),
        ("DELETE FROM entries WHERE call_id = 3 AND kind = 'void'", "call 3 is voided, but its entries leave 1 open, $0.0000003 held"),
        ("DELETE FROM calls WHERE id = 2", "refers to a row that is missing"),
    ],
)
def test_every_lie_is_named(path, sql, finding):
    damage(path, sql)
    code, output = examine(path)
    assert code == 1, output
    assert finding in output, output


@pytest.mark.parametrize("part", ["'total' AS scope, 'week'", "'app:' || app AS scope, 'month'", "'team:' || team AS scope, 'day'"])
def test_a_trigger_that_forgets_a_balance_is_found_out(path, part):
    """What the doctor holds the balances against knows nothing of the view by which they are kept."""
    [forgetful] = [each for each in sqlite_schema.FRAMES.split("\nUNION ALL\n") if part in each]
    with closing(sqlite_files.writer_connection(path)) as db:
        db.execute("DROP VIEW call_frames")
        db.execute(f"CREATE VIEW call_frames AS {sqlite_schema.FRAMES.replace(forgetful, forgetful + (' AND 0' if 'WHERE' in forgetful else ' WHERE 0'))}")
        held = reservations.reserve(db, "gone", CALL, 300, DAY_CAP, now=NOON)
        reservations.settle(db, held.call_id, Settlement(50, (Part(50),)), now=NOON)
    code, output = examine(path)
    assert (code, output.count("the entries say")) == (1, 1), output


def test_open_reservations_are_listed_with_age_and_owner(path):
    lock = OwnerLock(path)
    with closing(sqlite_files.writer_connection(path)) as db:
        reservations.reserve(db, lock.owner, CALL, 300, DAY_CAP, now=NOON)
        reservations.reserve(db, "gone", CALL, 300, DAY_CAP, now=NOON)
    code, output = examine(path)
    assert code == 0
    assert "(reports, claude-haiku-4-5) holds $0.0000003 for" in output
    assert f"by {lock.owner}\n" in output
    assert "by gone, which is gone: the next start settles it" in output
    lock.close()


def test_balances_can_be_computed_anew(path):
    damage(path, "DELETE FROM balances")
    with connect.changing(path) as db:
        balances.rebuild(db)
    assert examine(path)[0] == 0


def test_json_says_the_same(path):
    damage(path, "DELETE FROM balances WHERE scope = 'total'")
    result = CliRunner().invoke(doctor, ["--ledger", f"sqlite:///{path}", "--offline", "--json"])
    [ledger] = [check for check in json.loads(result.output) if check["name"] == "ledger"]
    assert (result.exit_code, len(ledger["findings"])) == (1, 4)


def test_long_work_says_how_far_it_is(path, monkeypatch):
    said = []
    monkeypatch.setattr("gateway_addon.cli.doctor.status", lambda line="": said.append(line))
    monkeypatch.setattr("gateway_addon.ledger.store.sqlite.BEAT_STEPS", 100)
    examine(path)
    assert said[0] == "proving the ledger, 0 s"
    assert said[-1] == "", "it does not stay on the screen"


def test_no_ledger_is_a_wrong_use(tmp_path):
    code, output = examine(tmp_path / "none.db")
    assert code == 2
    assert "There is no ledger at" in output
    assert not (tmp_path / "none.db").exists()


def test_a_little_disk_is_named(path, monkeypatch):
    monkeypatch.setattr("gateway_addon.operations.doctor.DISK_FREE_BYTES_MIN", 2**60)
    code, output = examine(path)
    assert code == 1
    assert "a full disk refuses every call" in output


def test_looking_changes_nothing(path):
    before = rows(path, "SELECT * FROM balances"), rows(path, "SELECT * FROM entries")
    examine(path)
    assert (rows(path, "SELECT * FROM balances"), rows(path, "SELECT * FROM entries")) == before


# beside the ledger


async def test_a_gateway_that_could_work_passes_and_nothing_is_billed(path, policies):
    async with Simulator() as api:
        write_policies(policies, api.url, {})
        code, output = await asyncio.to_thread(examine, path, "--json")
        checks = json.loads(output)
        assert (code, [check["name"] for check in checks]) == (0, ["ledger", "files", "disk", "policy", "models", "upstream", "key", "clock"])
        assert "the provider takes it" in output
        reservations = await api.settled()
        assert ([row.target for row in reservations.all()], reservations.billed_nano) == (["/v1/models?limit=1"], 0)
    assert KEY not in output


async def test_refused_key_is_named_by_its_source_alone(path, policies, monkeypatch):
    """A key that the provider does not take is named by its source alone."""
    monkeypatch.setenv("SIMULATED_KEY", "sk-ant-api03-old")
    async with Simulator() as api:
        write_policies(policies, api.url, {})
        code, output = await asyncio.to_thread(examine, path, "--json")
    assert code == 1
    assert "the provider does not take this key (401)" in output
    assert "from env SIMULATED_KEY" in output
    assert "sk-ant" not in output


def say(status, date):
    return f"HTTP/1.1 {status} x\r\n{date}content-length: 0\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("said", "finding"),
    [
        (say(529, ""), "it answers 529: see the provider's status page"),
        (say(200, "date: Mon, 23 Nov 2026 00:00:00 GMT\r\n"), "s off: set it by NTP"),
        (say(200, "date: yesterday\r\n"), None),
        (say(302, "location: http://127.0.0.1:1/\r\n"), None),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "the Claude API cannot be reached (BadStatusLine)"),
    ],
)
async def test_what_is_wrong_with_the_upstream_or_the_clock_is_named(path, policies, said, finding):
    async with upstream(said) as api:
        write_policies(policies, api.url, {})
        code, output = await asyncio.to_thread(examine, path, "--json")
    assert (code, finding is None or finding in output) == (0 if finding is None else 1, True), output


@pytest.fixture
def unknown(tmp_path):
    """TLS by a certificate that nobody vouches for."""
    pair = [str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-out", pair[0], "-keyout", pair[1]], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    return context


async def test_upstream_with_an_untrusted_certificate_gets_no_key(path, policies, unknown):
    """An upstream whose certificate nobody vouches for gets no key."""
    received = bytearray()

    async def talk(reader, writer):
        received.extend(await reader.read())
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=unknown)
    write_policies(policies, f"https://localhost:{server.sockets[0].getsockname()[1]}", {})
    code, output = await asyncio.to_thread(examine, path, "--json")
    server.close()
    assert (code, "its certificate is not trusted (self-signed certificate)" in output, bytes(received)) == (1, True, b"")


@pytest.mark.parametrize(
    ("text", "finding"),
    [("key: {env: NOT_SET}\n", "The environment variable NOT_SET is not set. Run doctor where the gateway runs"), ("caps: {dya: $1}\n", "gateway.yaml:")],
)
def test_unreadable_key_and_broken_policy_are_findings(path, policies, text, finding):
    """A key that cannot be read and a broken policy are findings."""
    (policies / "gateway.yaml").write_text(text)
    code, output = examine(path)
    assert (code, finding in output) == (1, True), output
