"""`gateway token issue|rotate|revoke|list`: the unit of attribution is an app's token."""

import getpass
import json
import sys
import time
from collections.abc import Callable, Iterable
from datetime import tzinfo
from functools import partial
from itertools import batched
from pathlib import Path

import click

from gateway_addon.cli.common import (
    PROBLEM,
    ROW_NUMBER,
    json_option,
    ledger_option,
    listen_option,
    policies_option,
    says_errors,
    stop,
    write_privately,
)
from gateway_addon.cli.labels import label_option
from gateway_addon.cli.scopes import must_know
from gateway_addon.cli.times import duration_s
from gateway_addon.identity import tokens
from gateway_addon.identity.workloads import workload_digest
from gateway_addon.ledger import LedgerUnavailable, Token, admin, connect, workloads
from gateway_addon.ledger.reservations import capped, zone
from gateway_addon.ledger.scope import part_scope
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.ledger.types import Labels, Standing
from gateway_addon.money import dollars
from gateway_addon.names import PROGRAM, app_named
from gateway_addon.onboarding import snippets, workload_forms
from gateway_addon.onboarding.workload_forms import WORKLOAD_FORMS, WORKLOAD_KINDS
from gateway_addon.operations.tables import table
from gateway_addon.policy import Cap, Outline, PolicyError, load, may_use, outline
from gateway_addon.pricing import PriceError
from gateway_addon.refusals import capitalised
from gateway_addon.windows import shown

CAPS_A_LOOK = 100
"""Tokens whose caps one statement looks at."""
FOR = click.option("--for", "kind", type=click.Choice(snippets.KINDS), help="Also print the lines to paste, in this form.")
FOR_ANY = click.option(
    "--for",
    "kind",
    type=click.Choice([*snippets.KINDS, *WORKLOAD_KINDS]),
    help=f"Also print the lines to paste, in this form; for a workload ({', '.join(WORKLOAD_KINDS)}) they are all, and no token is made.",
)
TO = click.option(
    "--to",
    "file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the lines, with the token in them, to this new file of mode 600 instead.",
)
SAY = says_errors(LedgerUnavailable, PolicyError, PriceError, ValueError)


@click.group(epilog=f"Example: {PROGRAM} token issue reviews")
def token() -> None:
    """Issue, rotate, revoke and list the apps' tokens. Only their SHA-256 is stored: a token is shown once."""


@token.command(epilog=f"Example: TOKEN=$({PROGRAM} token issue reviews --name laptop)")
@click.argument("app")
@click.option("--name", default="", help="What to call it in lists, for apps with several tokens.")
@click.option("--expires", metavar="DURATION", help="When it ends by itself: 12h, 30d.")
@label_option("A label of all its calls: client=acme. It counts whatever a call says.")
@FOR_ANY
@TO
@json_option
@policies_option
@ledger_option
@listen_option
@SAY
def issue(
    app: str,
    name: str,
    expires: str | None,
    labels: Labels,
    kind: str | None,
    file: Path | None,
    as_json: bool,
    policies: Path,
    ledger: str,
    listen: tuple[str, int],
) -> None:
    """Print a new token for APP, alone on stdout, once."""
    found, now = _with_policy(app, policies), time.time()
    if kind in WORKLOAD_KINDS:
        _show_workload(app, kind, found, listen, beside=bool(name or expires or labels or file or as_json))
        return
    expires_at = now + duration_s(expires) if expires else None
    write = partial(admin.issue_token, app=app, label=name, expires_at=expires_at, labels=labels, who=getpass.getuser(), now=now)
    _show_new(app, write, kind, file, ledger, _address(found, listen), policies, as_json=as_json)


@token.command(epilog=f"Example: {PROGRAM} token rotate reviews --overlap 1h")
@click.argument("app")
@click.option("--overlap", default="0s", metavar="DURATION", help="How long the old tokens go on working: 1h, 2d.", show_default=True)
@click.option("--name", default="", help="What to call the new one in lists.")
@FOR
@TO
@json_option
@policies_option
@ledger_option
@listen_option
@SAY
def rotate(
    app: str,
    overlap: str,
    name: str,
    kind: str | None,
    file: Path | None,
    as_json: bool,
    policies: Path,
    ledger: str,
    listen: tuple[str, int],
) -> None:
    """Print a new token for APP; revoke its others, now or later."""
    found, keep_old_s, now = _with_policy(app, policies), duration_s(overlap), time.time()
    write = partial(admin.rotate_token, app=app, label=name, keep_old_s=keep_old_s, who=getpass.getuser(), now=now)
    _show_new(app, write, kind, file, ledger, _address(found, listen), policies, as_json=as_json)


@token.command(epilog=f"Example: {PROGRAM} token revoke reviews --id 3")
@click.argument("app")
@click.option("--id", "token_id", type=ROW_NUMBER, help=f"Only this one (see {PROGRAM} token list).")
@click.option("--subject", metavar="SUBJECT", help="Only the workload with this subject, one that was never seen too.")
@click.option("--all", "everything", is_flag=True, help="All that the app has, without asking.")
@json_option
@policies_option
@ledger_option
@SAY
def revoke(
    app: str, token_id: int | None, subject: str | None, everything: bool, as_json: bool, policies: Path, ledger: str
) -> None:
    """Revoke APP's token; of several, one (--id) or --all. It holds from the next request on; calls in flight finish.

    A workload is revoked like a token, by --id or by its --subject: it and its sessions, whatever identity token it comes with.
    """
    now, who = time.time(), getpass.getuser()
    if subject is not None and (token_id is not None or everything):
        stop("Name a workload's --subject, a row's --id, or --all: one of them.")
    if token_id is None and subject is None and not everything:
        _ask_whether_all(app, now, policies, ledger)
    with connect.changing(ledger_path(ledger)) as db:
        must_know(app, db, policies)
        if subject is None:
            revoked = admin.revoke_tokens(db, app, token_id=token_id, who=who, now=now)
        else:
            revoked = _bar(db, app, subject, outline(policies).issuers, who, now)
    if not revoked:
        stop(f"App {app} has no such token in force; {PROGRAM} token list {app} shows what it has.", PROBLEM)
    if as_json:
        click.echo(json.dumps([_row(each, now) for each in revoked], indent=2))
        return
    click.echo(f"Revoked {len(revoked)} of app {app}: {', '.join(_title(each) for each in revoked)}.", err=True)


@token.command(epilog=f"Example: {PROGRAM} token restore reviews --id 7")
@click.argument("app")
@click.option("--id", "token_id", type=ROW_NUMBER, required=True, help=f"The workload's (see {PROGRAM} token list).")
@policies_option
@ledger_option
@SAY
def restore(app: str, token_id: int, policies: Path, ledger: str) -> None:
    """Let a revoked workload of APP in again. A token that was revoked stays so: issue a new one."""
    with connect.changing(ledger_path(ledger)) as db:
        must_know(app, db, policies)
        restored = workloads.restore(db, app, token_id, who=getpass.getuser(), now=time.time())
    click.echo(f"{_title(restored)} of {app_named(app)} is let in again.", err=True)


@token.command("forms", epilog=f"Example: {PROGRAM} token forms langchain")
@click.argument("kind", required=False, type=click.Choice(snippets.KINDS), metavar="[FORM]")
@click.option("--app", default="app", show_default=True, help="The app whose lines they would be.")
@policies_option
@listen_option
@SAY
def show_forms(kind: str | None, app: str, policies: Path, listen: tuple[str, int]) -> None:
    """List the forms of --for, or print the lines of one.

    The lines have no token in them: nothing is issued.
    """
    if kind is None:
        click.echo(table([(each, snippets.where(each, app=app)) for each in snippets.KINDS]))
        return
    base_url = _address(outline(policies), listen)
    click.echo(f"{snippets.where(kind, app=app)}\n", err=True)
    click.echo(snippets.lines(kind, base_url=base_url, app=app, token_placeholder="TOKEN", models=_models(app, policies)), nl=False)


@token.command("list", epilog=f"Example: {PROGRAM} token list --idle 30d")
@click.argument("app", required=False)
@click.option("--idle", metavar="DURATION", help="Only those in force that nobody used for so long: 30d. Candidates to revoke.")
@json_option
@policies_option
@ledger_option
@SAY
def list_tokens(app: str | None, idle: str | None, as_json: bool, policies: Path, ledger: str) -> None:
    """List tokens: issued when, last used when, in force or not.

    The tokens themselves are not kept.
    """
    now = time.time()
    with connect.reading(ledger_path(ledger)) as db:
        found, calendar = admin.tokens(db, None if app is None else must_know(app, db, policies)), zone(db)
        stands = {each.scope: each for some in batched(found, CAPS_A_LOOK) for each in capped(db, _own_caps(some), now=now)}
    if idle is not None:
        found = [each for each in found if each.refusal(now) is None and (each.last_used_at or each.created_at) < now - duration_s(idle)]
    rows = [_row(each, now) | _cap_facts(stands.get(_scope(each))) for each in found]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif not rows:
        click.echo(
            "No token in force has been idle for so long." if idle is not None else f"No tokens yet: {PROGRAM} token issue {app or 'APP'}"
        )
    else:
        if not any(row["issuer"] for row in rows):  # of workloads alone
            rows = [{name: value for name, value in row.items() if name != "issuer"} for row in rows]
        rows = [row | {"last_used_at": row["last_used_at"] or "never"} for row in rows]
        cells = [[_cell(name, value, calendar) for name, value in row.items()] for row in rows]
        names = [name.removesuffix("_nano").removesuffix("_at").replace("_", " ") for name in rows[0]]
        click.echo(table(cells, names, right=("cap", "left"), drop_empty=("cap", "left")))


def _with_policy(app: str, policies: Path) -> Outline:
    """Return the policy files as they can be read; they must have one of this app, valid or not."""
    found = outline(policies)
    if app not in found.apps:
        first = f"write {policies}/apps/{app}.yaml first. Apps with one: {', '.join(found.apps)}."
        stop(f"No policy for app {app}: {first if found.apps else f'no app has one yet; {PROGRAM} init writes the first'}")
    return found


def _bar(db: Connection, app: str, subject: str, trusted: Iterable[str], who: str, now: float) -> list[Token]:
    """Revoke an app's workloads of a subject: those of issuers that it came from, and of all that are trusted."""
    issuers = dict.fromkeys((*(each.issuer for each in workloads.of_subject(db, app, subject) if each.issuer), *trusted))
    if not issuers:
        stop(f"{capitalised(app_named(app))} has no workload {subject!r}, and gateway.yaml names no issuer.", PROBLEM)
    found = (workloads.bar(db, app, each, subject, workload_digest(app, each, subject), who=who, now=now) for each in issuers)
    return [each for each in found if each is not None]


def _ask_whether_all(app: str, now: float, policies: Path, ledger: str) -> None:
    """Ask whether all tokens of an app are to be revoked, where it has several."""
    with connect.reading(ledger_path(ledger)) as db:
        good = [each for each in admin.tokens(db, must_know(app, db, policies)) if each.refusal(now) is None]
    if len(good) < 2:
        return
    several = f"App {app} has {len(good)} tokens in force: {', '.join(map(_title, good))}"
    if not sys.stdin.isatty():
        stop(f"{several}. Name one with --id, or revoke them --all.")
    if not click.confirm(f"{several}. Revoke all of them?", err=True):
        stop("Nothing was revoked; --id ID revokes one.", PROBLEM)


def _models(app: str, policies: Path) -> tuple[str, ...]:
    """Return the models that an app may use, the first allowed one first; a stand-in where its policy cannot be read."""
    try:
        policy = load(policies)
    except (PolicyError, PriceError):
        return ("MODEL",)
    if app not in policy.apps:
        return ("MODEL",)
    named = [name for name in policy.apps[app].models.allow if "*" not in name]
    return tuple(named or [name for name in policy.prices.rows if may_use(policy.apps[app], name, policy.prices)]) or ("MODEL",)


def _address(found: Outline, listen: tuple[str, int]) -> str:
    host = f"[{listen[0]}]" if ":" in listen[0] else listen[0]
    return f"{'https' if found.tls else 'http'}://{host}:{listen[1]}"


def _show_new(
    app: str,
    write: Callable[..., Token],
    kind: str | None,
    file: Path | None,
    ledger: str,
    base_url: str,
    policies: Path,
    *,
    as_json: bool,
) -> None:
    if file is not None and kind is None:
        stop("Say in which form the lines shall be: --for dotenv, for example.")
    if file is not None and file.exists():
        stop(f"{file} exists and is not changed. Name a new file, or paste the lines that --for prints into it.")
    secret = tokens.mint()
    with connect.changing(ledger_path(ledger)) as db:
        made = write(db, digest=tokens.digest(secret))
    click.echo(f"Token for app {app}, shown this once (only its SHA-256 is kept):", err=True)
    click.echo(
        json.dumps({"id": made.id, "app": app, "name": made.label, "token": secret, "expires_at": made.expires_at}) if as_json else secret
    )
    if kind is None:
        return
    where, lines = snippets.where(kind, app=app), partial(snippets.lines, kind, base_url=base_url, app=app, models=_models(app, policies))
    if file is None:
        click.echo(f"\n{where}\n{lines(token_placeholder='TOKEN')}", err=True)
    else:
        write_privately(file, lines(token_placeholder=secret))
        click.echo(f"\n{where}\nThe lines are in {file}.", err=True)


def _show_workload(app: str, kind: str, found: Outline, listen: tuple[str, int], *, beside: bool) -> None:
    """Print both sides of a workload's identity, which needs no token."""
    if beside:
        stop(f"--for {kind} makes no token: the job has an identity of its own. Leave --name, --expires, --label, --to and --json out.")
    click.echo(f"{WORKLOAD_FORMS[kind].where}\n", err=True)
    audience = found.audience or "https://gateway.internal"
    click.echo(workload_forms.lines(kind, base_url=_address(found, listen), audience=audience, app=app), nl=False)


def _title(each: Token) -> str:
    return f"{each.id} ({each.label})" if each.label else str(each.id)


def _scope(each: Token) -> str:
    return part_scope(each.app, ("token", str(each.id)))


def _own_caps(found: Iterable[Token]) -> list[Cap]:
    """Return the caps that tokens were issued with."""
    return [Cap(_scope(each), "ever", each.cap_nano) for each in found if each.cap_nano is not None]


def _cap_facts(stands: Standing | None) -> dict[str, object]:
    """Return a token's own cap as it is in force, and what is left of it."""
    if stands is None or stands.cap_nano is None:
        return {"cap_nano": None, "left_nano": None}
    return {"cap_nano": stands.cap_nano, "left_nano": max(0, stands.cap_nano - stands.spent_nano - stands.reserved_nano)}


def _cell(name: str, value: object, calendar: tzinfo) -> object:
    if name.endswith("_nano") and isinstance(value, int):
        return dollars(value)
    if isinstance(value, dict):
        return ", ".join(f"{name}={text}" for name, text in value.items())
    return shown(value, calendar) if isinstance(value, float) else value


def _row(each: Token, now: float) -> dict[str, object]:
    state = each.refusal(now)
    return {
        "id": each.id,
        "app": each.app,
        "name": each.label,
        "state": "in force" if state is None else state.removeprefix("token_"),
        "issued_at": each.created_at,
        "expires_at": each.expires_at,
        "labels": dict(each.labels),
        "issuer": each.issuer,
        "last_used_at": each.last_used_at,
    }
