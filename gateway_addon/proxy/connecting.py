"""Connect to the next address of a name where one does not answer soon, and begin with the one that answered last.

Promises that a dead address costs the first connection `NEXT_ADDRESS_S`, not a minute, and the next ones nothing. Where none answers that
soon, each gets its time, as asyncio gives it. (asyncio's own race of addresses hangs with eager tasks before Python 3.12.8, and mitmproxy
makes its tasks eager.) Knows nothing of mitmproxy, whose connections are made by asyncio's own function.
"""

import asyncio
import socket
from contextlib import suppress
from typing import Any

from gateway_addon.http_client import NEXT_ADDRESS_S


class ConnectingLoop(asyncio.SelectorEventLoop):
    """An event loop whose connections try a name's addresses in turn, `NEXT_ADDRESS_S` apart."""

    def __init__(self) -> None:
        super().__init__()
        self._answered: dict[tuple[Any, Any], str] = {}
        """By host and port: the address that a connection was made to last."""

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        """Connect as asyncio does, with a short time for each address."""
        if host is None or options.get("ssl") is not None or _is_address(host):
            return await super().create_connection(protocol_factory, host, port, **options)
        found = await self.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        last = self._answered.get((host, port))
        for address in sorted(addresses, key=lambda each: each != last) if len(addresses) > 1 else ():
            with suppress(OSError):  # a timeout is one
                async with asyncio.timeout(NEXT_ADDRESS_S):
                    made = await super().create_connection(protocol_factory, address, port, **options)
                self._answered[host, port] = address
                return made
        only = addresses[0] if len(addresses) == 1 else host  # else asyncio would look the name up once more
        return await super().create_connection(protocol_factory, only, port, **options)


def _is_address(host: str) -> bool:
    """Tell whether a host is an address already: looking one up would take a thread and two turns of the loop."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            return bool(socket.inet_pton(family, host))
    return False
