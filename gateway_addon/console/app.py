"""The console's addresses: who may ask what, the headers that every answer carries, and the server.

Promises to be read-only (GET alone, on connections that cannot write), to answer nobody without the cookie of its own login, to
answer no other name than this machine's (a web page that points its name here gets nothing), and to load nothing from outside.
"""

import hmac
import socket
from urllib.parse import urlsplit

from flask import Flask, Response, abort, redirect, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Response as AnyResponse

from gateway_addon.clocks import monotonic_s
from gateway_addon.console import pages
from gateway_addon.console.login import SESSION_S
from gateway_addon.console.pages import Console
from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.ledger.reports.call_detail import NEWEST
from gateway_addon.names import PROGRAM

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


def build(console: Console) -> Flask:
    """Return the console as a WSGI application."""
    app = Flask(__name__)
    pages.prepare(app)
    app.before_request(lambda: _admit(console))
    app.after_request(_with_headers)
    app.register_error_handler(HTTPException, _say)
    app.register_error_handler(ValueError, lambda error: pages.problem("That cannot be shown", str(error), 400))
    app.register_error_handler(LedgerUnavailable, lambda error: pages.problem("The ledger is out of reach", str(error), 503))
    app.add_url_rule("/login/<link>", "enter", lambda link: _enter(console, link))
    app.add_url_rule("/gateway/metrics", "metrics", lambda: pages.exposition(console))
    app.add_url_rule("/", "overview", lambda: pages.overview(console))
    app.add_url_rule("/apps/<path:name>", "app", lambda name: pages.app(console, name))
    app.add_url_rule("/models/<path:name>", "model", lambda name: pages.model(console, name))
    app.add_url_rule("/days/<text>", "day", lambda text: pages.day(console, text))
    app.add_url_rule("/alerts", "alerts", lambda: pages.alerts(console))
    app.add_url_rule("/calls", "calls", lambda: pages.calls(console))
    app.add_url_rule("/calls.<any(csv, json):form>", "export", lambda form: pages.export(console, form))
    app.add_url_rule(f"/calls/<int(max={NEWEST}):call_id>", "call", lambda call_id: pages.call(console, call_id))
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
    return pages.problem(title, sentence, error.code or 500)


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing of pages served: the login link is one of their addresses."""


def server(console: Console, listener: socket.socket) -> BaseWSGIServer:
    """A server on a bound socket; `serve_forever` runs it."""
    host, port = listener.getsockname()[:2]
    return make_server(host, port, build(console), threaded=True, request_handler=_Quiet, fd=listener.fileno())
