"""Read the filters of the list of calls from its address, sort and total what was found, and write it for other programs. Pure.

Promises that a text chosen by a client cannot become a formula in a spreadsheet.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway_addon.console.ranges import Range
from gateway_addon.ledger.reports.call_detail import NEWEST, STATES, CallFilter, CallRow
from gateway_addon.money import dollars, parse_nano

PAGE = 50
SORTS: dict[str, tuple[str, Callable[[CallRow], Any]]] = {
    "call": ("Call", lambda call: call.id),
    "when": ("When", lambda call: call.started_at),
    "app": ("App", lambda call: call.app),
    "model": ("Model", lambda call: call.model_asked or ""),
    "state": ("State", lambda call: (call.state, call.refusal or "")),
    "took": ("Took", lambda call: -1.0 if call.took_s is None else call.took_s),
    "spent": ("Spent", lambda call: call.spent_nano),
    "held": ("Held", lambda call: call.held_nano),
}
FILTERS = ("app", "model", "state", "refusal", "token", "text", "least", "most")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A filter, the order and the place in the list; `given` are the filters as they were typed."""

    filter: CallFilter
    given: dict[str, str]
    sort: str
    descending: bool
    page: int

    @property
    def is_newest(self) -> bool:
        """Tell whether the list begins with the newest call."""
        return (self.sort, self.descending, self.page) == ("when", True, 1)


@dataclass(frozen=True, slots=True)
class Totals:
    calls: int
    refused: int
    spent_nano: int
    held_nano: int


def read(asked: Mapping[str, str], within: Range) -> Wanted:
    """Return what an address asks for. Raises ValueError with a sentence."""
    given = {name: asked.get(name, "").strip() for name in FILTERS}
    if given["state"] not in ("", *STATES):
        raise ValueError(f"No call is in a state {given['state'][:40]!r}; there are {', '.join(STATES)}.")
    least, most = (parse_nano(given[name]) if given[name] else None for name in ("least", "most"))
    token = _number(given["token"].removeprefix("#"), "token") if given["token"] else None
    at, _, below = asked.get("before", "").partition("-")
    until, below_id = (_moment(at), _number(below or "0", "call")) if at else (float(within.until), 0)
    chosen = CallFilter(
        given["app"], given["model"], given["state"], given["refusal"], token, given["text"],
        within.since, min(until, within.until), below_id, least, most,
    )  # fmt: skip
    sort = asked.get("sort", "when")
    if sort not in SORTS:
        raise ValueError(f"Calls are not sorted by {sort[:40]!r}; columns are {', '.join(SORTS)}.")
    typed = {name: text for name, text in given.items() if text}
    return Wanted(chosen, typed, sort, asked.get("order") != "up", max(1, _number(asked.get("page", "1"), "page")))


def ordered(calls: Sequence[CallRow], wanted: Wanted) -> tuple[CallRow, ...]:
    """Return the calls sorted; those that are equal keep their order, the newest first."""
    return tuple(sorted(calls, key=SORTS[wanted.sort][1], reverse=wanted.descending))


def totals(calls: Iterable[CallRow]) -> Totals:
    found = list(calls)
    refused = sum(each.state == "refused" for each in found)
    return Totals(len(found), refused, sum(each.spent_nano for each in found), sum(each.held_nano for each in found))


def as_csv(calls: Iterable[CallRow]) -> Iterator[str]:
    """Yield the lines of a CSV file: amounts in dollars and in nano-dollars, times as unix seconds."""
    for number, call in enumerate(calls):
        facts = _facts(call)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(facts), lineterminator="\n")
        if number == 0:
            writer.writeheader()
        writer.writerow({name: _harmless(value) for name, value in facts.items()})
        yield text.getvalue()


def as_json(calls: Iterable[CallRow]) -> Iterator[str]:
    """Yield a JSON list piece by piece."""
    start = "["
    for call in calls:
        yield f"{start}\n{json.dumps(_facts(call))}"
        start = ","
    yield "[]\n" if start == "[" else "\n]\n"


def _facts(call: CallRow) -> dict[str, Any]:
    facts = {name: getattr(call, name) for name in CallRow.__slots__}
    return facts | {"at_most": call.at_most, "spent": dollars(call.spent_nano), "held": dollars(call.held_nano)}


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _number(text: str, what: str) -> int:
    if not text.isdecimal() or not text.isascii() or len(text) > 19:
        raise ValueError(f"{text[:40]!r} is no number of a {what}.")
    return min(int(text), NEWEST)


def _moment(text: str) -> float:
    try:
        at = float(text)
    except ValueError:
        at = -1.0
    if not at >= 0:
        raise ValueError(f"{text[:40]!r} is no time: follow the link to older calls.")
    return min(at, float(NEWEST))
