"""Where a call comes from: the address at the other end of the connection, or what a trusted proxy in front says of it. Pure.

Promises that nobody chooses an address of his own: X-Forwarded-For is believed of the proxies that the policy names and of no one else,
and of its list only the part that they wrote.
"""

import ipaddress
from collections.abc import Collection
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

FORWARDED_FOR = "x-forwarded-for"

type IpAddress = IPv4Address | IPv6Address
type IpNetwork = IPv4Network | IPv6Network


def origin(peer: str, headers: tuple[tuple[str, str], ...], trusted: Collection[IpNetwork]) -> str:
    """The address of the caller. Each proxy adds whom it saw at the right: from there, as long as who wrote is trusted."""
    at = _parsed(peer)
    if not trusted or at is None:
        return peer if at is None else str(at)
    said = [hop.strip() for name, value in headers if name == FORWARDED_FOR for hop in value.split(",")]
    while said and within(at, trusted) and (before := _parsed(said.pop())) is not None:
        at = before
    return str(at)


def within(address: str | IpAddress, networks: Collection[IpNetwork]) -> bool:
    """Whether an address is in one of these networks. Raises ValueError for what is none."""
    at = ipaddress.ip_address(address)
    return any(at in network for network in networks)


@lru_cache(1024)  # the few that call, again and again
def _parsed(text: str) -> IpAddress | None:
    """An address, or None. IPv4 in IPv6's clothes (a listener on `::`) is IPv4."""
    try:
        at = ipaddress.ip_address(text)
    except ValueError:
        return None
    return at.ipv4_mapped or at if isinstance(at, IPv6Address) else at
