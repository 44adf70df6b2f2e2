"""`gateway app list|show|add`: the apps of the policy files and of the ledger, each on one screen; a file for one more."""

import getpass
import json
import time
from datetime import tzinfo
from itertools import islice
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli.caps import caps_table, standing_rows
from gateway_addon.cli.check import health
from gateway_addon.cli.common import json_option, ledger_option, listen_option, policies_option, says_errors
from gateway_addon.cli.init import app_name, write_new
from gateway_addon.cli.scopes import known_apps, must_know
from gateway_addon.cli.times import shown_or_never
from gateway_addon.identity import tokens
from gateway_addon.ledger import TOTAL, LedgerUnavailable, Standing, admin, app_scope, connect, scopes, state
from gateway_addon.ledger.reports import call_detail, spending
from gateway_addon.ledger.reservations import standing, zone
from gateway_addon.ledger.scope import paused_as
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.money import cents
from gateway_addon.names import PROGRAM, safe_name
from gateway_addon.operations.places import examples_folder
from gateway_addon.operations.tables import table
from gateway_addon.policy import Outline, PolicyError, load, outline
from gateway_addon.pricing import PriceError
from gateway_addon.windows import shown, starts

CALLS_SHOWN = 8
LOOKS_MAX, LOOK_EVERY_S = 20, 0.15
SAY = says_errors(LedgerUnavailable, ValueError)


@click.group(epilog=f"Example: {PROGRAM} app show reviews")
def app() -> None:
    """The apps: what each has spent, may spend, and who it calls as."""


@app.command("list", epilog=f"Example: {PROGRAM} app list --json")
@json_option
@policies_option
@ledger_option
@SAY
def list_apps(as_json: bool, policies: Path, ledger: str) -> None:
    """List every app that has a policy file, a token or a call."""
    now, found = time.time(), outline(policies)
    with connect.reading(ledger_path(ledger)) as db:
        calendar, names = zone(db), known_apps(db, policies)
        paused = {each.scope for each in state.pauses(db, now)}
        stands: dict[tuple[str, str], Standing] = {
            (each.scope, each.window): each for each in standing(db, map(app_scope, names), (), now=now)
        }
        rows = [_row(name, found, stands, app_scope(name) in paused or TOTAL in paused, db, now) for name in names]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif not rows:
        click.echo(f"No apps yet: {PROGRAM} init writes a first one.")
    else:
        cells = [
            (
                row["app"],
                row["state"],
                cents(row["today_nano"]),
                cents(row["month_nano"]),
                row["tokens"],
                shown_or_never(row["last_used_at"], calendar),
            )
            for row in rows
        ]
        click.echo(table(cells, ("app", "state", "today", "this month", "tokens", "last used"), right=("today", "this month", "tokens")))


@app.command("show", epilog=f"Example: {PROGRAM} app show reviews")
@click.argument("name", metavar="APP")
@json_option
@policies_option
@ledger_option
@SAY
def show(name: str, as_json: bool, policies: Path, ledger: str) -> None:
    """Show APP on one screen: policy, caps, tokens, last calls.

    Beside the caps stands what is spent and held; refusals are counted for this month.
    """
    now, found = time.time(), outline(policies)
    with connect.reading(ledger_path(ledger)) as db:
        calendar = zone(db)
        must_know(name, db, policies)
        team = admin.team_of(db, name)
        caps = standing_rows(db, [each for each in found.windowed if each.scope in scopes(name, team)], now)
        good = [each for each in admin.tokens(db, name) if each.refusal(now) is None]
        pauses = [each for each in state.pauses(db, now) if each.scope in scopes(name, team)]
        refusals = spending.refused_of(db, name, since=starts(now, calendar).month, until=now)
        calls = list(islice(call_detail.every(db, call_detail.CallFilter(app=name)), CALLS_SHOWN))
    policy = _policy(name, policies)
    if as_json:
        facts = {"app": name, "team": team, "policy": policy, "caps": caps, "refused": refusals, "pauses": [each.scope for each in pauses]}
        listed = [{"id": each.id, "name": each.label, "issued_at": each.created_at, "last_used_at": each.last_used_at} for each in good]
        last = [
            {"id": each.id, "at": each.started_at, "model": each.model_asked, "state": each.state, "spent_nano": each.spent_nano}
            for each in calls
        ]
        click.echo(json.dumps(facts | {"tokens": listed, "calls": last}, indent=2))
        return
    click.echo(f"{name}{f', team {team}' if team else ''}\n{policy}")
    for each in pauses:
        until = f"{PROGRAM} resume {paused_as(each.scope)}" if each.until is None else shown(each.until, calendar)
        click.echo(f"paused ({each.scope}) until {until}{f': {each.why}' if each.why else ''}")
    click.echo(f"\n{caps_table(caps)}" if caps else "\nNo caps.")
    named = ", ".join(
        f"{each.id}{f' ({each.label})' if each.label else ''} {_use(each.last_used_at, calendar)}" for each in good
    )
    click.echo(f"\nTokens: {named or f'none in force; {PROGRAM} token issue {name}'}")
    if refusals:
        click.echo("Refused this month: " + ", ".join(f"{count:,} {code}" for code, count in refusals.items()))
    if calls:
        lines = [
            (
                each.id,
                shown(each.started_at, calendar),
                safe_name(each.model_asked or ""),
                f"refused: {each.refusal}" if each.refusal else each.state,
                cents(each.spent_nano),
            )
            for each in calls
        ]
        click.echo(f"\n{table(lines, ('call', 'when', 'model', 'state', 'spent'), right=('spent',))}")


@app.command(epilog=f"Example: TOKEN=$({PROGRAM} app add claude-code --from claude-code)")
@click.argument("name", metavar="APP")
@click.option("--from", "example", required=True, help="The example to copy: claude-code, experiments, pipeline, reviews.")
@policies_option
@ledger_option
@listen_option
@says_errors(PolicyError, PriceError, LedgerUnavailable, OSError)
def add(name: str, example: str, policies: Path, ledger: str, listen: tuple[str, int]) -> None:
    """Write policies/apps/APP.yaml from an example. Print a token for it, alone on stdout, once.

    A file that exists is kept, and no token is made. What does not come into force is not left there. A gateway that runs at --listen has
    the app in force when this ends.
    """
    found = {path.stem: path for path in sorted((examples_folder() / "apps").glob("*.yaml"))}
    if example not in found:
        raise click.UsageError(f"There is no example {example!r}; the examples: {', '.join(found) or 'none on this machine'}.")
    path, secret = policies / "apps" / f"{app_name(name)}.yaml", tokens.mint()
    path.parent.mkdir(parents=True, exist_ok=True)
    with connect.changing(ledger_path(ledger)) as db:
        if not write_new(path, found[example].read_text(encoding="utf-8"), err=True):
            click.echo(f"\nA token for it: {PROGRAM} token issue {name}", err=True)
            return
        try:
            policy = load(policies)
        except (PolicyError, PriceError):
            path.unlink()
            raise
        admin.issue_token(db, name, tokens.digest(secret), who=getpass.getuser(), now=time.time())
    _until_in_force(listen, policy.digest[:12])
    click.echo(f"Token for app {name}, shown this once (only its SHA-256 is kept):", err=True)
    click.echo(secret)


def _use(last_used_at: float | None, calendar: tzinfo) -> str:
    return "never used" if last_used_at is None else f"last used {shown(last_used_at, calendar)}"


def _until_in_force(listen: tuple[str, int], digest: str) -> None:
    """Wait until a gateway that answers there has these files in force: for a few seconds, since it may be another one."""
    for _ in range(LOOKS_MAX):
        running = health(listen)
        if running is None or running["policy"] == digest:
            return
        time.sleep(LOOK_EVERY_S)


def _row(
    name: str, found: Outline, stands: dict[tuple[str, str], Standing], is_paused: bool, db: connect.ReadConnection, now: float
) -> dict[str, Any]:
    scope = app_scope(name)
    issued = admin.tokens(db, name)
    if is_paused:
        condition = "paused"
    elif scope not in found.caps:
        condition = "no policy"
    else:
        condition = "broken file" if found.caps[scope] is None else "in force"
    return {
        "app": name,
        "state": condition,
        "today_nano": stands[scope, "day"].spent_nano,
        "month_nano": stands[scope, "month"].spent_nano,
        "tokens": sum(each.refusal(now) is None for each in issued),
        "last_used_at": max((each.last_used_at for each in issued if each.last_used_at), default=None),
    }


def _policy(name: str, policies: Path) -> str:
    """Return in a line what the app may do; or why its file is not in force."""
    try:
        found = load(policies).apps.get(name)
    except PolicyError as error:
        return f"The policy files cannot come into force: {str(error).splitlines()[0]}"
    if found is None:
        return f"No policy: all its calls are refused until {policies}/apps/{name}.yaml is there."
    features = f"; features {', '.join(found.features)}" if found.features else ""
    return f"may use {', '.join(found.models.allow)}{features}; mode {found.mode}, reserve {found.reserve} ({found.file})"
