"""How the simulated API behaves: one value for a server, and a way for a request to ask for something else.

A request overrides its server's behaviour in `metadata.user_id` (a JSON object with the key `simulate`) or in the text of
its last user message (`simulate: {"output_tokens": 300, "delay_ms": 5}`; the rest of the text does not matter). Every
field below is a key. An unknown key is an error, so that a misspelt test does not pass by accident.
"""

import json
import types
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from .http import ENCODERS
from .prices import MODELS

MAGIC = "simulate:"
THINKING = (None, "off", "hidden", "summarised", "full")
OPENING_USAGE = (None, "absent", "zeroes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    # How much. None: what the request suggests.
    hostile: bool = False
    """The dearest answer that the declared bounds allow: a token a byte of request, 350 hidden ones, all of `max_tokens`, a token a byte of
    output, a cache that is written and never read."""
    output_tokens: int | None = None
    """Never more than the request's `max_tokens`, whatever is asked for."""
    input_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_5m_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    late_input_tokens: int = 0
    """Input that `message_start` did not know of: server tools raise it during the answer."""
    late_cache_write_tokens: int = 0
    """Cache writes that `message_start` did not know of: they raise the total; the 5m/1h split on the wire stays as it was."""
    web_searches: int = 0
    """Each one is 2,000 late input tokens more."""
    turns: int | None = None
    """How often the model runs, each time with the request's whole `max_tokens` to write, reading all that was written and found before.
    None: as often as the request's tools at the provider let a hostile one; else once."""
    result_tokens: int = 2_000
    """Tokens that one use of a tool brings into the prompts of all later turns."""
    iterations: tuple[dict[str, Any], ...] = ()
    """Parts billed beside the message: {"type": "compaction", "model"?: ..., "input_tokens": 60385, "output_tokens": 522}."""

    # What it looks like.
    thinking: str | None = None
    """off, hidden (no text, but billed), summarised (an eighth of the text), full. None: as the request's `thinking` says."""
    thinking_tokens: int | None = None
    """None: half of the output."""
    opening_usage: str | None = None
    """`absent` or `zeroes`: message_start tells nothing of the prompt, only message_delta does. None: both tell it."""
    closing_zeroes: bool = False
    """message_delta tells the prompt's counts as zeroes."""
    whole_start: bool = False
    """message_start is the whole message, and only message_stop follows: how programmatic tool calls come."""
    tool_use: bool = False
    """Call the request's first tool even where `tool_choice` does not force it."""
    tool_name: str | None = None
    """The tool to call, of those that the request has. None: the first."""
    tool_input: dict[str, Any] | None = None
    """The input of that tool. None: a note, as long as its tokens are."""
    tool_calls: int = 1
    """How often that tool is called in one answer."""
    served_model: str | None = None
    stop_reason: str | None = None
    service_tier: str = "standard"
    inference_geo: str | None = None
    """The workspace's default, for requests that name none."""
    encoding: str | None = None
    """The answer's coding: identity, gzip, deflate, br, zstd, even if the client did not offer it. None: gzip if it did."""
    ratelimit_remaining_percent: int = 100

    # When. Generation starts when the request has arrived and goes on by itself; delivery follows.
    tokens_per_s: float | None = None
    """None: everything is generated at once."""
    delay_ms: float = 0
    """A pause of the generation before each delta."""
    turn_s: float = 0
    """How long a further turn takes before its first token: the tool runs, the prompt is read."""
    tokens_per_event: int = 8
    ahead_s: float = 0
    """By how much generation runs ahead of delivery."""
    after_disconnect_s: float = 0
    """How long generation goes on when the client has gone."""
    overrun: bool = False
    """Breaks every declared rate and lag: a client that leaves early is billed the whole answer."""
    delay_headers_s: float = 0
    say_nothing_s: float = 0
    """Silence after `message_start`, without pings; what was generated in it then comes at once."""
    ping_s: float = 5

    # What goes wrong.
    status: int | None = None
    """Refuse with this HTTP status, before any work: with `error`, where that is told, else with the status's own."""
    retry_after_s: int | None = None
    error: str | None = None
    """An error type (`overloaded_error`) in the middle of a stream; a JSON call gets it as its status."""
    error_after_events: int | None = None
    """None: in the middle of the output. 0: first, so that nothing is billed, unless turns of the API's own went before it."""
    ping_first: bool = False
    """A ping before message_start."""
    edge: int | None = None
    """Answer with this status and a page, as an edge in front of the API does, after `delay_headers_s`. Where it is one that an edge says
    when it has lost the API, and comes later than 2 s, a third of such calls are billed what was generated by then."""
    cut_after_events: int | None = None
    """Close the connection after so many SSE events, pings included."""
    cut_after_bytes: int | None = None
    """Close the connection after so many bytes of the answer's body."""
    hang_up: bool = False
    """Close the connection before any status: for a JSON call when the answer is ready, for a stream when it would begin."""

    # Batches. (A request in one is asked for its behaviour like any other; what it says of time does not matter there.)
    batch_s: float = 0
    """How long a batch takes."""
    batch_result: str = "succeeded"
    """The result of a request in a batch: succeeded, errored, canceled, expired."""

    def __post_init__(self) -> None:
        """Check the words. Raises ValueError for one that means nothing here."""
        if self.thinking not in THINKING:
            raise ValueError(f"thinking: {self.thinking!r} is none of {THINKING}")
        if self.opening_usage not in OPENING_USAGE:
            raise ValueError(f"opening_usage: {self.opening_usage!r} is none of {OPENING_USAGE}")
        if self.encoding is not None and self.encoding not in ENCODERS:
            raise ValueError(f"encoding: {self.encoding!r} is none of {', '.join(ENCODERS)}")
        for model in (self.served_model, *(part.get("model") for part in self.iterations)):
            if model is not None and model not in MODELS:
                raise ValueError(f"{model!r} serves nothing here; those that do are {', '.join(MODELS)}")


_HINTS = get_type_hints(Behaviour)


def overridden(server: Behaviour, body: dict[str, Any]) -> Behaviour:
    """Return the behaviour for one request. Raises ValueError with a sentence for a wish that cannot be read."""
    wishes: dict[str, Any] = {}
    for text in (_metadata(body), _last_user_text(body)):
        wishes |= _wishes(text)
    for key, value in wishes.items():
        if key not in _HINTS:
            raise ValueError(f"simulate: {key}: no such behaviour; known are {', '.join(_HINTS)}")
        if isinstance(value, list):
            wishes[key] = value = tuple(value)
        if not _fits(value, _HINTS[key]):
            raise ValueError(f"simulate: {key}: {value!r} is not of the type {_HINTS[key]}")
    return replace(server, **wishes)


def _wishes(text: str) -> dict[str, Any]:
    _, found, rest = text.partition(MAGIC)
    if not found:
        return {}
    try:
        wishes, _ = json.JSONDecoder().raw_decode(rest.lstrip())
    except ValueError as error:
        raise ValueError(f"{MAGIC} must be followed by a JSON object ({error})") from error
    if not isinstance(wishes, dict):
        raise ValueError(f"{MAGIC} must be followed by a JSON object, not by {wishes!r}")
    return wishes


def _metadata(body: dict[str, Any]) -> str:
    """Return the wishes in `metadata.user_id`. It is a JSON string for Claude Code too, so only our own key means us."""
    metadata = body.get("metadata")
    try:
        said = json.loads(metadata["user_id"])["simulate"] if isinstance(metadata, dict) else None
    except (KeyError, TypeError, ValueError):
        return ""
    return f"{MAGIC} {json.dumps(said)}" if said is not None else ""


def _last_user_text(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    said = [each for each in messages if isinstance(each, dict) and each.get("role") != "system"] if isinstance(messages, list) else []
    content = said[-1].get("content") if said and said[-1].get("role") == "user" else None
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "\n".join(str(block.get("text", "")) for block in blocks if isinstance(block, dict))


def _fits(value: object, hint: Any) -> bool:
    kinds = tuple(getattr(kind, "__origin__", kind) for kind in (hint.__args__ if isinstance(hint, types.UnionType) else (hint,)))
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)
