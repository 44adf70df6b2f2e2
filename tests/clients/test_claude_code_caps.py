"""What the real Claude Code sends by its start, and what it shows of a cap: through a real gateway to the simulated API."""

import asyncio
import json
import ssl
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from authority import ready_authority
from claude_code import ask, session
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from gateway import gateway
from ledgers import rows
from mitmproxy.certs import CertStore

from gateway_addon.cli import main
from gateway_addon.ledger import admin
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.money import NANO_PER_DOLLAR
from gateway_addon.onboarding.claude_code import LOST
from gateway_addon.simulator import KEY, Behaviour, Simulator

pytestmark = [pytest.mark.npm, pytest.mark.clients]

SHIPPED = (Path(__file__).parents[2] / "policies" / "examples" / "apps" / "claude-code.yaml").read_text()
DAY = SHIPPED.replace("caps: {day: $20, month: $200}", "caps: {day: $5}")
MODE = {"CLAUDE_CODE_USE_GATEWAY": "1", "ANTHROPIC_MODEL": "claude-opus-5-5", "ANTHROPIC_DEFAULT_HAIKU_MODEL": "claude-haiku-5-5"}
SIXTY_TOOLS = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    if asked["method"] == "initialize":
        said = {"protocolVersion": asked["params"]["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": {"name": "many", "version": "1"}}
    else:
        said = {"tools": [{"name": f"t{i}", "description": "x" * 400, "inputSchema": {"type": "object", "properties": {}}} for i in range(60)]}
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": said}), flush=True)
"""


@asynccontextmanager
async def tunnels(folder, api):
    """A proxy that opens tunnels to api.anthropic.com alone, which is the simulated API there. Yields its address and its authority's file."""
    store = CertStore.from_store(ready_authority(folder / "ca"), "mitmproxy", 2048)
    shown = store.get_cert("api.anthropic.com", x509.GeneralNames([x509.DNSName("api.anthropic.com")]))
    (folder / "leaf.pem").write_bytes(shown.cert.to_pem())
    (folder / "leaf.key").write_bytes(shown.privatekey.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "leaf.pem", folder / "leaf.key")
    host, port = api.url.removeprefix("http://").split(":")

    async def pump(reader, writer):
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
        writer.close()

    async def talk(reader, writer):
        with suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            head = await reader.readuntil(b"\r\n\r\n")
            if b"CONNECT api.anthropic.com:" not in head:
                writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
                return writer.close()
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await writer.start_tls(context)
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", folder / "ca" / "mitmproxy-ca-cert.pem"


async def test_its_start_decides_what_it_sends(tmp_path):
    """The handbook's table: 60 MCP tools, three starts, the features that each leaves out."""
    (tmp_path / "tools.py").write_text(SIXTY_TOOLS)
    servers = json.dumps({"mcpServers": {"many": {"command": sys.executable, "args": [str(tmp_path / "tools.py")]}}})
    async with Simulator(behaviour=Behaviour(output_tokens=20)) as api, tunnels(tmp_path, api) as (proxy, ca):
        starts = {
            "proxy": {"HTTPS_PROXY": proxy, "NODE_EXTRA_CA_CERTS": str(ca), "ANTHROPIC_API_KEY": KEY},
            "base_url": {"ANTHROPIC_BASE_URL": api.url, "ANTHROPIC_AUTH_TOKEN": KEY},
            "gateway_mode": {"ANTHROPIC_BASE_URL": api.url, "ANTHROPIC_AUTH_TOKEN": KEY, **MODE},
        }
        sent = {}
        for start, environment in starts.items():
            before = len(api.book.rows)
            code, printed = await ask(tmp_path / start, "Say hello.", "--mcp-config", servers, **environment)
            assert code == 0, printed
            rows = list(api.book.rows.values())[before:]
            sent[start] = max(({*(row.header("anthropic-beta") or "").split(",")} for row in rows), key=len)
        assert {start: sent["proxy"] - betas for start, betas in sent.items()} == {start: set(LOST[start]) for start in starts}


async def spend(gw, cents):
    await gw.quiet()
    [(call_id,)] = await gw.gateway.ledger.change(lambda db: db.execute("SELECT max(id) FROM calls WHERE state = 'settled'").fetchall())
    amount_nano = cents * NANO_PER_DOLLAR // 100
    await gw.gateway.ledger.change(lambda db: admin.adjust(db, call_id, amount_nano, who="test", why="spent", now=time.time()))


async def test_it_warns_shows_dollars_and_says_a_reached_cap(tmp_path):
    async with Simulator(behaviour=Behaviour(output_tokens=20)) as api, gateway(tmp_path, api, {"app": DAY}) as gw:
        here = {"ANTHROPIC_BASE_URL": gw.url, "ANTHROPIC_AUTH_TOKEN": gw.tokens["app"], **MODE}
        assert (await ask(tmp_path / "home", "Say hello.", **here))[0] == 0
        await spend(gw, 410)
        code, printed = await ask(tmp_path / "home", "Say hello.", "--output-format", "stream-json", "--verbose", **here)
        [event] = [json.loads(line)["rate_limit_info"] for line in printed.splitlines() if '"rate_limit_event"' in line]
        assert (code, event["status"], event["surpassedThreshold"]) == (0, "allowed_warning", 0.75), printed
        screen = await session(tmp_path / "home", [("Say hello.", "of your usage credits"), ("/usage", "spent today")], **here)
        assert "You'veused8" in screen
        assert "/$5.00spenttoday" in screen
        await spend(gw, 60)
        code, printed = await ask(tmp_path / "home", "Say hello.", **here)
        assert code == 1
        assert printed.startswith("The cap for today of the app 'app'"), printed


def agent(prompt, **wish):
    """The input of the tool that starts an agent; the simulated model behaves for it as wished."""
    return {"description": "look around", "prompt": f"{prompt} simulate: {json.dumps(wish)}", "subagent_type": "general-purpose"}


async def test_a_sessions_cap_stops_all_its_agents(tmp_path):
    """The main agent starts two, and each of them one: refused by one cap, summed in one session, a tree below the main one."""
    starts = {"tool_name": "Agent", "output_tokens": 1000}
    two = agent("Look.", **starts, tool_input=agent("Look deeper.", output_tokens=1000))
    prompt = agent("Start two agents.", **starts, tool_calls=2, tool_input=two)["prompt"]
    policy = DAY + "each: {session: {ever: $0.55}}\n"
    async with Simulator(behaviour=Behaviour(output_tokens=400, tokens_per_s=150)) as api, gateway(tmp_path, api, {"app": policy}) as gw:
        here = {"ANTHROPIC_BASE_URL": gw.url, "ANTHROPIC_AUTH_TOKEN": gw.tokens["app"]}
        _, printed = await ask(
            tmp_path / "home", prompt, "--allowedTools", "Agent", "--verbose", "--output-format", "stream-json", **here
        )
        await gw.quiet()
        billed_nano = (await api.settled()).billed_nano
        assert "has spent $" in printed, printed[-2000:]
        refused = rows(tmp_path / "gateway.db", "SELECT agent_id FROM calls WHERE refusal = 'cap_spent'")
        where = ["--policies", str(tmp_path / "policies"), "--ledger", f"sqlite:///{tmp_path / 'gateway.db'}"]
        [story] = json.loads(CliRunner().invoke(main, ["sessions", json.loads(printed.splitlines()[0])["session_id"], "--json", *where]).stdout)
        assert await gw.spent_nano() == await gw.spent_nano("app:app") == billed_nano
        assert await gw.gateway.ledger.look(findings) == []
    parents = {line["agent"]: line["parent"] for line in story["by_agent"]}
    first = {name for name, parent in parents.items() if parent is None} - {None}
    assert len(first) == 2, parents
    assert {parent for parent in parents.values() if parent} <= first
    assert set(parents) - first - {None}, "an agent of an agent"
    assert {None, *first} & {name for (name,) in refused}, refused
    assert len({name for (name,) in refused}) >= 2, refused
    assert sum(line["spent_nano"] for line in story["by_agent"]) == story["spent_nano"] == billed_nano
    [cap] = story["caps"]
    assert (cap["spent_nano"], cap["held_nano"], cap["in_force_nano"]) == (billed_nano, 0, 550_000_000)
    assert 0 < billed_nano <= 550_000_000


async def test_a_refused_quota_probe_does_not_spoil_the_start(tmp_path):
    """Its interactive start asks a small model for one token, to read the headers; here no small model is allowed."""
    policy = DAY.replace(", claude-haiku-5-5", "")
    async with Simulator(behaviour=Behaviour(output_tokens=20)) as api, gateway(tmp_path, api, {"app": policy}) as gw:
        here = {"ANTHROPIC_BASE_URL": gw.url, "ANTHROPIC_AUTH_TOKEN": gw.tokens["app"], **MODE}
        await session(tmp_path / "home", [("Say hello.", "It is the")], **here)
        rows = await gw.gateway.ledger.change(lambda db: db.execute("SELECT max_tokens, refusal FROM calls ORDER BY id").fetchall())
        assert (1, "model") in rows, rows
        assert any(refusal is None for _, refusal in rows), rows
