"""`gateway cap raise`, `pause`, `resume`, `adjust`, `overrun clear`: the bad night. In force on the next call, in every process."""

import getpass
import time
from pathlib import Path

import click

from gateway_addon.cli.common import PROBLEM, ROW_NUMBER, ledger_option, policies_option, says_errors, stop
from gateway_addon.cli.times import day, moment
from gateway_addon.ledger import LedgerUnavailable, admin, app_scope, team_scope
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.ledger.types import TOTAL
from gateway_addon.money import dollars, parse_nano
from gateway_addon.policy import GatewayPolicy, PolicyError, load
from gateway_addon.pricing import PriceError
from gateway_addon.windows import WINDOWS

SAY = says_errors(LedgerUnavailable, PolicyError, PriceError, ValueError)
why_option = click.option("--why", default="", help="Kept in the audit trail.")


@click.group(epilog="Example: gateway cap raise reviews day 5 --until 2026-12-01")
def cap() -> None:
    """Change what may be spent, for a while. Caps themselves live in the policy files."""


@cap.command("raise", epilog="Example: gateway cap raise reviews day 5 --until 12h --why 'launch day'")
@click.argument("name", metavar="APP")
@click.argument("window", type=click.Choice(WINDOWS))
@click.argument("amount")
@click.option("--until", required=True, metavar="DATE", help="When the raise ends: 2026-12-01, 12h, 3d.")
@why_option
@policies_option
@ledger_option
@SAY
def raise_cap(name: str, window: str, amount: str, until: str, why: str, policies: Path, ledger: str) -> None:
    """Add AMOUNT on top of the cap of APP (or team:NAME, or total) in each WINDOW, until a date."""
    now = time.time()
    policy = load(policies)
    scope, ends_at, amount_nano = _scope(name, policy), moment(until, now), parse_nano(amount)
    limits = {TOTAL: policy.caps, **{team_scope(team): each.caps for team, each in policy.teams.items()}}
    limits |= {app_scope(app): each.caps for app, each in policy.apps.items()}
    if window not in limits[scope]:
        stop(f"{name} has no cap for a {window}, so there is nothing to raise; its caps: {', '.join(limits[scope]) or 'none'}.")
    with admin.changing(ledger_path(ledger)) as db:
        admin.raise_cap(db, scope, window, amount_nano, until=ends_at, who=getpass.getuser(), why=why, now=now)
    base_nano = limits[scope][window]  # type: ignore[index]  # a key of this mapping, as looked up above
    click.echo(f"{name} may spend {dollars(amount_nano)} above its {dollars(base_nano)} a {window}, until {day(ends_at)} UTC.")


@click.command(epilog="Example: gateway pause experiments --until 8h --why 'runaway loop'")
@click.argument("name", metavar="APP", required=False)
@click.option("--all", "everything", is_flag=True, help="Every app.")
@click.option("--until", metavar="DATE", help="End by itself then: 2026-12-01, 12h. Without it: until gateway resume.")
@click.option("--now", "cut", is_flag=True, help="End streams in flight too, within a second or so.")
@why_option
@policies_option
@ledger_option
@SAY
def pause(name: str | None, everything: bool, until: str | None, cut: bool, why: str, policies: Path, ledger: str) -> None:
    """Refuse every further call of APP (or team:NAME, or --all)."""
    scope, now = _which(name, everything, policies), time.time()
    ends_at = None if until is None else moment(until, now)
    with admin.changing(ledger_path(ledger)) as db:
        admin.pause(db, scope, until=ends_at, cut=cut, who=getpass.getuser(), why=why, now=now)
    ending = "until gateway resume" if ends_at is None else f"until {day(ends_at)} UTC"
    click.echo(f"{scope} is paused {ending}. Calls in flight {'are cut' if cut else 'may finish'}.")


@click.command(epilog="Example: gateway resume experiments")
@click.argument("name", metavar="APP", required=False)
@click.option("--all", "everything", is_flag=True, help="The pause of every app.")
@why_option
@policies_option
@ledger_option
@SAY
def resume(name: str | None, everything: bool, why: str, policies: Path, ledger: str) -> None:
    """End a pause of APP (or team:NAME, or --all)."""
    scope = _which(name, everything, policies)
    with admin.changing(ledger_path(ledger)) as db:
        ended = admin.resume(db, scope, who=getpass.getuser(), why=why, now=time.time())
    if not ended:
        stop(f"{scope} was not paused.", PROBLEM)
    click.echo(f"{scope} may call again.")


@click.command(
    context_settings={"ignore_unknown_options": True},  # -0.25 is an amount
    epilog="Example: gateway adjust 4711 -0.25 --why 'invoice shows less'",
)
@click.argument("call_id", type=ROW_NUMBER)
@click.argument("amount")
@click.option("--why", required=True, help="Kept in the audit trail.")
@ledger_option
@SAY
def adjust(call_id: int, amount: str, why: str, ledger: str) -> None:
    """Correct what call CALL_ID cost by AMOUNT (-0.25 takes off), as an entry of its own. The view `spend` of the ledger shows ids."""
    delta_nano = -parse_nano(amount[1:]) if amount.startswith("-") else parse_nano(amount)
    with admin.changing(ledger_path(ledger)) as db:
        cost_nano = admin.adjust(db, call_id, delta_nano, who=getpass.getuser(), why=why, now=time.time())
    click.echo(f"Call {call_id} now costs {dollars(cost_nano)}.")


@click.group(epilog="Example: gateway overrun clear claude-opus-5-5")
def overrun() -> None:
    """Models whose bill passed a grant: reserved in full until an operator has looked."""


@overrun.command("clear", epilog="Example: gateway overrun clear claude-opus-5-5 --why 'pace raised in prices.yaml'")
@click.argument("model")
@why_option
@ledger_option
@SAY
def clear(model: str, why: str, ledger: str) -> None:
    """Let MODEL reserve in steps again."""
    with admin.changing(ledger_path(ledger)) as db:
        cleared = admin.clear_overrun(db, model, who=getpass.getuser(), why=why, now=time.time())
    if not cleared:
        stop(f"{model} was not held back.", PROBLEM)
    click.echo(f"{model} reserves in steps again.")


def _which(name: str | None, everything: bool, policies: Path) -> str:
    if everything == (name is not None):
        stop("Say which: an APP, team:NAME, or --all.")
    return TOTAL if name is None else _scope(name, load(policies))


def _scope(name: str, policy: GatewayPolicy) -> str:
    """The ledger's scope for what people write. Raises ValueError for what no policy knows."""
    kind, colon, team = name.partition(":")
    if name == TOTAL:
        return TOTAL
    if colon and kind == "team" and team in policy.teams:
        return team_scope(team)
    if name in policy.apps:
        return app_scope(name)
    known = [*sorted(policy.apps), *(f"team:{team}" for team in sorted(policy.teams)), TOTAL]
    raise ValueError(f"{name!r} is no app, team or total of this policy; it knows {', '.join(known)}")
