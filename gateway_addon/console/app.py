"""The console's pages: routes, the headers that every answer carries, and the server.

Promises to be read-only (GET alone, on connections that cannot write), to answer nobody without the cookie of its own login, to
answer no other name than this machine's (a web page that points its name here gets nothing), and to load nothing from outside. An
edge: it reads the clock, and the policy files when they change.
"""

import hmac
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Response, abort, make_response, redirect, render_template, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Response as AnyResponse

from gateway_addon.clocks import monotonic_s
from gateway_addon.console import charts, desk, metrics
from gateway_addon.console.login import SESSION_S, Login
from gateway_addon.ledger import LedgerUnavailable, ServerAddress, connect, reservations
from gateway_addon.ledger.reports import call_detail
from gateway_addon.ledger.reports.day_cache import DayCache, ReadConnection
from gateway_addon.ledger.reports.day_cache import apps as apps_of
from gateway_addon.money import cents, dollars
from gateway_addon.names import PROGRAM
from gateway_addon.operations.reload import files_now
from gateway_addon.policy import GatewayPolicy, PolicyError, load
from gateway_addon.pricing import PriceError

COOKIE = "gateway_console"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(slots=True)
class Policies:
    """The policy on disk, read again when a file has changed; while it is broken, the last good one."""

    folder: Path
    problem: str | None = None
    _seen: object = None
    _policy: GatewayPolicy | None = None

    def __call__(self) -> GatewayPolicy:
        """Raises PolicyError or PriceError where no policy was ever good."""
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
    memory: DayCache = field(default_factory=DayCache)
    metrics_token: str | None = field(default=None, repr=False)
    """The bearer token of a scraper; None: there are no metrics."""

    def look(self) -> desk.Desk:
        with connect.reading(self.ledger) as db:
            return desk.look(db, self.policies(), self.memory, self.ledger, self.clock())


def build(console: Console) -> Flask:
    """The console as a WSGI application."""
    app = Flask(__name__)
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.jinja_env.filters.update(zip=zip, cents=cents, dollars=dollars, percent=lambda share: f"{share:.0%}", age=_age)
    app.jinja_env.globals.update(PROGRAM=PROGRAM, BAR=charts.BAR, WIDTH=charts.WIDTH, HEIGHT=charts.HEIGHT)
    app.before_request(lambda: _admit(console))
    app.after_request(_with_headers)
    app.register_error_handler(HTTPException, _say)
    app.register_error_handler(LedgerUnavailable, lambda error: _problem("The ledger is out of reach", str(error), 503))
    app.add_url_rule("/login/<link>", "enter", lambda link: _enter(console, link))
    app.add_url_rule("/", "overview", lambda: _overview(console))
    app.add_url_rule("/gateway/metrics", "metrics", lambda: _metrics(console))
    app.add_url_rule("/calls", "calls", lambda: _calls(console))
    app.add_url_rule(f"/calls/<int(max={call_detail.NEWEST}):call_id>", "call", lambda call_id: _call(console, call_id))
    return app


def _admit(console: Console) -> None:
    if urlsplit(f"//{request.host}").hostname not in ("127.0.0.1", "localhost", "::1"):
        abort(421)
    if request.method not in ("GET", "HEAD"):
        abort(405)
    if request.endpoint == "metrics":
        if console.metrics_token is None:
            abort(403)
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {console.metrics_token}".encode()):
            abort(401)
    elif request.endpoint not in ("enter", "static") and not console.login.knows(request.cookies.get(COOKIE, ""), monotonic_s()):
        abort(401)


def _with_headers(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response


def _enter(console: Console, link: str) -> AnyResponse:
    cookie = console.login.enter(link, monotonic_s())
    if cookie is None:
        abort(401)
    response = redirect("/", 303)
    response.set_cookie(COOKIE, cookie, max_age=SESSION_S, httponly=True, samesite="Strict")
    return response


def _overview(console: Console) -> Response:
    with connect.reading(console.ledger) as db:
        seen = desk.look(db, console.policies(), console.memory, console.ledger, console.clock())
        return _page("overview.html", db, desk=seen, problem=console.policies.problem)


def _metrics(console: Console) -> Response:
    text = metrics.exposition(console.look(), policy_broken=console.policies.problem is not None)
    return Response(text, content_type=metrics.CONTENT_TYPE)


def _calls(console: Console) -> Response:
    asked, now = request.args, console.clock()
    filters = {name: asked.get(name, "") for name in ("app", "model", "state", "text")}
    wanted = call_detail.CallFilter(**filters, before=min(asked.get("before", call_detail.NEWEST, type=int), call_detail.NEWEST))
    with connect.reading(console.ledger) as db:
        found, more = call_detail.search(db, wanted)
        days = console.memory.between(db, now - desk.CHART_DAYS * desk.DAY_S, now)
        return _page(
            "calls.html",
            db,
            calls=found,
            wanted=wanted,
            newest=filters if wanted.before < call_detail.NEWEST else None,
            older=filters | {"before": found[-1].id} if more else None,
            apps=sorted({*console.policies().apps, *apps_of(db)}),
            models=sorted({each.asked for day in days for each in day.spending}),
            states=call_detail.STATES,
        )


def _call(console: Console, call_id: int) -> Response:
    with connect.reading(console.ledger) as db:
        told = call_detail.story(db, call_id)
        if told is None:
            abort(404)
        rows = {row.name: row for rows in console.policies().prices.rows.values() for row in rows}
        scale = max([told.call.quote_nano, *(entry.held_after_nano + entry.spent_after_nano for entry in told.entries)])
        bars = [charts.bar(entry.spent_after_nano, entry.held_after_nano, scale) for entry in told.entries]
        return _page("call.html", db, call=told.call, story=told, bars=bars, rows=rows)


def _say(error: HTTPException) -> Response:
    """A problem as a page of its own, or for a scraper as a line, with the way out."""
    if request.endpoint == "metrics":
        ways_out = {401: "Send the token of --metrics-token as a bearer.", 403: f"Start {PROGRAM} console with --metrics-token FILE."}
        return Response(ways_out.get(error.code or 500, error.description), error.code, content_type="text/plain; charset=utf-8")
    sentences = {
        401: ("Open the link again", f"This page opens by the link that {PROGRAM} console printed. It works once, for ten minutes: "
              "stop the command and start it again for a new one."),
        404: ("Nothing here", "There is no such page, or no call of this number in the ledger."),
        405: ("Only to look at", "The console changes nothing. Use the gateway command to pause, raise or adjust."),
        421: ("Another name", "The console answers only as 127.0.0.1 or localhost. For another machine, forward the port by ssh -L."),
    }  # fmt: skip
    other = ("This did not work", error.description or "The console failed; its terminal says why.")
    title, sentence = sentences.get(error.code or 500, other)
    return _problem(title, sentence, error.code or 500)


def _problem(title: str, sentence: str, status: int) -> Response:
    return make_response(render_template("problem.html", title=title, sentence=sentence), status)


def _page(template: str, db: ReadConnection, **values: Any) -> Response:
    """A page about the ledger, with its times in the ledger's zone, like its days."""
    calendar = reservations.zone(db)

    def written(form: str) -> Callable[[float], str]:
        return lambda at: datetime.fromtimestamp(at, calendar).strftime(form)

    forms = {"day": "%-d %b", "clock": "%H:%M:%S", "moment": "%-d %b %H:%M:%S", "iso": "%Y-%m-%dT%H:%M:%S%z"}
    return make_response(render_template(template, **{name: written(form) for name, form in forms.items()}, **values))


def _age(seconds: float) -> str:
    """A length of time as people say it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing of pages served: the login link is one of their addresses."""


def server(console: Console, listener: socket.socket) -> BaseWSGIServer:
    """A server on a bound socket; `serve_forever` runs it."""
    host, port = listener.getsockname()[:2]
    return make_server(host, port, build(console), threaded=True, request_handler=_Quiet, fd=listener.fileno())
