"""mitmproxy's options, read without a copy: it asks for some twenty in each call, and copies each answer twice.

Promises the values of mitmproxy's own class, and a copy of what could be changed in place. Knows nothing of the gateway.
"""

from typing import Any

from mitmproxy import options, optmanager

READ_AS_THEY_ARE = frozenset((str, int, bool, type(None)))


class Options(options.Options):
    def __getattr__(self, name: str) -> Any:
        option = self.__dict__["_options"].get(name)
        if option is None:
            raise AttributeError(f"No such option: {name}")
        value = option._default if option.value is optmanager.unset else option.value
        return value if type(value) in READ_AS_THEY_ARE else option.current()


def made() -> options.Options:
    """Quick ones, where the installed mitmproxy keeps its options as they are read here."""
    fits = {"value", "_default"} <= set(getattr(optmanager._Option, "__slots__", ())) and hasattr(optmanager, "unset")
    return Options() if fits else options.Options()
