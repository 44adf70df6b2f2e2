"""`gateway console`: the operator's desk, on a port of its own."""

import ipaddress
from pathlib import Path

import click

from gateway_addon.cli.common import ListenAddress, ledger_option, policies_option, says_errors, stop
from gateway_addon.clocks import monotonic_s
from gateway_addon.console.app import server
from gateway_addon.console.login import LINK_S, Login
from gateway_addon.console.pages import Console, Policies
from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.names import PROGRAM
from gateway_addon.policy import PolicyError
from gateway_addon.pricing import PriceError
from gateway_addon.proxy.supervisor import bind

NOT_HERE = (
    "The console shows what everybody spends, so it listens on this machine alone, not on {0}. From another machine, forward its port:"
    " ssh -L 8090:127.0.0.1:8090 HOST"
)


@click.command(epilog=f"Example: {PROGRAM} console --listen 127.0.0.1:8090")
@click.option(
    "--listen", type=ListenAddress(), default="127.0.0.1:8090", show_default=True, help="Where the page is, on this machine only."
)
@click.option(
    "--metrics-token",
    "token_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Serve /gateway/metrics to whoever sends this file's text as a bearer token.",
)
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, PolicyError, PriceError, ValueError, OSError)
def console(listen: tuple[str, int], token_file: Path | None, policies: Path, ledger: str) -> None:
    """See spending against caps, live calls, and every call's story, in a browser. Read-only; opens by the link that it prints."""
    host, port = listen
    if host != "localhost" and not _loopback(host):
        stop(NOT_HERE.format(host))
    token = token_file.read_text().strip() if token_file else None
    if token == "":
        stop(f"{token_file} is empty. Put a long random text in it: openssl rand -hex 32 > {token_file}")
    desk = Console(sqlite_files.ledger_path(ledger), Policies(policies), Login(monotonic_s()), metrics_token=token)
    desk.policies()
    desk.warm_up()
    with bind(host, port) as listener:
        serving = server(desk, listener)
    name = f"[{host}]" if ":" in host else host
    try:
        click.echo(f"console  http://{name}:{serving.port}/login/{desk.login.link}")
        click.echo(f"The link works once, within {LINK_S // 60} minutes. Ctrl-C ends the console; the gateway runs on.", err=True)
        serving.serve_forever()
    except KeyboardInterrupt:
        click.echo("", err=True)
    finally:
        serving.server_close()


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
