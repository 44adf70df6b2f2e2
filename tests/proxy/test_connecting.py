"""A name with a dead address: the first connection waits a moment for it, the next ones not at all."""

import asyncio
import socket
from contextlib import ExitStack

import pytest

from gateway_addon.proxy.connecting import ConnectingLoop

ONE, TWO = "127.0.0.1", "127.0.0.2"


class Watched(ConnectingLoop):
    """Notes the addresses that are tried; its tasks are eager, as mitmproxy makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[str] = []
        self.set_task_factory(asyncio.eager_task_factory)

    async def sock_connect(self, sock, address):
        self.tried.append(address[0])
        return await super().sock_connect(sock, address)


@pytest.fixture
def named(monkeypatch):
    """Lets a name have these addresses, in this order."""
    true = socket.getaddrinfo

    def name(*addresses: tuple[str, int]) -> None:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: list(found) if host == "api.example" else true(host, *more, **named))

    return name


async def connected(port: int) -> tuple[str, list[str]]:
    """The address that a connection was made to, and those that were tried for it."""
    loop = asyncio.get_running_loop()
    loop.tried.clear()
    async with asyncio.timeout(10):
        _, writer = await asyncio.open_connection("api.example", port)
    address = writer.get_extra_info("peername")[0]
    writer.close()
    await writer.wait_closed()
    return address, list(loop.tried)


def test_a_dead_address_is_waited_for_once(named):
    """It answers nobody: the queue of its socket is full, and nobody takes from it."""
    with ExitStack() as stack:
        dead = stack.enter_context(socket.create_server((TWO, 0), backlog=0)).getsockname()
        alive = stack.enter_context(socket.create_server((ONE, dead[1]))).getsockname()
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(dead)
        named(dead, alive)
        with asyncio.Runner(loop_factory=Watched) as runner:
            assert [runner.run(connected(dead[1])) for _ in range(3)] == [(ONE, [TWO, ONE]), (ONE, [ONE]), (ONE, [ONE])]


def test_an_address_that_died_is_left_for_the_next(named):
    with ExitStack() as stack:
        first = stack.enter_context(socket.create_server((ONE, 0)))
        port = first.getsockname()[1]
        stack.enter_context(socket.create_server((TWO, port)))
        named((ONE, port), (TWO, port))
        with asyncio.Runner(loop_factory=Watched) as runner:
            assert runner.run(connected(port)) == (ONE, [ONE])
            first.close()
            assert [runner.run(connected(port)) for _ in range(2)] == [(TWO, [ONE, TWO]), (TWO, [TWO])]


def test_a_name_whose_addresses_are_all_gone_says_so(named):
    with socket.create_server((ONE, 0)) as gone:
        port = gone.getsockname()[1]
    named((ONE, port), (TWO, port))
    with asyncio.Runner(loop_factory=Watched) as runner, pytest.raises(OSError, match=rf"{ONE}.*{TWO}"):
        runner.run(connected(port))


def test_an_address_is_not_looked_up_and_a_name_once(monkeypatch):
    """A look-up takes a thread."""
    true, asked = socket.getaddrinfo, []

    def look_up(host, *more, **named):
        asked.append(host)
        return true("127.0.0.1" if host == "api.example" else host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)

    async def connect(host):
        _, writer = await asyncio.open_connection(host, port)
        writer.close()
        await writer.wait_closed()

    with socket.create_server((ONE, 0)) as server, asyncio.Runner(loop_factory=Watched) as runner:
        port = server.getsockname()[1]
        runner.run(connect(ONE))
        assert asked == []
        runner.run(connect("api.example"))
        assert asked == ["api.example"]
