"""Make the pages: what each address shows, from one moment of the ledger. An edge: it reads the clock, and the policy when it changes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from flask import Flask, Response, abort, g, make_response, render_template, request, stream_with_context

from gateway_addon.calls.record import METRICS_TYPE
from gateway_addon.console import actions, charts, desk, listing, metrics, ranges
from gateway_addon.console.login import Login
from gateway_addon.ledger import ServerAddress, admin, connect, reservations, state
from gateway_addon.ledger.reports import call_detail, sessions, spending
from gateway_addon.ledger.reports.call_detail import NEWEST, STATES, CallFilter
from gateway_addon.ledger.reports.call_sums import Only
from gateway_addon.ledger.reports.day_reader import DayReader
from gateway_addon.ledger.reports.forecast import forecasts
from gateway_addon.ledger.scope import app_scope, enclosing, part_of, part_scope
from gateway_addon.money import cents, dollars
from gateway_addon.names import PROGRAM
from gateway_addon.operations.reload import files_now
from gateway_addon.policy import GatewayPolicy, PolicyError, load
from gateway_addon.pricing import PriceError
from gateway_addon.refusals import capitalised, in_words
from gateway_addon.windows import per

NEWEST_CALLS = 10
ALERTS_PAGE = 100
SESSIONS_PAGE = 100
WARM_DAYS = 60
SMALLEST_NANO = 50_000
"""From here on an amount is more than nothing with four decimals."""
NAMES_MAX = 50
"""Names that a table or a list to choose from shows: a client can make names of models up without end."""
FORMS = {
    "day": "%-d %b",
    "date": "%Y-%m-%d",
    "clock": "%H:%M:%S",
    "moment": "%-d %b %H:%M:%S",
    "zoned": "%-d %b %H:%M:%S %Z",
    "ends": "%-d %b %H:%M %Z",
    "iso": "%Y-%m-%dT%H:%M:%S%z",
}
"""How templates write times."""


@dataclass(slots=True)
class Policies:
    """The policy on disk, read again when a file has changed; while it is broken, the last good one."""

    folder: Path
    problem: str | None = None
    _seen: object = None
    _policy: GatewayPolicy | None = None

    def __call__(self) -> GatewayPolicy:
        """Return the policy. Raises PolicyError or PriceError where none was ever good."""
        seen = files_now(self.folder)
        if self._policy is None or seen != self._seen:
            try:
                self._policy, self.problem = load(self.folder), None
            except (PolicyError, PriceError) as error:
                if self._policy is None:
                    raise
                self.problem = str(error)
            self._seen = seen
        return self._policy


@dataclass(slots=True)
class Console:
    """All that the pages are made from."""

    ledger: Path | ServerAddress
    policies: Policies
    login: Login
    clock: Callable[[], float] = time.time
    memory: DayReader = field(default_factory=DayReader)
    metrics_token: str | None = field(default=None, repr=False)
    """The bearer token of a scraper; None: there are no metrics."""
    may_write: bool = False
    link_file: Path | None = None
    """The file by which new login links come in."""

    def look(self, asked: Mapping[str, str] | None = None) -> desk.Desk:
        """Return the overview of a range; without one, of this month."""
        with connect.reading(self.ledger) as db:
            return self._look(db, range_of(db, {"range": "month"} if asked is None else asked, self.clock()))

    def _look(self, db: connect.ReadConnection, within: ranges.Range) -> desk.Desk:
        return desk.look(db, self.policies(), self.memory, self.ledger, within, self.clock())

    def warm_up(self) -> None:
        """Sum the days that most pages show, before anybody waits for it."""
        now = self.clock()
        with connect.reading(self.ledger) as db:
            self.memory.between(db, now - WARM_DAYS * 86_400, now, now)


def prepare(app: Flask, *, may_write: bool) -> None:
    """Teach the templates how amounts, counts and times are written."""
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.jinja_env.filters.update(
        zip=zip, cents=_cents, dollars=dollars, percent=lambda share: f"{100 * share:.0f}\u00a0%",
        age=age, words=in_words, capitalised=capitalised, amount=_amount, axis=_axis,
        number=lambda count: f"{count:,}", change=change, path=lambda text: quote(str(text), safe=""),
    )  # fmt: skip
    app.jinja_env.globals.update(
        PROGRAM=PROGRAM, BAR=charts.BAR, WIDTH=charts.WIDTH, HEIGHT=charts.HEIGHT, RANGES=ranges.NAMES, SORTS=listing.SORTS,
        WRITE=may_write, NAMES_MAX=NAMES_MAX, HOURS=actions.HOURS, address_of=address_of, named=actions.named, per=per,
    )


def overview(console: Console) -> Response:
    with connect.reading(console.ledger) as db:
        within = range_of(db, request.args, console.clock())
        return page("overview.html", db, within, desk=console._look(db, within), problem=console.policies.problem)


def app(console: Console, name: str) -> Response:
    now = console.clock()
    with connect.reading(console.ledger) as db:
        within, scope = range_of(db, request.args, now), app_scope(name)
        owner = next((each for each in desk.owners(db, console.policies(), now) if each.scope == scope), None)
        if owner is None and name not in admin.apps(db):
            abort(404)
        sheet = desk.days_of(db, console.memory, within, now).sheet(Only(app=name))
        newest = call_detail.search(db, CallFilter(app=name, since=within.since, until=within.until), most=NEWEST_CALLS)
        return page(
            "app.html", db, within, name=name, owner=owner, sheet=sheet, calls=newest.calls,
            raises=[each for each in admin.raises(db, now=now) if each.scope == scope],
            limits=[each for each in admin.limits(db) if each.scope == scope],
            coming=forecasts(db, owner.standings, now=now) if owner else (),
            tokens={str(each.id): each for each in admin.tokens(db, name)}, now=now,
        )  # fmt: skip


def model(console: Console, name: str) -> Response:
    now = console.clock()
    with connect.reading(console.ledger) as db:
        within = range_of(db, request.args, now)
        sheet = desk.days_of(db, console.memory, within, now).sheet(Only(model=name), stacked="app")
        newest = call_detail.search(db, CallFilter(model=name, since=within.since, until=within.until), most=NEWEST_CALLS)
        row = console.policies().prices.row(name, now)
        return page("model.html", db, within, name=name, sheet=sheet, calls=newest.calls, row=row)


def day(console: Console, text: str) -> Response:
    now = console.clock()
    with connect.reading(console.ledger) as db:
        try:
            on = date.fromisoformat(text)
            within = ranges.of_days(on, on, now, reservations.zone(db))
            to_it = ranges.of_days(on - timedelta(days=6), on, now, reservations.zone(db))
        except (ValueError, OverflowError):
            abort(404)
        sheet = desk.days_of(db, console.memory, within, now).sheet()
        week = desk.days_of(db, console.memory, to_it, now).sheet()
        newest = call_detail.search(db, CallFilter(since=within.since, until=within.until), most=NEWEST_CALLS)
        beside = {"earlier": on - timedelta(days=1), "later": on + timedelta(days=1) if within.until <= now else None}
        return page("day.html", db, within, on=on, sheet=sheet, week=week, calls=newest.calls, **beside)


def live_sessions(console: Console) -> Response:
    """Show the sessions of the last hour, by the calls of that hour."""
    now = console.clock()
    with connect.reading(console.ledger) as db:
        found, since = sessions.lately(db, since=now - sessions.HOUR_S, now=now)
        pauses = {each.scope for each in state.pauses(db, now)}
        number, shown, more = _page_of(found, SESSIONS_PAGE)
        is_paused = [part_scope(each.app, ("session", each.session)) in pauses for each in shown]
        return page(
            "sessions.html", db, range_of(db, request.args, now), found=list(zip(shown, is_paused, strict=True)),
            since=since, is_whole=since == now - sessions.HOUR_S, number=number, more=more,
        )  # fmt: skip


def session(console: Console, name: str, session: str) -> Response:
    """Show one session of an app, its caps and the tree of its agents, by its newest calls or those below a number."""
    now, below = console.clock(), min(request.args.get("below", NEWEST, type=int), NEWEST)
    with connect.reading(console.ledger) as db:
        found = sessions.newest(db, name, session, below=below, now=now)
        if found is None:
            abort(404)
        scope = part_scope(name, ("session", session))
        pause = next((each for each in state.pauses(db, now) if each.scope == scope), None)
        return page(
            "session.html", db, range_of(db, request.args, now), session=found.session, story=found, pause=pause, below=below < NEWEST,
            caps=desk.session_accounts(db, console.policies(), name, session, now),
            raises=[each for each in admin.raises(db, now=now) if each.scope == scope],
            limits=[each for each in admin.limits(db) if each.scope == scope], tree=list(sessions.tree(found.agents)),
            calls=call_detail.some(db, found.calls[:NEWEST_CALLS]),
        )  # fmt: skip


def alerts(console: Console) -> Response:
    with connect.reading(console.ledger) as db:
        within = range_of(db, request.args, console.clock())
        found = spending.alerts(db, since=within.since, until=within.until, most=desk.ALERTS_MAX)[::-1]
        number, shown, more = _page_of(found, ALERTS_PAGE)
        return page("alerts.html", db, within, alerts=shown, number=number, more=more, is_all=len(found) < desk.ALERTS_MAX)


def _page_of[T](found: Sequence[T], size: int) -> tuple[int, Sequence[T], bool]:
    """Return the number of the page of a list that the address asks for, its rows, and whether there are more."""
    number = min(max(1, request.args.get("page", 1, type=int)), 10_000)
    return number, found[(number - 1) * size : number * size], len(found) > number * size


def calls(console: Console) -> Response:
    now = console.clock()
    with connect.reading(console.ledger) as db:
        within = range_of(db, request.args, now)
        days = desk.days_of(db, console.memory, within, now)
        wanted = listing.read(request.args, within)
        wanted = replace(wanted, filter=_where_there_are_calls(wanted.filter, days))
        found = call_detail.search(db, wanted.filter)
        listed = listing.ordered(found.calls, wanted)
        start = (wanted.page - 1) * listing.PAGE
        whole = days.sheet(_chosen(wanted.filter)) if wanted.given.keys() <= {"app", "model"} else None
        lines = [line for day in days.days for line in day.lines]
        return page(
            "calls.html", db, within, calls=listed[start : start + listing.PAGE], wanted=wanted, totals=listing.totals(found.calls),
            whole=whole, more=len(listed) > start + listing.PAGE, rest=found.rest, looked=found.looked,
            is_cut=len(found.calls) >= call_detail.FOUND_MAX, before=request.args.get("before"),
            apps=sorted({*console.policies().apps, *admin.apps(db)}), states=STATES,
            models=sorted({line.key.asked for line in lines if line.calls})[:NAMES_MAX],
            refusals=sorted({line.key.refusal for line in lines if line.refused}),
        )  # fmt: skip


def export(console: Console, form: str) -> Response:
    """Answer all calls that match the filters, read as they are sent."""
    with connect.reading(console.ledger) as db:
        wanted = listing.read(request.args, range_of(db, request.args, console.clock()))

    def rows() -> Iterator[call_detail.CallRow]:
        with connect.reading(console.ledger) as db:
            yield from call_detail.every(db, wanted.filter)

    written, kind = (listing.as_csv, "text/csv") if form == "csv" else (listing.as_json, "application/json")
    answer = Response(stream_with_context(written(rows())), content_type=f"{kind}; charset=utf-8")
    answer.headers["Content-Disposition"] = f"attachment; filename=calls.{form}"
    return answer


def call(console: Console, call_id: int) -> Response:
    now = console.clock()
    with connect.reading(console.ledger) as db:
        told = call_detail.story(db, call_id)
        if told is None:
            abort(404)
        rows = {row.name: row for rows in console.policies().prices.rows.values() for row in rows}
        scale = max([told.call.quote_nano, *(entry.held_after_nano + entry.spent_after_nano for entry in told.entries)])
        bars = [charts.bar(entry.spent_after_nano, entry.held_after_nano, scale) for entry in told.entries]
        return page("call.html", db, range_of(db, request.args, now), call=told.call, story=told, bars=bars, rows=rows)


def exposition(console: Console) -> Response:
    text = metrics.exposition(console.look(), console.policies().prices, policy_broken=console.policies.problem is not None)
    return Response(text, content_type=METRICS_TYPE)


def problem(title: str, sentence: str, status: int) -> Response:
    """Make a page that says what is wrong, with the ways to the other pages where somebody is logged in."""
    at = str if g.get("session") is not None else None
    return make_response(render_template("problem.html", title=title, sentence=sentence, at=at), status)


def page(template: str, db: connect.ReadConnection, within: ranges.Range, **values: Any) -> Response:
    """Make a page about the ledger, with its times in the ledger's zone, like its days."""
    calendar = reservations.zone(db)

    def written(form: str) -> Callable[[float], str]:
        return lambda at: datetime.fromtimestamp(at, calendar).strftime(form)

    def at(path: str, **more: object) -> str:
        """Return an address that keeps the range of this page."""
        asked = within.query | {name: str(value) for name, value in more.items() if value not in (None, "")}
        return f"{path}?{urlencode(asked)}" if asked else path

    times = {name: written(form) for name, form in FORMS.items()}
    zone = datetime.fromtimestamp(within.since, calendar).strftime("%Z")
    return make_response(render_template(template, **times, at=at, within=within, zone=zone, **values))


def range_of(db: connect.ReadConnection, asked: Mapping[str, str], now: float) -> ranges.Range:
    return ranges.read(asked, now, reservations.zone(db))


def _where_there_are_calls(wanted: CallFilter, days: desk.Days) -> CallFilter:
    """Begin the look at the newest day that has calls of this app, model and token: the days' sums tell which ones have none."""
    only = _chosen(wanted)
    for index in reversed(range(len(days.days))):
        each = days.days[index]
        end = days.days[index + 1].start if index + 1 < len(days.days) else wanted.until
        any_token = wanted.token is None or "token_id" in each.folded
        lines = (line.key for line in each.lines if only.takes(line.key))
        if each.start <= wanted.until and any(any_token or key.token_id == wanted.token for key in lines):
            return wanted if end >= wanted.until else replace(wanted, until=float(end), below=0)
    return wanted


def _chosen(wanted: CallFilter) -> Only:
    return Only(wanted.app or None, model=wanted.model or None)


def address_of(scope: str) -> str:
    """Return the page that shows a scope's caps."""
    app, part = enclosing(scope), part_of(scope)
    if part is not None and part[0] == "session" and app.startswith("app:"):
        return f"/sessions/{quote(app.removeprefix('app:'), safe='')}/{quote(part[1], safe='')}"
    return f"/apps/{quote(scope.removeprefix('app:'), safe='')}" if scope.startswith("app:") else "/"


def age(seconds: float) -> str:
    """Return a length of time as people say it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def change(now: int, before: int) -> str:
    """Return by how much an amount is more or less than in the range before."""
    if not before:
        return "nothing in the range before"
    share = (now - before) / before
    if abs(share) < 0.005:
        return "as before"
    return f"{'+' if share > 0 else '−'}{abs(100 * share):.0f}\u00a0%" if share < 10 else f"{now / before:.0f} times as much"


def _cents(nano: int) -> str:
    """Return an amount for a table; one too small for its decimals is not shown as nothing."""
    return "< $0.0001" if 0 < nano < SMALLEST_NANO else cents(nano)


def _amount(value: int, kind: str) -> str:
    if kind == "money":
        return _cents(value)
    return f"{value / 10:g} %" if kind == "share" else f"{value:,}"


def _axis(value: int, kind: str) -> str:
    """Return a figure of a scale: exact, and short."""
    if kind == "money":
        return dollars(value)
    if kind == "share":
        return f"{value / 10:g} %"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return str(value)
