"""The gateway in somebody's own `mitmdump -s`: a real one, with a script that is touched and spoilt while it runs."""

import asyncio
import os
import signal
import socket
import sys
import threading
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import anthropic
import httpx2
import pytest
from ledgers import until
from mitmproxy.exceptions import OptionsError
from mitmproxy.net import tls
from mitmproxy.options import Options
from mitmproxy.tools.dump import DumpMaster
from ports import free_port
from processes import START_S, buried, ledgered
from secret_hunt import found_in

from gateway_addon import addon
from gateway_addon.addon import Shim
from gateway_addon.ledger import background
from gateway_addon.proxy.server import assembled
from gateway_addon.simulator import KEY, Simulator

APPS = {
    "app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n",
    "poor": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $0.0001}\n",
}
ASK = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
SCRIPT = """
from gateway_addon.addon import addons
from gateway_addon.calls.gateway import Gateway

admit = Gateway.admit

async def failing(self, arrived, request, now):
    if b"bug" in request.body:
        raise RuntimeError("a bug")
    return await admit(self, arrived, request, now)

Gateway.admit = failing

def requestheaders(flow):
    flow.request.stream = True
"""
"""A script with a bug, and a hook that would send bodies on before they are judged."""


@asynccontextmanager
async def mitmdump(folder: Path, gateways, mode: str, *arguments: str, script: Path | None = None):
    """A mitmdump as a person starts it: yields the process; it is stopped by SIGTERM if it still runs."""
    environment = os.environ | {
        "SIMULATED_KEY": KEY, "GATEWAY_POLICIES": str(folder / "policies"), "GATEWAY_LEDGER": f"sqlite:///{gateways.ledger}", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    where = ["--mode", mode, "--set", f"confdir={folder / 'mitmproxy'}", "-s", str(script or folder / "script.py")]
    command = [sys.executable, "-c", "from mitmproxy.tools.main import mitmdump; mitmdump()", *where, *arguments]
    printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT)
    process = await asyncio.create_subprocess_exec(*command, stdout=printed, stderr=printed, env=environment)
    os.close(printed)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await buried(process)


async def listens(process, folder: Path) -> None:
    await until(lambda: b"listening at" in (folder / "printed").read_bytes() or process.returncode is not None, START_S)
    assert process.returncode is None, (folder / "printed").read_text()


async def in_place(port: int) -> None:
    """mitmdump listens a moment before the gateway is in it; a connection that comes then is closed."""
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

        async def ready() -> bool:
            with suppress(httpx2.TransportError):
                return (await client.get("/gateway/readyz")).status_code == 200
            return False

        await until(ready, START_S)


async def test_a_users_own_mitmdump_enforces_and_fails_closed(tmp_path):
    """It admits, refuses and caps; whatever happens to the script, nothing is sent on."""
    script, port = tmp_path / "script.py", free_port()
    script.write_text(SCRIPT)
    async with Simulator() as api:
        gateways = ledgered(tmp_path, api.url, APPS, "timeouts: {drain: 10m}\n")
        files = ["-w", str(tmp_path / "flows"), "--set", f"hardump={tmp_path / 'flows.har'}", "--set", "flow_detail=4"]
        listen = ["--listen-host", "127.0.0.1", "--listen-port", str(port)]
        async with mitmdump(tmp_path, gateways, f"reverse:{api.url}", *listen, *files, "--set", "http2=true", script=script) as process:
            await listens(process, tmp_path)
            await in_place(port)

            async def ask(app: str = "app", **more):
                async with anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{port}", api_key=gateways.tokens[app], max_retries=0) as client:
                    return await client.messages.create(**ASK | more)

            async def holds() -> None:
                assert (await ask()).content[0].text
                with pytest.raises(anthropic.PermissionDeniedError, match="may not use claude-opus-5-5"):
                    await ask(model="claude-opus-5-5")
                with pytest.raises(anthropic.RateLimitError, match="cap for today of app poor"):
                    await ask("poor")
                with pytest.raises(anthropic.ServiceUnavailableError, match="failed while judging"):
                    await ask(system="bug")

            await holds()
            os.utime(script, (2_000_000_000, 2_000_000_000))
            await asyncio.sleep(1.3)  # mitmproxy looks at its scripts each second
            await holds()
            script.write_text("this is no Python")
            os.utime(script, (2_100_000_000, 2_100_000_000))
            await asyncio.sleep(1.3)
            await holds()
            script.unlink()
            await asyncio.sleep(1.3)
            await holds()
            endless = asyncio.ensure_future(ask(messages=[{"role": "user", "content": 'simulate: {"delay_ms": 600000}'}]))
            await until(lambda: api.book.in_flight == 1)
            process.send_signal(signal.SIGTERM)
            await until(lambda: b"Once more to end them now" in (tmp_path / "printed").read_bytes())
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), 60)
            with pytest.raises(anthropic.APIConnectionError):
                await endless
        assert process.returncode == 0, (tmp_path / "printed").read_text()
        book = await api.settled()
        assert len(book.messages()) == 5
        assert {row.header("x-api-key") for row in book.messages()} == {KEY}
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"/v1/messages" in each for each in written), "the flows were written"
    for secret in (KEY, *gateways.tokens.values()):
        assert not any(found_in(each, secret) for each in written)


WRONG = [
    ("regular", ["--listen-host", "127.0.0.1"], "start mitmdump with --mode reverse:http"),
    ("reverse:{upstream}", [], "Tokens would cross the network in clear"),
]


def test_no_name_of_the_script_is_one_that_mitmproxy_calls():
    """mitmproxy takes the script's own module for an addon: an imported function `load` would be called as its hook."""
    from mitmproxy import hooks

    assert "load" in hooks.all_hooks
    assert set(vars(addon)) & set(hooks.all_hooks) == set()


@pytest.mark.parametrize(("mode", "arguments", "said"), WRONG, ids=["another mode", "every interface"])
async def test_a_mitmdump_that_would_not_be_safe_does_not_start(tmp_path, mode, arguments, said):
    gateways = ledgered(tmp_path, "http://127.0.0.1:9", APPS)
    (tmp_path / "script.py").write_text(SCRIPT)
    port = ["--listen-port", str(free_port())]
    async with mitmdump(tmp_path, gateways, mode.format(upstream="http://127.0.0.1:9"), *arguments, *port) as process:
        assert await asyncio.wait_for(process.wait(), 60) == 1
    assert said in (tmp_path / "printed").read_text()


AROUND = {
    "ssl_insecure": (True, "The gateway needs ssl_insecure=false"),
    "connection_strategy": ("eager", 'The gateway needs connection_strategy="lazy"'),
    "ignore_hosts": ([".*"], "ignore_hosts would keep calls away from the gateway"),
    "server": (False, "server would keep calls away from the gateway"),
}
MOVED = {"mode": ["regular"], "listen_host": "0.0.0.0", "ignore_hosts": [".*"], "scripts": [], "ssl_insecure": True}


@pytest.mark.parametrize("name", [*AROUND, ""])
async def test_another_scripts_options_open_no_way_around(tmp_path, monkeypatch, caplog, name):
    """A script beside this one changes an option as it is loaded, or later: the proxy does not start, or keeps its value."""
    gateways = ledgered(tmp_path, "http://127.0.0.1:9", APPS)
    for variable, value in {"POLICIES": str(tmp_path / "policies"), "LEDGER": f"sqlite:///{gateways.ledger}"}.items():
        monkeypatch.setenv(f"GATEWAY_{variable}", value)
    monkeypatch.setenv("SIMULATED_KEY", KEY)
    monkeypatch.setattr(tls, "log_master_secret", tls.make_master_secret_logger(str(tmp_path / "tls_keys")))
    monkeypatch.setattr(addon, "stop_signals", lambda: (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))  # as on a terminal
    options, shim = Options(listen_host="127.0.0.1", mode=["reverse:http://127.0.0.1:9"]), Shim()
    master = DumpMaster(options, with_termlog=False, with_dumper=False)
    master.addons.add(shim)
    value, said = AROUND.get(name, (None, ""))
    options.update(**{name: value} if name else {})
    await shim.running()
    try:
        assert (shim.in_place, said in caplog.text, tls.log_master_secret) == (not name, True, None)
        assert "SSLKEYLOGFILE is not heeded" in caplog.text
        for each in MOVED if shim.in_place else ():
            with pytest.raises(OptionsError, match=f"{each} cannot be changed while"):
                options.update(**{each: MOVED[each]})
        if shim.in_place:
            os.kill(os.getpid(), signal.SIGHUP)
            await until(master.should_exit.is_set)
    finally:
        await shim.done()
        master.addons.get("errorcheck").finish()


LATE = """
import asyncio, contextlib, pathlib
from gateway_addon import addon
assembled = addon.assembled

@contextlib.asynccontextmanager
async def late(*arguments):
    while not pathlib.Path(__file__).with_name("go").exists():
        await asyncio.sleep(0.01)
    async with assembled(*arguments) as made:
        yield made

addon.assembled = late
addons = addon.addons
"""


async def test_a_connection_that_comes_too_early_spoils_nothing(tmp_path):
    """A health check polls while mitmdump starts: it is let go, at once, and the gateway starts. Of QUIC no port is left open."""
    gateways, port = ledgered(tmp_path, "https://127.0.0.1:9", APPS), free_port()
    (tmp_path / "script.py").write_text(LATE)
    listen = ["--listen-host", "127.0.0.1", "--listen-port", str(port)]
    async with mitmdump(tmp_path, gateways, "reverse:https://127.0.0.1:9", *listen) as process:
        await listens(process, tmp_path)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /gateway/readyz HTTP/1.1\r\nhost: gateway\r\n\r\n")
        with suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), START_S) == b""
        writer.close()
        (tmp_path / "go").touch()
        await in_place(port)
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as udp:
            udp.bind(("127.0.0.1", port))
    assert (process.returncode, "Traceback" in (tmp_path / "printed").read_text()) == (0, False)


async def test_a_policy_with_a_mistake_is_said_with_file_and_line(tmp_path):
    gateways = ledgered(tmp_path, "http://127.0.0.1:9", APPS)
    (tmp_path / "policies/apps/app.yaml").write_text("models: {allow: [claude-haiku-4-5]}\ncaps: {mnth: $1}\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    async with mitmdump(tmp_path, gateways, "reverse:http://127.0.0.1:9", "--listen-host", "127.0.0.1", "--listen-port", str(free_port())) as process:
        assert await asyncio.wait_for(process.wait(), 60) == 1
    assert "app.yaml:2: caps.mnth" in (tmp_path / "printed").read_text()


async def test_no_read_is_under_way_when_a_gateway_has_ended(tmp_path, monkeypatch):
    """A thread that the interpreter's end meets in SQLite's code can end a user's mitmdump with a segmentation fault."""
    monkeypatch.setenv("SIMULATED_KEY", KEY)
    gateways = ledgered(tmp_path, "http://127.0.0.1:9", APPS)
    forever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

    def under_way():
        return [thread for thread in threading.enumerate() if thread.name == background.NAME]

    async with assembled(tmp_path / "policies", f"sqlite:///{gateways.ledger}"):
        reading = asyncio.ensure_future(background.read(gateways.ledger, lambda db: db.execute(forever).fetchone()))
        await until(under_way)
        reading.cancel()
    assert not under_way()
