"""`gateway cutover`: who has arrived, who is missing, and whether the real key may be rotated now."""

import getpass
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli.common import (
    FINE,
    PROBLEM,
    json_option,
    ledger_option,
    policies_option,
    record_path,
    says_errors,
    shown_path,
    status,
    stop,
    write_privately,
)
from gateway_addon.cli.times import duration_s, shown_or_never
from gateway_addon.clocks import monotonic_s
from gateway_addon.ledger import LedgerUnavailable, ServerAddress, connect
from gateway_addon.ledger.reports import token_usage
from gateway_addon.ledger.reports.token_usage import Arrival, Straggler
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.names import PROGRAM, argument
from gateway_addon.onboarding.cutover import FileToday, OpenReason, is_in, tally, unaccounted, unseen
from gateway_addon.onboarding.inventory import inspect
from gateway_addon.operations.tables import table
from gateway_addon.policy import PolicyError, Source, load
from gateway_addon.pricing import PriceError
from gateway_addon.windows import shown

NO_RECORD = f"There is no inventory at {{0}}. Make one of every place where apps live: {PROGRAM} inventory PATH... --save {{1}}"
ACCEPT = f"What you know to be switched elsewhere, a file or a whole folder: {PROGRAM} cutover --accept PATH"
TAKES_EFFECT = {
    "file": "it is read again at once, without a restart",
    "env": "then restart the gateway: a process keeps its environment",
    "command": "it is asked again within five minutes, so let both keys be in force for as long",
    "keyring": "it is asked again within five minutes, so let both keys be in force for as long",
}
WATCH_EVERY_S = 1.0


@click.command(epilog=f"Example: {PROGRAM} cutover; then, while the key is rotated: {PROGRAM} cutover --watch 10m")
@click.option(
    "--inventory",
    "record",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The inventory [default: inventory.json, beside the ledger].",
)
@click.option("--accept", multiple=True, metavar="PATH", help="Count this file, or all in this folder, as accounted for; remembered.")
@click.option("--watch", metavar="DURATION", help="Afterwards: say for this long (10m) whether the provider takes the new key.")
@json_option
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, PolicyError, PriceError, ValueError, OSError)
def cutover(record: Path | None, accept: tuple[str, ...], watch: str | None, as_json: bool, policies: Path, ledger: str) -> None:
    """Say whether every app has arrived, so that the real key may be rotated: exit code 0 for safe, 1 for not yet.

    An app has arrived when its token has called. A consumer of the inventory is accounted for when its file, read again now, is
    switched or gone, or when you say so by --accept.
    """
    path, now = ledger_path(ledger), time.time()
    if watch is not None:
        sys.exit(_watch(path, duration_s(watch)))
    known, key = _record(record or record_path(ledger), accept), load(policies).key
    with connect.reading(path) as db:
        tokens, coming, calendar = token_usage.arrivals(db, now=now), token_usage.stragglers(db), zone(db)
    files = [_as_it_is(each) for each in dict.fromkeys(consumer["path"] for consumer in known["consumers"])]
    reasons = unseen(tokens) + unaccounted(files, tokens, [each["path"] for each in known.get("accepted", ())])
    if not any(token.calls > token.refused for token in tokens):
        reasons.insert(0, OpenReason("the gateway", "has passed no call yet", f"{PROGRAM} token issue APP, and repoint the first app"))
    if as_json:
        document = {"safe": not reasons, "reasons": [asdict(each) for each in reasons], "stragglers": [asdict(each) for each in coming]}
        click.echo(json.dumps({**document, "tokens": [asdict(token) for token in tokens]}, indent=2))
    else:
        click.echo("\n\n".join([_table(tokens, calendar), _consumers(known["made_at"], files, coming, calendar), _verdict(reasons, key)]))
    sys.exit(PROBLEM if reasons else FINE)


def _record(path: Path, accept: Sequence[str]) -> dict[str, Any]:
    """Return the saved inventory; sightings that are accepted now are written into it."""
    try:
        known = json.loads(path.read_text())
        if "gateway_inventory" not in known:
            raise ValueError
    except FileNotFoundError:
        stop(NO_RECORD.format(path, argument(path)))
    except (ValueError, TypeError):
        stop(f"{path} is no inventory. Make one: {PROGRAM} inventory PATH... --save {argument(path)}")
    if accept:
        paths = [str(Path(each).resolve()) for each in accept]
        for each in paths:
            if not any(is_in(consumer["path"], each) for consumer in known["consumers"]):
                stop(f"The inventory has no consumer at {shown_path(each)}, so there is nothing to accept.")
        by = {"who": getpass.getuser(), "at": shown(time.time(), UTC)}
        known["accepted"] = [*known.get("accepted", ()), *({"path": each, **by} for each in paths)]
        write_privately(path, json.dumps(known, indent=1) + "\n")
    return dict(known)


def _as_it_is(path: str) -> FileToday:
    try:
        return FileToday(path, inspect(path, Path(path).read_bytes()))
    except FileNotFoundError:
        return FileToday(path)
    except OSError as error:
        return FileToday(path, problem=f"cannot be read now ({error.strerror})")


def _table(tokens: Sequence[Arrival], calendar: tzinfo) -> str:
    rows = [
        (
            token.app, f"{token.token_id} {token.label}".strip(), f"{token.calls:,}",
            shown_or_never(token.first_at, calendar), shown_or_never(token.last_at, calendar),
        )
        for token in tokens
        if token.state == "in force"
    ]
    if not rows:
        return f"No token is in force: {PROGRAM} token issue APP"
    return table(rows, ("app", "token", "calls", "first seen", "last seen"), right=("calls",))


def _consumers(made_at: str, files: Sequence[FileToday], coming: Sequence[Straggler], calendar: tzinfo) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in tally(files).items()) or "none"
    lines = [f"Consumers of the inventory of {shown(datetime.fromisoformat(made_at).timestamp(), calendar)}, as they are now: {counts}."]
    for each in coming:
        last = shown(each.last_at, calendar)
        lines.append(f"App {each.app} comes through {PROGRAM} local (last {last}): change its code, and it needs no proxy.")
    return "\n".join(lines)


def _verdict(reasons: Sequence[OpenReason], key: Source) -> str:
    if reasons:
        lines = [f"  {_subject(each)} {each.problem}\n      {each.way_out}" for each in reasons]
        return "\n".join(["Not yet. Rotating the real key now would break, or leave unknown:", *lines, ACCEPT])
    return "\n".join(
        [
            "Safe to rotate the real key: every token in force has called, every consumer of the inventory is accounted for.",
            f"  1. Make a new key in the Console and put it where the gateway reads it ({key.kind} {_where(key)});",
            f"     {TAKES_EFFECT[key.kind]}.",
            f"  2. {PROGRAM} cutover --watch 10m says whether the provider takes it.",
            "  3. Disable the old key: an app that was missed then fails, and shows itself. "
            f"{PROGRAM} reconcile --since DATE shows which still bypassed.",
        ]
    )


def _where(key: Source) -> str:
    return key.value[0] if isinstance(key.value, tuple) else str(key.value)


def _subject(reason: OpenReason) -> str:
    return shown_path(reason.subject) if reason.subject.startswith("/") else reason.subject


def _watch(path: Path | ServerAddress, for_s: float) -> int:
    """Say when the provider refuses the key, and at the end how it went."""
    started, ends_monotonic_s = time.time(), monotonic_s() + for_s
    told = 0
    while True:
        with connect.reading(path) as db:
            seen, calendar = token_usage.passed(db, since=started), zone(db)
        if seen.unauthorised > told and seen.last_unauthorised_at is not None:
            told = seen.unauthorised
            at = shown(seen.last_unauthorised_at, calendar)
            click.echo(f"{at} the provider answered 401 ({told} times since the watch began): is the new key in place?")
        if monotonic_s() >= ends_monotonic_s:
            break
        status(f"{seen.calls:,} calls, {seen.unauthorised} refused")
        time.sleep(min(WATCH_EVERY_S, for_s))
    status()
    if not seen.calls:
        click.echo("No call passed while watching, so the new key is not proved. Make one, or watch longer.")
        return PROBLEM
    calls = "1 call" if seen.calls == 1 else f"{seen.calls:,} calls"
    click.echo(f"{calls} passed, the provider refused the key {seen.unauthorised} times.")
    return PROBLEM if seen.unauthorised else FINE
