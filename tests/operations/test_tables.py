"""Tables that fit the terminal: nothing is lost but what may be."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_addon.operations import tables

WORDS = st.lists(st.text("abcdefg", min_size=1, max_size=30), max_size=4).map(" ".join)
HEADINGS = ("of", "amount", "why it was done")


def at(width, *arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "columns", lambda: width)
        return tables.table(*arguments, **options)


def letters(text):
    return sorted(re.sub(r"[^a-g0-9]", "", text))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, st.integers(0, 10**9), WORDS), min_size=1, max_size=4), st.integers(40, 120))
def test_a_table_is_no_wider_than_the_terminal_and_loses_nothing(rows, width):
    shown = at(width, rows, HEADINGS, right=("amount",))
    assert max(map(len, shown.splitlines())) <= width
    if shown.startswith("of  "):  # else each row repeats the headings
        assert letters(shown) == letters(" ".join(map(str, [*HEADINGS, *(cell for row in rows for cell in row)])))
    assert all(re.search(rf"(?<!\d){amount}(?!\d)", shown) for _, amount, _ in rows), "an amount is never wrapped"


def test_what_is_no_terminal_gets_whole_lines():
    assert max(map(len, tables.table([("a" * 300, "b")], ("long", "short")).splitlines())) > 300


@pytest.mark.parametrize(
    ("width", "options", "shown"),
    [
        (0, {"drop_empty": ("b",)}, "a  c\n-  -\nx  3"),
        (0, {"has_total": True}, "a  b  c\n-  -  -\n\nx     3"),
        (6, {"spare": ("b", "a")}, "a  c\n-  -\nx  3"),
        (3, {"spare": ("b", "a")}, "c\n-\n3"),
        (5, {}, "a: x\nc: 3"),
    ],
    ids=["empty columns go", "a total is parted", "the first spare column goes", "the second too", "else a row is lines"],
)
def test_a_table_gives_way_in_order(width, options, shown):
    assert at(width, [("x", "", 3)], ("a", "b", "c"), right=("c",), **options) == shown


@pytest.mark.parametrize(
    ("width", "cells"),
    [(30, ["claude-haiku-4-5,", "claude-sonnet-5"]), (18, ["claude-", "haiku-4-5,"])],
    ids=["whole where a line holds it", "else at a hyphen"],
)
def test_a_models_name_is_broken_as_late_as_can_be(width, cells):
    lines = at(width, [("x", "claude-haiku-4-5, claude-sonnet-5")], ("app", "models")).splitlines()
    assert [line[5:].strip() for line in lines[2:4]] == cells
