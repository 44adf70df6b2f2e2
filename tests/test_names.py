"""Names that clients and providers choose: bounded and harmless wherever they are kept, told or printed."""

import asyncio
import json
import sqlite3
import sys
from contextlib import closing

import pytest
from click.testing import CliRunner
from gateway import gateway
from ledgers import new_ledger, rows, spend, writing
from upstreams import message, upstream

from gateway_addon import names
from gateway_addon.cli.report import report
from gateway_addon.names import NAME_CHARS_MAX, safe_name

MARK = "\N{REPLACEMENT CHARACTER}"
BAD = "\x1b[2J\x00\n\u202e"  # clears a screen, ends a C string, begins a line, turns the writing round
LONG = 100_000
APP = {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\n"}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("", ""),
        ("claude-haiku-4-5", "claude-haiku-4-5"),
        ("Prüfer 7 \N{GRINNING FACE}", "Prüfer 7 \N{GRINNING FACE}"),
        ("a" * NAME_CHARS_MAX, "a" * NAME_CHARS_MAX),
        ("a" * (NAME_CHARS_MAX + 1), "a" * (NAME_CHARS_MAX - 1) + "…"),
        (BAD, f"{MARK}[2J{MARK * 3}"),
        (b"\xff\xfe".decode("utf-8", "surrogateescape"), MARK * 2),
        ("\ud800", MARK),
        ("session gwt_7aB37aB37aB37a", "session gwt_***"),
        ("a" * (NAME_CHARS_MAX - 6) + "gwt_7aB37aB37aB37a", "a" * (NAME_CHARS_MAX - 6) + "gwt_*…"),
        ("gwt_" + "7" * 64 + " " + "a" * LONG, "gwt_*** " + "a" * (NAME_CHARS_MAX - 69) + "…"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_a_name_is_kept_short_and_printable(name, kept):
    assert safe_name(name) == kept
    assert safe_name(kept) == kept


def test_masking_makes_no_name_longer_than_its_bound():
    assert len(safe_name("gwt_7." * LONG)) == NAME_CHARS_MAX


def hostile_answer() -> bytes:
    said = json.loads(message())
    said |= {"model": BAD + "m" * LONG, "stop_reason": BAD + "s" * LONG}
    said["usage"] |= {"service_tier": BAD + "t" * LONG, "inference_geo": "\ud800", "speed": BAD}
    body = json.dumps(said).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nrequest-id: req_\xff\x1b[2J\r\nanthropic-ratelimit-tokens-limit: \xff\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def ask(gw, path: str, model: str = "claude-haiku-4-5") -> int:
    """Post a call whose every label is hostile; return its status."""
    body = json.dumps({"model": model, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}).encode()
    labels = [b"x-claude-code-session-id: \xff\x1b[2J" + b"s" * 5000, b"x-claude-code-agent-id: \xc3\x28\x07"]
    head = [f"POST {path} HTTP/1.1".encode(), b"host: gw", f"x-api-key: {gw.tokens['app']}".encode(), *labels, b"connection: close"]
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    with closing(writer):
        writer.write(b"\r\n".join([*head, b"content-type: application/json", b"content-length: %d\r\n\r\n" % len(body)]) + body)
        return int((await reader.read(-1)).split()[1])


def texts(path) -> set[str]:
    """Every text that the ledger holds about calls, and what it was told of the key's limits."""
    with closing(sqlite3.connect(path)) as db:
        found = [db.execute(f"SELECT * FROM {table}").fetchall() for table in ("calls", "usage", "ratelimits", "overruns", "alerts")]
    return {value for rows in found for row in rows for value in row if isinstance(value, str)}


async def test_hostile_names_cost_no_call_and_no_row(tmp_path):
    """A paid, a free and a refused call, each with ids that are not UTF-8 and escapes; the paid one's answer is as bad."""
    told = []
    async with upstream(hostile_answer()) as api, gateway(tmp_path, api, APP, on_call=told.append) as gw:
        statuses = [await ask(gw, "/v1/messages"), await ask(gw, "/v1/messages", BAD + "m" * 50)]
        await gw.quiet()
        statuses.append(await ask(gw, "/v1/messages/count_tokens"))
        await gw.quiet()
    assert statuses == [200, 403, 200]
    kept = rows(tmp_path / "gateway.db", "SELECT state, session_id, agent_id FROM calls ORDER BY id")
    session, agent = f"{MARK * 2}[2J" + "s" * (NAME_CHARS_MAX - 6) + "…", f"{MARK}({MARK}"
    assert sorted(kept) == [("free", session, agent), ("refused", session, agent), ("settled", session, agent)]
    found = rows(tmp_path / "gateway.db", "SELECT model_served, stop_reason, service_tier, request_id FROM calls WHERE state = 'settled'")
    assert [value[:5] for value in found[0]] == [f"{MARK}[2J{MARK}"] * 3 + [f"req_{MARK}"]
    for text in texts(tmp_path / "gateway.db") | {value for call in told for value in call.values() if isinstance(value, str)}:
        assert (len(text) <= 500, text.isprintable()) == (True, True), text[:100]


async def test_an_error_type_becomes_one_flag_and_no_more(tmp_path):
    """A provider's answer cannot mark a call as an orphan, whose late bill would be booked again."""
    body = json.dumps({"type": "error", "error": {"type": "x orphan overrun", "message": "no"}}).encode()
    head = b"HTTP/1.1 500 x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with upstream(head + body) as api, gateway(tmp_path, api, APP) as gw:
        assert await ask(gw, "/v1/messages") == 500
        await gw.quiet()
    assert rows(tmp_path / "gateway.db", "SELECT flags FROM calls") == [("upstream:x_orphan_overrun",)]


@pytest.mark.parametrize("by", ["agent", "model", "served"])
@pytest.mark.parametrize("form", [[], ["--csv"], ["--json"], ["--notable"]], ids=" ".join)
def test_a_report_shows_no_name_of_an_old_ledger_as_it_came(tmp_path, by, form):
    """Gateways before this rule kept them whole."""
    path, name = new_ledger(tmp_path), BAD.replace("\x00", "") + "n" * LONG
    with closing(writing(path)) as db:
        spend(db, 1.7e9)
        db.execute("UPDATE calls SET agent_id = $1, model_asked = $2, model_served = $3, flags = 'drift'", (name, name, name))
    shown = CliRunner().invoke(report, ["--ledger", f"sqlite:///{path}", "--by", by, "--since", "2023-11-01", *form])
    assert shown.exit_code == 0
    assert "nnn" in shown.output
    assert len(shown.output) < 5000
    assert all(line.isprintable() for line in shown.output.splitlines())


@pytest.mark.parametrize(
    ("left", "program", "command"),
    [
        ("pipx_metadata.json", "gateway", "pipx inject gateway-addon 'psycopg[binary]' keyring"),
        ("uv-receipt.toml", "gateway", "uv pip install --python {prefix} 'psycopg[binary]' keyring"),
        ("pyvenv.cfg", "gateway", "{python} -m pip install 'psycopg[binary]' keyring"),
        ("pyvenv.cfg", "./run.sh", ".venv/bin/pip install 'psycopg[binary]' keyring"),
    ],
)
def test_a_package_is_installed_as_the_gateway_was(tmp_path, monkeypatch, left, program, command):
    (tmp_path / left).touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setattr(names, "PROGRAM", program)
    assert names.install("psycopg[binary]", "keyring") == command.format(prefix=names.argument(tmp_path), python=names.argument(sys.executable))
