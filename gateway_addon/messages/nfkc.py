"""Bound what NFKC can make of a text, in time that grows with its length alone. Pure.

`unicodedata.normalize` sorts a run of combining marks in quadratic time: a run of 250 KB takes it 10 s, in one
call. Here each character is looked up instead. Promises that `nfkc_growth` is never less than what NFKC adds to a
text's bytes in UTF-8.

Why a sum over characters is a bound: NFKC takes every character apart and puts together what belongs together, and
what is put together has never more bytes than its parts. So NFKC of a text is no longer than NFKC of each of its
characters, except where a mark that follows takes a letter and its own marks apart (U+1E17 is e, macron and acute in
3 bytes; with a cedilla of 2 behind it that makes 6, not 5). A letter that stands directly before a mark is therefore
counted as taken apart for good.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Literal

_GROWING = """
    A8-BE 13F-149 1C4-1C6 2D8-2DD 344-385 587 675-678 958-95F 9DC-9DF A33-A36 A59-A5E B5C-B5D E33 EB3 EDC-EDD F43-FB9 1FC1-1FEE
    2033-2057 2150-2189 222C-2230 247D-2487 2A0C 2ADC 309B-309F 30FF 3200-33FE FA6C-FAD7 FB13-FDFC FE71-FE7F FEF5-FEFC
    1D15E-1D164 1D1BB-1D1C0 1F12A 1F200-1F248
"""
"""Where the characters stand that NFKC makes longer. Between them are some that it does not; what each adds is looked up."""

_COMPOSED = """
    C0-17E 1A0-1B0 1C4-233 386-390 3AA-3B0 3CA-3D4 400-419 439 450-45E 476-477 4C1-4F9 622-626 6C0-6C2 6D3 929 931 934 9CB-9CC B48-B4C
    B94 BCA-BCC C48 CC0-CCB D4A-D4C DDA-DDE 1026 1B06-1B12 1B3B-1B43 1E00-1FFC 212B 219A-219B 21AE 21CD-21CF 2204-220C 2224-2226
    2241-2249 2260-2289 22AC-22AF 22E0-22ED 304C-307D 3094-30DD 30F4-30FE 320E-321E 326E-327E 3300-3356 FBA4-FBB1 FBEA-FC04 FC64-FC69
    FC97-FC9B FCDF-FCE0 FE81-FE8C FEF5-FEFA 1109A-110AB 1112E-1112F 1134B-1134C 114BB-114BE 115BA-115BB 11938 1F213
"""
"""Where the characters stand that a mark behind them can take apart: a letter and its marks in one."""

_MARKS = """
    300-36F 483-487 591-5C7 610-61A 64B-670 6D6-6ED 711-1DFF 20D0-20F0 2CEF-2DFF 302A-302F 3099-309A A66F-ABED FB1E FE20-FE2F FF9E-FF9F
    101FD-1E94A
"""
"""Where the characters stand that NFKC may move before another, and many that it never moves: those cost a few bytes too many."""

_ASCII = bytes(range(128))
_PIECE_CHARACTERS = 65_536  # looked at in one go: so much is held in lists at a time


def _any_of(written: str) -> str:
    """Return a pattern for any character of these ranges. Beyond U+FFFF the matcher tries range by range, so they are as few as can be."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(_ranges(written)):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return "[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in merged) + "]"


def _ranges(written: str) -> Iterator[tuple[int, int]]:
    for each in written.split():
        first, _, last = each.partition("-")
        yield int(first, 16), int(last or first, 16)


_UNSETTLED = re.compile(_any_of(_GROWING + _MARKS))
_GROWS = re.compile(_any_of(_GROWING))
_COMPOSED_BEFORE_A_MARK = re.compile(f"{_any_of(_COMPOSED)}(?={_any_of(_MARKS)})")


def nfkc_growth(text: bytes) -> int:
    """Return at least as many bytes as NFKC adds to a text (UTF-8), whatever stands before or behind it."""
    if text.isascii():
        return 0
    # ASCII never grows. Without it some characters stand beside marks that did not, and count too much.
    rest = text.translate(None, _ASCII).decode()
    if _UNSETTLED.search(rest) is None:
        return 0
    found: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    for start in range(0, len(rest), _PIECE_CHARACTERS):
        found.update(_GROWS.findall(rest, start, start + _PIECE_CHARACTERS))
        apart.update(_COMPOSED_BEFORE_A_MARK.findall(rest, start, start + _PIECE_CHARACTERS + 1))
    return sum(_added(each) * times for each, times in found.items()) + sum(_taken_apart(each) * times for each, times in apart.items())


@cache
def _added(character: str) -> int:
    """Return the bytes that NFKC adds to one character alone."""
    return max(0, _bytes("NFKC", character) - len(character.encode()))


@cache
def _taken_apart(character: str) -> int:
    """Return by how many bytes a character's parts are longer than its NFKC."""
    return _bytes("NFKD", character) - _bytes("NFKC", character)


def _bytes(form: Literal["NFKC", "NFKD"], character: str) -> int:
    return len(unicodedata.normalize(form, character).encode())
