"""The console's addresses: who may ask what, the headers that every answer carries, and the server.

Promises to answer nobody without the cookie of its own login, to answer no other name than this machine's (a web page that points its
name here gets nothing), and to load nothing from outside. No GET changes anything, and it reads on connections that cannot write. Only a
console that may write takes a POST, at one address, from a page of its own, for a change that it has shown, once, so many a minute.
"""

import getpass
import hmac
import socket
from urllib.parse import urlsplit

from flask import Flask, Response, abort, g, redirect, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Response as AnyResponse

from gateway_addon.clocks import monotonic_s
from gateway_addon.console import actions, links, pages
from gateway_addon.console.login import SESSION_S, ask, confirmed
from gateway_addon.console.pages import Console
from gateway_addon.ledger import LedgerUnavailable, connect
from gateway_addon.ledger.reports.call_detail import NEWEST
from gateway_addon.names import PROGRAM
from gateway_addon.refusals import capitalised

COOKIE = "gateway_console"
BODY_MAX = 4096
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",  # with none at all, a browser hides the origin of its own forms
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def build(console: Console) -> Flask:
    """Return the console as a WSGI application."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = BODY_MAX
    pages.prepare(app, may_write=console.may_write)
    app.before_request(lambda: _admit(console))
    app.after_request(_with_headers)
    app.register_error_handler(HTTPException, _say)
    app.register_error_handler(ValueError, lambda error: pages.problem(f"That cannot be {_wanted()}", capitalised(str(error)), 400))
    app.register_error_handler(LedgerUnavailable, lambda error: pages.problem("The ledger is out of reach", str(error), 503))
    app.add_url_rule("/login/<link>", "enter", lambda link: _enter(console, link))
    app.add_url_rule("/gateway/metrics", "metrics", lambda: pages.exposition(console))
    app.add_url_rule("/", "overview", lambda: pages.overview(console))
    app.add_url_rule("/apps/<path:name>", "app", lambda name: pages.app(console, name))
    app.add_url_rule("/models/<path:name>", "model", lambda name: pages.model(console, name))
    app.add_url_rule("/days/<text>", "day", lambda text: pages.day(console, text))
    app.add_url_rule("/sessions", "sessions", lambda: pages.live_sessions(console))
    app.add_url_rule("/sessions/<name>/<path:session>", "session", lambda name, session: pages.session(console, name, session))
    app.add_url_rule("/alerts", "alerts", lambda: pages.alerts(console))
    app.add_url_rule("/change/<action>", "change", lambda action: _show_change(console, action))
    app.add_url_rule("/change", "confirm", lambda: _do_change(console), methods=["POST"])
    app.add_url_rule("/calls", "calls", lambda: pages.calls(console))
    app.add_url_rule("/calls.<any(csv, json):form>", "export", lambda form: pages.export(console, form))
    app.add_url_rule(f"/calls/<int(max={NEWEST}):call_id>", "call", lambda call_id: pages.call(console, call_id))
    return app


def _admit(console: Console) -> None:
    if urlsplit(f"//{request.host}").hostname not in ("127.0.0.1", "localhost", "::1"):
        abort(421)
    is_change = console.may_write and (request.method, request.endpoint) == ("POST", "confirm")
    if request.method not in ("GET", "HEAD") and not is_change:
        abort(405)
    if request.endpoint == "metrics":
        if console.metrics_token is None:
            abort(403)
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {console.metrics_token}".encode()):
            abort(401)
    elif request.endpoint not in ("enter", "static"):
        g.session = console.login.session(request.cookies.get(COOKIE, ""), monotonic_s())
        if g.session is None:
            abort(401)
    if request.endpoint == "confirm":
        _must_come_from_here(console)


def _wanted() -> str:
    return "changed" if request.endpoint == "change" else "shown"


def _must_come_from_here(console: Console) -> None:
    """End a change that another page has sent. The cookie alone tells nothing: to it, every port of this machine is the same site."""
    if request.headers.get("Origin") != f"http://{request.host}" or request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
        abort(403)
    if console.login.changes.too_many(monotonic_s()):
        abort(429)


def _with_headers(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response


def _enter(console: Console, link: str) -> AnyResponse:
    if request.method == "HEAD":  # a preview: the link is for the person who opens it
        abort(405)
    with console.login.one_by_one:
        offered = "" if console.link_file is None else links.offered(console.link_file, console.clock())
        cookie = console.login.enter(link, monotonic_s(), offered)
        if cookie is not None and offered and console.link_file is not None:
            links.taken(console.link_file)
    if cookie is None:
        abort(429 if console.login.wrong.too_many(monotonic_s()) else 401)
    response = redirect("/", 303)
    response.set_cookie(COOKIE, cookie, max_age=SESSION_S, httponly=True, samesite="Strict")
    return response


def _show_change(console: Console, action: str) -> Response:
    if not console.may_write:
        abort(405)
    with connect.reading(console.ledger) as db:
        change = actions.prepare(actions.ChangeForm(action, request.args), db, console.policies.folder, console.clock())
        word = ask(g.session, change, monotonic_s())
        return pages.page("change.html", db, pages.range_of(db, {}, console.clock()), change=change, word=word)


def _do_change(console: Console) -> AnyResponse:
    change = confirmed(g.session, request.form.get("word", ""), monotonic_s())
    if change is None:
        sentence = "This was done already, or asked for more than ten minutes ago. Go back and ask again."
        return pages.problem("Nothing was changed", sentence, 409)
    try:
        actions.run(console.ledger, change, f"{getpass.getuser()} (console)", console.clock())
    except ValueError as error:
        return pages.problem("Nothing was changed", str(error), 409)
    return redirect(pages.address_of(change.back), 303)


def _say(error: HTTPException) -> Response:
    """Return a problem, with the way out, as a page of its own, or for a scraper as a line."""
    if request.endpoint == "metrics":
        ways_out = {401: "Send the token of --metrics-token as a bearer.", 403: f"Start {PROGRAM} console with --metrics-token FILE."}
        return Response(ways_out.get(error.code or 500, error.description), error.code, content_type="text/plain; charset=utf-8")
    sentences = {
        401: ("Open it by its link", f"You are not logged in, or no longer. The link that {PROGRAM} console printed works once, "
              f"within ten minutes. For a new one, run {PROGRAM} console --link."),
        403: ("Not from there", "This console takes a change from its own pages alone. Nothing was changed."),
        429: ("Too many tries in a minute", "Wait a minute, then try again. Nothing was changed."),
        404: ("Nothing here", "There is no such page, or the ledger has no such app, session or call."),
        405: ("This console only reads", f"Nothing was changed. Use the command, or start the console as {PROGRAM} console --write."),
        421: ("Another name", "The console answers only as 127.0.0.1 or localhost. For another machine, forward the port by ssh -L."),
    }  # fmt: skip
    other = ("This did not work", error.description or "The console failed; its terminal says why.")
    title, sentence = sentences.get(error.code or 500, other)
    return pages.problem(title, sentence, error.code or 500)


class QuietHandler(WSGIRequestHandler):
    timeout = 20
    """Seconds for which a client may send nothing of a request that it began, or of the next one."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing of pages served: the login link is one of their addresses."""


def server(console: Console, listener: socket.socket) -> BaseWSGIServer:
    """Return a server on a bound socket; `serve_forever` runs it."""
    host, port = listener.getsockname()[:2]
    return make_server(host, port, build(console), threaded=True, request_handler=QuietHandler, fd=listener.fileno())
