"""Read the labels that a request carries for the operator's own bookkeeping: in headers, or in its path. Pure.

    x-gateway-label-client: acme              a header for each label
    /l/client=acme,branch=main/v1/messages    in the base URL, for clients that can set nothing else

Promises that no label is longer than a name may be (names.py), that a request carries few, and that none leaves to the provider: they
are taken off the path before anything else reads it, and headers of the gateway's own stay here (header_filter.py). Knows nothing of
what a policy allows.
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple
from urllib.parse import unquote

from gateway_addon.names import LABEL_NAME, safe_name

LABELS_MAX = 16
"""Labels that are read of one request; more of them are none that an operator declared."""
HEADER_PREFIX = "x-gateway-label-"
PATH_HEADER = "x-gateway-path-labels"
"""Holds what stood in the path, on the request as it is judged: a client's own header of this name is taken off."""

_PAIR = rf"{LABEL_NAME}=(?:[A-Za-z0-9._~@:+-]|%[0-9A-Fa-f]{{2}}){{1,600}}"
_IN_PATH = re.compile(rf"/l/({_PAIR}(?:,{_PAIR}){{0,{LABELS_MAX - 1}}})(/.*)\Z", re.DOTALL)


class SaidLabel(NamedTuple):
    """A label as a request says it."""

    name: str
    value: str
    source: Literal["header", "path"]


def split_path(target: str) -> tuple[str, str]:
    """Return the labels that stand before a request's path, as they were written, and the path; "" where none do."""
    found = _IN_PATH.match(target) if target.startswith("/l/") else None
    return (found[1], found[2]) if found else ("", target)


def said_labels(headers: Iterable[tuple[str, str]]) -> tuple[SaidLabel, ...]:
    """Return the labels of a request, from its headers (names in lower case) and from its path. One without a value is none."""
    found = []
    for name, value in headers:
        if name.startswith(HEADER_PREFIX):
            found.append(SaidLabel(safe_name(name.removeprefix(HEADER_PREFIX)), safe_name(value.strip()), "header"))
        elif name == PATH_HEADER:
            pairs = (pair.partition("=") for pair in value.split(","))
            found += [SaidLabel(name, safe_name(unquote(text).strip()), "path") for name, _, text in pairs]
    return tuple([label for label in found if label.value][:LABELS_MAX])
