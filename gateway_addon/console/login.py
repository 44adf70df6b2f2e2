"""Let in the browser that opens the link on the terminal, once, and then its cookie.

Promises that a link works once and for ten minutes, and that nothing secret is compared in a time that tells how much of it was
right. Pure: the time comes as an argument.
"""

import hmac
import secrets
from dataclasses import dataclass, field

LINK_S = 600
SESSION_S = 12 * 3600


@dataclass(slots=True)
class Login:
    """The login of one console, made anew with each start."""

    opened_monotonic_s: float
    link: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    _sessions: dict[str, float] = field(default_factory=dict, repr=False)
    """Cookie -> the moment at which it ends."""

    def enter(self, link: str, monotonic_s: float) -> str | None:
        """A cookie for whoever brings the link; None where it is wrong, used or too old."""
        good = bool(self.link) and hmac.compare_digest(link.encode(), self.link.encode())
        if not good or monotonic_s > self.opened_monotonic_s + LINK_S:
            return None
        self.link = ""
        cookie = secrets.token_urlsafe(32)
        self._sessions[cookie] = monotonic_s + SESSION_S
        return cookie

    def knows(self, cookie: str, monotonic_s: float) -> bool:
        return any(hmac.compare_digest(cookie.encode(), known.encode()) and monotonic_s <= until for known, until in self._sessions.items())
