"""Price the simulated API's usage: its own literals, its own arithmetic.

Promises exact integers. It must never import the gateway's pricing: the two agree only if both are right, and that
agreement is what `gateway demo` proves. Prices as published for the first-party API on 2026-11-23.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .book import Usage

WEB_SEARCH_NANO = 10_000_000
LONG_PROMPT_TOKENS = 100_000


class Price(NamedTuple):
    """Nano-dollars a token. One dollar for a million tokens is 1,000 nano-dollars for one, so no price here has a fraction."""

    input: int
    output: int
    cache_write_5m: int
    cache_write_1h: int
    cache_read: int


@dataclass(frozen=True, slots=True)
class Model:
    price: Price
    context_tokens: int = 1_000_000
    output_tokens_max: int = 128_000
    long_price: Price | None = None
    """For every token, output too, of a request whose prompt is longer than LONG_PROMPT_TOKENS."""
    fast: bool = False
    """`speed: fast` serves it at twice the price."""
    regional: bool = True
    """`inference_geo: us` serves it at 1.1 times the price; models before 4.6 answer 400."""
    released: str = "1970-01-01"
    """The API's own way of saying that the day is not known."""



def _before_4_6(price: Price, released: str) -> Model:
    return Model(price, context_tokens=200_000, output_tokens_max=64_000, regional=False, released=released)


MODELS: dict[str, Model] = {
    "claude-fable-5-2": Model(Price(8_000, 40_000, 10_000, 16_000, 200), fast=True, released="2026-11-09"),
    "claude-mythos-5-2": Model(Price(8_000, 40_000, 10_000, 16_000, 200), fast=True, released="2026-11-09"),
    "claude-haiku-5-5": Model(Price(100, 500, 125, 200, 10), long_price=Price(500, 2_500, 625, 1_000, 50), released="2026-10-07"),
    "claude-sonnet-5-5": Model(Price(2_000, 10_000, 2_500, 4_000, 100)),
    "claude-opus-5-5": Model(Price(4_000, 20_000, 5_000, 8_000, 200), fast=True),
    "claude-fable-5-1": Model(Price(10_000, 50_000, 12_500, 20_000, 250), released="2026-09-01"),
    "claude-mythos-5-1": Model(Price(10_000, 50_000, 12_500, 20_000, 250), released="2026-09-01"),
    "claude-opus-5": Model(Price(5_000, 25_000, 6_250, 10_000, 500), fast=True, released="2026-07-24"),
    "claude-sonnet-5": Model(Price(2_000, 10_000, 2_500, 4_000, 200), released="2026-06-30"),
    "claude-fable-5": Model(Price(10_000, 50_000, 12_500, 20_000, 1_000), released="2026-06-09"),
    "claude-mythos-5": Model(Price(10_000, 50_000, 12_500, 20_000, 1_000), released="2026-06-09"),
    "claude-opus-4-8": Model(Price(5_000, 25_000, 6_250, 10_000, 500), fast=True),
    "claude-opus-4-7": Model(Price(5_000, 25_000, 6_250, 10_000, 500)),
    "claude-opus-4-6": Model(Price(5_000, 25_000, 6_250, 10_000, 500)),
    "claude-sonnet-4-6": Model(Price(3_000, 15_000, 3_750, 6_000, 300)),
    "claude-haiku-4-5-20251001": _before_4_6(Price(1_000, 5_000, 1_250, 2_000, 100), "2025-10-01"),
    "claude-opus-4-5-20251101": _before_4_6(Price(5_000, 25_000, 6_250, 10_000, 500), "2025-11-01"),
    "claude-sonnet-4-5-20250929": _before_4_6(Price(3_000, 15_000, 3_750, 6_000, 300), "2025-09-29"),
}

ALIASES = {
    "claude-haiku-4-5": "claude-haiku-4-5-20251001",
    "claude-opus-4-5": "claude-opus-4-5-20251101",
    "claude-sonnet-4-5": "claude-sonnet-4-5-20250929",
}
"""Until 4.5 an alias was served by, and answered with, a dated id; since 4.6 the dateless id is the model."""


def served_by(model: str) -> str | None:
    """Return the id that answers for `model`, None where there is no such model."""
    model = ALIASES.get(model, model)
    return model if model in MODELS else None


def billed_nano(model: str, usage: "Usage") -> int:
    """Return the bill for one answer or one iteration of it, its tokens of all kinds and its searches, rounded up once.

    `model` is the served one: an id of MODELS.
    """
    return math.ceil(sum(nano_by_kind(model, usage).values()))


def nano_by_kind(model: str, usage: "Usage") -> dict[str, Fraction]:
    """Return the exact cost of each kind of token, and of the searches. A batch's tokens cost half."""
    sold = MODELS[model]
    price = sold.long_price if sold.long_price and usage.prompt_tokens > LONG_PROMPT_TOKENS else sold.price
    factor = Fraction(2 if usage.speed == "fast" else 1) * (Fraction(11, 10) if usage.inference_geo == "us" else 1)
    factor *= Fraction(1, 2) if usage.service_tier == "batch" else 1
    return {
        "input_tokens": usage.input_tokens * price.input * factor,
        "output_tokens": usage.output_tokens * price.output * factor,
        "cache_write_5m_tokens": usage.cache_write_5m_tokens * price.cache_write_5m * factor,
        "cache_write_1h_tokens": usage.cache_write_1h_tokens * price.cache_write_1h * factor,
        "cache_read_tokens": usage.cache_read_tokens * price.cache_read * factor,
        "web_searches": Fraction(usage.web_searches * WEB_SEARCH_NANO),
    }
