"""`gateway local [-- COMMAND]`: the intercepting proxy for apps with the API's own address in their code."""

import asyncio
import getpass
import ipaddress
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from gateway_addon.cli.common import ListenAddress, ledger_option, policies_option, says_errors, stop
from gateway_addon.cli.serve import NO_KEY
from gateway_addon.identity import tokens
from gateway_addon.ledger import LedgerUnavailable, admin, connect
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.names import PROGRAM
from gateway_addon.policy import PolicyError, load
from gateway_addon.pricing import PriceError
from gateway_addon.proxy.certificate import TlsUnavailable
from gateway_addon.proxy.intercept import capture_problem, run
from gateway_addon.proxy.settings import Settings
from gateway_addon.proxy.supervisor import ListeningLoop, bind
from gateway_addon.upstreams.credentials import SecretUnavailable, conceal

PORT = 8082
RUN_TOKEN_S = 30 * 86400  # a run's own token ends by itself where the run is killed before it can revoke it
IN_CLEAR = "The proxy listens on this machine alone: credentials travel to it in clear. Choose an address like 127.0.0.1:8082."


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=f"Example: {PROGRAM} local --app reports -- python nightly.py",
)
@click.option("--app", default="", metavar="APP", help="Whose calls they are: the command's, or the captured programs'.")
@click.option("--capture", metavar="PROGRAM", help="Capture a running program's connections, by its name or process id.")
@click.option("--listen", type=ListenAddress(), help=f"Where to listen [default: 127.0.0.1:{PORT}; with a command, a free port].")
@click.option("--allow-none", is_flag=True, help="It is no failure when COMMAND makes no call.")
@click.option("--set", "options", multiple=True, metavar="K=V", help="An option for mitmproxy.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@policies_option
@ledger_option
@says_errors(PolicyError, PriceError, LedgerUnavailable, TlsUnavailable, ValueError, OSError)
def local(
    app: str,
    capture: str | None,
    listen: tuple[str, int] | None,
    allow_none: bool,
    options: tuple[str, ...],
    command: tuple[str, ...],
    policies: Path,
    ledger: str,
) -> None:
    """Judge, cap and meter apps that call the Claude API by its own address, until they are moved.

    Without COMMAND it is a proxy to be named in HTTPS_PROXY, with an app's token as its credentials. With COMMAND it runs that
    program through itself, ends with it and returns its exit code; where no call of it came by, it says so and returns 1 instead of 0.
    """
    conceal()
    host, port = listen or ("127.0.0.1", 0 if command else PORT)
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        stop(IN_CLEAR)
    policy = load(policies)
    if not policy.upstream.startswith("https://"):
        stop(f"The policy's upstream {policy.upstream} is plain http; only calls over https are intercepted.")
    if (command or capture) and app not in policy.apps:
        stop(f"Say whose calls these are by --app, one of: {', '.join(sorted(policy.apps)) or f'none yet ({PROGRAM} init)'}.")
    if capture and (problem := capture_problem()):
        stop(problem)
    with bind(host, port) as listener, _token_of_the_run(app, ledger) as token:
        settings = Settings(host, listener.getsockname()[1], policies, ledger, options, emit=click.echo)
        try:
            with asyncio.Runner(loop_factory=lambda: ListeningLoop(listener)) as runner:
                code = runner.run(run(settings, command, app=app, token=token, capture=capture, allow_none=allow_none))
        except SecretUnavailable as error:
            stop(NO_KEY.format(error))
    raise SystemExit(code)


@contextmanager
def _token_of_the_run(app: str, ledger: str) -> Iterator[str | None]:
    """A token that nobody sees and that is revoked when the run ends; None where no app is named."""
    if not app:
        yield None
        return
    token, who, path = tokens.mint(), getpass.getuser(), ledger_path(ledger)
    with connect.changing(path) as db:
        now = time.time()
        issued = admin.issue_token(
            db, app, tokens.digest(token), label="local run", expires_at=now + RUN_TOKEN_S, who=who, why="gateway local", now=now
        )  # fmt: skip
    try:
        yield token
    finally:
        with connect.changing(path) as db:
            admin.revoke_tokens(db, app, token_id=issued.id, who=who, why="gateway local ended", now=time.time())
