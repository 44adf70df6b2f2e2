"""The log: one plain line per thing worth saying, with no secret in it.

Promises that neither a token nor the real key passes a handler, whoever logs them: mitmproxy prints the bytes of a broken
request. An edge: it configures the process's logging.
"""

import logging
import sys
from collections.abc import Callable

from gateway_addon.identity import PATTERN

LOUD = ("mitmproxy.proxy.server", "mitmproxy.proxy.mode_servers", "hpack", "asyncio", "tornado", "quic")


class Masked(logging.Filter):
    """Replaces tokens and the key in a record, its arguments and its traceback. Lets every record pass."""

    def __init__(self, key: Callable[[], str]):
        super().__init__()
        self._key = key
        self._format = logging.Formatter()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.exc_info:
            record.exc_text = self.mask(record.exc_text or self._format.formatException(record.exc_info))
        masked = self.mask(message)
        if masked is not message:
            record.msg, record.args = masked, ()
        return True

    def mask(self, text: str) -> str:
        if "gwt_" in text:
            text = PATTERN.sub("gwt_***", text)
        try:
            key = self._key()
        except Exception:  # the key's source is broken, which is another line's news; nothing to hide then
            return text
        return text.replace(key, "***") if key in text else text


def mask(key: Callable[[], str]) -> None:
    """Mask what the handlers there are now write."""
    masked = Masked(key)
    for each in logging.getLogger().handlers:
        each.addFilter(masked)


def say_plainly(key: Callable[[], str], level: int = logging.INFO) -> None:
    """Log to stderr, masked: the gateway's own lines from `level` on, of the proxy's only what is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if type(handler).__module__.startswith("mitmproxy")]
    root.addHandler(handler)
    root.setLevel(level)
    mask(key)
    for name in LOUD:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
