"""Judge whether the real key may be rotated: every token has called, every consumer is switched.

Pure: the ledger's calls and the files as they are now, in; the reasons against rotating, out. Rotating breaks every consumer that was
missed, so it comes last: a doubt counts as a reason until a person says otherwise (`gateway cutover --accept PATH`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gateway_addon.ledger.reports.token_usage import Arrival
from gateway_addon.names import PROGRAM, argument
from gateway_addon.onboarding.inventory import Consumer

NO_CALLERS = frozenset({"document", "example", "recording"})
"""Kinds of file that may show a key and call nobody."""
DOUBTS = {
    "direct": "calls the provider with a key of its own",
    "half switched": "names the gateway and still holds the provider's key or address",
    "environment": "takes its key from where it runs",
}


@dataclass(frozen=True, slots=True)
class FileToday:
    """A file of the inventory as it is today: its consumers, none if it is gone, or the sentence why it cannot be read."""

    path: str
    consumers: tuple[Consumer, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class OpenReason:
    """One reason not to rotate yet: what it is about, what is wrong, the way out."""

    subject: str
    problem: str
    way_out: str


def unseen(arrivals: Iterable[Arrival]) -> list[OpenReason]:
    """Return the tokens in force that have never called, or were only ever refused."""
    found = []
    for token in arrivals:
        name = f"app {token.app}, token {token.token_id}" + (f" ({token.label})" if token.label else "")
        if token.state == "in force" and not token.calls:
            way_out = f"switch the app, or if nobody has this token: {PROGRAM} token revoke {token.app} --id {token.token_id}"
            found.append(OpenReason(name, "has never called", way_out))
        elif token.state == "in force" and token.calls == token.refused:
            found.append(OpenReason(name, "has called, and was refused each time", f"{PROGRAM} report --by token shows why"))
    return found


def unaccounted(files: Iterable[FileToday], arrivals: Sequence[Arrival], accepted: Iterable[str]) -> list[OpenReason]:
    """Return the consumers that are not switched or hold a token not in force, unless a person accepted them."""
    good = {token.digest[:12] for token in arrivals if token.state == "in force"}
    exempt = tuple(accepted)
    found = []
    for file in files:
        if any(is_in(file.path, path) for path in exempt):
            continue
        if file.problem is not None:
            found.append(OpenReason(file.path, file.problem, f"look at it, then: {PROGRAM} cutover --accept {argument(file.path)}"))
        found += [each for consumer in file.consumers if (each := _doubt(consumer, good)) is not None]
    return found


def is_in(path: str, place: str) -> bool:
    """Return whether a file is this one, or lies in this folder (both absolute)."""
    return path == place or path.startswith(f"{place.rstrip('/')}/")


def tally(files: Iterable[FileToday]) -> Mapping[str, int]:
    """Count the consumers by state; a file that is gone, or calls nobody any more, counts as `no longer one`."""
    counts: dict[str, int] = {}
    for file in files:
        for state in [consumer.state for consumer in file.consumers] or ["unreadable" if file.problem else "no longer one"]:
            counts[state] = counts.get(state, 0) + 1
    return counts


def _doubt(consumer: Consumer, good_tokens: set[str]) -> OpenReason | None:
    place = f"{consumer.path}:{consumer.line}"
    if consumer.kind in NO_CALLERS or consumer.switch.startswith("stays"):
        return None
    if consumer.state in DOUBTS:
        return OpenReason(place, f"({consumer.kind}) {DOUBTS[consumer.state]}", consumer.switch)
    tokens = [key for key in consumer.keys if key.startswith("gwt_")]
    if consumer.state == "switched" and any(token.rpartition("…")[2] not in good_tokens for token in tokens):
        return OpenReason(place, f"({consumer.kind}) holds a token that is not in force here", f"{PROGRAM} token issue APP")
    return None
