"""An offer of another protocol is not taken up, and costs no client its call; a demand for one is refused."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from bypass import PLAIN
from gateway import gateway
from rawhttp import gateway_head as head
from rawhttp import send

from gateway_addon.simulator import Simulator

BODY = json.dumps(PLAIN).encode()
H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA")
OFFERS = {
    "h2c": (H2C, 200),
    "two offers": (("connection: upgrade", "upgrade: h2c, HTTP/3.0"), 200),
    "TLS": (("connection: Upgrade", "upgrade: TLS/1.2"), 200),
    "an empty one": (("connection: upgrade", "upgrade:"), 200),
    "a websocket": (("connection: upgrade", "upgrade: WebSocket", "sec-websocket-version: 13"), 403),
    "a websocket among others": (("connection: upgrade", "upgrade: h2c, websocket"), 403),
}


async def test_offers_are_ignored_and_websockets_refused(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        for name, (lines, status) in OFFERS.items():
            plain = ("anthropic-version: 2023-06-01", "content-type: application/json", f"content-length: {len(BODY)}")
            got = await send(gw, head(*lines, *plain, token=gw.tokens["app"]) + BODY)
            assert got.split()[1] == str(status).encode(), (name, got)
        for row in (await api.settled()).all():
            assert {"upgrade", "http2-settings", "connection"} & set(dict(row.headers)) == set()


@pytest.mark.skipif(shutil.which("javac") is None, reason="no JDK is installed")
async def test_the_client_of_the_jdk_is_served(tmp_path):
    """Its defaults offer HTTP/2 in clear with the first call."""
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        source = Path(__file__).with_name("Http2Offer.java")
        command = ("java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", source, gw.url, gw.tokens["app"], BODY.decode())
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        printed, _ = await asyncio.wait_for(process.communicate(), 60)
        assert [line[:13] for line in printed.decode().splitlines()] == ["200 HTTP_1_1 "] * 2, printed
        assert len((await api.settled()).messages()) == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_with_http2_is_served(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        headers = (f"x-api-key: {gw.tokens['app']}", "anthropic-version: 2023-06-01", "content-type: application/json")
        options = [option for header in headers for option in ("-H", header)]
        command = ("curl", "-sS", "--http2", "-v", *options, "-d", BODY.decode(), f"{gw.url}/v1/messages")
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        printed, told = await asyncio.wait_for(process.communicate(), 60)
        assert b"Upgrade: h2c" in told, "it does offer it"
        assert json.loads(printed)["type"] == "message", printed
