"""`gateway serve` and `gateway web`."""

import ipaddress
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli.common import ledger_option, listen_option, policies_option, says_errors, stop
from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.policy import PolicyError, load
from gateway_addon.pricing import PriceError
from gateway_addon.secret import SecretUnavailable
from gateway_addon.serve import Settings, port_problem, run

NO_KEY = "{0} Put the real Claude API key there, or see everything work without an account: gateway demo"
IN_CLEAR = (
    "Listening on {0} would send the apps' tokens across the network in clear. Give the listener a certificate (tls: in "
    "policies/gateway.yaml), listen on 127.0.0.1, or say --insecure-listen if a proxy in front of it does TLS."
)


def _common[F: Callable[..., Any]](command: F) -> F:
    for option in (
        click.option("--set", "options", multiple=True, metavar="K=V", help="An option for mitmproxy."),
        click.option("--insecure-listen", is_flag=True, help="Listen on a network address without TLS."),
        ledger_option,
        policies_option,
        listen_option,
    ):
        command = option(command)
    return command


@click.command(epilog="Example: gateway serve --listen 127.0.0.1:8080")
@_common
def serve(listen: tuple[str, int], policies: Path, ledger: str, insecure_listen: bool, options: tuple[str, ...]) -> None:
    """Run the gateway: a reverse proxy that admits, caps, meters and records every call to the Claude API."""
    _serve(Settings(*listen, policies, ledger, options), insecure_listen)


@click.command(epilog="Example: gateway web --web-port 8081")
@_common
@click.option("--web-port", type=int, default=8081, show_default=True, help="Port of mitmweb's page, on this machine only.")
def web(
    listen: tuple[str, int], policies: Path, ledger: str, insecure_listen: bool, options: tuple[str, ...], web_port: int
) -> None:
    """Run the gateway under mitmweb, to look at flows while debugging. It keeps every flow in memory: not for production."""
    password = secrets.token_urlsafe(24)
    click.echo(f"mitmweb  http://127.0.0.1:{web_port}/?token={password}")
    _serve(Settings(*listen, policies, ledger, options, web_port, password), insecure_listen)


@says_errors(PolicyError, PriceError, LedgerUnavailable, ValueError)
def _serve(settings: Settings, insecure_listen: bool) -> None:
    policy = load(settings.policies)
    if not _loopback(settings.host) and not policy.tls and not insecure_listen:
        stop(IN_CLEAR.format(settings.host))
    if settings.port and (problem := port_problem(settings.host, settings.port)):
        stop(problem)
    try:
        raise SystemExit(run(settings))
    except SecretUnavailable as error:
        stop(NO_KEY.format(error))


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
