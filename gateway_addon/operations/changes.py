"""Raise and limit caps for the commands and the console: whom a name means, and what the policy files leave to change.

Promises that a change without an effect is refused with a sentence that says why. Every function takes a connection inside a write
transaction, and writes through the ledger's own functions, which audit.
"""

import difflib
from collections.abc import Iterable, Mapping
from datetime import tzinfo
from typing import NamedTuple

from gateway_addon.ledger import admin, app_scope, team_scope
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.scope import TOTAL, cap_command, enclosing, named, part_of, typed
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.types import Limit, Raise
from gateway_addon.money import dollars
from gateway_addon.policy import Outline
from gateway_addon.windows import Window, during, per, shown


class CapRaised(NamedTuple):
    """A raise that was made, those that it adds to, and all of them together. `base_nano`: the policy's cap, where it can be read."""

    made: Raise
    beside: tuple[Raise, ...]
    together_nano: int
    base_nano: int | None


class HeldDown(ValueError):
    """A limit would keep a raise from having its whole effect."""

    def __init__(self, limit: Limit, calendar: tzinfo) -> None:
        why = f" ({limit.why})" if limit.why else ""
        super().__init__(
            f"{named(limit.scope)} is limited to {dollars(limit.amount_nano)} {per(limit.window)} by {limit.who} since "
            f"{shown(limit.since, calendar)}{why}, so a raise would add nothing, or less than its amount."
        )


def scope_of(name: str, db: Connection, found: Outline) -> str:
    """Return the ledger's scope for APP, team:NAME or total. Raises ValueError for what neither files nor ledger know."""
    if name == TOTAL:
        return TOTAL
    kind, colon, team = name.partition(":")
    if colon and kind == "team":
        known = {*admin.teams(db), *(scope.removeprefix("team:") for scope in found.caps if scope.startswith("team:"))}
        if team not in known:
            raise ValueError(unknown(team, "team", known))
        return team_scope(team)
    if name not in (apps := {*found.apps, *admin.apps(db)}):
        raise ValueError(unknown(name, "app", apps))
    return app_scope(name)


def unknown(name: str, what: str, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not known, with the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"no {what} {name!r}: did you mean {near[0]}?" if near else f"no {what} {name!r}; known: {', '.join(names) or 'none yet'}"


def caps_of(db: Connection, found: Outline, scope: str) -> Mapping[Window, int] | None:
    """Return the caps of a scope by the policy, and the one that a token was issued with; None where a file cannot be read now."""
    caps, part = found.caps_of(scope), part_of(scope)
    if caps is None or part is None or part[0] != "token":
        return caps
    own_nano = next((each.cap_nano for each in admin.tokens(db, typed(enclosing(scope))) if str(each.id) == part[1]), None)
    return caps if own_nano is None else {**caps, "ever": min(own_nano, caps.get("ever", own_nano))}


def base_nano(db: Connection, found: Outline, scope: str, window: str) -> int | None:
    """Return the policy's cap; None where its file cannot be read now. Raises ValueError where there is none to change."""
    caps = caps_of(db, found, scope)
    if caps is None:
        return None
    if window not in caps:
        place = "its policy file" if (part := part_of(scope)) is None else f"the policy file of its app (each.{part[0]})"
        raise ValueError(
            f"{named(scope)} has no cap {during(window)} to change; its caps: {', '.join(caps) or 'none'}. Write one in {place}"
        )
    return caps[window]


def raise_cap(
    db: Connection, found: Outline, scope: str, window: str, amount_nano: int, *, until: float, replace: int | None = None,
    lift_limit: bool = False, who: str, why: str, now: float,
) -> CapRaised:  # fmt: skip
    """Add an amount on top of a cap until a time, in place of another raise or beside those in force.

    Raises ValueError for a cap that is not there, and HeldDown where a limit binds that is not to be lifted.
    """
    policy_nano = base_nano(db, found, scope, window)
    if replace is not None:
        replaced = admin.withdraw_raise(db, replace, who=who, why=why or "replaced", now=now)
        if (replaced.scope, replaced.window) != (scope, window):
            of = f"{named(replaced.scope)} {replaced.window}"
            raise ValueError(f"raise {replace} is of {of}, not of {named(scope)} {window}: nothing was changed")
    beside = tuple(each for each in admin.raises(db, now=now) if (each.scope, each.window) == (scope, window))
    together_nano = amount_nano + sum(each.amount_nano for each in beside)
    limit = next((each for each in admin.limits(db) if (each.scope, each.window) == (scope, window)), None)
    if limit and lift_limit:
        admin.lift_limit(db, scope, window, who=who, why=why, now=now)
    elif limit and (policy_nano is None or limit.amount_nano < policy_nano + together_nano):
        raise HeldDown(limit, zone(db))
    made = admin.raise_cap(db, scope, window, amount_nano, until=until, who=who, why=why, now=now)
    return CapRaised(made, beside, together_nano, policy_nano)


def limit_cap(
    db: Connection, found: Outline, scope: str, window: str, amount_nano: int, *, who: str, why: str, now: float
) -> Limit | None:
    """Lower a cap to an amount until the limit is lifted; returns the limit before. Raises ValueError where that would raise it."""
    policy_nano = base_nano(db, found, scope, window)
    if policy_nano is not None and amount_nano > policy_nano:
        way_out = cap_command("raise", scope, window, "AMOUNT --until DATE")
        raise ValueError(f"a limit lowers a cap, and {named(scope)} has {dollars(policy_nano)} {per(window)}: to raise it, {way_out}")
    return admin.limit_cap(db, scope, window, amount_nano, who=who, why=why, now=now)
