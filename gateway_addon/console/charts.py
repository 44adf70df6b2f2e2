"""Compute where the marks of the drawings stand, in the drawings' own units. Colours and words are the templates' and the style sheet's.

Drawn by hand in SVG instead of by a library: a bar and a stacked column are some lines each, take their colours from the page in
both themes, carry a title for every mark and a table beside them, and need neither inline style nor script, which the page's
content policy forbids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BAR = 1000
"""The width of a bar, in its own units."""
WIDTH, HEIGHT = 960, 240
COLOURS = 6
"""Series with a colour of their own; the last one stands for all the others."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of the amounts spent and held of a cap (or, with no cap, of the longest bar beside it)."""

    spent: int
    held: int

    @property
    def held_from(self) -> int:
        return self.spent


def bar(spent_nano: int, held_nano: int, of_nano: int) -> Bar:
    """Widths in parts of BAR; whatever is more than nothing shows."""
    if of_nano <= 0:
        return Bar(BAR if spent_nano else 0, 0)
    spent = min(BAR, max(spent_nano * BAR // of_nano, 4 if spent_nano > 0 else 0))
    return Bar(spent, min(BAR - spent, max(held_nano * BAR // of_nano, 4 if held_nano > 0 else 0)))


@dataclass(frozen=True, slots=True)
class Mark:
    """One series' share of one column."""

    series: int
    name: str
    nano: int
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Column:
    label: str
    nano: int
    x: float
    width: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """A stacked chart. `lines`: the scale, as (y, nano)."""

    series: tuple[str, ...]
    columns: tuple[Column, ...]
    lines: tuple[tuple[float, int], ...]


def stack(columns: Sequence[tuple[str, Mapping[str, int]]]) -> Stack:
    """Columns of (label, nano by series), drawn from the bottom, the dearest series lowest and in the same colour everywhere."""
    totals: dict[str, int] = {}
    for _, amounts in columns:
        for name, nano in amounts.items():
            totals[name] = totals.get(name, 0) + nano
    names = sorted((name for name in totals if totals[name]), key=lambda name: (-totals[name], name))
    own = names if len(names) <= COLOURS else names[: COLOURS - 1]
    series = (*own, *(["all others"] if len(names) > len(own) else []))
    top = _rounded_up(max((sum(amounts.values()) for _, amounts in columns), default=0))
    step = WIDTH / max(1, len(columns))
    drawn = []
    for number, (label, amounts) in enumerate(columns):
        shares = [amounts.get(name, 0) for name in own]
        shares += [sum(amounts.values()) - sum(shares)] if len(series) > len(own) else []
        drawn.append(Column(label, sum(amounts.values()), number * step + step * 0.12, step * 0.76, _marks(series, shares, top)))
    lines = tuple((HEIGHT - HEIGHT * part / 4, top * part // 4) for part in range(1, 5)) if top else ()
    return Stack(series, tuple(drawn), lines)


def _marks(series: Sequence[str], shares: Sequence[int], top: int) -> tuple[Mark, ...]:
    marks, y = [], float(HEIGHT)
    for number, (name, nano) in enumerate(zip(series, shares, strict=True)):
        if nano > 0:
            height = HEIGHT * nano / top
            y -= height
            marks.append(Mark(number, name, nano, round(y, 2), round(height, 2)))
    return tuple(marks)


def _rounded_up(nano: int) -> int:
    """The next number whose quarters are ones that people say: 1, 1.5, 2, 2.5, 3, 4, 5, 6 or 8 of a power of ten."""
    if nano == 0:
        return 0
    power = 4
    while nano > 80 * power:
        power *= 10
    return next(each * power for each in (10, 15, 20, 25, 30, 40, 50, 60, 80) if nano <= each * power)
