"""Limit mitmweb's page to changing how flows are shown; close all that could run code, move files or bypass the gateway.

Promises that both lists allow: an option or a command that a later mitmproxy adds is closed until a person has reviewed it. Pure
values.
"""

from collections.abc import Iterable
from typing import Any

from gateway_addon.names import PROGRAM

OPTIONS: dict[str, Any] = {
    "web_host": "127.0.0.1",
    "web_open_browser": False,
    "web_columns": ["timestamp", "status", "comment", "time"],  # beside a path, which takes all the room it can, a comment has none
    "store_streamed_bodies": True,
    "command_history": False,  # a file of what was typed
    "onboarding": False,  # would answer a host of its own, beside the gateway
}

LOOKING = frozenset({
    "anticache", "anticomp", "content_view_lines_cutoff", "intercept", "intercept_active", "show_ignored_hosts", "showhost",
    "view_filter", "view_order", "view_order_reversed", "web_columns",
})  # fmt: skip
"""Options that may be changed while it runs."""

NO_SCRIPTS = (
    "A script would run where the real key is, and could read it. Run it in a mitmdump of its own, between your app and this gateway."
)
FIXED = (
    "{0} cannot be changed while the gateway runs: that could open a way around it. "
    f"Start again with: {PROGRAM} web --set {{0}}=VALUE"
)

COMMANDS = (
    "gateway.", "flow.", "view.", "commands.history.", "replay.client", "replay.client.count", "replay.client.stop", "eventstore.clear",
    "export", "export.formats", "set", "options.reset.one", "proxyserver.active_connections", "readfile.reading",
)  # fmt: skip
"""Commands that stay: names, and beginnings of names where they end with a dot."""

READS_FILES = frozenset({"view.flows.load"})


def kept(names: Iterable[str]) -> set[str]:
    """Return the commands among these that the page keeps."""
    beginnings = tuple(each for each in COMMANDS if each.endswith("."))
    return {name for name in names if name in COMMANDS or name.startswith(beginnings)} - READS_FILES
