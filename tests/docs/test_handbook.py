"""The README and the handbook: what they show is what the program does, and every command in them is run in a clone."""

import json
import os
import re
import tomllib

import pytest
from checkouts import ROOT
from click.testing import CliRunner
from client_tier import CLIENTS, REQUESTS
from handbook import FOLDER, LANGUAGES, README, Terminal, blocks, marks, page, section, topics

from gateway_addon.calls import settlement
from gateway_addon.cli import COMMANDS, main
from gateway_addon.policy import load
from gateway_addon.policy.reference import reference
from gateway_addon.simulator import Simulator

PAGES = {"README": README.read_text(), "index": page("index"), **{topic: page(topic) for topic in topics()}}
MARKS_MAX = 12


def shown(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["docs", *arguments])
    return result.exit_code, result.output


def shown_as(pattern: str, topic: str, made: str) -> None:
    """Compare a part of a page with what the program makes of it; with REWRITE_DOCS=1, write it anew."""
    [part] = re.findall(pattern, PAGES[topic], re.DOTALL)
    if os.environ.get("REWRITE_DOCS"):
        (FOLDER / f"{topic}.md").write_text(PAGES[topic].replace(part, made.strip() + part[len(part.rstrip()):]))
    else:
        assert part.strip() == made.strip(), "REWRITE_DOCS=1 writes it anew"


def test_each_chapter_is_listed_and_shown_as_it_is():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(["index", *topics()])
    assert shown() == (0, PAGES["index"])
    for topic in topics():
        assert shown(topic) == (0, PAGES[topic])


@pytest.mark.parametrize("name", ["polcy", "../README", ""])
def test_a_chapter_that_is_not_there_is_said_with_those_that_are(name):
    code, output = shown(name)
    assert (code, "concepts, contributing" in output) == (2, True)


def test_a_terminal_gets_a_pager(monkeypatch):
    """The command leaves the choice to click, which asks whether both ends are a terminal."""
    paged = []
    monkeypatch.setattr("click.echo_via_pager", paged.append)
    assert shown("policy") == (0, "")
    assert paged == [PAGES["policy"].removesuffix("\n")]


def test_the_pages_are_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "docs/*.md" in settings["tool"]["setuptools"]["package-data"]["gateway_addon"]


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_to_files(name):
    base = ROOT if name == "README" else FOLDER
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", PAGES[name]):
        assert (base / target).is_file(), target


def test_the_readme_is_short_and_leads_to_the_handbook():
    text = PAGES["README"]
    assert len(text.splitlines()) <= 150
    assert "gateway_addon/docs/index.md" in text
    assert "x-gateway-" not in text


def test_the_reference_of_keys_is_the_table_that_validates():
    shown_as(r"(?<=<!-- keys: generated from gateway_addon/policy/keys.py -->\n).*?(?=<!-- /keys -->)", "policy", reference())


def test_the_table_of_endings_is_that_of_the_settlement():
    reasons = set(re.findall(r"estimated:(\w+)", settlement.__doc__)) - {"gateway_error"}
    assert reasons <= set(re.findall(r"estimated:(\w+)", PAGES["guarantees"]))


def test_the_table_of_commands_has_each_with_its_line():
    chapters = dict(re.findall(r"^\| `gateway (\w+)` \| .+? \| (.*?) *\|$", PAGES["commands"], re.MULTILINE))
    rows = [f"| `gateway {name}` | {line} | {chapters.get(name, '')} |" for name, (_, line) in COMMANDS.items()]
    shown_as(r"(?<=\|---\|---\|---\|\n)\| `gateway .*?(?=\n\n)", "commands", "\n".join(rows))


def test_the_clients_that_were_tried_are_those_of_the_tier():
    rows = re.findall(r"^\| (\S+) \| (.+?) \| (?:`--for (.+?)`)? *\|$", section(PAGES["clients"], "Clients that were tried"), re.MULTILINE)
    kept = [(client.name, json.loads((REQUESTS / f"{client.name}.json").read_text())["version"], client.form or "") for client in CLIENTS]
    assert [row for row in rows if row[0] not in ("client", "---")] == kept


@pytest.mark.parametrize("name", ["policy", "batches", "sessions", "parts"])
def test_the_policies_that_a_page_shows_come_into_force(name, tmp_path):
    [text] = [block.text for block in blocks(PAGES[name]) if block.language == "yaml"]
    (tmp_path / "apps").mkdir()
    (tmp_path / "gateway.yaml").write_text("key: {env: ANTHROPIC_API_KEY}\n")
    needed = "" if "models:" in text.replace("models,", "") else "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\n"
    (tmp_path / "apps" / "app.yaml").write_text(needed + text)
    assert list(load(tmp_path).apps) == ["app"]


def test_what_is_not_run_is_marked_and_rare():
    """Each fence is in a language that the other tests read; a fence without one would hide commands from them."""
    assert {block.language for text in PAGES.values() for block in blocks(text)} <= LANGUAGES
    fences = sum(len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) for text in PAGES.values())
    assert fences == 2 * sum(len(blocks(text)) for text in PAGES.values())
    reasons = list(marks())
    assert len(reasons) == sum(block.not_run is not None for text in PAGES.values() for block in blocks(text))
    assert len(reasons) <= MARKS_MAX


def typed(text):
    """What a reader types, a command a line: what follows an indent or a backslash belongs to the line before."""
    lines = "".join(block.text for block in blocks(text) if block.language == "bash").replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(" ")]


def test_a_newcomers_way_is_short():
    """In commands: the demo, the tests; a call that is attributed; three apps with caps and their report."""
    see, call, three = (typed(section(PAGES["README"], name)) for name in ("See it work, without an account", "The first real call", "Three apps, their caps and their report"))
    assert (see, len(call)) == (["./run.sh demo", "./run.sh test"], 5)
    assert len(call) + len(three) <= 9
    assert three[-1] == "./run.sh report"


@pytest.mark.longest
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_the_readmes_commands_work_in_order_in_a_clone(tmp_path):
    """As somebody types them: nothing is set that no line of the README exports, but addresses and the upstream."""
    async with Simulator() as api:
        terminal = Terminal(tmp_path, api)
        try:
            ran = await terminal.play(blocks(PAGES["README"]))
        finally:
            terminal.close()
        book = await api.settled()
    assert ran >= 9
    assert terminal.changed() == "", "what is the user's is ignored: no pull will meet it"
    assert len(book.messages()) == 4, "the curl, the SDK's call, and one of each of the two other apps"


@pytest.mark.longest
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_the_handbooks_commands_work_in_order_in_a_clone(tmp_path):
    """With what the index says that the README has made: an app, its token, the key, and a gateway that runs."""
    async with Simulator() as api:
        terminal = Terminal(tmp_path, api)
        try:
            assert await terminal.play(blocks(section(PAGES["README"], "The first real call"))[:3]) == 3
            for topic in topics():
                await terminal.play(blocks(PAGES[topic]))
        finally:
            terminal.close()
