"""`gateway audit`: who changed what, and why."""

import json
import time
from datetime import tzinfo
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli import times
from gateway_addon.cli.common import json_option, ledger_option, policies_option, says_errors
from gateway_addon.cli.scopes import must_know
from gateway_addon.ledger import LedgerUnavailable, admin, connect
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.money import dollars
from gateway_addon.names import PROGRAM
from gateway_addon.operations.tables import table
from gateway_addon.windows import shown

CHANGE_CHARS_MAX = 300
UNSAID = ("diff", "scope", "window")
"""Facts that the subject names, or that are too long for a line."""
TIMES = ("until", "since", "expires_at", "revoked_at")
"""Facts that are unix seconds."""


@click.command(epilog=f"Example: {PROGRAM} audit --app reviews --since 7d")
@click.option("--app", help="Of this app alone: its tokens, caps, pauses, corrections.")
@click.option(
    "--since", metavar="WHEN", default="30d", show_default=True, help=f"{times.WHEN}."
)
@json_option
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, ValueError)
def audit(app: str | None, since: str, as_json: bool, policies: Path, ledger: str) -> None:
    """List the changes that people made: when, who, what, before and after, why."""
    with connect.reading(ledger_path(ledger)) as db:
        calendar = zone(db)
        if app is not None:
            must_know(app, db, policies)
        found = admin.audit_trail(db, app, since=times.since(since, time.time(), calendar))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not found:
        click.echo(f"No change {times.spell(since)}.")
    else:
        rows = [
            (shown(row["at"], calendar), row["who"], row["action"], row["subject"], _change(row, calendar), row["why"]) for row in found
        ]  # fmt: skip
        click.echo(table(rows, ("when", "who", "did", "to", "before > after", "why")))


def _change(row: dict[str, Any], calendar: tzinfo) -> str:
    """Return before and after in short, of after what differs; a policy's diff is `gateway check --changes`."""
    before, after = row["before"], row["after"]
    if isinstance(before, dict) and isinstance(after, dict):
        after = {name: "none" if value is None else value for name, value in after.items() if before.get(name) != value}
    texts = ["" if value is None else _short(value, calendar) for value in (before, after)]
    return " > ".join(filter(None, texts))[:CHANGE_CHARS_MAX]


def _short(value: Any, calendar: tzinfo) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(_fact(name, each, calendar) for name, each in value.items() if _is_said(name, each))


def _is_said(name: str, value: object) -> bool:
    return name not in UNSAID and value not in (None, "", {}) and bool(value or name != "cut")


def _fact(name: str, value: Any, calendar: tzinfo) -> str:
    """Return a fact for people: an amount in dollars, a time in the gateway's zone."""
    if name.endswith("_nano"):
        return f"{name.removesuffix('_nano')} {dollars(value)}"
    if name in TIMES and isinstance(value, int | float):
        return f"{name.removesuffix('_at')} {shown(value, calendar)}"
    if isinstance(value, dict):
        return f"{name} {' '.join(f'{each}={text or "none"}' for each, text in value.items())}"
    if name == "cut":
        return "running streams cut"
    return f"{'name' if name == 'label' else name} {str(value)[:40]}"
