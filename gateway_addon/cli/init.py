"""`gateway init`: a first policy and an empty ledger, so that the next command works."""

import json
import re
import shlex
import sys
from pathlib import Path

import click

from gateway_addon.cli.common import ledger_option, policies_option, says_errors
from gateway_addon.ledger import LedgerUnavailable, connect
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.money import dollars, parse_nano
from gateway_addon.names import NAME_FORM, PROGRAM
from gateway_addon.operations import deploy
from gateway_addon.operations.places import clone_folder
from gateway_addon.policy import PolicyError, load
from gateway_addon.policy.values import NAME
from gateway_addon.pricing import PriceError

GATEWAY = """\
# What holds for every app behind this gateway. `{program} check` validates these files and prints what is in force;
# a running gateway takes a saved change within a second, and keeps the old policy if the new one is broken.

# Where admitted calls go.
upstream: https://api.anthropic.com

# Where the real API key is read from: {{env: NAME}}, {{file: PATH}} or {{command: [PROGRAM, ARGUMENT]}}. It exists nowhere else.
key: {{{key}}}

# What all apps together may spend, beside each app's own caps.
caps: {{month: {total}}}

# Your workspace's default inference geo. Until you say, calls that name none are held at the dearer price (1.1 times).
workspace_geo: unknown
"""

APP = """\
# What the app `{app}` may ask for. Whatever is not allowed here is refused.
models:
  allow: [claude-haiku-4-5, claude-sonnet-5]

# The largest answer. Many clients ask for the longest that the model can write; `clamp` sends their call with this limit instead (its
# answer says so: x-gateway-edited), `refuse` refuses it. A stream is held piece by piece and keeps the limit that it asked for.
max_tokens: {{limit: 32000, over: clamp}}

# `request` stops the one call that is too large, `day` the loop that runs all night, `month` the slow leak.
caps: {{request: $1, day: {day}, month: {month}}}
"""

TEXTS = {
    # option: the file of operations/deploy that it prints
    "systemd": "gateway.service", "container": "Containerfile", "compose": "compose.yaml", "nginx": "nginx.conf",
    "alert_rules": "alerts.yaml", "dashboard": "dashboard.json",
}  # fmt: skip


@click.command(epilog=f"Example: {PROGRAM} init --yes")
@click.option("--yes", is_flag=True, help="Take the defaults instead of asking.")
@click.option("--app", default=None, metavar="NAME", help="Name of the first app. Without it: asked for, or with --yes: app.")
@click.option("--systemd", is_flag=True, help="Only print a systemd unit that runs this gateway as an unprivileged service.")
@click.option("--container", is_flag=True, help="Only print a Containerfile for the same in a container.")
@click.option("--compose", is_flag=True, help="Only print a compose file: two gateways, PostgreSQL, nginx with TLS.")
@click.option("--nginx", is_flag=True, help="Only print the nginx configuration that goes with it.")
@click.option("--alert-rules", is_flag=True, help="Only print alert rules for a Prometheus that reads /gateway/metrics.")
@click.option("--dashboard", is_flag=True, help="Only print a Grafana dashboard over the same.")
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, PolicyError, PriceError, ValueError, OSError)
def init(yes: bool, app: str | None, policies: Path, ledger: str, **texts: bool) -> None:
    """Write what is missing of a first policy and an empty ledger. Nothing that exists is changed."""
    if asked := [TEXTS[option] for option, wanted in texts.items() if wanted]:
        if len(asked) > 1:
            raise click.UsageError("One text at a time: each is for a file of its own.")
        is_unit = asked == ["gateway.service"]
        click.echo(deploy.unit(str(clone_folder() or sys.prefix), sys.executable) if is_unit else deploy.text(asked[0]), nl=False)
        return
    place, has_gateway = ledger_path(ledger), (policies / "gateway.yaml").exists()
    wants_app = app is not None or not any((policies / "apps").glob("*.yaml"))
    name, month_nano, key = app_name(app or "app"), parse_nano("$20"), _source("env ANTHROPIC_API_KEY")
    if not yes:
        if app is None and wants_app:
            name = click.prompt("What is your first app called?", default=name, value_proc=app_name)
        if wants_app:
            month_nano = click.prompt("What may it spend in a month?", default=dollars(month_nano, 0), value_proc=_amount)
        if not has_gateway:
            where = "Where is the real API key (env NAME, file PATH, or command PROGRAM ARGUMENT...)?"
            key = click.prompt(where, default="env ANTHROPIC_API_KEY", value_proc=_source)
    written = {policies / "gateway.yaml": GATEWAY.format(program=PROGRAM, key=key, total=dollars(2 * month_nano, 0))}
    if wants_app:
        written[policies / "apps" / f"{name}.yaml"] = APP.format(app=name, day=dollars(month_nano // 10, 0), month=dollars(month_nano, 0))
    (policies / "apps").mkdir(parents=True, exist_ok=True)
    for path, text in written.items():
        write_new(path, text)
    if isinstance(place, Path) and place.exists():
        with connect.reading(place, as_it_is=True):
            click.echo(f"kept   {place}")
    else:
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
        connect.create(place, load(policies).timezone)
        click.echo(f"{'wrote' if isinstance(place, Path) else 'ready'}  {place}")
    first = name if wants_app else sorted(load(policies).apps)[0]
    click.echo(f"\nNext: {PROGRAM} token issue {first}   then: {PROGRAM} serve")


def write_new(path: Path, text: str, *, err: bool = False) -> bool:
    """Write a file that is not there yet (`x` makes that certain); returns whether it was not there. Says which, on stderr with `err`."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        click.echo(f"kept   {path}", err=err)
        return False
    click.echo(f"wrote  {path}", err=err)
    return True


# An answer's value. Raises UsageError with a sentence, after which click asks again.


def app_name(text: str) -> str:
    if re.fullmatch(NAME, text) is None:
        raise click.UsageError(f"{text!r} cannot be an app's name; use {NAME_FORM}")
    return text


def _amount(text: str) -> int:
    try:
        return parse_nano(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _source(text: str) -> str:
    """Return `file /run/key` as the key of a policy file, `file: "/run/key"`: any JSON string is a YAML string."""
    kind, _, where = text.strip().partition(" ")
    where = where.strip()
    if kind == "env" and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", where):
        return f"env: {where}"
    if kind == "file" and where:
        return f"file: {json.dumps(where)}"
    if kind == "command" and where:
        return f"command: {json.dumps(shlex.split(where))}"
    raise click.UsageError(f"{text!r} is none of `env NAME`, `file PATH`, `command PROGRAM ARGUMENT...`")
