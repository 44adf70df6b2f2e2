"""Where policies and ledger lie unless somebody says otherwise. An edge: it looks at the environment and at what is there.

Promises one rule: in a clone of the repository its folder; else `~/.gateway` where that already holds policies or a ledger; else
the folders that the XDG base directories name (https://specifications.freedesktop.org/basedir-spec/latest/). Where both of the
latter hold something no choice is made: an empty ledger would begin every cap anew.
"""

from dataclasses import dataclass
from pathlib import Path

from gateway_addon.ledger.store.sqlite_files import at_home

LEDGER = "gateway.db"


@dataclass(frozen=True, slots=True)
class Places:
    """The defaults of `--policies` and `--ledger`, and the reason in words."""

    policies: Path
    ledger: Path
    why: str


class PlacesUnclear(Exception):
    """Two places hold policies or a ledger. The message names both, and the way out."""


def clone_folder() -> Path | None:
    """Return the clone of the repository that this package runs from; None for an installed package."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").exists() and (folder / "run.sh").exists() else None


def examples_folder() -> Path:
    """Return the folder of the commented example policies: the clone's, or the copy that came with the package."""
    clone = clone_folder()
    return clone / "policies" / "examples" if clone else Path(__file__).resolve().parents[1] / "policy" / "examples"


def places() -> Places:
    """Return where policies and ledger lie by default. Raises PlacesUnclear."""
    if clone := clone_folder():
        return Places(clone / "policies", clone / LEDGER, "this is a clone, and they lie in it")
    old = Path.home() / ".gateway"
    before = Places(old / "policies", old / LEDGER, "~/.gateway holds them already")
    config, data = at_home("XDG_CONFIG_HOME", ".config"), at_home("XDG_DATA_HOME", ".local/share")
    now = Places(config / "policies", data / LEDGER, "the XDG folders of this user")
    if not _found(before):
        return now
    if not (second := _found(now)):
        return before
    raise PlacesUnclear(
        f"There are two gateways: {_found(before)} and {second}. Which one holds is yours to say: move the other away, "
        "or name policies and ledger (--policies and --ledger, or GATEWAY_POLICIES and GATEWAY_LEDGER)."
    )


def _found(place: Places) -> Path | None:
    """Return what is there of a place; the ledger before the policies."""
    return next((path for path in (place.ledger, place.policies) if path.exists()), None)
