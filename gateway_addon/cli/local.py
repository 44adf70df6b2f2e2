"""`gateway local [-- COMMAND]`: the intercepting proxy for apps with the API's own address in their code."""

import asyncio
import ipaddress
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click

from gateway_addon.cli.common import ListenAddress, ledger_option, policies_option, says_errors, set_option, stop
from gateway_addon.cli.run_token import RunToken, token_of_a_run
from gateway_addon.cli.serve import NO_KEY
from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.names import PROGRAM
from gateway_addon.policy import PolicyError, load
from gateway_addon.pricing import PriceError
from gateway_addon.proxy.certificate import TlsUnavailable
from gateway_addon.proxy.lean_import import leave_out_unused_addons
from gateway_addon.proxy.settings import Settings
from gateway_addon.proxy.supervisor import ListeningLoop, bind
from gateway_addon.upstreams.credentials import SecretUnavailable, conceal

PORT = 8082
IN_CLEAR = "The proxy listens on this machine alone: credentials travel to it in clear. Choose an address like 127.0.0.1:8082."


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=f"Example: {PROGRAM} local --app reports -- python nightly.py",
)
@click.option("--app", default="", metavar="APP", help="Whose calls they are: the command's, or the captured programs'.")
@click.option("--capture", metavar="PROGRAM", help="Capture a running program's connections, by its name or process id.")
@click.option("--listen", type=ListenAddress(), help=f"Where to listen [default: 127.0.0.1:{PORT}; with a command, a free port].")
@click.option("--allow-none", is_flag=True, help="It is no failure when COMMAND makes no call.")
@set_option
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
    leave_out_unused_addons()
    from gateway_addon.proxy.intercept import capture_problem, run

    conceal()
    host, port = listen or ("127.0.0.1", 0 if command else PORT)
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        stop(IN_CLEAR)
    policy = load(policies)
    if not policy.upstream.startswith("https://"):
        stop(f"The policy's upstream {policy.upstream} is plain http; only calls over https are intercepted.")
    if command and not app and len(policy.apps) == 1:
        [app] = policy.apps
    if (command or capture) and app not in policy.apps:
        stop(f"Say whose calls these are by --app, one of: {', '.join(sorted(policy.apps)) or f'none yet ({PROGRAM} init)'}.")
    if capture and (problem := capture_problem()):
        stop(problem)
    with bind(host, port) as listener, _token(app, policies, ledger) as token:
        settings = Settings(host, listener.getsockname()[1], policies, ledger, options, emit=click.echo)
        try:
            with asyncio.Runner(loop_factory=lambda: ListeningLoop(listener)) as runner:
                code = runner.run(run(settings, command, app=app, token=token and token.secret, capture=capture, allow_none=allow_none))
        except SecretUnavailable as error:
            stop(NO_KEY.format(error))
    raise SystemExit(code)



def _token(app: str, policies: Path, ledger: str) -> AbstractContextManager[RunToken | None]:
    """Return the run's own token; None where no app is named."""
    return token_of_a_run(app, policies, ledger, name="local run", why="gateway local") if app else nullcontext()
