"""When an answer's tokens are generated and when its bytes go out: two clocks, because the bill follows the first one.

Generation starts when the request has arrived and runs at its own pace, whether anybody listens or not. Delivery follows it, `ahead_s`
behind. A client that hangs up stops delivery at once and generation only `after_disconnect_s` later.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterable

from .behaviour import Behaviour
from .http import Exchange, Headers
from .messages import PING, Answer, Made, Step, event

LOOPS_AFTER_S = 1.0
"""How long the API works before its own turns are billed in spite of an error."""
EDGE_LOST = (502, 503, 520, 522)
EDGE_LATE_S = 2.0


class Clock:
    """Seconds since the request arrived."""

    def __init__(self) -> None:
        self._began = asyncio.get_running_loop().time()

    def elapsed_s(self) -> float:
        return asyncio.get_running_loop().time() - self._began


def step_s(step: Step, behaviour: Behaviour) -> float:
    """Return how long one step takes to generate."""
    if step.reads:
        return behaviour.turn_s
    if not step.tokens:
        return 0
    return behaviour.delay_ms / 1000 + (step.tokens / behaviour.tokens_per_s if behaviour.tokens_per_s else 0)


def made(steps: Iterable[Step], behaviour: Behaviour, elapsed_s: float) -> Made:
    """Return how much exists when generation has run for `elapsed_s`.

    A step that is under way counts in proportion, a turn once it has begun.
    """
    so_far, clock_s = Made(), 0.0
    for step in steps:
        duration_s = step_s(step, behaviour)
        if clock_s + duration_s > elapsed_s:
            share = int(step.tokens * (elapsed_s - clock_s) / duration_s)
            return so_far.and_then(Step(share, None))
        clock_s += duration_s
        so_far = so_far.and_then(step)
    return so_far


def billed(answer: Answer, behaviour: Behaviour, elapsed_s: float) -> Made:
    """Return how much is billed when somebody hung up `elapsed_s` after the request."""
    return made(answer.steps(), behaviour, math.inf if behaviour.overrun else elapsed_s + behaviour.after_disconnect_s)


def billed_before_an_error(answer: Answer, behaviour: Behaviour, elapsed_s: float) -> Made | None:
    """Return the usage billed for a stream that begins with an error; None: nothing at all, as without turns of the API's own."""
    looped = answer.final.web_searches > 0 or bool(answer.iterations)
    return made(answer.steps(), behaviour, elapsed_s) if looped and elapsed_s > LOOPS_AFTER_S else None


async def deliver_page(exchange: Exchange, behaviour: Behaviour, clock: Clock) -> bool:
    """Answer as an edge does. Returns whether it lost an API that may be at work; raises HungUp."""
    assert behaviour.edge is not None
    await exchange.pause(behaviour.delay_headers_s - clock.elapsed_s())
    late = behaviour.edge in EDGE_LOST and clock.elapsed_s() > EDGE_LATE_S
    page = f"<html><body><h1>{behaviour.edge}</h1></body></html>".encode()
    await exchange.answer(behaviour.edge, [("content-type", "text/html")], page)
    return late


async def deliver_json(exchange: Exchange, answer: Answer, behaviour: Behaviour, headers: Headers, encoding: str, clock: Clock) -> Made:
    """Send the answer whole, when it is whole. Returns what is billed; raises HungUp."""
    whole_s = sum(step_s(step, behaviour) for step in answer.steps())
    await exchange.pause(max(behaviour.delay_headers_s, whole_s + behaviour.ahead_s) - clock.elapsed_s())
    if behaviour.hang_up:
        exchange.hang_up()
    body = json.dumps(answer.json()).encode()
    await exchange.answer_in_chunks(200, [("content-type", "application/json"), *headers], body, encoding=encoding)
    return made(answer.steps(), behaviour, math.inf)


async def deliver_stream(
    exchange: Exchange, answer: Answer, behaviour: Behaviour, headers: Headers, encoding: str, clock: Clock
) -> Made | None:
    """Send the answer as events while it is generated, up to its end or to the behaviour's error, with which generation ends as well.

    Returns what is billed, None where nothing is; raises HungUp.
    """
    await exchange.pause(behaviour.delay_headers_s - clock.elapsed_s())
    if behaviour.hang_up:
        exchange.hang_up()
    stream = [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache")]
    await exchange.start(200, [*stream, *headers], encoding=encoding)
    count, so_far = 0, Made()
    async for so_far, sent in _paced(exchange, answer, behaviour, clock):
        if behaviour.error is not None and _error_is_due(behaviour, count, so_far.tokens, answer):
            message = behaviour.error.removesuffix("_error").capitalize()
            await exchange.send(event("error", error={"type": behaviour.error, "message": message}))
            await exchange.finish()
            return so_far if count > behaviour.ping_first else billed_before_an_error(answer, behaviour, clock.elapsed_s())
        if count == behaviour.cut_after_events:
            exchange.hang_up()
        await exchange.send(sent)
        count += 1
    if count == behaviour.cut_after_events:
        exchange.hang_up()
    await exchange.finish()
    return so_far


def _error_is_due(behaviour: Behaviour, count: int, tokens: int, answer: Answer) -> bool:
    if behaviour.error_after_events is not None:
        return count >= behaviour.error_after_events
    return count > 0 and tokens * 2 >= answer.final.output_tokens


async def _paced(exchange: Exchange, answer: Answer, behaviour: Behaviour, clock: Clock) -> AsyncIterator[tuple[Made, bytes]]:
    """Yield each event when it is due, with what was made for it and before it; pings while nothing is."""
    if behaviour.ping_first:
        yield Made(), PING
    if behaviour.whole_start:
        await exchange.pause(sum(step_s(step, behaviour) for step in answer.steps()) + behaviour.ahead_s - clock.elapsed_s())
        for piece in answer.whole():
            yield made(answer.steps(), behaviour, math.inf), piece
        return
    yield Made(), answer.opening(behaviour.opening_usage)
    silent_until_s = behaviour.delay_headers_s + behaviour.say_nothing_s
    await exchange.pause(silent_until_s - clock.elapsed_s())
    so_far, generated_s = Made(), 0.0
    for step in answer.steps():
        generated_s += step_s(step, behaviour)
        while (wait_s := generated_s + behaviour.ahead_s - clock.elapsed_s()) > 0:
            await exchange.pause(min(wait_s, behaviour.ping_s))
            if wait_s > behaviour.ping_s:
                yield so_far, PING
        so_far = so_far.and_then(step)
        if step.event is not None:
            yield so_far, step.event
    for last in answer.closing(zeroes=behaviour.closing_zeroes):
        yield so_far, last
