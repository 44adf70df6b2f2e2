"""Read the values that only a policy has: where it calls, whom it trusts, how long it waits, where a secret is.

Promises that a value which would open a way around the gateway, or send the key in clear, is an error with a sentence. The kinds that
any table of keys may have are in kinds.py.
"""

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from gateway_addon.ledger.access import GROUP_READS, PRIVATE
from gateway_addon.messages.header_filter import OWN, OWN_PREFIX
from gateway_addon.names import NAME_FORM
from gateway_addon.policy.kinds import SECONDS, ValueKind, listing, one_of, parsed, seconds, text
from gateway_addon.policy.model import Source

WAIT_MAX_S = 300.0  # half of the time in which the official SDKs want the whole answer
NAME = r"[a-z0-9][a-z0-9_-]{0,62}"
"""Apps and teams: lower case, so that two spellings never mean two budgets."""


def _upstream(value: str) -> str:
    """Return an https address, or a plain http one of this machine. Raises ValueError."""
    parts = urlsplit(value)
    loopback = parts.hostname == "localhost" or re.fullmatch(r"127(\.\d{1,3}){3}|::1", parts.hostname or "") is not None
    if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
        raise ValueError(f"{value!r} must be https (plain http only to a loopback address): the real key travels there")
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username or parts.port == 0:
        raise ValueError(f"{value!r} must be scheme, host and port alone, like https://api.anthropic.com")
    return value.rstrip("/")


def _proxy(value: str) -> Any:
    network = ipaddress.ip_network(value)
    if network.prefixlen == 0:
        raise ValueError(f"{value} is everybody: every caller could claim any address; write where the proxy is")
    return network


def _way_out(value: str) -> str:
    parts = urlsplit(value)
    if parts.username or parts.password:
        raise ValueError("a proxy's password is a secret; name where its address is read from, like {env: COMPANY_PROXY}")
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"{value!r} must be a proxy's address, like http://proxy:3128")
    return value


def _header(value: str) -> str:
    name = value.lower()
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", name) is None:
        raise ValueError(f"{value!r} is not the name of a header; write one like x-trace-id")
    if name.encode() in OWN or name.encode().startswith(OWN_PREFIX):
        raise ValueError(f"{value!r} is written by the gateway itself, or ends here; leave it out")
    return name


_MODES = {"0600": PRIVATE, "0640": GROUP_READS}  # in a schema also as numbers: so YAML reads them


def _mode(value: str) -> int:
    if value not in _MODES:
        why = "a user who can write or lock it can stop every call"
        raise ValueError(f"{value!r} cannot be the ledger's mode: {why}; write 0600 or 0640")
    return _MODES[value]


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{value!r} is not a time zone; write one like UTC or Europe/Berlin") from None
    return value


def _wait(value: str) -> float:
    wait_s = 0.0 if value in ("0", "0s") else seconds(value)
    if wait_s > WAIT_MAX_S:
        raise ValueError(f"{value!r} is longer than {WAIT_MAX_S / 60:g}m: the SDKs give a call up after 10m, and its answer takes time too")
    return wait_s


def _day_of_month(value: str) -> int:
    if re.fullmatch(r"[0-9]{1,2}", value) is None or not 1 <= int(value) <= 31:
        raise ValueError(f"{value!r} is not a day of the month; write one from 1 to 31 (31: the last day of a shorter month)")
    return int(value)


_COMMAND = ValueKind(listing(text()).read, listing(text()).schema, "a list: the program and its arguments")
SOURCE = one_of(
    Source,
    {
        "env": text(r"[A-Za-z_][A-Za-z0-9_]*", "the name of an environment variable"),
        "file": text(what="a path"),
        "command": _COMMAND,
        "keyring": text(r"[^/\s]+/[^/\s]+", "SERVICE/USER"),
    },
)
UPSTREAM = parsed(_upstream, {"type": "string", "format": "uri"}, "an https address")
ZONE = parsed(_zone, {"type": "string"}, "a time zone")
WAIT = parsed(_wait, {"anyOf": [{"enum": [0, "0"]}, SECONDS.schema]}, SECONDS.written)
MODE = parsed(_mode, {"enum": [*_MODES, *_MODES.values()]}, "`0600` or `0640`")
NETWORK = parsed(ipaddress.ip_network, {"type": "string"}, "a network (`10.0.0.0/8`)")
TRUSTED_PROXY = parsed(_proxy, {"type": "string"}, "a network (`10.0.0.0/8`)")
PATTERN = text(r"[A-Za-z0-9][A-Za-z0-9._:*?@-]*", "a model id or a pattern like claude-haiku-4-5*")
NAME_VALUE = text(NAME, f"a name of {NAME_FORM}")
DAY_OF_MONTH = parsed(_day_of_month, {"type": "integer", "minimum": 1, "maximum": 31}, "a day of the month")
PROXY_ADDRESS = parsed(_way_out, {"type": "string", "format": "uri"}, "an address (`http://proxy:3128`)")
HEADER = parsed(_header, {"type": "string"}, "a header's name")
