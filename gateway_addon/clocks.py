"""Both kinds of time, told apart by name.

Promises that `monotonic_s` never steps and goes on while the machine sleeps: it paces streams, and measures deadlines, timeouts
and drains. `now` is what the calendar says, in unix seconds, and may step either way: windows, rows and prices alone go by it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # a provider does not sleep when this machine does


monotonic_s: Callable[[], float] = partial(time.clock_gettime, _STEADY)
"""Returns the seconds since some fixed moment, the machine's sleep included."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """The two clocks of one process."""

    now: Callable[[], float] = time.time
    """Unix seconds."""
    monotonic_s: Callable[[], float] = monotonic_s


SYSTEM = Clocks()
