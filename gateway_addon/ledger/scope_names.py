"""Write scopes as commands take them and as their sentences name them."""

import shlex

from gateway_addon.ledger.types import TOTAL, enclosing, part_of
from gateway_addon.names import PROGRAM


def typed(scope: str) -> str:
    """Return a scope as a command takes it: `reports`, `team:batch`, `coder --session 3f2a`."""
    return " ".join((enclosing(scope).removeprefix("app:"), *_options(scope)))


def paused_as(scope: str) -> str:
    """Return what was paused as `pause` and `resume` take it: `--all`, `reports`, `--session 3f2a` of any app."""
    return typed(scope).removeprefix(f"{TOTAL} ") if scope != TOTAL else "--all"


def named(scope: str) -> str:
    """Return a scope as a command's sentence names it: `reports`, `session 3f2a of coder`."""
    if (part := part_of(scope)) is None:
        return typed(scope)
    within = "any app" if enclosing(scope) == TOTAL else typed(enclosing(scope))
    return f"{part[0].removeprefix('label.')} {part[1]} of {within}"


def cap_command(change: str, scope: str, window: str, more: str) -> str:
    """Return the command that changes a cap: `gateway cap raise coder ever AMOUNT --until DATE --session 3f2a`."""
    return " ".join((PROGRAM, "cap", change, enclosing(scope).removeprefix("app:"), window, more, *_options(scope)))


def _options(scope: str) -> tuple[str, ...]:
    """Return the option that names a part, and its value as a shell takes it."""
    if (part := part_of(scope)) is None:
        return ()
    kind, _, label = part[0].partition(".")
    text = shlex.quote(f"{label}={part[1]}" if label else part[1])
    return (f"--{kind}={text}",) if text.startswith("-") else (f"--{kind}", text)
