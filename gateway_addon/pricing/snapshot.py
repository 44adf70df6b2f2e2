"""Write a price table as text, and read it back: a batch may be settled after the process that read the table.

Promises that a restored table prices every answer exactly as the kept one: fractions stay fractions.
"""

import json
from dataclasses import asdict
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from gateway_addon.pricing.table import LongPrompt, PriceRow, Prices, Rates

_FRACTIONS = ("batch", "geo_us", "web_search_nano", "multiplier")


def kept(prices: Prices) -> str:
    """Return the table as JSON, fractions as text."""
    table = {
        "rows": {model: [asdict(row) for row in rows] for model, rows in prices.rows.items()},
        "starts": dict(prices.starts),
        "aliases": dict(prices.aliases),
        "snapshots": dict(prices.snapshots),
        "checked": prices.checked,
        "digest": prices.digest,
    }
    return json.dumps(table, default=str)


def restored(text: str) -> Prices:
    """Return the table that `kept` wrote."""
    table = json.loads(text)
    return Prices(
        rows=MappingProxyType({model: tuple(_row(row) for row in rows) for model, rows in table["rows"].items()}),
        starts=MappingProxyType({model: tuple(starts) for model, starts in table["starts"].items()}),
        aliases=MappingProxyType(table["aliases"]),
        snapshots=MappingProxyType(table["snapshots"]),
        checked=table["checked"],
        digest=table["digest"],
    )


def _row(values: dict[str, Any]) -> PriceRow:
    long_prompt, fast = values["long_prompt"], values["fast"]
    own = {
        "rates": _rates(values["rates"]),
        "long_prompt": long_prompt and LongPrompt(long_prompt["above_tokens"], _rates(long_prompt["rates"])),
        "fast": None if fast is None else Fraction(fast),
        **{name: Fraction(values[name]) for name in _FRACTIONS},
    }
    if isinstance(values["retired"], bool):  # as it was kept before there were days, and constants of turns, which price nothing
        own |= {"retired": "" if values["retired"] else None, "turn_s_min": values.get("turn_s_min", 0.0)}
    return PriceRow(**{**values, **own})


def _rates(values: dict[str, str]) -> Rates:
    return Rates(**{kind: Fraction(rate) for kind, rate in values.items()})
