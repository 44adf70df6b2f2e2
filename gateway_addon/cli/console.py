"""`gateway console`: the operator's desk, on a port of its own."""

import ipaddress
from pathlib import Path

import click

from gateway_addon.cli.common import ListenAddress, ledger_option, policies_option, says_errors, stop
from gateway_addon.clocks import monotonic_s
from gateway_addon.console import links
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

ADDRESS = "127.0.0.1:8090"


@click.command(epilog=f"Example: {PROGRAM} console --listen 127.0.0.1:8090")
@click.option(
    "--listen", type=ListenAddress(), default=ADDRESS, show_default=True, help="Where the page is, on this machine only."
)
@click.option(
    "--metrics-token",
    "token_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Serve /gateway/metrics to requests with this file's text as their bearer token.",
)
@click.option("--write", is_flag=True, help="Show buttons that pause, resume, raise, limit and revoke, each after a confirmation.")
@click.option("--link", "only_link", is_flag=True, help="Print a new login link for the console that runs at --listen.")
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, PolicyError, PriceError, ValueError, OSError)
def console(listen: tuple[str, int], token_file: Path | None, write: bool, only_link: bool, policies: Path, ledger: str) -> None:
    """See spending against caps, live calls, and every call's story, in a browser. Opens by the link that it prints; only reads."""
    host, port = listen
    if host != "localhost" and not _loopback(host):
        stop(NOT_HERE.format(host))
    name = f"[{host}]" if ":" in host else host
    if only_link:
        click.echo(f"console  http://{name}:{port}/login/{links.offer(links.place(sqlite_files.ledger_path(ledger), host, port))}")
        click.echo(_once(f"{name}:{port}"), err=True)
        return
    token = token_file.read_text().strip() if token_file else None
    if token == "":
        stop(f"{token_file} is empty. Put a long random text in it: openssl rand -hex 32 > {token_file}")
    desk = Console(sqlite_files.ledger_path(ledger), Policies(policies), Login(monotonic_s()), metrics_token=token, may_write=write)
    desk.policies()
    desk.warm_up()
    with bind(host, port) as listener:
        serving = server(desk, listener)
    desk.link_file = links.place(desk.ledger, host, serving.port)
    try:
        with links.open_for_links(desk.link_file):
            click.echo(f"console  http://{name}:{serving.port}/login/{desk.login.link}")
            click.echo(f"{_once(f'{name}:{serving.port}')} Ctrl-C ends the console; the gateway runs on.", err=True)
            serving.serve_forever()
    except KeyboardInterrupt:
        click.echo("", err=True)
    finally:
        serving.server_close()


def _once(address: str) -> str:
    where = "" if address == ADDRESS else f" --listen {address}"
    return f"The link works once, within {LINK_S // 60} minutes; {PROGRAM} console --link{where} prints a new one."


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
