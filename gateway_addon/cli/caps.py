"""`gateway cap list|raise|withdraw|limit`: what may be spent, changed for a while. In force on the next call, in every process."""

import getpass
import json
import time
from collections.abc import Sequence
from datetime import tzinfo
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli.common import PROBLEM, ROW_NUMBER, json_option, ledger_option, policies_option, says_errors, stop, why_option
from gateway_addon.cli.parts import meant, part_option
from gateway_addon.cli.times import to_come
from gateway_addon.ledger import LedgerUnavailable, admin, app_scope, connect
from gateway_addon.ledger.reports import sessions
from gateway_addon.ledger.reports.forecast import CLOSED_DAYS_MIN, Forecast, forecasts, too_young
from gateway_addon.ledger.reservations import capped, zone
from gateway_addon.ledger.scope import AppPart, cap_command, enclosing, named, part_of, part_within, typed
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.ledger.types import Limit, Raise
from gateway_addon.money import cents, dollars, parse_nano
from gateway_addon.names import PROGRAM
from gateway_addon.operations import changes
from gateway_addon.operations.changes import scope_of
from gateway_addon.operations.tables import table
from gateway_addon.policy import Cap, Outline, outline
from gateway_addon.windows import WINDOWS, cycle, during, is_cycle, per, shown

SAY = says_errors(LedgerUnavailable, ValueError)
AMOUNTS = {"ignore_unknown_options": True}  # -5 is an amount, and refused as one


class _WindowChoice(click.Choice[str]):
    """Take a billing cycle by its name too, as `cap list` shows it: `cycle:17`."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        day = value.removeprefix("cycle:")
        return value if is_cycle(value) and day.isdecimal() and value == cycle(int(day)) else super().convert(value, param, ctx)


window_argument = click.argument("window", type=_WindowChoice((*WINDOWS, "cycle:DAY")))


@click.group(epilog=f"Example: {PROGRAM} cap list")
def cap() -> None:
    """Change what may be spent, for a while, and take it back. Caps themselves live in the policy files."""


@cap.command("list", epilog=f"Example: {PROGRAM} cap list reviews")
@click.argument("name", metavar="[APP]", required=False)
@part_option(capped=True)
@json_option
@policies_option
@ledger_option
@SAY
def list_caps(name: str | None, part: AppPart | None, as_json: bool, policies: Path, ledger: str) -> None:
    """List caps, and the raises and limits in force.

    APP, team:NAME or total: its caps; without it all. Of an app's parts those are listed whose caps are changed, or the one that is named.
    """
    now, found, place = time.time(), outline(policies), ledger_path(ledger)
    part, _ = meant(part, place, policies)
    with connect.reading(place) as db:
        calendar = zone(db)
        wanted = None if name is None else _scope(name, part, db, found)
        if wanted is None and part is not None:
            stop(OF_AN_APP)
        raises = [each for each in admin.raises(db, now=now) if _is_within(each.scope, wanted)]
        limits = [each for each in admin.limits(db) if _is_within(each.scope, wanted)]
        listed = {each.scope for each in raises} | {each.scope for each in limits} | ({wanted} if part and wanted else set())
        caps = [each for each in found.windowed if wanted in (None, each.scope)]
        caps += [Cap(scope, *cap) for scope in sorted(filter(part_of, listed)) for cap in (changes.caps_of(db, found, scope) or {}).items()]
        rows = standing_rows(db, caps, now)
    unread = [scope for scope, read in found.caps.items() if read is None and wanted in (None, scope)]
    if as_json:
        changed_by = {"raises": [each._asdict() for each in raises], "limits": [each._asdict() for each in limits]}
        click.echo(json.dumps({"caps": rows, **changed_by, "unread": unread}, indent=2))
        return
    click.echo(caps_table(rows) if rows else "No caps.")
    if raises or limits:
        click.echo(f"\n{changes_table(raises, limits, calendar)}")
    if unread:
        click.echo(
            f"\nNot shown, since their files cannot be read now ({PROGRAM} check says why): {', '.join(map(typed, unread))}.", err=True
        )


@cap.command("raise", epilog=f"Example: {PROGRAM} cap raise reviews day 5 --until 12h --why 'launch day'", context_settings=AMOUNTS)
@click.argument("name", metavar="APP")
@window_argument
@click.argument("amount")
@part_option(capped=True)
@click.option("--until", required=True, metavar="DATE", help="When the raise ends: 2026-12-01, 12h, 3d.")
@click.option("--replace", type=ROW_NUMBER, metavar="ID", help=f"In place of this raise (see {PROGRAM} cap list) instead of beside it.")
@click.option("--lift-limit", is_flag=True, help="Take away the limit that would hold it down.")
@json_option
@why_option
@policies_option
@ledger_option
@SAY
def raise_cap(
    name: str,
    window: str,
    amount: str,
    part: AppPart | None,
    until: str,
    replace: int | None,
    lift_limit: bool,
    as_json: bool,
    why: str,
    policies: Path,
    ledger: str,
) -> None:
    """Add AMOUNT on top of a cap in each window, until a date.

    The cap is that of APP, of team:NAME, of the total, or of one part of APP.
    """
    now, who, found, place = time.time(), getpass.getuser(), outline(policies), ledger_path(ledger)
    amount_nano = _amount(amount, f"{PROGRAM} cap limit {name} {window}")
    part, known = meant(part, place, policies)
    with connect.changing(place) as db:
        scope, calendar = _scope(name, part, db, found), zone(db)
        _must_stand_alone(db, name, part)
        ends_at = to_come(until, now, calendar)
        _say_unread(name, window, found, scope)
        try:
            changed = changes.raise_cap(
                db, found, scope, window, amount_nano, until=ends_at, replace=replace, lift_limit=lift_limit, who=who, why=why, now=now
            )
        except changes.HeldDown as error:
            stop(f"{error} To take the limit away with it: --lift-limit.", PROBLEM)
        made, beside, together_nano, base_nano = changed
    if as_json:
        click.echo(json.dumps(made._asdict() | {"adds_to": [each.id for each in beside], "raised_nano": together_nano}))
        return
    above = "its cap" if base_nano is None else f"its {dollars(base_nano)}"
    ending = shown(ends_at, calendar)
    click.echo(f"{named(scope)} may spend {dollars(amount_nano)} above {above} {per(window)}, until {ending} (raise {made.id}).")
    if beside:
        others = ", ".join(f"{each.id} of {dollars(each.amount_nano)}" for each in beside)
        click.echo(f"It adds to raise {others}: {dollars(together_nano)} above in all. To change one instead: --replace ID.")
    _say_unknown(known)


@cap.command(epilog=f"Example: {PROGRAM} cap withdraw 3 --why 'meant 5, not 500'")
@click.argument("number", metavar="ID", type=ROW_NUMBER)
@json_option
@why_option
@ledger_option
@SAY
def withdraw(number: int, as_json: bool, why: str, ledger: str) -> None:
    """Take the raise ID back, from the next call on.

    `cap list` shows the raises in force.
    """
    with connect.changing(ledger_path(ledger)) as db:
        gone = admin.withdraw_raise(db, number, who=getpass.getuser(), why=why, now=time.time())
    if as_json:
        click.echo(json.dumps(gone._asdict()))
    else:
        click.echo(f"{named(gone.scope)} may no longer spend {dollars(gone.amount_nano)} above its cap {per(gone.window)}.")


@cap.command(epilog=f"Example: {PROGRAM} cap limit reviews day 1 --why 'until the loop is found'", context_settings=AMOUNTS)
@click.argument("name", metavar="APP")
@window_argument
@click.argument("amount", required=False)
@part_option(capped=True)
@click.option("--lift", is_flag=True, help="Take the limit away.")
@json_option
@why_option
@policies_option
@ledger_option
@SAY
def limit(
    name: str, window: str, amount: str | None, part: AppPart | None, lift: bool, as_json: bool, why: str, policies: Path, ledger: str
) -> None:
    """Lower a cap to AMOUNT in each window, until --lift.

    The cap is that of APP, of team:NAME, of the total, or of one part of APP. A limit holds whatever the raises are.
    """
    if lift == (amount is not None):
        stop("Say to what: an AMOUNT, or --lift to take the limit away.")
    now, who, found, place = time.time(), getpass.getuser(), outline(policies), ledger_path(ledger)
    amount_nano = None if amount is None else _amount(amount, f"{PROGRAM} cap limit {name} {window} 0")
    part, known = meant(part, place, policies)
    with connect.changing(place) as db:
        scope = _scope(name, part, db, found)
        if amount_nano is None:
            before = admin.lift_limit(db, scope, window, who=who, why=why, now=now)
        else:
            _must_stand_alone(db, name, part)
            _say_unread(name, window, found, scope)
            before = changes.limit_cap(db, found, scope, window, amount_nano, who=who, why=why, now=now)
    if lift and before is None:
        stop(f"{named(scope)} has no limit {during(window)}; {PROGRAM} cap list shows those in force.", PROBLEM)
    if as_json:
        click.echo(json.dumps({"scope": scope, "window": window, "amount_nano": amount_nano, "before_nano": before and before.amount_nano}))
    elif amount_nano is None:
        click.echo(f"{named(scope)} may spend up to its cap {per(window)} again, raises included.")
    else:
        lifted = cap_command("limit", scope, window, "--lift")
        click.echo(f"{named(scope)} may spend {dollars(amount_nano)} {per(window)}, whatever its raises, until {lifted}.")
        _say_unknown(known)


OF_AN_APP = "A session, agent, user, model, token or label belongs to an app: name the APP."


def _scope(name: str, part: AppPart | None, db: Connection, found: Outline) -> str:
    """Return the scope of APP, team:NAME or total, or of a part of APP. Raises ValueError for what is not known."""
    scope = scope_of(name, db, found)
    if part is None:
        return scope
    if not scope.startswith("app:"):
        stop(OF_AN_APP)
    if part[0] == "token" and all(str(each.id) != part[1] for each in admin.tokens(db, name)):
        raise ValueError(f"token {part[1]} is not one of {name}: {PROGRAM} token list {name}")
    return part_within(scope, part)


def _must_stand_alone(db: Connection, name: str, part: AppPart | None) -> None:
    """Refuse to change the cap of a part whose calls count in another one. Raises ValueError."""
    if part is not None and (shared := sessions.counted_as(db, name, part)) != part:
        whose = part_within(app_scope(name), shared)
        raise ValueError(
            f"the calls of {named(part_within(app_scope(name), part))} count in {shared[1]!r}, which all names share that came beyond the"
            f" parts_max of a day: change {typed(whose)}, or raise parts_max in the policy file"
        )


def _is_within(scope: str, wanted: str | None) -> bool:
    """Tell whether a scope, or the app that it is a part of, is the wanted one; None: all are."""
    return wanted in (None, scope, enclosing(scope))


def _say_unknown(known: bool) -> None:
    """Warn of a part that may be misspelt."""
    if not known:
        click.echo(f"None of the last {sessions.LATEST:,} calls had it: is it spelled so?", err=True)


def _amount(text: str, instead: str) -> int:
    """Parse an amount as typed. Raises ValueError for one below zero too, with the command that was probably meant."""
    if text.lstrip().startswith("-"):
        raise ValueError(f"{text} is below zero; to lower a cap: {instead}")
    return parse_nano(text)


def _say_unread(name: str, window: str, found: Outline, scope: str) -> None:
    """Warn that the policy's cap is not known now."""
    if found.caps_of(scope) is None:
        click.echo(
            f"The file of {name} cannot be read now: this changes the cap that is in force {during(window)}, if there is one.", err=True
        )


def standing_rows(db: connect.ReadConnection, asked: Sequence[Cap], now: float) -> list[dict[str, Any]]:
    """Return caps with their raises and limits, how they stand, and their forecasts; no forecast of an app's part."""
    policy_nano = {(each.scope, each.window): each.amount_nano for each in asked}
    standings = capped(db, asked, now=now)
    whole = [each for each in standings if part_of(each.scope) is None]
    coming = {(each.scope, each.window): each for each in forecasts(db, whole, now=now)}
    return [
        {
            "scope": each.scope,
            "window": each.window,
            "policy_nano": policy_nano[each.scope, each.window],
            "raised_nano": each.raised_nano,
            "limit_nano": each.limit_nano,
            "in_force_nano": each.cap_nano,
            "spent_nano": each.spent_nano,
            "held_nano": each.reserved_nano,
            **_coming(coming.get((each.scope, each.window))),
        }
        for each in standings
    ]


def _coming(forecast: Forecast | None) -> dict[str, Any]:
    if forecast is None:
        return {"forecast_nano": None, "forecast_days": None, "cap_reached_on": None}
    reached_on = forecast.reached_on and forecast.reached_on.isoformat()
    return {"forecast_nano": forecast.at_end_nano, "forecast_days": forecast.closed_days, "cap_reached_on": reached_on}


def caps_table(rows: list[dict[str, Any]]) -> str:
    """Return the caps as a table, without the columns that say nothing, and a note where forecasts have too few days."""
    names = ("policy", "raised", "limit", "in force", "spent", "held", "forecast")
    cells = [[typed(row["scope"]), row["window"], *(_amount_cell(row, name) for name in names), row["cap_reached_on"]] for row in rows]
    headings = ("of", "window", *names, "cap reached")
    grid = table(cells, headings, right=names, drop_empty=("raised", "limit", "held", "forecast", "cap reached"))
    few = [row["scope"] for row in rows if row["forecast_days"] is not None and row["forecast_days"] < CLOSED_DAYS_MIN]
    young = list(dict.fromkeys(map(typed, few)))
    return f"{grid}\n\n{too_young(young)}" if young else grid


def _amount_cell(row: dict[str, Any], name: str) -> str:
    nano = row[f"{name.replace(' ', '_')}_nano"]
    if nano is None or (not nano and name in ("raised", "held")):
        return ""
    return cents(nano) if name == "forecast" else dollars(nano)


def changes_table(raises: list[Raise], limits: list[Limit], calendar: tzinfo) -> str:
    cells = [
        (
            f"raise {each.id}",
            typed(each.scope),
            each.window,
            f"+{dollars(each.amount_nano)}",
            shown(each.until, calendar),
            each.who,
            each.why,
        )
        for each in raises
    ]
    cells += [("limit", typed(each.scope), each.window, dollars(each.amount_nano), "lifted", each.who, each.why) for each in limits]
    return table(cells, ("change", "of", "window", "amount", "until", "by", "why"), right=("amount",))
