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
STEP_MAX = WIDTH / 7
"""The most that one column takes: a single day is no wall."""
LABEL_WIDTH = 96
"""The room of a label below a column, on the phone too."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of the amounts spent and held of a cap (or, with no cap, of the longest bar beside it)."""

    spent: int
    held: int

    @property
    def held_from(self) -> int:
        return self.spent


def bar(spent_nano: int, held_nano: int, of_nano: int) -> Bar:
    """Return widths in parts of BAR; an amount above nothing has a width that shows."""
    if of_nano <= 0:
        return Bar(BAR if spent_nano else 0, 0)
    spent = min(BAR, max(spent_nano * BAR // of_nano, 4 if spent_nano > 0 else 0))
    return Bar(spent, min(BAR - spent, max(held_nano * BAR // of_nano, 4 if held_nano > 0 else 0)))


@dataclass(frozen=True, slots=True)
class Mark:
    """One series' share of one column: an amount in nano-dollars, or a count."""

    series: int
    name: str
    amount: int
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Column:
    label: str
    amount: int
    x: float
    width: float
    marks: tuple[Mark, ...]
    has_label: bool
    """The label is written below the column: for all of them there is no room."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A stacked chart. `lines`: the scale, as (y, amount)."""

    series: tuple[tuple[int, str], ...]
    """Each with the number of its colour."""
    columns: tuple[Column, ...]
    lines: tuple[tuple[float, int], ...]


def stack(columns: Sequence[tuple[str, Mapping[str, int]]], order: Sequence[str] | None = None, top: int | None = None) -> Stack:
    """Draw columns of (label, amount by series) from the bottom up, each series in the same colour everywhere.

    Without `order` the largest series is the lowest, and those for which there is no colour are together the highest. `top`: the amount
    of the full height; without it the scale follows the highest column.
    """
    totals: dict[str, int] = {}
    for _, amounts in columns:
        for name, amount in amounts.items():
            totals[name] = totals.get(name, 0) + amount
    names = [name for name in order or sorted(totals, key=lambda name: (-totals[name], name)) if totals.get(name)]
    own = names if order or len(names) <= COLOURS else names[: COLOURS - 1]
    series = (*own, *(["all others"] if len(names) > len(own) else []))
    colours = [(order or series).index(name) for name in series]
    top = top or _rounded_up(max((sum(amounts.values()) for _, amounts in columns), default=0))
    step = min(WIDTH / max(1, len(columns)), STEP_MAX)
    left, every = WIDTH - step * len(columns), max(1, -(-LABEL_WIDTH // int(step)))
    drawn = []
    for number, (label, amounts) in enumerate(columns):
        shares = [amounts.get(name, 0) for name in own]
        shares += [sum(amounts.values()) - sum(shares)] if len(series) > len(own) else []
        x, has_label = left + number * step + step * 0.12, (len(columns) - 1 - number) % every == 0
        marks = _marks(series, colours, shares, top)
        drawn.append(Column(label, sum(amounts.values()), round(x, 2), round(step * 0.76, 2), marks, has_label))
    lines = tuple((HEIGHT - HEIGHT * part / 4, top * part // 4) for part in range(1, 5)) if top and names else ()
    return Stack(tuple(zip(colours, series, strict=True)), tuple(drawn), lines)


def _marks(series: Sequence[str], colours: Sequence[int], shares: Sequence[int], top: int) -> tuple[Mark, ...]:
    marks, y = [], float(HEIGHT)
    for name, colour, amount in zip(series, colours, shares, strict=True):
        if amount > 0:
            height = HEIGHT * amount / top
            y -= height
            marks.append(Mark(colour, name, amount, round(y, 2), round(height, 2)))
    return tuple(marks)


def _rounded_up(amount: int) -> int:
    """Return the next number whose quarters are whole and ones that people say: 12, 16, 20, 24, 32, 40, 60 or 80 times a power of ten."""
    if amount == 0:
        return 0
    if amount <= 8:
        return 4 if amount <= 4 else 8
    power = 1
    while amount > 80 * power:
        power *= 10
    return next(each * power for each in (12, 16, 20, 24, 32, 40, 60, 80) if amount <= each * power)
