"""Read the Messages API on the wire: requests into parsed ones, response bytes into `Usage`. Sans-IO, never raising on a
response's content.

request.py, scan.py and schema.py read a request; meter.py the bytes of one response, batch_results.py those of a batch's
results, merge.py adds the API's objects up, usage.py is the outcome. None of it knows prices.
"""

from gateway_addon.messages.batch_results import BatchMeter, BatchResult
from gateway_addon.messages.meter import Meter, json_object
from gateway_addon.messages.usage import TokenCounts, Usage, UsagePart

__all__ = ["BatchMeter", "BatchResult", "Meter", "TokenCounts", "Usage", "UsagePart", "json_object"]
