"""Print tables that fit the terminal, 60 columns too. Knows nothing of what they are about."""

import shutil
import textwrap
from collections.abc import Collection, Sequence

from tabulate import tabulate

WRAPPED_MIN = 12
"""Characters of a wrapped column: a narrower one is not read with ease."""


def table(
    rows: Sequence[Sequence[object]],
    headings: Sequence[str] = (),
    *,
    right: Collection[str] = (),
    drop_empty: Collection[str] = (),
    spare: Sequence[str] = (),
    has_total: bool = False,
) -> str:
    """Return rows as a table no wider than the terminal; where the output is no terminal, as wide as it needs.

    What does not fit loses the columns of `spare`, in that order; then its widest columns are wrapped; where that is not enough, each row
    becomes lines of `heading: value`. `right`: the headings of amounts and counts, which are never wrapped. `drop_empty`: the headings
    that are left out where no row has a value. `has_total`: the last row is parted from the others.
    """
    width = shutil.get_terminal_size((0, 0)).columns
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    names = list(headings)
    for empty in [name for at, name in enumerate(names) if name in drop_empty and not any(text[at] for text in texts)]:
        _drop(names, texts, empty)
    for each in ("", *spare):
        if each in names:
            _drop(names, texts, each)
        shown = _grid(texts, names, right, has_total)
        if not width or (over := _width(shown) - width) <= 0:
            return shown
    widths = [max(map(len, column)) for column in zip(*([names] if names else []), *texts, strict=True)]
    wrapped = {at: size for at, size in enumerate(widths) if not names or names[at] not in right}
    for _ in range(over):
        widest = max(wrapped, key=lambda at: wrapped[at])
        wrapped[widest] -= 1
        if wrapped[widest] < WRAPPED_MIN:
            return _records(texts, names, width)
    return _grid(texts, names, right, has_total, [wrapped.get(at) for at in range(len(widths))])


def _drop(names: list[str], texts: list[list[str]], name: str) -> None:
    at = names.index(name)
    for row in (names, *texts):
        del row[at]


def _grid(
    texts: list[list[str]], names: list[str], right: Collection[str], has_total: bool, widths: Sequence[int | None] | None = None
) -> str:
    rows = [*texts[:-1], [""] * len(texts[-1]), texts[-1]] if has_total else texts
    align = ["right" if name in right else "left" for name in names] if names and rows else None
    return tabulate(
        rows, headers=names, tablefmt="simple" if names else "plain", disable_numparse=True, colalign=align, maxcolwidths=widths
    )


def _records(texts: list[list[str]], names: list[str], width: int) -> str:
    blocks = []
    for row in texts:
        lines = [f"{name}: {text}" for name, text in zip(names, row, strict=True) if text] if names else row
        blocks.append("\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in lines))
    return "\n\n".join(blocks)


def _width(shown: str) -> int:
    return max(map(len, shown.splitlines()), default=0)
