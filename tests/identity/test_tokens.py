"""Tokens and the one credential of a request, on values alone."""

import hashlib

import pytest

from gateway_addon.identity.tokens import credential, digest, mint, well_formed
from gateway_addon.names import TOKEN_PATTERN, TOKEN_PREFIX
from gateway_addon.refusals import Refusal

TOKEN = "gwt_7aB37aB37aB37aB37aB37aB37aB37aB37aB37aB37aB4A6hPU"  # whole, and nobody's
OTHER = "gwt_QaB3QaB3QaB3QaB3QaB3QaB3QaB3QaB3QaB3QaB3QaB21FIl7"


def test_tokens_differ_and_can_be_grepped_for():
    minted = {mint() for _ in range(1000)}
    assert len(minted) == 1000
    assert {len(token) for token in minted} == {len(TOKEN)}
    assert all(TOKEN_PATTERN.fullmatch(token) and well_formed(token) for token in minted)


def test_a_token_carries_256_bits_beside_its_prefix_and_checksum():
    alphabet, check = 62, 6
    assert alphabet ** (len(TOKEN) - len(TOKEN_PREFIX) - check) >= 2**256


def test_only_its_sha_256_is_kept():
    assert digest(TOKEN) == hashlib.sha256(TOKEN.encode()).hexdigest()


@pytest.mark.parametrize("length", range(len(TOKEN)))
def test_a_token_that_was_cut_is_not_taken_for_one(length):
    assert not well_formed(TOKEN[:length])


@pytest.mark.parametrize("at", range(len(TOKEN_PREFIX), len(TOKEN)))
def test_a_mistyped_character_is_seen(at):
    wrong = "0" if TOKEN[at] != "0" else "1"
    assert not well_formed(TOKEN[:at] + wrong + TOKEN[at + 1 :])


@pytest.mark.parametrize("text", ["", TOKEN + "0", " " + TOKEN, TOKEN.replace("gwt_", "GWT_"), TOKEN[:-1] + "é", "sk-ant-" + TOKEN])
def test_what_only_looks_like_a_token_is_none(text):
    assert not well_formed(text)


@pytest.mark.parametrize(
    ("headers", "outcome"),
    [
        ([("x-api-key", TOKEN)], TOKEN),
        ([("x-api-key", f" {TOKEN} ")], TOKEN),
        ([("authorization", f"Bearer {TOKEN}")], TOKEN),
        ([("authorization", f"bearer   {TOKEN}")], TOKEN),
        ([("authorization", f"Bearer {TOKEN}"), ("x-api-key", TOKEN)], TOKEN),
        ([("x-api-key", TOKEN), ("x-api-key", TOKEN)], TOKEN),
        ([("content-type", TOKEN)], "token_missing"),
        ([], "token_missing"),
        ([("x-api-key", TOKEN), ("x-api-key", OTHER)], "token_conflict"),
        ([("x-api-key", TOKEN), ("authorization", f"Bearer {OTHER}")], "token_conflict"),
        ([("x-api-key", TOKEN), ("authorization", f"Basic {TOKEN}")], "token_conflict"),
        ([("x-api-key", TOKEN), ("authorization", "")], "token_conflict"),
        ([("authorization", f"Basic {TOKEN}")], "token_malformed"),
        ([("authorization", TOKEN)], "token_malformed"),
        ([("x-api-key", " "), ("authorization", f"Bearer {TOKEN}")], TOKEN),
        ([("x-api-key", "")], "token_missing"),
        ([("x-api-key", f"Bearer {TOKEN}")], "token_malformed"),
        ([("x-api-key", "sk-ant-api03-real")], "token_malformed"),
    ],
)
def test_a_request_carries_one_credential_or_is_refused_by_name(headers, outcome):
    found = credential(headers)
    assert (found.code if isinstance(found, Refusal) else found) == outcome


@pytest.mark.parametrize(
    ("carried", "words"),
    [
        ("sk-ant-api03-real", "takes only its own tokens"),
        (TOKEN[:-4], f"it has {len(TOKEN) - 4} of {len(TOKEN)} characters"),
        ("hunter2", "is not a gateway token"),
    ],
)
def test_a_refusal_never_repeats_the_credential(carried, words):
    """It says what is wrong with the credential in its own words."""
    refusal = credential([("x-api-key", carried)])
    assert isinstance(refusal, Refusal)
    assert words in refusal.sentence
    assert carried not in refusal.sentence
