"""The price file: complete, dated, held against another source; and every way in which an operator's own can be wrong."""

import json
import re
from datetime import UTC, date, datetime
from fractions import Fraction
from pathlib import Path

import genai_prices
import pytest
from click.testing import CliRunner
from genai_prices.types import PriceCalculation
from handbook import blocks, page

from gateway_addon import policy
from gateway_addon.cli.prices import prices as prices_command
from gateway_addon.messages import TokenCounts
from gateway_addon.pricing import PriceError, PriceRow, Prices, load, rates
from gateway_addon.pricing.loading import SHIPPED

PRICES = load()
TODAY = datetime(2026, 11, 23, 12, tzinfo=UTC)


def row(model: str, prices: Prices = PRICES, at: datetime = TODAY) -> PriceRow:
    found = prices.row(model, at.timestamp())
    assert found is not None
    return found


# The shipped table.

CURRENT = [
    "claude-fable-5-2", "claude-mythos-5-2", "claude-fable-5-1", "claude-mythos-5-1", "claude-fable-5", "claude-mythos-5",
    "claude-opus-5-5", "claude-opus-5", "claude-opus-4-8", "claude-opus-4-7", "claude-opus-4-6", "claude-opus-4-5",
    "claude-sonnet-5-5", "claude-sonnet-5", "claude-sonnet-4-6", "claude-sonnet-4-5", "claude-haiku-5-5", "claude-haiku-4-5",
]  # fmt: skip


@pytest.mark.parametrize("model", CURRENT)
def test_every_current_model_is_priced_and_described(model: str) -> None:
    found = row(model)
    assert found.retired != ""
    assert found.source
    assert found.context_tokens >= 200_000
    assert found.output_tokens_max >= 64_000
    assert found.high_resolution == (found.model not in ("claude-opus-4-6", "claude-sonnet-4-6") and not found.model.endswith("4-5"))
    assert found.geo == (not found.model.endswith("4-5"))


def test_the_table_has_its_check_date_and_explains_its_sources() -> None:
    assert date.fromisoformat(PRICES.checked) >= date(2026, 11, 23)
    text = SHIPPED.read_text()
    letters = set(re.findall(r"^  ([A-Z]): ", text, re.MULTILINE))
    assert {letter for model in PRICES.models() for letter in row(model).source.split()} <= letters


def test_the_declared_pace_is_generous_and_marked_assumed() -> None:
    """Pace and lag are what progressive reservations rest on."""
    for model in PRICES.models():
        found = row(model)
        assert found.output_tokens_per_second_max >= 400
        assert found.lag_s >= 5
        assert found.assumed


def test_only_models_with_a_fast_mode_have_a_price_for_it() -> None:
    fast = {model for model in PRICES.models() if row(model).fast}
    assert fast == {"claude-fable-5-2", "claude-mythos-5-2", "claude-opus-5-5", "claude-opus-5", "claude-opus-4-8"}


# Held against genai-prices. What it is known to lack or to have otherwise:
GAPS = {
    "claude-mythos-5": "not in its table",
    "claude-mythos-5-1": "not in its table",
    "claude-mythos-preview": "not in its table",
    "claude-2.1": "has no cache prices for it, as the model had no cache",
    "claude-2.0": "has no cache prices for it, as the model had no cache",
}
# In none of its rows: inference_geo (x1.1), the sonnet-5-5 reads before 2026-10-07, sonnet-4 over 200,000 tokens.
SAMPLES = {
    "plain": TokenCounts(1000, 100),
    "every kind of cache": TokenCounts(1000, 100, 2000, 300, 400),
    "long": TokenCounts(99_000, 10, 1_001),
}


def theirs(model: str, tokens: TokenCounts, context: dict[str, str] | None = None) -> PriceCalculation:
    usage = genai_prices.Usage(
        input_tokens=tokens.prompt_tokens,
        output_tokens=tokens.output_tokens,
        cache_read_tokens=tokens.cache_read_tokens,
        cache_write_tokens=tokens.cache_write_5m_tokens + tokens.cache_write_1h_tokens,
        cache_write_1h_tokens=tokens.cache_write_1h_tokens,
    )
    more = {"price_context": context} if context else {}
    return genai_prices.calc_price(usage, model, provider_id="anthropic", genai_request_timestamp=TODAY, **more)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("model", [model for model in PRICES.models() if model not in GAPS])
def test_list_prices_agree_with_genai_prices(model: str, sample: str) -> None:
    tokens = SAMPLES[sample]
    ours = rates(row(model), prompt_tokens=tokens.prompt_tokens, speed=None, inference_geo=None, batch=False).price(tokens, hour_ttl=False)
    assert ours == Fraction(theirs(model, tokens).total_price) * 10**9


@pytest.mark.parametrize(("ours", "context"), [({"batch": True}, {"processing": "batch"}), ({"speed": "fast"}, {"speed": "fast"})])
@pytest.mark.parametrize("model", ["claude-fable-5-2", "claude-opus-5-5", "claude-opus-5", "claude-opus-4-8"])
def test_batch_and_fast_agree_with_genai_prices(model: str, ours: dict[str, object], context: dict[str, str]) -> None:
    tokens = SAMPLES["every kind of cache"]
    terms = {"speed": None, "inference_geo": None, "batch": False, **ours}
    rate = rates(row(model), prompt_tokens=tokens.prompt_tokens, **terms)
    assert rate.price(tokens, hour_ttl=False) == Fraction(theirs(model, tokens, context).total_price) * 10**9


@pytest.mark.parametrize("model", [model for model, why in GAPS.items() if why == "not in its table"])
def test_the_known_gaps_are_still_there(model: str) -> None:
    with pytest.raises(LookupError):
        theirs(model, SAMPLES["plain"])


# The operator's own file.


def override(folder: Path, text: str) -> Prices:
    path = folder / "policies" / "prices.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return load(None, path)


NEW = """\
models:
  claude-own-1:
    source: our contract
    aliases: [own]
    context_tokens: 100_000
    output_tokens_max: 4_096
    output_tokens_per_second_max: 50
    lag_s: 2.5
    pace_source: measured here
    prices:
      - {input: 1, output: 2, write_5m: 1.25, write_1h: 2, read: 0.1}
"""


def test_an_override_replaces_only_the_keys_that_it_names(tmp_path: Path) -> None:
    found = override(tmp_path, "models:\n  claude-opus-5-5:\n    prices:\n      - {input: 3, output: 15, write_5m: 3.75, write_1h: 6, read: 0.15}\n")
    assert row("claude-opus-5-5", found).rates.input == 3000
    assert row("claude-opus-5-5", found).fast == 2
    assert row("claude-opus-5", found).rates.input == 5000
    assert found.digest != PRICES.digest


def test_an_override_adds_a_model_with_its_alias_and_its_pace(tmp_path: Path) -> None:
    found = row("own", override(tmp_path, NEW))
    assert (found.model, found.rates.output, found.output_tokens_per_second_max, found.lag_s) == ("claude-own-1", 2000, 50, 2.5)
    assert not found.assumed


@pytest.mark.parametrize(("multiplier", "nano"), [("0.85", 850_000), ("1.2", 1_200_000), ("3", 3_000_000), ("1", 1_000_000)])
def test_the_multiplier_scales_all_that_is_billed(tmp_path: Path, multiplier: str, nano: int) -> None:
    found = row("claude-haiku-4-5", override(tmp_path, f"multiplier: {multiplier}\n"))
    assert rates(found, prompt_tokens=0, speed=None, inference_geo=None, batch=False).input * 1000 == nano
    assert found.web_search_nano * found.multiplier == nano * 10


def test_the_prices_that_the_handbook_shows_come_into_force(tmp_path: Path) -> None:
    [shown] = [block.text for block in blocks(page("prices")) if block.language == "yaml"]
    found = override(tmp_path, shown)
    assert [row("claude-opus-5-5", found, at).rates.input for at in (TODAY, datetime(2027, 1, 1, tzinfo=UTC))] == [4000, 3000]
    assert row("claude-opus-5-5", found).multiplier == Fraction(9, 10)


@pytest.mark.parametrize(("upstream", "multiplier"), [("https://api.anthropic.com", Fraction(9, 10)), ("https://broker.example", Fraction(12, 10))])
def test_each_upstream_may_have_a_multiplier_of_its_own(tmp_path: Path, upstream: str, multiplier: Fraction) -> None:
    (tmp_path / "prices.yaml").write_text("multiplier: {https://api.anthropic.com: 0.9, https://broker.example/: 1.2}\n")
    (tmp_path / "gateway.yaml").write_text(f"upstream: {upstream}\n")
    assert row("claude-haiku-4-5", policy.load(tmp_path).prices).multiplier == multiplier
    document = json.loads(run("--policies", str(tmp_path), "--json"))
    assert Fraction(document["models"][0]["multiplier"]) == multiplier


def test_an_upstream_missing_among_multipliers_is_an_error(tmp_path: Path) -> None:
    """It would otherwise be billed at list prices."""
    (tmp_path / "prices.yaml").write_text("multiplier:\n  https://broker.example: 1.2\n")
    (tmp_path / "gateway.yaml").write_text("upstream: https://api.anthropic.com\n")
    with pytest.raises(policy.PolicyError, match=r"prices.yaml:2: multiplier: has no line for https://api.anthropic.com, the upstream in force"):
        policy.load(tmp_path)


def test_the_assumed_pace_can_be_set_for_all_models(tmp_path: Path) -> None:
    found = override(tmp_path, "assumed: {lag_s: 9}\n")
    assert row("claude-opus-5", found).lag_s == 9
    assert row("claude-opus-5", found).output_tokens_per_second_max == 400


ROW = "{input: 4, output: 20, write_5m: 5, write_1h: 8, read: 0.2}"


def own(prices: str = f"[{ROW}]", more: str = "") -> str:
    return f"models:\n  claude-opus-5-5:\n    prices: {prices}\n{more}"


WRONG = {
    "a key mistyped": ("multiplyer: 2\n", ":1: multiplyer: unknown key, did you mean multiplier?"),
    "a model's key mistyped": (own(more="    contxt_tokens: 5\n"), ":4: models.claude-opus-5-5.contxt_tokens: unknown key, did you mean context_tokens?"),
    "a row's key mistyped": (own(f"[{ROW[:-1]}, form: 2026-01-01}}]"), "form: unknown key, did you mean from?"),
    "a key given twice": ("multiplier: 1\nmultiplier: 2\n", ":2: multiplier: given twice (first on line 1)"),
    "per token instead of per million": (own(f"[{ROW.replace('4,', '0.000004,')}]"), ":3: models.claude-opus-5-5.prices.0.input: $0.000004 per million"),
    "per thousand instead of per million": (own(f"[{ROW.replace('20', '0.02')}]"), "is it per token, or per thousand?"),
    "nano-dollars": (own(f"[{ROW.replace('20', '20000')}]"), "$20000 per million tokens cannot be right"),
    "free": (own(f"[{ROW.replace('4,', '0,')}]"), "'0' is not a number above 0"),
    "negative": (own(f"[{ROW.replace('4,', '-4,')}]"), "'-4' is not a number above 0"),
    "not a number": (own(f"[{ROW.replace('4,', '.nan,')}]"), "'.nan' is not a number above 0"),
    "scientific": (own(f"[{ROW.replace('4,', '4e0,')}]"), "'4e0' is not a number above 0; write it plainly, like 2.5"),
    "no output price": (own(f"[{ROW.replace('output: 20, ', '')}]"), "prices.0: `output` is missing"),
    "input and output swapped": (own(f"[{ROW.replace('input: 4, output: 20', 'input: 20, output: 4')}]"), "`input` is dearer than `output`"),
    "reads dearer than input": (own(f"[{ROW.replace('0.2', '5')}]"), "`read` is dearer than `input`"),
    "writes swapped": (own(f"[{ROW.replace('write_5m: 5, write_1h: 8', 'write_5m: 8, write_1h: 5')}]"), "`write_5m` is dearer than `write_1h`"),
    "no rows": (own("[]"), "a model without a row has no price"),
    "rows that are no list": (own(ROW), "expected a list"),
    "a date that is none": (own(f"[{{from: 2026-13-01, {ROW[1:]}]"), "'2026-13-01' is not a day; write YYYY-MM-DD"),
    "dates out of order": (
        own(f"[{{from: 2026-02-01, {ROW[1:]}, {{from: 2026-01-01, {ROW[1:]}]"),
        "prices.1: `from:` must be later than that of the row above it",
    ),
    "a second row without a date": (own(f"[{ROW}, {ROW}]"), "prices.1: `from:` must be later"),
    "a long prompt without a limit": (own(f"[{{{ROW[1:-1]}, long_prompt: {ROW}}}]"), "`above` is missing"),
    "a multiplier of nothing": ("multiplier: 0\n", ":1: multiplier: '0' is not a number above 0"),
    "a multiplier below nothing": ("multiplier: -0.5\n", "'-0.5' is not a number above 0"),
    "a multiplier of nothing for one upstream": (
        "multiplier: {https://api.anthropic.com: 0}\n", ":1: multiplier.https://api.anthropic.com: '0' is not a number above 0"
    ),
    "a new model without a window": (NEW.replace("    context_tokens: 100_000\n", ""), "context_tokens is missing"),
    "an empty new model": ("models:\n  claude-own-1: {}\n", "source, context_tokens, output_tokens_max, prices are missing"),
    "an alias of another model": (NEW.replace("[own]", "[claude-opus-5]"), "claude-opus-5 already names claude-opus-5"),
    "an alias taken": (NEW.replace("[own]", "[claude-opus-4-0]"), "claude-opus-4-0 already names claude-opus-4"),
    "a window of no tokens": (own(more="    context_tokens: 0\n"), "'0' is not a whole number above 0; write one like 200_000"),
    "a flag that is none": (own(more="    geo: yes\n"), "'yes' is neither true nor false"),
    "an end that is no day": (own(more="    retired: yes\n"), "'yes' is not a day; write YYYY-MM-DD, or true where it is long past"),
    "an empty file": ("", ":1: the file is empty"),
    "no YAML": ("models: [", "not readable as YAML"),
    "a list": ("- 1\n", ":1: expected keys with values"),
    "nothing under models": ("models:\n", "models: expected keys with values"),
}


@pytest.mark.parametrize(("text", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_price_file_is_refused_with_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(PriceError) as caught:
        override(tmp_path, text)
    assert str(caught.value).startswith("policies/prices.yaml:")
    assert sentence in str(caught.value)


def test_every_mistake_of_a_price_file_is_listed(tmp_path: Path) -> None:
    """Beside each other and inside each other: keys, models, rows, rates."""
    rows = "[{input: 0, output: 20, write_5m: free, write_1h: 8, read: 0.2, from: soon, form: 1}, " + ROW + "]"
    more = "    context_tokens: none\n    geo: yes\n    aliases: [claude-opus-5]\n    lag_s: 0\n  claude-own-1: {}\n  claude-own-1: {}\nmultiplyer: 2\nmultiplier: 0\n"
    with pytest.raises(PriceError) as caught:
        override(tmp_path, own(rows, more))
    lines = [line.removeprefix("policies/prices.yaml:").split(": ")[:3] for line in str(caught.value).splitlines()]
    opus = "models.claude-opus-5-5"
    assert sorted((int(line), place) for line, place, *_ in lines) == sorted([
        (3, f"{opus}.prices.0.input"), (3, f"{opus}.prices.0.write_5m"), (3, f"{opus}.prices.0.from"), (3, f"{opus}.prices.0.form"),
        (3, f"{opus}.prices.1"), (4, f"{opus}.context_tokens"), (5, f"{opus}.geo"), (6, f"{opus}.aliases"), (7, f"{opus}.lag_s"),
        (8, "models.claude-own-1"), (9, "models.claude-own-1"), (10, "multiplyer"), (11, "multiplier"),
    ]), caught.value  # fmt: skip


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(PriceError, match=r"prices\.yaml: not readable"):
        load(None, tmp_path / "prices.yaml")
    (tmp_path / "prices.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(PriceError, match="not UTF-8"):
        load(None, tmp_path / "prices.yaml")


def test_a_shipped_table_without_its_common_keys_says_which(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("models: {}\n")
    with pytest.raises(PriceError, match="checked is missing"):
        load(tmp_path / "prices.yaml")


# gateway prices


def run(*arguments: str) -> str:
    result = CliRunner().invoke(prices_command, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_the_table_of_a_day(tmp_path: Path) -> None:
    empty = ("--policies", str(tmp_path))
    line = next(line for line in run(*empty, "--at", "2026-10-06").splitlines() if line.startswith("claude-sonnet-5-5"))
    assert line.split() == ["claude-sonnet-5-5", "2", "10", "2.50", "4", "0.20", "2026-09-28"]
    line = next(line for line in run(*empty, "--at", "2026-10-07").splitlines() if line.startswith("claude-sonnet-5-5"))
    assert line.split() == ["claude-sonnet-5-5", "2", "10", "2.50", "4", "0.10", "2026-10-07"]
    assert "claude-3-opus" not in run(*empty)
    assert "claude-3-opus" in run(*empty, "--all")


def test_the_command_shows_the_operators_own_prices_as_json(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("multiplier: 0.85\n")
    document = json.loads(run("--policies", str(tmp_path), "--json"))
    opus = next(model for model in document["models"] if model["model"] == "claude-opus-5-5")
    assert (opus["input"], opus["cache_read"], opus["multiplier"]) == ("3.40", "0.17", "0.85")
    assert document["checked"] == PRICES.checked


def test_the_command_refuses_a_wrong_file(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("multiplier: 0\n")
    result = CliRunner().invoke(prices_command, ["--policies", str(tmp_path)])
    assert result.exit_code == 2
    assert "prices.yaml:1: multiplier: '0' is not a number above 0" in result.output
