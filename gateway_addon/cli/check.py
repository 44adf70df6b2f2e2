"""`gateway check`: validate the policy and price files, print what is in force."""

import json
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from gateway_addon.cli.common import policies_option, says_errors
from gateway_addon.money import dollars
from gateway_addon.policy import AppPolicy, GatewayPolicy, PolicyError, load


@click.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path, file_okay=False))
@policies_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@says_errors(PolicyError)
def check(directory: Path | None, policies: Path, as_json: bool) -> None:
    """Validate the policy files of DIRECTORY (or --policies) and the prices; print what they put in force.

    Exits 2 with `file:line: key: reason` where they could not come into force.
    """
    policy = load(directory or policies)
    facts = _facts(policy)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    apps = [{"app": name, **{key: _cell(value) for key, value in app.items()}} for name, app in facts.pop("apps").items()]
    click.echo(tabulate([(key, _cell(value)) for key, value in facts.items()], tablefmt="plain"))
    click.echo()
    click.echo(tabulate(apps, headers="keys") if apps else "no apps: what no file in apps/ allows is refused")


def _facts(policy: GatewayPolicy) -> dict[str, Any]:
    return {
        "policy": policy.digest[:12],
        "upstream": policy.upstream,
        "key": f"{policy.key.kind} {_cell(policy.key.value)}",
        "timezone": policy.timezone,
        "total": _amounts(policy.caps),
        "teams": {name: _amounts(team.caps) for name, team in policy.teams.items()},
        "prices": f"{len(policy.prices.models())} models, checked {policy.prices.checked}, {policy.prices.digest[:12]}",
        "apps": {name: _app(app) for name, app in policy.apps.items()},
    }


def _app(app: AppPolicy) -> dict[str, Any]:
    denied = [f"not {pattern}" for pattern in app.models.deny]
    renamed = [f"{alias} = {model}" for alias, model in app.models.aliases.items()]
    return {
        "team": app.team,
        "models": [*app.models.allow, *denied, *renamed],
        "features": list(app.features),
        "max_tokens": app.max_tokens and f"{app.max_tokens.limit:,}" + (" (clamped)" if app.max_tokens.over == "clamp" else ""),
        "caps": _amounts(app.caps),
        "reserve": app.reserve,
        "mode": app.mode,
    }


def _amounts(caps: Any) -> Any:
    return {window: dollars(amount_nano) for window, amount_nano in caps.items()} or "unlimited"


def _cell(value: Any) -> str:
    """A value on one line of a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(value)
    return "" if value is None else str(value)
