"""The headers of a message, looked up without a detour: mitmproxy asks some twenty-five times a call, most often for what is not there.

Promises the answers of mitmproxy's own class, which lower-cases and decodes by a call of its own for each field. Knows nothing of the
gateway.
"""

from collections import defaultdict
from typing import Any

from mitmproxy import http


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


class Headers(http.Headers):
    _sorted: tuple[object, dict[bytes, list[bytes]]] = (None, {})
    """The fields as they were when they were last looked through, and their values by name in lower case."""

    @classmethod
    def of(cls, fields: tuple[tuple[bytes, bytes], ...]) -> "Headers":
        """Headers of fields that are known to be bytes: without a check of each."""
        made = cls.__new__(cls)
        made.fields = fields
        return made

    def __setitem__(self, key: str | bytes, value: str | bytes) -> None:
        name, content = _bytes(key), _bytes(value)
        lower, fields, known = name.lower(), [], False
        for field in self.fields:
            if field[0].lower() != lower:
                fields.append(field)
            elif not known:
                fields.append((field[0], content))
                known = True
        self.fields = tuple(fields) if known else (*fields, (name, content))

    def _values(self, name: str | bytes) -> list[bytes]:
        fields, values = self._sorted
        if fields is not self.fields:
            values = defaultdict(list)
            for field, value in self.fields:
                values[field.lower()].append(value)
            self._sorted = self.fields, values
        return values.get(_bytes(name).lower(), [])

    def get_all(self, name: str | bytes) -> list[str]:
        return [value.decode("utf-8", "surrogateescape") for value in self._values(name)]

    def get(self, key: str | bytes, default: Any = None) -> Any:
        values = self._values(key)
        return b", ".join(values).decode("utf-8", "surrogateescape") if values else default

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | bytes) and bool(self._values(key))


def quicken(message: http.Message) -> None:
    """Let a message that was just read look its headers up in this way."""
    if type(message.headers) is http.Headers:
        message.headers.__class__ = Headers
