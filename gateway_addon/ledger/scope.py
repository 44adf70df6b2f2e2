"""Build scopes, take them apart, and name them for people.

A scope is where calls count together: `total` (every call), `team:NAME`, `app:NAME`, or a part of an app, `app:NAME KIND:VALUE`.
Three forms name one: `typed` as a command takes it, `named` in a command's own sentence, `named_in_full` in a sentence that is read
elsewhere: in a client's error, an alert. Pure.
"""

import shlex
from collections.abc import Callable

from gateway_addon.names import PROGRAM, app_named

TOTAL = "total"

type AppPart = tuple[str, str]
"""A part of an app that a call belongs to: its kind (session, agent, user, model, token, label.NAME) and its value."""


def app_scope(app: str) -> str:
    return f"app:{app}"


def team_scope(team: str) -> str:
    return f"team:{team}"


def part_scope(app: str, part: AppPart) -> str:
    return part_within(app_scope(app), part)


def part_within(scope: str, part: AppPart) -> str:
    """Return the scope of a part within an app's, or within `total`: a pause of a session may be one of any app."""
    return f"{scope} {part[0]}:{part[1]}"


def scopes(app: str, team: str | None) -> tuple[str, ...]:
    """Return every scope in which an app's calls count."""
    return (TOTAL, app_scope(app), *((team_scope(team),) if team else ()))


def enclosing(scope: str) -> str:
    """Return the scope of the app that a part belongs to; any other scope as it is."""
    return scope.partition(" ")[0]


def part_of(scope: str) -> AppPart | None:
    """Return the part that a scope names, None for one that is no part of an app."""
    kind, _, value = scope.partition(" ")[2].partition(":")
    return (kind, value) if kind else None


def typed(scope: str) -> str:
    """Return a scope as a command takes it: `reports`, `team:batch`, `coder --session 3f2a`."""
    return " ".join((enclosing(scope).removeprefix("app:"), *_options(scope)))


def paused_as(scope: str) -> str:
    """Return what was paused as `pause` and `resume` take it: `--all`, `reports`, `--session 3f2a` of any app."""
    return typed(scope).removeprefix(f"{TOTAL} ") if scope != TOTAL else "--all"


def named(scope: str) -> str:
    """Return a scope as a command's sentence names it: `reports`, `session 3f2a of coder`."""
    return _part_named(scope, typed) or typed(scope)


def named_in_full(scope: str) -> str:
    """Return a scope as any other sentence names it: `app reports`, `session 3f2a of app coder`, `all apps together`."""
    kind, _, name = scope.partition(":")
    whole = app_named(name) if kind == "app" else f"{kind} {name}" if name else "all apps together"
    return _part_named(scope, named_in_full) or whole


def cap_command(change: str, scope: str, window: str, more: str) -> str:
    """Return the command that changes a cap: `gateway cap raise coder ever AMOUNT --until DATE --session 3f2a`."""
    return " ".join((PROGRAM, "cap", change, enclosing(scope).removeprefix("app:"), window, more, *_options(scope)))


def _part_named(scope: str, name: Callable[[str], str]) -> str:
    """Return a part of an app as a sentence names it, its app as `name` does; "" for a scope that is no part."""
    if (part := part_of(scope)) is None:
        return ""
    within = "any app" if enclosing(scope) == TOTAL else name(enclosing(scope))
    return f"{part[0].removeprefix('label.')} {part[1]} of {within}"


def _options(scope: str) -> tuple[str, ...]:
    """Return the option that names a part, and its value as a shell takes it."""
    if (part := part_of(scope)) is None:
        return ()
    kind, _, label = part[0].partition(".")
    text = shlex.quote(f"{label}={part[1]}" if label else part[1])
    return (f"--{kind}={text}",) if text.startswith("-") else (f"--{kind}", text)
