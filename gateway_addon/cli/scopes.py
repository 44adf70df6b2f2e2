"""Which app, team or total was meant: by the files' names and the ledger, so that a broken policy file stops no command."""

from pathlib import Path

from gateway_addon.cli.common import stop
from gateway_addon.ledger import LedgerUnavailable, admin, connect
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.operations.changes import unknown
from gateway_addon.operations.places import clone_folder
from gateway_addon.policy import outline

GIT_RESTORE = """If git pull took the policies away (they are no longer tracked), this brings them back:
  git restore --source=ORIG_HEAD policies/gateway.yaml policies/apps"""


def must_have_policies(policies: Path, ledger: str) -> None:
    """End the command where gateway.yaml is gone and the ledger knows apps: an upgrade of a clone once took tracked policies away."""
    if (policies / "gateway.yaml").exists():
        return
    try:
        with connect.reading(ledger_path(ledger)) as db:
            apps = admin.apps(db)
    except (LedgerUnavailable, ValueError):  # no ledger that could know any: the command that reads it says what is missing
        return
    if apps:
        clone = clone_folder()
        back = GIT_RESTORE if clone and policies.absolute() == clone / "policies" else "Put its files back, from your backup of them."
        stop(f"{policies / 'gateway.yaml'} is not there, and the ledger knows the apps {', '.join(apps)}. {back}")


def known_apps(db: connect.ReadConnection, policies: Path) -> list[str]:
    """Return the apps of the policy files and of the ledger."""
    return sorted({*outline(policies).apps, *admin.apps(db)})


def must_know(name: str, db: connect.ReadConnection, policies: Path) -> str:
    """Return an app's name as it is. Raises ValueError, with the nearest name, for one that neither files nor ledger know."""
    if name not in (known := known_apps(db, policies)):
        raise ValueError(unknown(name, "app", known))
    return name
