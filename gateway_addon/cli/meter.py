"""`gateway meter`: recorded responses in, usage and cost out. Reads the same rooms as the gateway itself."""

import base64
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import click

from gateway_addon.cli.times import start_of_day
from gateway_addon.messages import Meter, Usage
from gateway_addon.names import PROGRAM
from gateway_addon.pricing import Cost, PriceError, Prices, cost, load


@click.command(epilog=f"Example: {PROGRAM} meter answer.sse")
@click.argument("recording", type=click.File("rb"), default="-", metavar="[FILE]")
@click.option("--jsonl", is_flag=True, help="Read rows of JSON, one recorded response each; print one row for each.")
@click.option("--content-type", default="application/json", show_default=True, help="Of a single body; a stream is recognised anyway.")
@click.option("--content-encoding", help="Of a single body; compression is mostly recognised anyway.")
@click.option("--at", metavar="DATE", help="Prices of that day (YYYY-MM-DD) instead of today's.")
@click.option("--prices", "override", type=click.Path(exists=True, dir_okay=False), help="A prices.yaml of your own.")
def meter(recording: BinaryIO, jsonl: bool, content_type: str, content_encoding: str | None, at: str | None, override: str | None) -> None:
    """Read a recorded response (FILE or stdin) and print its usage and cost as JSON."""
    try:
        prices = load(None, Path(override) if override else None)
        default_at = start_of_day(at) if at else time.time()
        if jsonl:
            for number, row in _rows(recording):
                click.echo(json.dumps(_answer(number, row, prices, default_at)))
        else:
            usage = _read(recording.read(), content_type, content_encoding)
            click.echo(json.dumps(_printed(usage, _cost(usage, None, prices, default_at)), indent=2))
    except (PriceError, ValueError) as error:
        click.echo(f"{PROGRAM} meter: {error}", err=True)
        sys.exit(2)


def _rows(lines: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of the input. Raises ValueError with the number of the line that is not one."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("body"), str):
                raise ValueError(f'line {number} is not a row like {{"content_type": ..., "body": ...}}')
            yield number, row


def _answer(number: int, row: dict[str, Any], prices: Prices, default_at: float) -> dict[str, Any]:
    try:
        body = base64.b64decode(row["body"], validate=True) if row.get("body_encoding") == "base64" else row["body"].encode()
    except ValueError:
        raise ValueError(f"line {number}: its body is not base64") from None
    usage = _read(body, str(row.get("content_type") or ""), row.get("content_encoding"))
    at = start_of_day(row["at"]) if row.get("at") else default_at
    status = row["status"] if type(row.get("status")) is int else None
    return _printed(usage, _cost(usage, row.get("request"), prices, at, status))


def _read(body: bytes, content_type: str, content_encoding: str | None) -> Usage:
    reader = Meter(content_type, content_encoding)
    reader.feed(body)
    return reader.close()


def _cost(usage: Usage, request: object, prices: Prices, at: float, status: int | None = None) -> Cost:
    """Return the exact cost of a whole answer; the most that one which broke off can have cost, where the request tells.

    As settlement has it: an answer behind an error's status is none that is whole, and one that told no prompt bounds nothing.
    """
    body = request if isinstance(request, dict) else {}
    if usage.complete and usage.started and status is not None and status >= 400:
        usage = replace(usage, complete=False)
    if usage.prompt_known and not usage.complete and type(body.get("max_tokens")) is int:
        usage = usage.assuming_output(body["max_tokens"])
    hour_ttl = _asks_for_an_hour(body)
    known = cost(prices, usage, at=at, hour_ttl_requested=hour_ttl, status=status)
    return Cost(None, known.parts, known.flags, known.notes) if "incomplete" in known.flags else known


def _asks_for_an_hour(value: object) -> bool:
    """Tell whether any `cache_control` in the request asks for a ttl of 1h."""
    if isinstance(value, dict):
        control = value.get("cache_control")
        return (isinstance(control, dict) and control.get("ttl") == "1h") or any(map(_asks_for_an_hour, value.values()))
    return isinstance(value, list) and any(map(_asks_for_an_hour, value))


def _printed(usage: Usage, known: Cost) -> dict[str, Any]:
    """Return the output for programs: keys are added, never renamed."""
    return {
        "model": usage.model,
        "usage": {
            **asdict(usage.tokens),
            "web_search_requests": usage.web_search_requests,
            "web_fetch_requests": usage.web_fetch_requests,
            "code_execution_requests": usage.code_execution_requests,
        },
        "iterations": [{"type": part.kind, "model": part.model, **asdict(part.tokens)} for part in usage.iterations],
        "stop_reason": usage.stop_reason,
        "service_tier": usage.service_tier,
        "speed": usage.speed,
        "inference_geo": usage.inference_geo,
        "price_rows": list(dict.fromkeys(part.price_row for part in known.parts if part.price_row)),
        "error_type": usage.error_type,
        "complete": usage.complete,
        "cost_nano": known.nano,
        "parts": [{"type": part.kind, "model": part.model, "nano": part.nano} for part in known.parts],
        "flags": list(known.flags),
        "notes": [*known.notes, *usage.notes],
    }
