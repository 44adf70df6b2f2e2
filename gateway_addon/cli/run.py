"""`gateway run -- COMMAND`: a command with a token and a cap of its own, and its bill at the end."""

import asyncio
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import click

from gateway_addon.cli.common import json_option, ledger_option, listen_option, policies_option, says_errors, stop
from gateway_addon.cli.labels import label_option
from gateway_addon.cli.run_token import RunToken, token_of_a_run
from gateway_addon.cli.sessions import AGENT_HEADINGS, agent_rows
from gateway_addon.cli.times import duration_s
from gateway_addon.http_client import Credential, Unanswered, ask
from gateway_addon.ledger import LedgerUnavailable, connect
from gateway_addon.ledger.reports import sessions
from gateway_addon.ledger.reports.sessions import AgentLine
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.ledger.types import Labels
from gateway_addon.money import cents, dollars, parse_nano
from gateway_addon.names import PROGRAM
from gateway_addon.operations.tables import table
from gateway_addon.policy import GatewayPolicy, PolicyError, load
from gateway_addon.pricing import PriceError
from gateway_addon.proxy.certificate import TlsUnavailable
from gateway_addon.proxy.settings import Settings
from gateway_addon.proxy.supervisor import beside, bind, is_loopback
from gateway_addon.upstreams.credentials import SecretUnavailable, conceal

CUT = 3
"""The exit code of a command that a cap or a pause stopped."""
KNOCK_S = 2.0
RECORDED_WITHIN_S = 0.5  # for a refusal's row, which is written after its caller has the answer
SETTLED_WITHIN_S = 10.0  # for the bill to wait for calls that still run when their command has ended
BASE_URL = ("ANTHROPIC_BASE_URL", "ANTHROPIC_API_BASE")
CREDENTIALS = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
"""The SDKs, and Claude Code in a script, read the first; Claude Code at a terminal asks before it uses that. With both set, all warn."""


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=f"Example: {PROGRAM} run --app reviews --cap 2 --label pr=41 -- claude -p 'Review this branch'",
)
@click.option("--app", default="", metavar="APP", help="Whose calls they are; needed where there are several apps.")
@click.option("--cap", metavar="AMOUNT", help="At most this much for the command, within the caps of its app: 2, '$0.50'.")
@label_option("A label of all its calls: pr=41.")
@click.option("--until", metavar="DURATION", help="Refuse its calls after this time: 30m, 2h.")
@click.option("--local", "through_proxy", is_flag=True, help="Intercept its calls to the API's own address, and set no base URL.")
@json_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND...")
@policies_option
@ledger_option
@listen_option
@says_errors(PolicyError, PriceError, LedgerUnavailable, TlsUnavailable, ValueError, OSError)
def run(
    app: str, cap: str | None, labels: Labels, until: str | None, through_proxy: bool, as_json: bool, command: tuple[str, ...],
    policies: Path, ledger: str, listen: tuple[str, int],
) -> None:  # fmt: skip
    """Run COMMAND with a token of its own, which is revoked when it ends, and print what it spent by agent and model.

    Its environment leads the Anthropic SDKs and Claude Code to the gateway. Where none runs with this ledger, one is started for the
    command. Exits with 3 where a cap or a pause stopped it, else with the command's own code.
    """
    conceal()
    policy = load(policies)
    app = app or (next(iter(policy.apps)) if len(policy.apps) == 1 else "")
    if app not in policy.apps:
        stop(f"Say whose calls these are by --app, one of: {', '.join(sorted(policy.apps)) or f'none yet ({PROGRAM} init)'}.")
    cap_nano, until_s = None if cap is None else parse_nano(cap), None if until is None else duration_s(until)
    held = token_of_a_run(
        app, policies, ledger, name="run", why="gateway run", labels=labels, cap_nano=cap_nano, until_s=until_s
    )  # fmt: skip
    with held as token:
        if through_proxy:
            code = _intercepted(app, token, command, policies, ledger, policy)
        else:
            with _gateway(policy, policies, ledger, listen, token) as base_url:
                code = _ended(command, _environment(os.environ, command[0], base_url, token.secret, policy.secret_variables))
    lines, cut = _settled(token, ledger)
    cut = cut or (code != 0 and time.time() >= token.expires_at)
    click.echo(_bill(app, lines, cap_nano, cut, code, as_json=as_json), err=not as_json)
    raise SystemExit(CUT if cut else code)


@contextmanager
def _gateway(policy: GatewayPolicy, policies: Path, ledger: str, listen: tuple[str, int], token: RunToken) -> Iterator[str]:
    """Yield the address of a gateway that knows the token: the one that runs, or one of our own."""
    host = f"[{listen[0]}]" if ":" in listen[0] else listen[0]
    running = f"{'https' if policy.tls else 'http'}://{host}:{listen[1]}"
    for base_url in (running, *_around()):
        if _knows(base_url, token.secret):
            yield base_url
            time.sleep(RECORDED_WITHIN_S)
            return
    if policy.tls is not None:
        stop(f"No gateway with this ledger answers at {running}, and gateway.yaml names a certificate: start it, or say --local.")
    with tempfile.TemporaryFile() as log, bind("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()[:2]
        try:
            with beside(Settings(host, port, policies, ledger), listener, log):
                yield f"http://{host}:{port}"
        except OSError:
            log.seek(0)
            said = log.read().decode(errors="replace").strip()
            if not said:
                raise
            stop(said)


def _around() -> list[str]:
    """Return the address of the gateway that a run around this one has led here, if there is one on this machine."""
    base_url = os.environ.get(BASE_URL[0], "") if "GATEWAY_TOKEN" in os.environ else ""
    return [base_url] if is_loopback(urlsplit(base_url).hostname or "") else []


def _knows(base_url: str, secret: str) -> bool:
    """Ask the gateway at an address, if there is one, whether it knows a token: then it uses the same ledger."""
    try:
        credential = Credential(base_url, "x-api-key", secret)
        with ask(f"{base_url}/gateway/me", "the gateway", timeout_s=KNOCK_S, credential=credential, inside=True) as answer:
            return answer.status == 200
    except Unanswered:
        return False


def _environment(inherited: Mapping[str, str], program: str, base_url: str, secret: str, hidden: frozenset[str]) -> dict[str, str]:
    """Return the command's environment: led to the gateway by its token, without the operator's secrets, past any proxy on the way."""
    own = {name: value for name, value in inherited.items() if name not in hidden and name not in CREDENTIALS}
    credential = CREDENTIALS[Path(program).name == "claude"]
    own |= dict.fromkeys(BASE_URL, base_url) | {credential: secret, "GATEWAY_TOKEN": secret}
    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in inherited):
        direct = urlsplit(base_url).hostname or ""
        own |= {name: ",".join(filter(None, (inherited.get(name, ""), direct))) for name in ("NO_PROXY", "no_proxy")}
    return own


def _ended(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program to its end; return its exit code. Ctrl-C reaches it by the terminal, and it decides; SIGTERM is passed on."""
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        stop(f"The command {command[0]} cannot be started ({error.strerror}).")
    before = {number: signal.signal(number, handler) for number, handler in (
        (signal.SIGINT, lambda number, frame: None), (signal.SIGTERM, lambda number, frame: process.terminate())
    )}  # fmt: skip
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # killed by a signal: as a shell says it


def _intercepted(app: str, token: RunToken, command: Sequence[str], policies: Path, ledger: str, policy: GatewayPolicy) -> int:
    """Run a program whose calls to the API's own address are intercepted."""
    from gateway_addon.cli.serve import NO_KEY
    from gateway_addon.proxy import intercept  # here: mitmproxy's start is dear, and a gateway that runs needs none
    from gateway_addon.proxy.supervisor import ListeningLoop

    if not policy.upstream.startswith("https://"):
        stop(f"The policy's upstream {policy.upstream} is plain http; only calls over https are intercepted.")
    with bind("127.0.0.1", 0) as listener:
        settings = Settings("127.0.0.1", listener.getsockname()[1], policies, ledger, emit=click.echo)
        try:
            with asyncio.Runner(loop_factory=lambda: ListeningLoop(listener)) as runner:
                return runner.run(intercept.run(settings, command, app=app, token=token.secret, allow_none=True))
        except SecretUnavailable as error:
            stop(NO_KEY.format(error))


def _settled(token: RunToken, ledger: str) -> tuple[list[AgentLine], bool]:
    """Return what the token's calls cost, once those that its command left behind have ended, and whether one was cut."""
    place, deadline = ledger_path(ledger), time.monotonic() + SETTLED_WITHIN_S
    while True:
        with connect.reading(place) as db:
            still_open, cut = sessions.open_and_cut(db, token.id, since=token.issued_at)
            if not still_open or time.monotonic() >= deadline:
                return sessions.agents_of_token(db, token.id, since=token.issued_at, now=time.time()), cut > 0
        time.sleep(0.1)


def _bill(app: str, lines: list[AgentLine], cap_nano: int | None, cut: bool, code: int, *, as_json: bool) -> str:
    spent_nano, calls, refused = (sum(getattr(line, name) for line in lines) for name in ("spent_nano", "calls", "refused"))
    if as_json:
        facts = {"app": app, "calls": calls, "refused": refused, "spent_nano": spent_nano, "cap_nano": cap_nano, "cut": cut, "code": code}
        return json.dumps(facts | {"by_agent": [asdict(line) for line in lines]})
    if not lines:
        return f"{PROGRAM} run: no call came by the gateway, and nothing was spent."
    of = f" of {dollars(cap_nano)}" if cap_nano is not None else ""
    end = "A cap or a pause stopped it." if cut else ""
    total = f"{app}: {cents(spent_nano)}{of} in {calls:,} call{'s' * (calls != 1)}{f', {refused:,} refused' if refused else ''}. {end}"
    empty = ("refused", "cache read", "cache write", "held")
    return f"{table(agent_rows(lines), AGENT_HEADINGS, right=AGENT_HEADINGS[2:], drop_empty=empty, spare=empty)}\n{total.strip()}"
