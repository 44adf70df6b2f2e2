"""Price a call from its usage, exact to the nano-dollar, or give the reason why it cannot be priced.

The one rule of rounding: each billed part (an iteration, or the top level where there are none) is summed exactly over its
kinds of tokens and all modifiers, and rounded up once to a whole nano-dollar; web searches are a part of their own; the call
is the sum of its parts. The one place of modifiers is `rates`, which quoting uses too. Pure: the time comes as an argument.
"""

import math
from dataclasses import dataclass, replace

from gateway_addon.messages import TokenCounts, Usage, UsagePart
from gateway_addon.money import dollars, rounded_up
from gateway_addon.pricing.table import PriceRow, Prices, Rates

FLAGS = {
    "error": "the API, or an edge in front of it, answered with an error before any work: nothing is billed",
    "unreadable": "the answer's usage was not found or not understood: the cost cannot be derived from it",
    "incomplete": "the answer broke off: its output is a floor, not the bill",
    "estimated": "the output is assumed, not reported: an upper bound",
    "model_unpriced": "a model in the answer has no price in prices.yaml",
    "fast_unpriced": "the answer ran in fast mode, for which its model has no price in prices.yaml",
    "refused_before_output": "the model declined before any output: the usage is shown, and not charged",
    "declined_hop": "a model declined before any output and another took over: its attempt is not charged",
    "top_level_larger": "the top-level usage would cost more than the sum of the iterations, which is the bill",
    "code_execution": "code ran in a container: its hours are billed by the provider and are not derivable from the answer",
    "priority_tier": "priority tier: committed capacity is billed differently, the list price is an over-estimate",
    "tier_unknown": "a service tier that is not known here, charged at the list price",
    "geo_unknown": "an inference region that is not known here, charged like us",
    "speed_unknown": "a speed that is not known here, charged like fast",
    "fallback_credit": "a fallback credit was redeemed: cache writes are charged at the price of cache reads",
}
"""Every flag that a cost can carry, with the sentence that its notes begin with."""


@dataclass(frozen=True, slots=True)
class PricedPart:
    kind: str
    """The iteration's kind, `message` for the top level, `web_search` for the searches."""
    model: str | None
    tokens: TokenCounts
    web_searches: int
    nano: int
    price_row: str | None


@dataclass(frozen=True, slots=True)
class Cost:
    nano: int | None
    """None: cannot be priced, and must not be taken for zero. `flags` and `notes` say why."""
    parts: tuple[PricedPart, ...] = ()
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def price_rows(self) -> str | None:
        """Return the names of the rows used, once each, with commas between."""
        return ", ".join(dict.fromkeys(part.price_row for part in self.parts if part.price_row)) or None


def rates(row: PriceRow, *, prompt_tokens: int, speed: str | None, inference_geo: str | None, batch: bool) -> Rates:
    """Return the rates under all modifiers: nano-dollars per token of each kind.

    The tier follows the length of the whole prompt; fast mode and the batch discount exclude each other; US-only inference
    multiplies every kind (platform documentation, "Pricing"). A region or speed not known here is taken at the dearest one.
    Raises ValueError for fast mode on a model that has no price for it.
    """
    tier = row.rates
    if row.long_prompt is not None and prompt_tokens > row.long_prompt.above_tokens:
        tier = row.long_prompt.rates
    factor = row.multiplier
    if speed not in (None, "standard"):
        if row.fast is None:
            raise ValueError(f"{row.name} has no price for speed {speed!r}")
        factor *= row.fast
    elif batch:
        factor *= row.batch
    if inference_geo not in (None, "global", "not_available"):
        factor *= row.geo_us
    return tier if factor == 1 else tier.times(factor)


def cost(prices: Prices, usage: Usage, *, at: float, hour_ttl_requested: bool, status: int | None = None) -> Cost:
    """Return an answer's cost at the prices of `at` (unix seconds). Never raises; an unknown cost has `nano` None.

    `hour_ttl_requested`: the request asked for a 1h cache anywhere, which decides writes whose lifetime is not reported.
    `status`: of the answer, where it is known.
    """
    flags: dict[str, str] = {}
    if usage.unbilled(status):
        return Cost(0, (), ("error",), (FLAGS["error"],))
    if not usage.readable:
        return Cost(None, (), ("unreadable",), (FLAGS["unreadable"],))
    _flag_modifiers(usage, flags)
    parts: list[PricedPart] = []
    unpriced = False
    for part, free in _billed(usage, flags):
        row = prices.row(part.model, at) if part.model else None
        nano = 0 if free else _nano(row, part.tokens, usage, hour_ttl_requested)
        if nano is None:
            unpriced = True
            flag = "fast_unpriced" if row else "model_unpriced"
            flags[flag] = f"{FLAGS[flag]}: {part.model or f'the {part.kind} names no model'}"
        else:
            parts.append(PricedPart(part.kind, part.model, part.tokens, 0, nano, row.name if row else None))
    row = prices.row(usage.model, at) if usage.model else None
    if usage.web_search_requests:
        if row is None:
            unpriced = True
        else:
            nano = rounded_up(row.web_search_nano * row.multiplier, usage.web_search_requests)
            parts.append(PricedPart("web_search", None, TokenCounts(), usage.web_search_requests, nano, None))
    if usage.iterations and not unpriced and not usage.refused_before_output:
        _compare_top_level(_nano(row, usage.tokens, usage, hour_ttl_requested), parts, flags)
    total_nano = None if unpriced else sum(part.nano for part in parts)
    return Cost(total_nano, tuple(parts), tuple(flags), tuple(flags.values()))


def _billed(usage: Usage, flags: dict[str, str]) -> list[tuple[UsagePart, bool]]:
    """Return the parts that make the bill, each with whether it is free."""
    if not usage.iterations:
        if usage.refused_before_output:
            flags["refused_before_output"] = FLAGS["refused_before_output"]
        return [(UsagePart("message", usage.model, usage.tokens), usage.refused_before_output)]
    billed = []
    for index, part in enumerate(usage.iterations):
        attempt = part.kind in ("message", "fallback_message") and part.tokens.output_tokens == 0
        taken_over = any(later.kind == "fallback_message" and later.model != part.model for later in usage.iterations[index + 1 :])
        refused = attempt and usage.refused_before_output
        if attempt and taken_over:
            flags["declined_hop"] = FLAGS["declined_hop"]
        elif refused:
            flags["refused_before_output"] = FLAGS["refused_before_output"]
        billed.append((part, refused or (attempt and taken_over)))
    return billed


def _nano(row: PriceRow | None, tokens: TokenCounts, usage: Usage, hour_ttl: bool) -> int | None:
    """Return the price of one part, summed exactly and rounded up once."""
    if row is None:
        return None
    batch = usage.service_tier == "batch"
    try:
        rate = rates(row, prompt_tokens=tokens.prompt_tokens, speed=usage.speed, inference_geo=usage.inference_geo, batch=batch)
    except ValueError:
        return None
    if usage.fallback_credit == "redeemed":
        rate = replace(rate, cache_write_5m=rate.cache_read, cache_write_1h=rate.cache_read)
    # 1h writes in the answer prove that the request asked for them, whatever is known of the request.
    return math.ceil(rate.price(tokens, hour_ttl=hour_ttl or tokens.cache_write_1h_tokens > 0))


def _compare_top_level(top_nano: int | None, parts: list[PricedPart], flags: dict[str, str]) -> None:
    """Flag an answer whose top level is dearer than its iterations: these are the bill, but a person should look."""
    tokens_nano = sum(part.nano for part in parts if part.kind != "web_search")
    if top_nano is not None and top_nano > tokens_nano:
        flags["top_level_larger"] = f"{FLAGS['top_level_larger']}; difference {dollars(top_nano - tokens_nano)}"


def _flag_modifiers(usage: Usage, flags: dict[str, str]) -> None:
    """Flag each property of the answer that makes its cost uncertain, or other than the list price."""
    found = {
        "estimated": usage.estimated,
        "incomplete": not usage.complete and not usage.estimated,
        "code_execution": usage.code_executed,
        "priority_tier": usage.service_tier == "priority",
        "tier_unknown": usage.service_tier not in (None, "standard", "priority", "batch"),
        "geo_unknown": usage.inference_geo not in (None, "global", "not_available", "us"),
        "speed_unknown": usage.speed not in (None, "standard", "fast"),
        "fallback_credit": usage.fallback_credit == "redeemed",
    }
    flags.update({name: FLAGS[name] for name, holds in found.items() if holds})
