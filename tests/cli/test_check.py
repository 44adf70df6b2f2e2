"""`gateway check` prints what is in force, or says where the files are wrong."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway_addon.cli.check import check

SHIPPED = str(Path(__file__).parents[2] / "policies" / "examples")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "apps").mkdir()
    (tmp_path / "gateway.yaml").write_text("caps: {month: $600}\nteams: {jobs: {caps: {week: $7}}}\n")
    (tmp_path / "apps" / "reports.yaml").write_text("team: jobs\nmodels: {allow: [claude-haiku-4-5]}\ncaps: {day: $5.50}\nmode: observe\n")
    return tmp_path


def test_the_shipped_policies_pass():
    result = CliRunner().invoke(check, [SHIPPED])
    assert result.exit_code == 0, result.output
    assert {"reviews", "pipeline", "experiments", "claude-code"} <= {line.partition(" ")[0] for line in result.output.splitlines()}


@pytest.mark.parametrize("by_option", [True, False])
def test_each_cap_and_app_is_shown(folder: Path, by_option: bool):
    result = CliRunner().invoke(check, ["--policies", str(folder)] if by_option else [str(folder)])
    assert result.exit_code == 0, result.output
    for fact in ("month $600.00", "jobs week $7.00", "reports", "day $5.50", "claude-haiku-4-5", "observe", "env ANTHROPIC_API_KEY"):
        assert fact in result.output


def test_json_is_the_same_facts(folder: Path):
    facts = json.loads(CliRunner().invoke(check, [str(folder), "--json"]).output)
    assert facts["total"] == {"month": "$600.00"}
    assert facts["apps"]["reports"] == {
        "team": "jobs",
        "models": ["claude-haiku-4-5"],
        "features": ["hour_ttl"],
        "max_tokens": None,
        "caps": {"day": "$5.50"},
        "each": {},
        "reserve": "auto",
        "mode": "observe",
    }


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("models: {allow: [claude-haiku-4-5]}\ncaps: {mnth: $5}\n", "apps/reports.yaml:2: caps.mnth: unknown key, did you mean month?"),
        ("models: {allow: [claude-nope]}\ncaps: unlimited\n", "apps/reports.yaml:1: models.allow: claude-nope matches no model"),
    ],
)
def test_a_mistake_is_said_with_its_line_and_ends_with_2(folder: Path, text: str, place: str):
    (folder / "apps" / "reports.yaml").write_text(text)
    result = CliRunner().invoke(check, [str(folder)])
    assert result.exit_code == 2
    assert f"{folder.name}/{place}" in result.stderr
    assert result.stdout == ""


def test_a_folder_without_a_policy_says_how_to_get_one(tmp_path: Path):
    result = CliRunner().invoke(check, [str(tmp_path)])
    assert result.exit_code == 2
    assert "gateway init" in result.stderr


def test_every_mistake_of_every_file_is_listed_once(folder: Path):
    (folder / "gateway.yaml").write_text("caps: {mnth: $600, day: much}\nteams: {Jobs: {}}\nsurprise: 1\n")
    (folder / "prices.yaml").write_text("models: {claude-x: {}}\n")
    (folder / "apps" / "reports.yaml").write_text(
        "team: jobs\nmodels: {allow: [claude-nope, claude-haiku-4-5, claude-nah], aliases: {a: claude-no}}\n"
        "features: {web_search: true, files: maybe}\n"
    )
    (folder / "apps" / "tabs.yaml").write_text("models:\n\tallow: [claude-haiku-4-5]\n")
    (folder / "apps" / "twice.yaml").write_text("models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\ncaps: {daay: $1}\nteam: 7!\n")
    (folder / "apps" / "Upper.yaml").write_text("")
    (folder / "apps" / "ending.yml").write_text("")
    (folder / "apps" / "good.yaml").write_text("models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\n")
    result = CliRunner().invoke(check, [str(folder)])
    assert (result.exit_code, result.stdout) == (2, "")
    here = folder.name
    places = [line.removeprefix(f"{here}/").split(": ", 2)[:2] for line in result.stderr.splitlines()]
    assert places == [
        ["apps/Upper.yaml", "an app's file is named APP.yaml, in lower-case letters, digits, - and _, at most 63"],
        ["apps/ending.yml", "an app's file is named APP.yaml, in lower-case letters, digits, - and _, at most 63"],
        ["gateway.yaml:1", "caps.mnth"],
        ["gateway.yaml:1", "caps.day"],
        ["gateway.yaml:2", "teams.Jobs"],
        ["gateway.yaml:3", "surprise"],
        ["prices.yaml:1", "models.claude-x"],
        ["apps/reports.yaml:3", "features.web_search"],
        ["apps/reports.yaml:3", "features.files"],
        ["apps/reports.yaml:1", "caps is missing"],
        ["apps/reports.yaml:2", "models.allow"],
        ["apps/reports.yaml:2", "models.allow"],
        ["apps/reports.yaml:2", "models.aliases.a"],
        ["apps/tabs.yaml:2", "a tab stands where YAML takes blanks alone; indent with blanks (most editors can turn tabs into them)"],
        ["apps/twice.yaml:3", "caps"],
        ["apps/twice.yaml:4", "team"],
    ], result.stderr
    assert "max_uses must be given, like {max_uses: 5}" in result.stderr


@pytest.mark.parametrize(
    ("text", "line"),
    [("\tmodels: 1\n", 1), ("models:\n  allow:\n\t- a\n", 3), ("models:\n  - a\n\t- b\n", 3), ("caps:\n  day: $5\n  \tweek: $6\n", 3)],
)
def test_a_tab_is_called_a_tab(folder: Path, text: str, line: int):
    (folder / "apps" / "reports.yaml").write_text(text)
    assert f"apps/reports.yaml:{line}: a tab stands where YAML takes blanks alone" in CliRunner().invoke(check, [str(folder)]).stderr


def test_a_tab_in_a_value_or_behind_it_is_none_of_our_business(folder: Path):
    (folder / "apps" / "reports.yaml").write_text("models:\t{allow: [claude-haiku-4-5]}\t# all\ncaps: unlimited\n")
    assert CliRunner().invoke(check, [str(folder)]).exit_code == 0
