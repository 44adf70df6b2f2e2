"""`gateway reconcile`: the ledger beside the provider's own reports."""

import getpass
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import tzinfo
from pathlib import Path

import click

from gateway_addon.cli import times
from gateway_addon.cli.common import FINE, PROBLEM, json_option, ledger_option, policies_option, says_errors, status, stop
from gateway_addon.ledger import LedgerUnavailable, ServerAddress, admin, connect
from gateway_addon.ledger.reports import provider_comparison
from gateway_addon.ledger.reports.provider_comparison import DAY_S, Estimate, Metered
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.money import cents
from gateway_addon.names import PROGRAM
from gateway_addon.operations.reconcile import (
    Correction,
    ReconcileLine,
    Short,
    agreement_percent,
    bypassing,
    compare,
    corrections,
    shorts,
    worth_nano,
    written,
)
from gateway_addon.operations.tables import table
from gateway_addon.policy import GatewayPolicy, PolicyError, load
from gateway_addon.pricing import PriceError
from gateway_addon.upstreams.credentials import SecretUnavailable, WatchedSecret
from gateway_addon.upstreams.egress import egress
from gateway_addon.upstreams.usage_report import AdminApi, Charged, Reported, ReportUnavailable

NO_ADMIN_KEY = (
    "No admin key is named. Write `admin_key: {env: ANTHROPIC_ADMIN_KEY}` (or file, command, keyring) in policies/gateway.yaml. It is "
    "made in the Console by an administrator, reads reports, calls no model, and only this command reads it."
)


@dataclass(frozen=True, slots=True)
class BothSides:
    """Both sides of a period."""

    reported: list[Reported]
    charged: list[Charged]
    metered: list[Metered]
    estimates: list[Estimate]


@click.command(epilog=f"Example: {PROGRAM} reconcile --since 2026-11-01 --adjust")
@click.option("--since", required=True, metavar="DATE", help="The first day, in the gateway's zone (2026-11-01), or how long ago (7d).")
@click.option("--until", metavar="DATE", help="The day to stop before; default: with today.")
@click.option("--workspace", "workspaces", multiple=True, metavar="ID", help="Only this workspace of the organisation (wrkspc_...).")
@click.option("--adjust", is_flag=True, help="Take off estimated calls what the provider's report proves was never spent.")
@json_option
@policies_option
@ledger_option
@says_errors(LedgerUnavailable, PolicyError, PriceError, ReportUnavailable, SecretUnavailable, ValueError)
def reconcile(
    since: str, until: str | None, workspaces: tuple[str, ...], adjust: bool, as_json: bool, policies: Path, ledger: str
) -> None:
    """Hold the ledger against the provider's Usage & Cost reports, by day, model and kind of token.

    Tokens that the provider saw and the gateway did not are from calls that bypass it (exit code 1). The reports are some
    minutes late, so today's lines may still grow; the provider is asked at most once a minute.
    """
    now, policy, path = time.time(), load(policies), ledger_path(ledger)
    with connect.reading(path) as db:
        calendar = zone(db)
    start = _day_start(since, now, calendar, ago=True)
    end = _day_start(until, now, calendar, ago=False) if until else None
    if start >= (end or now):
        stop("The period has no day in it: --since lies before --until, and before now.")
    found = _both_sides(path, policy, start, end, workspaces, now)
    lines = compare(found.reported, found.metered, policy.prices)
    past = bypassing(lines, found.estimates, policy.prices)
    short = shorts(past, found.estimates, policy.prices)
    proved, silent = corrections(found.reported, found.metered, found.estimates, policy.prices, now=now)
    if adjust:
        _write(path, proved, now)
    if as_json:
        click.echo(_document(lines, found, proved, short))
    else:
        alone = {(each.day, each.model) for each in short if each.alone}
        past_it = [line for line in past if (line.day, line.model) not in alone]
        said = [_unseen(lines, past_it, found, policy), *map(_short, short), *_estimated(found.estimates, proved, silent, adjusted=adjust)]
        click.echo(_text(lines, found, said))
    sys.exit(PROBLEM if past else FINE)


def _day_start(text: str, now: float, calendar: tzinfo, *, ago: bool) -> int:
    """Return the first moment of the provider's day, one of UTC, that holds a date's first moment."""
    at = times.since(text, now, calendar) if ago else times.moment(text, now, calendar)
    return int(at) // DAY_S * DAY_S


def _both_sides(
    path: Path | ServerAddress, policy: GatewayPolicy, start: int, end: int | None, workspaces: tuple[str, ...], now: float
) -> BothSides:
    if policy.admin_key is None:
        stop(NO_ADMIN_KEY)
    key = WatchedSecret(policy.admin_key, withheld=policy.secret_variables)()
    _take_turn(path)
    way = egress(policy, os.environ)
    api = AdminApi(policy.upstream, key, lambda pages: status(f"page {pages} of the provider's reports"), way)
    reported, charged = api.usage(start, end, workspaces), api.cost(start, end, workspaces)
    status()
    with connect.reading(path) as db:
        period = {"since": float(start), "until": float(end or now + 1)}
        return BothSides(reported, charged, provider_comparison.metered(db, **period), provider_comparison.estimates(db, **period))


def _take_turn(path: Path | ServerAddress, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait until a minute has passed since any process asked the provider."""
    said = False
    while True:
        with connect.changing(path) as db:
            wait_s = provider_comparison.claim_poll(db, now=time.time())
        if wait_s <= 0:
            return status()
        status(f"The provider takes one poll a minute: {wait_s:.0f} s to go")
        if not said and not sys.stderr.isatty():
            click.echo(f"The provider takes one poll a minute: waiting {wait_s:.0f} s.", err=True)
        said = True
        sleep(min(1.0, wait_s))


def _write(path: Path | ServerAddress, proved: Sequence[Correction], now: float) -> None:
    with connect.changing(path) as db:
        for correction in proved:
            for call_id, delta_nano in correction.deltas:
                admin.adjust(db, call_id, delta_nano, who=getpass.getuser(), why=correction.why, now=now)


def _document(lines: Sequence[ReconcileLine], found: BothSides, proved: Sequence[Correction], short: Sequence[Short]) -> str:
    rows = [asdict(line) | {"day": written(line.day), "unseen": line.unseen} for line in lines]
    pairs = [(line.provider, line.gateway) for line in lines]
    provider_nano, gateway_nano = _money(found)
    return json.dumps(
        {
            "lines": rows,
            "agreement_percent": agreement_percent(pairs),
            "provider_nano": provider_nano,
            "gateway_nano": gateway_nano,
            "corrections": [asdict(each) | {"day": written(each.day)} for each in proved],
            "pace_too_small": [asdict(each) | {"day": written(each.day)} for each in short],
        },
        indent=2,
    )


def _money(found: BothSides) -> tuple[int, int]:
    """Return the provider's charge, and the amount booked: by metered tokens, and by the grants of calls that could not be metered."""
    exact_nano = sum(part.nano for part in found.metered if not part.estimated)
    return sum(each.nano for each in found.charged), exact_nano + sum(each.spent_nano for each in found.estimates)


def _text(lines: Sequence[ReconcileLine], found: BothSides, said: Sequence[str]) -> str:
    if not lines:
        return "Neither the provider nor the gateway saw a call in this period."
    rows = [
        (written(line.day), line.model, line.kind.replace("_", " "), f"{line.provider:,}", f"{line.gateway:,}", _percent([line]))
        for line in lines
    ]
    headings = ("day (UTC)", "model", "kind", "provider", "gateway", "agreement")
    provider_nano, gateway_nano = _money(found)
    parts = [
        table(rows, headings, right=headings[3:]),
        f"Agreement: {_percent(lines)}. The provider charges {cents(provider_nano)}, the gateway booked {cents(gateway_nano)}.",
        *said,
    ]
    return "\n\n".join(parts)


def _short(short: Short) -> str:
    calls = "1 call that broke off" if short.calls == 1 else f"{short.calls} calls that broke off"
    unless = "" if short.alone else "unless calls bypass the gateway, "
    return (
        f"{written(short.day)}: the provider billed {short.output_tokens:,} output tokens of {short.model} more than is booked, on a day "
        f"with {calls}: {unless}its lag_s or output_tokens_per_second_max is too small. Raise them in policies/prices.yaml "
        f"(models: {{{short.model}: {{lag_s: ...}}}}), or let its apps say `reserve: full`."
    )


def _unseen(lines: Sequence[ReconcileLine], past: Sequence[ReconcileLine], found: BothSides, policy: GatewayPolicy) -> str:
    if not past:
        lost = any(line.unseen for line in lines)
        how = "what it did not meter was lost with the answers of calls that it forwarded" if lost else "it knows all that the provider saw"
        return f"Nothing bypassed the gateway: {how}."
    worth = cents(worth_nano(past, policy.prices))
    said = [f"The provider saw what the gateway did not, worth about {worth}: calls that bypass it."]
    said += [f"  {written(line.day)}  {line.model}  {line.unseen:,} {line.kind.replace('_', ' ')}" for line in past]
    said.append("By key, all that was seen in this period (the Console says whose they are):")
    said += [f"  {key_id}  {tokens:,} tokens" for key_id, tokens in _by_key(found.reported)]
    said.append(f"Find who holds a key: {PROGRAM} inventory PATH... --history. Once the real key is rotated, calls with the old one fail.")
    return "\n".join(said)


def _by_key(reported: Sequence[Reported]) -> list[tuple[str, int]]:
    tokens: Counter[str] = Counter()
    for each in reported:
        tokens[each.key_id] += each.counts.tokens
    return tokens.most_common()


def _estimated(estimates: Sequence[Estimate], proved: Sequence[Correction], silent: Sequence[str], *, adjusted: bool) -> list[str]:
    if not estimates:
        return []
    calls = "1 call is" if len(estimates) == 1 else f"{len(estimates)} calls are"
    said = [f"{calls} booked at an upper bound, {cents(sum(each.spent_nano for each in estimates))} together."]
    for each in proved:
        off_nano = -sum(delta for _, delta in each.deltas)
        done = "taken off" if adjusted else "too much (--adjust takes it off)"
        said.append(f"  {written(each.day)}: {cents(off_nano)} {done}; the report leaves at most {cents(each.at_most_nano)} for them")
    return ["\n".join([*said, *(f"  {sentence}" for sentence in silent)])]


def _percent(lines: Sequence[ReconcileLine]) -> str:
    share = agreement_percent((line.provider, line.gateway) for line in lines)
    return "" if share is None else f"{int(share * 100) / 100:.2f} %"
