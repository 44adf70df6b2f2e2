"""Judge a call by the ledger's facts: whether it may be reserved, else the one obstacle to name, and when to ask again. Pure.

One judgement for a denial's sentence, for the queue, for `explain` and for `replay`. It enforces nothing: the statement that writes
a reservation does (`reservations.RESERVE`), and it asks the same in SQL.

The obstacles come in the order of their use to the caller: a token not in force, a pause, money that is spent (waiting does not
help before the window's end), money that other calls hold, concurrency, rates.
"""

import math
from collections.abc import Sequence

from gateway_addon.ledger.types import CallFacts, Denied, MinuteCount, RateLimits, Standing


def judge(facts: CallFacts, limits: RateLimits, grant_nano: int, quantum_nano: int, input_tokens: int, now: float) -> Denied | None:
    """Return why a call of `input_tokens` may not hold `grant_nano` and keep `quantum_nano` free at `now`; None where it may."""
    if facts.token is None:
        return Denied("token_unknown")
    if (code := facts.token.refusal(now)) is not None:
        return Denied(code, token=facts.token)
    if facts.pauses:
        return Denied("paused", pause=facts.pauses[0])
    if (by_cap := judge_caps(facts.standings, grant_nano, quantum_nano, now)) is not None:
        return by_cap
    if limits.concurrent is not None and facts.open >= limits.concurrent:
        return Denied("concurrency", limit="concurrent", limit_max=limits.concurrent, used=facts.open)
    by_requests = judge_rate("requests_per_minute", limits.requests_per_minute, 1, facts.requests, now)
    return by_requests or judge_rate("input_tokens_per_minute", limits.input_tokens_per_minute, input_tokens, facts.input_tokens, now)


def judge_caps(standings: Sequence[Standing], grant_nano: int, quantum_nano: int, now: float) -> Denied | None:
    """Judge by the caps alone. The amounts that streams keep free for their next step, this call's too, count as taken."""
    asked_nano = grant_nano + quantum_nano
    full = [cap for cap in standings if cap.spent_nano + cap.reserved_nano + cap.quantum_nano + asked_nano > amount_nano(cap)]
    if not full:
        return None
    never = [cap for cap in full if asked_nano > amount_nano(cap)]
    if never:
        return Denied("quote_over_cap", min(never, key=amount_nano))
    # Waiting helps only if the call fits once everything in flight came back; judged with its own quantum, or a stream that
    # finds the window idle but nearly used up would be told to wait for ever.
    gone = [cap for cap in full if cap.spent_nano + asked_nano > amount_nano(cap)]
    if not gone:
        return Denied("cap_held", min(full, key=lambda cap: amount_nano(cap) - cap.spent_nano), retry_after_s=1)
    last = max(gone, key=lambda cap: math.inf if cap.resets_at is None else cap.resets_at)
    return Denied("cap_spent", last, retry_after_s=None if last.resets_at is None else max(1, math.ceil(last.resets_at - now)))


def amount_nano(cap: Standing) -> int:
    """Return what a cap allows in all, its raises included."""
    assert cap.cap_nano is not None
    return cap.cap_nano


def judge_rate(name: str, limit: int | None, size: int, counted: MinuteCount, now: float) -> Denied | None:
    """Judge by a rate: a sliding minute, in which the last calendar minute counts by the share that is still within sixty seconds.

    So no double burst passes when a calendar minute ends.
    """
    second = int(now) % 60
    if limit is None or 60 * counted.recent + (60 - second) * counted.before + 60 * size <= 60 * limit:
        return None
    used = counted.recent + -(-counted.before * (60 - second) // 60)
    wait_s = _rate_wait_s(limit - size, counted, second)
    return Denied("rate", limit=name, limit_max=limit, used=used, retry_after_s=wait_s)


def _rate_wait_s(room: int, counted: MinuteCount, second: int) -> int | None:
    """Return the seconds until a request fits after the last two minutes' calls; `room` is the limit less its size.

    None: it is larger than the limit and never fits.
    """
    if room < 0:
        return None
    if counted.recent <= room:  # enough of the minute before falls out of the sliding sixty seconds within this one
        return max(1, math.ceil(60 - 60 * (room - counted.recent) / counted.before) - second)
    return 60 - second + max(0, math.ceil(60 - 60 * room / counted.recent))
