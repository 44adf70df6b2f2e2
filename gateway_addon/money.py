"""Amounts of money: written by people as dollars, kept as whole nano-dollars.

Promises that no amount ever passes through a float. Knows nothing of models, caps or the ledger.
"""

import re
from fractions import Fraction

NANO_PER_DOLLAR = 1_000_000_000
AMOUNT_NANO_MAX = 2**62  # about 4.6 billion dollars: sums of two still fit the ledger's signed 64-bit integers

# Commas part thousands and nothing else: `1,5` and `1_0` would be read as fifteen and as ten dollars.
AMOUNT_PATTERN = r"\$?([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.([0-9]{1,9}))?"
_AMOUNT = re.compile(rf"{AMOUNT_PATTERN}\Z")


def parse_nano(text: str | int) -> int:
    """Read a dollar amount (`$0.50`, `12`, `$1,200.75`) as nano-dollars.

    Raises ValueError with a sentence when the text is not an amount, is negative, finer than a nano-dollar or too large.
    """
    match = _AMOUNT.match(str(text).strip()) if not isinstance(text, bool) else None
    if match is None:
        raise ValueError(f"{text!r} is not an amount; write dollars like $5, $0.25 or $1,200 (at most nine decimals)")
    whole, fraction = match[1].replace(",", ""), (match[2] or "").ljust(9, "0")
    if len(whole) > 20 or (nano := int(whole) * NANO_PER_DOLLAR + int(fraction)) > AMOUNT_NANO_MAX:
        raise ValueError(f"{str(text)[:40]!r} is more than the ledger can hold (${AMOUNT_NANO_MAX // NANO_PER_DOLLAR:,})")
    return nano


def rounded_up(rate_nano: Fraction, count: int) -> int:
    """Return `count` times an exact rate, rounded up to a whole nano-dollar. (The product is never a Fraction: they are slow to make.)"""
    return -(-rate_nano.numerator * count // rate_nano.denominator)


def dollars(nano: int, decimals_min: int = 2) -> str:
    """Write nano-dollars exactly, with no fewer than `decimals_min` decimals and no trailing zeros beyond them: `$0.0125`."""
    sign = "-" if nano < 0 else ""
    whole, rest = divmod(abs(nano), NANO_PER_DOLLAR)
    fraction = f"{rest:09d}".rstrip("0").ljust(decimals_min, "0")
    return f"{sign}${whole:,}.{fraction}" if fraction else f"{sign}${whole:,}"


def cents(nano: int) -> str:
    """Write nano-dollars for a table: two decimals from a dollar on, four below it, rounded half up."""
    decimals = 2 if abs(nano) >= NANO_PER_DOLLAR or nano == 0 else 4
    unit = 10 ** (9 - decimals)
    rounded = (abs(nano) + unit // 2) // unit * unit
    sign = "-" if nano < 0 else ""
    whole, rest = divmod(rounded, NANO_PER_DOLLAR)
    return f"{sign}${whole:,}.{rest:09d}"[: -(9 - decimals)]
