"""The reference of every policy key as Markdown, for the handbook: from the table that validates them."""

from collections.abc import Iterator, Mapping

from gateway_addon.policy.keys import APP, GATEWAY
from gateway_addon.policy.kinds import REQUIRED, Key


def reference() -> str:
    """Return two tables: policies/gateway.yaml and policies/apps/APP.yaml."""
    files = {"policies/gateway.yaml": GATEWAY, "policies/apps/APP.yaml": APP}
    return "\n".join(line for file, keys in files.items() for line in _table(file, keys))


def _table(file: str, keys: Mapping[str, Key]) -> Iterator[str]:
    yield from (f"`{file}`", "", "| key | value | |", "|---|---|---|")
    yield from _rows("", keys)
    yield ""


def _rows(prefix: str, keys: Mapping[str, Key]) -> Iterator[str]:
    for name, key in keys.items():
        absent = " Must be given." if key.default is REQUIRED else f" Default: `{key.default}`." if isinstance(key.default, str) else ""
        yield f"| `{prefix}{name}` | {key.kind.written} | {key.help}.{absent} |"
        yield from _rows(f"{prefix}{name}.", key.keys or {})
