"""The console in a browser: what a person sees, hears read and reaches by the keyboard.

In a file of its own: the browser's driver keeps a loop running between its tests, and none of asyncio's may run beside it.
"""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import browser
import pytest
from axe_playwright_python.sync_playwright import Axe
from click.testing import CliRunner
from desks import new_desk, served

from gateway_addon.cli.report import report

pytestmark = [browser.needed, pytest.mark.longest]

VIEWS = {
    "overview": "/",
    "app": "/apps/reviews?range=7d",
    "model": "/models/claude-haiku-4-5?range=7d",
    "day": f"/days/{datetime.fromtimestamp(time.time(), UTC):%Y-%m-%d}",
    "calls": "/calls?sort=spent",
    "call": "/calls/1",
    "refused": "/calls/8",
    "refusals": "/calls?state=refused",
    "alerts": "/alerts",
    "sessions": "/sessions",
    "session": "/sessions/reviews/endless",
    "nothing": "/calls/999999",
}
LOOKS = (("light", 1280), ("dark", 1280), ("phone", 390))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return new_desk(tmp_path_factory.mktemp("desk"), 2000)


@pytest.fixture(scope="module")
def window(desk):
    """A page of a browser that has opened the link."""
    with served(desk) as address, browser.opened() as page:
        page.goto(f"{address}/login/{desk.login.link}")
        yield page


def views(window):
    """Every view, as each of its readers sees it."""
    root = "/".join(window.url.split("/")[:3])
    for view, path in VIEWS.items():
        window.goto(root + path)
        for look, width in LOOKS:
            window.set_viewport_size({"width": width, "height": 900})
            window.emulate_media(color_scheme="dark" if look == "dark" else "light")
            yield f"{view}-{look}"


def test_the_numbers_on_the_page_are_the_reports(desk, window):
    window.goto("/".join(window.url.split("/")[:3]) + "/?range=month")
    shown = window.eval_on_selector_all("tr[data-model]", "rows => rows.map(row => [row.dataset.model, Number(row.dataset.nano)])")
    told = CliRunner().invoke(report, ["--ledger", f"sqlite:///{desk.ledger}", "--by", "model", "--json"], catch_exceptions=False)
    assert dict(shown) == {line["key"]: line["spent_nano"] for line in json.loads(told.output)["lines"] if line["calls"]}


def test_every_view_fits_its_screen_and_everybody_reads_it(window, tmp_path):
    """No view has a serious fault for people who see or move otherwise; of the dark one the contrasts are its own.

    GATEWAY_SCREENSHOTS names a folder that keeps the pictures.
    """
    folder = Path(os.environ.get("GATEWAY_SCREENSHOTS", tmp_path))
    for name in views(window):
        assert len(window.screenshot(path=folder / f"{name}.png", full_page=True)) > 10_000
        wide = "[...document.querySelectorAll('main *')].filter(each => each.getBoundingClientRect().right > innerWidth && !each.closest('.scroll')).map(each => each.outerHTML.slice(0, 80))"
        assert window.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, (name, window.evaluate(wide))
        if not name.endswith("phone"):  # it is the light one's page
            rules = {} if name.endswith("light") else {"runOnly": ["color-contrast"]}
            found = Axe().run(window, context={"exclude": [[".chart rect"]]}, options=rules).response["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")] == [], name
    loaded = window.evaluate("performance.getEntriesByType('resource').map(each => each.name)")
    assert [name for name in loaded if not name.startswith("http://127.0.0.1:")] == []


def test_the_keyboard_alone_leads_to_a_calls_story(window):
    window.goto("/".join(window.url.split("/")[:3]))
    for expected in ("Skip to the content", "Gateway", "Overview", "Calls"):
        window.keyboard.press("Tab")
        assert window.evaluate("document.activeElement.textContent.trim()") == expected
        assert window.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", expected
    with window.expect_navigation():
        window.keyboard.press("Enter")
    window.locator("tbody th a").first.focus()
    with window.expect_navigation():
        window.keyboard.press("Enter")
    assert "The money, step by step" in window.inner_text("main")


def test_the_page_renews_itself_and_keeps_what_is_open(desk, window):
    window.goto("/".join(window.url.split("/")[:3]))
    before = window.inner_text(".asof")
    window.locator("#days-table summary").evaluate("each => { each.parentElement.open = true }")
    window.set_viewport_size({"width": 390, "height": 900})
    window.locator(".newest").first.evaluate("each => { each.scrollLeft -= 100 }")
    moved = window.locator(".newest").first.evaluate("each => each.scrollLeft")
    window.wait_for_function("before => document.querySelector('.asof').innerText !== before", arg=before)
    assert window.locator("#days-table").get_attribute("open") is not None
    assert window.locator(".newest").first.evaluate("each => each.scrollLeft") == moved != 0
