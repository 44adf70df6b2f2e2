"""Where policies and ledger lie by default, and `gateway where`, which says it and why."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway_addon.cli import main
from gateway_addon.ledger import ServerAddress
from gateway_addon.ledger.store.sqlite_files import state_folder
from gateway_addon.operations import places

ROOT = Path(__file__).parents[2]
NEW = (".config/gateway/policies", ".local/share/gateway/gateway.db")
OLD = (".gateway/policies", ".gateway/gateway.db")


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("GATEWAY_POLICIES", "GATEWAY_LEDGER", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def installed(home, monkeypatch):
    """The package as a wheel puts it: not in a clone."""
    monkeypatch.setattr(places, "clone_folder", lambda: None)
    return home


def where(*arguments):
    done = CliRunner().invoke(main, ["where", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def shown(*arguments):
    said = where(*arguments)
    return said["policies"]["place"], said["ledger"]["place"]


def test_a_clone_holds_its_own_whatever_lies_at_home(home):
    (home / ".gateway").mkdir()
    (home / ".gateway/gateway.db").touch()
    assert shown() == (str(ROOT / "policies"), str(ROOT / "gateway.db"))
    assert where()["ledger"]["why"] == "this is a clone, and they lie in it"
    assert where()["state"] == {"place": str(ROOT / ".gateway"), "why": "beside the ledger"}


FOUND = [
    # what lies at home; where the policies and the ledger are
    ([], NEW),
    ([".gateway/unwritten/a journal"], NEW),
    ([".gateway/gateway.db"], OLD),
    ([".gateway/policies/gateway.yaml"], OLD),
    ([".local/share/gateway/gateway.db"], NEW),
    ([".gateway/unwritten/a journal", ".config/gateway/policies/gateway.yaml"], NEW),
]


@pytest.mark.parametrize(("files", "expected"), FOUND, ids=lambda value: " ".join(value) or "nothing")
def test_an_older_home_is_kept_and_a_new_one_is_xdgs(files, expected, installed):
    for name in files:
        (installed / name).parent.mkdir(parents=True)
        (installed / name).touch()
    assert shown() == tuple(str(installed / name) for name in expected)


def test_the_xdg_variables_name_folders_by_absolute_paths_alone(installed, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(installed / "c"))
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert shown() == (str(installed / "c/gateway/policies"), str(installed / ".local/share/gateway/gateway.db"))


@pytest.mark.parametrize("first", OLD)
@pytest.mark.parametrize("second", NEW)
@pytest.mark.parametrize("command", [["where"], ["check"], ["init", "--yes"], ["report"], ["token", "list"]], ids=" ".join)
def test_two_homes_are_named_and_neither_is_taken(first, second, command, installed):
    for name in (first, second):
        (installed / name).mkdir(parents=True)
    before = sorted(installed.rglob("*"))
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert f"{installed / first} and {installed / second}" in done.output
    assert "--ledger" in done.output
    assert sorted(installed.rglob("*")) == before


def test_what_is_named_needs_no_default(installed):
    for name in (OLD[1], NEW[1]):
        (installed / name).mkdir(parents=True)
    said = where("--policies", "here", "--ledger", "sqlite:///there/gateway.db")
    assert [each["place"] for each in said.values()] == [str(Path(path).absolute()) for path in ("here", "there/gateway.db", "there/.gateway")]
    assert [said[name]["why"] for name in ("policies", "ledger")] == ["--policies says so", "--ledger says so"]


def test_a_servers_password_is_not_shown(installed, monkeypatch):
    monkeypatch.setenv("GATEWAY_LEDGER", "postgresql://ada:secret@db.internal/gateway")
    said = where()
    assert said["ledger"] == {"place": "postgresql://db.internal/gateway", "why": "GATEWAY_LEDGER says so"}
    assert said["state"]["place"] == str(installed / ".local/state/gateway")


def test_the_journals_of_an_older_home_stay_in_use(home):
    assert state_folder(ServerAddress("postgresql://db/gateway")) == home / ".local/state/gateway"
    (home / ".gateway").mkdir()
    assert state_folder(ServerAddress("postgresql://db/gateway")) == home / ".gateway"


def test_every_line_of_the_plain_answer_ends_with_its_reason(home):
    lines = CliRunner().invoke(main, ["where"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["policies", "ledger", "state"]
    assert lines[2].endswith("beside the ledger")
