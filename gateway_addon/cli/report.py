"""`gateway report`: what was spent, by whom, on what."""

import contextlib
import csv
import io
import json
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import cast

import click
from tabulate import tabulate

from gateway_addon import windows
from gateway_addon.cli import times
from gateway_addon.cli.common import ledger_option, policies_option, says_errors
from gateway_addon.ledger import LedgerUnavailable, admin, reservations
from gateway_addon.ledger.reports import daily_totals, spending
from gateway_addon.ledger.reports.spending import By, DriftLine, Notable, Report, ReportLine
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.money import cents, dollars
from gateway_addon.names import safe_name

_HEADINGS = ("calls", "spent", "held", "mean", "cache hits", "out/max", "refused", "change")


@click.command(epilog="Example: gateway report --by model --since 7d")
@click.option("--by", type=click.Choice(spending.GROUPINGS), default="app", show_default=True, help="What a line stands for.")
@click.option("--since", metavar="WHEN", help="A date (2026-12-01, UTC) or a while ago (7d, 12h); default: this calendar month.")
@click.option("--notable", is_flag=True, help="Name the configuration that costs most, and why.")
@click.option("--alerts", is_flag=True, help="List what people were told: thresholds, overruns, other models than asked.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (amounts in nano-dollars).")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV (amounts in nano-dollars).")
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, ValueError)
def report(by: str, since: str | None, notable: bool, alerts: bool, as_json: bool, as_csv: bool, policies: object, ledger: str) -> None:
    """What was spent, by whom, on what: sums of the entries that the caps are judged by.

    A call counts at the time of its admission. The change is against the period of the same length just before.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other.")
    now = time.time()
    path = sqlite_files.ledger_path(ledger)
    with admin.reading(path) as db:
        start = times.since(since, now) if since else windows.starts(now, reservations.zone(db)).month
    if not alerts and not notable:
        with contextlib.suppress(LedgerUnavailable):  # where nothing can be written, every call is read
            daily_totals.keep(path, cast(By, by), since=start, until=now, now=now)
    with admin.reading(path) as db:
        if alerts:
            _show_alerts(spending.alerts(db, since=start, until=now), as_json, as_csv)
        elif notable:
            found = _notable(spending.notable(db, since=start, until=now))
            click.echo(json.dumps(found and asdict(found)) if as_json else _sentences(found, start))
        else:
            drifts = [_named(each) for each in spending.drifts(db, since=start, until=now)] if by == "served" else []
            _show(_report(spending.report(db, cast(By, by), since=start, until=now)), drifts, as_json, as_csv)


# An older gateway kept names as they came: escapes for the terminal, megabytes.


def _report(found: Report) -> Report:
    before = {safe_name(key): spent_nano for key, spent_nano in found.before.items()}
    return replace(found, lines=tuple(replace(line, key=safe_name(line.key)) for line in found.lines), before=before)


def _named(drift: DriftLine) -> DriftLine:
    return replace(drift, asked=safe_name(drift.asked), served=safe_name(drift.served))


def _notable(found: Notable | None) -> Notable | None:
    return found and replace(found, model=safe_name(found.model), line=replace(found.line, key=safe_name(found.line.key)))


def _show(found: Report, drifts: list[DriftLine], as_json: bool, as_csv: bool) -> None:
    if as_json:
        click.echo(json.dumps(_document(found) | ({"drifts": [asdict(each) for each in drifts]} if found.by == "served" else {})))
    elif as_csv:
        click.echo(_csv([_figures(line, found.before) for line in found.lines]), nl=False)
    else:
        click.echo(f"{_utc(found.since)} to {_utc(found.until)}\n\n{_table(found)}")
        if found.refusals:
            click.echo("\nRefused: " + ", ".join(f"{calls:,} {code}" for code, calls in found.refusals))
        if found.observed:
            click.echo("\nLet pass by rules that are only observed: " + ", ".join(f"{calls:,} {code}" for code, calls in found.observed))
        if found.total.upstream_429:
            by_key = ", ".join(f"{line.upstream_429:,} {line.key}" for line in found.lines if line.upstream_429)
            click.echo(f"\nRefused by the provider at the shared key's limits (429): {by_key}")
        if drifts:
            click.echo("\nAnother model answered than the one asked for:")
            click.echo(tabulate([_drift(each) for each in drifts], headers=("app", "asked", "served", "calls", "since", "last")))


def _drift(found: DriftLine) -> tuple[str, ...]:
    return found.app, found.asked, found.served, f"{found.calls:,}", _utc(found.first_at), _utc(found.last_at)


def _table(found: Report) -> str:
    if not found.lines:
        return "No calls in this time. The first one needs a token: gateway token issue APP"
    total, before = found.total, {"total": sum(found.before.values())}
    rows = [*(_cells(line, found.before) for line in found.lines), _cells(total, before)]
    rows.insert(-1, [""] * len(rows[0]))
    return tabulate(rows, headers=(found.by, *_HEADINGS), disable_numparse=True, colalign=("left", *["right"] * len(_HEADINGS)))


def _cells(line: ReportLine, before: dict[str, int]) -> list[str]:
    return [
        line.key,
        f"{line.calls:,}",
        cents(line.spent_nano) + ("*" if line.estimated else ""),
        cents(line.held_nano) if line.held_nano else "",
        "" if line.mean_nano is None else cents(line.mean_nano),
        _percent(line.cache_hit_share),
        _percent(line.output_share),
        f"{line.refused:,}" if line.refused else "",
        _change(line.spent_nano, before.get(line.key, 0)),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _change(spent_nano: int, before_nano: int) -> str:
    if before_nano == 0:
        return "new" if spent_nano else ""
    return f"{(spent_nano - before_nano) / before_nano:+.0%}"


def _figures(line: ReportLine, before: dict[str, int]) -> dict[str, object]:
    shares = {"mean_nano": line.mean_nano, "cache_hit_share": line.cache_hit_share, "output_share": line.output_share}
    return asdict(line) | shares | {"spent_before_nano": before.get(line.key, 0)}


def _document(found: Report) -> dict[str, object]:
    return {
        "by": found.by,
        "since": found.since,
        "until": found.until,
        "lines": [_figures(line, found.before) for line in found.lines],
        "total": _figures(found.total, {"total": sum(found.before.values())}),
        "refusals": dict(found.refusals),
        "observed": dict(found.observed),
    }


def _csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _sentences(found: Notable | None, since: float) -> str:
    """What to look at first, as a person would say it."""
    if found is None:
        return f"Nothing was spent since {_utc(since)}."
    line, rest = found.line, found.rest
    spent_nano = line.spent_nano + rest.spent_nano
    asked = f" with max_tokens {found.asked_tokens:,}" if found.asked_tokens else ""
    text = f"{found.app} on {found.model}{asked} costs most: {dollars(line.spent_nano)} of {dollars(spent_nano)} " + (
        f"({line.spent_nano / spent_nano:.0%}) in {line.calls:,} call{'s' * (line.calls != 1)} since {_utc(since)}."
    )
    return " ".join([text, *_reasons(line, rest)])


def _reasons(line: ReportLine, rest: ReportLine) -> list[str]:
    reasons = []
    if line.mean_nano and rest.mean_nano and line.mean_nano > rest.mean_nano:
        times = line.mean_nano / rest.mean_nano
        reasons.append(f"A call costs {dollars(line.mean_nano)}, {times:.1f} times the mean of all others ({dollars(rest.mean_nano)}).")
    if line.settled and line.cache_hit_share is not None and line.cache_hit_share < 0.1:
        prompt_tokens = line.input_tokens + line.cache_read_tokens + line.cache_write_tokens
        if prompt_tokens >= 2048 * line.settled:  # below it hardly any model caches
            reasons.append(
                f"Its prompts are {prompt_tokens // line.settled:,} tokens on average and {line.cache_hit_share:.0%} come from the cache:"
                " if they begin alike, caching that part cuts its price to a tenth."
            )
    if line.output_tokens and line.output_tokens > line.input_tokens + line.cache_read_tokens + line.cache_write_tokens:
        reasons.append(f"It writes more than it reads: {line.output_tokens // max(1, line.settled):,} output tokens a call.")
    if line.estimated:
        reasons.append(f"{line.estimated:,} of its calls are estimates, booked at what was reserved.")
    return reasons


def _show_alerts(found: list[dict[str, object]], as_json: bool, as_csv: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
    elif as_csv:
        click.echo(_csv(found), nl=False)
    elif not found:
        click.echo("No alerts.")
    else:
        rows = [(_utc(cast(float, each["at"])), each["sentence"], _told(each)) for each in found]
        click.echo(tabulate(rows, headers=("when", "what", "sent"), disable_numparse=True, maxcolwidths=[None, 90, None]))


def _told(alert: dict[str, object]) -> str:
    if alert["delivered_at"] is not None:
        return _utc(cast(float, alert["delivered_at"]))
    if alert["try_at"] is not None:
        return f"not yet ({alert['tries']} tries)"
    return f"failed ({alert['tries']} tries)" if alert["tries"] else "log only"


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
