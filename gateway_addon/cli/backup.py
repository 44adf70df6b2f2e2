"""`gateway backup` and `gateway restore`: the ledger's ledger_backup. The policies are files of yours; the real key is in none of them."""

import time
from pathlib import Path

import click

from gateway_addon.cli.common import ledger_option, says_errors
from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.ledger.maintenance import backup as ledger_backup
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.names import PROGRAM, argument

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(epilog=f"Example: {PROGRAM} backup /backups/gateway-2026-11-24.db")
@click.argument("file", type=FILE)
@ledger_option
@says_errors(LedgerUnavailable, ValueError, OSError)
def backup(file: Path, ledger: str) -> None:
    """Copy the ledger to FILE: one consistent moment of it, while gateways go on, proved as `doctor` does."""
    calls = ledger_backup.backup(sqlite_files.file_path(ledger), file)
    click.echo(f"{file}: {calls:,} calls, {file.stat().st_size / 2**20:.1f} MB, proved.  Back again: {PROGRAM} restore {argument(file)}")


@click.command(epilog=f"Example: {PROGRAM} restore /backups/gateway-2026-11-24.db")
@click.argument("file", type=FILE)
@ledger_option
@says_errors(LedgerUnavailable, ValueError, OSError)
def restore(file: Path, ledger: str) -> None:
    """Put the backup FILE in the ledger's place, once it is proved. Refuses while a gateway runs; keeps what was there beside it."""
    path = sqlite_files.file_path(ledger)
    calls, kept = ledger_backup.restore(file, path, now=time.time())
    click.echo(f"{path}: {calls:,} calls, proved.")
    if kept:
        click.echo(f"What was there before is now {kept[0]}.")
    click.echo(f"It knows nothing of what was spent after the backup: {PROGRAM} reconcile finds that, {PROGRAM} adjust books it.")
