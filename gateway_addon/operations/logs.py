"""The log: one plain line per thing worth saying, with no secret in it.

Promises that neither a token nor the real key passes a handler, whichever logger writes them: mitmproxy prints the bytes of a broken
request. This module configures the process's logging.
"""

import json
import logging
import sys
from collections.abc import Callable

from gateway_addon.calls.record import CallRecord
from gateway_addon.names import masked

CALLS = logging.getLogger("gateway_addon.calls.record")
SEEN_BY_EACH = ("gateway_addon.operations.reload", "gateway_addon.proxy.server")
"""Modules whose lines each worker of a gateway would say in the same words."""
LOUD = ("mitmproxy.proxy.server", "mitmproxy.proxy.mode_servers", "hpack", "asyncio", "tornado", "quic")


FOREIGN_CHARACTERS_MAX = 300
"""Characters kept of one message of mitmproxy's: it prints bytes that it could not read, a TLS greeting as a page of digits."""


class MaskedFilter(logging.Filter):
    """Replace tokens and the key in a record, its arguments and its traceback, and shorten what mitmproxy says. Every record passes."""

    def __init__(self, key: Callable[[], str]):
        super().__init__()
        self._key = key
        self._format = logging.Formatter()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.exc_info:
            record.exc_text = self.mask(record.exc_text or self._format.formatException(record.exc_info))
        shown = self.mask(message)
        if record.name.startswith("mitmproxy.proxy") and len(shown) > FOREIGN_CHARACTERS_MAX:
            shown = f"{shown[:FOREIGN_CHARACTERS_MAX]}…"
        if shown is not message:
            record.msg, record.args = shown, ()
        return True

    def mask(self, text: str) -> str:
        text = masked(text)
        try:
            key = self._key()
        except Exception:  # the key's source is broken, which is another line's news; nothing to hide then
            return text
        return text.replace(key, "***") if key in text else text


def mask(key: Callable[[], str]) -> None:
    """Mask what the handlers there are now write."""
    masked = MaskedFilter(key)
    for each in logging.getLogger().handlers:
        each.addFilter(masked)


class JsonFormatter(logging.Formatter):
    """Each record as one line of JSON: a call's own record, or `{"event": "log", ...}` for a sentence."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.name == CALLS.name:
            return message
        said = {"event": "log", "at": round(record.created, 3), "level": record.levelname, "message": message}
        if record.exc_info or record.exc_text:
            said["exception"] = record.exc_text or self.formatException(record.exc_info)  # type: ignore[arg-type]
        return json.dumps(said)


def call_line(call: CallRecord) -> None:
    """Say a call, as a line of JSON."""
    CALLS.info("%s", json.dumps(call))


def say_plainly(key: Callable[[], str], level: int = logging.INFO, *, as_json: bool = False, repeats: bool = False) -> None:
    """Log to stderr, masked: the gateway's own lines from `level` on, of the proxy's only what is wrong.

    `repeats`: another worker logs what every worker sees (a saved policy, a signal).
    """
    for name in SEEN_BY_EACH if repeats else ():
        logging.getLogger(name).disabled = True
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S %Z"))
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if type(handler).__module__.startswith("mitmproxy")]
    root.addHandler(handler)
    root.setLevel(level)
    mask(key)
    for name in LOUD:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
