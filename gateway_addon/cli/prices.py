"""`gateway prices`: the price table in force on a day, as people write prices (dollars per million tokens)."""

import json
import time
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli.common import json_option, policies_option, says_errors
from gateway_addon.cli.times import start_of_day
from gateway_addon.names import PROGRAM
from gateway_addon.operations.tables import table
from gateway_addon.policy import PolicyError, load_prices
from gateway_addon.pricing import PriceRow, Prices, Rates, Retirement

_COLUMNS = ("model", "input", "output", "write 5m", "write 1h", "read", "since", "also")


@click.command(epilog=f"Example: {PROGRAM} prices")
@click.option("--at", metavar="DATE", help="Prices of that day (YYYY-MM-DD) instead of today's.")
@click.option("--all", "retired", is_flag=True, help="Retired models too.")
@json_option
@policies_option
@says_errors(PolicyError, ValueError)
def prices(at: str | None, retired: bool, as_json: bool, policies: Path) -> None:
    """Print the prices in force: dollars per million tokens, with your own rows and multiplier (prices.yaml, beside gateway.yaml)."""
    found = load_prices(policies)
    day = start_of_day(at) if at else time.time()
    rows = [row for model in found.models() if (row := found.row(model, day)) and (retired or not _gone(row, day))]
    click.echo(json.dumps(_document(found, rows, day), indent=2) if as_json else _text(found, rows, day))


def _text(found: Prices, rows: list[PriceRow], day: float) -> str:
    lines = []
    for row in rows:
        lines.append((row.model, *_dollars(row.rates.times(row.multiplier)).values(), row.since or "", _also(row, day)))
        if row.long_prompt:
            over = f"  prompt > {row.long_prompt.above_tokens:,}"
            lines.append((over, *_dollars(row.long_prompt.rates.times(row.multiplier)).values(), row.since or "", "the whole request"))
    grid = table(lines, _COLUMNS, right=_COLUMNS[1:6])
    some = rows[0]
    return (
        f"{grid}\n\n$ per million tokens on {_day(day)} (table checked {found.checked}). Modifiers: batch x{float(some.batch):g}, "
        f"inference_geo us x{float(some.geo_us):g}; web search ${_exact(some.web_search_nano * some.multiplier / 1_000_000)} per 1,000."
        + (f" All include your multiplier of {_exact(some.multiplier)}." if some.multiplier != 1 else "")
    )


def _also(row: PriceRow, day: float) -> str:
    notes = [f"fast x{_exact(row.fast)}" + (f" until {row.fast_retired}" if row.fast_retired else "")] if row.fast else []
    ends = [] if row.retired is None else ["retired"] if _gone(row, day) else [f"until {row.retired}"]
    return ", ".join(notes + ends)


def _gone(row: PriceRow, at: float) -> bool:
    return row.retired is not None and Retirement(row.model, False, row.retired).is_past(at)


def _document(table: Prices, rows: list[PriceRow], day: float) -> dict[str, Any]:
    return {
        "at": _day(day),
        "checked": table.checked,
        "digest": table.digest,
        "unit": "dollars per million tokens",
        "models": [_row(row, day) for row in rows],
    }


def _row(row: PriceRow, day: float) -> dict[str, Any]:
    long = row.long_prompt
    return {
        "model": row.model,
        "since": row.since,
        **_dollars(row.rates.times(row.multiplier)),
        "long_prompt": {"above_tokens": long.above_tokens, **_dollars(long.rates.times(row.multiplier))} if long else None,
        "fast": _exact(row.fast) if row.fast else None,
        "batch": _exact(row.batch),
        "geo_us": _exact(row.geo_us) if row.geo else None,
        "web_search_per_1000": _exact(row.web_search_nano * row.multiplier / 1_000_000),
        "multiplier": _exact(row.multiplier),
        "context_tokens": row.context_tokens,
        "output_tokens_max": row.output_tokens_max,
        "output_tokens_per_second_max": row.output_tokens_per_second_max,
        "lag_s": row.lag_s,
        "turn_s_min": row.turn_s_min,
        "assumed": row.assumed,
        "retired": _gone(row, day),
        "retires": row.retired or None,
        "fast_retires": row.fast_retired or None,
        "source": row.source,
    }


def _dollars(rates: Rates) -> dict[str, str]:
    """Return dollars per million tokens as text: an amount of money is never a float."""
    kinds = ("input", "output", "cache_write_5m", "cache_write_1h", "cache_read")
    return {kind: _exact(getattr(rates, kind) / 1000) for kind in kinds}


def _exact(number: Fraction) -> str:
    """Write a decimal fraction out: prices and multipliers have a few decimals, never a recurring one."""
    text = f"{number:.12f}".rstrip("0")
    whole, _, fraction = text.partition(".")
    return f"{whole}.{fraction.ljust(2, '0')}" if fraction else whole


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).date().isoformat()
