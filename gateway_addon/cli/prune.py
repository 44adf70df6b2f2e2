"""`gateway prune`: calls of long ago become daily sums, so that a ledger does not grow for ever."""

import getpass
import time
from collections.abc import Callable
from pathlib import Path

import click

from gateway_addon.cli import times
from gateway_addon.cli.common import ledger_option, says_errors
from gateway_addon.ledger import LedgerUnavailable, ServerAddress, connect
from gateway_addon.ledger.maintenance import prune as ledger_prune
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.names import PROGRAM
from gateway_addon.windows import shown, starts

CALLS_MAX = 1000
PAUSE_S = 0.02  # how long a gateway may be kept waiting: the next transaction is made as large as this allows


@click.command(epilog=f"Example: {PROGRAM} prune --before 400d")
@click.option("--before", metavar="WHEN", required=True, help=f"{times.WHEN}, before this week and month.")
@click.option("--dry-run", is_flag=True, help="Say what would go, change nothing.")
@ledger_option
@says_errors(LedgerUnavailable, ValueError)
def prune(before: str, dry_run: bool, ledger: str) -> None:
    """Make daily sums of the calls admitted before WHEN, while gateways go on.

    Balances, caps and reports (by app, model, served, day and token) stay what they are, to the nano. What goes is each call's own story:
    its times, session, agent and request id. Open calls stay. What was begun and interrupted is taken up by the next run.
    """
    path, now = sqlite_files.ledger_path(ledger), time.time()
    with connect.reading(path) as db:
        calendar = zone(db)
        until = starts(times.since(before, now, calendar), calendar).day
        found = ledger_prune.prunable(db, until)
    what = f"{found.calls:,} calls before {shown(until, calendar)}"
    if dry_run:
        click.echo(f"{what} would become daily sums; {found.kept_open:,} without an end would stay.")
        return
    with connect.changing(path) as db:
        ledger_prune.begin(db, until, found, who=getpass.getuser(), now=now)
    with click.progressbar(length=found.calls, label=what) as bar:
        carries = _carry_all(path, until, bar.update)
    click.echo(f"{what} are {carries:,} rows now.")
    if not isinstance(path, ServerAddress):
        click.echo(f"The file keeps its size, and its free pages are used again. `{PROGRAM} docs running` says how to shrink it.")


def _carry_all(path: Path | ServerAddress, until: float, emit: Callable[[int], None]) -> int:
    """Carry in small transactions, with a rest as long as each between them for the gateways; return the number of carries."""
    carries, calls_max = 0, 50
    day = _next_day(path, 0, until)
    while day is not None:
        left = day.groups
        while left:
            bundle, left = ledger_prune.bundle(left, calls_max)
            began = time.monotonic()
            with connect.changing(path) as db:
                ledger_prune.carry(db, bundle, now=time.time())
            took_s = time.monotonic() - began
            calls = sum(map(len, bundle))
            calls_max = max(10, min(CALLS_MAX, int(calls * PAUSE_S / took_s)))
            carries += len(bundle)
            emit(calls)
            time.sleep(took_s)
        day = _next_day(path, day.end, until)
    return carries


def _next_day(path: Path | ServerAddress, since: float, until: float) -> ledger_prune.PrunedDay | None:
    """Read one day in a transaction of its own: a reader that stays keeps SQLite's log from being emptied."""
    with connect.reading(path) as db:
        return ledger_prune.next_day(db, since, until)
