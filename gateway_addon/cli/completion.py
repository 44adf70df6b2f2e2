"""`gateway completion`: what a shell needs to complete commands and options."""

import click
from click.shell_completion import get_completion_class

from gateway_addon.cli.common import stop

WHERE = {
    "bash": 'eval "$(gateway completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(gateway completion zsh)" in ~/.zshrc, behind compinit',
    "fish": "gateway completion fish > ~/.config/fish/completions/gateway.fish",
}


@click.command(epilog='Example: eval "$(gateway completion bash)"')
@click.argument("shell", type=click.Choice(tuple(WHERE)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL. It completes `gateway`, wherever that is installed."""
    found = get_completion_class(shell)
    if found is None:
        stop(f"{shell} is not supported; choose one of {', '.join(WHERE)}.")
    click.echo(found(ctx.find_root().command, {}, "gateway", "_GATEWAY_COMPLETE").source())
    click.echo(f"Keep it: {WHERE[shell]}", err=True)
