"""`gateway check`: validate the policy and price files, print what is in force; ask a running gateway, show what was changed."""

import json
import time
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli.caps import changes_table
from gateway_addon.cli.common import PROBLEM, json_option, ledger_option, listen_option, policies_option, says_errors, stop, whole_number
from gateway_addon.cli.scopes import must_have_policies
from gateway_addon.http_client import Egress, Unanswered, ask, whole
from gateway_addon.identity.workloads import described
from gateway_addon.ledger import LedgerUnavailable, admin, connect
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.ledger.types import Limit, Raise
from gateway_addon.money import dollars
from gateway_addon.names import PROGRAM
from gateway_addon.operations.tables import table
from gateway_addon.policy import AppPolicy, GatewayPolicy, PartCaps, PolicyError, caps_of_part, load, retiring
from gateway_addon.policy.trusting import doubtful
from gateway_addon.windows import shown

ANSWER_WITHIN_S = 5.0
ANYONE = Egress(trusts_anyone=True)


@click.command(epilog=f"Example: {PROGRAM} check --running && echo what I saved is what holds")
@click.argument("directory", required=False, type=click.Path(exists=True, path_type=Path, file_okay=False))
@policies_option
@json_option
@click.option("--running", is_flag=True, help="Ask the gateway at --listen whether it has these files in force.")
@click.option("--changes", type=whole_number(1), metavar="N", help="Show the last N changes that came into force, as diffs.")
@listen_option
@ledger_option
@says_errors(PolicyError, LedgerUnavailable)
def check(
    directory: Path | None, policies: Path, as_json: bool, running: bool, changes: int | None, listen: tuple[str, int], ledger: str
) -> None:
    """Validate the policy files of DIRECTORY (or --policies) and the prices; print what they put in force.

    Exits 2 with `file:line: key: reason` where they could not come into force, 1 where --running finds others in force.
    """
    if changes is not None:
        _show_changes(ledger, changes, as_json=as_json)
    elif running:
        _compare(directory or policies, listen, as_json=as_json)
    else:
        must_have_policies(directory or policies, ledger)
        _show(load(directory or policies), ledger, as_json=as_json)


def _show(policy: GatewayPolicy, ledger: str, *, as_json: bool) -> None:
    now = time.time()
    facts = _facts(policy, now)
    raises, limits, calendar = _changed_caps(ledger, now)
    if as_json:
        facts |= {"raises": [each._asdict() for each in raises], "limits": [each._asdict() for each in limits]}
        click.echo(json.dumps(facts, indent=2))
        return
    warnings = [*facts.pop("retiring"), *facts.pop("doubtful")]
    apps = [{"app": name, **{key: _cell(value) for key, value in app.items()}} for name, app in facts.pop("apps").items()]
    click.echo(table([(key, _cell(value)) for key, value in facts.items()]))
    click.echo()
    click.echo(table([list(each.values()) for each in apps], list(apps[0])) if apps else "no apps: what no file in apps/ allows is refused")
    if raises or limits:
        click.echo(f"\nCaps changed for a while, in the ledger ({PROGRAM} cap list):\n{changes_table(raises, limits, calendar)}")
    if warnings:
        click.echo("\n" + "\n".join(f"warning: {sentence}" for sentence in warnings))


def _changed_caps(ledger: str, now: float) -> tuple[list[Raise], list[Limit], tzinfo]:
    """Return the raises and limits in force; none where no ledger can be read: policies are checked without one too."""
    try:
        with connect.reading(ledger_path(ledger)) as db:
            return admin.raises(db, now=now), admin.limits(db), zone(db)
    except (LedgerUnavailable, ValueError):
        return [], [], UTC


def _compare(folder: Path, listen: tuple[str, int], *, as_json: bool) -> None:
    """Say whether the files on disk, and the key that they name, are those that the running gateway works with."""
    running = health(listen)
    where = f"the gateway at {listen[0]}:{listen[1]}"
    if running is None:
        stop(f"No gateway answers at {listen[0]}:{listen[1]}: start one with {PROGRAM} serve, or name another with --listen.", PROBLEM)
    try:
        saved, problem = load(folder).digest[:12], running.get("policy_problem")
    except PolicyError as error:
        saved, problem = None, str(error)
    in_force = problem is None and saved == running["policy"]
    key_problem = running.get("key_problem")
    if as_json:
        click.echo(json.dumps({"in_force": in_force, "running": running["policy"], "saved": saved, "problem": problem or key_problem}))
    elif in_force:
        click.echo(f"In force: {where} judges by these files ({saved}).")
    if in_force and key_problem:
        stop(key_problem, PROBLEM)
    if in_force:
        return
    if problem is None:
        problem = f"{folder} is {saved}: it was saved a moment ago (look again), or that gateway reads another folder."
    stop(f"Not in force: {where} keeps policy {running['policy']}.\n{problem}", PROBLEM)


def health(listen: tuple[str, int]) -> dict[str, Any] | None:
    """Ask a gateway for its health, over TLS where plain HTTP is not understood; None where none answers.

    The certificate is not checked: nothing secret is sent, and the answer is compared with what is on this disk.
    """
    host = f"[{listen[0]}]" if ":" in listen[0] else listen[0]
    for scheme in ("http", "https"):
        url = f"{scheme}://{host}:{listen[1]}/gateway/healthz"
        try:
            with ask(url, "the gateway", timeout_s=ANSWER_WITHIN_S, way=ANYONE) as answer:
                found = json.loads(whole(answer))
        except (Unanswered, ValueError):
            continue
        if isinstance(found, dict) and "policy" in found:
            return found
    return None


def _show_changes(ledger: str, limit: int, *, as_json: bool) -> None:
    with connect.reading(ledger_path(ledger)) as db:
        found, calendar = admin.policy_changes(db, limit), zone(db)
    if as_json:
        click.echo(json.dumps([change._asdict() for change in found], indent=2))
        return
    for change in found:
        which = change.digest if change.diff.startswith(("+key ", "-key ")) else change.digest[:12]
        click.echo(f"{shown(change.at, calendar)}  {which}  saved by {change.who}\n{change.diff}")
    if not found:
        click.echo(f"No policy has come into force yet: {PROGRAM} serve loads the first.")


def _facts(policy: GatewayPolicy, now: float) -> dict[str, Any]:
    return {
        "policy": policy.digest[:12],
        "upstream": policy.upstream,
        "key": f"{policy.key.kind} {_cell(policy.key.value)}",
        "timezone": policy.timezone,
        "total": _amounts(policy.caps),
        "teams": {name: _amounts(team.caps) for name, team in policy.teams.items()},
        "prices": f"{len(policy.prices.models())} models, checked {policy.prices.checked}, {policy.prices.digest[:12]}",
        "apps": {name: _app(app) for name, app in policy.apps.items()},
        "retiring": [each.sentence(now) for each in retiring(policy, now)],
        "doubtful": doubtful(policy.apps),
    } | _trusted(policy)


def _trusted(policy: GatewayPolicy) -> dict[str, Any]:
    """Return the issuers whose identity tokens are believed, and for which apps; nothing where none are."""
    if policy.trust is None:
        return {}
    named = {each.name: each.url for each in policy.trust.issuers.values()}
    rules = [f"{each.app}: {described(each.rule)}" for several in policy.trust.rules.values() for each in several]
    return {"audience": policy.trust.audience, "issuers": named, "workloads": rules}


def _app(app: AppPolicy) -> dict[str, Any]:
    denied = [f"not {pattern}" for pattern in app.models.deny]
    renamed = [f"{alias} = {model}" for alias, model in app.models.aliases.items()]
    return {
        "team": app.team,
        "models": [*app.models.allow, *denied, *renamed],
        "features": list(app.features),
        "max_tokens": app.max_tokens and f"{app.max_tokens.limit:,}" + (" (clamped)" if app.max_tokens.over == "clamp" else ""),
        "caps": _amounts(app.caps),
        "each": {kind: _part(found) for kind, found in app.each.items()}
        | {f"model {model}": _part(caps_of_part(app, "model", model)) for model in app.models.caps},
        "reserve": app.reserve,
        "mode": app.mode + (f", {_cell(app.observe)} observed" if app.observe else ""),
    }


def _part(found: PartCaps) -> dict[str, Any]:
    kept = {} if found.last_call_percent is None else {"last_call": f"{found.last_call_percent}%"}
    return {**_amounts(found.caps), **kept}


def _amounts(caps: Any) -> Any:
    return {window: dollars(amount_nano) for window, amount_nano in caps.items()} or "unlimited"


def _cell(value: Any) -> str:
    """Return a value as one line of a table holds it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(value)
    return "" if value is None else str(value)
