"""Sum a range of days by app, model, token and day, beside the range before, with the drawings of them. Pure; knows nothing of HTML."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo

from gateway_addon.console import charts
from gateway_addon.ledger.reports.day_cache import FIRST_BYTE_S, WHOLE_S, CachedDay, CallSums, DayLine, Refused, added


@dataclass(frozen=True, slots=True)
class About:
    """The calls that a page is about; empty: all."""

    app: str = ""
    model: str = ""

    def line(self, each: DayLine) -> bool:
        return self.app in ("", each.app) and self.model in ("", each.asked, each.served)

    def refused(self, each: Refused) -> bool:
        return self.app in ("", each.app) and self.model in ("", each.asked)


@dataclass(frozen=True, slots=True)
class Sum:
    """One row of a table: a name's figures in the range, and its spending in the range before."""

    name: str
    figures: CallSums
    before_nano: int
    share: float


@dataclass(frozen=True, slots=True)
class Drift:
    """Another model answered an app than it asked for."""

    app: str
    asked: str
    served: str
    calls: int
    last_day: int


@dataclass(frozen=True, slots=True)
class Drawings:
    spent: charts.Stack
    tokens: charts.Stack
    cache: charts.Stack
    first_byte: charts.Stack
    whole: charts.Stack


@dataclass(frozen=True, slots=True)
class Sheet:
    """All sums of a page. `days`: the first instant of each, and its figures, the newest first."""

    total: CallSums
    before: CallSums
    refused: int
    refused_before: int
    apps: tuple[Sum, ...]
    models: tuple[Sum, ...]
    tokens: tuple[Sum, ...]
    days: tuple[tuple[int, CallSums, int], ...]
    """With the number of refused calls."""
    refusals: tuple[tuple[str, int], ...]
    drift: tuple[Drift, ...]
    drawings: Drawings


def sheet(days: Sequence[CachedDay], before: Sequence[CachedDay], zone: tzinfo, only: About = About(), stacked: str = "asked") -> Sheet:
    """Sum the days. `stacked`: the field of a line by which the spending is drawn, `asked` or `app`."""
    lines = [each for day in days for each in day.lines if only.line(each)]
    lines_before = [each for day in before for each in day.lines if only.line(each)]
    refused: Counter[str] = Counter()
    for each in _refused(days, only):
        refused[each.code] += each.calls
    by_day = [(day.start, [each for each in day.lines if only.line(each)]) for day in days]

    def by(name: Callable[[DayLine], str]) -> tuple[Sum, ...]:
        return _by(name, lines, lines_before)

    return Sheet(
        _total(lines),
        _total(lines_before),
        sum(refused.values()),
        sum(each.calls for each in _refused(before, only)),
        by(lambda each: each.app),
        by(lambda each: each.asked),
        by(lambda each: str(each.token_id)),
        tuple(
            (day.start, _total(found), sum(each.calls for each in _refused([day], only)))
            for day, (_, found) in zip(reversed(days), reversed(by_day), strict=True)
        ),
        tuple(sorted(refused.items(), key=lambda item: (-item[1], item[0]))),
        _drift(by_day),
        _drawings(by_day, zone, stacked),
    )


def _total(lines: Iterable[DayLine]) -> CallSums:
    found = [each.figures for each in lines]
    return added(found) if found else CallSums()


def _refused(days: Iterable[CachedDay], only: About) -> list[Refused]:
    return [each for day in days for each in day.refused if only.refused(each)]


def _by(name: Callable[[DayLine], str], lines: list[DayLine], before: list[DayLine]) -> tuple[Sum, ...]:
    """Group by a name, the dearest first."""
    grouped: dict[str, list[CallSums]] = defaultdict(list)
    for each in lines:
        grouped[name(each)].append(each.figures)
    earlier: Counter[str] = Counter()
    for each in before:
        earlier[name(each)] += each.figures.spent_nano
    sums = {key: added(found) for key, found in grouped.items()}
    all_nano = sum(each.spent_nano for each in sums.values())
    keys = sorted(sums, key=lambda key: (-sums[key].spent_nano, key))
    return tuple(Sum(key, sums[key], earlier[key], sums[key].spent_nano / all_nano if all_nano else 0.0) for key in keys)


def _drift(by_day: Sequence[tuple[int, list[DayLine]]]) -> tuple[Drift, ...]:
    """Return where another model answered than was asked for, the latest first."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for start, lines in by_day:
        for each in (each for each in lines if each.drifted and each.served):
            key = (each.app, each.asked, each.served)
            found[key] = (found.get(key, (0, 0))[0] + each.figures.calls, start)
    return tuple(Drift(*key, *facts) for key, facts in sorted(found.items(), key=lambda item: (-item[1][1], item[0])))


def _drawings(by_day: Sequence[tuple[int, list[DayLine]]], zone: tzinfo, stacked: str) -> Drawings:
    dates = [datetime.fromtimestamp(start, zone).strftime("%-d %b") for start, _ in by_day]
    totals = [_total(lines) for _, lines in by_day]

    def columns(of: Callable[[CallSums], Mapping[str, int]]) -> list[tuple[str, Mapping[str, int]]]:
        return [(date, of(each)) for date, each in zip(dates, totals, strict=True)]

    def classes(name: str, limits: tuple[float, ...]) -> charts.Stack:
        names = [*(f"under {limit:g} s" for limit in limits), f"{limits[-1]:g} s and more"]
        return charts.stack(columns(lambda each: {word: getattr(each, f"{name}_{number}") for number, word in enumerate(names)}), names)

    kinds = {"input": "input_tokens", "cache read": "cache_read_tokens", "cache write": "cache_write_tokens", "output": "output_tokens"}
    shares = columns(lambda each: {} if each.cache_share is None else {"read from the cache": round(1000 * each.cache_share)})
    return Drawings(
        charts.stack([(date, _spent(lines, stacked)) for date, (_, lines) in zip(dates, by_day, strict=True)]),
        charts.stack(columns(lambda each: {word: getattr(each, name) for word, name in kinds.items()}), list(kinds)),
        charts.stack(shares, ["read from the cache"], top=1000),
        classes("first", FIRST_BYTE_S),
        classes("whole", WHOLE_S),
    )


def _spent(lines: Iterable[DayLine], name: str) -> Counter[str]:
    amounts: Counter[str] = Counter()
    for each in lines:
        amounts[getattr(each, name)] += each.figures.spent_nano
    return amounts
