"""The bound on what NFKC makes of a text: sound for every character and any text, and found without sorting a run of marks."""

import json
import random
import unicodedata
from functools import cache
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_addon import pricing
from gateway_addon.calls.batches import judge_batch
from gateway_addon.messages import nfkc
from gateway_addon.messages import request as request_module
from gateway_addon.messages.nfkc import nfkc_growth
from gateway_addon.messages.request import Request
from gateway_addon.policy.loading import parse_app

PRICES = pricing.load(None, None)
APP = parse_app("policies/apps/app.yaml", "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\nendpoints: [batches]", PRICES, {})
PLAIN = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hello"}]}
MARKS = "\u0327\u0301\u0323\u0345\u0304" * 20_000


@cache
def characters() -> list[str]:
    return [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]


@cache
def telling() -> list[str]:
    """Characters that combine or come apart."""
    return [each for each in characters()[:0x20000] if unicodedata.combining(each) or unicodedata.decomposition(each)]


def added(text: str) -> int:
    return len(unicodedata.normalize("NFKC", text).encode()) - len(text.encode())


def test_no_single_character_grows_more_than_the_bound():
    growing = [each for each in characters() if added(each) > 0]
    assert len(growing) > 900
    for each in growing:
        assert nfkc_growth(each.encode()) >= added(each), each


def test_each_letter_that_a_mark_can_take_apart_is_in_the_table():
    composed, marks = nfkc.re.compile(nfkc._any_of(nfkc._COMPOSED)), nfkc.re.compile(nfkc._any_of(nfkc._MARKS))
    for each in characters():
        parts = unicodedata.normalize("NFKD", each)
        if unicodedata.combining(parts[0]):
            assert marks.match(each), each
        if parts != unicodedata.normalize("NFKC", each) and not "\uac00" <= each <= "\ud7a3":  # no mark takes a Hangul syllable apart
            assert composed.match(each), each


@given(st.text(st.deferred(lambda: st.sampled_from(telling())) | st.characters(exclude_categories=["Cs"]), max_size=12))
@settings(max_examples=1_000, derandomize=True, deadline=None)
def test_no_text_grows_more_than_the_bound(text: str):
    assert nfkc_growth(text.encode()) >= added(text)


def test_no_run_of_letters_and_marks_grows_more_than_the_bound():
    chosen = random.Random(1)
    for _ in range(20_000):
        text = "".join(chosen.choices(telling(), k=chosen.randint(1, 5)))
        assert nfkc_growth(text.encode()) >= added(text), text.encode("unicode_escape")


@pytest.mark.parametrize("text", ["hello", "l’élève — “ça” …", "快速的棕色狐狸", "빠른 갈색 여우", "สุนัขจิ้งจอก", "तेज़ भूरी", "😀👍🏽", "が"])
def test_ordinary_text_is_not_charged_more_than_its_bytes(text: str):
    assert nfkc_growth(text.encode()) == 0


def test_a_long_text_is_bounded_as_the_sum_of_its_pieces():
    text = "x\u1e17\u0327\ufdfa"
    assert nfkc_growth((text * 70_000).encode()) == 70_000 * nfkc_growth(text.encode())


BODIES = {
    "text": {**PLAIN, "system": MARKS},
    "key": {**PLAIN, "metadata": {MARKS: 1}},
    "top-level key": {**PLAIN, MARKS: 1},
    "padded key": {**PLAIN, " " * 100_000 + "model": 1},
    "long letters": {**PLAIN, "system": "\ufdfa" * 100_000},
}


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("endpoint", ["messages", "count_tokens", "batch"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_marks_are_looked_up_one_by_one_and_never_sorted(body, endpoint, ascii_only):
    """Sorting a run of n marks takes n x n steps in one call that nothing interrupts: 10 s for 250 KB."""
    normalize, visited = unicodedata.normalize, []

    def counted(form, text):
        visited.append(len(text))
        return normalize(form, text)

    whole = {"requests": [{"custom_id": "a", "params": body}]} if endpoint == "batch" else body
    request = Request("POST", "/v1/messages", (), json.dumps(whole, ensure_ascii=ascii_only).encode())
    nfkc._added.cache_clear()
    nfkc._taken_apart.cache_clear()
    with mock.patch.object(unicodedata, "normalize", counted):
        if endpoint == "batch":
            judge_batch(APP, PRICES, request, 0.0)
        else:
            request_module.read(endpoint, request)
    assert sum(visited) < 1_000


def test_a_key_given_twice_among_many_is_found_in_one_pass():
    compared = 0

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    pairs = [(Key(f"k{i}"), i) for i in range(3_000)] + [(Key("k2999"), 0)]
    with pytest.raises(request_module.Unreadable, match="'k2999' is given twice"):
        request_module._object(pairs)
    assert compared < 30_000
