"""A company's proxy: tunnels (CONNECT) for those who know its password."""

import asyncio
import base64
from contextlib import asynccontextmanager, suppress

PASSWORD = "s3cret-of-the-proxy"
OPENS = f"Basic {base64.b64encode(f'user:{PASSWORD}'.encode()).decode()}"


@asynccontextmanager
async def proxy():
    """A proxy that opens tunnels for those who know its password. Yields its address, the heads that it got, and all that passed."""
    heads, passed = [], bytearray()

    async def pump(reader, writer):
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                passed.extend(data)
                writer.write(data)
        writer.close()

    async def talk(reader, writer):
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            if f"proxy-authorization: {OPENS}".lower() not in heads[-1].lower():
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
                return writer.close()
            host, port = heads[-1].split()[1].split(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heads, passed
