"""`gateway batches`: what is open, whose it is, what it holds."""

import json
import time

import click

from gateway_addon.cli.common import json_option, ledger_option, says_errors
from gateway_addon.ledger import LedgerUnavailable, connect
from gateway_addon.ledger.batches import OpenBatch, open_batches
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.money import cents
from gateway_addon.names import PROGRAM
from gateway_addon.operations.tables import table


@click.command(epilog=f"Example: {PROGRAM} batches")
@json_option
@ledger_option
@says_errors(LedgerUnavailable, ValueError)
def batches(as_json: bool, ledger: str) -> None:
    """List the message batches that are not settled yet. A running gateway settles those whose results nobody fetches."""
    now = time.time()
    with connect.reading(ledger_path(ledger)) as db:
        found = open_batches(db)
    if as_json:
        click.echo(json.dumps([{**each._asdict(), "age_s": round(now - each.made_at)} for each in found]))
    elif not found:
        click.echo("No batch is open.")
    else:
        rows = [_shown(each, now) for each in found]
        click.echo(table([list(each.values()) for each in rows], list(rows[0]), right=("requests", "held")))


def _shown(batch: OpenBatch, now: float) -> dict[str, object]:
    return {
        "app": batch.app,
        "batch": batch.id,
        "requests": batch.requests,
        "held": cents(batch.held_nano),
        "age": _span(now - batch.made_at),
        "state": batch.status,
        "looked at": _next(batch.look_at - now),
    }


def _span(seconds: float) -> str:
    minutes = int(max(0.0, seconds)) // 60
    return f"{minutes // 60} h {minutes % 60:02} m" if minutes >= 60 else f"{minutes} m"


def _next(seconds: float) -> str:
    return f"in {seconds:.0f} s" if seconds > 0 else "as soon as a gateway runs"
