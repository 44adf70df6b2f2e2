"""Bound the cost of a request before it is sent.

Promises a sound upper bound: no answer of the provider to a plain request can be billed higher. Where the body bounds nothing
(tools at the provider, other models, files), the bound is the worst case that the facts or the operator's policy declare.
Pure arithmetic over a parsed request, a policy and a price row. Facts: platform documentation as of 2026-08 to 2026-11
(context windows, vision, tool use, pricing) and 771 recorded plain requests, none of which had more input tokens than
bytes + 350.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from heapq import nlargest
from typing import Any, NamedTuple

from gateway_addon.messages.request import MAX_TOKENS_MAX, ParsedRequest, definition_bytes, is_fast
from gateway_addon.messages.scan import FeatureUse
from gateway_addon.messages.schema import Effect
from gateway_addon.money import dollars, rounded_up
from gateway_addon.policy import AppPolicy, Feature
from gateway_addon.pricing import PriceRow, Prices, Rates, rates
from gateway_addon.refusals import Refusal, stated

REQUEST_TOKENS = 1_000  # the hidden prompt of tool use is 264 to 804 tokens; recorded requests needed 350 in all
MESSAGE_TOKENS = 64
BLOCK_TOKENS = 16
IMAGE_TOKENS = 1_568  # the most that an image becomes after it is scaled down
IMAGE_TOKENS_HIGH_RESOLUTION = 4_784
TYPED_TOOL_TOKENS = 8_000  # the largest known, a browser toolset, describes itself in about 7,500
SERVER_LOOP_MAX = 10
"""The provider reads the prompt again for its own tools so often before it pauses the turn (documented default; more often in a batch, and
no document says how often)."""
CODE_SINCE = "20260209"
"""From this version on, code runs between two searches or fetches, in turns that `max_uses` does not count."""
TOOLS_FOUND_MAX = 5
"""The most tools that one tool search finds (documented as 3 to 5)."""
TURNS_SUMMED = 1_000
"""Turns after these (in a batch, with an absurd `max_uses`) are taken to read the whole context window."""

UNRELEASABLE = frozenset(
    {"web_search", "web_fetch", "code_execution", "tool_search", "mcp", "fallbacks", "advisor", "compaction", "thread", "container"}
)
"""With these in a request, the input that `message_start` reports is not yet all of the input."""


SHOWN = frozenset({"web_search", "web_fetch"})
"""Tools at the provider whose every use takes time, and shows in the stream as it happens (unless code runs in between)."""


class QuotePart(NamedTuple):
    """One line of a quote: a name, the tokens (or uses), the price of each, and the worst case in nano-dollars."""

    name: str
    tokens: int
    kind: str
    nano_each: Fraction
    nano: int

    @property
    def rate(self) -> str:
        """Return the price for people; it is only written out on demand, because each call is quoted and few quotes are read."""
        if self.kind == "each":
            return f"{dollars(round(self.nano_each))} each"
        return f"{self.kind} {dollars(rounded_up(self.nano_each, 1_000_000))}/MTok"


@dataclass(frozen=True, slots=True)
class Turns:
    """The turns of one request: its model runs once, and again after each use of a tool at the provider.

    `max_tokens` binds each turn, and each turn reads all that the turns before it wrote and brought, up to the context window.
    """

    count: int
    prompt_tokens: int
    max_tokens: int
    context_tokens: int
    brought: tuple[tuple[int, int], ...] = ()
    """The uses between the turns, as (tokens that one brings, how many such), the largest first. At least one in each gap."""
    uncounted: bool = False
    """Code may run in turns that no `max_uses` counts, so only the loop's own maximum bounds them."""
    shown: bool = False
    """Each turn shows the use of a tool as it happens, so a stream needs to hold only the turns that can have run."""

    @property
    def output_tokens(self) -> int:
        return self.count * self.max_tokens

    def input_tokens(self, written_tokens: int, turns: int | None = None) -> int:
        """Return the tokens of the prompts of all turns, or of the first `turns`, where they wrote at most `written_tokens` in all.

        Where there are more uses than gaps, the first gap has the surplus: then most turns read the tokens that they brought. For fewer
        turns than all, each gap has one use: such turns are counted by the uses that can have happened (progress.py).
        """
        count = self.count if turns is None else min(turns, self.count)
        if count == 1:  # nearly every call
            return self.prompt_tokens
        more = max(0, sum(uses for _, uses in self.brought) - (count - 1)) if count == self.count else 0
        tokens = self.prompt_tokens
        for turn in range(1, min(count, TURNS_SUMMED)):
            prompt = self.prompt_tokens + min(turn * self.max_tokens, written_tokens) + self._brought_tokens(turn + more)
            tokens += self._window(prompt)
        return tokens + max(0, count - TURNS_SUMMED) * self._window(self.context_tokens)

    def _window(self, prompt_tokens: int) -> int:
        """Return the bound of a later turn's prompt: the context window, unless the first prompt's bound is already longer."""
        return max(self.prompt_tokens, min(prompt_tokens, self.context_tokens))

    def _brought_tokens(self, uses: int) -> int:
        tokens = 0
        for each, count in self.brought:
            tokens += each * min(uses, count)
            uses -= min(uses, count)
        return tokens


@dataclass(frozen=True, slots=True)
class Quote:
    """The worst case of one request. The extras are fixed; output grows with what is granted, and what later turns read grows with it."""

    turns: Turns
    input_rate: Fraction
    """Nano-dollars per token of input and of output, exactly, at the dearest tier that the request can reach."""
    output_rate: Fraction
    extra_nano: int
    parts: tuple[QuotePart, ...]
    price_rows: tuple[str, ...]
    releasable: bool
    """The input that `message_start` reports is exact, so the input part of a reservation can become its price then."""
    input_tokens: int
    output_tokens: int
    total_nano: int
    """The whole: the extras, the prompts of all turns and all of the output."""
    terms: "_Terms" = field(repr=False, compare=False)

    @property
    def prompt_nano(self) -> int:
        """Return nano-dollars for the input as it is sent, read once."""
        return rounded_up(self.input_rate, self.turns.prompt_tokens)

    @property
    def by_itself(self) -> tuple[str, ...]:
        """Return the features by which the provider may spend more than the input and one `max_tokens`."""
        return tuple(dict.fromkeys(use.feature for use in self.terms.parsed.found.uses if use.feature in UNRELEASABLE))

    def for_output(self, tokens: int, turns: int | None = None) -> int:
        """Return nano-dollars, rounded up, for the extras, `tokens` of output in all, and the prompts of so many turns (None: all)."""
        return rounded_up(self.input_rate, self.turns.input_tokens(tokens, turns)) + self.extra_nano + rounded_up(self.output_rate, tokens)

    def keep(self, parsed: ParsedRequest) -> None:
        """Keep only so much of the request: what an answer about the quote may name."""
        self.terms.parsed = parsed

    def output_within(self, amount_nano: int) -> int:
        """Return the largest `max_tokens` with which this request would fit an amount; 0 where none does."""
        return max(0, bisect_right(range(MAX_TOKENS_MAX + 1), amount_nano, key=lambda tokens: _bound(self.terms, tokens).total_nano) - 1)


@dataclass(slots=True)
class _Terms:
    """The terms under which every line of one quote is priced."""

    app: AppPolicy
    parsed: ParsedRequest
    """Without its prompt, once the quote is made (`Quote.keep`)."""
    prices: Prices
    now: float
    batch: bool
    max_tokens: int
    """The `max_tokens` of the request, or the one that is tried in its place."""

    def row(self, model: str) -> PriceRow | None:
        return self.prices.row(model, self.now)

    def feature(self, use: FeatureUse) -> Feature:
        """Return the operator's limits for a feature; none where an app in observe mode uses one that its policy does not name."""
        return self.app.features.get(use.feature, Feature())

    def rates(self, row: PriceRow, prompt_tokens: int, *, fast: bool) -> Rates:
        default = "us" if self.app.workspace_geo == "unknown" and row.geo else self.app.workspace_geo
        geo = self.parsed.body.get("inference_geo") or (default if row.geo else None)
        return rates(row, prompt_tokens=prompt_tokens, speed="fast" if fast else None, inference_geo=geo, batch=self.batch)

    def input_rate(self, priced: Rates, *, loops: bool) -> tuple[str, Fraction]:
        """Return the highest price of one token of input. The provider's own loops cache the prompt between two turns unasked."""
        if self.parsed.hour_ttl:
            return "1h cache write", priced.cache_write_1h
        if self.parsed.cache_control or loops:
            return "5m cache write", priced.cache_write_5m
        return "input", priced.input


def quote(parsed: ParsedRequest, app: AppPolicy, prices: Prices, now: float, *, batch: bool = False) -> Quote | Refusal:
    """Bound the cost of a request that `policy.judge` has seen, at the prices of `now` (unix seconds), in a `batch` at half of them.

    Refuses (`model_unpriced`) where a model that the request can reach has no price: what has no price is never free; and in a batch
    (`feature`) a tool at the provider that does not say how often it may be used: there no pause of the turn bounds it.
    """
    terms = _Terms(app, parsed, prices, now, batch, parsed.max_tokens)
    if batch and (endless := next((use for use in parsed.found.uses if _loops(use) and not _bounded(use)), None)):
        counted = 'a max_uses and allowed_callers: ["direct"]' if _runs_code(endless) else "a max_uses"
        way_out = f"give it {counted}, or send this request as a call of its own"
        return stated("feature", f"in a batch nothing bounds the turns of {endless.feature} ({endless.where}); {way_out}")
    for model, fast in _priced_models(terms):
        if (refusal := _unpriced(terms, model, fast=fast)) is not None:
            return refusal
    return _bound(terms, parsed.max_tokens)


def _bound(terms: _Terms, max_tokens: int) -> Quote:
    """Quote a request whose models all have a price, as if it asked for `max_tokens`."""
    terms = terms if terms.max_tokens == max_tokens else replace(terms, max_tokens=max_tokens)
    parsed = terms.parsed
    row = terms.row(parsed.model)
    assert row is not None, "the request's own model is the first of those that were looked up"
    turns = _turns(terms, row, max_tokens)
    input_tokens = turns.input_tokens(turns.output_tokens)
    priced = terms.rates(row, input_tokens, fast=is_fast(parsed.body))
    label, rate = terms.input_rate(priced, loops=turns.count > 1)
    extras = tuple(_extras(terms, row, turns))
    parts = (
        _part("input" if turns.count == 1 else f"input, read up to {turns.count} times", input_tokens, label, rate),
        _part(
            "output (max_tokens)" if turns.count == 1 else f"output (max_tokens, {turns.count} times)",
            turns.output_tokens, "output", priced.output,
        ),
        *(part for part, _ in extras),
    )  # fmt: skip
    return Quote(
        turns=turns,
        input_rate=rate,
        output_rate=priced.output,
        extra_nano=sum(part.nano for part, _ in extras),
        parts=parts,
        price_rows=tuple(dict.fromkeys([row.name, *(name for _, name in extras)])),
        releasable=not parsed.found.unknown and not any(use.feature in UNRELEASABLE for use in parsed.found.uses),
        input_tokens=input_tokens,
        output_tokens=turns.output_tokens,
        total_nano=sum(part.nano for part in parts),
        terms=terms,
    )


def input_bound(parsed: ParsedRequest, row: PriceRow) -> int:
    """Return the most tokens that this prompt can have when it is read once, on the model of a price row."""
    found = parsed.found
    image_tokens = IMAGE_TOKENS_HIGH_RESOLUTION if row.high_resolution else IMAGE_TOKENS
    tokens = (
        parsed.text_bytes
        + REQUEST_TOKENS
        + MESSAGE_TOKENS * found.messages
        + BLOCK_TOKENS * found.blocks
        + image_tokens * found.images
        + TYPED_TOOL_TOKENS * found.typed_tools
    )
    outside = found.pdfs or any(use.effect is Effect.OUTSIDE or use.feature in ("thread", "container") for use in found.uses)
    outside = outside or any(name not in found.definitions for name in found.references)
    return max(tokens, row.context_tokens) if outside else tokens


def _turns(terms: _Terms, row: PriceRow, max_tokens: int) -> Turns:
    """Return the turns of one attempt at the request, by the model of a price row."""
    prompt = input_bound(terms.parsed, row)
    if not terms.parsed.found.uses:  # nearly every call
        return Turns(1, prompt, max_tokens, row.context_tokens)
    listed = sum(_brought_tokens(terms, use, row) for use in terms.parsed.found.uses if use.feature == "mcp")
    prompt = max(prompt, min(prompt + listed, row.context_tokens))  # the tools that an MCP server has are in no body
    loops = [use for use in terms.parsed.found.uses if _loops(use)]
    uses = sum(map(_uses, loops)) if all(map(_bounded, loops)) else SERVER_LOOP_MAX
    brought = sorted(((_brought_tokens(terms, use, row), _uses(use)) for use in loops), reverse=True)
    return Turns(
        count=(uses if terms.batch else min(uses, SERVER_LOOP_MAX)) + 1,
        prompt_tokens=prompt,
        max_tokens=max_tokens,
        context_tokens=row.context_tokens,
        brought=tuple(brought),
        uncounted=comes_whole(terms.parsed),
        shown=bool(loops) and {use.feature for use in terms.parsed.found.uses} & UNRELEASABLE <= SHOWN and all(map(_bounded, loops)),
    )


def comes_whole(parsed: ParsedRequest) -> bool:
    """Tell whether the provider may run turns that a stream does not show before its end: code that uses tools, MCP servers."""
    return any(_loops(use) and _runs_code(use) for use in parsed.found.uses)


def _loops(use: FeatureUse) -> bool:
    """Tell whether the provider reads the prompt again after a use of this feature."""
    return use.effect is Effect.SERVER_TOOL or use.where == "mcp_servers" or (use.feature == "advisor" and use.is_tool)


def _bounded(use: FeatureUse) -> bool:
    """Tell whether the tool's own `max_uses` bounds the turns that it causes."""
    return _stated_uses(use) is not None and not _runs_code(use)


def _runs_code(use: FeatureUse) -> bool:
    """Tell whether code may run between two uses of a tool, in turns that no limit counts until the loop is paused."""
    callers = use.value.get("allowed_callers") if isinstance(use.value, dict) else None
    if use.feature not in ("web_search", "web_fetch"):
        return use.feature in ("code_execution", "mcp")
    return callers != ["direct"] and (callers is not None or use.value["type"].rpartition("_")[2] >= CODE_SINCE)


def _uses(use: FeatureUse) -> int:
    """Return how often a tool can be used, from code as well: its `max_uses`, else as often as the loop allows."""
    stated = _stated_uses(use)
    if stated is None or _runs_code(use):
        return max(SERVER_LOOP_MAX, stated or 0)
    return stated


def _stated_uses(use: FeatureUse) -> int | None:
    stated = use.value.get("max_uses") if isinstance(use.value, dict) else None
    return stated if type(stated) is int and stated >= 0 else None


def _brought_tokens(terms: _Terms, use: FeatureUse, row: PriceRow) -> int:
    """Return the tokens that one use brings into later prompts: as the operator declares, else a whole context window."""
    if use.feature == "tool_search":
        tools = (tool for same in terms.parsed.found.definitions.values() for tool in same)
        return sum(nlargest(TOOLS_FOUND_MAX, (definition_bytes(tool) + BLOCK_TOKENS for tool in tools)))
    if use.feature == "advisor":
        return _advice_tokens(terms, use)
    declared = terms.feature(use).tokens_per_use
    return row.context_tokens if declared is None else declared


def _extras(terms: _Terms, row: PriceRow, turns: Turns) -> Iterator[tuple[QuotePart, str]]:
    """Yield the lines billed besides the answer itself, each with its price row."""
    yield from _beside(terms, row, turns, fast=is_fast(terms.parsed.body))
    for use in terms.parsed.found.uses:
        if use.feature == "fallbacks":
            yield from _fallbacks(terms, use)


def _beside(terms: _Terms, row: PriceRow, turns: Turns, *, fast: bool, whose: str = "") -> Iterator[tuple[QuotePart, str]]:
    """Yield the lines billed besides the turns of one attempt: its searches, a compaction before each turn, its advisor's calls."""
    for use in terms.parsed.found.uses:
        if use.feature == "web_search" and use.is_tool:
            searches = SERVER_LOOP_MAX if (stated := _stated_uses(use)) is None else stated
            nano = rounded_up(row.web_search_nano * row.multiplier, searches)
            yield QuotePart(f"web searches ({use.where}){whose}", searches, "each", row.web_search_nano, nano), row.name
        elif use.feature == "compaction":
            name = f"compaction ({use.where}){whose}"
            yield from _call(terms, name, row, row.context_tokens, row.output_tokens_max, fast=fast, times=turns.count)
        elif use.feature == "advisor" and use.is_tool:
            yield from _advisor(terms, use, whose)


def _advisor(terms: _Terms, use: FeatureUse, whose: str) -> Iterator[tuple[QuotePart, str]]:
    """Yield the lines of an advisor: each use is a call to another model, which reads the conversation and writes up to its own limit."""
    row = terms.row(use.value["model"])
    if row is not None:
        name, output = f"advisor ({use.where}){whose}", _advice_tokens(terms, use)
        yield from _call(terms, name, row, row.context_tokens, output, fast=False, times=_uses(use))


def _advice_tokens(terms: _Terms, use: FeatureUse) -> int:
    row, stated = terms.row(use.value["model"]), use.value.get("max_tokens")
    most = 0 if row is None else row.output_tokens_max
    return stated if type(stated) is int and 0 <= stated <= most else most


def _fallbacks(terms: _Terms, use: FeatureUse) -> Iterator[tuple[QuotePart, str]]:
    """Yield the lines of fallbacks: each attempt is billed by its own model, `max_tokens` and speed, or the request's where it has none."""
    for attempt in _attempts(terms, use):
        row = terms.row(attempt["model"])
        if row is not None:
            stated = attempt.get("max_tokens")
            turns = _turns(terms, row, stated if type(stated) is int else terms.max_tokens)
            fast = is_fast({**terms.parsed.body, **attempt})
            input_tokens = turns.input_tokens(turns.output_tokens)
            yield from _call(terms, f"fallback to {attempt['model']}", row, input_tokens, turns.output_tokens, fast=fast)
            yield from _beside(terms, row, turns, fast=fast, whose=f" of the fallback to {attempt['model']}")


def _attempts(terms: _Terms, use: FeatureUse) -> list[Mapping[str, Any]]:
    if isinstance(use.value, list):
        return [attempt for attempt in use.value if isinstance(attempt, dict)]
    return [{"model": model} for model in terms.feature(use).default]


def _call(
    terms: _Terms, name: str, row: PriceRow, input_tokens: int, output_tokens: int, *, fast: bool, times: int = 1
) -> Iterator[tuple[QuotePart, str]]:
    """Yield the two lines of a whole call made inside the request, `times` over."""
    priced = terms.rates(row, input_tokens, fast=fast and row.fast is not None)
    label, rate = terms.input_rate(priced, loops=True)
    yield _part(f"{name}: input", times * input_tokens, label, rate), row.name
    yield _part(f"{name}: output", times * output_tokens, "output", priced.output), row.name


def _part(name: str, tokens: int, label: str, rate: Fraction) -> QuotePart:
    """Return one line, rounded up. A thousand nano-dollars per token is a dollar per million tokens."""
    return QuotePart(name, tokens, label, rate, rounded_up(rate, tokens))


def _priced_models(terms: _Terms) -> Iterator[tuple[str, bool]]:
    """Yield every model that the request can reach, and whether it must have a price for fast mode."""
    yield terms.parsed.model, is_fast(terms.parsed.body)
    yield from ((model, False) for _, model in terms.parsed.found.models)
    for use in terms.parsed.found.uses:
        if use.feature == "fallbacks":
            yield from ((attempt["model"], attempt.get("speed") not in (None, "standard")) for attempt in _attempts(terms, use))


def _unpriced(terms: _Terms, model: str, *, fast: bool) -> Refusal | None:
    row = terms.row(model)
    if row is not None and (row.fast is not None or not fast):
        return None
    lacks = f"{model[:100]!r}, which has no price" if row is None else f"speed fast on {model}, which has no price for it"
    sentence = f"{terms.app} asks for {lacks}; what has no price is refused until a row in {terms.app.beside('prices.yaml')} gives it one"
    return stated("model_unpriced", sentence)
