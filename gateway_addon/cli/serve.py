"""`gateway serve` and `gateway web`."""

import functools
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import click

from gateway_addon.cli.common import ledger_option, listen_option, policies_option, says_errors, set_option, stop, whole_number
from gateway_addon.cli.scopes import must_have_policies
from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.names import PROGRAM
from gateway_addon.operations.tracing import OtelMissing
from gateway_addon.policy import PolicyError, load
from gateway_addon.pricing import PriceError
from gateway_addon.proxy.certificate import TlsUnavailable
from gateway_addon.proxy.lean_import import leave_out_unused_addons
from gateway_addon.proxy.settings import FAST_PATH, Settings
from gateway_addon.proxy.supervisor import bind, cores, is_loopback, supervise
from gateway_addon.upstreams.credentials import SecretUnavailable, conceal

WORKERS_MAX = 4  # by default: the ledger's file takes one writer at a time
NO_KEY = f"{{0}} Put the real Claude API key there, or see everything work without an account: {PROGRAM} demo"
IN_CLEAR = (
    "Listening on {0} would send the apps' tokens across the network in clear. Give the listener a certificate (tls: in "
    "policies/gateway.yaml), listen on 127.0.0.1, or say --insecure-listen if a proxy in front of it does TLS."
)


def _common[F: Callable[..., Any]](command: F) -> F:
    """Give a command the options of every gateway: it gets them as `settings`, and `insecure_listen` beside them."""

    @functools.wraps(command)
    def run(
        listen: tuple[str, int], policies: Path, ledger: str, options: tuple[str, ...], log: str, otel: bool, **own: Any
    ) -> None:
        conceal()
        must_have_policies(policies, ledger)
        command(settings=Settings(*listen, policies, ledger, options, log_json=log == "json", otel=otel), **own)

    for option in (
        set_option,
        click.option("--log", type=click.Choice(("plain", "json")), default="plain", show_default=True, help="json: a line for each call."),
        click.option("--otel", is_flag=True, help="Send a span for each call to OTEL_EXPORTER_OTLP_ENDPOINT."),
        click.option("--insecure-listen", is_flag=True, help="Listen on a network address without TLS."),
        ledger_option,
        policies_option,
        listen_option,
    ):
        run = option(run)
    return cast(F, run)


@click.command(epilog=f"Example: {PROGRAM} serve --listen 127.0.0.1:8080")
@_common
@click.option(
    "--workers", type=whole_number(1, 64), default=lambda: min(cores(), WORKERS_MAX), show_default=f"one per core, up to {WORKERS_MAX}",
    help="Processes on the one port, with one ledger; one that dies is replaced."
)  # fmt: skip
@click.option(
    "--no-fast-path", "slow", type=click.Choice(("all", *FAST_PATH)), multiple=True,
    help="Leave mitmproxy's own way in place of all of the fast path, or of one part: as safe, but slower."
)  # fmt: skip
def serve(settings: Settings, insecure_listen: bool, workers: int, slow: tuple[str, ...]) -> None:
    """Run the gateway: a reverse proxy that admits, caps, meters and records every call to the Claude API."""
    settings = replace(settings, left_out=FAST_PATH if "all" in slow else slow)
    settings, listener = listening(settings, insecure_listen)
    with listener:
        if workers == 1:
            serve_here(settings, listener)
        raise SystemExit(supervise(settings, listener, workers))


@click.command(epilog=f"Example: {PROGRAM} web --web-port 8081")
@_common
@click.option(
    "--web-port", type=whole_number(1, 65535), default=8081, show_default=True, help="Port of mitmweb's page, on this machine only."
)  # fmt: skip
def web(settings: Settings, insecure_listen: bool, web_port: int) -> None:
    """Run the gateway under mitmweb, to look at flows while debugging, edit them and send them again.

    Each flow says whose it is, what it cost and what is left; the view `Claude` shows requests by name and streams as their
    message. It keeps every flow in memory, prompts and answers too: not for production.
    """
    from argon2 import PasswordHasher  # here: no other gateway has a page

    # mitmweb takes argon2 hashes and checks one at each request; a slow one would protect a random password no better.
    fast = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    settings, listener = listening(settings, insecure_listen)
    with listener:
        password = secrets.token_urlsafe(24)
        link = f"http://127.0.0.1:{web_port}/?token={password}"
        serve_here(replace(settings, web_port=web_port, web_password=fast.hash(password), web_link=link), listener)


SAY = says_errors(PolicyError, PriceError, LedgerUnavailable, TlsUnavailable, OtelMissing, ValueError, OSError)


@SAY
def listening(settings: Settings, insecure: bool) -> tuple[Settings, socket.socket]:
    """Open the socket to serve on, where tokens are safe on the way to it; return it with the settings of its address."""
    if not is_loopback(settings.host) and not load(settings.policies).tls and not insecure:
        stop(IN_CLEAR.format(settings.host))
    listener = bind(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    return replace(settings, host=host, port=port), listener


@SAY
def serve_here(settings: Settings, listener: socket.socket) -> NoReturn:
    leave_out_unused_addons()
    from gateway_addon.proxy.server import run  # here: a supervisor need not pay for mitmproxy's start-up

    try:
        raise SystemExit(run(settings, listener))
    except SecretUnavailable as error:
        stop(NO_KEY.format(error))
