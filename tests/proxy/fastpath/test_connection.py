"""A connection's handler: the layers that only pass events on are left out."""

import asyncio

from gateway import gateway

from gateway_addon.proxy.inject import InjectLayer
from gateway_addon.simulator import Simulator


async def test_a_connection_is_taken_to_the_layer_that_does_something(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        for _ in range(2):  # the first event is taken by those that choose the layer
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        [handler] = gw.master.addons.get("proxyserver").connections.values()
        assert type(handler.layer) is InjectLayer
        writer.close()
        await writer.wait_closed()
