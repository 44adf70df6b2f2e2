"""Judge the shared key's own limits: how much of them a background app must leave to the others.

The API reports its limits with every answer (`anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,
remaining,reset}`, platform documentation, "Rate limits"). Pure: it reads what the ledger kept of the latest ones.
"""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

PREFIX = "anthropic-ratelimit-"
KINDS = ("requests", "tokens", "input-tokens", "output-tokens")


class Shortage(NamedTuple):
    """A limit of which less is left than the share that must stay free."""

    kind: str
    remaining: int
    limit: int
    wait_s: int
    """Seconds until the limit is replenished."""


def shortage(latest: Mapping[str, tuple[str, float]], keep_percent: int, now: float) -> Shortage | None:
    """Return the limit with the longest wait among those below `keep_percent`; None while there is room.

    `latest` maps header names to (value, unix seconds when seen). A report from before its own reset is ignored.
    """
    short = []
    for kind in KINDS:
        values = [latest.get(f"{PREFIX}{kind}-{field}", ("", 0.0))[0] for field in ("limit", "remaining", "reset")]
        limit, remaining, reset_at = _whole(values[0]), _whole(values[1]), _moment(values[2])
        if limit and remaining is not None and reset_at is not None and reset_at > now and remaining * 100 < limit * keep_percent:
            short.append(Shortage(kind, remaining, limit, max(1, math.ceil(reset_at - now))))
    return max(short, key=lambda found: found.wait_s, default=None)


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _moment(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
