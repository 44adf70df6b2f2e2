"""`gateway check` prints what is in force, or says where the files are wrong."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway_addon.cli.check import check

SHIPPED = str(Path(__file__).parents[1] / "policies")


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
