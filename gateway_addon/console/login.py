"""Let in the browser that opens a link of the terminal, once, then its cookie; keep the changes that it is asked to confirm.

Promises that a link and a confirmation work once and for ten minutes, that a cookie is always one made here, and that nothing secret is
compared in a time that tells how much of it was right. Pure: the time comes as an argument.
"""

import hashlib
import hmac
import secrets
from collections import deque
from dataclasses import dataclass, field
from threading import Lock

from gateway_addon.console.actions import AskedChange

LINK_S = 600
SESSION_S = 12 * 3600
ASKED_MAX = 50
TRIES_PER_MINUTE = 20


@dataclass(slots=True)
class Tries:
    """The attempts of the last minute, and how many there may be."""

    at: deque[float] = field(default_factory=lambda: deque(maxlen=TRIES_PER_MINUTE))

    def too_many(self, monotonic_s: float) -> bool:
        """Count an attempt; True where there were too many already."""
        if len(self.at) == TRIES_PER_MINUTE and self.at[0] > monotonic_s - 60:
            return True
        self.at.append(monotonic_s)
        return False


@dataclass(slots=True)
class LoginSession:
    ends_monotonic_s: float
    asked: dict[str, tuple[AskedChange, float]] = field(default_factory=dict, repr=False)
    """Changes to confirm, each under its word, with the moment until which it may be."""


@dataclass(slots=True)
class Login:
    """The login of one console, made anew with each start."""

    opened_monotonic_s: float
    link: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    wrong: Tries = field(default_factory=Tries)
    changes: Tries = field(default_factory=Tries)
    one_by_one: Lock = field(default_factory=Lock, repr=False)
    """Held while a link is looked at and taken: two requests at once would both find it unused."""
    _sessions: dict[str, LoginSession] = field(default_factory=dict, repr=False)

    def enter(self, link: str, monotonic_s: float, other_digest: str = "") -> str | None:
        """Return a cookie for the bearer of the link, or of the other one that has this digest; None for a wrong, used or old link."""
        is_young = bool(self.link) and monotonic_s <= self.opened_monotonic_s + LINK_S
        good = hmac.compare_digest(link.encode(), self.link.encode()) and is_young
        if not good and not hmac.compare_digest(digest(link).encode(), other_digest.encode()):
            return None
        if good:
            self.link = ""
        cookie = secrets.token_urlsafe(32)
        self._sessions[cookie] = LoginSession(monotonic_s + SESSION_S)
        return cookie

    def session(self, cookie: str, monotonic_s: float) -> LoginSession | None:
        """Return the session of a cookie; None where it has none, or it has ended."""
        found = [each for known, each in [*self._sessions.items()] if hmac.compare_digest(cookie.encode(), known.encode())]
        return found[0] if found and monotonic_s <= found[0].ends_monotonic_s else None


def ask(session: LoginSession, change: AskedChange, monotonic_s: float) -> str:
    """Keep a change to be confirmed; returns its word. The oldest are forgotten."""
    word = secrets.token_urlsafe(32)
    session.asked[word] = (change, monotonic_s + LINK_S)
    while len(session.asked) > ASKED_MAX:
        del session.asked[next(iter(session.asked))]
    return word


def confirmed(session: LoginSession, word: str, monotonic_s: float) -> AskedChange | None:
    """Return the change that a word confirms, once; None for a word that is wrong, used or too old."""
    key = next((known for known in [*session.asked] if hmac.compare_digest(word.encode(), known.encode())), None)
    change, until = session.asked.pop(key, (None, 0.0)) if key is not None else (None, 0.0)
    return change if monotonic_s <= until else None


def digest(link: str) -> str:
    return hashlib.sha256(link.encode()).hexdigest()
