"""The console's buttons: they do what the commands do, for the person who has confirmed it, and for nobody else."""

import json
import os
import re
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC
from pathlib import Path

import browser
import pytest
from axe_playwright_python.sync_playwright import Axe
from desks import served
from ledgers import new_file, spend

from gateway_addon.clocks import monotonic_s
from gateway_addon.console import links, login
from gateway_addon.console.app import COOKIE, QuietHandler, build
from gateway_addon.console.login import ASKED_MAX, LINK_S, TRIES_PER_MINUTE, Login, ask
from gateway_addon.console.pages import Console, Policies
from gateway_addon.ledger import Alert, NewCall, admin, connect, parts, state
from gateway_addon.windows import starts

HOME = {"Origin": "http://localhost"}
LONGEST = "a" * 63
"""An app's name as long as one may be."""
PAUSE = "/change/pause?scope=reports&why=runaway"


@pytest.fixture
def console(tmp_path):
    (tmp_path / "policies" / "apps").mkdir(parents=True)
    (tmp_path / "policies" / "gateway.yaml").write_text("upstream: https://api.anthropic.com\nkey: {env: ANTHROPIC_API_KEY}\ncaps: {month: $100}\nteams: {nobody: {caps: {month: $7}}}\n")
    for name in ("reports", LONGEST):
        (tmp_path / "policies" / "apps" / f"{name}.yaml").write_text("models: {allow: [claude-*]}\ncaps: {day: $5}\n")
    ledger = new_file(tmp_path)
    with connect.changing(ledger) as db:
        admin.issue_token(db, "reports", "d1", who="test", now=time.time())
    return Console(ledger, Policies(tmp_path / "policies"), Login(monotonic_s()), may_write=True)


@pytest.fixture
def client(console):
    found = build(console).test_client()
    assert found.get(f"/login/{console.login.link}").status_code == 303
    return found


def word(client, address):
    page = client.get(address)
    assert page.status_code == 200, page.text
    return re.search(r'name="word" value="([^"]+)"', page.text)[1]


def confirm(client, address, headers=HOME, **more):
    return client.post("/change", data={"word": word(client, address)} | more, headers=headers)


def audited(console):
    with connect.reading(console.ledger) as db:
        return [(row["who"].endswith("(console)"), row["action"], row["subject"], row["why"]) for row in admin.audit_trail(db, None, since=0)[1:]]


def changed(console):
    """All that the buttons can change."""
    with connect.reading(console.ledger) as db:
        now = time.time()
        return (
            [(each.scope, each.until is None, each.cut) for each in state.pauses(db, now)],
            [(each.scope, each.window, each.amount_nano, round((each.until - now) / 3600)) for each in admin.raises(db, now=now)],
            [(each.scope, each.window, each.amount_nano) for each in admin.limits(db)],
            [each.refusal(now) for each in admin.tokens(db)],
        )


NOTHING = ([], [], [], [None])


@pytest.mark.parametrize(
    ("addresses", "after", "actions"),
    [
        ([PAUSE], ([("app:reports", True, False)], [], [], [None]), [("pause", "app:reports", "runaway")]),
        (["/change/pause?scope=total&hours=8&cut=yes"], ([("total", False, True)], [], [], [None]), [("pause", "total", "")]),
        ([PAUSE, "/change/resume?scope=reports"], NOTHING, [("pause", "app:reports", "runaway"), ("resume", "app:reports", "")]),
        (["/change/raise?scope=reports&window=day&amount=$2&hours=8"], ([], [("app:reports", "day", 2 * 10**9, 8)], [], [None]), [("cap raise", "app:reports day", "")]),
        (["/change/raise?scope=reports&window=day&amount=2&hours=1", "/change/withdraw?id=1"], NOTHING, [("cap raise", "app:reports day", ""), ("cap withdraw", "app:reports day", "")]),
        (["/change/limit?scope=total&window=month&amount=3"], ([], [], [("total", "month", 3 * 10**9)], [None]), [("cap limit", "total month", "")]),
        (["/change/limit?scope=reports&window=day&amount=0", "/change/lift?scope=reports&window=day"], NOTHING, [("cap limit", "app:reports day", ""), ("cap limit lift", "app:reports day", "")]),
        (["/change/revoke?scope=reports&id=1"], ([], [], [], ["token_revoked"]), [("token revoke", "app:reports", "")]),
    ],
)  # fmt: skip
def test_a_confirmed_change_is_the_commands_and_audited(console, client, addresses, after, actions):
    for address in addresses:
        answer = confirm(client, address)
        assert (answer.status_code, answer.headers["Location"] in ("/", "/apps/reports")) == (303, True), answer.text
    assert changed(console) == after
    assert audited(console) == [(True, *action) for action in actions]
    page = client.get("/apps/reports").text
    assert "Raise …" in page


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/change/explode", "there are pause, resume"),
        ("/change/pause?scope=report", "did you mean reports?"),
        ("/change/raise?scope=reports&window=week&amount=1&hours=1", "has no cap for a week"),
        ("/change/raise?scope=reports&window=day&amount=-1&hours=1", "is not an amount"),
        ("/change/raise?scope=reports&window=day&amount=1&hours=0", "1 to 8,784"),
        ("/change/limit?scope=reports&window=year&amount=1", "no window"),
        ("/change/revoke?scope=reports&id=2", "no token 2"),
        ("/change/withdraw?id=1", "No raise 1 is in force"),
    ],
)
def test_a_change_without_sense_is_refused_before_it_is_asked(console, client, address, words):
    answer = client.get(address)
    assert (answer.status_code, words in answer.text) == (400, True), answer.text
    assert changed(console) == NOTHING


def test_a_rule_of_the_commands_holds_at_the_button_too(console, client):
    """A limit above the cap, a raise under a limit, an end of what is no pause: refused as the command refuses it."""
    for address, words in (
        ("/change/limit?scope=reports&window=day&amount=9", "a limit lowers a cap"),
        ("/change/resume?scope=reports", "is not paused"),
    ):
        answer = confirm(client, address)
        assert (answer.status_code, words in answer.text) == (409, True), answer.text
    confirm(client, "/change/limit?scope=reports&window=day&amount=1")
    held = "/change/raise?scope=reports&window=day&amount=1&hours=1"
    answer = confirm(client, held)
    assert (answer.status_code, "is limited to $1.00 a day" in answer.text) == (409, True), answer.text
    assert confirm(client, f"{held}&lift=yes").status_code == 303
    assert (changed(console)[1], changed(console)[2]) == ([("app:reports", "day", 10**9, 1)], [])


@browser.needed
def test_a_person_pauses_and_revokes_in_a_browser(console, tmp_path):
    """The forms, the confirmation and the headers that a real browser sends with them. GATEWAY_SCREENSHOTS keeps pictures."""
    folder = Path(os.environ.get("GATEWAY_SCREENSHOTS", tmp_path))
    with served(console) as address, browser.opened() as page:
        page.goto(f"{address}/login/{console.login.link}")
        page.click("text=reports")
        page.screenshot(path=folder / "buttons-light.png", full_page=True)
        page.set_viewport_size({"width": 390, "height": 900})
        page.screenshot(path=folder / "buttons-phone.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        page.fill("form[action='/change/pause'] [name=why]", "runaway loop")
        page.click("text=Pause …")
        assert "Refuse every further call of reports until it is resumed" in page.inner_text("main")
        assert "Why: runaway loop" in page.inner_text("main")
        page.screenshot(path=folder / "confirm-phone.png", full_page=True)
        assert changed(console) == NOTHING
        page.click("button:has-text('Pause reports')")
        assert "Paused: runaway loop" in page.inner_text("main")
        page.click("text=Revoke …")
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=folder / "confirm-dark.png", full_page=True)
        assert Axe().run(page).response["violations"] == []
        page.click("button:has-text('Revoke token #1')")
        assert page.url == f"{address}/apps/reports"
        for longest in (f"/change/pause?scope={LONGEST}", f"/apps/{LONGEST}", f"/change/pause?scope=reports&session={'s' * 64}", "/"):
            page.goto(address + longest)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, longest
        assert "$0.00 of $7.00" in page.inner_text("main"), "the cap of a team that has no app yet"
    assert changed(console) == ([("app:reports", True, False)], [], [], ["token_revoked"])
    assert audited(console) == [(True, "pause", "app:reports", "runaway loop"), (True, "token revoke", "app:reports", "")]


# attacks


def test_no_get_changes_anything(console, client):
    for address in (PAUSE, "/change/limit?scope=reports&window=day&amount=0", "/change/revoke?scope=reports&id=1"):
        assert client.get(f"{address}&word={word(client, address)}").status_code == 200
        assert client.get(f"/change?word={word(client, address)}").status_code in (404, 405)
        assert client.head(address).status_code == 200
    assert (changed(console), audited(console)) == (NOTHING, [])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "null"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:3000"},  # another server of this machine: the same site to the cookie
        {"Origin": "https://localhost"},
        {"Origin": "http://localhost.evil.example"},
        HOME | {"Sec-Fetch-Site": "same-site"},
        HOME | {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_a_request_of_another_site_is_refused(console, client, headers):
    """Even with a word that is good."""
    answer = confirm(client, PAUSE, headers=headers)
    assert (answer.status_code, changed(console)) == (403, NOTHING)


def test_a_word_works_once_in_its_session_as_it_was_shown(console, client):
    """A replay, another session's word, a made-up one, and fields sent beside it change nothing."""
    good = word(client, PAUSE)
    console.login.link = "second"
    other = build(console).test_client()
    other.get("/login/second")
    for who, sent in ((other, good), (client, ""), (client, "x" * 43), (client, good[:-1])):
        assert who.post("/change", data={"word": sent}, headers=HOME).status_code == 409
    assert changed(console) == NOTHING
    fields = {"word": good, "scope": "total", "action": "revoke"}
    assert client.post("/change", data=fields, headers=HOME).status_code == 303
    assert changed(console)[0] == [("app:reports", True, False)]
    confirm(client, "/change/resume?scope=reports")
    assert client.post("/change", data=fields, headers=HOME).status_code == 409
    assert changed(console) == NOTHING


def test_a_word_ends_after_ten_minutes_and_fifty_others(console, client):
    cookie = client.get_cookie(COOKIE).value
    session = console.login.session(cookie, monotonic_s())
    old = word(client, PAUSE)
    change, until = session.asked[old]
    session.asked[old] = (change, until - LINK_S - 1)
    assert client.post("/change", data={"word": old}, headers=HOME).status_code == 409
    first = ask(session, change, monotonic_s())
    for _ in range(ASKED_MAX):
        ask(session, change, monotonic_s())
    assert len(session.asked) == ASKED_MAX
    assert client.post("/change", data={"word": first}, headers=HOME).status_code == 409
    assert changed(console) == NOTHING


def test_changes_are_limited_by_the_minute(console, client):
    answers = [client.post("/change", data={"word": "guess"}, headers=HOME).status_code for _ in range(TRIES_PER_MINUTE + 1)]
    assert answers == [409] * TRIES_PER_MINUTE + [429]
    assert (confirm(client, PAUSE).status_code, changed(console)) == (429, NOTHING)


def test_guesses_of_the_link_are_limited_and_lock_nobody_out(console):
    stranger = build(console).test_client()
    answers = [stranger.get(f"/login/guess{number}").status_code for number in range(TRIES_PER_MINUTE + 1)]
    assert answers == [401] * TRIES_PER_MINUTE + [429]
    assert stranger.get(f"/login/{console.login.link}").status_code == 303


def test_a_cookie_that_was_put_in_beforehand_is_nobodys(console):
    """A login makes a cookie of its own: one that somebody else knows never becomes a session."""
    victim = build(console).test_client()
    victim.set_cookie(COOKIE, "known-to-the-thief")
    victim.get(f"/login/{console.login.link}")
    assert victim.get_cookie(COOKIE).value != "known-to-the-thief"
    thief = build(console).test_client()
    thief.set_cookie(COOKIE, "known-to-the-thief")
    assert thief.get(PAUSE).status_code == 401
    assert thief.post("/change", data={"word": "x"}, headers=HOME).status_code == 401


@pytest.mark.parametrize(("method", "address"), [("POST", "/change"), ("GET", PAUSE), ("POST", "/"), ("DELETE", "/change")])
def test_a_console_that_only_reads_has_no_buttons(console, method, address):
    console.may_write = False
    client = build(console).test_client()
    client.get(f"/login/{console.login.link}")
    assert client.open(address, method=method, headers=HOME).status_code == 405
    assert "/change" not in client.get("/apps/reports").text + client.get("/").text


def test_a_body_that_is_too_long_is_refused(console, client):
    answer = client.post("/change", data={"word": word(client, PAUSE), "why": "x" * 10_000}, headers=HOME)
    assert (answer.status_code, changed(console)) == (413, NOTHING)


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded; charset=utf-7", "multipart/form-data", ""])
def test_a_body_of_another_kind_confirms_nothing(console, client, kind):
    """A page of another site can send text without asking first. The word stays good for the form itself."""
    good = word(client, PAUSE)
    body = json.dumps({"word": good}) if kind == "application/json" else f"word={good}\r\n"
    assert client.post("/change", data=body, content_type=kind, headers=HOME).status_code in (400, 409)
    assert changed(console) == NOTHING
    assert client.post("/change", data={"word": good}, headers=HOME).status_code == 303


@pytest.mark.parametrize(
    ("method", "address", "headers", "status"),
    [
        ("OPTIONS", "/change", HOME, 405),
        ("OPTIONS", "/", {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}, 405),
        ("PUT", "/change", HOME, 405),
        ("TRACE", "/", HOME, 405),
        ("GET", "/change", HOME | {"X-HTTP-Method-Override": "POST"}, 405),
        ("POST", "/apps/reports", HOME, 405),
        ("POST", "/login/x", HOME, 405),
        ("POST", "/change", HOME | {"Host": "evil.example"}, 421),
        ("POST", "/change", {"Origin": "https://localhost", "X-Forwarded-Proto": "https"}, 403),
        ("GET", "/change/pause?scope=reports%0d%0aSet-Cookie:x=1", HOME, 400),
    ],
)
def test_no_other_method_or_header_leads_in(console, client, method, address, headers, status):
    """Nor does any answer let another origin read it, or keep it, or show it in a frame."""
    answer = client.open(address, method=method, headers=headers, data={"word": word(client, PAUSE)} if method != "GET" else None)
    assert (answer.status_code, changed(console)) == (status, NOTHING)
    assert_guarded(answer)


def assert_guarded(answer):
    headers = dict(answer.headers)
    assert not [name for name in headers if name.lower().startswith("access-control-")]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "form-action 'self'" in headers["Content-Security-Policy"]
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("no-store", "nosniff", "same-origin")
    assert headers["Cross-Origin-Opener-Policy"] == headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_pages_with_secrets_are_kept_by_nobody(console):
    """The answer to the link, the page with a word, its confirmation, and every refusal."""
    client = build(console).test_client()
    entered = client.get(f"/login/{console.login.link}")
    cookie = entered.headers["Set-Cookie"]
    assert all(flag in cookie for flag in ("HttpOnly", "SameSite=Strict", "Path=/"))
    assert "Domain" not in cookie
    answers = [entered, client.get(PAUSE), confirm(client, PAUSE), client.get("/login/x"), client.get("/nothing"), client.get("/calls.csv"), client.post("/change", headers=HOME)]
    assert [answer.status_code for answer in answers] == [303, 200, 303, 401, 404, 200, 409]
    for answer in answers:
        assert_guarded(answer)
    assert console.login.link == ""
    assert not [each for each in answers if cookie.partition("=")[2].partition(";")[0] in each.text]


def test_a_look_at_the_link_does_not_use_it(console):
    """A preview of a chat asks for the head alone; a page of another site cannot use a link that it does not know."""
    client = build(console).test_client()
    assert client.head(f"/login/{console.login.link}").status_code == 405
    assert client.get(f"/login/{console.login.link}").status_code == 303


@pytest.mark.parametrize("offered", [False, True])
def test_a_link_opened_twice_at_once_lets_in_one(console, tmp_path, monkeypatch, offered):
    console.link_file = tmp_path / "console.link"
    with links.open_for_links(console.link_file):
        link = links.offer(console.link_file) if offered else console.login.link
        compared = login.hmac.compare_digest

        def slowly(*both):
            found = compared(*both)
            time.sleep(0.02)
            return found

        monkeypatch.setattr(login.hmac, "compare_digest", slowly)
        apps = [build(console).test_client() for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            answers = [*pool.map(lambda client: client.get(f"/login/{link}").status_code, apps)]
    assert sorted(answers) == [303, 401, 401, 401]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: loc",
        b"POST /change HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nCookie: %b\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 60\r\n\r\nword=",
    ],
)
def test_a_client_that_sends_slowly_is_left(console, client, monkeypatch, sent):
    """It holds a thread no longer than that; others are answered meanwhile."""
    monkeypatch.setattr(QuietHandler, "timeout", 0.2)
    with served(console) as address, socket.create_connection(address.removeprefix("http://").split(":"), timeout=10) as slow:
        cookie = f"{COOKIE}={console.login.enter(console.login.link, monotonic_s())}"
        slow.sendall(sent.replace(b"%b", cookie.encode()))
        with urllib.request.urlopen(urllib.request.Request(f"{address}/alerts", headers={"Cookie": cookie}), timeout=10) as answer:
            assert answer.status == 200
        assert b"303" not in b"".join(iter(lambda: slow.recv(4096), b"")).partition(b"\r\n")[0]
    assert changed(console) == NOTHING


# a new link


def test_a_new_link_opens_a_console_that_runs(console, tmp_path):
    console.link_file = tmp_path / "state" / "console.link"
    client = build(console).test_client()
    with links.open_for_links(console.link_file):
        first, second = links.offer(console.link_file), links.offer(console.link_file)
        assert console.link_file.stat().st_mode & 0o777 == 0o600
        assert second not in console.link_file.read_text()
        answers = [client.get(f"/login/{link}").status_code for link in (first, second, second, console.login.link)]
        assert answers == [401, 303, 401, 303]
        late = links.offer(console.link_file)
        console.clock = lambda: time.time() + LINK_S + 5
        assert client.get(f"/login/{late}").status_code == 401
    assert not console.link_file.exists()
    with pytest.raises(ValueError, match="no console runs"):
        links.offer(console.link_file)


def test_no_link_is_made_for_a_console_that_was_killed(tmp_path):
    left = Path(tmp_path / "console-127.0.0.1-8090.link")
    left.touch()
    with pytest.raises(ValueError, match=r"no console runs at 127\.0\.0\.1:8090"):
        links.offer(left)


# sessions


def test_a_session_is_shown_with_its_agents_and_paused_alone(console, client):
    """The live list, the tree and the pause are those of the commands; another app's session of that id goes on."""
    now, call = time.time(), NewCall("reports", None, 1, model_asked="claude-haiku-4-5", session_id="run-1")
    with (console.policies.folder / "apps" / "reports.yaml").open("a") as policy:
        policy.write("each: {session: {ever: $2}}\n")
    with connect.changing(console.ledger) as db:
        parts.align(db, {("reports", "session", "ever")}, starts(now, UTC), moved=False)
        spend(db, now - 20, nano=7_000_000, call=call)
        spend(db, now - 10, nano=3_000_000, call=replace(call, agent_id="child"))
        spend(db, now - 5, nano=1_000_000, call=replace(call, agent_id="grandchild", parent_agent_id="child"))
    listed, page = client.get("/sessions").text, client.get("/sessions/reports/run-1").text
    assert 'data-session="run-1" data-nano="11000000"' in listed
    shown = re.findall(r'data-agent="(\w*)" data-nano="(\d+)"><th scope="row"><span class="depth-(\d)"', page)
    assert shown == [("", "7000000", "0"), ("child", "3000000", "1"), ("grandchild", "1000000", "2")]
    assert "session ever: $0.0110 spent, $0.00 held, $1.99 free of $2.00" in page
    assert 'href="/sessions/reports/run-1"' in client.get("/calls/1").text
    answer = confirm(client, "/change/pause?scope=reports&session=run-1&hours=8&why=loop")
    assert answer.headers["Location"] == "/sessions/reports/run-1"
    assert changed(console)[0] == [("app:reports session:run-1", False, False)]
    assert all("loop" in client.get(path).text for path in ("/", "/sessions/reports/run-1"))
    confirm(client, "/change/resume?scope=reports&session=run-1")
    assert changed(console) == NOTHING
    for address in ("raise?hours=8&amount=1&", "limit?amount=0.5&"):
        answer = confirm(client, f"/change/{address}scope=reports&session=run-1&window=ever")
        assert answer.headers["Location"] == "/sessions/reports/run-1"
    page = client.get("/sessions/reports/run-1").text
    assert "Raise 1: $1.00 more for ever until" in page
    assert "Limit: $0.5000 for ever since" in page
    assert "$0.4890 free of $0.5" in page
    confirm(client, "/change/lift?scope=reports&session=run-1&window=ever")
    assert "$2.99 free of $3.00" in client.get("/sessions/reports/run-1").text
    confirm(client, "/change/withdraw?id=1")
    assert changed(console) == NOTHING
    assert (client.get("/sessions/other/run-1").status_code, client.get("/change/pause?scope=reports&session=no&hours=1").status_code) == (404, 400)


# alerts


def test_alerts_are_grouped_and_the_rest_has_a_page(console, client):
    """The overview names each kind once, the newest ten; the page of all has each of them."""
    now = time.time()
    with connect.changing(console.ledger) as db:
        for number in range(13):
            state.alert_once(db, Alert("policy", f"app:app{number}", "x", f"Sentence {number:02} first."), send=False, now=now - 100 + number)
        for number in range(3):
            state.alert_once(db, Alert("drift", "app:reports", f"y{number}", f"Drifted {number}."), send=False, now=now - 10 + number)
    overview, page = client.get("/?range=7d").text, client.get("/alerts?range=7d").text
    assert [len(re.findall(words, overview)) for words in ("Drifted 2", "Drifted 1", "3 like it", "Sentence", "4 more kinds")] == [1, 0, 1, 9, 1]
    assert re.findall(r"Sentence \d\d|Drifted \d", page) == [*(f"Drifted {number}" for number in (2, 1, 0)), *(f"Sentence {number:02}" for number in reversed(range(13)))]
    assert " UTC</time>" in page
