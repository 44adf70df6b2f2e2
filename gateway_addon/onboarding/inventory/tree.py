"""Walk folders and read their files, once each: the inventory's only module that touches the disk.

Promises to yield every file or folder that it passes over, with the reason. It follows no
symbolic link to a folder (so there are no loops) and runs nothing that a scanned tree brings along.

Git itself decides what .gitignore means, not a second implementation of the rules: `git status` runs with an empty
repository of our own beside the tree, so that neither the scanned repository's configuration (which can name programs
to run) nor its owner (git refuses other people's repositories) matters. Where git is missing everything is read and that
is said: reading too much costs rows, reading too little costs an outage.
"""

import contextlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gateway_addon.onboarding.inventory.consumers import kind_of

FILE_BYTES_MAX = 16 * 1024 * 1024
"""Larger files are data: no source, settings or notebook worth reading is this long."""
_BINARY_BYTES = 8192  # git's own rule: a NUL byte in the first 8,000 or so makes a file binary
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_DEPENDENCIES = frozenset({"node_modules", "site-packages", "dist-packages", "__pycache__", ".tox", ".nox"})
_NOT_FILES = frozenset({"/proc", "/sys", "/dev"})
_GIT_TIMEOUT_S = 120

REASONS = {
    "ignored": "named by .gitignore (--no-ignore reads them)",
    "dependencies": "folders of installed packages (--no-ignore reads them)",
    "history": "shell histories (--history reads them)",
    "binary": "binary",
    "huge": f"larger than {FILE_BYTES_MAX // 1024**2} MB",
    "kernel": "made up by the kernel",
    "link": "links to folders outside, or to nothing",
    "unreadable": "unreadable",
    "git": "with a .gitignore that git could not explain, so read whole",
}


class Skip(NamedTuple):
    reason: str
    """A key of REASONS."""
    path: str


class File(NamedTuple):
    path: str
    data: bytes


def read(roots: Sequence[Path], *, ignore: bool = True, history: bool = False) -> Iterator[File | Skip]:
    """Yield every file under `roots` (files or folders) with its content, and each one that was not read.

    `ignore=False` reads what .gitignore names and installed packages too. Never raises on what it meets on the disk.
    """
    tops = _outermost(roots)
    with tempfile.TemporaryDirectory(prefix="gateway-inventory-") as scratch:
        empty = _empty_repository(scratch) if ignore else None
        for top in tops:
            if top.is_dir():
                yield from _walk(top, tops, empty, history)
            else:
                yield _file(str(top))


def _outermost(roots: Sequence[Path]) -> tuple[Path, ...]:
    """Return the roots, absolute and without those inside another: no file is read twice."""
    absolute = sorted({root.resolve() for root in roots})
    return tuple(root for root in absolute if not any(other in root.parents for other in absolute))


def _walk(top: Path, tops: Sequence[Path], empty: str | None, history: bool) -> Iterator[File | Skip]:
    """Walk one folder. `empty` is the repository to ask git with, None to read what .gitignore names too."""
    ignored: frozenset[str] | None = None  # None: no .gitignore seen so far from the top down
    if empty and not (top / ".git").exists():
        above = next((folder for folder in top.parents if (folder / ".git").exists()), None)
        ignored = _ignored(empty, above, top) if above else None
    stack = [(str(top), ignored)]
    while stack:
        folder, ignored = stack.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            yield Skip("unreadable", folder)
            continue
        names = {entry.name for entry in entries}
        if empty and (".git" in names or (".gitignore" in names and ignored is None)):
            # a repository is judged by its own rules alone; a tree outside any by its topmost .gitignore
            answer = _ignored(empty, Path(folder), Path(folder))
            if answer is None:
                yield Skip("git", folder)
            ignored = answer or frozenset()
        below = []
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield from _entry(entry, tops, ignored or frozenset(), history)
            elif skip := _passed_over(entry, ignored or frozenset(), everything=empty is None):
                yield skip
            elif entry.name != ".git":
                below.append((entry.path, ignored))
            elif os.path.isdir(hooks := os.path.join(entry.path, "hooks")):
                below.append((hooks, ignored))  # the rest of .git is git's own; a hook that asks Claude is a consumer
        stack += reversed(below)


def _passed_over(folder: os.DirEntry[str], ignored: frozenset[str], *, everything: bool) -> Skip | None:
    if folder.path in ignored:
        return Skip("ignored", folder.path)
    if folder.path in _NOT_FILES:
        return Skip("kernel", folder.path)
    return Skip("dependencies", folder.path) if folder.name in _DEPENDENCIES and not everything else None


def _entry(entry: os.DirEntry[str], tops: Sequence[Path], ignored: frozenset[str], history: bool) -> Iterator[File | Skip]:
    if entry.is_symlink():
        target = Path(os.path.realpath(entry.path))
        if any(top == target or top in target.parents for top in tops):
            return  # met where it lives
        if not target.is_file():
            yield Skip("link", entry.path)
            return
    elif not entry.is_file(follow_symlinks=False):
        return  # a socket, a pipe or a device holds no settings, and reading one may never end
    if entry.path in ignored and not kind_of(entry.path).secret:
        yield Skip("ignored", entry.path)
    elif not history and "hist" in entry.name and kind_of(entry.path).name == "history":
        yield Skip("history", entry.path)
    else:
        yield _file(entry.path)


def _file(path: str) -> File | Skip:
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > FILE_BYTES_MAX:
                return Skip("huge" if stat.S_ISREG(status.st_mode) else "unreadable", path)
            data = file.read()
    except OSError:
        return Skip("unreadable", path)
    if data.startswith(_UTF16_MARKS):  # what Windows editors and PowerShell's redirection write
        data = data.decode("utf-16", "replace").encode()
    return Skip("binary", path) if b"\0" in data[:_BINARY_BYTES] else File(path, data)


def _empty_repository(scratch: str) -> str:
    empty = os.path.join(scratch, "empty.git")
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # asking it then fails, and that is said
        _git("init", "--quiet", "--bare", "--template=", empty)
    return empty


def _ignored(empty: str, tree: Path, part: Path) -> frozenset[str] | None:
    """Return the absolute paths under `part` that .gitignore files from `tree` down name (a folder without its files).

    None where git cannot be asked.
    """
    options = ("--literal-pathspecs", f"--git-dir={empty}", f"--work-tree={tree}", "-C", str(tree), "-c", f"core.excludesFile={os.devnull}")
    try:
        answer = _git(*options, "status", "--porcelain", "-z", "--untracked-files=all", "--ignored=matching", "--", str(part))
    except (OSError, subprocess.SubprocessError):
        return None
    return frozenset(os.path.join(tree, os.fsdecode(line[3:]).rstrip("/")) for line in answer.split(b"\0") if line.startswith(b"!! "))


def _git(*arguments: str) -> bytes:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    command = ("git", *arguments)
    return subprocess.run(command, env=environment, capture_output=True, check=True, timeout=_GIT_TIMEOUT_S).stdout
