"""A simulated Claude API, for `gateway demo` and for every test that needs something to call.

It speaks the real wire format and keeps its own book, from its own counters and its own price list. It imports nothing of
the gateway: that both arrive at the same nano-dollar is the proof of either, and would be worth nothing otherwise.

Read it in this order: behaviour.py (what it can be told to do), messages.py (the wire format), delivery.py (why the bill is
not what was delivered), prices.py and book.py (the bill), server.py (the API), batches.py and
files.py (what it keeps), admin.py (the organisation's reports), http.py (the plumbing).
"""

from .behaviour import Behaviour
from .book import Book, Iteration, Row, Usage
from .server import ADMIN_KEY, KEY, Simulator

__all__ = ["ADMIN_KEY", "KEY", "Behaviour", "Book", "Iteration", "Row", "Simulator", "Usage"]
