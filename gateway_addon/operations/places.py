"""Where policies and ledger lie unless somebody says otherwise."""

from pathlib import Path


def project_folder() -> Path:
    """Return the checkout that this package runs from; for an installed package, a folder of the user's own."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").exists() else Path.home() / ".gateway"
