"""`gateway doctor`: proves what the gateway rests on. Each check gives lines to show and findings; any finding is exit code 1."""

import json
import sys
import time
from pathlib import Path

import click

from gateway_addon.cli.claude_code import claude_code_check
from gateway_addon.cli.common import PROBLEM, json_option, ledger_option, policies_option, says_errors, status
from gateway_addon.cli.scopes import must_have_policies
from gateway_addon.ledger import LedgerUnavailable, ServerAddress, connect
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.money import dollars
from gateway_addon.names import PROGRAM
from gateway_addon.operations.doctor import Check, check_all, check_disk, check_files


@click.command(epilog=f"Example: {PROGRAM} doctor")
@click.argument("part", required=False, type=click.Choice(["claude-code"]), metavar="[claude-code]")
@click.option("--offline", is_flag=True, help="Send nothing: the key is only read, upstream and clock are not asked.")
@json_option
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, ValueError)
def doctor(part: str | None, offline: bool, as_json: bool, policies: Path, ledger: str) -> None:
    """Prove the ledger's invariants (balances from the entries, parts from the bills, open reservations and who holds them), and
    look at what else a gateway needs: the disk, the policy, the key, the upstream, the clock. Asking the upstream is free.
    With `claude-code`: look at how Claude Code starts in this folder, what that loses, and what leads it past the gateway.

    Exits 1 and names what is wrong.
    """
    if part is not None:
        return _show([claude_code_check()], as_json=as_json)
    must_have_policies(policies, ledger)
    path = sqlite_files.ledger_path(ledger)
    checks = [check_ledger(path, now=time.time())]
    if not isinstance(path, ServerAddress):
        checks += [check_files(path, policies), check_disk(path)]
    status("" if offline else "asking the upstream")
    checks += check_all(policies, offline=offline)
    status()
    _show(checks, as_json=as_json)


def _show(checks: list[Check], *, as_json: bool) -> None:
    """Print the checks; exit 1 where one has a finding."""
    if as_json:
        click.echo(json.dumps([check._asdict() for check in checks]))
    else:
        click.echo("\n".join(_lines(checks)))
    sys.exit(PROBLEM if any(check.findings for check in checks) else 0)


def check_ledger(path: Path | ServerAddress, *, now: float) -> Check:
    """Recompute the ledger from its entries. Raises LedgerUnavailable where it cannot be read."""
    began = time.monotonic()
    with connect.reading(path, lambda: status(f"proving the ledger, {time.monotonic() - began:.0f} s")) as db:
        findings = invariants.findings(db)
        running = [] if findings else invariants.open_calls(db, connect.death_check(path, db), now=now)
        calls, entries = db.execute("SELECT (SELECT count(*) FROM calls), (SELECT count(*) FROM entries)").fetchone()
    seen = [f"{path}: {calls:,} calls, {entries:,} entries"]
    for call in running:
        holder = call.owner if call.alive else f"{call.owner}, which is gone: the next start settles it"
        seen.append(f"call {call.call_id} ({call.app}, {call.model}) holds {dollars(call.held_nano)} for {call.age_s:.0f} s, by {holder}")
    return Check("ledger", seen, findings)


def _lines(checks: list[Check]) -> list[str]:
    lines = []
    for check in checks:
        lines.append(f"{'ok ' if not check.findings else 'BAD'} {check.name}: {check.seen[0]}")
        lines += [f"    {line}" for said in (*check.seen[1:], *check.findings) for line in said.splitlines()]
    return lines
