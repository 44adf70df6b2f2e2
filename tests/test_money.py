"""Amounts: read from what people write, kept as whole nano-dollars, written back without losing any."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_addon.money import AMOUNT_NANO_MAX, cents, dollars, parse_nano, rounded_up


@pytest.mark.parametrize(
    ("text", "nano"),
    [
        ("$5", 5_000_000_000),
        ("12", 12_000_000_000),
        (12, 12_000_000_000),
        (" $0.50 ", 500_000_000),
        ("$1,200.75", 1_200_750_000_000),
        ("1,000", 1_000_000_000_000),
        ("$1,000,000", 1_000_000_000_000_000),
        ("0", 0),
        ("$0.000000001", 1),
        ("0.1", 100_000_000),
        ("4611686018.427387904", AMOUNT_NANO_MAX),
    ],
)
def test_what_people_write_is_read_exactly(text, nano):
    assert parse_nano(text) == nano


@pytest.mark.parametrize(
    "text",
    ["", "$", "-5", "$-5", "5$", "5 dollars", "1e3", "0x10", ".5", "5.", "0.0000000001", "nan", "inf", "٥", "5\n6", "$$5", "1.2.3", "1_000", "1,5", "1,0000", "1,000,0", ",100", True, 1.5e-12],
)
def test_anything_else_is_a_sentence_that_shows_how_to_write_it(text):
    with pytest.raises(ValueError, match="is not an amount; write dollars like"):
        parse_nano(text)


def test_more_than_the_ledger_holds_is_refused():
    for text in ("4611686018.427387905", "9" * 5000):
        with pytest.raises(ValueError, match=r"^.{,50} is more than the ledger can hold"):
            parse_nano(text)


@pytest.mark.parametrize(
    ("nano", "exactly", "in_a_table"),
    [
        (0, "$0.00", "$0.00"),
        (1, "$0.000000001", "$0.0000"),
        (50_000, "$0.00005", "$0.0001"),
        (12_500_000, "$0.0125", "$0.0125"),
        (999_999_999, "$0.999999999", "$1.0000"),
        (1_000_000_000, "$1.00", "$1.00"),
        (1_005_000_000, "$1.005", "$1.01"),
        (1_234_567_890_000_000, "$1,234,567.89", "$1,234,567.89"),
        (-12_500_000, "-$0.0125", "-$0.0125"),
    ],
)
def test_amounts_are_exact_for_people_and_rounded_for_tables(nano, exactly, in_a_table):
    assert (dollars(nano), cents(nano)) == (exactly, in_a_table)


def test_decimals_can_be_dropped_or_kept():
    assert (dollars(5_000_000_000, 0), dollars(5_000_000_000, 9)) == ("$5", "$5.000000000")


@given(st.integers(0, AMOUNT_NANO_MAX))
def test_what_is_written_is_read_back_as_the_same_amount(nano):
    assert parse_nano(dollars(nano)) == nano


@given(st.fractions(0, 10**6, max_denominator=10**9), st.integers(0, 10**9))
def test_what_so_many_cost_is_rounded_up_once(rate_nano, count):
    assert rounded_up(rate_nano, count) == math.ceil(rate_nano * count)


@given(st.integers(10_000_000 - AMOUNT_NANO_MAX, AMOUNT_NANO_MAX - 10_000_000))
def test_a_table_is_off_by_at_most_half_of_its_last_digit(nano):
    sign, digits = (-1, cents(nano)[1:]) if nano < 0 else (1, cents(nano))
    unit = 10_000_000 if abs(nano) >= 1_000_000_000 or nano == 0 else 100_000
    assert abs(sign * parse_nano(digits) - nano) * 2 <= unit
