"""`gateway web` as a user starts it: a process under mitmweb, whose pages hold neither key nor token, during a call and after."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anthropic
import httpx2
from ledgers import until
from ports import free_port
from processes import START_S, buried, ledgered
from secret_hunt import found_in, of_family

from gateway_addon.simulator import KEY, Behaviour, Simulator

APPS = {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\nreserve: full\n"}
ASK = {"model": "claude-haiku-4-5", "max_tokens": 400, "messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def web(folder: Path, gateways, *options: str):
    """Yields the process, the gateway's address, and a client of mitmweb's own pages."""
    page, port = free_port(), free_port()
    where = ["--policies", str(folder / "policies"), "--ledger", f"sqlite:///{gateways.ledger}", "--listen", f"127.0.0.1:{port}"]
    command = [sys.executable, "-u", "-m", "gateway_addon", "web", "--web-port", str(page), *where, *options]
    environment = os.environ | {"SIMULATED_KEY": KEY}
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment)
    os.close(log)
    try:
        said = ""
        while "\ngateway " not in said:
            line = (await asyncio.wait_for(process.stdout.readline(), START_S)).decode()
            assert line, (folder / "log").read_text()
            said += line
        address, password = re.search(r"mitmweb +(http://127\.0\.0\.1:\d+)/\?token=(\S+)", said).groups()
        async with httpx2.AsyncClient(base_url=address, headers={"authorization": f"Bearer {password}"}) as pages:
            yield process, f"http://127.0.0.1:{port}", pages
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await buried(process)


async def in_flight(api, count: int) -> None:
    await until(lambda: api.book.in_flight >= count)


async def read_to_its_end(client) -> None:
    async with client.messages.stream(**ASK) as stream:
        await stream.get_final_message()


async def test_mitmweb_shows_and_dumps_no_secret(tmp_path):
    """The flows that mitmweb shows and dumps hold no secret, during a call and after it."""
    async with Simulator(behaviour=Behaviour(delay_ms=40, output_tokens=240)) as api:
        gateways = ledgered(tmp_path, api.url, APPS)
        async with web(tmp_path, gateways) as (process, url, pages):
            password = pages.headers["authorization"].removeprefix("Bearer ")
            async with httpx2.AsyncClient() as stranger:
                assert (await stranger.get(f"{pages.base_url}/flows")).status_code == 403
            async with anthropic.AsyncAnthropic(base_url=url, api_key=gateways.tokens["app"], max_retries=0) as client:
                calls = asyncio.gather(client.messages.create(**ASK), read_to_its_end(client))
                await in_flight(api, 2)
                shown = [(await pages.get(path)).raise_for_status().content for path in ("/flows", "/flows/dump", "/events", "/options")]
                assert shown[0].count(b"/v1/messages") >= 2
                assert (lines := of_family("cmdline", process.pid))
                assert not any(found_in(where, password) for where in [*shown, *lines])
                await calls
                shown += [(await pages.get(path)).raise_for_status().content for path in ("/flows", "/flows/dump", "/events")]
        assert {row.header("x-api-key") for row in (await api.settled()).messages()} == {KEY}
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (KEY, gateways.tokens["app"]):
        assert not any(found_in(where, secret) for where in [*shown, *lines, *files])


async def test_flow_file_and_har_hold_no_secret_if_stopped_mid_flight(tmp_path):
    """A flow file and a HAR hold no secret, even if the gateway is stopped in mid-flight."""
    async with Simulator(behaviour=Behaviour(delay_ms=100, output_tokens=400)) as api:
        gateways = ledgered(tmp_path, api.url, APPS, "timeouts: {drain: 0.3s}\n")
        keep = ["--set", f"save_stream_file={tmp_path / 'flows'}", "--set", f"hardump={tmp_path / 'flows.har'}"]
        async with web(tmp_path, gateways, *keep) as (process, url, _):
            async with anthropic.AsyncAnthropic(base_url=url, api_key=gateways.tokens["app"], max_retries=0) as client:
                await client.messages.create(**ASK | {"max_tokens": 1})  # a HAR has whole calls alone
                calls = asyncio.gather(client.messages.create(**ASK), read_to_its_end(client), return_exceptions=True)
                await in_flight(api, 2)
                process.send_signal(signal.SIGTERM)
                with suppress(anthropic.APIError):
                    await calls
                await asyncio.wait_for(process.wait(), 60)
        await api.settled()
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert b"/v1/messages" in files["flows"]
    assert b"/v1/messages" in files["flows.har"]
    for secret in (KEY, gateways.tokens["app"]):
        assert not [name for name, content in files.items() if found_in(content, secret)]


async def test_option_that_bypasses_the_gateway_is_refused_in_the_page(tmp_path):
    """An option that opens a way around is refused in the page too."""
    async with Simulator() as api:
        gateways = ledgered(tmp_path, api.url, APPS)
        async with web(tmp_path, gateways) as (_, _, pages):
            pages.cookies.set("_mitmproxy_xsrf", "0" * 32)  # any value that the page sends twice
            allowed = {"x-xsrftoken": "0" * 32}
            assert (await pages.put("/options", json={"anticache": True}, headers=allowed)).status_code == 200
            before = (await pages.get("/options")).json()
            for name, value in {"proxy_debug": True, "ssl_insecure": True, "stream_large_bodies": "1m", "http2": True}.items():
                assert (await pages.put("/options", json={name: value}, headers=allowed)).status_code == 400
                assert before[name]["value"] in (False, None)
            assert (await pages.get("/options")).json() == before


def test_a_page_whose_port_is_taken_is_said_with_the_way_out(tmp_path):
    gateways = ledgered(tmp_path, "http://127.0.0.1:9", APPS)
    where = ["--policies", str(tmp_path / "policies"), "--ledger", f"sqlite:///{gateways.ledger}", "--listen", "127.0.0.1:0"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "gateway_addon", "web", "--web-port", str(taken.getsockname()[1]), *where]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=os.environ | {"SIMULATED_KEY": KEY})
    assert (done.returncode, "Choose another: --web-port PORT" in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
