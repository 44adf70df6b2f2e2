"""A village of twelve consumers, hidden in as many forms among files that only look like consumers."""

import base64
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from village import ADMIN_KEY, KEY, LOOKALIKES, OTHER_KEY, TOKEN, VILLAGE, build_village, write

from gateway_addon.cli.inventory import inventory
from gateway_addon.identity import tokens
from gateway_addon.onboarding import snippets
from gateway_addon.onboarding.inventory import File, Skip, fingerprint, inspect, read, rules, tree


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(inventory, [str(argument) for argument in arguments])


def rows(*arguments: str | Path) -> list[dict]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["consumers"]


def check_village(root: Path) -> None:
    found = {(Path(row["path"]).relative_to(root).as_posix(), row["line"], row["kind"], row["state"], *row["keys"]) for row in rows(root)}
    expected = {(name, line, kind, state, *map(fingerprint, keys)) for name, (_, line, kind, state, keys) in VILLAGE.items()}
    assert found == expected


def test_all_twelve_are_found_and_nothing_else(tmp_path: Path) -> None:
    build_village(tmp_path, others=2_000)
    check_village(tmp_path)


@pytest.mark.soak
def test_all_twelve_are_found_among_100_000_files_within_20_s(tmp_path: Path) -> None:
    build_village(tmp_path, others=100_000)
    started = time.monotonic()
    check_village(tmp_path)
    assert time.monotonic() - started < 20


# What counts, one file at a time


@pytest.mark.parametrize(
    ("name", "content", "kind", "state"),
    [
        ("a.py", "from anthropic.types import Message\n", "python", "environment"),
        ("a.py", "import os, anthropic as a\n", "python", "environment"),
        ("a.py", "from langchain_anthropic import ChatAnthropic\n", "python", "environment"),
        ("a.py", "subprocess.run(['claude', '-p', prompt])\n", "python", "environment"),
        ("a.py", "key = os.environ['ANTHROPIC_API_KEY']\n", "python", "environment"),
        ("a.py", "os.environ['ANTHROPIC_API_KEY'] = key\n", "python", "direct"),
        ("script", "#!/usr/bin/env python3\nimport anthropic\n", "python", "environment"),
        ("one-line.ipynb", r'{"cells": [{"source": "import os\nimport anthropic\n"}]}', "notebook", "environment"),
        ("a.mjs", "const { Anthropic } = require('@anthropic-ai/sdk');\n", "javascript", "environment"),
        ("a.ts", 'import { anthropic } from "@ai-sdk/anthropic";\n', "javascript", "environment"),
        ("a.rb", 'require "anthropic"\n', "ruby", "environment"),
        ("A.java", "import com.anthropic.client.okhttp.AnthropicOkHttpClient;\n", "java", "environment"),
        ("A.kt", "import com.anthropic.client.AnthropicClient\n", "java", "environment"),
        ("A.cs", "using Anthropic;\n", "csharp", "environment"),
        ("a.php", "use Anthropic\\Client;\n", "php", "environment"),
        ("crontab", "@daily claude -p 'summarise the log'\n", "crontab", "environment"),
        ("ci.sh", "git diff | claude --model opus --print\n", "shell", "environment"),
        (".github/workflows/a.yml", "      - uses: anthropics/claude-code-action@v1\n", "github-actions", "environment"),
        (".gitlab-ci.yml", "variables:\n  ANTHROPIC_API_KEY: $KEY\n", "ci", "direct"),
        ("Dockerfile", f"ENV ANTHROPIC_API_KEY {KEY}\n", "dockerfile", "direct"),
        ("nginx.conf", "proxy_pass https://api.anthropic.com;\n", "configuration", "direct"),
        (".claude.json", f'{{"primaryApiKey": "{KEY}"}}', "claude-code", "direct"),
        ("notes", "export ANTHROPIC_API_KEY=$(pass show claude)\n", "other", "direct"),
        ("notes", f"the key is {KEY}\n", "other", "direct"),
        ("README.md", f"our key: {KEY}\n", "document", "direct"),
        ("commented.py", f"# {KEY}\n", "python", "direct"),
        # switched already
        (".env", "ANTHROPIC_BASE_URL=http://127.0.0.1:8080\nANTHROPIC_API_KEY=$TOKEN\n", "dotenv", "switched"),
        (".env", f"ANTHROPIC_API_KEY={TOKEN}\n", "dotenv", "switched"),
        ("secret.yaml", f"data:\n  key: {base64.b64encode(TOKEN.encode()).decode()}\n", "configuration", "switched"),
        (".env", f"ANTHROPIC_BASE_URL=http://127.0.0.1:8080\nANTHROPIC_API_KEY={KEY}\n", "dotenv", "half switched"),
        (".env", "ANTHROPIC_BASE_URL=https://api.anthropic.com\n", "dotenv", "direct"),
        ("crontab", "ANTHROPIC_BASE_URL=http://gw:8080\n0 3 * * * ANTHROPIC_API_KEY=$(cat token) run\n", "crontab", "switched"),
        ("a.py", "import anthropic\nc = anthropic.Anthropic(\n  api_key=f('T'),\n  base_url='http://gw',\n)\n", "python", "switched"),
        ("a.ts", "import A from '@anthropic-ai/sdk';\nnew Anthropic({ baseURL: 'http://gw' })\n", "javascript", "switched"),
        ("a.go", 'import "github.com/anthropics/anthropic-sdk-go"\nx(option.WithBaseURL("http://gw"))\n', "go", "switched"),
        ("a.py", "import anthropic\nc = OpenAI(base_url='http://gw')\n", "python", "environment"),
        ("policies/gateway.yaml", "upstream: https://api.anthropic.com\nkey: {env: ANTHROPIC_API_KEY}\n", "gateway", "gateway"),
    ],
)
def test_what_a_consumer_looks_like(name: str, content: str, kind: str, state: str) -> None:
    found = inspect(f"/srv/{name}", content.encode())
    assert {(consumer.kind, consumer.state) for consumer in found} == {(kind, state)}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, text in LOOKALIKES.items() if "node_modules" not in name])
def test_what_only_looks_like_a_consumer(name: str, content: str) -> None:
    assert inspect(f"/srv/{name}", content.encode()) == ()


def test_every_job_and_every_service_is_a_consumer_of_its_own() -> None:
    jobs = f"0 1 * * * ANTHROPIC_API_KEY={KEY} a\n0 2 * * * b\n0 3 * * * claude -p c\n"
    one, two = f"environment: [ANTHROPIC_API_KEY={KEY}]", f"environment:\n      - ANTHROPIC_API_KEY={OTHER_KEY}"
    services = inspect("/srv/compose.yml", f"services:\n  a:\n    {one}\n  b:\n    {two}\n".encode())
    assert [consumer.line for consumer in inspect("/etc/crontab", jobs.encode())] == [1, 3]
    assert [(service.line, service.keys) for service in services] == [(3, (fingerprint(KEY),)), (6, (fingerprint(OTHER_KEY),))]


def test_a_switched_consumer_shows_its_url_without_secrets() -> None:
    (found,) = inspect("/srv/.env", b"ANTHROPIC_BASE_URL=http://gw.example:8080/secret-path?token=1\n")
    assert (found.state, found.base_url, found.switch) == ("switched", "http://gw.example:8080", "done")


def test_an_admin_key_is_not_to_be_switched() -> None:
    (found,) = inspect("/srv/.env", f"ADMIN={ADMIN_KEY}\n".encode())
    assert found.keys == (fingerprint(ADMIN_KEY),)
    assert found.switch.startswith("stays: an admin key")


def test_every_form_that_a_row_names_exists() -> None:
    named = {form for kind in rules.KINDS for form in re.findall(r"--for ([a-z-]+)", kind.switch)}
    assert named
    assert named <= set(snippets.KINDS)


# Keys


def test_a_fingerprint_is_stable_and_shows_nothing_secret() -> None:
    shown = fingerprint(KEY)
    assert re.fullmatch(r"sk-ant-api03-…[0-9a-f]{12}", shown)
    assert shown != fingerprint(OTHER_KEY)


def test_a_tokens_fingerprint_begins_its_hash_in_the_ledger() -> None:
    assert fingerprint(TOKEN) == f"gwt_…{tokens.digest(TOKEN)[:12]}"


def test_no_piece_of_a_key_is_ever_shown(tmp_path: Path) -> None:
    build_village(tmp_path / "village", others=0)
    shown = run(tmp_path / "village").output + run(tmp_path / "village", "--json", "--save", tmp_path / "saved.json").output
    shown += (tmp_path / "saved.json").read_text()
    for key in (KEY, OTHER_KEY):
        assert fingerprint(key) in shown
        for secret in (key.removeprefix("sk-ant-api03-"), base64.b64encode(key.encode()).decode().removeprefix("c2stYW50")):
            assert not [start for start in range(len(secret) - 7) if secret[start : start + 8] in shown]


def test_the_summary_says_who_shares_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_village(tmp_path, others=0)
    monkeypatch.chdir(tmp_path)
    shown = run(".").output
    holders = "etc/crontab:3, etc/systemd/system/replies.service:3, srv/search/deploy/secret.yaml:3, srv/shop/.env:2"
    assert f"{fingerprint(KEY)} is shared by 4: {holders}" in shown
    assert f"{fingerprint(OTHER_KEY)} is shared" not in shown
    assert "12 consumers in" in shown


# What is read and what is not


def paths(root: Path, **options: bool) -> set[str]:
    return {Path(item.path).relative_to(root).as_posix() for item in read([root], **options) if isinstance(item, File)}


def skips(root: Path, **options: bool) -> set[tuple[str, str]]:
    return {(item.reason, Path(item.path).relative_to(root).as_posix()) for item in read([root], **options) if isinstance(item, Skip)}


IGNORING = {
    ".gitignore": "*.log\n!keep.log\n/only-here.py\nbuild/\n.env\n",
    "a.log": "", "keep.log": "", "only-here.py": "", "sub/only-here.py": "", "build/x.py": "", "deep/build/x.py": "", ".env": "",
    "sub/.gitignore": "!a.log\nown.py\n", "sub/a.log": "", "sub/own.py": "", "own.py": "", "just-secrets/.env": "",
}
NOT_IGNORED = {
    ".gitignore", "keep.log", "sub/only-here.py", "sub/.gitignore", "sub/a.log", "own.py",
    ".env", "just-secrets/.env",  # named by .gitignore because they hold keys, so read all the same
}


@pytest.mark.parametrize("repository", [True, False])
def test_gitignore_is_honoured_in_a_repository_and_outside(tmp_path: Path, repository: bool) -> None:
    """Nested files and negated patterns too."""
    write(tmp_path, IGNORING)
    if repository:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert {path for path in paths(tmp_path) if not path.startswith(".git/")} == NOT_IGNORED
    assert {path for path in paths(tmp_path, ignore=False) if not path.startswith(".git/")} == set(IGNORING)
    assert ("ignored", "deep/build") in skips(tmp_path)


def test_a_folder_in_a_repository_follows_the_rules_above_it(tmp_path: Path) -> None:
    write(tmp_path, IGNORING)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert paths(tmp_path / "deep") == set()
    assert paths(tmp_path / "sub") == {"only-here.py", ".gitignore", "a.log"}


def test_a_repository_in_another_tree_follows_its_own_rules(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "*.py\n", "inner/a.py": "", "inner/b.ts": "", "inner/.gitignore": "*.ts\n", "c.py": ""})
    subprocess.run(["git", "init", "-q", str(tmp_path / "inner")], check=True)
    assert {path for path in paths(tmp_path) if ".git/" not in path} == {".gitignore", "inner/.gitignore", "inner/a.py"}


def test_a_repository_s_own_configuration_is_never_run(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "*.log\n", "a.py": ""})
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "config", "core.fsmonitor", f"touch {tmp_path}/ran; false"], check=True)
    list(read([tmp_path]))
    assert not (tmp_path / "ran").exists()


def test_without_git_everything_is_read_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, IGNORING)
    monkeypatch.setenv("PATH", "")
    assert paths(tmp_path) == set(IGNORING)
    assert skips(tmp_path) == {("git", ".")}
    assert "with a .gitignore that git could not explain, so read whole" in run(tmp_path).output


def test_a_git_hook_is_read_and_the_rest_of_git_is_not(tmp_path: Path) -> None:
    write(tmp_path, {".git/hooks/commit-msg": "#!/bin/sh\nclaude -p 'check this'\n", ".git/config": "ANTHROPIC_API_KEY=x\n"})
    assert [(row["kind"], row["line"]) for row in rows(tmp_path)] == [("shell", 2)]


def test_installed_packages_are_passed_over_unless_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"lib/site-packages/anthropic/a.py": "import anthropic\n"})
    assert skips(tmp_path) == {("dependencies", "lib/site-packages")}
    assert len(rows(tmp_path, "--no-ignore")) == 1


def test_shell_history_is_read_only_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {".bash_history": f"ls\nexport ANTHROPIC_API_KEY={KEY}\n"})
    assert rows(tmp_path) == []
    assert "1 shell histories (--history reads them)" in run(tmp_path).output
    assert [(row["kind"], row["line"], row["keys"]) for row in rows(tmp_path, "--history")] == [("history", 2, [fingerprint(KEY)])]


def test_binary_and_huge_files_are_skipped_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "FILE_BYTES_MAX", 1000)
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\0" + KEY.encode())
    (tmp_path / "huge.py").write_text("import anthropic\n" * 100)
    (tmp_path / "windows.env").write_bytes(f"ANTHROPIC_API_KEY={KEY}\r\n".encode("utf-16"))
    assert skips(tmp_path) == {("binary", "photo.png"), ("huge", "huge.py")}
    assert [row["keys"] for row in rows(tmp_path)] == [[fingerprint(KEY)]]
    assert "Not read:" in run(tmp_path).output


def test_links_make_no_loop_and_no_second_row(tmp_path: Path) -> None:
    write(tmp_path, {"tree/a.py": "import anthropic\n", "outside/.env": f"ANTHROPIC_API_KEY={KEY}\n", "outside/folder/b.py": ""})
    links = {"loop": ".", "self": "self", "again.py": "a.py", ".env": "../outside/.env", "away": "../outside/folder", "gone": "nothing"}
    for name, target in links.items():
        (tmp_path / "tree" / name).symlink_to(target)
    assert paths(tmp_path / "tree") == {"a.py", ".env"}
    assert {item.reason for item in read([tmp_path / "tree"]) if isinstance(item, Skip)} == {"link"}
    assert len(rows(tmp_path / "tree", tmp_path, tmp_path / "tree/a.py")) == 2


def test_pipes_and_sockets_do_not_hold_it_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert list(read([tmp_path])) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"closed/a.py": "", "b.py": ""})
    (tmp_path / "closed").chmod(0)
    (tmp_path / "b.py").chmod(0)
    found = skips(tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert found == {("unreadable", "closed"), ("unreadable", "b.py")}


def test_what_vanishes_between_listing_and_reading_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"folder/a.py": "", "b.py": "", "c.py": ""})
    reading = read([tmp_path])
    assert isinstance(next(reading), File)
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "c.py").unlink()
    assert list(reading) == [Skip("unreadable", str(tmp_path / "c.py")), Skip("unreadable", str(tmp_path / "folder"))]


# The command


def test_the_saved_record_is_private_and_no_consumer_itself(tmp_path: Path) -> None:
    build_village(tmp_path, others=0)
    assert run(tmp_path, "--save", tmp_path / "inventory.json").exit_code == 0
    record = json.loads((tmp_path / "inventory.json").read_text())
    assert (tmp_path / "inventory.json").stat().st_mode & 0o777 == 0o600
    assert (record["gateway_inventory"], len(record["consumers"]), len(record["keys"][fingerprint(KEY)])) == (1, 12, 4)
    assert len(rows(tmp_path)) == 12


def test_an_unwritable_record_is_refused_before_the_search(tmp_path: Path) -> None:
    result = run(tmp_path, "--save", tmp_path / "missing" / "inventory.json")
    assert (result.exit_code, "does not exist; create it first" in result.output) == (2, True)


def test_a_file_s_name_does_not_reach_the_terminal_as_an_escape(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\x1b[2J\xff.py"
    Path(os.fsdecode(name)).write_text("import anthropic\n")
    shown = run(tmp_path)
    assert (shown.exit_code, "\x1b" in shown.output, "[2J" in shown.output) == (0, False, True)
    assert os.fsencode(rows(tmp_path)[0]["path"]) == name


def test_progress_goes_to_a_terminal_and_the_answer_to_a_pipe(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "import anthropic\n"})
    code = "from gateway_addon.cli import inventory as command; command._PROGRESS_S = 0; command.inventory()"
    terminal, its_end = pty.openpty()
    ended = subprocess.run([sys.executable, "-c", code, tmp_path, "--json"], stdout=subprocess.PIPE, stderr=its_end, timeout=30)
    shown = os.read(terminal, 4096)
    os.close(terminal), os.close(its_end)
    assert shown == b"\r\x1b[K1 files, 1 consumers\r\x1b[K"
    assert len(json.loads(ended.stdout)["consumers"]) == 1


def test_an_interruption_ends_it_quietly_and_saves_nothing(tmp_path: Path) -> None:
    code = f"""
import signal, sys
from gateway_addon.cli import inventory as command
def interrupted(*args, **kwargs):
    yield from ()
    signal.raise_signal(signal.SIGINT)
command.read = interrupted
command.inventory([{str(tmp_path)!r}, "--save", {str(tmp_path / "saved.json")!r}])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr.strip(), ended.stdout) == (128 + signal.SIGINT, "Stopped after 0 files; nothing was saved.", "")
    assert not (tmp_path / "saved.json").exists()
