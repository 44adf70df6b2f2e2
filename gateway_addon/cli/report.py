"""`gateway report`: what was spent, by whom, on what."""

import contextlib
import csv
import difflib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import tzinfo
from pathlib import Path
from typing import cast

import click

from gateway_addon import windows
from gateway_addon.cli import times
from gateway_addon.cli.common import json_option, ledger_option, policies_option, says_errors
from gateway_addon.cli.labels import label_option
from gateway_addon.cli.scopes import must_know
from gateway_addon.ledger import LedgerUnavailable, app_scope, connect, reservations
from gateway_addon.ledger.reports import daily_totals, sessions, spending
from gateway_addon.ledger.reports.call_sums import EVERY, REPORTED, Key, Only
from gateway_addon.ledger.reports.forecast import CLOSED_DAYS_MIN, Forecast, forecasts, too_young
from gateway_addon.ledger.reports.spending import DriftLine, Notable, Report, ReportLine
from gateway_addon.ledger.scope import TOTAL
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.ledger.types import Labels
from gateway_addon.money import cents, dollars
from gateway_addon.names import PROGRAM, safe_name
from gateway_addon.operations.changes import scope_of
from gateway_addon.operations.tables import table
from gateway_addon.policy import Outline, outline
from gateway_addon.refusals import capitalised
from gateway_addon.windows import shown

_HEADINGS = ("calls", "spent", "forecast", "held", "mean", "cache hits", "out/max", "refused", "change")
_SPARE = ("out/max", "cache hits", "mean", "change", "refused", "held", "forecast")

type Coming = Mapping[str, Sequence[Forecast]]
"""The forecasts of each line's app in each window, and of all together under "total"; empty for a report that is not of this month."""
CHANGE_MAX = 10
"""Times as much as before: beyond it a percentage says nothing."""


NO_CALLS = f"No calls in this time. The first one needs a token: {PROGRAM} token issue APP"


@click.command(epilog=f"Example: {PROGRAM} report --by model --since 7d")
@click.option(
    "--by",
    metavar="WHAT[,WHAT]",
    default="app",
    show_default=True,
    help=f"What a line stands for, one or two of {', '.join(spending.KEYS)}, label.NAME.",
)
@click.option(
    "--since",
    metavar="WHEN",
    help=f"From here on. {times.WHEN}; default: this month.",
)
@click.option("--until", metavar="WHEN", help="Up to there, said in the same way; default: now.")
@click.option("--last", type=click.Choice(("day", "week", "month")), help="The last one that is over, in place of --since and --until.")
@click.option("--app", help="Calls of this app alone.")
@click.option("--team", help="Calls of this team's apps alone.")
@click.option("--model", help="Calls of this model alone, asked for or served.")
@click.option("--session", metavar="ID", help="Calls of this session alone, by its id or the beginning of it.")
@click.option("--user", metavar="ID", help="Calls for this end user alone.")
@label_option("Calls with this label alone.")
@click.option("--notable", is_flag=True, help="Name the configuration that costs most, and why.")
@click.option("--alerts", is_flag=True, help="List what people were told: thresholds, overruns, other models than asked.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV (amounts in dollars and in nano-dollars).")
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, ValueError)
def report(
    by: str,
    since: str | None,
    until: str | None,
    last: str | None,
    app: str | None,
    team: str | None,
    model: str | None,
    session: str | None,
    user: str | None,
    labels: Labels,
    notable: bool,
    alerts: bool,
    as_json: bool,
    as_csv: bool,
    policies: Path,
    ledger: str,
) -> None:
    """Show the spending, by whom and on what: sums of the entries that the caps are judged by.

    A call counts at the time of its admission. The change is against the period of the same length just before. `cache hits` is the
    share of the prompts' tokens that came from the cache, `out/max` the output's share of the `max_tokens` that were asked for.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other.")
    key, then = _groupings(by)
    now = time.time()
    path = sqlite_files.ledger_path(ledger)
    with connect.reading(path) as db:
        calendar = reservations.zone(db)
        start, end = _period(since, until, last, now, calendar)
        only = Only(
            app and must_know(app, db, policies), team and scope_of(f"team:{team}", db, outline(policies)).removeprefix("team:"), model,
            session and sessions.named(db, session), user, labels,
        )  # fmt: skip
    if (alerts or notable) and only != EVERY:
        raise click.UsageError("--notable and --alerts are about all calls: leave --app and what else chooses calls out.")
    if not alerts and not notable and spending.reads_days(key, then, only):
        with contextlib.suppress(LedgerUnavailable):  # where nothing can be written, every call is read
            daily_totals.keep(path, since=start, until=end, now=now)
    with connect.reading(path) as db:
        if alerts:
            _show_alerts(spending.alerts(db, since=start, until=end), calendar, as_json, as_csv)
        elif notable:
            found = _notable(spending.notable(db, since=start, until=end))
            click.echo(json.dumps(found and _facts(found)) if as_json else _sentences(found, start, calendar))
        else:
            drifts = (
                [_named(each) for each in spending.drifts(db, since=start, until=end)] if key == "served" and only == EVERY else []
            )
            found_report = _report(spending.report(db, key, since=start, until=end, then=then, only=only))
            is_this_month = key == "app" and then is None and not (since or until or last) and only == Only(only.app)
            coming = _coming(db, found_report, app, outline(policies), now) if is_this_month else {}
            none = NO_CALLS if only == EVERY else "No such calls in this time."
            _show(found_report, coming, drifts, calendar, none, as_json, as_csv)


def _groupings(text: str) -> tuple[Key, Key | None]:
    """Parse one grouping or two. Raises ValueError, with the nearest name, for what is none."""
    names = [each.strip() for each in text.split(",")]
    for name in names:
        if not spending.is_key(name):
            near, known = difflib.get_close_matches(name, spending.KEYS, n=1), f"{', '.join(spending.KEYS)}, label.NAME"
            raise ValueError(f"--by {name}: did you mean {near[0]}?" if near else f"--by {name}: known are {known}")
    if len(names) > 2 or len(set(names)) < len(names):
        raise ValueError(f"--by {text}: name one grouping, or two that differ, like app,day")
    return names[0], names[1] if len(names) == 2 else None


def _period(since: str | None, until: str | None, last: str | None, now: float, calendar: tzinfo) -> tuple[float, float]:
    """Return where the period begins and ends. Raises ValueError for one that runs backwards."""
    if last is not None:
        if since or until:
            raise ValueError("--last is a whole period: leave --since and --until out")
        end = windows.starts(now, calendar).of(last)
        return windows.starts(end - 1, calendar).of(last), end
    ends = times.since(until, now, calendar) if until else now
    begins = times.since(since, now, calendar) if since else windows.starts(min(now, ends - 1), calendar).month
    if begins >= ends:
        raise ValueError(f"the period runs backwards: it begins {shown(begins, calendar)} and ends {shown(ends, calendar)}")
    return begins, ends


def _coming(db: connect.ReadConnection, found: Report, app: str | None, policies: Outline, now: float) -> Coming:
    scopes = {line.key: app_scope(line.key) for line in found.lines} | {"total": app_scope(app) if app else TOTAL}
    standings = reservations.standing(db, dict.fromkeys(scopes.values()), policies.windowed, now=now)
    coming = forecasts(db, standings, now=now)
    return {key: [each for each in coming if each.scope == scope] for key, scope in scopes.items()}


def _at_end_nano(key: str, coming: Coming) -> int | None:
    return next((each.at_end_nano for each in coming.get(key, ()) if each.window == "month"), None)


# An older gateway kept names as they came: escapes for the terminal, megabytes.


def _report(found: Report) -> Report:
    before = {_safe(key): spent_nano for key, spent_nano in found.before.items()}
    return replace(found, lines=tuple(line._replace(key=_safe(line.key)) for line in found.lines), before=before)


def _safe(key: str) -> str:
    """Return a key with each of its parts made safe on its own, parted as the report writes it."""
    return " / ".join(safe_name(part) for part in key.split(spending.UNIT))


def _named(drift: DriftLine) -> DriftLine:
    return replace(drift, asked=safe_name(drift.asked), served=safe_name(drift.served))


def _notable(found: Notable | None) -> Notable | None:
    return found and replace(found, model=safe_name(found.model), line=found.line._replace(key=safe_name(found.line.key)))


def _show(
    found: Report, coming: Coming, drifts: list[DriftLine], calendar: tzinfo, none: str, as_json: bool, as_csv: bool
) -> None:  # fmt: skip
    """Print a report; `none` where it has no line."""
    if as_json:
        click.echo(json.dumps(_document(found, coming) | ({"drifts": [asdict(each) for each in drifts]} if found.by == "served" else {})))
    elif as_csv:
        click.echo(csv_text([_with_dollars(_figures(line, found.before, coming)) for line in found.lines]), nl=False)
    else:
        click.echo(f"{shown(found.since, calendar)} to {shown(found.until, calendar)}\n\n{_table(found, coming) if found.lines else none}")
        if found.total.estimated:
            click.echo("\n* An upper bound is booked for calls whose exact cost is not known.")
        if found.lines and coming:
            click.echo("\n" + "\n".join(_forecast_sentences(coming)))
        if found.refusals:
            click.echo("\nRefused: " + ", ".join(f"{calls:,} {code}" for code, calls in found.refusals))
        if found.observed:
            click.echo("\nLet pass by rules that are only observed: " + ", ".join(f"{calls:,} {code}" for code, calls in found.observed))
        if found.total.upstream_429:
            by_key = ", ".join(f"{line.upstream_429:,} {line.key}" for line in found.lines if line.upstream_429)
            click.echo(f"\nRefused by the provider at the shared key's limits (429): {by_key}")
        if drifts:
            click.echo("\nAnother model answered than the one asked for:")
            headings = ("app", "asked", "served", "calls", "since", "last")
            click.echo(table([_drift(each, calendar) for each in drifts], headings, right=("calls",)))


def _forecast_sentences(coming: Coming) -> list[str]:
    """Return what the column of forecasts is, which caps would be reached when, and where there is no forecast."""
    named_once = {(each.scope, each.window): each for found in coming.values() for each in found}.values()
    young = [key for key, found in coming.items() if found[0].closed_days < CLOSED_DAYS_MIN]
    sentences = ["Forecast: for the end of this month, by the usual spending of each weekday."] if len(young) < len(coming) else []
    sentences += [f"{each.sentence}." for each in named_once if each.reached_on is not None and each.window != "day"]
    return sentences + ([too_young(young)] if young else [])


def _drift(found: DriftLine, calendar: tzinfo) -> tuple[str, ...]:
    first, last = shown(found.first_at, calendar), shown(found.last_at, calendar)
    return found.app, found.asked, found.served, f"{found.calls:,}", first, last


def _table(found: Report, coming: Coming) -> str:
    total, before = found.total, {"total": sum(found.before.values())}
    rows = [*(_cells(line, found.before, coming) for line in found.lines), _cells(total, before, coming)]
    if not before["total"] or {found.by, found.then} & {"day", "month"}:
        rows = [[*row[:-1], ""] for row in rows]
    first = found.by if found.then is None else f"{found.by} / {found.then}"
    return table(rows, [first, *_HEADINGS], right=_HEADINGS, drop_empty=("forecast", "change"), spare=_SPARE, has_total=True)


def _cells(line: ReportLine, before: dict[str, int], coming: Coming) -> list[str]:
    at_end_nano = _at_end_nano(line.key, coming)
    return [
        line.key,
        f"{line.calls:,}",
        cents(line.spent_nano) + ("*" if line.estimated else ""),
        "" if at_end_nano is None else cents(at_end_nano),
        cents(line.held_nano) if line.held_nano else "",
        "" if line.mean_nano is None else cents(line.mean_nano),
        _percent(line.cache_share),
        _percent(line.output_share),
        f"{line.refused:,}" if line.refused else "",
        _change(line.spent_nano, before.get(line.key, 0)),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _change(spent_nano: int, before_nano: int) -> str:
    if before_nano == 0:
        return "new" if spent_nano else ""
    if spent_nano > CHANGE_MAX * before_nano:
        return f"over {CHANGE_MAX}x"
    return f"{(spent_nano - before_nano) / before_nano:+.0%}"


def _reported(line: ReportLine) -> dict[str, object]:
    return {name: getattr(line, name) for name in REPORTED}


def _facts(found: Notable) -> dict[str, object]:
    said = {"app": found.app, "model": found.model, "asked_tokens": found.asked_tokens}
    return said | {"line": _reported(found.line), "rest": _reported(found.rest)}


def _figures(line: ReportLine, before: dict[str, int], coming: Coming) -> dict[str, object]:
    shares = {"mean_nano": line.mean_nano, "cache_hit_share": line.cache_share, "output_share": line.output_share}
    later = {"forecast_nano": _at_end_nano(line.key, coming)} if coming else {}
    return _reported(line) | shares | {"spent_before_nano": before.get(line.key, 0)} | later


def _document(found: Report, coming: Coming) -> dict[str, object]:
    return {
        "by": found.by if found.then is None else f"{found.by},{found.then}",
        "since": found.since,
        "until": found.until,
        "lines": [_figures(line, found.before, coming) for line in found.lines],
        "total": _figures(found.total, {"total": sum(found.before.values())}, coming),
        **({"forecasts": {key: [_forecast(each) for each in its] for key, its in coming.items()}} if coming else {}),
        "refusals": dict(found.refusals),
        "observed": dict(found.observed),
    }


def _forecast(found: Forecast) -> dict[str, object]:
    return found._asdict() | {"reached_on": found.reached_on and found.reached_on.isoformat()}


def _with_dollars(figures: dict[str, object]) -> dict[str, object]:
    """Return a row with each amount in dollars, exact, beside its nano-dollars."""
    both: dict[str, object] = {}
    for name, value in figures.items():
        if name.endswith("_nano"):
            nano = cast(int | None, value)
            both[name.replace("_nano", "_dollars")] = None if nano is None else dollars(nano).replace("$", "").replace(",", "")
        both[name] = value
    return both


def csv_text(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _sentences(found: Notable | None, since: float, calendar: tzinfo) -> str:
    """Return the sentences of what needs attention first."""
    if found is None:
        return f"Nothing was spent since {shown(since, calendar)}."
    line, rest = found.line, found.rest
    spent_nano = line.spent_nano + rest.spent_nano
    asked = f" with max_tokens {found.asked_tokens:,}" if found.asked_tokens else ""
    text = f"{found.app} on {found.model}{asked} costs most: {dollars(line.spent_nano)} of {dollars(spent_nano)} " + (
        f"({line.spent_nano / spent_nano:.0%}) in {line.calls:,} call{'s' * (line.calls != 1)} since {shown(since, calendar)}."
    )
    return " ".join([text, *_reasons(line, rest)])


def _reasons(line: ReportLine, rest: ReportLine) -> list[str]:
    reasons = []
    if line.mean_nano and rest.mean_nano and line.mean_nano > rest.mean_nano:
        ratio = line.mean_nano / rest.mean_nano
        reasons.append(f"A call costs {dollars(line.mean_nano)}, {ratio:.1f} times the mean of all others ({dollars(rest.mean_nano)}).")
    long_prompts = line.settled and line.prompt_tokens >= 2048 * line.settled  # below it hardly any model caches
    if long_prompts and line.cache_share is not None and line.cache_share < 0.1:
        reasons.append(
            f"Its prompts are {line.prompt_tokens // line.settled:,} tokens on average and {line.cache_share:.0%} come from the cache:"
            " if they begin alike, caching that part cuts its price to a tenth."
        )
    if line.output_tokens and line.output_tokens > line.prompt_tokens:
        reasons.append(f"It writes more than it reads: {line.output_tokens // max(1, line.settled):,} output tokens a call.")
    if line.estimated:
        reasons.append(f"{line.estimated:,} of its calls are estimates, booked at what was reserved.")
    return reasons


def _show_alerts(found: list[dict[str, object]], calendar: tzinfo, as_json: bool, as_csv: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
    elif as_csv:
        click.echo(csv_text(found), nl=False)
    elif not found:
        click.echo("No alerts.")
    else:
        rows = [(shown(cast(float, each["at"]), calendar), capitalised(str(each["sentence"])), _told(each, calendar)) for each in found]
        click.echo(table(rows, ("when", "what", "sent")))


def _told(alert: dict[str, object], calendar: tzinfo) -> str:
    if alert["delivered_at"] is not None:
        return shown(cast(float, alert["delivered_at"]), calendar)
    if alert["try_at"] is not None:
        return f"not yet ({alert['tries']} tries)"
    return f"failed ({alert['tries']} tries)" if alert["tries"] else "log only"
