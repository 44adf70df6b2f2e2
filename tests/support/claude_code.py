"""The real Claude Code, from npm: run for one answer, or under a pseudo-terminal as a person sees it."""

import asyncio
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

VERSION = "2.1.332"
PACKAGE = f"@anthropic-ai/claude-code@{VERSION}"
CACHE = Path("~/.cache/gateway-clients").expanduser() / f"claude-code-{VERSION}"
_CONTROL = re.compile(r"\x1b\[[0-9;?<>=]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b[()][0-9A-B]|\x1b.")


def installed() -> Path:
    """The program, installed where the cache has none of this version."""
    if not CACHE.exists():
        unfinished = CACHE.with_name(f".{CACHE.name}-{os.getpid()}")
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--prefix", unfinished, PACKAGE], check=True, capture_output=True, timeout=300
        )
        unfinished.rename(CACHE)
    return CACHE / "node_modules" / ".bin" / "claude"


def _environment(home: Path, **more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "TERM": "xterm-256color", "DISABLE_AUTOUPDATER": "1", **more}


def _home(folder: Path) -> None:
    """Make a home in which its first questions are answered."""
    folder.mkdir(exist_ok=True)
    known = {"hasCompletedOnboarding": True, "theme": "dark", "projects": {str(folder): {"hasTrustDialogAccepted": True}}}
    (folder / ".claude.json").write_text(json.dumps(known))


async def ask(home: Path, prompt: str, *options: str, **environment: str) -> tuple[int, str]:
    """Run `claude -p`; its exit code and all that it printed."""
    _home(home)
    process = await asyncio.create_subprocess_exec(
        await asyncio.to_thread(installed), "-p", prompt, *options, cwd=home, env=_environment(home, **environment),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    printed, _ = await asyncio.wait_for(process.communicate(), 90)
    return process.returncode or 0, printed.decode()


async def session(home: Path, steps: Sequence[tuple[str, str]], **environment: str) -> str:
    """Type into Claude Code's screen. A step: what to type, then a text to wait for. Returns all that was on the screen.

    The screen moves words by columns, so what is waited for and returned has no spaces.
    """
    _home(home)
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 45, 110, 0, 0))
    seen = bytearray()
    loop = asyncio.get_running_loop()

    def screen() -> str:
        return re.sub(r"\s", "", _CONTROL.sub("", seen.decode("utf-8", "replace")))

    def read() -> None:
        try:
            seen.extend(os.read(ours, 65_536))
        except OSError:
            loop.remove_reader(ours)

    process = await asyncio.create_subprocess_exec(
        await asyncio.to_thread(installed),
        cwd=home,
        env=_environment(home, **environment),
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    loop.add_reader(ours, read)
    try:
        for typed, wanted in (("", "shift+tab"), *steps):
            for key in (typed, "\r") if typed else ():
                os.write(ours, key.encode())
                await asyncio.sleep(0.5)  # keys that come together are taken for one paste
            async with asyncio.timeout(60):
                while re.sub(r"\s", "", wanted) not in screen():
                    await asyncio.sleep(0.1)
        return screen()
    except TimeoutError:
        raise AssertionError(f"{wanted!r} did not come: {screen()[-1500:]}") from None
    finally:
        loop.remove_reader(ours)
        process.kill()
        await process.wait()
        os.close(ours)
