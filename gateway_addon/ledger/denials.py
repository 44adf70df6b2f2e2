"""Why a reservation was not written: the one obstacle to name, and when it makes sense to ask again. Pure.

The order is that of usefulness to the caller: who may not ask at all, then what is paused, then money that is gone (waiting does not
help before the window's end), then what other calls hold, then rates.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from gateway_addon.ledger.types import Denied, RateLimits, Standing


class Obstacle(NamedTuple):
    """A row of `book.OBSTACLES`. For a rate, `recent` and `before` count this calendar minute and the last one."""

    what: str
    name: str | None
    recent: int | None
    before: int | None
    until: float | None


def explain(
    obstacles: Sequence[Obstacle],
    standings: Sequence[Standing],
    limits: RateLimits,
    input_tokens: int,
    grant_nano: int,
    quantum_nano: int,
    now: float,
) -> Denied:
    """The refusal for a call of `input_tokens` that wanted `grant_nano` and `quantum_nano` to keep free; `obstacles` is not empty."""
    first = obstacles[0]
    match first.what:
        case "token_unknown" | "token_revoked" | "token_expired":
            return Denied(first.what)
        case "paused":
            return Denied("paused", limit=first.name, until=first.until)
        case "cap":
            names = {obstacle.name for obstacle in obstacles if obstacle.what == "cap"}
            caps = [standing for standing in standings if f"{standing.scope} {standing.window}" in names]
            return _by_cap(caps, grant_nano, quantum_nano, now)
        case "concurrency":
            return Denied("concurrency", limit="concurrent", limit_max=limits.concurrent, used=first.recent, retry_after_s=1)
        case _:
            return _by_rate(first, limits, input_tokens, now)


def _by_cap(caps: Sequence[Standing], grant_nano: int, quantum_nano: int, now: float) -> Denied:
    never = [cap for cap in caps if grant_nano + quantum_nano > _amount(cap)]
    if never:
        return Denied("quote_over_cap", min(never, key=_amount))
    # Waiting helps only if the call fits once everything in flight came back; judged with its own quantum, or a stream that
    # finds the window idle but nearly used up would be told to wait for ever.
    gone = [cap for cap in caps if cap.spent_nano + grant_nano + quantum_nano > _amount(cap)]
    if not gone:
        return Denied("cap_held", min(caps, key=lambda cap: _amount(cap) - cap.spent_nano), retry_after_s=1)
    last = max(gone, key=lambda cap: math.inf if cap.resets_at is None else cap.resets_at)
    return Denied("cap_spent", last, retry_after_s=None if last.resets_at is None else max(1, math.ceil(last.resets_at - now)))


def _amount(cap: Standing) -> int:
    assert cap.cap_nano is not None
    return cap.cap_nano


def _by_rate(rate: Obstacle, limits: RateLimits, input_tokens: int, now: float) -> Denied:
    assert rate.name is not None
    assert rate.recent is not None
    assert rate.before is not None
    limit_max: int = getattr(limits, rate.name)
    size = 1 if rate.name == "requests_per_minute" else input_tokens
    second = int(now) % 60
    used = rate.recent + -(-rate.before * (60 - second) // 60)
    return Denied(
        "rate",
        limit=rate.name,
        limit_max=limit_max,
        used=used,
        retry_after_s=_rate_wait_s(limit_max - size, rate.recent, rate.before, second),
    )


def _rate_wait_s(room: int, recent: int, before: int, second: int) -> int | None:
    """Seconds until a request fits beside what the last two minutes admitted; `room` is the limit less its own size.

    None: it is larger than the limit and never fits.
    """
    if room < 0:
        return None
    if recent <= room:  # enough of the minute before falls out of the sliding sixty seconds within this one
        return max(1, math.ceil(60 - 60 * (room - recent) / before) - second)
    return 60 - second + max(0, math.ceil(60 - 60 * room / recent))
