"""`gateway pause`, `resume`, `adjust`, `overrun clear`: the bad night. In force on the next call, in every process."""

import getpass
import json
import time
from pathlib import Path

import click

from gateway_addon.cli.common import PROBLEM, ROW_NUMBER, json_option, ledger_option, policies_option, says_errors, stop, why_option
from gateway_addon.cli.parts import meant, part_option
from gateway_addon.cli.times import to_come
from gateway_addon.ledger import LedgerUnavailable, admin, connect, state
from gateway_addon.ledger.reports import sessions
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.scope import TOTAL, AppPart, named, part_within, paused_as
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.money import dollars, parse_nano
from gateway_addon.names import PROGRAM
from gateway_addon.operations.changes import scope_of
from gateway_addon.policy import Outline, outline
from gateway_addon.windows import shown

SAY = says_errors(LedgerUnavailable, ValueError)
SHORT_LIVED = ("session", "agent")
SHORT_LIVED_S = 30 * 86400.0
"""A pause of what is soon forgotten ends by itself after this time: every call is held against all that are in force."""


@click.command(epilog=f"Example: {PROGRAM} pause experiments --until 8h --why 'runaway loop'")
@click.argument("name", metavar="APP", required=False)
@click.option("--all", "everything", is_flag=True, help="Every app.")
@part_option()
@click.option("--until", metavar="DATE", help=f"End by itself then: 2026-12-01, 12h. Without it: until {PROGRAM} resume.")
@click.option("--now", "cut", is_flag=True, help="End streams in flight too, within a second or so.")
@json_option
@why_option
@policies_option
@ledger_option
@SAY
def pause(
    name: str | None, everything: bool, part: AppPart | None, until: str | None, cut: bool, as_json: bool, why: str, policies: Path,
    ledger: str,
) -> None:  # fmt: skip
    """Refuse every further call of APP (or team:NAME, or --all), or of one session, agent, user or label, of APP or of any app.

    The pause of an agent holds for the agents that it starts.
    """
    now, found, place = time.time(), outline(policies), ledger_path(ledger)
    part, known = meant(part, place, policies)
    with connect.changing(place) as db:
        scope, calendar = _scope(name, everything, part, db, found), zone(db)
        ends_at = None if until is None else to_come(until, now, calendar)
        if ends_at is None and part is not None and part[0] in SHORT_LIVED:
            ends_at = now + SHORT_LIVED_S
        admin.pause(db, scope, until=ends_at, cut=cut, who=getpass.getuser(), why=why, now=now)
    if as_json:
        click.echo(json.dumps({"scope": scope, "until": ends_at, "cut": cut, "why": why}))
        return
    ending = f"{PROGRAM} resume {paused_as(scope)}" if ends_at is None else shown(ends_at, calendar)
    click.echo(f"{_whose(scope)} is paused until {ending}. Calls in flight {'are cut' if cut else 'may finish'}.")
    if not known:
        click.echo(f"None of the last {sessions.LATEST:,} calls had it: is it spelled so?", err=True)


@click.command(epilog=f"Example: {PROGRAM} resume experiments")
@click.argument("name", metavar="APP", required=False)
@click.option("--all", "everything", is_flag=True, help="The pause of every app.")
@part_option()
@json_option
@why_option
@policies_option
@ledger_option
@SAY
def resume(
    name: str | None, everything: bool, part: AppPart | None, as_json: bool, why: str, policies: Path, ledger: str
) -> None:
    """End a pause of APP (or team:NAME, or --all), or of one session, agent, user or label."""
    found = outline(policies)
    with connect.changing(ledger_path(ledger)) as db:
        scope = _scope(name, everything, part, db, found)
        if part is not None and part[0] == "session":
            paused = [each.scope for each in state.pauses(db, time.time()) if each.scope.startswith(scope)]
            scope = paused[0] if len(paused) == 1 else scope
        ended = admin.resume(db, scope, who=getpass.getuser(), why=why, now=time.time())
    if not ended:
        stop(f"No pause of {_whose(scope).replace('Every', 'every')} is in force.", PROBLEM)
    click.echo(json.dumps({"scope": scope}) if as_json else f"{_whose(scope)} may call again.")


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


def _whose(scope: str) -> str:
    return "Every app" if scope == TOTAL else named(scope)


def _scope(name: str | None, everything: bool, part: AppPart | None, db: Connection, found: Outline) -> str:
    """Return the scope that was meant. A part that is named without an app is one of any app."""
    if everything if name is not None else not everything and part is None:
        stop("Say which: an APP, team:NAME, --all, or --session, --agent, --user, --label.")
    within = scope_of(TOTAL if name is None else name, db, found)
    if part is None:
        return within
    if within.startswith("team:"):
        stop("A session, agent, user or label belongs to an app, not to a team: name the APP, or none for any.")
    return part_within(within, part)
