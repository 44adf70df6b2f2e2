"""`gateway where`: the folders and files that the other commands use, and why these."""

import json
from pathlib import Path

import click
from click.core import ParameterSource

from gateway_addon.cli.common import default_places, json_option, ledger_option, policies_option, says_errors
from gateway_addon.ledger.store.sqlite_files import ledger_path, state_folder
from gateway_addon.names import PROGRAM


@click.command(epilog=f"Example: {PROGRAM} where")
@policies_option
@ledger_option
@json_option
@click.pass_context
@says_errors(ValueError)
def where(ctx: click.Context, policies: Path, ledger: str, as_json: bool) -> None:
    """Show where policies, ledger and the gateway's own state live, and why there.

    In a clone they lie in its folder. An installed gateway uses ~/.gateway where that already holds policies or a ledger, else
    ~/.config/gateway and ~/.local/share/gateway (XDG_CONFIG_HOME and XDG_DATA_HOME name others).
    """
    place = ledger_path(ledger)
    on_a_file = isinstance(place, Path)
    rows = {
        "policies": (str(policies.absolute()), _why(ctx, "policies")),
        "ledger": (str(place.absolute() if isinstance(place, Path) else place), _why(ctx, "ledger")),
        "state": (str(state_folder(place)), "beside the ledger" if on_a_file else "of this machine; the ledger is on a server"),
    }
    if as_json:
        click.echo(json.dumps({name: {"place": shown, "why": why} for name, (shown, why) in rows.items()}, indent=2))
        return
    width = max(len(shown) for shown, _ in rows.values())
    for name, (shown, why) in rows.items():
        click.echo(f"{name:<8}  {shown:<{width}}  {why}")


def _why(ctx: click.Context, name: str) -> str:
    source = ctx.get_parameter_source(name)
    if source is ParameterSource.COMMANDLINE:
        return f"--{name} says so"
    return f"GATEWAY_{name.upper()} says so" if source is ParameterSource.ENVIRONMENT else default_places().why
