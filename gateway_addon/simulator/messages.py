"""An answer of the Messages API, as a value: what is generated, and how it looks as JSON and as server-sent events.

Pure: no clock, no socket. The order of a stream, which is what a meter must understand:

    message_start                       the prompt's usage, with the 5m/1h split, the tier, the geo and the speed: only here
    (content_block_start, content_block_delta*, content_block_stop)*
    message_delta                       the stop reason; usage as a running total, which replaces and is never added
    message_stop

`ping` and `error` may stand anywhere. A message that comes whole is a message_start with its content and stop reason, and message_stop.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .book import Iteration, Usage

PROSE = "It is the meter that runs while the words are made, and not while they are read. "
SIGNATURE = "c2ltdWxhdGVk" * 4


def event(name: str, **data: Any) -> bytes:
    """Return one server-sent event, framed as the API frames it."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


PING = event("ping")


class Step(NamedTuple):
    """A stretch of generation: so many tokens, and then, where anything is to be seen of them, an event."""

    tokens: int
    event: bytes | None
    reads: int = 0
    """The tokens of the prompt that is read again before it, where a further turn of the provider's own loop begins here."""
    searches: int = 0
    """How many web searches were made for that turn."""


class Made(NamedTuple):
    """How much of an answer exists: output, prompts read again, searches made."""

    tokens: int = 0
    reads: int = 0
    searches: int = 0

    def and_then(self, step: Step) -> "Made":
        return Made(self.tokens + step.tokens, self.reads + step.reads, self.searches + step.searches)


@dataclass(frozen=True, slots=True)
class Block:
    """One content block. `spelled` is what its deltas add up to in the field `key`; empty where the tokens stay hidden."""

    tokens: int
    opening: dict[str, Any]
    whole: dict[str, Any]
    delta: str = "text_delta"
    key: str = "text"
    spelled: str = ""
    again: Step | None = None
    """The further turn that begins with this block."""

    def steps(self, index: int, tokens_per_event: int) -> Iterator[Step]:
        if self.again is not None:
            yield self.again
        yield Step(0, event("content_block_start", index=index, content_block=self.opening))
        if index == 0:
            yield Step(0, PING)
        if not self.spelled:
            yield Step(self.tokens, None)
        pieces = max(1, -(-self.tokens // tokens_per_event)) if self.spelled else 0
        for piece in range(pieces):
            start, end = (len(self.spelled) * at // pieces for at in (piece, piece + 1))
            born = self.tokens * (piece + 1) // pieces - self.tokens * piece // pieces
            yield Step(born, event("content_block_delta", index=index, delta={"type": self.delta, self.key: self.spelled[start:end]}))
        if "signature" in self.whole:
            yield Step(0, event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": SIGNATURE}))
        yield Step(0, event("content_block_stop", index=index))


@dataclass(frozen=True, slots=True)
class Answer:
    message_id: str
    model: str
    blocks: tuple[Block, ...]
    stop_reason: str
    start: Usage
    """The usage that is known when the first event goes out."""
    final: Usage
    iterations: tuple[Iteration, ...] = ()
    tokens_per_event: int = 8
    reread: str = "input_tokens"
    """The kind of tokens that a prompt is billed as when it is read again."""

    def used(self, made: Made) -> Usage:
        """Return the usage that is billed when so much of the answer was made, and nothing more."""
        unmade = sum(step.reads for step in self.steps()) - made.reads
        return replace(
            self.final,
            output_tokens=made.tokens,
            thinking_tokens=min(made.tokens, self.final.thinking_tokens),
            web_searches=self.final.web_searches - sum(step.searches for step in self.steps()) + made.searches,
            **{self.reread: getattr(self.final, self.reread) - unmade},
        )

    def json(self) -> dict[str, Any]:
        content = [block.whole for block in self.blocks]
        return self._message(content, self.stop_reason, _opening_usage(self.start) | self._closing_usage())

    def opening(self, told: str | None = None) -> bytes:
        """Return message_start. Its `output_tokens` is a placeholder, neither a floor nor a count.

        `told`: what it says of the prompt, as `Behaviour.opening_usage`.
        """
        usage = _opening_usage(self.start if told is None else Usage()) | {"output_tokens": 1}
        return event("message_start", message=self._message([], None, None if told == "absent" else usage))

    def whole(self) -> Iterator[bytes]:
        """Yield the stream of a message that comes in one piece."""
        yield event("message_start", message=self.json())
        yield event("message_stop")

    def steps(self) -> Iterator[Step]:
        """Yield all that lies between the opening and the closing, anew at each call."""
        for index, block in enumerate(self.blocks):
            yield from block.steps(index, self.tokens_per_event)

    def closing(self, *, zeroes: bool = False) -> Iterator[bytes]:
        """Yield the end of a stream. `zeroes`: it tells nothing of the prompt any more."""
        usage = self._closing_usage() | (_prompt_usage(Usage()) if zeroes else {})
        yield event("message_delta", delta={"stop_reason": self.stop_reason, "stop_sequence": None}, usage=usage)
        yield event("message_stop")

    def _message(self, content: list[dict[str, Any]], stop_reason: str | None, usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": usage,
        }

    def _closing_usage(self) -> dict[str, Any]:
        usage = _prompt_usage(self.final) | {"output_tokens": self.final.output_tokens}
        if self.final.thinking_tokens:
            usage["output_tokens_details"] = {"thinking_tokens": self.final.thinking_tokens}
        if self.final.web_searches:
            usage["server_tool_use"] = {"web_search_requests": self.final.web_searches, "web_fetch_requests": 0}
        if self.iterations:
            parts = [Iteration("message", self.model, self.final), *self.iterations]
            usage["iterations"] = [_iteration_usage(part) for part in parts]
        return usage


def _prompt_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "cache_creation_input_tokens": usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
        "cache_read_input_tokens": usage.cache_read_tokens,
    }


def _split(usage: Usage) -> dict[str, Any]:
    return {"ephemeral_5m_input_tokens": usage.cache_write_5m_tokens, "ephemeral_1h_input_tokens": usage.cache_write_1h_tokens}


def _opening_usage(usage: Usage) -> dict[str, Any]:
    """Return the usage with the fields that a stream shows once. A JSON answer has them too, its split perhaps behind the total."""
    once = {"cache_creation": _split(usage), "service_tier": usage.service_tier, "inference_geo": usage.inference_geo}
    speed = {"speed": usage.speed} if usage.speed != "standard" else {}
    return _prompt_usage(usage) | once | speed


def _iteration_usage(part: Iteration) -> dict[str, Any]:
    counts = _prompt_usage(part.usage) | {"cache_creation": _split(part.usage), "output_tokens": part.usage.output_tokens}
    model = {} if part.kind == "compaction" else {"model": part.model}
    return {"type": part.kind} | model | counts


def prose(length: int) -> str:
    """Return so many characters, each one byte both in UTF-8 and in JSON: a token a byte is then a token a character."""
    return (PROSE * (length // len(PROSE) + 1))[:length]


def text(tokens: int, bytes_per_token: int) -> Block:
    spelled = prose(tokens * bytes_per_token)
    return Block(tokens, {"type": "text", "text": ""}, {"type": "text", "text": spelled}, spelled=spelled)


def thinking(tokens: int, characters: int) -> Block:
    """Return a block of thinking that shows so many characters. None at all is `display: omitted`: only the signature comes."""
    shown = {"type": "thinking", "thinking": "", "signature": ""}
    spelled = prose(characters)
    return Block(tokens, shown, shown | {"thinking": spelled, "signature": SIGNATURE}, "thinking_delta", "thinking", spelled)


def tool_use(tool_id: str, name: str, tokens: int, bytes_per_token: int, given: dict[str, Any] | None = None) -> Block:
    """Return a call of the client's tool. Its input is JSON that arrives in pieces."""
    opening: dict[str, Any] = {"type": "tool_use", "id": tool_id, "name": name, "input": {}}
    if given is None:
        given = {"note": prose(max(0, tokens * bytes_per_token - len(json.dumps({"note": ""}))))}
    return Block(tokens, opening, opening | {"input": given}, "input_json_delta", "partial_json", json.dumps(given))


def server_tool(tool_id: str, name: str = "web_search") -> tuple[Block, Block]:
    """Return a use of a tool on the server's side, and its result. Its cost is in the usage: late input, and one more request."""
    use: dict[str, Any] = {"type": "server_tool_use", "id": tool_id, "name": name, "input": {}}
    found: dict[str, Any] = {"type": f"{name}_tool_result", "tool_use_id": tool_id, "content": []}
    query = {"query": "what does it cost"}
    return Block(0, use, use | {"input": query}, "input_json_delta", "partial_json", json.dumps(query)), Block(0, found, found)
