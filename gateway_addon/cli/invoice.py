"""`gateway invoice`: what to charge each app's owner on for a month, or each customer, or each user."""

import json
import re
import time
from datetime import datetime, tzinfo
from itertools import groupby
from pathlib import Path

import click

from gateway_addon.cli.common import json_option, ledger_option, policies_option, says_errors
from gateway_addon.cli.labels import label_option
from gateway_addon.cli.report import csv_text
from gateway_addon.cli.scopes import must_know
from gateway_addon.ledger import LedgerUnavailable, connect, reservations
from gateway_addon.ledger.reports import sessions, spending
from gateway_addon.ledger.reports.call_sums import Only
from gateway_addon.ledger.reports.invoice import InvoiceLine
from gateway_addon.ledger.reports.invoice import invoice as invoice_lines
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.ledger.types import Labels
from gateway_addon.money import dollars
from gateway_addon.names import PROGRAM, safe_name
from gateway_addon.operations.tables import table
from gateway_addon.windows import next_start, starts

HEADINGS = ("model", "input", "output", "cache read", "cache write", "searches", "charge")
BY = ("app", "team", "token", "session", "user")
PARTS_OF_ONE = 10_000
"""A markup is a whole number of hundredths of a percent."""


@click.command(epilog=f"Example: {PROGRAM} invoice --label client=acme --markup 25%")
@click.option("--month", metavar="YYYY-MM", help="A month of the gateway's zone; default: the last one that is over.")
@click.option("--by", default="app", metavar="WHAT", show_default=True, help=f"A part for each of these: {', '.join(BY)}, label.NAME.")
@click.option("--app", help="Of this app alone.")
@click.option("--session", metavar="ID", help="Of this session alone, by its id or the beginning of it.")
@click.option("--user", metavar="ID", help="For this end user alone.")
@label_option("Of the calls with this label alone.")
@click.option("--markup", metavar="PERCENT", default="0%", help="What to charge beyond the cost: 25%, 12.5%.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV (amounts in dollars and in nano-dollars).")
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, ValueError)
def invoice(
    month: str | None, by: str, app: str | None, session: str | None, user: str | None, labels: Labels, markup: str, as_json: bool,
    as_csv: bool, policies: Path, ledger: str,
) -> None:  # fmt: skip
    """Print what each app is to be charged for a month, by model with every kind of token; it sums to the ledger to the nano-dollar.

    With --markup each line is charged at its cost and so many percent, to the nearest nano-dollar.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other.")
    if by not in BY and not (by.startswith("label.") and spending.is_key(by)):
        raise ValueError(f"--by {by}: known are {', '.join(BY)}, label.NAME")
    markup_parts = _markup(markup)
    with connect.reading(sqlite_files.ledger_path(ledger)) as db:
        calendar = reservations.zone(db)
        since, until = _span(month, time.time(), calendar)
        wanted = None if app is None else must_know(app, db, policies)
        only = Only(wanted, session=session and sessions.named(db, session), user=user, labels=labels)
        found = invoice_lines(db, since=since, until=until, by=by, only=only)
        lines = [each._replace(key=safe_name(spending.shown(db, by, each.key)), model=safe_name(each.model)) for each in found]
    rows = [_row(each, by, markup_parts) for each in lines]
    if as_json:
        title = datetime.fromtimestamp(since, calendar).strftime("%Y-%m")
        click.echo(json.dumps({"month": title, "lines": rows, **_sums(lines, markup_parts)}, indent=2))
    elif as_csv:
        click.echo(csv_text(rows), nl=False)
    else:
        click.echo(_written(lines, by, markup_parts, since, calendar))


def _markup(text: str) -> int:
    """Parse the markup, in hundredths of a percent. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,4})(?:\.([0-9]{1,2}))?\s*%", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a markup; write a percentage like 25% or 12.5%")
    return int(match[1]) * 100 + int((match[2] or "0").ljust(2, "0"))


def _charge_nano(line: InvoiceLine, markup_parts: int) -> int:
    return line.spent_nano + (line.spent_nano * markup_parts + PARTS_OF_ONE // 2) // PARTS_OF_ONE


def _sums(lines: list[InvoiceLine], markup_parts: int) -> dict[str, int | float]:
    spent: dict[str, int | float] = {"spent_nano": sum(each.spent_nano for each in lines)}
    if not markup_parts:
        return spent
    return spent | {"markup_percent": markup_parts / 100, "charge_nano": sum(_charge_nano(each, markup_parts) for each in lines)}


def _span(month: str | None, now: float, calendar: tzinfo) -> tuple[int, int]:
    """Return the first moments of a month and of the next. Raises ValueError for what is no month, or one to come."""
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


def _written(lines: list[InvoiceLine], by: str, markup_parts: int, since: float, calendar: tzinfo) -> str:
    title = f"{datetime.fromtimestamp(since, calendar):%B %Y} ({calendar})"
    if not lines:
        return f"{title}: nothing was spent."
    parts = [title]

    def charged(some: list[InvoiceLine]) -> str:
        return dollars(sum(_charge_nano(each, markup_parts) for each in some))

    for key, group in groupby(lines, key=lambda each: each.key):
        own = list(group)
        rows = [*([*_counts(each), charged([each])] for each in own), [f"{key} in all", *[""] * 5, charged(own)]]
        parts.append(f"{key}\n{table(rows, HEADINGS, right=HEADINGS[1:], drop_empty=HEADINGS[1:-1], has_total=True)}")
    cost = f" ({markup_parts / 100:g} % above the cost of {dollars(sum(each.spent_nano for each in lines))})" if markup_parts else ""
    parts.append(f"{'All apps' if by == 'app' else 'In all'}: {charged(lines)}{cost}")
    return "\n\n".join(parts)


def _counts(line: InvoiceLine) -> list[str]:
    written = line.cache_write_5m_tokens + line.cache_write_1h_tokens + line.cache_write_unsplit_tokens
    counts = (line.input_tokens, line.output_tokens, line.cache_read_tokens, written, line.web_searches)
    return [line.model, *(f"{count:,}" if count else "" for count in counts)]


def _row(line: InvoiceLine, by: str, markup_parts: int) -> dict[str, object]:
    row: dict[str, object] = {by: line.key, "model": line.model, "spent_dollars": _plain(line.spent_nano)}
    row |= {name: value for name, value in line._asdict().items() if name != "key"}
    if markup_parts:
        charge_nano = _charge_nano(line, markup_parts)
        row |= {"charge_dollars": _plain(charge_nano), "charge_nano": charge_nano}
    return row


def _plain(nano: int) -> str:
    return dollars(nano).replace("$", "").replace(",", "")
