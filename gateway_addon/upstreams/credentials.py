"""Read the real API key from where the policy says, and again when it changes.

Promises that the key is returned to its one caller and kept nowhere else: in no repr, no log line, no error. A file is looked
at on every call (one `stat`); a password manager is asked again by the clock, and when the upstream refuses the key, off the
event loop. Where it cannot be read again, what was read before stays in use, so that no call is lost to a file that is being saved.
Does I/O: it reads the environment and files.
"""

import asyncio
import ctypes
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from gateway_addon.names import install
from gateway_addon.policy import Source

COMMAND_TIMEOUT_S = 10
ASK_AGAIN_S = 60  # at most one command a minute, however often the upstream says 401
SECRET_BYTES_MAX = 10_000  # a key has some hundred; what has more, or no end, is the wrong file
ASK_EVERY_S = 300  # so that a new key is in use before the old one is disabled, and no call meets the 401
NO_KEYRING = (
    f"The keyring cannot be asked: its package is not installed. Install it beside the gateway ({install('keyring')}), or name "
    "your password manager's own program: {command: [...]}."
)


_ASSIGNED = re.compile(r"(?:export\s+)?[A-Z_][A-Z0-9_]*\s*=")
_PR_SET_DUMPABLE = 4  # linux/prctl.h
_QUOTES = tuple("\"'`")


class SecretUnavailable(Exception):
    """The secret cannot be read. The message is a sentence for the operator, and holds nothing of the secret."""


class WatchedSecret:
    """A secret behind a source. Call it to get the secret; raises SecretUnavailable."""

    def __init__(self, source: Source, environment: Mapping[str, str] = os.environ, withheld: Collection[str] = ()):
        """Take the source. `withheld`: variables that a password manager's program must not see, the gateway's other secrets."""
        self._source, self._environment, self._withheld = source, environment, frozenset(withheld)
        self._value: str | None = None
        self._version: tuple[int, int, int] | None = None
        self._turn = threading.Lock()  # a password manager's answer must not arrive after the policy has named another source
        self.problem: str | None = None
        """Why the secret could not be read again while the older value is in use. For the operator alone: it names places."""

    def __repr__(self) -> str:
        return f"Secret({self.place})"

    @property
    def place(self) -> str:
        """Return where the secret is read from, as the policy says."""
        kind, value = self._source
        return f"{kind} {value if isinstance(value, str) else value[0]}"

    def __call__(self) -> str:
        if self._source.kind == "file":
            self._look_at_the_file()
        if self._value is None:
            self._value = _plain(self._read(), self)
        return self._value

    def renew(self) -> None:
        """Read the secret anew, if it is not read on every call. Raises SecretUnavailable; the older value then stays."""
        with self._turn:
            if self._source.kind == "file":
                return
            try:
                self._value, self.problem = _plain(self._read(), self), None
            except SecretUnavailable as error:
                self.problem = str(error)
                raise

    def follow(self, source: Source, withheld: Collection[str]) -> None:
        """Read the secret from a new source. Raises SecretUnavailable if that cannot be read; then nothing changes."""
        with self._turn:
            if source != self._source:
                other = WatchedSecret(source, self._environment, withheld)
                self._value = other()
                self._source, self._version, self.problem = source, other._version, None
            self._withheld = frozenset(withheld)

    def _look_at_the_file(self) -> None:
        try:
            version = self._file_version()
            if version != self._version:
                self._value, self._version = _plain(self._read(), self), version
            self.problem = None
        except SecretUnavailable as error:
            if self._value is None:
                raise
            self.problem = str(error)

    def _file_version(self) -> tuple[int, int, int]:
        try:
            stat = os.stat(str(self._source.value))
        except OSError as error:
            raise SecretUnavailable(f"The key file {self._source.value} cannot be read ({error.strerror}).") from None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> str:
        kind, value = self._source
        if kind == "env":
            if not (found := self._environment.get(str(value))):
                raise SecretUnavailable(f"The environment variable {value} is not set.")
            return found
        if kind == "file":
            return self._content(Path(str(value)))
        if kind == "keyring":
            if find_spec("keyring") is None:
                raise SecretUnavailable(NO_KEYRING)
            # a process of its own: a locked keyring may wait for a person, and that has an end; -P: no keyring.py of the current folder
            return self._output([sys.executable, "-P", "-m", "keyring", "get", *str(value).partition("/")[::2]])
        return self._output(list(value))

    def _content(self, path: Path) -> str:
        try:
            if not path.is_file():  # a device may have no end, a pipe no writer
                raise SecretUnavailable(f"The key file {path} cannot be read (it is no file).")
            with path.open("rb") as file:
                return _bounded(file.read(SECRET_BYTES_MAX + 1), f"The key file {path}")
        except (OSError, UnicodeDecodeError) as error:
            raise SecretUnavailable(f"The key file {path} cannot be read ({type(error).__name__}).") from None

    def _output(self, command: list[str]) -> str:
        """Return a password manager's output. The program gets no other secret of the gateway's environment."""
        environment = {name: text for name, text in self._environment.items() if not self._is_withheld(name)}
        asked = self._asked(command)
        try:
            with subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as process:  # fmt: skip
                try:
                    printed = _printed(process)
                    code = process.wait(COMMAND_TIMEOUT_S)
                finally:
                    process.kill()
            text = _bounded(printed, asked)
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
            raise SecretUnavailable(f"{asked} failed ({type(error).__name__}).") from None
        if code:
            raise SecretUnavailable(f"{asked} ended with status {code}: is it unlocked, and does it hold the key?")
        return text

    def _is_withheld(self, name: str) -> bool:
        return name in self._withheld or name.startswith(("ANTHROPIC_", "GATEWAY_"))

    def _asked(self, command: list[str]) -> str:
        if self._source.kind == "keyring":
            return f"Asking the keyring for {self._source.value} (keyring set SERVICE USER puts a key there)"
        return f"The key command {command[0]}"


def _printed(process: subprocess.Popen[bytes]) -> bytes:
    """Return a program's output, up to a little more than a secret may have: then end it. Raises TimeoutExpired.

    A child of its own may hold the pipe open after it has ended, so the wait is for the pipe and not for the program.
    """
    assert process.stdout is not None
    pipe, printed, until = process.stdout.fileno(), b"", time.monotonic() + COMMAND_TIMEOUT_S
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    while len(printed) <= SECRET_BYTES_MAX:
        if not poller.poll(max(0.0, until - time.monotonic()) * 1000):
            raise subprocess.TimeoutExpired(process.args, COMMAND_TIMEOUT_S)
        if not (piece := os.read(pipe, SECRET_BYTES_MAX + 1)):
            return printed
        printed += piece
    process.kill()
    return printed


def _bounded(content: bytes, whose: str) -> str:
    """Return a source's content as text, without a byte order mark. Raises SecretUnavailable, UnicodeDecodeError."""
    if len(content) > SECRET_BYTES_MAX:
        raise SecretUnavailable(f"{whose} gives more than {SECRET_BYTES_MAX:,} bytes: that is no key. Name what holds the key alone.")
    return content.decode("utf-8-sig")


def _plain(text: str, secret: WatchedSecret) -> str:
    text = text.strip()
    if _ASSIGNED.match(text):
        raise SecretUnavailable(f"What {secret!r} gives is not a key: it begins with NAME=, as in a .env file. Put the key alone there.")
    if text[:1] in _QUOTES or text[-1:] in _QUOTES:
        raise SecretUnavailable(f"What {secret!r} gives is not a key: it has quotes around it. Put the key alone there.")
    if not text or not text.isascii() or any(character.isspace() for character in text):
        raise SecretUnavailable(f"What {secret!r} gives is not a key: it is empty or has spaces or line breaks in it.")
    return text


def conceal() -> None:
    """Keep other processes of this user from reading this one's memory and first environment.

    Child programs are kept out too; root is not. The setting is not inherited by a child.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


async def renew_when_due(secret: WatchedSecret, refused: asyncio.Event) -> None:
    """Renew a secret after a few minutes, or once the upstream has `refused` it. Raises SecretUnavailable; what was read before stays."""
    with suppress(TimeoutError):
        await asyncio.wait_for(refused.wait(), ASK_EVERY_S - ASK_AGAIN_S)
    refused.clear()
    await asyncio.to_thread(secret.renew)
