"""The first request of each real client, as it was sent, under the policy that `gateway init --yes` writes.

The client tier (test_clients.py) renews the files; here they keep the gateway from refusing what a client sends by default.
"""

import asyncio
import json

import pytest
from client_tier import CLIENTS, REQUESTS
from gateway import FIRST, gateway
from rawhttp import split_answer

from gateway_addon.simulator import Behaviour, Simulator


def kept(name):
    return json.loads((REQUESTS / f"{name}.json").read_text())


def as_sent(request, token):
    body = json.dumps(request["body"], ensure_ascii=False).encode()
    credential = f"Bearer {token}" if request["credential"].lower() == "authorization" else token
    headers = [*request["headers"], (request["credential"], credential), ("host", "127.0.0.1:8080"), ("content-length", str(len(body))), ("connection", "close")]
    lines = [f"{request['method']} {request['target']} HTTP/1.1", *(f"{name}: {value}" for name, value in headers if name.lower() != "connection" or value == "close")]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def answered(gw, request):
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(as_sent(request, gw.tokens["app"]))
    answer = await asyncio.wait_for(reader.read(-1), 60)
    writer.close()
    return split_answer(answer)


def test_each_client_has_a_kept_request():
    assert {path.stem for path in REQUESTS.glob("*.json")} == {client.name for client in CLIENTS}


async def test_each_clients_first_request_is_served(tmp_path):
    async with Simulator(behaviour=Behaviour(output_tokens=20)) as api, gateway(tmp_path, api, {"app": FIRST}) as gw:
        for client in CLIENTS:
            request = kept(client.name)
            status, headers, body = await answered(gw, request)
            assert status == 200, (client.name, body)
            asked, edited = request["body"].get("max_tokens"), headers.get("x-gateway-edited")
            clamped = asked > 32_000 and not request["body"].get("stream")
            assert edited == (f"max_tokens=32000 (asked {asked})" if clamped else None), client.name
        await gw.quiet()
        assert await gw.spent_nano() == (await api.settled()).billed_nano > 0


@pytest.mark.parametrize("name", ["langchain", "pydantic-ai"])
def test_some_clients_ask_for_more_than_the_clamp(name):
    """Else nothing here would show that the first policy takes them."""
    assert kept(name)["body"]["max_tokens"] > 32_000
