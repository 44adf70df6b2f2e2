"""Prices as data, and the cost of a call. table.py: the table; loading.py: prices.yaml -> the table; costing.py: usage -> cost;
snapshot.py: the table as text, for what is settled long after its admission; retirement.py: when models end."""

from gateway_addon.pricing.costing import FLAGS, Cost, PricedPart, cost, rates
from gateway_addon.pricing.loading import LISTED_BY, load
from gateway_addon.pricing.retirement import Retirement, retired, retirements
from gateway_addon.pricing.snapshot import kept, restored
from gateway_addon.pricing.table import LongPrompt, PriceError, PriceRow, Prices, Rates

__all__ = [
    "FLAGS",
    "LISTED_BY",
    "Cost",
    "LongPrompt",
    "PriceError",
    "PriceRow",
    "PricedPart",
    "Prices",
    "Rates",
    "Retirement",
    "cost",
    "kept",
    "load",
    "rates",
    "restored",
    "retired",
    "retirements",
]
