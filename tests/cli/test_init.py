"""`gateway init`: what is missing is written, what exists is never touched."""

import pytest
from click.testing import CliRunner

from gateway_addon.cli import main
from gateway_addon.policy import load


def init(folder, *arguments, answers=None):
    where = ["--policies", str(folder / "policies"), "--ledger", f"sqlite:///{folder / 'gateway.db'}"]
    return CliRunner().invoke(main, ["init", *where, *arguments], input=answers)


def test_the_defaults_load_and_deny_what_they_do_not_name(tmp_path):
    assert init(tmp_path, "--yes").exit_code == 0
    policy = load(tmp_path / "policies")
    assert list(policy.apps) == ["app"]
    assert policy.apps["app"].models.allow == ("claude-haiku-4-5", "claude-sonnet-5")
    assert (tmp_path / "gateway.db").exists()


def test_three_questions_make_a_policy(tmp_path):
    done = init(tmp_path, answers="reviews\n$60\nfile /run/secrets/claude\n")
    assert done.exit_code == 0, done.output
    policy = load(tmp_path / "policies")
    assert policy.apps["reviews"].caps["month"] == 60_000_000_000
    assert tuple(policy.key) == ("file", "/run/secrets/claude")


def test_a_wrong_answer_is_asked_again(tmp_path):
    done = init(tmp_path, answers="reviews\nmuch\n60\nthere\nenv CLAUDE_KEY\n")
    assert done.exit_code == 0, done.output
    assert "'much' is not an amount" in done.output
    assert tuple(load(tmp_path / "policies").key) == ("env", "CLAUDE_KEY")


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ("env CLAUDE_KEY", ("env", "CLAUDE_KEY")),
        ("file /run/a folder/{key}: #1", ("file", "/run/a folder/{key}: #1")),
        ("command pass show 'claude api'", ("command", ("pass", "show", "claude api"))),
    ],
)
def test_the_key_may_come_from_anywhere_a_policy_can_read_it(tmp_path, answer, source):
    done = init(tmp_path, answers=f"reviews\n60\n{answer}\n")
    assert done.exit_code == 0, done.output
    assert tuple(load(tmp_path / "policies").key) == source


def test_a_name_that_no_policy_file_can_have_writes_nothing(tmp_path):
    done = init(tmp_path, "--yes", "--app", "Bad Name")
    assert (done.exit_code, "'Bad Name' cannot be an app's name" in done.output) == (2, True)
    assert not list(tmp_path.iterdir())
    assert init(tmp_path, answers="My App\nmy-app\n60\n\n").exit_code == 0
    assert list(load(tmp_path / "policies").apps) == ["my-app"]


def test_what_exists_is_kept_to_the_byte(tmp_path):
    init(tmp_path, "--yes")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".db-shm"}
    done = init(tmp_path, "--yes")
    assert done.exit_code == 0
    assert done.output.count("kept   ") == 2
    assert {path: path.read_bytes() for path in before} == before


def test_an_app_can_be_added_later(tmp_path):
    init(tmp_path, "--yes")
    assert init(tmp_path, "--yes", "--app", "pipeline").exit_code == 0
    assert sorted(load(tmp_path / "policies").apps) == ["app", "pipeline"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "gateway.db is an empty file, not a ledger: remove it, then `gateway init` makes one"),
        (b"a letter to a friend, kept in the wrong place\n" * 100, "is not a ledger or is damaged"),
    ],
    ids=["empty", "another file"],
)
def test_what_is_no_ledger_is_not_kept_as_one(tmp_path, content, sentence):
    (tmp_path / "gateway.db").write_bytes(content)
    done = init(tmp_path, "--yes")
    assert (done.exit_code, sentence in done.output, "kept" in done.output) == (2, True, False), done.output
    assert (tmp_path / "gateway.db").read_bytes() == content
