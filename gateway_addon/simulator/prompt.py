"""How many tokens a request is: a deterministic function of its bytes, and of what the cache has seen before.

Real token counts need the real tokenizer; a meter needs only numbers that behave like them. Four bytes are a token; tools
bring a hidden prompt; an image costs its own tokens, not those of its base64. The hostile count is the largest that 771
recorded requests justify: a token a byte, and 350 that nobody can see.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from .behaviour import Behaviour
from .book import Usage

BYTES_PER_TOKEN = 4
HOSTILE_HIDDEN_TOKENS = 350
TOOLS_HIDDEN_TOKENS = 300
IMAGE_TOKENS = 1_568
SEARCH_INPUT_TOKENS = 2_000


def tokens(body: dict[str, Any], size: int, *, hostile: bool) -> int:
    """Count the prompt's tokens. `size` is that of the body as sent, in bytes."""
    encoded = list(_base64(body))
    text_bytes = size - sum(len(data) for _, data in encoded)
    images = sum(IMAGE_TOKENS for kind, _ in encoded if kind.startswith("image/"))
    if hostile:
        return text_bytes + HOSTILE_HIDDEN_TOKENS + images
    return -(-text_bytes // BYTES_PER_TOKEN) + images + (TOOLS_HIDDEN_TOKENS if body.get("tools") else 0)


class Cache:
    """The prefixes that this server has seen. The real one forgets after five minutes or an hour; no simulation runs so long."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def usage(self, model: str, body: dict[str, Any], prompt_tokens: int, behaviour: Behaviour) -> Usage:
        """Split the prompt into what is read from the cache, what is written to it and the rest."""
        counts = {"cache_read_tokens": 0, "cache_write_5m_tokens": 0, "cache_write_1h_tokens": 0}
        segments = list(_segments(model, body))
        if behaviour.hostile and segments:
            counts["cache_write_1h_tokens" if hour_ttl(body) else "cache_write_5m_tokens"] = prompt_tokens
        else:
            for ttl, digest, share in segments:
                kind = "cache_read_tokens" if digest in self._digests else f"cache_write_{ttl}_tokens"
                counts[kind] += int(prompt_tokens * share)
                self._digests.add(digest)
        counts["input_tokens"] = prompt_tokens - sum(counts.values())
        asked = {kind: getattr(behaviour, kind) for kind in counts}
        return Usage(**(counts | {kind: count for kind, count in asked.items() if count is not None}))


def hour_ttl(body: dict[str, Any]) -> bool:
    """Tell whether anything is to be cached for an hour: then late writes are, too."""
    return any(_ttl(mark) == "1h" for mark in (body.get("cache_control"), *(block.get("cache_control") for block in _blocks(body))))


def _segments(model: str, body: dict[str, Any]) -> Iterator[tuple[str, bytes, float]]:
    """Yield the parts between two `cache_control` marks: ttl, digest of everything up to here, share of the prompt.

    The order is the API's own: tools, system, messages. A mark on the request itself stands for one on the last block.
    """
    blocks = list(_blocks(body))
    if blocks and (mark := body.get("cache_control")):
        blocks[-1] = {**blocks[-1], "cache_control": mark}
    if not any(block.get("cache_control") for block in blocks):
        return
    written = [json.dumps({key: value for key, value in block.items() if key != "cache_control"}) for block in blocks]
    whole = sum(map(len, written))
    digest, length = hashlib.sha256(model.encode()), 0
    for block, text in zip(blocks, written, strict=True):
        digest.update(text.encode())
        length += len(text)
        if mark := block.get("cache_control"):
            yield _ttl(mark), digest.digest(), length / whole
            length = 0


def _ttl(mark: object) -> str:
    return "1h" if isinstance(mark, dict) and mark.get("ttl") == "1h" else "5m"


def _blocks(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from body.get("tools") or []
    yield from _as_blocks(body.get("system") or [])
    for message in body.get("messages") or []:
        yield from _as_blocks(message["content"])


def _as_blocks(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _base64(value: Any) -> Iterator[tuple[str, str]]:
    """Yield every base64 source under `value`: its media type and its data."""
    if isinstance(value, dict):
        if value.get("type") == "base64" and isinstance(value.get("data"), str):
            yield str(value.get("media_type")), value["data"]
        else:
            for inner in value.values():
                yield from _base64(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _base64(inner)
