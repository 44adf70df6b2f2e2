"""Requests without a valid token, by address: how many answers of its own each one gets in a minute.

Promises bounded memory, however many addresses ask. Whoever has a valid token is never asked about here: the token is checked first, so
noise from a shared address (a NAT, a neighbour on this machine) locks nobody out. Pure: no clock, no storage.
"""

FAILURES_PER_MINUTE = 60
ADDRESSES_MAX = 10_000


class FailedAuthenticationThrottle:
    """The failures of the running minute. One process's: several workers each count what they see."""

    def __init__(self) -> None:
        self._minute = 0
        self._failures: dict[str, int] = {}

    def too_much(self, address: str, monotonic_s: float) -> bool:
        """Count one failure of an address; True once it has had its answers of this minute.

        Beyond the addresses that are told apart, new ones share one count: whoever sends from ever new addresses gains nothing.
        """
        minute = int(monotonic_s) // 60
        if minute != self._minute:
            self._minute, self._failures = minute, {}
        counted = address if address in self._failures or len(self._failures) < ADDRESSES_MAX else ""
        self._failures[counted] = self._failures.get(counted, 0) + 1
        return self._failures[counted] > FAILURES_PER_MINUTE
