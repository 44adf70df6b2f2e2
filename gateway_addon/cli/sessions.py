"""`gateway sessions [ID]`: the sessions that are at work, and one with the tree of its agents."""

import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import tzinfo
from itertools import batched
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli import times
from gateway_addon.cli.caps import standing_rows
from gateway_addon.cli.common import json_option, ledger_option, policies_option, says_errors
from gateway_addon.cli.scopes import must_know
from gateway_addon.ledger import LedgerUnavailable, app_scope, connect, reservations, state
from gateway_addon.ledger.parts import OTHERS
from gateway_addon.ledger.reports import sessions as found_in
from gateway_addon.ledger.reports.sessions import AgentLine, Session, SessionStory
from gateway_addon.ledger.scope import TOTAL, part_of, part_scope, part_within
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.money import cents, dollars
from gateway_addon.names import PROGRAM, safe_name
from gateway_addon.operations.tables import counted, table
from gateway_addon.policy import Cap, Outline, outline
from gateway_addon.windows import per, shown

HEADINGS = ("session", "app", "user", "agents", "calls", "open", "refused", "spent", "held", "$/h", "cap", "left", "state", "last call")
AGENT_HEADINGS = ("agent", "model", "calls", "refused", "input", "cache read", "cache write", "output", "spent", "held")
CAPS_A_LOOK = 100
"""Caps in one statement."""

type CapRows = Mapping[Session, Sequence[dict[str, Any]]]
"""The rows of each session's caps (caps.standing_rows)."""


@click.command(epilog=f"Example: {PROGRAM} sessions --since 15m")
@click.argument("session", metavar="[ID]", required=False)
@click.option("--since", metavar="WHEN", default="1h", show_default=True, help="Sessions with a call since then: 15m, 2026-12-01.")
@click.option("--app", help="Sessions of this app alone.")
@json_option
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, ValueError)
def sessions(session: str | None, since: str, app: str | None, as_json: bool, policies: Path, ledger: str) -> None:
    """List the sessions at work, each with what it has spent and how fast; of one (ID, or its beginning) show its agents.

    The rate is what the session would spend in an hour at the pace of the last ten minutes.
    """
    now = time.time()
    found, stories = list[Session](), list[SessionStory]()
    with connect.reading(ledger_path(ledger)) as db:
        paused = {each.scope for each in state.pauses(db, now)}
        calendar, wanted = reservations.zone(db), app and must_know(app, db, policies)
        if session is None:
            found = [each for each in found_in.active(db, since=times.since(since, now, calendar), now=now) if wanted in (None, each.app)]
        else:
            stories = [each for each in found_in.one(db, found_in.named(db, session), now=now) if wanted in (None, each.session.app)]
        caps = _caps(db, outline(policies), (*found, *(each.session for each in stories)), now)
    if as_json:
        rows = [_row(each, caps, paused) for each in found]
        rows += [_row(each.session, caps, paused) | {"by_agent": [asdict(line) for line in each.agents]} for each in stories]
        click.echo(json.dumps(rows, indent=2))
    elif session is not None:
        click.echo("\n\n".join(_story(each.session, each.agents, caps, calendar) for each in stories))
    elif not found:
        click.echo(f"No session has called {times.spell(since)}.")
    else:
        cells = [_cells(each, caps, paused, calendar) for each in found]
        right = ("agents", "calls", "open", "refused", "spent", "held", "$/h", "left")
        empty = ("user", "agents", "open", "refused", "held", "cap", "left", "state")
        click.echo(table(cells, HEADINGS, right=right, drop_empty=empty, spare=("user", "refused")))


def _caps(db: connect.ReadConnection, policy: Outline, found: Iterable[Session], now: float) -> CapRows:
    """Return how the sessions stand at their caps, or at those that they share; nothing of apps whose policies cannot be read."""
    scopes = {each: part_scope(each.app, found_in.counted_as(db, each.app, ("session", each.session))) for each in found}
    asked = [Cap(scope, *cap) for scope in dict.fromkeys(scopes.values()) for cap in (policy.caps_of(scope) or {}).items()]
    rows: dict[str, list[dict[str, Any]]] = {}
    for some in batched(asked, CAPS_A_LOOK):
        for row in standing_rows(db, some, now):
            left_nano = max(0, row["in_force_nano"] - row["spent_nano"] - row["held_nano"])
            rows.setdefault(row["scope"], []).append({name: row[name] for name in CAP_FACTS} | {"left_nano": left_nano})
    return {each: rows.get(scope, []) for each, scope in scopes.items()}


CAP_FACTS = ("scope", "window", "policy_nano", "raised_nano", "limit_nano", "in_force_nano", "spent_nano", "held_nano")


def _is_paused(each: Session, paused: Collection[str]) -> bool:
    return any(part_within(scope, ("session", each.session)) in paused for scope in (TOTAL, app_scope(each.app)))


def _row(each: Session, caps: CapRows, paused: Collection[str]) -> dict[str, object]:
    own = caps[each]
    return asdict(each) | {"rate_nano": each.rate_nano, "caps": own, "paused": _is_paused(each, paused)}


def _cap_text(row: Mapping[str, Any]) -> str:
    """Return a cap in force with its window, by how much it is raised or that it is limited, and whether other new names share it."""
    when = "" if row["window"] == "ever" else f" {per(row['window'].partition(':')[0])}"
    shared = ", shared" if (part_of(row["scope"]) or ("", ""))[1] == OTHERS else ""
    is_limited = row["limit_nano"] is not None and row["in_force_nano"] == row["limit_nano"]
    changed = " (limit)" if is_limited else f" (+{dollars(row['raised_nano'])})" if row["raised_nano"] else ""
    return f"{dollars(row['in_force_nano'])}{when}{changed}{shared}"


def _cells(each: Session, caps: CapRows, paused: Collection[str], calendar: tzinfo) -> list[str]:
    own = caps[each]
    cap, left = ", ".join(map(_cap_text, own)), cents(min(row["left_nano"] for row in own)) if own else ""
    counts = [f"{count:,}" if count else "" for count in (each.agents, each.calls, each.open, each.refused)]
    held = cents(each.held_nano) if each.held_nano else ""
    user = safe_name(each.user_id or "")
    return [
        safe_name(each.session), each.app, user if len(user) <= 16 else f"{user[:15]}…", *counts, cents(each.spent_nano), held,
        cents(each.rate_nano), cap, left, "paused" if _is_paused(each, paused) else "", shown(each.last_at, calendar),
    ]  # fmt: skip


def _story(each: Session, lines: Sequence[AgentLine], caps: CapRows, calendar: tzinfo) -> str:
    """Print one session: whose it is, how long it has run, and what each agent did on each model, below the agent that started it."""
    head = [f"session  {safe_name(each.session)}", f"app      {each.app}"]
    if each.user_id:
        head.append(f"user     {safe_name(each.user_id)}")
    head.append(f"from     {shown(each.started_at, calendar)} to {shown(each.last_at, calendar)}")
    rate = f", {cents(each.rate_nano)} an hour at the pace of the last ten minutes" if each.rate_nano else ""
    refused = f", {each.refused:,} refused" if each.refused else ""
    head.append(f"spent    {cents(each.spent_nano)} in {counted(each.calls, 'call')}{refused}{rate}")
    head += [f"cap      {_cap_text(row)}, {cents(row['left_nano'])} left" for row in caps[each]]
    rows = agent_rows(lines)
    empty = ("refused", "cache read", "cache write", "held")
    return "\n".join(head) + "\n\n" + table(rows, AGENT_HEADINGS, right=AGENT_HEADINGS[2:], drop_empty=empty, spare=empty)


def agent_rows(lines: Sequence[AgentLine]) -> list[list[str]]:
    """Return the rows of a table of agents (AGENT_HEADINGS), each below the one that started it."""
    rows = []
    for depth, agent, own in found_in.tree(lines):
        name = f"└{'──' * (depth - 1)} {safe_name(agent)}" if agent is not None else "(main)"
        rows += [[name if number == 0 else "", *_figures(line)] for number, line in enumerate(own)] or [[name]]
    return [row + [""] * (len(AGENT_HEADINGS) - len(row)) for row in rows]


def _figures(line: AgentLine) -> list[str]:
    tokens = (line.input_tokens, line.cache_read_tokens, line.cache_write_tokens, line.output_tokens)
    counts = [f"{count:,}" if count else "" for count in (line.calls, line.refused, *tokens)]
    return [safe_name(line.model), *counts, cents(line.spent_nano), cents(line.held_nano) if line.held_nano else ""]
