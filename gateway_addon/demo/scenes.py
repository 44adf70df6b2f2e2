"""Play what the demo's three apps do, scene by scene, and check the result of each.

Each scene drives the gateway, says in plain sentences what it saw, and raises Surprise where that is not what it should have
seen. The apps: one answers customers' reviews, one writes articles, and one is an experimental script.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gateway_addon.demo.client import App, Reply
from gateway_addon.demo.stage import Stage, issue
from gateway_addon.ledger import admin, connect
from gateway_addon.ledger.reports import entry_history
from gateway_addon.money import cents

HAIKU, SONNET, OPUS, FABLE = "claude-haiku-4-5", "claude-sonnet-5-5", "claude-opus-5-5", "claude-fable-5-2"
MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"

type Say = Callable[[str], None]
type Scene = Callable[[Stage, Say], Awaitable[None]]


class Surprise(Exception):
    """Something happened that should not have. The message says what was expected and what came."""


def body(model: str, text: str, max_tokens: int, *, simulate: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a request for a message; `simulate` tells the simulated API how to answer it (behaviour.py)."""
    wishes = {"metadata": {"user_id": json.dumps({"simulate": simulate})}} if simulate else {}
    return {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}], **wishes, **more}


async def replies(stage: Stage, say: Say) -> None:
    """Make plain JSON calls, and count tokens."""
    reviews = stage.apps["reviews"]
    ask = body(HAIKU, "Answer this review in three sentences: the parcel was late, the chair is lovely.", 300)
    counted = expect(await reviews.ask(COUNT_TOKENS, {"model": ask["model"], "messages": ask["messages"]}), 200)
    say(f"reviews counts its tokens first: {counted.json['input_tokens']} of input. Counting is free, no cap can block it.")
    for number in range(1, 4):
        usage = expect(await reviews.ask(MESSAGES, ask), 200).json["usage"]
        say(f"reviews, reply {number}: 200, {usage['output_tokens']} tokens of output from {HAIKU}.")
    day = await today(reviews)
    say(f"GET /gateway/me tells the app where it stands: {cents(day['spent_nano'])} of {day['cap']} spent today.")


async def articles(stage: Stage, say: Say) -> None:
    """Read streams, with a prompt that is cached by the first and read by the second."""
    guide = {"type": "text", "text": "House style: say it plainly. " * 400, "cache_control": {"type": "ephemeral"}}
    ask = body(SONNET, "Write about the meter.", 2_000, system=[guide], stream=True, simulate={"output_tokens": 600, "tokens_per_s": 2_000})
    for what in ("writes its style guide to the cache", "reads it from there at a twentieth of the price"):
        began, first_s = time.monotonic(), None
        usage: dict[str, int] = {}
        async with stage.apps["pipeline"].open(MESSAGES, ask) as answer:
            async for name, data in answer.events():
                first_s = first_s or time.monotonic() - began
                usage |= data.get("usage", {}) if name == "message_delta" else data["message"]["usage"] if name == "message_start" else {}
        cached = usage["cache_creation_input_tokens"] + usage["cache_read_input_tokens"]
        say(
            f"pipeline streams an article and {what} ({cached:,} tokens): first event after {first_s or 0:.2f} s, "
            f"the last after {time.monotonic() - began:.2f} s."
        )


async def model_not_allowed(stage: Stage, say: Say) -> None:
    """Ask for a model that the app's policy denies."""
    refused = expect(await stage.apps["experiments"].ask(MESSAGES, body(FABLE, "Hello?", 100)), 403, "model")
    say(f"experiments asks for {FABLE}.")
    say(quoted(refused))


async def revoked_token(stage: Stage, say: Say) -> None:
    """Call with a token that worked a moment ago."""
    leaked = App("reviews", stage.url, issue(stage.folder, "reviews"))
    expect(await leaked.ask("/v1/models"), 200)
    with connect.reading(stage.ledger) as db:
        newest = admin.tokens(db, "reviews")[-1]
    with connect.changing(stage.ledger) as db:
        admin.revoke_tokens(db, "reviews", token_id=newest.id, who="demo", why="it leaked", now=time.time())
    refused = expect(await leaked.ask("/v1/models"), 401, "token_revoked")
    say("A second token of reviews leaks and is revoked. That holds from the next request on, for this token alone.")
    say(quoted(refused))
    expect(await stage.apps["reviews"].ask("/v1/models"), 200)


async def cap_reached(stage: Stage, say: Say) -> None:
    """Call in a loop that does not stop by itself."""
    reviews = stage.apps["reviews"]
    ask = body(HAIKU, "Once more, with feeling.", 1_024, simulate={"output_tokens": 900})
    answered = 0
    while (reply := await reviews.ask(MESSAGES, ask)).status == 200:
        answered += 1
    expect(reply, 429, "cap_spent")
    say(f"A bug makes reviews ask again and again. After {answered} more replies its cap of the day refuses, before the call is made:")
    say(quoted(reply))


async def ten_at_once(stage: Stage, say: Say) -> None:
    """Make ten calls in the same moment, where the cap has room for the worst case of three."""
    ask = body("claude-sonnet-5", "Try everything.", 4_000, simulate={"output_tokens": 4_000, "tokens_per_s": 8_000})
    came = await asyncio.gather(*(stage.apps["experiments"].ask(MESSAGES, ask) for _ in range(10)))
    codes = Counter(reply.refusal or "let through" for reply in came)
    if not codes["let through"] or codes["let through"] > 3 or codes.keys() - {"let through", "cap_spent", "cap_held"}:
        raise Surprise(f"of ten calls against a cap that fits three: {dict(codes)}")
    say("experiments sends ten calls in one moment. Its cap of the day has room for what three of them can cost at most.")
    through = codes.pop("let through")
    refused = ", ".join(f"{calls} {code}" for code, calls in codes.items())
    say(f"{through} were let through. {10 - through} waited for what those might give back, and were refused: {refused}.")
    say(quoted(next(reply for reply in came if reply.refusal)))


async def client_leaves(stage: Stage, say: Say) -> None:
    """Leave a stream, as a reader who closes the page: nobody will ever say what was generated."""
    simulate = {"output_tokens": 3_000, "tokens_per_s": 300, "after_disconnect_s": 0.5}
    ask = body(SONNET, "A long story, please.", 8_000, stream=True, simulate=simulate)
    shown = 0
    async with stage.apps["pipeline"].open(MESSAGES, ask) as answer:
        async for name, _ in answer.events():
            shown += name == "content_block_delta"
            if shown == 20:
                break
    say(f"pipeline hangs up in the middle of a stream, after {shown} pieces of text.")
    say(
        "The provider bills what it generated and tells nobody; so the ledger keeps the exact input plus all output that could have been "
        "generated, and flags it `estimated`."
    )


async def large_request(stage: Stage, say: Say) -> None:
    """Send calls like Claude Code's: 128,000 tokens asked for, few of them used. Held in steps, or nothing else would fit the cap."""
    pipeline = stage.apps["pipeline"]
    tool = {"description": "Reads, edits and runs things. " * 40, "input_schema": {"type": "object"}}
    tools = [{"name": f"tool_{number}", **tool} for number in range(24)]
    cached = {"type": "ephemeral"}
    system = [{"type": "text", "text": "You work in a terminal. " * 300, "cache_control": cached}]
    wishes = {"output_tokens": 700, "tokens_per_s": 900}
    ask = body(OPUS, "Say hello.", 128_000, system=system, tools=tools, stream=True, thinking={"type": "adaptive"}, simulate=wishes)
    labels = {"user-agent": "claude-cli/2.1.330 (external, sdk-cli)", "x-app": "cli", "x-claude-code-session-id": "7c1e0000-demo"}
    output_tokens = 0
    async with pipeline.open(f"{MESSAGES}?beta=true", ask, labels) as answer:
        async for name, data in answer.events():
            if name == "message_delta":
                output_tokens = data["usage"]["output_tokens"]
    size = len(json.dumps(ask))
    say(f"pipeline's editor asks {OPUS} as Claude Code does: {size:,} bytes, 24 tools, max_tokens 128,000, thinking.")
    day = await today(pipeline)
    with connect.reading(stage.ledger) as db:
        call = entry_history.forwarded(db)[-1]
    say(
        f"It could cost {cents(call.quote_nano)}, which does not fit the cap of {day['cap']} a day. Held in steps, it never held more than "
        f"{cents(call.held_max_nano)}, and used {output_tokens} tokens."
    )


SCENES: tuple[tuple[str, Scene], ...] = (
    ("Three replies to reviews", replies),
    ("Two articles, streamed", articles),
    ("A model that is not allowed", model_not_allowed),
    ("A token that leaked", revoked_token),
    ("A loop that nobody stopped", cap_reached),
    ("Ten calls at once, room for three", ten_at_once),
    ("A reader who leaves", client_leaves),
    ("A request the size of Claude Code's", large_request),
)


def expect(reply: Reply, status: int, refusal: str | None = None) -> Reply:
    """Return the reply, if it is as the story needs it."""
    if (reply.status, reply.refusal) != (status, refusal):
        wanted = f"{status} {refusal or ''}".rstrip()
        raise Surprise(f"expected {wanted}, got {reply.status} {reply.refusal or ''}: {reply.body.decode(errors='replace')[:300]}")
    return reply


def quoted(refused: Reply) -> str:
    return f"{refused.status} {refused.json['error']['type']}: {refused.sentence}"


async def today(app: App) -> dict[str, Any]:
    """Ask the gateway how an app stands in its cap of the day."""
    windows = expect(await app.ask("/gateway/me"), 200).json["windows"]
    return next(window for window in windows if window["window"] == "day")
