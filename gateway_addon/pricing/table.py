"""The price table in force, as frozen values. Rates are exact fractions of nano-dollars per token: never floats."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from gateway_addon.messages import TokenCounts


class PriceError(Exception):
    """A price file that cannot come into force. The message is `file:line: key: sentence`."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars per token, by kind. ($1 per million tokens is 1,000 nano-dollars per token.)"""

    input: Fraction
    output: Fraction
    cache_read: Fraction
    cache_write_5m: Fraction
    cache_write_1h: Fraction

    def times(self, factor: Fraction) -> "Rates":
        return Rates(
            self.input * factor,
            self.output * factor,
            self.cache_read * factor,
            self.cache_write_5m * factor,
            self.cache_write_1h * factor,
        )

    def price(self, tokens: TokenCounts, *, hour_ttl: bool) -> Fraction:
        """Return the tokens' unrounded price in nano-dollars. `hour_ttl`: writes of unreported lifetime count as 1h."""
        billed = (
            (self.input, tokens.input_tokens),
            (self.output, tokens.output_tokens),
            (self.cache_read, tokens.cache_read_tokens),
            (self.cache_write_5m, tokens.cache_write_5m_tokens),
            (self.cache_write_1h, tokens.cache_write_1h_tokens),
            (self.cache_write_1h if hour_ttl else self.cache_write_5m, tokens.cache_write_unsplit_tokens),
        )
        whole, rest = 0, Fraction(0)
        for rate, count in billed:
            if count and rate.denominator == 1:
                whole += rate.numerator * count  # nearly all prices are whole, and fractions are slow
            elif count:
                rest += rate * count
        return whole + rest


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """Other rates for every token of a request, output too, whose prompt is longer than `above_tokens`."""

    above_tokens: int
    rates: Rates


@dataclass(frozen=True, slots=True)
class PriceRow:
    """One model's prices from one day on, with all that pricing and quoting need to know of the model."""

    model: str
    since: str | None
    """The first day (UTC, `YYYY-MM-DD`); None: since the model exists. A model's first row also covers any earlier day."""
    rates: Rates
    """List price: standard speed, any region but US-only, before the operator's multiplier."""
    long_prompt: LongPrompt | None
    fast: Fraction | None
    """Factor of `speed: fast` on every kind of token; None where the model has no such price."""
    batch: Fraction
    geo_us: Fraction
    geo: bool
    """Whether the model takes `inference_geo` (from 4.6 on; older ones refuse the parameter)."""
    web_search_nano: Fraction
    multiplier: Fraction
    """The operator's factor on everything that is billed."""
    context_tokens: int
    output_tokens_max: int
    high_resolution: bool
    """Images cost up to 4,784 tokens (from 4.7 on), else up to 1,568."""
    output_tokens_per_second_max: int
    lag_s: float
    turn_s_min: float
    """The least time that one use of a tool at the provider and the turn that reads its result take together."""
    assumed: bool
    """The three constants above are this project's generous assumption, not a published figure."""
    source: str
    retired: str | None = None
    """The day (UTC) from which the provider serves the model no more; `""` where that is long past, None where none is known."""
    fast_retired: str | None = None
    """The day (UTC) from which the model has no fast mode any more; as `retired`."""

    @property
    def name(self) -> str:
        """Return the row's name in reports and in the ledger: `claude-sonnet-5-5@2026-10-07`."""
        return f"{self.model}@{self.since}" if self.since else self.model


FOUND_MAX = 1_000
_DATED = re.compile(r"(.+)-20[0-9]{6}")


@dataclass(frozen=True, slots=True)
class Prices:
    """A snapshot of the whole table. A call is quoted and priced by the one in force when it was admitted."""

    rows: Mapping[str, tuple[PriceRow, ...]]
    """By model id, each tuple in the order of its dates."""
    starts: Mapping[str, tuple[float, ...]]
    """Unix seconds at which the rows begin, beside `rows`."""
    aliases: Mapping[str, str]
    snapshots: Mapping[str, str]
    """The dated id that a model's dateless name stands for, where that name may move."""
    checked: str
    """The day on which the shipped table was last held against its sources."""
    digest: str
    """SHA-256 of the files it was read from."""
    _found: dict[str, str | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Ids that `canonical` has found, by names as clients write them; each call asks several times."""

    def models(self) -> tuple[str, ...]:
        """Return the ids of all models that have a price, retired ones included."""
        return tuple(self.rows)

    def canonical(self, model: str) -> str | None:
        """Return the table's id for a model id as clients and responses write it; None where there is no price.

        Rules, in this order: Claude Code's display suffix `[1m]` goes; an exact id; an alias; an id with the date of its
        snapshot (`-YYYYMMDD`) is its dateless model. Nothing else: no prefixes, no dots for dashes, no nearest match, because
        an id that is not known for certain must not get the price of another.
        """
        if model in self._found:
            return self._found[model]
        name = model.removesuffix("[1m]")
        if name not in self.rows and name not in self.aliases and (dated := _DATED.fullmatch(name)):
            name = dated[1]
        name = self.aliases.get(name, name)
        found = name if name in self.rows else None
        if len(self._found) < FOUND_MAX:  # an app can make names up without end
            self._found[model] = found
        return found

    def moves(self, model: str) -> bool:
        """Return whether the provider may move this name to another snapshot: `-latest`, dateless names of dated models."""
        name = model.removesuffix("[1m]")
        return name in self.aliases or (name in self.snapshots and not _DATED.fullmatch(name))

    def snapshot(self, model: str) -> str | None:
        """Return the dated id that a moving name stands for, with Claude Code's suffix kept; None where none is known."""
        name = self.canonical(model)
        dated = None if name is None else self.snapshots.get(name)
        return dated and dated + ("[1m]" if model.endswith("[1m]") else "")

    def row(self, model: str, at: float) -> PriceRow | None:
        """Return the row that prices `model` at `at` (unix seconds), or None: no price is not a price of zero."""
        name = self.canonical(model)
        if name is None:
            return None
        current = self.rows[name][0]
        for start, row in zip(self.starts[name], self.rows[name], strict=True):
            if start <= at:
                current = row
        return current
