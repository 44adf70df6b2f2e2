"""Define the options that commands share, with their environment variables, and print errors as sentences."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from gateway_addon.names import PROGRAM, printable
from gateway_addon.operations.places import Places, PlacesUnclear, places
from gateway_addon.refusals import capitalised

FINE, PROBLEM, WRONG_USAGE = 0, 1, 2


def whole_number(least: int, most: int | None = None) -> click.IntRange:
    """Return the type of a number, which its errors call so."""
    kind = click.IntRange(least, most)
    kind.name = "whole number"
    return kind


ROW_NUMBER = whole_number(1, 2**63 - 1)
"""A call's, a token's: what a ledger can count to."""


def default_places() -> Places:
    """Return where policies and ledger lie by default; exit 2 with both paths where two places hold some."""
    try:
        return places()
    except PlacesUnclear as error:
        raise click.UsageError(str(error)) from None


def policies_option[F: Callable[..., Any]](command: F) -> F:
    return click.option(
        "--policies",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="GATEWAY_POLICIES",
        default=lambda: default_places().policies,
        show_default=f"see {PROGRAM} where",
        help="Folder of policy files (GATEWAY_POLICIES).",
    )(command)


def ledger_option[F: Callable[..., Any]](command: F) -> F:
    return click.option(
        "--ledger",
        metavar="URL",
        envvar="GATEWAY_LEDGER",
        default=lambda: f"sqlite:///{default_places().ledger}",
        show_default=f"see {PROGRAM} where",
        help="The ledger, sqlite:///PATH or postgresql://HOST/NAME (GATEWAY_LEDGER).",
    )(command)


def set_option[F: Callable[..., Any]](command: F) -> F:
    return click.option("--set", "options", multiple=True, metavar="K=V", help="An option for mitmproxy.")(command)


def json_option[F: Callable[..., Any]](command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def why_option[F: Callable[..., Any]](command: F) -> F:
    return click.option("--why", default="", help="Kept in the audit trail.")(command)


def listen_option[F: Callable[..., Any]](command: F) -> F:
    return click.option(
        "--listen",
        type=ListenAddress(),
        envvar="GATEWAY_LISTEN",
        default="127.0.0.1:8080",
        show_default=True,
        help="Where apps reach the gateway (GATEWAY_LISTEN).",
    )(command)


class ListenAddress(click.ParamType[tuple[str, int]]):
    """HOST:PORT, PORT or [IPV6]:PORT, as (host, port)."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        host, colon, port = str(value).rpartition(":")
        if not port.isdigit() or int(port) > 65535 or (colon and not host):
            self.fail(f"{value!r} is not an address; write HOST:PORT like 127.0.0.1:8080", param, ctx)
        return host.strip("[]") or "127.0.0.1", int(port)


def says_errors[**P, R](*known: type[Exception]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turn exceptions whose message is a sentence for people into that sentence and exit code 2."""

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return command(*args, **kwargs)
            except known as error:
                stop(str(error))

        return run

    return decorate


def stop(sentence: str, code: int = WRONG_USAGE) -> NoReturn:
    """End the command with a sentence on stderr."""
    click.echo(capitalised(sentence), err=True)
    sys.exit(code)


def status(line: str = "") -> None:
    """Show on a terminal, in one line, how far long work is; an empty text removes the line. Elsewhere do nothing."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{line}", nl=False, err=True)


def record_path(ledger: str) -> Path:
    """Return where the last inventory is kept: beside the ledger's file, or where that would lie by default if the ledger is elsewhere."""
    on_this_machine = ledger.startswith("sqlite:///") or "://" not in ledger
    folder = Path(ledger.removeprefix("sqlite:///")).absolute().parent if on_this_machine else default_places().ledger.parent
    return folder / "inventory.json"


def write_privately(path: Path, text: str) -> None:
    """Write a file whole or not at all, readable by this user alone: an inventory says where every key lies."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise click.UsageError(f"{path} cannot be written: {error.strerror}; choose a folder that you can write to.") from error


def shown_path(path: str) -> str:
    """Return a path as short as it can be typed here; a file's name is not trusted to move the terminal's cursor."""
    below = os.path.relpath(path)
    return printable(path if below.startswith("..") else below)
