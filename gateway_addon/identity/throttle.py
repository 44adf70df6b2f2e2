"""Limit requests without a valid token: each address gets so many distinct answers in a minute.

Promises bounded memory, however many addresses ask. A request with a valid token never reaches it: the token is checked first, so
failures from a shared address (a NAT, a neighbour on this machine) lock nobody out. Pure: no clock, no storage.
"""

FAILURES_PER_MINUTE = 60
ADDRESSES_MAX = 10_000


class FailedAuthenticationThrottle:
    """Count the failures of the current minute. Each worker process counts its own."""

    def __init__(self) -> None:
        self._minute = 0
        self._failures: dict[str, int] = {}

    def too_much(self, address: str, monotonic_s: float) -> bool:
        """Count one failure of an address; True once it has had its answers of this minute.

        When too many addresses are counted, new ones share one count: sending from ever new addresses gains nothing.
        """
        minute = int(monotonic_s) // 60
        if minute != self._minute:
            self._minute, self._failures = minute, {}
        counted = address if address in self._failures or len(self._failures) < ADDRESSES_MAX else ""
        self._failures[counted] = self._failures.get(counted, 0) + 1
        return self._failures[counted] > FAILURES_PER_MINUTE
