"""Prices as data and what a call costs by them. values.py: the table; loading.py: prices.yaml -> the table; costing.py: usage -> cost;
snapshot.py: the table as text, for what is settled long after its admission."""

from gateway_addon.pricing.costing import FLAGS, Cost, PricedPart, cost, rates
from gateway_addon.pricing.loading import LISTED_BY, load
from gateway_addon.pricing.snapshot import kept, restored
from gateway_addon.pricing.table import LongPrompt, PriceError, Prices, Rates, Row

__all__ = [
    "FLAGS",
    "LISTED_BY",
    "Cost",
    "LongPrompt",
    "PriceError",
    "PricedPart",
    "Prices",
    "Rates",
    "Row",
    "cost",
    "kept",
    "load",
    "rates",
    "restored",
]
