"""Response bytes -> `Usage`: JSON, SSE and batch results. Sans-IO, incremental, never raising on content.

values.py is what comes out, merge.py the rules by which objects of the API add up, meter.py the bytes of one response,
batch_results.py those of a batch's results. None of it knows prices.
"""

from gateway_addon.messages.batch_results import BatchMeter, BatchResult
from gateway_addon.messages.meter import Meter, json_object
from gateway_addon.messages.usage import TokenCounts, Usage, UsagePart

__all__ = ["BatchMeter", "BatchResult", "Meter", "TokenCounts", "Usage", "UsagePart", "json_object"]
