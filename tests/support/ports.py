"""Ports for programs that cannot choose one themselves."""

import atexit
import itertools
import os
import socket

FIRST, COUNT = 20_000, 12_000
"""Below the ports that the system hands out: between the choice and its use, seconds later, any connection could get one of those."""

_numbers = itertools.count(os.getpid())


def free_port() -> int:
    """A port of this machine that nobody has, and no other test's process is given until this one ends.

    A socket on another address of the machine is the sign that it is given away.
    """
    for number in itertools.islice(_numbers, COUNT):
        port, sign = FIRST + number % COUNT, socket.socket(type=socket.SOCK_DGRAM)
        try:
            sign.bind(("127.0.0.2", port))
            with socket.create_server(("127.0.0.1", port)):
                atexit.register(sign.close)
                return port
        except OSError:
            sign.close()
    raise AssertionError(f"no port from {FIRST} to {FIRST + COUNT} is free")
