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
from .messages import Answer, Block, Step
from .prices import MODELS
from .prompt import BYTES_PER_TOKEN, SEARCH_INPUT_TOKENS, Cache, hour_ttl, tokens

LOOP_MAX = 10
"""How often the API uses tools of its own in one request before it pauses the turn."""
CODE_SINCE = "20260209"
"""From this version on searches and fetches run code between two of them, which `max_uses` does not count."""

SUMMARY_SHARE = 8
"""Summarised thinking shows one byte where the whole would show eight."""


def answer(message_id: str, model: str, body: dict[str, Any], size: int, behaviour: Behaviour, cache: Cache) -> Answer:
    """Return the answer that `model` (an id of prices.MODELS) generates for a request whose body was `size` bytes."""
    prompt_tokens = tokens(body, size, hostile=behaviour.hostile)
    output_tokens = _output_tokens(body, size, behaviour)
    late_write = "cache_write_1h_tokens" if hour_ttl(body) else "cache_write_5m_tokens"
    reread = late_write if behaviour.hostile else "input_tokens"
    blocks = tuple(_turns(message_id, model, body, prompt_tokens, output_tokens, behaviour))
    again = [block.again for block in blocks if block.again is not None]
    start = replace(
        cache.usage(model, body, prompt_tokens, behaviour),
        service_tier=behaviour.service_tier,
        inference_geo=_geo(model, body, behaviour),
        speed="fast" if body.get("speed") == "fast" and MODELS[model].fast else "standard",
    )
    late_input = behaviour.late_input_tokens + SEARCH_INPUT_TOKENS * behaviour.web_searches
    late = {"input_tokens": late_input, late_write: behaviour.late_cache_write_tokens}
    late[reread] = late.get(reread, 0) + sum(step.reads for step in again)
    final = replace(
        start,
        output_tokens=sum(block.tokens for block in blocks),
        thinking_tokens=sum(block.tokens for block in blocks if block.opening["type"] == "thinking"),
        web_searches=behaviour.web_searches + sum(step.searches for step in again),
        **{kind: getattr(start, kind) + count for kind, count in late.items()},
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
        reread=reread,
    )


def _output_tokens(body: dict[str, Any], size: int, behaviour: Behaviour) -> int:
    """Return how much one turn writes: never more than the request's `max_tokens`."""
    limit = int(body["max_tokens"])
    wanted = limit if behaviour.hostile else 20 + size % 80
    return min(limit, wanted if behaviour.output_tokens is None else behaviour.output_tokens)


def _turns(
    message_id: str, model: str, body: dict[str, Any], prompt_tokens: int, output_tokens: int, behaviour: Behaviour
) -> Iterator[Block]:
    """Yield every turn's blocks. All turns but the last end with the use of a tool, and the next one reads all that was there so far."""
    names = _server_tools(body, behaviour)
    for turn in range(len(names) + 1):
        last = turn == len(names)
        made = list(_blocks(f"{message_id}{turn or ''}", body, output_tokens, behaviour, last=last))
        if turn:
            made = made or [messages.text(0, 1)]
            reads = min(MODELS[model].context_tokens, prompt_tokens + turn * (output_tokens + behaviour.result_tokens))
            again = Step(0, None, reads, searches=int(names[turn - 1] == "web_search"))
            made[0] = replace(made[0], again=again)
        yield from made
        if not last:
            yield from messages.server_tool(f"srvtoolu_{message_id[4:]}{turn}", names[turn])


def _server_tools(body: dict[str, Any], behaviour: Behaviour) -> list[str]:
    """Return the tools that are used between two turns, in order: each as often as it allows, and code wherever a tool may run it."""
    names: list[str] = []
    code = False
    for tool in body.get("tools") or []:
        kind, _, version = str(tool.get("type")).rpartition("_")
        if kind in ("web_search", "web_fetch"):
            names += [kind] * min(LOOP_MAX, int(tool.get("max_uses", LOOP_MAX)))
            code = code or (version >= CODE_SINCE and tool.get("allowed_callers") != ["direct"])
        code = code or kind == "code_execution"
    names = (names + ["code_execution"] * LOOP_MAX if code else names)[:LOOP_MAX]
    if behaviour.turns is None:
        return names if behaviour.hostile else []
    return (names or ["web_search"] * LOOP_MAX)[: behaviour.turns - 1]


def _blocks(message_id: str, body: dict[str, Any], output_tokens: int, behaviour: Behaviour, *, last: bool) -> Iterator[Block]:
    """Yield the blocks: thinking, searches, text, the tool call. Their tokens add up to `output_tokens`."""
    bytes_per_token = 1 if behaviour.hostile else BYTES_PER_TOKEN
    left = output_tokens
    shown = behaviour.thinking or _display(body)
    if shown != "off" and left:
        thought = min(left, output_tokens // 2 if behaviour.thinking_tokens is None else behaviour.thinking_tokens)
        characters = {"hidden": 0, "summarised": thought * bytes_per_token // SUMMARY_SHARE, "full": thought * bytes_per_token}[shown]
        yield messages.thinking(thought, characters)
        left -= thought
    for search in range(behaviour.web_searches if last else 0):
        yield from messages.server_tool(f"srvtoolu_{message_id[4:]}{search}")
    name = _tool(body, behaviour) if last else None
    if name is None and left:
        yield messages.text(left, bytes_per_token)
    elif name is not None:
        spoken = left // 2
        if spoken:
            yield messages.text(spoken, bytes_per_token)
        for call in range(behaviour.tool_calls):
            tokens = (left - spoken) // behaviour.tool_calls + ((left - spoken) % behaviour.tool_calls if call == 0 else 0)
            tool_id = f"toolu_{message_id[4:]}{call or ''}"
            yield messages.tool_use(tool_id, name, tokens, bytes_per_token, behaviour.tool_input)


def _display(body: dict[str, Any]) -> str:
    asked = body.get("thinking") or {}
    if asked.get("type") not in ("enabled", "adaptive"):
        return "off"
    return "hidden" if asked.get("display") == "omitted" else "summarised"


def _tool(body: dict[str, Any], behaviour: Behaviour) -> str | None:
    """Return the tool to call, if any: the one that `tool_choice` names, else the first that the client would run."""
    choice = body.get("tool_choice") or {}
    own = [tool["name"] for tool in body.get("tools") or [] if "input_schema" in tool]
    if choice.get("type") == "tool":
        return str(choice["name"])
    if behaviour.tool_name in own:
        return behaviour.tool_name
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
