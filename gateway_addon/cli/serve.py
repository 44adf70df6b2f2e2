"""`gateway serve` and `gateway web`."""

import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
from argon2 import PasswordHasher

from gateway_addon.cli.common import ledger_option, listen_option, policies_option, says_errors, stop
from gateway_addon.cli.scopes import must_have_policies
from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.names import PROGRAM
from gateway_addon.operations.tracing import OtelMissing
from gateway_addon.policy import PolicyError, load
from gateway_addon.pricing import PriceError
from gateway_addon.proxy.certificate import TlsUnavailable
from gateway_addon.proxy.settings import FAST_PATH, Settings
from gateway_addon.proxy.supervisor import bind, cores, is_loopback, supervise
from gateway_addon.upstreams.credentials import SecretUnavailable, conceal

WORKERS_MAX = 4  # by default: the ledger's file takes one writer at a time
NO_KEY = f"{{0}} Put the real Claude API key there, or see everything work without an account: {PROGRAM} demo"
IN_CLEAR = (
    "Listening on {0} would send the apps' tokens across the network in clear. Give the listener a certificate (tls: in "
    "policies/gateway.yaml), listen on 127.0.0.1, or say --insecure-listen if a proxy in front of it does TLS."
)


FAST = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
"""mitmweb takes argon2 hashes and checks one at each request; a slow one would protect a random password no better."""


def _common[F: Callable[..., Any]](command: F) -> F:
    for option in (
        click.option("--set", "options", multiple=True, metavar="K=V", help="An option for mitmproxy."),
        click.option("--log", type=click.Choice(("plain", "json")), default="plain", show_default=True, help="json: a line for each call."),
        click.option("--otel", is_flag=True, help="Send a span for each call to OTEL_EXPORTER_OTLP_ENDPOINT."),
        click.option("--insecure-listen", is_flag=True, help="Listen on a network address without TLS."),
        ledger_option,
        policies_option,
        listen_option,
    ):
        command = option(command)
    return command


@click.command(epilog=f"Example: {PROGRAM} serve --listen 127.0.0.1:8080")
@_common
@click.option(
    "--workers", type=click.IntRange(1, 64), default=lambda: min(cores(), WORKERS_MAX), show_default=f"one per core, up to {WORKERS_MAX}",
    help="Processes on the one port, with one ledger; one that dies is replaced."
)  # fmt: skip
@click.option(
    "--no-fast-path", "slow", type=click.Choice(("all", *FAST_PATH)), multiple=True,
    help="Leave mitmproxy's own way in place of all of the fast path, or of one part: as safe, but slower."
)  # fmt: skip
@click.option("--socket-fd", type=int, hidden=True)
@click.option("--parent-fd", type=int, hidden=True)
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--repeats", is_flag=True, hidden=True)
def serve(
    listen: tuple[str, int],
    policies: Path,
    ledger: str,
    insecure_listen: bool,
    options: tuple[str, ...],
    log: str,
    otel: bool,
    workers: int,
    slow: tuple[str, ...],
    socket_fd: int | None,
    parent_fd: int | None,
    ready_fd: int | None,
    repeats: bool,
) -> None:
    """Run the gateway: a reverse proxy that admits, caps, meters and records every call to the Claude API."""
    conceal()
    if socket_fd is None:
        must_have_policies(policies, ledger)
    with _listener(listen, policies, insecure_listen, socket_fd) as listener:
        host, port = listener.getsockname()[:2]
        if workers == 1 or socket_fd is not None:
            left_out = FAST_PATH if "all" in slow else slow
            own = Settings(
                host, port, policies, ledger, options,
                left_out=left_out, log_json=log == "json", otel=otel, parent_fd=parent_fd, ready_fd=ready_fd, repeats=repeats,
            )  # fmt: skip
            _serve(own, listener)
        os.environ["GATEWAY_LEDGER"] = ledger  # not an argument, which everybody on the machine can read: it may hold a password
        arguments = ["--listen", f"{host}:{port}", "--policies", str(policies)]
        arguments += [word for option in options for word in ("--set", option)]
        arguments += [word for part in slow for word in ("--no-fast-path", part)]
        arguments += ["--log", log, *(["--otel"] if otel else []), *(["--insecure-listen"] if insecure_listen else [])]
        raise SystemExit(supervise(arguments, listener, workers))


@click.command(epilog=f"Example: {PROGRAM} web --web-port 8081")
@_common
@click.option(
    "--web-port", type=click.IntRange(1, 65535), default=8081, show_default=True, help="Port of mitmweb's page, on this machine only."
)  # fmt: skip
def web(
    listen: tuple[str, int],
    policies: Path,
    ledger: str,
    insecure_listen: bool,
    options: tuple[str, ...],
    log: str,
    otel: bool,
    web_port: int,
) -> None:
    """Run the gateway under mitmweb, to look at flows while debugging, edit them and send them again.

    Each flow says whose it is, what it cost and what is left; the view `Claude` shows requests by name and streams as their
    message. It keeps every flow in memory, prompts and answers too: not for production.
    """
    conceal()
    must_have_policies(policies, ledger)
    with _listener(listen, policies, insecure_listen, None) as listener:
        password = secrets.token_urlsafe(24)
        click.echo(f"mitmweb  http://127.0.0.1:{web_port}/?token={password}")
        hashed = FAST.hash(password)
        host, port = listener.getsockname()[:2]
        _serve(Settings(host, port, policies, ledger, options, web_port, hashed, log_json=log == "json", otel=otel), listener)


SAY = says_errors(PolicyError, PriceError, LedgerUnavailable, TlsUnavailable, OtelMissing, ValueError, OSError)


@SAY
def _listener(listen: tuple[str, int], policies: Path, insecure: bool, socket_fd: int | None) -> socket.socket:
    """The socket to serve on: the supervisor's, or one of our own where tokens are safe on the way to it."""
    if socket_fd is not None:
        return socket.socket(fileno=socket_fd)
    if not is_loopback(listen[0]) and not load(policies).tls and not insecure:
        stop(IN_CLEAR.format(listen[0]))
    return bind(*listen)


@SAY
def _serve(settings: Settings, listener: socket.socket) -> NoReturn:
    from gateway_addon.proxy.server import run  # here: a supervisor need not pay for mitmproxy's start-up

    try:
        raise SystemExit(run(settings, listener))
    except SecretUnavailable as error:
        stop(NO_KEY.format(error))
