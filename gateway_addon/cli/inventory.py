"""`gateway inventory PATH...`: who uses the Claude API, before anything is moved."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from gateway_addon.cli.common import json_option, ledger_option, record_path, shown_path, status, write_privately
from gateway_addon.names import PROGRAM
from gateway_addon.onboarding.inventory import Consumer, Inventory, Skip, document, inspect, read, shared_keys
from gateway_addon.onboarding.inventory.tree import REASONS
from gateway_addon.operations.tables import counted, table

BESIDE = "(beside the ledger)"
_PROGRESS_S = 0.2
_EXAMPLES_MAX = 3
_ISSUE = f"{PROGRAM} token issue APP "


@click.command(epilog=f"Example: {PROGRAM} inventory ~ /etc --save")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(exists=True, path_type=Path))
@click.option("--no-ignore", is_flag=True, help="Read what .gitignore names, and installed packages, too.")
@click.option("--history", is_flag=True, help="Read the shell histories under PATH too.")
@click.option(
    "--save",
    metavar="[FILE]",
    is_flag=False,
    flag_value=BESIDE,
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Keep the JSON for `{PROGRAM} cutover` [default: inventory.json, beside the ledger].",
)
@json_option
@ledger_option
def inventory(paths: tuple[Path, ...], no_ignore: bool, history: bool, save: Path | None, as_json: bool, ledger: str) -> None:
    """Find who uses the Claude API: sources, .env files, crontabs, systemd units, CI, compose files, notebooks.

    Keys are shown as fingerprints only; the same key has the same fingerprint everywhere. Nothing is stored unless
    --save says so.
    """
    save = record_path(ledger) if save == Path(BESIDE) else save
    if save and not save.absolute().parent.is_dir():
        raise click.UsageError(f"--save {save}: the folder {save.absolute().parent} does not exist; create it first.")
    found = _search(paths, ignore=not no_ignore, history=history)
    record = json.dumps(document(found, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")), indent=1)
    if save:
        write_privately(save, record + "\n")
    click.echo(record if as_json else _table(found))


def _search(paths: Sequence[Path], *, ignore: bool, history: bool) -> Inventory:
    consumers: list[Consumer] = []
    skipped: list[tuple[str, str]] = []
    files, shown_at = 0, time.monotonic()
    try:
        for item in read(paths, ignore=ignore, history=history):
            if isinstance(item, Skip):
                skipped.append(item)
                continue
            files += 1
            consumers += inspect(item.path, item.data)
            if time.monotonic() - shown_at > _PROGRESS_S:
                shown_at = time.monotonic()
                status(f"{files:,} files, {len(consumers)} consumers")
    except KeyboardInterrupt:
        click.echo(f"\nStopped after {files:,} files; nothing was saved.", err=True)
        raise click.exceptions.Exit(130) from None
    status()
    return Inventory(tuple(str(path.resolve()) for path in paths), tuple(consumers), tuple(skipped), files)


def _table(found: Inventory) -> str:
    parts = []
    if found.consumers:
        rows = [(_place(c), c.kind, ", ".join(c.keys) or _names(c), c.state, c.switch.replace(_ISSUE, "")) for c in found.consumers]
        parts.append(table(rows, ("place", "kind", "key", "state", f"how to switch it: {_ISSUE}...")))
    states = Counter(consumer.state for consumer in found.consumers)
    tally = ", ".join(f"{count} {state}" for state, count in states.most_common()) or "none"
    parts.append(f"{counted(len(found.consumers), 'consumer')} in {counted(found.files, 'file')}: {tally}.")
    for key, holders in shared_keys(found.consumers).items():
        if len(holders) > 1:
            parts.append(f"{key} is shared by {len(holders)}: {', '.join(map(_place, holders))}")
    reasons: dict[str, list[str]] = {}
    for reason, path in found.skipped:
        reasons.setdefault(reason, []).append(path)
    if reasons:
        lines = (f"  {len(paths):,} {REASONS[reason]}: {_examples(paths)}" for reason, paths in reasons.items())
        parts.append("\n".join(("Not read:", *lines)))
    return "\n\n".join(parts)


def _names(consumer: Consumer) -> str:
    return ", ".join(f"${name}" for name in consumer.variables if name != "ANTHROPIC_BASE_URL") or "none in this file"


def _place(consumer: Consumer) -> str:
    return f"{shown_path(consumer.path)}:{consumer.line}"


def _examples(paths: Sequence[str]) -> str:
    return ", ".join(map(shown_path, paths[:_EXAMPLES_MAX])) + (", ..." if len(paths) > _EXAMPLES_MAX else "")
