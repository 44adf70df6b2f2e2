"""`gateway replay`: what a new policy would have done to the calls that there were."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gateway_addon import windows
from gateway_addon.cli import times
from gateway_addon.cli.common import json_option, ledger_option, says_errors, status
from gateway_addon.ledger import LedgerUnavailable, connect, reservations
from gateway_addon.ledger.reports.entry_history import recorded
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.money import cents
from gateway_addon.names import PROGRAM
from gateway_addon.operations import policy_replay as room
from gateway_addon.operations.policy_replay import ReplayVerdict, Tally
from gateway_addon.operations.tables import table
from gateway_addon.policy import PolicyError, load
from gateway_addon.pricing import PriceError

PROGRESS_EVERY = 5000
NOT_JUDGED = "Not judged, because the ledger keeps no bodies: features, betas, thinking, required fields; nor rates."


@click.command(epilog=f"Example: {PROGRAM} replay --policy tomorrow/ --since 7d")
@click.option(
    "--policy",
    "folder",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the new policy files.",
)
@click.option("--since", metavar="WHEN", help=f"{times.WHEN}; default: this month.")
@json_option
@ledger_option
@says_errors(LedgerUnavailable, PolicyError, PriceError, ValueError)
def replay(folder: Path, since: str | None, as_json: bool, ledger: str) -> None:
    """Hold the recorded calls against another policy: which would have been refused, why, and what that would have saved.

    Judged are model, endpoint, max_tokens and caps. Nothing is sent, and nothing is changed.
    """
    policy, now = load(folder), time.time()
    with connect.reading(sqlite_files.ledger_path(ledger)) as db:
        calendar = reservations.zone(db)
        start = times.since(since, now, calendar) if since else windows.starts(now, calendar).month
        apps, reasons = room.tallied(_with_progress(room.replay(recorded(db, since=start, until=now), policy)))
    if as_json:
        click.echo(json.dumps(_document(apps, reasons), indent=2))
    else:
        click.echo(f"{windows.shown(start, calendar)} to {windows.shown(now, calendar)}\n\n{_text(apps, reasons)}")


def _with_progress(verdicts: Iterable[ReplayVerdict]) -> Iterator[ReplayVerdict]:
    for number, verdict in enumerate(verdicts, start=1):
        if number % PROGRESS_EVERY == 0:
            status(f"{number:,} calls")
        yield verdict
    status()


def _document(apps: dict[str, Tally], reasons: dict[tuple[str, str], Tally]) -> dict[str, Any]:
    lines = [
        {"app": app, "reason": reason, "refused": tally.refused, "saved_nano": tally.saved_nano}
        for (app, reason), tally in reasons.items()
    ]  # fmt: skip
    return {"apps": {app: asdict(tally) for app, tally in sorted(apps.items())}, "reasons": lines}


def _text(apps: dict[str, Tally], reasons: dict[tuple[str, str], Tally]) -> str:
    if not apps:
        return "No call was recorded in this time. Choose an earlier --since."
    rows = [(app, each.calls, each.refused, cents(each.saved_nano), each.let_in) for app, each in sorted(apps.items())]
    total = Tally(*(sum(getattr(each, name) for each in apps.values()) for name in ("calls", "refused", "saved_nano", "let_in")))
    rows.append(("total", total.calls, total.refused, cents(total.saved_nano), total.let_in))
    numbers = [(app, f"{calls:,}", f"{refused:,}", saved, f"{let_in:,}") for app, calls, refused, saved, let_in in rows]
    headings = ("app", "calls", "refused now", "saved", "let in now")
    dearest = sorted(reasons.items(), key=lambda item: (-item[1].saved_nano, -item[1].refused, item[0]))
    why = [f"  {_calls(each.refused)} of {app}, {cents(each.saved_nano)}: {reason}" for (app, reason), each in dearest]
    refused = ["Refused, because:", *why] if why else ["Every call that was let through would be let through again."]
    return "\n".join([table(numbers, headings, right=headings[1:]), "", *refused, NOT_JUDGED])


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count:,} calls"
