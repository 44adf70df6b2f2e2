"""The demo's proof: the gateway's ledger beside the simulated API's own book, call by call, and every cap at every moment.

The book was written by a program that shares no code with the gateway's meter, prices or ledger, from its own counters; that
both say the same is evidence for both. Pure: values in, findings out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway_addon.ledger.reports.entry_history import Forwarded, HighWater
from gateway_addon.money import dollars
from gateway_addon.policy import Cap
from gateway_addon.simulator import Row


class Finding(NamedTuple):
    """One thing proved, or not."""

    holds: bool
    sentence: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One call in both books. Either side is None where that book does not know it."""

    request_id: str
    call: Forwarded | None
    billed: Row | None

    @property
    def surplus_nano(self) -> int:
        """Return the amount that the ledger booked beyond the bill."""
        return (self.call.spent_nano if self.call else 0) - (self.billed.billed_nano if self.billed else 0)


def pairs(calls: Iterable[Forwarded], book: Iterable[Row]) -> list[Pair]:
    """Return the messages of both books, brought together by the request id that the API gave each."""
    ours = {call.request_id or f"call {call.call_id}": call for call in calls if call.endpoint == "messages"}
    theirs = {row.request_id: row for row in book if row.message_id is not None}
    return [Pair(request_id, ours.get(request_id), theirs.get(request_id)) for request_id in ours | theirs]


def same_calls(both: Sequence[Pair]) -> Finding:
    alone = [pair.request_id for pair in both if pair.call is None or pair.billed is None]
    if alone:
        return Finding(False, f"{len(alone)} calls stand in one book only: {', '.join(alone)}")
    return Finding(True, f"The same {len(both)} calls stand in both books.")


def exact(both: Sequence[Pair]) -> Finding:
    """Prove that calls whose whole usage was reported are booked exactly."""
    known = [pair for pair in both if pair.call and pair.billed and not pair.call.estimated]
    wrong = [f"{pair.request_id} by {pair.surplus_nano:+,} nano-dollars" for pair in known if pair.surplus_nano or _open(pair)]
    if wrong:
        return Finding(False, f"{len(wrong)} of {len(known)} calls differ: {'; '.join(wrong)}")
    total_nano = sum(pair.call.spent_nano for pair in known if pair.call)
    return Finding(True, f"{len(known)} of them were reported whole, and agree to the nano-dollar: {dollars(total_nano, 9)}.")


def estimated(both: Sequence[Pair]) -> Finding:
    """Prove that calls whose end nobody reported are booked at an upper bound."""
    unknown = [pair for pair in both if pair.call and pair.billed and pair.call.estimated]
    below = [f"{pair.request_id} by {-pair.surplus_nano:,} nano-dollars" for pair in unknown if pair.surplus_nano < 0]
    if below:
        return Finding(False, f"{len(below)} estimated calls were billed more than booked: {'; '.join(below)}")
    surplus_nano = sum(pair.surplus_nano for pair in unknown)
    return Finding(True, f"{len(unknown)} broken off in the middle: booked {dollars(surplus_nano)} above what was billed, never below.")


def nothing_else(calls: Sequence[Forwarded], book: Sequence[Row]) -> Finding:
    """Prove that refused calls left no trace at the API: not one request arrived that was not admitted."""
    if len(calls) != len(book):
        return Finding(False, f"{len(calls)} calls were let through, but {len(book)} requests arrived at the API")
    return Finding(True, f"Of all that was refused, nothing reached the API: {len(calls)} requests let through, {len(book)} arrived.")


def one_key(book: Sequence[Row], key: str) -> Finding:
    """Prove that the API saw the real key alone: no app holds it, and no app's token went out."""
    wrong = [row.request_id for row in book if row.header("x-api-key") != key or row.header("authorization") or "gwt_" in str(row.headers)]
    if wrong:
        return Finding(False, f"{len(wrong)} requests carried another credential than the key: {', '.join(wrong)}")
    return Finding(True, "Each of them carried the real key, which no app has, and no app's token.")


def no_cap_passed(caps: Iterable[Cap], levels: Iterable[HighWater]) -> Finding:
    """Prove that no cap was ever passed, by what was spent and held together after each entry that was written."""
    amounts: dict[tuple[str, str], int] = {(cap.scope, cap.window): cap.amount_nano for cap in caps}
    capped = [(level, amounts[level.scope, level.window]) for level in levels if (level.scope, level.window) in amounts]
    passed = [f"{level.scope} {level.window} reached {dollars(level.nano)} of {dollars(cap)}" for level, cap in capped if level.nano > cap]
    if passed:
        return Finding(False, f"A cap was passed: {'; '.join(passed)}")
    nearest = ", ".join(f"{level.scope.removeprefix('app:')} {dollars(level.nano)} of {dollars(cap)}" for level, cap in capped)
    return Finding(True, f"No cap was passed, spent and held together, at any moment. The highest ever: {nearest}.")


def sound(findings: Sequence[str]) -> Finding:
    """Return the findings of `gateway doctor` in the ledger."""
    proved = "The ledger proves itself: balances, bills and reservations follow from its entries."
    return Finding(not findings, "; ".join(findings) or proved)


def _open(pair: Pair) -> bool:
    return pair.call is not None and pair.call.state == "open"
