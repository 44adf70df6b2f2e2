"""The headers of a message, looked up without a detour: mitmproxy asks some twenty-five times a call, most often for what is not there.

Promises the answers of mitmproxy's own class, which lower-cases and decodes by a call of its own for each field. Knows nothing of the
gateway.
"""

from typing import Any

from mitmproxy import http


class Headers(http.Headers):
    def get_all(self, name: str | bytes) -> list[str]:
        wanted = (name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")).lower()
        return [value.decode("utf-8", "surrogateescape") for field, value in self.fields if field.lower() == wanted]

    def get(self, key: str | bytes, default: Any = None) -> Any:
        values = self.get_all(key)
        return ", ".join(values) if values else default

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | bytes) and bool(self.get_all(key))


def quicken(message: http.Message) -> None:
    """Let a message that was just read look its headers up in this way."""
    if type(message.headers) is http.Headers:
        message.headers.__class__ = Headers
