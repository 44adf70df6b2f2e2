"""A connection's handler: the layers that only pass events on are left out, and options are copied once."""

import asyncio

from gateway import gateway
from mitmproxy.options import Options

from gateway_addon.handling import Settled
from gateway_addon.inject import InjectLayer
from gateway_addon.simulator import Simulator


async def test_a_connection_is_taken_to_the_layer_that_does_something_and_keeps_its_options(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        for _ in range(2):  # the first event is taken by those that choose the layer
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
        [handler] = gw.master.addons.get("proxyserver").connections.values()
        assert type(handler.layer) is InjectLayer
        assert type(handler.layer.context.options) is Settled
        writer.close()


def test_an_option_is_copied_once_for_each_connection():
    options = Options()
    options.update(listen_host="127.0.0.1", mode=["reverse:http://127.0.0.1:1"])
    settled = Settled(options)
    assert settled.mode == options.mode
    assert settled.mode is settled.mode
    assert options.mode is not options.mode
    options.update(listen_host="127.0.0.2")
    assert settled.listen_host == "127.0.0.2", "looked up when it is asked for"
