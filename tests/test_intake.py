"""What arrives on a socket: handed over at once and in order, never after the end was said, and no faster than it is taken."""

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest
from ledgers import until
from mitmproxy.test import tflow

from gateway_addon import intake

SOURCE = tflow.tclient_conn()


class Taker:
    """Notes what it is given. While it is `congested`, it has had enough until `drained`."""

    def __init__(self):
        self.taken, self.congested, self.drained = [], False, asyncio.Event()

    def take(self, event):
        assert event.connection is SOURCE
        self.taken.append(event.data)

    async def drain_writers(self):
        await self.drained.wait()


@asynccontextmanager
async def stream():
    """A reader, its writer, and the other end as a socket."""
    here, there = socket.socketpair()
    there.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=here)
    try:
        yield reader, writer, there
    finally:
        writer.close()
        there.close()
        await writer.wait_closed()


async def test_what_the_reader_holds_comes_first_and_its_end_is_still_the_readers():
    async with stream() as (reader, writer, there):
        there.send(b"early")
        await until(lambda: reader._buffer)
        taker = Taker()
        assert intake.install(taker, SOURCE, reader, writer) == b"early"
        there.send(b"late")
        await until(lambda: taker.taken)
        there.shutdown(socket.SHUT_WR)
        assert await reader.read() == b""
        assert taker.taken == [b"late"]
        writer.write(b"answer")  # whoever said all there is to say may still listen
        await writer.drain()
        assert there.recv(10) == b"answer"


async def test_nothing_is_taken_once_the_task_was_told_to_end():
    async with stream() as (reader, writer, _):
        taker = Taker()

        async def read():
            intake.install(taker, SOURCE, reader, writer)
            await asyncio.Event().wait()

        task = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        writer.transport.get_protocol().data_received(b"before")
        task.cancel()
        writer.transport.get_protocol().data_received(b"after")
        assert taker.taken == [b"before"]


async def test_no_more_is_read_while_somebody_is_slow_to_take_it():
    async with stream() as (reader, writer, there):
        taker = Taker()
        taker.congested = True
        intake.install(taker, SOURCE, reader, writer)
        there.send(b"1")
        await until(lambda: taker.taken)
        there.send(b"2")
        await asyncio.sleep(0.05)
        assert taker.taken == [b"1"]
        assert not writer.transport.is_reading()
        taker.congested = False
        taker.drained.set()
        await until(lambda: len(taker.taken) == 2)


@pytest.mark.parametrize("odd", ["reader", "protocol", "writer"])
async def test_a_stream_of_another_make_stays_its_tasks(odd):
    class Other(asyncio.StreamReader):
        pass

    async with stream() as (reader, writer, _):
        protocol = writer.transport.get_protocol()
        if odd == "protocol":
            writer.transport.set_protocol(protocol := asyncio.Protocol())
        assert intake.install(Taker(), SOURCE, Other() if odd == "reader" else reader, object() if odd == "writer" else writer) == b""
        assert writer.transport.get_protocol() is protocol
        if odd == "protocol":
            writer.transport.set_protocol(writer._protocol)
