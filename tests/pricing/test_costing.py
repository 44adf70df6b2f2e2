"""Money: a table worked by hand, the rules of the bill, what cannot be priced, the table's own rules."""

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_addon.messages import Meter, TokenCounts, Usage, UsagePart
from gateway_addon.pricing import FLAGS, Cost, Prices, cost, load, rates

PRICES = load()


def day(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


NOW = day("2026-11-23")


def used(model: str | None = "claude-opus-5-5", tokens: TokenCounts = TokenCounts(), **more: Any) -> Usage:  # noqa: B008  frozen
    return Usage(**({"model": model, "tokens": tokens, "readable": True, "complete": True, "started": True} | more))


def bill(usage: Usage, at: float = NOW, *, hour: bool = False, prices: Prices = PRICES) -> Cost:
    return cost(prices, usage, at=at, hour_ttl_requested=hour)


class Bill(NamedTuple):
    nano: int
    model: str
    tokens: TokenCounts
    more: dict[str, Any] | None = None
    at: str = "2026-11-23"
    hour: bool = False


T = TokenCounts  # input, output, cache read, 5m write, 1h write, write of unknown lifetime
BATCH, FAST, US = {"service_tier": "batch"}, {"speed": "fast"}, {"inference_geo": "us"}


def ran(*parts: tuple[Any, ...]) -> dict[str, Any]:
    return {"iterations": tuple(UsagePart(kind, model, T(*tokens)) for kind, model, *tokens in parts)}


# Worked by hand: $1 per million tokens = 1,000 nano-dollars a token; "4.0M" is 4,000,000 nano-dollars.
BILLS = [
    # --- each kind of token by itself; opus-5-5 is 4 / 20, read 0.20, writes 5 and 8
    Bill(4_000, "claude-opus-5-5", T(1)),  # 1 x 4,000
    Bill(20_000, "claude-opus-5-5", T(0, 1)),  # 1 x 20,000
    Bill(200, "claude-opus-5-5", T(0, 0, 1)),  # 1 x 200
    Bill(5_000, "claude-opus-5-5", T(0, 0, 0, 1)),  # 1 x 5,000
    Bill(8_000, "claude-opus-5-5", T(0, 0, 0, 0, 1)),  # 1 x 8,000
    Bill(5_000, "claude-opus-5-5", T(0, 0, 0, 0, 0, 1)),  # lifetime unknown, no 1h asked for: 5,000
    Bill(8_000, "claude-opus-5-5", T(0, 0, 0, 0, 0, 1), hour=True),  # lifetime unknown, 1h asked for: 8,000
    Bill(13_000, "claude-opus-5-5", T(0, 0, 0, 1, 0, 1), hour=True),  # 5,000 known + 8,000 unknown
    Bill(16_000, "claude-opus-5-5", T(0, 0, 0, 0, 1, 1)),  # 1h in the answer proves that it was asked for: 8,000 + 8,000
    Bill(0, "claude-opus-5-5", T()),
    Bill(50_020_000, "claude-opus-5-5", T(5, 0, 0, 10_000)),  # max_tokens 0 warms the cache: 5 x 4,000 + 10,000 x 5,000
    Bill(18_120_000, "claude-opus-5-5", T(1000, 500, 2000, 200, 100, 240)),  # 4.0M + 10.0M + 0.4M + 1.0M + 0.8M + 240 x 8,000
    # --- each family: 1,000 in + 100 out
    Bill(12_000_000, "claude-fable-5-2", T(1000, 100)),  # 8.0M + 4.0M
    Bill(12_000_000, "claude-mythos-5-2", T(1000, 100)),  # 8.0M + 4.0M
    Bill(15_000_000, "claude-fable-5-1", T(1000, 100)),  # 10.0M + 5.0M
    Bill(15_000_000, "claude-mythos-5", T(1000, 100)),  # 10.0M + 5.0M
    Bill(7_500_000, "claude-opus-4-7", T(1000, 100)),  # 5.0M + 2.5M
    Bill(3_000_000, "claude-sonnet-5", T(1000, 100)),  # 2.0M + 1.0M
    Bill(4_500_000, "claude-sonnet-4-5-20250929", T(1000, 100)),  # 3.0M + 1.5M
    Bill(1_500_000, "claude-haiku-4-5-20251001", T(1000, 100)),  # 1.0M + 0.5M
    Bill(22_500_000, "claude-opus-4-1-20250805", T(1000, 100)),  # 15.0M + 7.5M
    Bill(1_200_000, "claude-3-5-haiku-latest", T(1000, 100)),  # 0.8M + 0.4M
    Bill(375_000, "claude-3-haiku-20240307", T(1000, 100)),  # 0.25M + 0.125M
    # --- cache prices are each model's own, not a rule of thumb
    Bill(2_000_000, "claude-fable-5-2", T(0, 0, 10_000)),  # 10,000 x 200 (0.025 of input)
    Bill(2_500_000, "claude-fable-5-1", T(0, 0, 10_000)),  # 10,000 x 250 (0.025)
    Bill(10_000_000, "claude-fable-5", T(0, 0, 10_000)),  # 10,000 x 1,000 (0.1)
    Bill(330_000, "claude-3-haiku-20240307", T(0, 0, 1000, 1000)),  # 1,000 x 30 (0.12) + 1,000 x 300 (1.2)
    # --- dated rows
    Bill(200_000, "claude-sonnet-5-5", T(0, 0, 1000), at="2026-10-06"),  # 1,000 x 200
    Bill(100_000, "claude-sonnet-5-5", T(0, 0, 1000), at="2026-10-07"),  # 1,000 x 100
    Bill(2_002_485_000, "claude-opus-4-6", T(200_001, 66), at="2026-03-12"),  # 200,001 x 10,000 + 66 x 37,500
    Bill(1_001_655_000, "claude-opus-4-6", T(200_001, 66), at="2026-03-13"),  # 200,001 x 5,000 + 66 x 25,000
    Bill(1_001_650_000, "claude-opus-4-6", T(200_000, 66), at="2026-03-12"),  # at the limit, not over it: 200,000 x 5,000 + 1.65M
    # --- the 100k cliff of haiku-5-5: 0.10 / 0.50, read 0.01, writes 0.125 and 0.20; over it 0.50 / 2.50, 0.05, 0.625 and 1.00
    Bill(10_050_000, "claude-haiku-5-5", T(100_000, 100)),  # 100,000 x 100 + 100 x 500
    Bill(50_250_500, "claude-haiku-5-5", T(100_001, 100)),  # 100,001 x 500 + 100 x 2,500
    Bill(7_650_000, "claude-haiku-5-5", T(40_000, 0, 40_000, 10_000, 10_000)),  # 100,000 long: 4.0M + 0.4M + 1.25M + 2.0M
    Bill(38_250_050, "claude-haiku-5-5", T(40_000, 0, 40_001, 10_000, 10_000)),  # one read more: 20M + 2,000,050 + 6.25M + 10M
    Bill(51_275_625, "claude-haiku-5-5", T(90_000, 10, 0, 0, 0, 10_001)),  # unknown writes count too: 45M + 25,000 + 6,250,625
    # --- batch: half of every kind of token
    Bill(3_000_000, "claude-opus-5-5", T(1000, 100), BATCH),  # (4.0M + 2.0M) / 2
    Bill(4_850_000, "claude-sonnet-5", T(1000, 100, 1000, 1000, 1000), BATCH),  # (2.0M + 1.0M + 0.2M + 2.5M + 4.0M) / 2
    Bill(63, "claude-haiku-5-5", T(0, 0, 0, 1), BATCH),  # 125 / 2 = 62.5, up
    Bill(25_125_250, "claude-haiku-5-5", T(100_001, 100), BATCH),  # 50,250,500 / 2
    # --- fast mode: twice every kind of token
    Bill(12_000_000, "claude-opus-5-5", T(1000, 100), FAST),  # (4.0M + 2.0M) x 2
    Bill(26_400_000, "claude-opus-5-5", T(0, 0, 1000, 1000, 1000), FAST),  # (0.2M + 5.0M + 8.0M) x 2
    Bill(24_000_000, "claude-fable-5-2", T(1000, 100), FAST),  # (8.0M + 4.0M) x 2
    Bill(6_000_000, "claude-opus-4-8", T(100, 100), FAST),  # (0.5M + 2.5M) x 2
    Bill(12_000_000, "claude-opus-5-5", T(1000, 100), FAST | BATCH),  # no batch discount on fast mode
    Bill(7_500_000, "claude-opus-4-6", T(1000, 100), {"speed": "standard"}),  # asked fast, served standard: standard
    # --- US-only inference: 1.1 times every kind of token
    Bill(8_250_000, "claude-opus-5", T(1000, 100), US),  # 7.5M x 1.1
    Bill(4_510_000, "claude-sonnet-5-5", T(0, 0, 1000, 0, 1000), US),  # (0.1M + 4.0M) x 1.1
    Bill(7_500_000, "claude-opus-5", T(1000, 100), {"inference_geo": "global"}),
    Bill(7_500_000, "claude-opus-5", T(1000, 100), {"inference_geo": "not_available"}),
    Bill(8_250_000, "claude-opus-5", T(1000, 100), {"inference_geo": "mars"}),  # unknown: the dearest known
    # --- modifiers together
    Bill(4_125_000, "claude-opus-5", T(1000, 100), BATCH | US),  # 7.5M x 0.5 x 1.1
    Bill(13_200_000, "claude-opus-5-5", T(1000, 100), FAST | US),  # 6.0M x 2 x 1.1
    Bill(55_275_550, "claude-haiku-5-5", T(100_001, 100), US),  # 50,250,500 x 1.1
    Bill(27_637_775, "claude-haiku-5-5", T(100_001, 100), BATCH | US),  # 50,250,500 x 0.55
    Bill(6, "claude-haiku-5-5", T(0, 0, 1), BATCH | US),  # 10 x 0.55 = 5.5, up
    Bill(336, "claude-haiku-5-5", T(1, 1, 1), BATCH | US),  # (100 + 500 + 10) x 0.55 = 335.5, up once, not by kind (55 + 275 + 6)
    Bill(6_000_000, "claude-opus-5-5", T(1000, 100), {"service_tier": "priority"}),  # the list price
    # --- web search: $10 per 1,000, whatever the tokens' modifiers
    Bill(14_000_000, "claude-opus-5-5", T(1000), {"web_search_requests": 1}),  # 4.0M + 10.0M
    Bill(32_200_000, "claude-opus-5-5", T(1000), BATCH | US | {"web_search_requests": 3}),  # 4.0M x 0.55 + 30.0M
    Bill(18_000_000, "claude-opus-5-5", T(1000), FAST | {"web_search_requests": 1}),  # 8.0M + 10.0M
    Bill(4_000_000, "claude-opus-5-5", T(1000), {"web_fetch_requests": 9}),  # fetching is free, its tokens are not
    # --- refusals
    Bill(0, "claude-opus-5-5", T(5000, 0), {"refused_before_output": True, "stop_reason": "refusal"}),
    Bill(20_200_000, "claude-opus-5-5", T(5000, 10), {"stop_reason": "refusal"}),  # in the middle: 20.0M + 0.2M
    # --- fallback credit: writes at the price of reads
    Bill(6_400_000, "claude-opus-5-5", T(1000, 100, 0, 1000, 1000), {"fallback_credit": "redeemed"}),  # 4.0M + 2.0M + 2,000 x 200
    Bill(7_040_000, "claude-opus-5-5", T(1000, 100, 0, 1000, 1000), {"fallback_credit": "redeemed"} | US),  # 6.4M x 1.1
    Bill(19_000_000, "claude-opus-5-5", T(1000, 100, 0, 1000, 1000), {"fallback_credit": "not_applied"}),  # 4.0M + 2.0M + 5.0M + 8.0M
    # --- iterations: their sum is the bill, each with its own model
    Bill(  # 60,385 x 3,000 + 522 x 15,000 = 188,985,000; 612 x 3,000 + 2,819 x 15,000 = 44,121,000
        233_106_000, "claude-sonnet-4-6", T(612, 2819),
        ran(("compaction", "claude-sonnet-4-6", 60_385, 522), ("message", "claude-sonnet-4-6", 612, 2819)),
    ),
    Bill(  # sonnet-5: 3,356,000 and 2,634,000; opus-4-8: 2,518 x 5,000 + 22 x 25,000 = 13,140,000
        19_130_000, "claude-sonnet-5", T(2390, 121),
        ran(("message", "claude-sonnet-5", 1128, 110), ("advisor_message", "claude-opus-4-8", 2518, 22), ("message", "claude-sonnet-5", 1262, 11)),
    ),
    Bill(  # the first declined without output: free; 412 x 4,000 + 264 x 20,000
        6_928_000, "claude-opus-5-5", T(412, 264),
        ran(("message", "claude-fable-5-2", 535, 0), ("fallback_message", "claude-opus-5-5", 412, 264)),
    ),
    Bill(  # the first declined after output: 535 x 8,000 + 50 x 40,000 = 6,280,000; + 6,928,000
        13_208_000, "claude-opus-5-5", T(412, 264),
        ran(("message", "claude-fable-5-2", 535, 50), ("fallback_message", "claude-opus-5-5", 412, 264)),
    ),
    Bill(  # two declined: only the third: 412 x 2,000 + 264 x 10,000
        3_464_000, "claude-sonnet-5", T(412, 264),
        ran(("message", "claude-fable-5-2", 535, 0), ("fallback_message", "claude-opus-5-5", 412, 0), ("fallback_message", "claude-sonnet-5", 412, 264)),
    ),
    Bill(  # the model that took over has a turn without output: 412 x 4,000; + 420 x 4,000 + 264 x 20,000
        8_608_000, "claude-opus-5-5", T(832, 264),
        ran(("message", "claude-fable-5-2", 535, 0), ("fallback_message", "claude-opus-5-5", 412, 0), ("fallback_message", "claude-opus-5-5", 420, 264)),
    ),
    Bill(  # a server tool's turn without output is no declined hop: 1,000 x 2,000 + 10 x 2,000 + 5 x 10,000
        2_070_000, "claude-sonnet-5", T(1010, 5), ran(("message", "claude-sonnet-5", 1000, 0), ("message", "claude-sonnet-5", 10, 5)),
    ),
    Bill(  # all declined: nothing but the compaction before it, 100 x 4,000 + 10 x 20,000
        600_000, "claude-opus-5-5", T(50, 0),
        ran(("compaction", "claude-opus-5-5", 100, 10), ("message", "claude-opus-5-5", 50, 0)) | {"refused_before_output": True},
    ),
    Bill(  # each part rounded up by itself: 5.5 and 5.5
        12, "claude-haiku-5-5", T(0, 0, 2), BATCH | US | ran(("message", "claude-haiku-5-5", 0, 0, 1), ("message", "claude-haiku-5-5", 0, 0, 1)),
    ),
    Bill(  # each prompt has its own length: 60,000 x 100 twice
        12_000_000, "claude-haiku-5-5", T(120_000), ran(("message", "claude-haiku-5-5", 60_000), ("message", "claude-haiku-5-5", 60_000)),
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", BILLS, ids=[f"{n}-{row.model}" for n, row in enumerate(BILLS)])
def test_the_bill_is_what_the_hand_says(row: Bill) -> None:
    assert bill(used(row.model, row.tokens, **(row.more or {})), day(row.at), hour=row.hour).nano == row.nano


def test_a_priced_answer_names_its_rows_and_its_parts_add_up() -> None:
    parts = ran(("message", "claude-sonnet-5", 1128, 110), ("advisor_message", "claude-opus-4-8", 2518, 22))
    known = bill(used("claude-sonnet-5", T(1128, 110), web_search_requests=2, **parts))
    assert known.price_rows == "claude-sonnet-5@2026-06-30, claude-opus-4-8"
    assert [(part.kind, part.web_searches) for part in known.parts] == [("message", 0), ("advisor_message", 0), ("web_search", 2)]
    assert sum(part.nano for part in known.parts) == known.nano


UNPRICED = {
    "a model without a price": (used("claude-nova-9", T(1)), "model_unpriced"),
    "a model that is not named": (used(None, T(1)), "model_unpriced"),
    "one iteration of a model without a price": (used(tokens=T(1), **ran(("message", "claude-opus-5-5", 1), ("advisor_message", "x", 1))), "model_unpriced"),
    "an advisor that names no model": (used(tokens=T(1), **ran(("advisor_message", None, 1))), "model_unpriced"),
    "fast mode where it has no price": (used("claude-sonnet-5", T(1), speed="fast"), "fast_unpriced"),
    "an unknown speed where fast has no price": (used("claude-sonnet-5", T(1), speed="warp"), "fast_unpriced"),
    "usage that was not understood": (used(tokens=T(1), readable=False), "unreadable"),
    "no usage at all": (Usage(), "unreadable"),
}


@pytest.mark.parametrize(("usage", "flag"), UNPRICED.values(), ids=UNPRICED)
def test_what_cannot_be_priced_is_none_and_never_zero(usage: Usage, flag: str) -> None:
    known = bill(usage)
    assert known.nano is None
    assert flag in known.flags
    assert any(note.startswith(FLAGS[flag]) for note in known.notes)


FLAGGED = {
    "incomplete": used(tokens=T(1), complete=False),
    "estimated": used(tokens=T(1), complete=False).assuming_output(5),
    "refused_before_output": used(tokens=T(1), refused_before_output=True),
    "declined_hop": used(tokens=T(1, 1), **ran(("message", "claude-fable-5-2", 1, 0), ("fallback_message", "claude-opus-5-5", 1, 1))),
    "top_level_larger": used(tokens=T(9), **ran(("message", "claude-opus-5-5", 1))),
    "code_execution": used(tokens=T(1), code_executed=True),
    "priority_tier": used(tokens=T(1), service_tier="priority"),
    "tier_unknown": used(tokens=T(1), service_tier="gold"),
    "geo_unknown": used(tokens=T(1), inference_geo="mars"),
    "speed_unknown": used(tokens=T(1), speed="warp"),
    "fallback_credit": used(tokens=T(1), fallback_credit="redeemed"),
    "error": Usage(error_type="overloaded_error"),
}


@pytest.mark.parametrize("flag", FLAGGED)
def test_each_doubt_is_flagged_alone_with_its_sentence(flag: str) -> None:
    known = bill(FLAGGED[flag])
    assert known.flags == (flag,)
    assert known.notes[0].startswith(FLAGS[flag])
    assert known.nano is not None


def test_every_flag_is_tested() -> None:
    assert set(FLAGGED) | {flag for _, flag in UNPRICED.values()} == set(FLAGS)


def test_a_plain_answer_and_iterations_that_add_up_carry_no_flag() -> None:
    assert bill(used(tokens=T(10, 20))).flags == ()
    assert bill(used(tokens=T(10, 20), **ran(("message", "claude-opus-5-5", 4, 5), ("message", "claude-opus-5-5", 6, 15)))).flags == ()


def test_the_difference_to_a_dearer_top_level_is_named() -> None:
    known = bill(used("claude-haiku-5-5", T(120_000), **ran(("message", "claude-haiku-5-5", 60_000), ("message", "claude-haiku-5-5", 60_000))))
    assert known.nano == 12_000_000
    assert "difference $0.048" in known.notes[0]  # 120,000 x 500 - 12,000,000


def test_an_error_is_free_only_before_the_answer_began() -> None:
    assert bill(Usage(error_type="overloaded_error")).nano == 0
    assert bill(used(tokens=T(1), complete=False, error_type="overloaded_error")).nano == 4_000


@pytest.mark.parametrize("model", PRICES.models())
def test_rates_are_one_place_for_quotes_and_bills(model: str) -> None:
    row = PRICES.row(model, NOW)
    assert row is not None
    tokens = T(70_000, 900, 30_000, 200, 100)
    rate = rates(row, prompt_tokens=tokens.prompt_tokens, speed=None, inference_geo="us", batch=True)
    assert bill(used(model, tokens, **BATCH | US)).nano == -(-rate.price(tokens, hour_ttl=False) // 1)


# The table: ids, dates.


@pytest.mark.parametrize(
    ("asked", "canonical"),
    [
        ("claude-opus-5-5", "claude-opus-5-5"),
        ("claude-opus-5-5[1m]", "claude-opus-5-5"),
        ("claude-sonnet-4-5", "claude-sonnet-4-5"),
        ("claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
        ("claude-sonnet-4-5-20250929[1m]", "claude-sonnet-4-5"),
        ("claude-opus-4-0", "claude-opus-4"),
        ("claude-opus-4-20250514", "claude-opus-4"),
        ("claude-sonnet-4-20250514", "claude-sonnet-4"),
        ("claude-3-5-sonnet-20241022", "claude-3-5-sonnet"),
        ("claude-3-5-haiku-latest", "claude-3-5-haiku"),
        ("claude-2.1", "claude-2.1"),
        *[(odd, None) for odd in ("", "claude", "claude-opus", "claude-opus-4.1", "Claude-Opus-5-5", "claude-opus-5-5 ", "claude-opus-5-6")],
        *[(odd, None) for odd in ("claude-haiku-evil", "claude-opus-5-5-evil", "claude-opus-5-5[2m]", "claude-opus-5-5[1m][1m]")],
        *[(odd, None) for odd in ("claude-opus-5-5-19990101", "claude-opus-5-5-2026111", "claude-opus-5-5-20260101-20260101")],
        *[(odd, None) for odd in ("anthropic/claude-opus-5-5", "us.anthropic.claude-opus-5-5", "claude-opus-4-0-20250514x", "*")],
    ],
)
def test_ids_resolve_by_rule_and_an_unknown_one_has_no_price(asked: str, canonical: str | None) -> None:
    assert PRICES.canonical(asked) == canonical
    row = PRICES.row(asked, NOW)
    assert (row.model if row else None) == canonical


def test_a_price_row_holds_from_midnight_utc() -> None:
    """The first row also covers the past."""
    names = [PRICES.row("claude-sonnet-5-5", day("2026-10-07") + seconds) for seconds in (-1, 0)]
    assert [row.name for row in names if row] == ["claude-sonnet-5-5@2026-09-28", "claude-sonnet-5-5@2026-10-07"]
    first = PRICES.row("claude-fable-5-2", 0)
    assert first is not None
    assert first.name == "claude-fable-5-2@2026-11-09"


# Properties: a stream and a JSON answer of the same usage cost the same; no rounding loses money.

COUNT = st.integers(0, 300_000)
USAGE = st.fixed_dictionaries(
    {"input_tokens": COUNT, "output_tokens": COUNT},
    optional={
        "cache_read_input_tokens": COUNT,
        "cache_creation_input_tokens": COUNT,
        "cache_creation": st.fixed_dictionaries({"ephemeral_5m_input_tokens": COUNT, "ephemeral_1h_input_tokens": COUNT}),
        "service_tier": st.sampled_from(["standard", "batch", "priority"]),
        "speed": st.sampled_from(["standard", "fast"]),
        "inference_geo": st.sampled_from(["us", "global", "not_available"]),
        "server_tool_use": st.fixed_dictionaries({"web_search_requests": st.integers(0, 9)}),
        "iterations": st.lists(
            st.fixed_dictionaries({"type": st.sampled_from(["message", "compaction"]), "input_tokens": COUNT, "output_tokens": COUNT}), max_size=3
        ),
    },
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(USAGE, st.sampled_from(["claude-opus-5-5", "claude-haiku-5-5", "claude-fable-5-2"]), st.booleans())
def test_a_stream_and_a_json_answer_of_one_usage_cost_the_same(usage: dict[str, Any], model: str, hour: bool) -> None:
    whole = {"type": "message", "id": "m", "model": model, "content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn", "usage": usage}
    opening = {**whole, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1, "iterations": None}}
    totals = {key: value for key, value in usage.items() if key not in ("cache_creation", "service_tier", "speed", "inference_geo")}
    events = [
        {"type": "message_start", "message": opening},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "x"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": totals},
    ]
    stream, plain = Meter("text/event-stream"), Meter("application/json")
    stream.feed(b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events))
    plain.feed(json.dumps(whole).encode())
    assert bill(stream.close(), hour=hour) == bill(plain.close(), hour=hour)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.tuples(COUNT, COUNT, COUNT, COUNT, COUNT, COUNT), min_size=1, max_size=4), st.sampled_from([{}, BATCH, US, BATCH | US, FAST | US]))
def test_a_part_is_rounded_up_by_less_than_a_nano_dollar(parts: list[tuple[int, ...]], more: dict[str, str]) -> None:
    known = bill(used(tokens=T(1), **more, **ran(*[("message", "claude-opus-5-5", *tokens) for tokens in parts])))
    row = PRICES.row("claude-opus-5-5", NOW)
    assert row is not None
    for part in known.parts:
        rate = rates(
            row, prompt_tokens=part.tokens.prompt_tokens, speed=more.get("speed"), inference_geo=more.get("inference_geo"),
            batch=more.get("service_tier") == "batch",
        )  # fmt: skip
        exact = rate.price(part.tokens, hour_ttl=part.tokens.cache_write_1h_tokens > 0)
        assert 0 <= part.nano - exact < 1
