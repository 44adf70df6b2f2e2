"""A connection's handler: the layers that only pass events on are left out."""

import asyncio
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from gateway import gateway
from ledgers import new_file
from mitmproxy.proxy.layers.modes import ReverseProxy

from gateway_addon.cli import main, worker
from gateway_addon.proxy import server
from gateway_addon.proxy.backpressure import SteadyWatchdog, TimedHandler
from gateway_addon.proxy.fastpath import connection
from gateway_addon.proxy.fastpath.connection import QuickHandler, QuickReader
from gateway_addon.proxy.inject import InjectLayer
from gateway_addon.proxy.settings import FAST_PATH, WORKER
from gateway_addon.simulator import Simulator


@pytest.mark.parametrize("known", [True, False], ids=["short", "long"])
async def test_a_connection_is_taken_to_the_layer_that_does_something(tmp_path, monkeypatch, known):
    monkeypatch.setattr(connection, "FITS", known)
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        for _ in range(2):  # the first event is taken by those that choose the layer
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        [handler] = gw.master.addons.get("proxyserver").connections.values()
        writer.close()
        await writer.wait_closed()
        assert (type(handler), type(handler.layer)) == ((QuickHandler, InjectLayer) if known else (TimedHandler, ReverseProxy))
        assert type(handler.timeout_watchdog) is SteadyWatchdog


def test_only_known_readers_and_handlers_are_taken_over():
    assert connection.fits()
    assert not connection.fits(handler=object)
    assert not connection.fits(reader=object)


async def test_neither_side_is_read_while_one_takes_no_bytes():
    """A piece is taken where it arrives; behind it, both readers wait for room, whichever side it is that takes nothing."""
    taken, room = [], asyncio.Event()
    handler = SimpleNamespace(take=lambda event: taken.append(event.data), full=False, is_drained=room.is_set, drain_writers=room.wait)
    readers = [asyncio.StreamReader(), asyncio.StreamReader()]
    for reader in readers:
        QuickReader.take_over(reader, handler, None)
    tasks = [asyncio.create_task(reader.read(9)) for reader in readers]
    await asyncio.sleep(0)
    readers[0].feed_data(b"1")
    assert taken == [b"1"], "all is taken, so nobody waits"
    handler.full = True
    for reader in readers:
        reader.feed_data(b"2")
        await asyncio.sleep(0)
        reader.feed_data(b"3")
    await asyncio.sleep(0.01)
    assert taken == [b"1", b"2", b"2"]
    assert not any(task.done() for task in tasks)
    room.set()
    assert await asyncio.gather(*tasks) == [b"3", b"3"]


@pytest.mark.parametrize("said", ["all", *FAST_PATH])
def test_a_part_of_the_fast_path_is_left_out_as_told(tmp_path, monkeypatch, said):
    """By each process that serves, and by it alone."""

    async def nothing(settings):
        return 0

    (tmp_path / "gateway.yaml").write_text("workspace_geo: global\n")
    where = ["--policies", str(tmp_path), "--ledger", f"sqlite:///{new_file(tmp_path)}", "--listen", "127.0.0.1:0", "--no-fast-path", said]
    for part in server.FAST_PATH.values():
        monkeypatch.setattr(part, "FITS", True)
    monkeypatch.setattr(server, "_run", nothing)
    handed_on = []
    monkeypatch.setattr("gateway_addon.cli.serve.supervise", lambda settings, listener, count: handed_on.append(settings) or 0)
    assert CliRunner().invoke(main, ["serve", *where, "--workers", "2"]).exit_code == 0
    assert all(part.FITS for part in server.FAST_PATH.values())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        [settings] = handed_on
        monkeypatch.setenv(WORKER, replace(settings, socket_fd=listener.detach()).written())
        with pytest.raises(SystemExit, match="0"):
            worker.main()
    left_out = [name for name, part in server.FAST_PATH.items() if not part.FITS]
    assert left_out == (list(FAST_PATH) if said == "all" else [said])
