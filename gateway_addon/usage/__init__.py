"""Response bytes -> `Usage`: JSON, SSE and batch results. Sans-IO, incremental, never raising on content.

values.py is what comes out, message.py the rules by which objects of the API add up, meter.py the bytes of one response,
batch.py those of a batch's results. None of it knows prices.
"""

from gateway_addon.usage.batch import BatchMeter, BatchResult
from gateway_addon.usage.meter import Meter, json_object
from gateway_addon.usage.values import Part, Tokens, Usage

__all__ = ["BatchMeter", "BatchResult", "Meter", "Part", "Tokens", "Usage", "json_object"]
