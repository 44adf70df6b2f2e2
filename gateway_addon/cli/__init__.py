"""The `gateway` command: one module per group of commands, imported only when its command runs."""

import difflib
import errno
import importlib
import os
import signal
import sys
from typing import Any, NoReturn

import click

from gateway_addon import __version__
from gateway_addon.refusals import capitalised

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""The errors of a device that takes no more output."""
INTERRUPTED = 128 + signal.SIGINT  # as a shell says it

COMMANDS = {
    # command: (module, one line for `gateway --help`), in the order in which a newcomer meets them
    "demo": ("demo", "see the whole thing work on this machine, with no account"),
    "init": ("init", "write what is missing of a first policy and an empty ledger"),
    "where": ("where", "where policies, ledger and state live, and why there"),
    "check": ("check", "validate policies and prices, print what is in force"),
    "app": ("app", "the apps: policy, caps, tokens, last calls on one screen"),
    "token": ("token", "issue, rotate, revoke and list the apps' tokens"),
    "cap": ("caps", "list caps, raise or lower one for a while, take it back"),
    "pause": ("pauses", "refuse every further call of an app, of a session or user, or of all"),
    "resume": ("pauses", "end a pause"),
    "adjust": ("pauses", "correct what a call cost"),
    "overrun": ("pauses", "let a model that passed its grant reserve in steps again"),
    "audit": ("audit", "who changed what, and why"),
    "schema": ("schema", "the JSON Schema of policy files, for editors"),
    "serve": ("serve", "run the gateway: a reverse proxy in front of the Claude API"),
    "web": ("serve", "the same under mitmweb, for looking at flows while debugging"),
    "console": ("console", "the operator's desk: spending, caps, live calls, in a browser"),
    "report": ("report", "what was spent, by whom, on what"),
    "invoice": ("invoice", "what to charge each app, customer or user on for a month"),
    "sessions": ("sessions", "the sessions at work: what each has spent, and how fast"),
    "batches": ("batches", "the message batches that are not settled yet"),
    "explain": ("explain", "what would happen to a request, rule by rule"),
    "replay": ("replay", "hold the recorded calls against tomorrow's policy"),
    "meter": ("meter", "read recorded responses, print usage and cost"),
    "prices": ("prices", "the price table in force"),
    "inventory": ("inventory", "find who uses the Claude API, before anything is moved"),
    "run": ("run", "a command with a token and a cap of its own, and its bill at the end"),
    "local": ("local", "an intercepting proxy for apps with the API's address in their code"),
    "cutover": ("cutover", "who has arrived, who is missing: may the real key be rotated?"),
    "reconcile": ("reconcile", "hold the ledger against the provider's own reports: what bypasses the gateway"),
    "backup": ("backup", "copy the ledger while gateways write to it"),
    "restore": ("backup", "put a backup in the ledger's place"),
    "migrate": ("migrate", "move the ledger from its file to a PostgreSQL server"),
    "prune": ("prune", "make daily sums of the calls of long ago"),
    "doctor": ("doctor", "prove the ledger's invariants, the key, the upstream, the clock"),
    "statusline": ("claude_code", "a line for Claude Code's status line: what its app has spent"),
    "docs": ("docs", "the handbook, a chapter at a time"),
    "completion": ("completion", "what a shell needs to complete commands"),
}


FOR_PROGRAMS = ("statusline", "completion")
"""Commands that a program runs, or a shell's profile: the handbook lists them, and the list of commands fits a screen."""


class CommandGroup(click.Group):
    """A group that imports a command's module on first use: `gateway meter` need not pay for mitmproxy's start-up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"gateway_addon.cli.{COMMANDS[name][0]}")
        command: click.Command = getattr(module, name)
        for each in command.commands.values() if isinstance(command, click.Group) else ():
            each.short_help = (each.help or "").partition("\n\n")[0]  # whole: click cuts what it takes itself
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"No such command {args[0]!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            _say(error)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _say(error)
        except OSError as error:
            if error.errno not in FULL:
                raise
            click.echo(f"The output cannot be written: {error.strerror}.", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\nStopped.", err=True)
            ctx.exit(INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items() if name not in FOR_PROGRAMS])


def _say(error: click.UsageError) -> NoReturn:
    """End the command as every other error does: with its sentence first. Below it stands how the command is used.

    Where something is left out, the sentence says what that is, and an example of the command stands last.
    """
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        raise error
    lines = [capitalised(" ".join(error.format_message().split())), *([error.ctx.get_usage()] if error.ctx else [])]
    if isinstance(error, click.MissingParameter) and error.ctx is not None:
        if isinstance(error.param, click.Option) and error.param.help:
            lines[0] = f"{lines[0].removesuffix('.')}: {error.param.help[:1].lower()}{error.param.help[1:]}"
        lines.append(error.ctx.command.epilog or "")
    click.echo("\n".join(lines), err=True)
    sys.exit(error.exit_code)


@click.command(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.help_option("-h", "--help", hidden=True)  # who reads this has found it, and the list of commands is to fit a screen
@click.version_option(__version__, "-V", "--version", prog_name="gateway", hidden=True)
def main() -> None:
    """The control plane for people who run several apps on one Claude API key."""
    _open_standard_files()


def _open_standard_files() -> None:
    """Open what is missing of the three standard files: a worker would get its own in the place of a socket that took their number."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)
