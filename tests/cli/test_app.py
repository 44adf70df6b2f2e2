"""`gateway app add`, and whose the policies are: the clone's git knows the examples alone, and an upgrade loses nothing."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from checkouts import ROOT, clone
from click.testing import CliRunner, Result

from gateway_addon.cli import main
from gateway_addon.identity import tokens
from gateway_addon.ledger import connect, state
from gateway_addon.policy import load

EXAMPLES = sorted(path.stem for path in (ROOT / "policies" / "examples" / "apps").iterdir())
RESTORE = "git restore --source=ORIG_HEAD policies/gateway.yaml policies/apps"


@pytest.fixture
def policies(tmp_path):
    folder = tmp_path / "policies"
    assert CliRunner().invoke(main, ["init", "--yes", "--policies", str(folder), "--ledger", f"sqlite:///{tmp_path / 'gateway.db'}"]).exit_code == 0
    return folder


def add(policies: Path, name: str, example: str) -> Result:
    ledger = f"sqlite:///{policies.parent / 'gateway.db'}"
    return CliRunner().invoke(main, ["app", "add", name, "--from", example, "--policies", str(policies), "--ledger", ledger, "--listen", "127.0.0.1:9"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_example_comes_into_force_beside_the_first_policy(policies, example):
    done = add(policies, "mine", example)
    assert done.exit_code == 0, done.output
    with connect.reading(policies.parent / "gateway.db") as db:
        assert state.look_up_token(db, tokens.digest(done.stdout.strip()), time.time()).token.app == "mine"
    assert sorted(load(policies).apps) == ["app", "mine"]
    assert (policies / "apps" / "mine.yaml").read_text() == (ROOT / "policies" / "examples" / "apps" / f"{example}.yaml").read_text()


def test_the_help_of_add_names_every_example():
    assert f"The example to copy: {', '.join(EXAMPLES)}." in " ".join(CliRunner().invoke(main, ["app", "add", "--help"]).output.split())


@pytest.mark.parametrize(
    ("name", "example", "said"),
    [("mine", "pipelines", "no example 'pipelines'; the examples: claude-code, experiments"), ("My App", "reviews", "'My App' cannot be an app's name")],
)
def test_what_cannot_be_added_is_said_and_writes_nothing(policies, name, example, said):
    done = add(policies, name, example)
    assert (done.exit_code, said in done.output) == (2, True), done.output
    assert [path.name for path in (policies / "apps").iterdir()] == ["app.yaml"]


def test_a_file_that_exists_is_kept(policies):
    before = (policies / "apps" / "app.yaml").read_text()
    done = add(policies, "app", "reviews")
    assert (done.exit_code, done.stdout, "kept" in done.output, "gateway token issue app" in done.output) == (0, "", True, True)
    assert (policies / "apps" / "app.yaml").read_text() == before


def test_an_example_that_does_not_come_into_force_is_not_left(policies):
    (policies / "prices.yaml").write_text("nonsense: 1\n")
    done = add(policies, "mine", "reviews")
    assert (done.exit_code, "prices.yaml" in done.output) == (2, True), done.output
    assert not (policies / "apps" / "mine.yaml").exists()


def git(folder: Path, *arguments: str, fails: bool = False) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True)
    assert (done.returncode != 0) is fails, done.stderr
    return done.stdout


def gateway(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([root / ".venv/bin/python", "-m", "gateway_addon", *arguments], cwd=root, capture_output=True, text=True, timeout=60)


def test_an_upgrade_of_a_clone_says_how_its_policies_come_back(tmp_path):
    """Two clones of a version that tracked the policies: one left them as they were, one edited them. Both pull the version of today."""
    (tmp_path / "new").mkdir()
    upstream = clone(tmp_path / "new")
    environment = upstream / ".venv"
    environment.rename(tmp_path / "environment")
    tracked = [upstream / "policies" / "gateway.yaml", upstream / "policies" / "apps" / "reviews.yaml"]
    tracked[1].parent.mkdir()
    for path in tracked:
        shutil.copy(upstream / "policies" / "examples" / path.relative_to(upstream / "policies"), path)
    git(upstream, "init", "-q")
    git(upstream, "add", "--all")
    git(upstream, "add", "--force", *map(str, tracked))
    git(upstream, "commit", "-qm", "before")
    unedited, edited = tmp_path / "unedited", tmp_path / "edited"
    for copy in (unedited, edited):
        git(tmp_path, "clone", "-q", str(upstream), str(copy))
        bin_folder = copy / ".venv" / "bin"
        bin_folder.mkdir(parents=True)
        (bin_folder / "python").write_text((tmp_path / "environment/bin/python").read_text().replace(str(upstream), str(copy)))
        (bin_folder / "python").chmod(0o755)
    git(upstream, "rm", "-q", "--cached", *map(str, tracked))
    git(upstream, "commit", "-qm", "the user's policies are the user's")

    assert gateway(unedited, "init", "--yes").returncode == 0
    assert gateway(unedited, "token", "issue", "reviews").returncode == 0
    git(unedited, "pull", "-q")
    assert not (unedited / "policies" / "gateway.yaml").exists()
    for command in ("check", "doctor", "serve"):
        done = gateway(unedited, command)
        assert (done.returncode, RESTORE in done.stderr, "knows the apps reviews" in done.stderr) == (2, True, True), done.stderr
    git(unedited, *RESTORE.split()[1:])
    assert gateway(unedited, "check").returncode == 0
    assert git(unedited, "status", "--porcelain") == ""

    mine = edited / "policies" / "gateway.yaml"
    mine.write_text(mine.read_text() + "# mine\n")
    git(edited, "pull", "-q", fails=True)
    assert mine.read_text().endswith("# mine\n")
    shutil.copy(mine, tmp_path / "kept.yaml")
    git(edited, "checkout", "-q", "policies/gateway.yaml")
    git(edited, "pull", "-q")
    shutil.copy(tmp_path / "kept.yaml", mine)
    assert git(edited, "status", "--porcelain") == ""


def test_init_in_a_new_clone_asks_three_questions(tmp_path):
    root = clone(tmp_path)
    done = subprocess.run(
        [root / ".venv/bin/python", "-m", "gateway_addon", "init"],
        cwd=root, input="shop\n$60\nenv CLAUDE_KEY\n", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout.count("?")) == (0, 3), done.stdout + done.stderr
    policy = load(root / "policies")
    assert (list(policy.apps), tuple(policy.key)) == (["shop"], ("env", "CLAUDE_KEY"))
