"""`gateway invoice`: what to charge each app's owner on for a month."""

import json
import time
from datetime import datetime, tzinfo
from itertools import groupby
from pathlib import Path

import click

from gateway_addon.cli.common import json_option, ledger_option, policies_option, says_errors
from gateway_addon.cli.report import csv_text
from gateway_addon.cli.scopes import must_know
from gateway_addon.ledger import LedgerUnavailable, connect, reservations
from gateway_addon.ledger.reports.invoice import InvoiceLine
from gateway_addon.ledger.reports.invoice import invoice as invoice_lines
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.money import dollars
from gateway_addon.names import PROGRAM, safe_name
from gateway_addon.operations.tables import table
from gateway_addon.windows import next_start, starts

HEADINGS = ("model", "input", "output", "cache read", "cache write", "searches", "charge")


@click.command(epilog=f"Example: {PROGRAM} invoice --month 2026-10")
@click.option("--month", metavar="YYYY-MM", help="A month of the gateway's zone; default: the last one that is over.")
@click.option("--app", help="Of this app alone.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV (amounts in dollars and in nano-dollars).")
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, ValueError)
def invoice(month: str | None, app: str | None, as_json: bool, as_csv: bool, policies: Path, ledger: str) -> None:
    """Print what each app is to be charged for a month, by model with every kind of token; it sums to the ledger to the nano-dollar."""
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other.")
    with connect.reading(sqlite_files.ledger_path(ledger)) as db:
        calendar = reservations.zone(db)
        since, until = _span(month, time.time(), calendar)
        wanted = None if app is None else must_know(app, db, policies)
        lines = [
            each._replace(model=safe_name(each.model)) for each in invoice_lines(db, since=since, until=until) if wanted in (None, each.app)
        ]
    rows = [_row(each) for each in lines]
    if as_json:
        title = datetime.fromtimestamp(since, calendar).strftime("%Y-%m")
        click.echo(json.dumps({"month": title, "lines": rows, "spent_nano": sum(each.spent_nano for each in lines)}, indent=2))
    elif as_csv:
        click.echo(csv_text(rows), nl=False)
    else:
        click.echo(_written(lines, since, calendar))


def _span(month: str | None, now: float, calendar: tzinfo) -> tuple[int, int]:
    """The first moments of a month and of the next. Raises ValueError for what is no month, or one to come."""
    if month is None:
        until = starts(now, calendar).month
        return starts(until - 1, calendar).month, until
    try:
        at = datetime.strptime(month, "%Y-%m").replace(tzinfo=calendar).timestamp()
    except ValueError:
        raise ValueError(f"{month!r} is not a month; write one like 2026-10") from None
    if at > now:
        raise ValueError(f"{month} has not begun: there is nothing to charge")
    return starts(at, calendar).month, next_start("month", at, calendar) or 0


def _written(lines: list[InvoiceLine], since: float, calendar: tzinfo) -> str:
    title = f"{datetime.fromtimestamp(since, calendar):%B %Y} ({calendar})"
    if not lines:
        return f"{title}: nothing was spent."
    parts = [title]
    for app, group in groupby(lines, key=lambda each: each.app):
        own = list(group)
        rows = [*map(_cells, own), [f"{app} in all", *[""] * 5, dollars(sum(each.spent_nano for each in own))]]
        parts.append(f"{app}\n{table(rows, HEADINGS, right=HEADINGS[1:], drop_empty=HEADINGS[1:-1], has_total=True)}")
    parts.append(f"All apps: {dollars(sum(each.spent_nano for each in lines))}")
    return "\n\n".join(parts)


def _cells(line: InvoiceLine) -> list[str]:
    written = line.cache_write_5m_tokens + line.cache_write_1h_tokens + line.cache_write_unsplit_tokens
    counts = (line.input_tokens, line.output_tokens, line.cache_read_tokens, written, line.web_searches)
    return [line.model, *(f"{count:,}" if count else "" for count in counts), dollars(line.spent_nano)]


def _row(line: InvoiceLine) -> dict[str, object]:
    spent: dict[str, object] = {
        "app": line.app,
        "model": line.model,
        "spent_dollars": dollars(line.spent_nano).replace("$", "").replace(",", ""),
    }
    return spent | line._asdict()
