"""Names that somebody else chose (a client's model, session and agent; an answer's model, stop reason, tier and request id), as they
are kept and shown; and the one by which this program was called. Pure, but for the environment that says how it was called and installed.

Promises one rule for all of them: at most `NAME_CHARS_MAX` characters, with a visible end where more was cut off; nothing that a
terminal obeys, a line cannot hold or a database refuses; and no token that was pasted in the wrong place. The work is bounded by
that length, however long a name came.
"""

import os
import re
import shlex
import sys
from pathlib import Path

PROGRAM = os.environ.get("GATEWAY_COMMAND", "gateway")
"""This program as the person types it who started it: `run.sh` says how it was called, elsewhere it is installed. Hints begin with it."""

TOKEN_PREFIX = "gwt_"
TOKEN_PATTERN = re.compile(r"gwt_[0-9A-Za-z]{1,64}")
"""A token of the gateway's, or a piece of one, in a text that must not show it."""

LABEL_NAME = r"[a-z0-9][a-z0-9_-]{0,30}"
"""The name of a label, as policies, headers and statements hold it."""

NAME_CHARS_MAX = 200
"""Longer than any id of the API's (64 characters) or of Claude Code's (36)."""


NAME_FORM = "lower-case letters, digits, - and _, at most 63"
"""The form of a name in policies (policy/values.py: NAME), for sentences."""


def app_named(app: str) -> str:
    """Return an app as sentences name it: `init` calls the first one `app`, and nobody says "app app"."""
    return "the app 'app'" if app == "app" else f"app {app}"


def safe_name(text: str) -> str:
    """Return a name as it may be kept: itself, for every name that is meant well."""
    if len(text) <= NAME_CHARS_MAX and text.isprintable() and TOKEN_PREFIX not in text:  # nearly every one
        return text
    shown = masked(printable(text[:NAME_CHARS_MAX]))
    return shown if len(text) <= NAME_CHARS_MAX >= len(shown) else f"{shown[: NAME_CHARS_MAX - 1]}…"


def argument(value: str | Path) -> str:
    """Return a name or a path as a hint's command holds it: a person pastes that into a shell, and clients choose names."""
    return shlex.quote(str(value))


def install(*packages: str) -> str:
    """Return the command that puts packages beside this program: by what it was installed with itself."""
    names = " ".join(argument(each) for each in packages)
    if Path(sys.prefix, "pipx_metadata.json").exists():
        return f"pipx inject gateway-addon {names}"
    if Path(sys.prefix, "uv-receipt.toml").exists():
        return f"uv pip install --python {argument(sys.prefix)} {names}"
    pip = ".venv/bin/pip" if PROGRAM != "gateway" else f"{argument(sys.executable)} -m pip"
    return f"{pip} install {names}"


def printable(text: str) -> str:
    """Return a text with a mark in place of each character that is not to be seen: control characters, escapes, NUL, marks that turn
    the direction of writing, and the halves of surrogate pairs that stand for bytes which are no UTF-8."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def masked(text: str) -> str:
    """Return a text that may be shown: each token in it, or piece of one, reads `gwt_***`."""
    return TOKEN_PATTERN.sub(f"{TOKEN_PREFIX}***", text) if TOKEN_PREFIX in text else text
