"""Find the address of a caller: the connection's peer, or what a trusted proxy in front says of it. Pure.

Promises that no caller chooses its own address: X-Forwarded-For is believed only from the proxies that the policy names,
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
    """Return the caller's address. Each proxy adds its peer at the right: read from there while the writer is trusted."""
    if not trusted:
        return _shown(peer)
    at = _parsed(peer)
    if at is None:
        return peer
    hops = [hop.strip() for name, value in headers if name == FORWARDED_FOR for hop in value.split(",")]
    while hops and within(at, trusted) and (before := _parsed(hops.pop())) is not None:
        at = before
    return str(at)


def within(address: str | IpAddress, networks: Collection[IpNetwork]) -> bool:
    """Return whether an address is in one of these networks. Raises ValueError for a text that is no address."""
    at = ipaddress.ip_address(address)
    return any(at in network for network in networks)


@lru_cache(1024)  # the few that call, again and again
def _shown(text: str) -> str:
    return str(_parsed(text) or text)


@lru_cache(1024)
def _parsed(text: str) -> IpAddress | None:
    """Return an address, or None. An IPv4-mapped IPv6 address (a listener on `::` sees them) becomes IPv4."""
    try:
        at = ipaddress.ip_address(text)
    except ValueError:
        return None
    return at.ipv4_mapped or at if isinstance(at, IPv6Address) else at
