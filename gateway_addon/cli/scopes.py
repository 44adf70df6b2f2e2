"""Which app, team or total was meant: by the files' names and the ledger, so that a broken policy file stops no command."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from gateway_addon.cli.common import stop
from gateway_addon.ledger import LedgerUnavailable, admin, app_scope, connect, team_scope
from gateway_addon.ledger.reports.day_cache import ReadConnection
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.ledger.types import TOTAL
from gateway_addon.operations.places import clone_folder
from gateway_addon.policy import Outline, outline

GIT_RESTORE = """If git pull took the policies away (they are no longer tracked), this brings them back:
  git restore --source=ORIG_HEAD policies/gateway.yaml policies/apps"""


def must_have_policies(policies: Path, ledger: str) -> None:
    """End the command where gateway.yaml is gone and the ledger knows apps: an upgrade of a clone once took tracked policies away."""
    if (policies / "gateway.yaml").exists():
        return
    try:
        with connect.reading(ledger_path(ledger)) as db:
            apps = admin.apps(db)
    except (LedgerUnavailable, ValueError):  # no ledger that could know any: what is missing is said by whoever reads it
        return
    if apps:
        clone = clone_folder()
        back = GIT_RESTORE if clone and policies.absolute() == clone / "policies" else "Put its files back, from your backup of them."
        stop(f"{policies / 'gateway.yaml'} is not there, and the ledger knows the apps {', '.join(apps)}. {back}")


def known_apps(db: ReadConnection, policies: Path) -> list[str]:
    """Return the apps of the policy files and of the ledger."""
    return sorted({*outline(policies).apps, *admin.apps(db)})


def must_know(name: str, db: ReadConnection, policies: Path) -> str:
    """Return an app's name as it is. Raises ValueError, with the nearest name, for one that neither files nor ledger know."""
    if name not in (known := known_apps(db, policies)):
        raise ValueError(_unknown(name, "app", known))
    return name


def scope_of(name: str, db: ReadConnection, found: Outline) -> str:
    """Return the ledger's scope for APP, team:NAME or total. Raises ValueError for what neither files nor ledger know."""
    if name == TOTAL:
        return TOTAL
    kind, colon, team = name.partition(":")
    if colon and kind == "team":
        known = {*admin.teams(db), *(scope.removeprefix("team:") for scope in found.caps if scope.startswith("team:"))}
        if team not in known:
            raise ValueError(_unknown(team, "team", known))
        return team_scope(team)
    if name not in (apps := {*found.apps, *admin.apps(db)}):
        raise ValueError(_unknown(name, "app", apps))
    return app_scope(name)


def typed(scope: str) -> str:
    """Return a scope as it is typed: `app:reports` is `reports`."""
    return scope.removeprefix("app:")


def _unknown(name: str, what: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"no {what} {name!r}: did you mean {near[0]}?" if near else f"no {what} {name!r}; known: {', '.join(names) or 'none yet'}"
