"""The project as a person has it who cloned the repository, with this environment in the place of the one that run.sh would install."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def clone(folder: Path) -> Path:
    """A clone in `folder`, in a path with a space: each file that git knows or would take, as it is in the working tree.

    Beside it the bytecode that Python keeps of these files, as in a clone that has been used: to make it anew takes seconds.
    """
    root = folder / "a project"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name, follow_symlinks=False)  # with its time, by which its bytecode is valid
    for kept in (ROOT / "gateway_addon").rglob("__pycache__"):
        shutil.copytree(kept, root / kept.relative_to(ROOT), ignore=shutil.ignore_patterns("*.pyc.*"))  # those are still being written
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "mitmdump", "sqlite-utils"):
        wrapper = root / ".venv" / "bin" / name
        wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec "{Path(sys.executable).with_name(name)}" "$@"\n')
        wrapper.chmod(0o755)
    for lock in ("requirements.lock", "tests/requirements.lock"):
        digest = hashlib.sha256((root / lock).read_bytes()).hexdigest()
        (root / ".venv" / f"installed-{lock.replace('/', '-')}").write_text(f"{digest} {root}")
    return root
