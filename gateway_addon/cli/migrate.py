"""`gateway migrate`: a ledger from its file to a PostgreSQL server, once one machine is not enough."""

import getpass
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli.common import says_errors
from gateway_addon.ledger import LedgerUnavailable, ServerAddress, connect
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.money import dollars
from gateway_addon.names import PROGRAM, argument

LINES = 10  # where no terminal shows a bar: about so many lines in all


@click.command(epilog=f"Example: {PROGRAM} migrate sqlite:///gateway.db postgresql://gateway@db.internal/gateway")
@click.argument("source", metavar="sqlite:///PATH")
@click.argument("target", metavar="postgresql://HOST/NAME")
@says_errors(LedgerUnavailable, ValueError)
def migrate(source: str, target: str) -> None:
    """Move the ledger of a file to a PostgreSQL server: with every id, and with proof that both sides say the same before it counts.

    The gateway must be stopped. A move that was cut off is finished by running it again. Afterwards the file is kept
    as it is, and every command refuses it and names the server. Take a backup first: it is the way back.
    """
    file, server = _ends(source, target)
    connect.at(server)  # says what to install where there is no driver
    from gateway_addon.ledger.maintenance import migrate as ledger_migrate

    click.echo(f"Proving {file}, then moving it ...", err=True)
    with _progress() as emit:
        proof = ledger_migrate.move(file, server, who=getpass.getuser(), now=time.time(), emit=emit)
    if proof is None:
        click.echo(f"{file} was moved to {server} already: nothing is left to do.")
        return
    columns = sum(len(figures) // 2 for figures in proof.figures.values())
    kept = f" ({proof.kept_calls:,} of them by a move that was cut off)" if proof.kept_calls else ""
    spent = f"{proof.rows('calls'):,} calls{kept}, {proof.rows('entries'):,} entries, {dollars(proof.spent_nano)} spent"
    click.echo(f"{server}: {spent}.")
    click.echo(f"Proved: the rows of {len(proof.figures)} tables, the sums of {columns} columns and {proof.balances:,} balances agree.")
    click.echo(f"{PROGRAM} doctor's checks of the ledger find nothing on either side.")
    click.echo(f"From now on, everywhere: GATEWAY_LEDGER={server} (with its password and options). {file} is kept, and refused.")


def _ends(source: str, target: str) -> tuple[Path, ServerAddress]:
    """Return the file and the server. Raises ValueError for any other pair, with the way to move that."""
    one, other = sqlite_files.ledger_path(source), sqlite_files.ledger_path(target)
    if isinstance(one, Path) and isinstance(other, ServerAddress):
        return one, other
    if isinstance(one, ServerAddress) and isinstance(other, ServerAddress):
        raise ValueError("from one server to another a ledger goes by the server's own means: pg_dump --schema=gateway, then psql")
    if isinstance(one, Path):
        here, there = argument(source), argument(target)
        raise ValueError(f"both are files: {PROGRAM} backup FILE --ledger {here}, then {PROGRAM} restore FILE --ledger {there}")
    raise ValueError(f"a server's ledger does not go back into a file; a backup from before the move does: {PROGRAM} restore FILE")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes how many calls are copied, and of how many, and shows it on stderr.

    On a terminal as a bar, else as a line now and then.
    """
    live, said = sys.stderr.isatty(), 0
    bar: Any = None
    with ExitStack() as shown:

        def emit(done: int, of: int) -> None:
            nonlocal bar, said
            if live:
                bar = bar or shown.enter_context(click.progressbar(length=of, label="calls", show_pos=True, file=sys.stderr))
                bar.update(done - bar.pos)
            elif (share := LINES * done // max(of, 1)) > said:
                click.echo(f"{done:,} of {of:,} calls", err=True)
                said = share

        yield emit
