"""The model behind the simulated API: a checked request and a behaviour become an answer.

Pure but for the prompt cache that it is handed. Decides how many tokens there are and of which kind; messages.py knows
how they look.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from . import messages
from .behaviour import Behaviour
from .book import Iteration, Usage
from .messages import Answer, Block
from .prices import MODELS
from .prompt import BYTES_PER_TOKEN, SEARCH_INPUT_TOKENS, Cache, hour_ttl, tokens

SUMMARY_SHARE = 8
"""Summarised thinking shows one byte where the whole would show eight."""


def answer(message_id: str, model: str, body: dict[str, Any], size: int, behaviour: Behaviour, cache: Cache) -> Answer:
    """What `model` (an id of prices.MODELS) generates for a request whose body was `size` bytes."""
    prompt_tokens = tokens(body, size, hostile=behaviour.hostile)
    output_tokens = _output_tokens(body, size, behaviour)
    blocks = tuple(_blocks(message_id, body, output_tokens, behaviour))
    start = replace(
        cache.usage(model, body, prompt_tokens, behaviour),
        service_tier=behaviour.service_tier,
        inference_geo=_geo(model, body, behaviour),
        speed="fast" if body.get("speed") == "fast" and MODELS[model].fast else "standard",
    )
    late_write = "cache_write_1h_tokens" if hour_ttl(body) else "cache_write_5m_tokens"
    final = replace(
        start,
        input_tokens=start.input_tokens + behaviour.late_input_tokens + SEARCH_INPUT_TOKENS * behaviour.web_searches,
        output_tokens=output_tokens,
        thinking_tokens=sum(block.tokens for block in blocks if block.opening["type"] == "thinking"),
        web_searches=behaviour.web_searches,
        **{late_write: getattr(start, late_write) + behaviour.late_cache_write_tokens},
    )
    return Answer(
        message_id=message_id,
        model=model,
        blocks=blocks,
        stop_reason=behaviour.stop_reason or _stop_reason(body, blocks, output_tokens),
        start=start,
        final=final,
        iterations=tuple(_iteration(model, part, final) for part in behaviour.iterations),
        tokens_per_event=behaviour.tokens_per_event,
    )


def _output_tokens(body: dict[str, Any], size: int, behaviour: Behaviour) -> int:
    """Never more than the request's `max_tokens`: on 1,099 recorded answers none was."""
    limit = int(body["max_tokens"])
    wanted = limit if behaviour.hostile else 20 + size % 80
    return min(limit, wanted if behaviour.output_tokens is None else behaviour.output_tokens)


def _blocks(message_id: str, body: dict[str, Any], output_tokens: int, behaviour: Behaviour) -> Iterator[Block]:
    """Thinking first, then the searches, the text, the tool call. Their tokens add up to `output_tokens`."""
    bytes_per_token = 1 if behaviour.hostile else BYTES_PER_TOKEN
    left = output_tokens
    shown = behaviour.thinking or _display(body)
    if shown != "off" and left:
        thought = min(left, output_tokens // 2 if behaviour.thinking_tokens is None else behaviour.thinking_tokens)
        characters = {"hidden": 0, "summarised": thought * bytes_per_token // SUMMARY_SHARE, "full": thought * bytes_per_token}[shown]
        yield messages.thinking(thought, characters)
        left -= thought
    for search in range(behaviour.web_searches):
        yield from messages.web_search(f"srvtoolu_{message_id[4:]}{search}")
    name = _tool(body, behaviour)
    if name is None and left:
        yield messages.text(left, bytes_per_token)
    elif name is not None:
        spoken = left // 2
        if spoken:
            yield messages.text(spoken, bytes_per_token)
        yield messages.tool_use(f"toolu_{message_id[4:]}", name, left - spoken, bytes_per_token)


def _display(body: dict[str, Any]) -> str:
    asked = body.get("thinking") or {}
    if asked.get("type") not in ("enabled", "adaptive"):
        return "off"
    return "hidden" if asked.get("display") == "omitted" else "summarised"


def _tool(body: dict[str, Any], behaviour: Behaviour) -> str | None:
    """The tool to call, if any: the one that `tool_choice` names, else the first that the client would run."""
    choice = body.get("tool_choice") or {}
    own = [tool["name"] for tool in body.get("tools") or [] if "input_schema" in tool]
    if choice.get("type") == "tool":
        return str(choice["name"])
    return own[0] if own and (behaviour.tool_use or choice.get("type") == "any") else None


def _geo(model: str, body: dict[str, Any], behaviour: Behaviour) -> str:
    return str(body.get("inference_geo") or behaviour.inference_geo or "global") if MODELS[model].regional else "not_available"


def _stop_reason(body: dict[str, Any], blocks: tuple[Block, ...], output_tokens: int) -> str:
    if output_tokens >= body["max_tokens"]:
        return "max_tokens"
    return "tool_use" if any(block.opening["type"] == "tool_use" for block in blocks) else "end_turn"


def _iteration(model: str, part: dict[str, Any], like: Usage) -> Iteration:
    counts = {key: value for key, value in part.items() if key not in ("type", "model")}
    return Iteration(part["type"], part.get("model", model), Usage(**counts, inference_geo=like.inference_geo, speed=like.speed))
