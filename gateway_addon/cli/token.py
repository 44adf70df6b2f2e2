"""`gateway token issue|rotate|revoke|list`: the unit of attribution is an app's token."""

import getpass
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from tabulate import tabulate

from gateway_addon.cli.common import PROBLEM, ROW_NUMBER, ledger_option, listen_option, policies_option, says_errors, stop, write_privately
from gateway_addon.cli.times import day, duration_s
from gateway_addon.identity import tokens
from gateway_addon.ledger import LedgerUnavailable, Token, admin
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.onboarding import snippets
from gateway_addon.policy import GatewayPolicy, PolicyError, load
from gateway_addon.pricing import PriceError

FOR = click.option("--for", "kind", type=click.Choice(snippets.KINDS), help="Also print the lines to paste, in this form.")
TO = click.option(
    "--to",
    "file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the lines, with the token in them, to this new file of mode 600 instead.",
)
SAY = says_errors(LedgerUnavailable, PolicyError, PriceError, ValueError)


@click.group(epilog="Example: gateway token issue reviews")
def token() -> None:
    """Issue, rotate, revoke and list the apps' tokens. Only their SHA-256 is stored: a token is shown once."""


@token.command(epilog="Example: TOKEN=$(gateway token issue reviews --name laptop)")
@click.argument("app")
@click.option("--name", default="", help="What to call it in lists, for apps with several tokens.")
@click.option("--expires", metavar="DURATION", help="When it ends by itself: 12h, 30d.")
@FOR
@TO
@policies_option
@ledger_option
@listen_option
@SAY
def issue(
    app: str,
    name: str,
    expires: str | None,
    kind: str | None,
    file: Path | None,
    policies: Path,
    ledger: str,
    listen: tuple[str, int],
) -> None:
    """Print a new token for APP, alone on stdout, once."""
    policy, now = _policy(app, policies), time.time()
    expires_at = now + duration_s(expires) if expires else None
    write = partial(admin.issue_token, app=app, label=name, expires_at=expires_at, who=getpass.getuser(), now=now)
    _show_new(app, write, kind, file, ledger, _address(policy, listen))


@token.command(epilog="Example: gateway token rotate reviews --overlap 1h")
@click.argument("app")
@click.option("--overlap", default="0s", metavar="DURATION", help="How long the old tokens go on working: 1h, 2d.", show_default=True)
@click.option("--name", default="", help="What to call the new one in lists.")
@FOR
@TO
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
    policies: Path,
    ledger: str,
    listen: tuple[str, int],
) -> None:
    """Print a new token for APP and revoke its others, now or after an overlap."""
    policy, keep_old_s, now = _policy(app, policies), duration_s(overlap), time.time()
    write = partial(admin.rotate_token, app=app, label=name, keep_old_s=keep_old_s, who=getpass.getuser(), now=now)
    _show_new(app, write, kind, file, ledger, _address(policy, listen))


@token.command(epilog="Example: gateway token revoke reviews --id 3")
@click.argument("app")
@click.option("--id", "token_id", type=ROW_NUMBER, help="Only this one (see gateway token list).")
@ledger_option
@SAY
def revoke(app: str, token_id: int | None, ledger: str) -> None:
    """Revoke APP's tokens, all of them or one. It holds from the next request on; calls in flight finish."""
    with admin.changing(ledger_path(ledger)) as db:
        revoked = admin.revoke_tokens(db, app, token_id=token_id, who=getpass.getuser(), now=time.time())
    if not revoked:
        stop(f"App {app} has no such token in force; gateway token list {app} shows what it has.", PROBLEM)
    click.echo(f"Revoked {len(revoked)} of app {app}: {', '.join(_title(each) for each in revoked)}.", err=True)


@token.command("forms", epilog="Example: gateway token forms langchain")
@click.argument("kind", required=False, type=click.Choice(snippets.KINDS), metavar="[FORM]")
@click.option("--app", default="app", show_default=True, help="The app whose lines they would be.")
@policies_option
@listen_option
@SAY
def show_forms(kind: str | None, app: str, policies: Path, listen: tuple[str, int]) -> None:
    """List the forms of --for, or print the lines of one, without a token: nothing is issued."""
    if kind is None:
        click.echo(tabulate([(each, snippets.where(each, app=app)) for each in snippets.KINDS], tablefmt="plain", maxcolwidths=[None, 100]))
        return
    base_url = _address(load(policies), listen)
    click.echo(f"{snippets.where(kind, app=app)}\n", err=True)
    click.echo(snippets.lines(kind, base_url=base_url, app=app, token_placeholder="TOKEN"), nl=False)


@token.command("list", epilog="Example: gateway token list --idle 30d")
@click.argument("app", required=False)
@click.option("--idle", metavar="DURATION", help="Only those in force that nobody used for so long: 30d. Candidates to revoke.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@ledger_option
@SAY
def list_tokens(app: str | None, idle: str | None, as_json: bool, ledger: str) -> None:
    """List tokens: when each was issued and last used, and whether it is in force. The tokens themselves are not kept."""
    now = time.time()
    with admin.reading(ledger_path(ledger)) as db:
        found = admin.tokens(db, app)
    if idle is not None:
        found = [each for each in found if each.refusal(now) is None and (each.last_used_at or each.created_at) < now - duration_s(idle)]
    rows = [_row(each, now) for each in found]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif not rows:
        click.echo("No token in force has been idle for so long." if idle is not None else "No tokens yet: gateway token issue APP")
    else:
        shown = [{name: day(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows]
        click.echo(tabulate([row | {"last used": row["last used"] or "never"} for row in shown], headers="keys"))


def _policy(app: str, policies: Path) -> GatewayPolicy:
    """The policy in force, which must know the app."""
    policy = load(policies)
    if app not in policy.apps:
        known = ", ".join(sorted(policy.apps)) or "none"
        stop(f"No policy for app {app}: write {policies}/apps/{app}.yaml first. Apps with one: {known}.")
    return policy


def _address(policy: GatewayPolicy, listen: tuple[str, int]) -> str:
    host = f"[{listen[0]}]" if ":" in listen[0] else listen[0]
    return f"{'https' if policy.tls else 'http'}://{host}:{listen[1]}"


def _show_new(app: str, write: Callable[..., Token], kind: str | None, file: Path | None, ledger: str, base_url: str) -> None:
    if file is not None and kind is None:
        stop("Say in which form the lines shall be: --for dotenv, for example.")
    if file is not None and file.exists():
        stop(f"{file} exists and is not changed. Name a new file, or paste the lines that --for prints into it.")
    secret = tokens.mint()
    with admin.changing(ledger_path(ledger)) as db:
        write(db, digest=tokens.digest(secret))
    click.echo(f"Token for app {app}, shown this once (only its SHA-256 is kept):", err=True)
    click.echo(secret)
    if kind is None:
        return
    where = snippets.where(kind, app=app)
    if file is None:
        click.echo(f"\n{where}\n{snippets.lines(kind, base_url=base_url, app=app, token_placeholder='TOKEN')}", err=True)
    else:
        write_privately(file, snippets.lines(kind, base_url=base_url, app=app, token_placeholder=secret))
        click.echo(f"\n{where}\nThe lines are in {file}.", err=True)


def _title(each: Token) -> str:
    return f"{each.id} ({each.label})" if each.label else str(each.id)


def _row(each: Token, now: float) -> dict[str, object]:
    state = each.refusal(now)
    return {
        "id": each.id,
        "app": each.app,
        "name": each.label,
        "state": "in force" if state is None else state.removeprefix("token_"),
        "issued": each.created_at,
        "expires": each.expires_at,
        "last used": each.last_used_at,
    }
