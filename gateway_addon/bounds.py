"""What a request can cost at most, known before it is sent.

Promises a sound upper bound: no answer of the provider to this request can be billed higher, where the request is plain; and
for what no body bounds (tools at the provider, other models, files) the worst case that the facts or the operator's policy
declare. Pure arithmetic over a reading, a policy and a price row. Facts: platform documentation as of 2026-08 to 2026-11
(context windows, vision, tool use, pricing) and 771 recorded plain requests, none of which had more input tokens than
bytes + 350.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from gateway_addon.fields import Effect
from gateway_addon.money import dollars, rounded_up
from gateway_addon.policy import AppPolicy, Feature
from gateway_addon.pricing import Prices, Rates, Row, rates
from gateway_addon.reading import Reading
from gateway_addon.refusals import Refusal, stated
from gateway_addon.survey import Use

REQUEST_TOKENS = 1_000  # the hidden prompt of tool use is 264 to 804 tokens; recorded requests needed 350 in all
MESSAGE_TOKENS = 64
BLOCK_TOKENS = 16
IMAGE_TOKENS = 1_568  # the most that an image becomes after it is scaled down
IMAGE_TOKENS_HIGH_RESOLUTION = 4_784
TYPED_TOOL_TOKENS = 8_000  # the largest known, a browser toolset, describes itself in about 7,500
SERVER_LOOP_MAX = 10
"""How often the provider reads the prompt again for its own tools before it pauses the turn (documented default; in a batch it is more
often, and nobody says how much)."""

UNRELEASABLE = frozenset(
    {"web_search", "web_fetch", "code_execution", "tool_search", "mcp", "fallbacks", "advisor", "compaction", "thread", "container"}
)
"""With these in a request, the input that `message_start` reports is not yet all of the input."""


class QuotePart(NamedTuple):
    """One line of a quote: what for, how many tokens (or uses), at which price, and the worst case in nano-dollars."""

    name: str
    tokens: int
    kind: str
    nano_each: Fraction
    nano: int

    @property
    def rate(self) -> str:
        """For people, and only written out where somebody reads it: each call is quoted, few quotes are read."""
        if self.kind == "each":
            return f"{dollars(round(self.nano_each))} each"
        return f"{self.kind} {dollars(rounded_up(self.nano_each, 1_000_000))}/MTok"


@dataclass(frozen=True, slots=True)
class Quote:
    """The worst case of one request. Input and extras are fixed; output grows with what is granted."""

    input_tokens: int
    output_tokens: int
    input_nano: int
    extra_nano: int
    output_rate: Fraction
    """Nano-dollars per output token, exactly, at the dearest tier that the request can reach."""
    parts: tuple[QuotePart, ...]
    price_rows: tuple[str, ...]
    releasable: bool
    """The input that `message_start` reports is exact, so the input part of a reservation can become its price then."""

    @property
    def output_nano(self) -> int:
        return rounded_up(self.output_rate, self.output_tokens)

    @property
    def total_nano(self) -> int:
        return self.for_output(self.output_tokens)

    def for_output(self, tokens: int) -> int:
        """Nano-dollars for the whole input, the extras and this many tokens of output, rounded up."""
        return self.input_nano + self.extra_nano + rounded_up(self.output_rate, tokens)

    def output_within(self, amount_nano: int) -> int:
        """The largest `max_tokens` with which this request would fit an amount; 0 where its input alone does not."""
        return max(0, math.floor((amount_nano - self.input_nano - self.extra_nano) / self.output_rate))


@dataclass(frozen=True, slots=True)
class _Terms:
    """What every line of one quote is priced under."""

    app: AppPolicy
    reading: Reading
    prices: Prices
    now: float
    batch: bool

    def row(self, model: str) -> Row | None:
        return self.prices.row(model, self.now)

    def feature(self, use: Use) -> Feature:
        """The operator's limits; none where an app that is only observed uses what its policy does not name."""
        return self.app.features.get(use.feature, Feature())

    def rates(self, row: Row, prompt_tokens: int, *, fast: bool) -> Rates:
        default = "us" if self.app.workspace_geo == "unknown" and row.geo else self.app.workspace_geo
        geo = self.reading.body.get("inference_geo") or (default if row.geo else None)
        return rates(row, prompt_tokens=prompt_tokens, speed="fast" if fast else None, inference_geo=geo, batch=self.batch)

    def input_rate(self, priced: Rates, *, loops: bool) -> tuple[str, Fraction]:
        """The dearest that one token of input can be. The provider's own loops cache the prompt between two turns unasked."""
        if self.reading.hour_ttl:
            return "1h cache write", priced.cache_write_1h
        if self.reading.cache_control or loops:
            return "5m cache write", priced.cache_write_5m
        return "input", priced.input


def quote(reading: Reading, app: AppPolicy, prices: Prices, now: float, *, batch: bool = False) -> Quote | Refusal:
    """Bound the cost of a request that `policy.judge` has seen, at the prices of `now` (unix seconds), in a `batch` at half of them.

    Refuses (`model_unpriced`) where a model that the request can reach has no price: what has no price is never free; and in a batch
    (`feature`) a tool at the provider that does not say how often it may be used: there no pause of the turn bounds it.
    """
    terms = _Terms(app, reading, prices, now, batch)
    if batch and (endless := next((use for use in reading.found.uses if _loops(use) and _stated_uses(use) is None), None)):
        way_out = "give it a max_uses, or send this request as a call of its own"
        return stated("feature", f"in a batch nothing bounds {endless.feature} ({endless.where}); {way_out}")
    for model, fast in _priced_models(terms):
        if (refusal := _unpriced(terms, model, fast=fast)) is not None:
            return refusal
    row = terms.row(reading.model)
    assert row is not None, "the request's own model is the first of those that were looked up"
    per_turn, turns = _turns(terms, row)
    priced = terms.rates(row, per_turn * turns, fast=_fast(reading.body))
    label, rate = terms.input_rate(priced, loops=turns > 1)
    name = "input" if turns == 1 else f"input, read up to {turns} times"
    extras = tuple(_extras(terms, row))
    parts = (
        _part(name, per_turn * turns, label, rate),
        _part("output (max_tokens)", reading.max_tokens, "output", priced.output),
        *(part for part, _ in extras),
    )
    return Quote(
        input_tokens=per_turn * turns,
        output_tokens=reading.max_tokens,
        input_nano=parts[0].nano,
        extra_nano=sum(part.nano for part, _ in extras),
        output_rate=priced.output,
        parts=parts,
        price_rows=tuple(dict.fromkeys([row.name, *(name for _, name in extras)])),
        releasable=not reading.found.unknown and not any(use.feature in UNRELEASABLE for use in reading.found.uses),
    )


def input_bound(reading: Reading, row: Row) -> int:
    """The most tokens that one reading of this prompt can have, on the model of a price row."""
    found = reading.found
    image_tokens = IMAGE_TOKENS_HIGH_RESOLUTION if row.high_resolution else IMAGE_TOKENS
    tokens = (
        reading.text_bytes
        + REQUEST_TOKENS
        + MESSAGE_TOKENS * found.messages
        + BLOCK_TOKENS * found.blocks
        + image_tokens * found.images
        + TYPED_TOOL_TOKENS * found.typed_tools
    )
    outside = found.pdfs or any(use.effect is Effect.OUTSIDE or use.feature in ("thread", "container") for use in found.uses)
    return max(tokens, row.context_tokens) if outside else tokens


def _turns(terms: _Terms, row: Row) -> tuple[int, int]:
    """(the longest prompt of a turn, how many turns). Each turn reads all earlier output and results, up to the context window."""
    prompt = input_bound(terms.reading, row)
    loops = brought = 0
    for use in terms.reading.found.uses:
        if not _loops(use):
            continue
        loops += _uses(use)
        per_use = terms.feature(use).tokens_per_use
        if use.feature != "tool_search":  # what a tool search finds is in the body already
            brought += row.context_tokens if per_use is None else _uses(use) * per_use
    if not loops:
        return prompt, 1
    longest = min(prompt + terms.reading.max_tokens + brought, row.context_tokens)
    return max(prompt, longest), (loops if terms.batch else min(loops, SERVER_LOOP_MAX)) + 1


def _loops(use: Use) -> bool:
    """Whether the provider reads the prompt again for this one."""
    return use.effect is Effect.SERVER_TOOL or use.where == "mcp_servers"


def _uses(use: Use) -> int:
    """How often a tool can be used: as it says (a policy that limits uses demands that), else until the turn is paused."""
    stated = _stated_uses(use)
    return SERVER_LOOP_MAX if stated is None else stated


def _stated_uses(use: Use) -> int | None:
    stated = use.value.get("max_uses") if isinstance(use.value, dict) else None
    return stated if type(stated) is int and stated >= 0 else None


def _extras(terms: _Terms, row: Row) -> Iterator[tuple[QuotePart, str]]:
    """What is billed beside the answer itself: (line, price row) each."""
    for use in terms.reading.found.uses:
        if use.feature == "web_search" and use.is_tool:
            nano = rounded_up(row.web_search_nano * row.multiplier, _uses(use))
            yield QuotePart(f"web searches ({use.where})", _uses(use), "each", row.web_search_nano, nano), row.name
        elif use.feature == "compaction":
            fast = _fast(terms.reading.body)
            yield from _call(terms, f"compaction ({use.where})", row, row.context_tokens, row.output_tokens_max, fast=fast)
        elif use.feature == "advisor" and use.is_tool:
            yield from _advisor(terms, use)
        elif use.feature == "fallbacks":
            yield from _fallbacks(terms, use)


def _advisor(terms: _Terms, use: Use) -> Iterator[tuple[QuotePart, str]]:
    """Each use is a call of its own to another model, which reads the conversation and writes up to its own limit."""
    row = terms.row(use.value["model"])
    if row is not None:
        stated = use.value.get("max_tokens")
        output = stated if type(stated) is int and 0 <= stated <= row.output_tokens_max else row.output_tokens_max
        yield from _call(terms, f"advisor ({use.where})", row, row.context_tokens, output, fast=False, times=_uses(use))


def _fallbacks(terms: _Terms, use: Use) -> Iterator[tuple[QuotePart, str]]:
    """Each attempt is billed on its own, by its own model, `max_tokens` and speed; it takes the request's where it has none."""
    for attempt in _attempts(terms, use):
        row = terms.row(attempt["model"])
        if row is not None:
            stated = attempt.get("max_tokens")
            output = stated if type(stated) is int else terms.reading.max_tokens
            per_turn, turns = _turns(terms, row)
            fast = _fast({**terms.reading.body, **attempt})
            yield from _call(terms, f"fallback to {attempt['model']}", row, per_turn * turns, output, fast=fast)


def _attempts(terms: _Terms, use: Use) -> list[Mapping[str, Any]]:
    if isinstance(use.value, list):
        return [attempt for attempt in use.value if isinstance(attempt, dict)]
    return [{"model": model} for model in terms.feature(use).default]


def _call(
    terms: _Terms, name: str, row: Row, input_tokens: int, output_tokens: int, *, fast: bool, times: int = 1
) -> Iterator[tuple[QuotePart, str]]:
    """The two lines of a whole call made inside the request, `times` over."""
    priced = terms.rates(row, input_tokens, fast=fast and row.fast is not None)
    label, rate = terms.input_rate(priced, loops=True)
    yield _part(f"{name}: input", times * input_tokens, label, rate), row.name
    yield _part(f"{name}: output", times * output_tokens, "output", priced.output), row.name


def _part(name: str, tokens: int, label: str, rate: Fraction) -> QuotePart:
    """One line, rounded up. A thousand nano-dollars per token is a dollar per million tokens."""
    return QuotePart(name, tokens, label, rate, rounded_up(rate, tokens))


def _fast(body: Mapping[str, Any]) -> bool:
    return body.get("speed") not in (None, "standard")


def _priced_models(terms: _Terms) -> Iterator[tuple[str, bool]]:
    """Every model that the request can reach, and whether it must have a price for fast mode."""
    yield terms.reading.model, _fast(terms.reading.body)
    yield from ((model, False) for _, model in terms.reading.found.models)
    for use in terms.reading.found.uses:
        if use.feature == "fallbacks":
            yield from ((attempt["model"], attempt.get("speed") not in (None, "standard")) for attempt in _attempts(terms, use))


def _unpriced(terms: _Terms, model: str, *, fast: bool) -> Refusal | None:
    row = terms.row(model)
    if row is not None and (row.fast is not None or not fast):
        return None
    lacks = f"{model[:100]!r}, which has no price" if row is None else f"speed fast on {model}, which has no price for it"
    sentence = f"app {terms.app.name} asks for {lacks}; what has no price is refused until a row in policies/prices.yaml gives it one"
    return stated("model_unpriced", sentence)
