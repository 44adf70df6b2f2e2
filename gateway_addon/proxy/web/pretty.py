"""Show bodies of the Messages API as a person reads them: a request's parts by name, a stream merged into its message.

Promises text for any bytes at all, of bounded length and in bounded time: it never raises on content, and says what it left out.
Pure: it knows no mitmproxy, no prices and no policy.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from gateway_addon.messages import Meter, TokenCounts, Usage
from gateway_addon.messages.sse import Framer, events

BODY_BYTES_MAX = 8 * 2**20  # a larger one is not parsed: that would delay every call of this process
TEXT_MAX = 20_000  # characters of one text; of a longer one its beginning, and how much is missing
LINES_MAX = 4_000
WIDTH = 88  # what half of a window shows
BLOCKS_MAX = 500
DEPTH_MAX = 4  # of blocks within blocks; beyond it they are shown as JSON

_TOO_LARGE = "This body has {0:,} bytes; only up to {1:,} are taken apart. The view `raw` shows them as they are."
_UNKNOWN = "This is not a body of the Messages API. The view `raw` shows it as it is."
_FIRST = ("model", "max_tokens", "stream")
_LAST = ("system", "tools", "messages")

type Priced = Callable[[Usage], str]
"""Returns the cost of an answer, in a few words."""


def request(body: bytes) -> str:
    """Show a request: its settings first, then system, tools and messages."""
    found = _object(body)
    if isinstance(found, str):
        return found
    lines = _Lines()
    names = [*(name for name in _FIRST if name in found), *(name for name in found if name not in _FIRST + _LAST)]
    width = max((len(name) for name in names), default=0) + 2
    for name in names:
        lines.add(f"{_word(name):<{width}}{_value(found[name])}")
    if "system" in found:
        lines.head("system")
        _content(lines, found["system"])
    for name, each in (("tools", _tool), ("messages", _turn)):
        items = found.get(name)
        if isinstance(items, list):
            lines.head(f"{name} ({len(items)})")
            for number, item in enumerate(items[:BLOCKS_MAX], 1):
                each(lines, number, item)
            lines.left_out(len(items) - BLOCKS_MAX, name)
    return lines.text()


def answer(body: bytes, content_type: str, priced: Priced) -> str:
    """Show an answer, JSON or stream: its cost and usage first, then the message that it adds up to."""
    if len(body) > BODY_BYTES_MAX:
        return _TOO_LARGE.format(len(body), BODY_BYTES_MAX)
    meter = Meter(content_type)
    meter.feed(body)
    usage = meter.close()
    message = _merged(body) if content_type.startswith("text/event-stream") and not body.lstrip().startswith(b"{") else _whole(body)
    if not (usage.started or usage.error_type):
        return _UNKNOWN
    lines = _Lines()
    if usage.started:
        for name, value in _facts(usage, priced(usage)):
            lines.add(f"{name:<13}{value}")
    for block in message.blocks:
        _block(lines, block)
    lines.left_out(message.blocks_left_out, "blocks")
    if message.error is not None:
        lines.head("error")
        lines.indented(message.error)
    return lines.text()


def model(body: bytes) -> str:
    """Return the model that a request names; "" where it names none."""
    found = _object(body)
    named = found.get("model") if isinstance(found, dict) else None
    return _word(named) if isinstance(named, str) else ""


def _facts(usage: Usage, price: str) -> Iterator[tuple[str, str]]:
    yield "model", usage.model or "not said"
    yield "stop_reason", usage.stop_reason or "none: the answer is not whole"
    yield "cost", price
    yield "usage", tokens(usage.tokens)
    for part in usage.iterations:
        yield part.kind, f"{tokens(part.tokens)}  {part.model or ''}".rstrip()
    for name in ("web_search_requests", "web_fetch_requests", "code_execution_requests"):
        if count := getattr(usage, name):
            yield name.removesuffix("_requests"), f"{count:,} requests"
    extras = (("tier", usage.service_tier), ("speed", usage.speed), ("geo", usage.inference_geo), ("id", usage.message_id))
    yield from ((name, value) for name, value in extras if value)
    yield from (("note", note) for note in usage.notes)


def tokens(counts: TokenCounts) -> str:
    """Return token counts in words, without those that are zero."""
    named = (
        (counts.input_tokens, "input"),
        (counts.cache_read_tokens, "cache read"),
        (counts.cache_write_5m_tokens, "cache write 5m"),
        (counts.cache_write_1h_tokens, "cache write 1h"),
        (counts.cache_write_unsplit_tokens, "cache write"),
        (counts.output_tokens, "output"),
    )
    return ", ".join(f"{count:,} {name}" for count, name in named if count) or "nothing"


# -- a stream's events, merged


@dataclass(slots=True)
class _Text:
    """A text that grows by pieces, kept up to a bound."""

    pieces: list[str] = field(default_factory=list)
    length: int = 0

    def add(self, piece: object) -> None:
        if isinstance(piece, str):
            if self.length < TEXT_MAX:
                self.pieces.append(piece[: TEXT_MAX - self.length])
            self.length += len(piece)

    def __str__(self) -> str:
        return _cut("".join(self.pieces), self.length)


@dataclass(slots=True)
class _Message:
    blocks: list[Mapping[str, Any]] = field(default_factory=list)
    blocks_left_out: int = 0
    error: str | None = None


def _whole(body: bytes) -> _Message:
    found = _object(body)
    if isinstance(found, str):
        return _Message()
    content = found.get("content")
    blocks: list[Mapping[str, Any]] = [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []
    return _Message(blocks[:BLOCKS_MAX], max(0, len(blocks) - BLOCKS_MAX), _error(found))


_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json", "compaction_delta": "content"}


def _merged(body: bytes) -> _Message:
    """Return the blocks that a stream's deltas add up to. (The meter counts.)"""
    framer, message = Framer(), _Message()
    open_blocks: dict[object, tuple[dict[str, Any], _Text]] = {}
    for _, data in events(framer.feed(body) + framer.close()):
        event = _parsed(data)
        kind = event.get("type")
        index = event.get("index") if isinstance(event.get("index"), int) else None
        if kind == "content_block_start":
            block = event.get("content_block")
            if len(message.blocks) >= BLOCKS_MAX:
                message.blocks_left_out += 1
                open_blocks.pop(index, None)
            elif isinstance(block, dict):
                message.blocks.append(block)
                open_blocks[index] = block, _Text()
        elif kind == "content_block_delta" and index in open_blocks:
            block, text = open_blocks[index]
            delta = event.get("delta")
            field_ = _DELTAS.get(str(delta.get("type"))) if isinstance(delta, dict) else None
            if field_ is not None and isinstance(delta, dict):
                text.add(delta.get(field_))
                block["input" if field_ == "partial_json" else field_] = text
        elif kind == "error":
            message.error = _error(event)
    return message


# -- blocks


def _turn(lines: "_Lines", number: int, turn: object) -> None:
    role = turn.get("role") if isinstance(turn, dict) else None
    lines.head(f"[{number}] {_word(role) if isinstance(role, str) else 'no role'}")
    _content(lines, turn.get("content") if isinstance(turn, dict) else turn)


def _tool(lines: "_Lines", number: int, tool: object) -> None:
    if not isinstance(tool, dict):
        return lines.add(f"  {_value(tool)}")
    schema = tool.get("input_schema")
    fields = schema.get("properties") if isinstance(schema, dict) else None
    required = schema.get("required") if isinstance(schema, dict) else None
    needed = required if isinstance(required, list) else []
    named = [f"{_word(name)}{'' if name in needed else '?'}" for name in fields] if isinstance(fields, dict) else []
    rest = {name: value for name, value in tool.items() if name not in ("name", "description", "input_schema")}
    lines.add(f"  {_word(tool.get('name'))}({', '.join(named[:50])})" + (f"  {_value(rest)}" if rest else ""))
    if isinstance(tool.get("description"), str):
        lines.add(f"      {_word(tool['description'], 160)}")
    return None


def _content(lines: "_Lines", content: object, depth: int = 1) -> None:
    """Show the content of a turn, a system prompt or a tool's result: a text, or blocks."""
    if isinstance(content, list) and depth <= DEPTH_MAX:
        for block in content[:BLOCKS_MAX]:
            _block(lines, block, depth)
        lines.left_out(len(content) - BLOCKS_MAX, "blocks")
    else:
        lines.indented(content if isinstance(content, str) else _value(content), depth)


_TEXTS = {"text": "text", "thinking": "thinking", "compaction": "content"}
_IN_THE_HEAD = ("type", "cache_control", "id", "name", "tool_use_id", "is_error")


def _block(lines: "_Lines", block: object, depth: int = 0) -> None:
    """Show one block: its type in the head, its content below."""
    if not isinstance(block, Mapping):
        return lines.indented(_value(block), depth)
    kind = block.get("type")
    cached = f"  cache_control {_value(block['cache_control'])}" if "cache_control" in block else ""
    if isinstance(kind, str) and kind in _TEXTS:
        lines.head(f"{kind}{cached}", depth)
        return lines.indented(str(block.get(_TEXTS[kind], "")), depth + 1)
    names = " ".join(_word(block[name]) for name in ("name", "id", "tool_use_id") if isinstance(block.get(name), str))
    lines.head(f"{_word(kind)}  {names}{'  is_error' if block.get('is_error') else ''}{cached}".rstrip(), depth)
    if "content" in block:
        return _content(lines, block["content"], depth + 1)
    said = block.get("input", {name: _shortened(value) for name, value in block.items() if name not in _IN_THE_HEAD})
    return lines.indented(_tool_input(said) if isinstance(said, _Text) else _value(said, indent=2), depth + 1)


def _shortened(value: object) -> object:
    """Return an image's source without its thousands of characters of base64."""
    if isinstance(value, dict) and isinstance(data := value.get("data"), str):
        return value | {"data": f"({len(data):,} characters)"}
    return value


def _tool_input(text: _Text) -> str:
    found = _parsed(str(text).encode())
    return _value(found, indent=2) if found else str(text)


# -- words


class _Lines:
    """Lines up to a bound; those beyond it are counted."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._more = 0

    def add(self, line: str) -> None:
        if len(self._lines) < LINES_MAX:
            self._lines.append(line)
        else:
            self._more += 1

    def head(self, title: str, depth: int = 0) -> None:
        if depth == 0:
            self.add("")
        self.add(f"{'  ' * depth}{title}")

    def indented(self, text: str, depth: int = 1) -> None:
        for line in _cut(text, len(text)).splitlines() or ["(empty)"]:
            long = len(line) > WIDTH and not self._more
            for part in wrap(line, WIDTH, replace_whitespace=False, drop_whitespace=False) if long else [line]:
                self.add(f"{'  ' * depth}{part}".rstrip())

    def left_out(self, count: int, what: str) -> None:
        if count > 0:
            self.add(f"    ... {count:,} more {what}")

    def text(self) -> str:
        more = [f"... {self._more:,} more lines; the view `raw` shows all"] if self._more else []
        return "\n".join([*self._lines, *more]).strip("\n") + "\n"


def _object(body: bytes) -> dict[str, Any] | str:
    """Return the JSON object that a body is, or a sentence why it is none."""
    if len(body) > BODY_BYTES_MAX:
        return _TOO_LARGE.format(len(body), BODY_BYTES_MAX)
    return _parsed(body) or _UNKNOWN


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _error(envelope: Mapping[str, Any]) -> str | None:
    error = envelope.get("error")
    if error is None:
        return None
    return f"{error.get('type')}: {error.get('message')}" if isinstance(error, dict) else _value(error)


def _value(value: object, indent: int | None = None) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    except (ValueError, RecursionError):
        return "(nested too deeply to be shown)"
    return _cut(text if indent else " ".join(text.split()), len(text))


def _word(value: object, length_max: int = 200) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= length_max else text[: length_max - 1] + "…"


def _cut(text: str, length: int) -> str:
    """Cut a text at its bound. `length`: the length of the whole text, where only its beginning was kept."""
    return text if length <= TEXT_MAX else f"{text[:TEXT_MAX]}\n... {length - TEXT_MAX:,} more characters"
