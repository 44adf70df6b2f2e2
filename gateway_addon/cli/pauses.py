"""`gateway pause`, `resume`, `adjust`, `overrun clear`: the bad night. In force on the next call, in every process."""

import getpass
import json
import time
from pathlib import Path

import click

from gateway_addon.cli.common import PROBLEM, ROW_NUMBER, json_option, ledger_option, policies_option, says_errors, stop, why_option
from gateway_addon.cli.times import to_come
from gateway_addon.ledger import LedgerUnavailable, admin, connect
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.ledger.types import TOTAL
from gateway_addon.money import dollars, parse_nano
from gateway_addon.names import PROGRAM
from gateway_addon.operations.changes import scope_of
from gateway_addon.policy import outline
from gateway_addon.windows import shown

SAY = says_errors(LedgerUnavailable, ValueError)


@click.command(epilog=f"Example: {PROGRAM} pause experiments --until 8h --why 'runaway loop'")
@click.argument("name", metavar="APP", required=False)
@click.option("--all", "everything", is_flag=True, help="Every app.")
@click.option("--until", metavar="DATE", help=f"End by itself then: 2026-12-01, 12h. Without it: until {PROGRAM} resume.")
@click.option("--now", "cut", is_flag=True, help="End streams in flight too, within a second or so.")
@json_option
@why_option
@policies_option
@ledger_option
@SAY
def pause(name: str | None, everything: bool, until: str | None, cut: bool, as_json: bool, why: str, policies: Path, ledger: str) -> None:
    """Refuse every further call of APP (or team:NAME, or --all)."""
    asked, now, found = _asked(name, everything), time.time(), outline(policies)
    with connect.changing(ledger_path(ledger)) as db:
        scope, calendar = scope_of(asked, db, found), zone(db)
        ends_at = None if until is None else to_come(until, now, calendar)
        admin.pause(db, scope, until=ends_at, cut=cut, who=getpass.getuser(), why=why, now=now)
    if as_json:
        click.echo(json.dumps({"scope": scope, "until": ends_at, "cut": cut, "why": why}))
        return
    ending = f"until {PROGRAM} resume" if ends_at is None else f"until {shown(ends_at, calendar)}"
    click.echo(f"{scope} is paused {ending}. Calls in flight {'are cut' if cut else 'may finish'}.")


@click.command(epilog=f"Example: {PROGRAM} resume experiments")
@click.argument("name", metavar="APP", required=False)
@click.option("--all", "everything", is_flag=True, help="The pause of every app.")
@json_option
@why_option
@policies_option
@ledger_option
@SAY
def resume(name: str | None, everything: bool, as_json: bool, why: str, policies: Path, ledger: str) -> None:
    """End a pause of APP (or team:NAME, or --all)."""
    asked, found = _asked(name, everything), outline(policies)
    with connect.changing(ledger_path(ledger)) as db:
        scope = scope_of(asked, db, found)
        ended = admin.resume(db, scope, who=getpass.getuser(), why=why, now=time.time())
    if not ended:
        stop(f"{scope} was not paused.", PROBLEM)
    click.echo(json.dumps({"scope": scope}) if as_json else f"{scope} may call again.")


@click.command(
    context_settings={"ignore_unknown_options": True},  # -0.25 is an amount
    epilog=f"Example: {PROGRAM} adjust 4711 -0.25 --why 'invoice shows less'",
)
@click.argument("call_id", type=ROW_NUMBER)
@click.argument("amount")
@click.option("--why", required=True, help="Kept in the audit trail.")
@json_option
@ledger_option
@SAY
def adjust(call_id: int, amount: str, why: str, as_json: bool, ledger: str) -> None:
    """Correct what call CALL_ID cost by AMOUNT (-0.25 takes off), as an entry of its own. The view `spend` of the ledger shows ids."""
    delta_nano = -parse_nano(amount[1:]) if amount.startswith("-") else parse_nano(amount)
    with connect.changing(ledger_path(ledger)) as db:
        cost_nano = admin.adjust(db, call_id, delta_nano, who=getpass.getuser(), why=why, now=time.time())
    click.echo(json.dumps({"call": call_id, "spent_nano": cost_nano}) if as_json else f"Call {call_id} now costs {dollars(cost_nano)}.")


@click.group(epilog=f"Example: {PROGRAM} overrun clear claude-opus-5-5")
def overrun() -> None:
    """Models whose bill passed a grant: reserved in full until an operator has looked."""


@overrun.command("clear", epilog=f"Example: {PROGRAM} overrun clear claude-opus-5-5 --why 'pace raised in prices.yaml'")
@click.argument("model")
@json_option
@why_option
@ledger_option
@SAY
def clear(model: str, as_json: bool, why: str, ledger: str) -> None:
    """Let MODEL reserve in steps again."""
    with connect.changing(ledger_path(ledger)) as db:
        cleared = admin.clear_overrun(db, model, who=getpass.getuser(), why=why, now=time.time())
    if not cleared:
        stop(f"{model} was not held back.", PROBLEM)
    click.echo(json.dumps({"model": model}) if as_json else f"{model} reserves in steps again.")


def _asked(name: str | None, everything: bool) -> str:
    if everything == (name is not None):
        stop("Say which: an APP, team:NAME, or --all.")
    return TOTAL if name is None else name
