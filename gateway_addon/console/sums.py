"""Sum a range of days by app, model, token and day, beside the range before, with the drawings of them. Pure; knows nothing of HTML."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo

from gateway_addon.console import charts
from gateway_addon.ledger.reports.call_sums import EVERY, FIRST_BYTE_S, WHOLE_S, CallSums, Day, Line, Only, added, chosen, merged, refusals


@dataclass(frozen=True, slots=True)
class Sum:
    """One row of a table: a name's figures in the range, and its spending in the range before."""

    name: str
    figures: CallSums[str]
    before_nano: int
    share: float


@dataclass(frozen=True, slots=True)
class Drift:
    """Another model answered an app than it asked for."""

    app: str
    asked: str
    served: str
    calls: int
    last_day: float


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

    total: CallSums[str]
    before: CallSums[str]
    refused: int
    refused_before: int
    apps: tuple[Sum, ...]
    models: tuple[Sum, ...]
    tokens: tuple[Sum, ...]
    days: tuple[tuple[float, CallSums[str], int], ...]
    """With the number of refused calls."""
    refusals: tuple[tuple[str, int], ...]
    drift: tuple[Drift, ...]
    drawings: Drawings


def sheet(days: Sequence[Day], before: Sequence[Day], zone: tzinfo, only: Only = EVERY, stacked: str = "asked") -> Sheet:
    """Sum the days. `stacked`: the field of a line's key by which the spending is drawn, `asked` or `app`."""
    days, before = [chosen(day, only) for day in days], [chosen(day, only) for day in before]
    lines_before = _admitted(before)
    by_day = [(day.start, _admitted([day])) for day in days]
    lines = [line for _, found in by_day for line in found]

    def by(name: Callable[[Line], str]) -> tuple[Sum, ...]:
        return _by(name, lines, lines_before)

    refused = refusals(days)
    return Sheet(
        added("", lines),
        added("", lines_before),
        refused.total(),
        refusals(before).total(),
        by(lambda line: line.key.app),
        by(lambda line: line.key.asked),
        by(lambda line: str(line.key.token_id)),
        tuple(
            (day.start, added("", found), refusals([day]).total())
            for day, (_, found) in zip(reversed(days), reversed(by_day), strict=True)
        ),
        tuple(refused.items()),
        _drift(by_day),
        _drawings(by_day, zone, stacked),
    )


def _admitted(days: Iterable[Day]) -> list[Line]:
    """Return the lines with admitted calls."""
    return [line for day in days for line in day.lines if line.calls]


def _by(name: Callable[[Line], str], lines: list[Line], before: list[Line]) -> tuple[Sum, ...]:
    """Group by a name, the dearest first."""
    sums = merged(CallSums(name(line), *line[1:]) for line in lines)
    earlier: Counter[str] = Counter()
    for line in before:
        earlier[name(line)] += line.spent_nano
    all_nano = sum(each.spent_nano for each in sums)
    dearest = sorted(sums, key=lambda each: (-each.spent_nano, each.key))
    return tuple(Sum(each.key, each, earlier[each.key], each.spent_nano / all_nano if all_nano else 0.0) for each in dearest)


def _drift(by_day: Sequence[tuple[float, list[Line]]]) -> tuple[Drift, ...]:
    """Return where another model answered than was asked for, the latest first."""
    found: dict[tuple[str, str, str], tuple[int, float]] = {}
    for start, lines in by_day:
        for line in (line for line in lines if line.key.drifted and line.key.served):
            key = (line.key.app, line.key.asked, line.key.served)
            found[key] = (found.get(key, (0, 0))[0] + line.calls, start)
    return tuple(Drift(*key, *facts) for key, facts in sorted(found.items(), key=lambda item: (-item[1][1], item[0])))


def _drawings(by_day: Sequence[tuple[float, list[Line]]], zone: tzinfo, stacked: str) -> Drawings:
    dates = [datetime.fromtimestamp(start, zone).strftime("%-d %b") for start, _ in by_day]
    totals = [added("", lines) for _, lines in by_day]

    def columns(of: Callable[[CallSums[str]], Mapping[str, int]]) -> list[tuple[str, Mapping[str, int]]]:
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


def _spent(lines: Iterable[Line], name: str) -> Counter[str]:
    amounts: Counter[str] = Counter()
    for line in lines:
        amounts[getattr(line.key, name)] += line.spent_nano
    return amounts
