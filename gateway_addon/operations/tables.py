"""Print tables that fit the terminal, 60 columns too. Knows nothing of their content."""

import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from itertools import zip_longest

BETWEEN = "  "
WRAPPED_MIN = 12
"""Characters of a wrapped column: a narrower one is not read with ease."""


def columns() -> int:
    """Return the terminal's width; 0 where the output is no terminal: programs want whole lines."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def counted(number: int, noun: str) -> str:
    """Return a number of things: `1 call`, `2,000 calls`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


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
    width = columns()
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    names = list(headings)
    for empty in [name for at, name in enumerate(names) if name in drop_empty and not any(text[at] for text in texts)]:
        _drop(names, texts, empty)
    sizes, over = _sizes(names, texts, width)
    for each in spare:
        if over > 0 and each in names:
            _drop(names, texts, each)
            sizes, over = _sizes(names, texts, width)
    wrapped = [at for at in range(len(sizes)) if not names or names[at] not in right]
    for _ in range(over):
        widest = max(wrapped, key=sizes.__getitem__, default=0)
        sizes[widest] -= 1
        if widest not in wrapped or sizes[widest] < WRAPPED_MIN:
            return _records(names, texts, width)
    rule = [["-" * size for size in sizes]] if names else []
    parted = [*texts[:-1], [""] * len(sizes), texts[-1]] if has_total else texts
    return "\n".join(line for row in [*([names] if names else []), *rule, *parted] for line in _lines(row, names, sizes, right))


def _drop(names: list[str], texts: list[list[str]], name: str) -> None:
    at = names.index(name)
    for row in (names, *texts):
        del row[at]


def _sizes(names: list[str], texts: list[list[str]], width: int) -> tuple[list[int], int]:
    """Return each column's width, and how much all are wider than the terminal: 0 or less where they fit."""
    sizes = [max(map(len, column)) for column in zip(*([names] if names else []), *texts, strict=True)]
    return sizes, sum(sizes) + len(BETWEEN) * (len(sizes) - 1) - width if width else 0


def _lines(row: list[str], names: list[str], sizes: list[int], right: Collection[str]) -> Iterator[str]:
    sized = zip(row, sizes, strict=True)
    cells = [_wrapped(text, size) if len(text) > size else [text] for text, size in sized]
    for parts in zip_longest(*cells, fillvalue=""):
        padded = [
            part.rjust(size) if at < len(names) and names[at] in right else part.ljust(size)
            for at, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]
        yield BETWEEN.join(padded).rstrip()


def _wrapped(text: str, size: int) -> list[str]:
    """Return a text in lines; a model's name is broken at a hyphen only where a line cannot hold it."""
    return textwrap.wrap(text, size, break_on_hyphens=any(len(word) > size for word in text.split()))


def _records(names: list[str], texts: list[list[str]], width: int) -> str:
    blocks = []
    for row in texts:
        lines = [f"{name}: {text}" for name, text in zip(names, row, strict=True) if text] if names else row
        blocks.append("\n".join(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in lines))
    return "\n\n".join(blocks)
