"""The ledger beside the provider's own reports: how far they agree, what bypassed the gateway, and what estimates really cost.

Pure: values in, values out. Days are UTC days (whole days since 1970), as the provider reports them.

**What bypassed.** On a day the provider counted P tokens of a kind and model. The gateway can account for: its exactly metered
calls of that day, the upper bounds of its estimated ones, and calls that began the day before and ended in this one (the
provider may date them either way). What is left was paid for by this organisation and never passed the gateway.

**What estimates really cost.** All that the provider billed on a day, without what exactly metered calls account for, priced at
the dearest rates that the report allows, is the most that the day's estimated calls can have cost together, bypassing calls
included. Where more than that is booked for them, the difference was never spent, and is taken off them in proportion, none below
its exactly known input. Nothing is ever added, and nothing is concluded from a day that may still be filling, that holds a model
without a price, or whose report lacks tokens the gateway metered exactly (then it is not a report on the gateway's key).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import date, timedelta
from fractions import Fraction
from typing import Self

from gateway_addon.ledger.reports.provider_comparison import DAY_S, Estimate, Metered
from gateway_addon.messages import TokenCounts
from gateway_addon.money import cents
from gateway_addon.pricing import Prices, rates

_EPOCH = date(1970, 1, 1)
COMPLETE_AFTER_S = 3600
"""Reports are some five minutes late; an hour after its end a day is taken as complete."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Billed tokens by kind, and last the searches, of several calls."""

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    web_searches: int = 0

    def __add__(self, other: Self) -> "Counts":
        return Counts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def without(self, other: Self) -> "Counts":
        """What is left of each kind, nothing below zero."""
        return Counts(*(max(0, mine - theirs) for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def tokens(self) -> int:
        tokens: tuple[int, ...] = astuple(self)[:-1]
        return sum(tokens)

    def covers(self, other: Self) -> bool:
        return all(mine >= theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))


KINDS = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True, slots=True)
class Reported:
    """What the provider counted on a day, for one model, key, speed and region."""

    day: int
    model: str
    key_id: str
    speed: str | None
    inference_geo: str | None
    counts: Counts


@dataclass(frozen=True, slots=True)
class Charged:
    """What the provider charges for a day, or a part of that."""

    day: int
    nano: int


@dataclass(frozen=True, slots=True)
class ReconcileLine:
    """One day, model and kind. `exact` and `estimated` are the gateway's; `carried` of the day before may be dated here."""

    day: int
    model: str
    kind: str
    provider: int
    exact: int
    estimated: int
    carried: int

    @property
    def gateway(self) -> int:
        return self.exact + self.estimated

    @property
    def unseen(self) -> int:
        """What the provider saw and the gateway did not."""
        return max(0, self.provider - self.gateway - self.carried)


@dataclass(frozen=True, slots=True)
class Correction:
    """Estimated calls of one day that cost less than was booked: [(call_id, what to add)], each below zero."""

    day: int
    booked_nano: int
    at_most_nano: int
    deltas: tuple[tuple[int, int], ...]

    @property
    def why(self) -> str:
        return f"reconcile: the provider's report leaves at most {cents(self.at_most_nano)} for the estimated calls of this day"


def compare(reported: Iterable[Reported], metered: Iterable[Metered], prices: Prices) -> list[ReconcileLine]:
    """Line by line, by day, model and kind; only those in which either side counted anything."""
    metered = list(metered)
    sums: dict[str, dict[tuple[int, str], Counts]] = {"provider": {}, "exact": {}, "estimated": {}, "carried": {}}

    def add(column: str, day: int, model: str, counts: Counts) -> None:
        key = (day, prices.canonical(model) or model)
        sums[column][key] = sums[column].get(key, Counts()) + counts

    for each in reported:
        add("provider", each.day, each.model, each.counts)
    for part in metered:
        add("estimated" if part.estimated else "exact", part.day, part.model, _counts(part))
        if part.ended_day != part.day:
            add("carried", part.ended_day, part.model, _counts(part))
    lines = [
        ReconcileLine(day, model, kind, **{name: getattr(column.get((day, model), Counts()), kind) for name, column in sums.items()})
        for day, model in sorted(set().union(*sums.values()))
        for kind in KINDS
    ]
    return [line for line in lines if line.provider or line.gateway]


def agreement_percent(pairs: Iterable[tuple[int, int]]) -> float | None:
    """Of all that either side counted, what both counted. None where there was nothing."""
    pairs = list(pairs)
    of = sum(max(pair) for pair in pairs)
    return 100 * sum(min(pair) for pair in pairs) / of if of else None


def worth_nano(lines: Iterable[ReconcileLine], prices: Prices) -> int:
    """What the unseen tokens cost, about: at list prices, their tier and region not being known. Models without a price count 0."""
    total = Fraction(0)
    for line in lines:
        if line.unseen and (row := prices.row(line.model, line.day * DAY_S)) is not None:
            counts = Counts(**{line.kind: line.unseen})
            total += row.rates.price(_tokens(counts), hour_ttl=False) + counts.web_searches * row.web_search_nano
    return math.ceil(total)


def bypassing(lines: Iterable[ReconcileLine], estimates: Sequence[Estimate], prices: Prices) -> list[ReconcileLine]:
    """The lines with tokens that only a call past the gateway explains.

    Left out are days on which it forwarded calls whose tokens it never saw (their answers were lost), and booked no less for them
    than what was unseen is worth.
    """
    unseen = [line for line in lines if line.unseen]
    found = []
    for day in sorted({line.day for line in unseen}):
        of_day = [line for line in unseen if line.day == day]
        blind_nano = sum(each.spent_nano for each in estimates if not each.metered_nano and day in (each.day, each.ended_day))
        if worth_nano(of_day, prices) > blind_nano or blind_nano == 0:
            found += of_day
    return found


def corrections(
    reported: Sequence[Reported], metered: Sequence[Metered], estimates: Sequence[Estimate], prices: Prices, *, now: float
) -> tuple[list[Correction], list[str]]:
    """What may be taken off the estimated calls, by day, and a sentence for each day that proves nothing."""
    found, silent = [], []
    for day in sorted({each.day for each in estimates}):
        inside = [each for each in estimates if each.day == day == each.ended_day]
        of_day = [each for each in reported if each.day == day]
        exact = [part for part in metered if part.day == day == part.ended_day and not part.estimated]
        at_most = None
        if (day + 1) * DAY_S + COMPLETE_AFTER_S > now:
            silent.append(f"{written(day)}: the provider's report is not complete yet")
        elif not exact or not _covered(of_day, exact, prices):
            silent.append(f"{written(day)}: the report does not hold the calls that the gateway metered exactly, so it is not evidence")
        else:
            at_most = _remainder_nano(of_day, exact, prices, day)
            if at_most is None:
                silent.append(f"{written(day)}: the report holds a model without a price")
        booked_nano = sum(each.spent_nano for each in inside)
        if at_most is not None and at_most < booked_nano:
            deltas = _shares(inside, at_most, prices, day)
            if deltas:
                found.append(Correction(day, booked_nano, at_most, deltas))
    return found, silent


def written(day: int) -> str:
    """The date of a day (`2026-11-24`)."""
    return str(_EPOCH + timedelta(days=day))


def _covered(reported: Sequence[Reported], exact: Sequence[Metered], prices: Prices) -> bool:
    """Whether the report holds at least all that was metered exactly."""
    theirs, ours = _by_model(reported, prices), _by_model(exact, prices)
    return all(theirs.get(model, Counts()).covers(counts) for model, counts in ours.items())


def _by_model(parts: Sequence[Reported] | Sequence[Metered], prices: Prices) -> dict[str, Counts]:
    sums: dict[str, Counts] = {}
    for part in parts:
        model = prices.canonical(part.model) or part.model
        sums[model] = sums.get(model, Counts()) + (part.counts if isinstance(part, Reported) else _counts(part))
    return sums


def _remainder_nano(reported: Sequence[Reported], exact: Sequence[Metered], prices: Prices, day: int) -> int | None:
    """The most that everything but the exact calls of a day can have cost; None where a model has no price."""
    ours = _by_model(exact, prices)
    total = Fraction(0)
    for model, counts in _by_model(reported, prices).items():
        left = counts.without(ours.get(model, Counts()))
        if left == Counts():
            continue
        modes = {(each.speed, each.inference_geo) for each in reported if (prices.canonical(each.model) or each.model) == model}
        dearest = _dearest_nano(left, model, prices, day, modes)
        if dearest is None:
            return None
        total += dearest
    return math.ceil(total)


def _dearest_nano(counts: Counts, model: str, prices: Prices, day: int, modes: set[tuple[str | None, str | None]]) -> Fraction | None:
    row = prices.row(model, day * DAY_S)
    if row is None:
        return None
    searches = counts.web_searches * row.web_search_nano
    tiers = [
        rates(
            row,
            prompt_tokens=prompt_tokens,
            speed=speed if row.fast is not None else None,
            inference_geo=geo if row.geo else None,
            batch=False,
        )
        for prompt_tokens in (0, row.context_tokens)
        for speed, geo in modes
    ]
    return max(tier.price(_tokens(counts), hour_ttl=True) for tier in tiers) + searches


def _shares(estimates: Sequence[Estimate], at_most_nano: int, prices: Prices, day: int) -> tuple[tuple[int, int], ...]:
    """What to take off each call, in proportion to what its bound leaves open."""
    floors = [_known_nano(each, prices, day) for each in estimates]
    room = [each.spent_nano - floor for each, floor in zip(estimates, floors, strict=True)]
    keep = max(0, at_most_nano - sum(floors))
    if keep >= sum(room):
        return ()
    deltas = [(each.call_id, -((sum(room) - keep) * open_nano // sum(room))) for each, open_nano in zip(estimates, room, strict=True)]
    return tuple((call_id, delta) for call_id, delta in deltas if delta)


def _known_nano(estimate: Estimate, prices: Prices, day: int) -> int:
    """What a call certainly cost: its metered parts without their output, which is a grant."""
    output = Counts(output_tokens=estimate.output_tokens)
    modes: set[tuple[str | None, str | None]] = {("standard", "global"), ("standard", "us"), ("fast", "global"), ("fast", "us")}
    granted_nano = _dearest_nano(output, estimate.model, prices, day, modes)
    if granted_nano is None:
        return estimate.spent_nano
    return min(estimate.spent_nano, max(0, estimate.metered_nano - math.ceil(granted_nano)))


def _counts(part: Metered) -> Counts:
    return Counts(**{kind: getattr(part, kind) for kind in KINDS})


def _tokens(counts: Counts) -> TokenCounts:
    return TokenCounts(**{kind: getattr(counts, kind) for kind in KINDS if kind != "web_searches"})
