"""The kinds of value that a policy key can have: how each is read, and how its JSON Schema reads.

One source for both, so that an editor's completion and the gateway's validation cannot drift apart. A kind reads a YAML node
into a value or raises PolicyError at its line.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode

from gateway_addon.money import AMOUNT_PATTERN, parse_nano
from gateway_addon.yaml_file import Problems, Spot, entries, items, scalar, suggestion

REQUIRED = object()
"""The default of a key that has none."""


@dataclass(frozen=True, slots=True)
class ValueKind:
    read: Callable[[Node, Spot], Any]
    schema: Mapping[str, Any]
    written: str
    """How a person writes it, for the reference of keys."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a policy file: the kind of its value, what it does, and what holds where it is absent."""

    kind: ValueKind
    help: str
    default: Any = REQUIRED
    keys: "Mapping[str, Key] | None" = None
    """The keys inside, for the reference."""


def text(pattern: str = r"\S(?:.*\S)?", what: str = "text") -> ValueKind:
    """Read text of one line that the whole `pattern` matches."""

    def read(node: Node, spot: Spot) -> str:
        value = scalar(node, spot)
        if re.fullmatch(pattern, value) is None:
            raise spot.error(node, f"{value!r} is not {what}")
        return value

    return ValueKind(read, {"type": "string", "pattern": f"^(?:{pattern})$"}, what)


def word(*words: str) -> ValueKind:
    """Read one of a few words."""

    def read(node: Node, spot: Spot) -> str:
        value = scalar(node, spot)
        if value not in words:
            raise spot.error(node, f"{value!r} is not a word known here{suggestion(value, words)}")
        return value

    return ValueKind(read, {"enum": list(words)}, " or ".join(f"`{name}`" for name in words))


def parsed(parse: Callable[[str], Any], schema: Mapping[str, Any], written: str) -> ValueKind:
    """Read a scalar by a function, which raises ValueError with a sentence for a wrong one."""

    def read(node: Node, spot: Spot) -> Any:
        try:
            return parse(scalar(node, spot))
        except ValueError as error:
            raise spot.error(node, str(error)) from None

    return ValueKind(read, schema, written)


def _count(value: str) -> int:
    match = re.fullmatch(r"([0-9][0-9_,]*)([kM]?)", value)
    if match is None or len(match[1]) > 12:
        raise ValueError(f"{value!r} is not a whole number; write one like 8192, 200k or 2M")
    return int(re.sub("[_,]", "", match[1])) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]


def _percent(value: str) -> int:
    match = re.fullmatch(r"([0-9]{1,3})%", value)
    if match is None or not 1 <= int(match[1]) <= 100:
        raise ValueError(f"{value!r} is not a share; write a whole percentage from 1% to 100%")
    return int(match[1])


def seconds(value: str) -> float:
    """Return a written duration in seconds. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(ms|s|m|h)", value)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{value!r} is not a duration; write one like 500ms, 10s, 5m or 1h")
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[match[2]]


def _boolean(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"{value!r} is neither true nor false")
    return value == "true"


COUNT = parsed(
    _count,
    {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9][0-9_,]*[kM]?$"}]},
    "a number (`200k`)",
)
PERCENT = parsed(_percent, {"type": "string", "pattern": "^[0-9]{1,3}%$"}, "a share (`80%`)")
SECONDS = parsed(seconds, {"type": "string", "pattern": r"^[0-9]{1,6}(\.[0-9]{1,3})?(ms|s|m|h)$"}, "a duration (`10s`)")
BOOLEAN = parsed(_boolean, {"type": "boolean"}, "`true` or `false`")
AMOUNT = parsed(
    parse_nano,
    {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": f"^{AMOUNT_PATTERN}$"}]},
    "an amount (`$5`)",
)


def listing(kind: ValueKind) -> ValueKind:
    """Read a list of values of one kind, as a tuple."""

    def read(node: Node, spot: Spot) -> tuple[Any, ...]:
        values, problems = [], Problems()
        for item in items(node, spot):
            with problems.noted():
                values.append(kind.read(item, spot))
        problems.say()
        return tuple(values)

    return ValueKind(read, {"type": "array", "items": kind.schema}, f"a list of {kind.written}")


def one_or_more(kind: ValueKind) -> ValueKind:
    """Read values of one kind, as a tuple; a single one may stand without its list."""
    several = listing(kind)

    def read(node: Node, spot: Spot) -> tuple[Any, ...]:
        return (kind.read(node, spot),) if isinstance(node, ScalarNode) else several.read(node, spot)

    return ValueKind(read, {"anyOf": [kind.schema, several.schema]}, f"{kind.written}, or a list")


def mapping(kind: ValueKind, what: str = "names", pattern: str | None = None) -> ValueKind:
    """Read values of one kind under names of the operator's choosing, which the whole `pattern` matches where there is one."""

    def read(node: Node, spot: Spot) -> Mapping[str, Any]:
        values, problems = {}, Problems()
        for name, (key, value) in entries(node, spot, problems=problems).items():
            with problems.noted():
                if pattern is not None and re.fullmatch(pattern, name) is None:
                    raise spot.at(name).error(key, "not a name; use lower-case letters, digits, - and _")
                values[name] = kind.read(value, spot.at(name))
        problems.say()
        return MappingProxyType(values)

    return ValueKind(read, {"type": "object", "additionalProperties": kind.schema}, f"{what}, each with {kind.written}")


def record(make: Callable[..., Any], keys: Mapping[str, Key]) -> ValueKind:
    """Read a fixed set of keys, handed to `make` by name."""

    def read(node: Node, spot: Spot) -> Any:
        if not isinstance(node, MappingNode):
            raise spot.error(node, f"expected keys: {', '.join(keys)}")
        problems = Problems()
        found = entries(node, spot, problems=problems)
        values = {name: key.default for name, key in keys.items() if name not in found}
        for name, (key_node, value) in found.items():
            with problems.noted():
                if name not in keys:
                    raise spot.at(name).error(key_node, f"unknown key{suggestion(name, keys)}")
                values[name] = keys[name].kind.read(value, spot.at(name))
        for name in [name for name, value in values.items() if value is REQUIRED]:
            with problems.noted():
                raise spot.error(node, f"{name} is missing: {keys[name].help}")
        problems.say()
        return make(**values)

    schema = {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, key in keys.items() if key.default is REQUIRED],
        "properties": {name: {**key.kind.schema, "description": key.help} for name, key in keys.items()},
    }
    return ValueKind(read, schema, "keys")


def either(plain: ValueKind, keyed: ValueKind) -> ValueKind:
    """Read a short form (one value) or a long form (keys)."""

    def read(node: Node, spot: Spot) -> Any:
        return (keyed if isinstance(node, MappingNode) else plain).read(node, spot)

    return ValueKind(read, {"anyOf": [plain.schema, keyed.schema]}, f"{plain.written}, or {keyed.written}")


def one_of(make: Callable[[Any, Any], Any], kinds: Mapping[str, ValueKind]) -> ValueKind:
    """Read exactly one of several keys, like `{env: NAME}`."""

    def read(node: Node, spot: Spot) -> Any:
        found = {} if isinstance(node, ScalarNode) else entries(node, spot)
        if len(found) != 1 or next(iter(found)) not in kinds:
            raise spot.error(node, "expected exactly one of " + ", ".join(f"{{{name}: {kind.written}}}" for name, kind in kinds.items()))
        ((name, (_, value)),) = found.items()
        return make(name, kinds[name].read(value, spot.at(name)))

    forms = [
        {"type": "object", "additionalProperties": False, "required": [name], "properties": {name: kind.schema}}
        for name, kind in kinds.items()
    ]
    return ValueKind(read, {"oneOf": forms}, " or ".join(f"`{{{name}: ...}}`" for name in kinds))
