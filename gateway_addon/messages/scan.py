"""Count a request body's contents in one walk: the facts that policy rules and the quote rest on.

Promises to overlook nothing that can spend because of its place: every object is looked up in `schema`,
wherever it is, except inside the free zones (schemas, tool arguments), which the provider reads as text. Judges nothing.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gateway_addon.messages.schema import (
    BODY_FEATURES,
    BY_FIELD,
    ENCODED_PARENTS,
    FREE,
    FREE_IN,
    MAPS,
    TYPES,
    UNTYPED,
    Effect,
    ObjectSchema,
)

DEPTH_MAX = 64
"""Deeper than any request of the SDK's types outside its free zones (about 12); a depth bomb is not a request."""

USES_MAX = 1_000
"""Settings, tools and blocks that a policy must name, in one request: ten times what a long conversation with files and searches has."""
MODELS_MAX = 100
"""Other models that one request may name: the API takes a handful."""
UNKNOWN_KEPT = 10
"""Unknown fields that are remembered by their places: sentences show five."""
STEP_CHARACTERS_MAX = 64
"""Length of a step in a written path: a key may be as long as the body, and stand above a million objects."""

Path = tuple["Path", str | int] | None
"""A place in the body. Linked, because only the few paths that a sentence names are written out."""


@dataclass(frozen=True, slots=True)
class FeatureUse:
    """One thing in a request that a policy must name: the feature, where it stands, and the value itself."""

    feature: str
    where: str
    value: Any
    effect: Effect = Effect.NONE

    @property
    def is_tool(self) -> bool:
        """Return whether the use is a tool that may run, not a setting or the echo of an earlier answer."""
        return self.effect in (Effect.SERVER_TOOL, Effect.TYPED_TOOL)


@dataclass(slots=True)
class RequestScan:
    """The contents of a body. Filled by `scan_request()`, read-only afterwards."""

    messages: int = 0
    blocks: int = 0
    """Typed objects of any sort: never fewer than the content blocks."""
    images: int = 0
    typed_tools: int = 0
    pdfs: int = 0
    encoded_bytes: int = 0
    """Base64 of images and PDFs: bytes of the body that are not text."""
    cache_control: bool = False
    hour_ttl: bool = False
    uses: list[FeatureUse] = field(default_factory=list)
    models: list[tuple[str, Any]] = field(default_factory=list)
    """Other models that the request can reach, as (where, id)."""
    references: dict[str, int] = field(default_factory=dict)
    """How often a tool's definition is expanded where it is referred to, by the tool's name."""
    definitions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The tools that are defined, in `tools` or inside a message, by name."""
    files: list[str] = field(default_factory=list)
    """Ids of files at the provider, wherever one is named, in unknown objects and fields too; not those in the echo of an answer."""
    unknown: list[str] = field(default_factory=list)
    """Fields and types that the table does not know, by path: the first of them."""

    def expanded(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield each definition that is referred to, and how often."""
        return ((tool, times) for name, times in self.references.items() for tool in self.definitions.get(name, ()))


def scan_request(body: dict[str, Any]) -> RequestScan:
    """Scan a request's body. Raises ValueError, with a sentence, for one that nests deeper or uses more than any request."""
    seen = RequestScan()
    messages = body.get("messages")
    seen.messages = len(messages) if isinstance(messages, list) else 0
    _body_features(body, seen)
    for tool in body["tools"] if isinstance(body.get("tools"), list) else ():
        _define(tool, seen)
    stack: list[tuple[Any, str, Path, int]] = [(body, "", None, 0)]
    while stack:
        node, name, path, depth = stack.pop()
        if depth > DEPTH_MAX:
            raise ValueError(f"the body is nested deeper than {DEPTH_MAX} levels at {_written(path)[:80]}")
        if len(seen.uses) > USES_MAX or len(seen.models) > MODELS_MAX:
            limits = f"{USES_MAX:,} features and names at most {MODELS_MAX} other models"
            raise ValueError(f"the body has too much for one request, which uses at most {limits} here; send several requests")
        if isinstance(node, list):
            walked = ((i, item) for i, item in enumerate(node) if isinstance(item, _NESTED) and not _passed_over(item, name, seen))
            stack.extend([(item, name, (path, i), depth + 1) for i, item in walked])
            continue
        free = _look_up(node, name, path, seen)
        for key, value in node.items():
            if isinstance(value, _NESTED) and key not in free:
                if key in MAPS and isinstance(value, dict):
                    inner = [(entry, key, ((path, key), label), depth + 2) for label, entry in value.items()]
                    stack.extend(entry for entry in inner if isinstance(entry[0], _NESTED))
                else:
                    stack.append((value, key, (path, key), depth + 1))
    seen.typed_tools += sum(times for tool, times in seen.expanded() if tool.get("type") not in (None, "custom"))
    return seen


_NESTED = (dict, list)


def _passed_over(item: Any, name: str, seen: RequestScan) -> bool:
    """Count a message or block of mere text, as most are, without walking it; False for anything else."""
    if type(item) is not dict or len(item) != 2:
        return False
    if name == "messages":
        return type(item.get("role")) is str and type(item.get("content")) is str
    if name == "content" and item.get("type") == "text" and type(item.get("text")) is str:
        seen.blocks += 1
        return True
    return False


def _look_up(node: dict[str, Any], name: str, path: Path, seen: RequestScan) -> frozenset[str]:
    """Note one object; return its fields that are free zones. An unknown object has none."""
    kind = _kind(node, name)
    _note_cache(node, path, seen)
    if "file_id" in node and (kind is None or kind.effect is Effect.OUTSIDE or "file_id" not in kind.fields):
        seen.files.append(file_id if isinstance(file_id := node["file_id"], str) else _shown(file_id))
    if kind is None:
        _note_unknown(seen, path, f" (type {_shown(node['type'])})" if "type" in node else " (an object)")
        type_name = node.get("type")
        family = _FAMILIES.get(_DATE.sub("", type_name)) if isinstance(type_name, str) else None
        if family is not None:
            _note(node, family, name, path, seen)
        return frozenset()
    if not node.keys() <= kind.fields:
        odd = [key for key in node if key not in kind.fields and (key != "type" or node[key] is not None)]
        for key in odd[:UNKNOWN_KEPT]:
            _note_unknown(seen, (path, key))
    _note(node, kind, name, path, seen)
    return kind.free


def _kind(node: dict[str, Any], name: str) -> ObjectSchema | None:
    """Return the schema row of an object: by its type, or by the field that holds it. None: unknown."""
    type_name = node.get("type")
    if type_name is None or name in BY_FIELD:
        return _UNTYPED.get(name)
    return _TYPED.get(type_name) if isinstance(type_name, str) else None


_UNTYPED: Mapping[str, ObjectSchema] = {name: ObjectSchema(fields, free=fields & FREE) for name, fields in UNTYPED.items()}
_TYPED: Mapping[str, ObjectSchema] = {
    name: replace(kind, fields=kind.fields | {"type"}, free=kind.fields & (FREE | {FREE_IN.get(name, "")})) for name, kind in TYPES.items()
}
"""The tables of `schema`, with the facts that the walk needs of each row worked out once."""

_DATE = re.compile(r"_[0-9]{8}\Z")
_FAMILIES: Mapping[str, ObjectSchema] = {_DATE.sub("", name): kind for name, kind in TYPES.items() if kind.effect is not Effect.NONE}
"""Tools without their version. A new version does what the old one did: it needs the feature even if unknown fields pass."""


def _note_cache(node: dict[str, Any], path: Path, seen: RequestScan) -> None:
    """Note a cache write. An unknown lifetime is taken for the dearest."""
    if "ttl" in node or node.get("type") == "ephemeral":
        seen.cache_control = True
        seen.hour_ttl = seen.hour_ttl or node.get("ttl") not in (None, "5m")
        if node.get("ttl") not in (None, "5m", "1h"):
            _note_unknown(seen, (path, "ttl"), f" ({_shown(node['ttl'])})")


def _note_unknown(seen: RequestScan, path: Path, what: str = "") -> None:
    if len(seen.unknown) < UNKNOWN_KEPT:
        seen.unknown.append(_written(path) + what)


def _shown(value: object) -> str:
    """Return a value for a sentence. A nested one is not written out: it may be the whole body."""
    return f"a {type(value).__name__}" if isinstance(value, _NESTED) else repr(value[:80] if isinstance(value, str) else value)


def _note(node: dict[str, Any], kind: ObjectSchema, name: str, path: Path, seen: RequestScan) -> None:
    type_name = node.get("type")
    if type_name == "tool_reference":
        for tool in {str(node[key]) for key in ("tool_name", "name") if key in node}:
            seen.references[tool] = seen.references.get(tool, 0) + 1
    elif type_name == "tool_definition":
        _define(node.get("definition"), seen)
    if type_name is None or name == "caller":  # a `caller` says by a tool's type who called, and is no tool
        return
    seen.blocks += 1
    if kind.feature is not None:
        seen.uses.append(FeatureUse(kind.feature, _written(path), node, kind.effect))
    if kind.effect is Effect.TYPED_TOOL or kind.effect is Effect.SERVER_TOOL:
        seen.typed_tools += 1
    if kind.feature == "advisor" and kind.effect is Effect.TYPED_TOOL:
        seen.models.append((_written((path, "model")), node.get("model")))
    if type_name in ENCODED_PARENTS:
        _encoded(node, seen)


def _define(tool: Any, seen: RequestScan) -> None:
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        seen.definitions.setdefault(tool["name"], []).append(tool)


def _encoded(node: dict[str, Any], seen: RequestScan) -> None:
    """Count the base64 bytes of an image or document: they are not text. Anything but plain ASCII counts as text."""
    source = node.get("source")
    data = source.get("data") if isinstance(source, dict) and source.get("type") == "base64" else None
    seen.images += node["type"] == "image"
    seen.pdfs += node["type"] == "document" and data is not None
    if isinstance(data, str) and data.isascii():
        seen.encoded_bytes += len(data)


def _body_features(body: dict[str, Any], seen: RequestScan) -> None:
    """Note the top-level fields that a policy must name."""
    for name, feature in BODY_FEATURES.items():
        if body.get(name) not in (None, []):
            seen.uses.append(FeatureUse(feature, name, body[name]))
    fallbacks = body.get("fallbacks")
    attempts = [entry for entry in fallbacks if isinstance(entry, dict)] if isinstance(fallbacks, list) else []
    seen.models.extend((f"fallbacks[{i}].model", entry.get("model")) for i, entry in enumerate(attempts))
    for where, holder in (("speed", body), *((f"fallbacks[{i}].speed", entry) for i, entry in enumerate(attempts))):
        if holder.get("speed") not in (None, "standard"):
            seen.uses.append(FeatureUse("fast", where, holder["speed"]))
    if body.get("service_tier") not in (None, "auto", "standard_only"):  # these two never raise the price
        seen.uses.append(FeatureUse("service_tier", "service_tier", body["service_tier"]))
    if body.get("inference_geo") not in (None, "global"):
        seen.uses.append(FeatureUse("inference_geo", "inference_geo", body["inference_geo"]))


def _written(path: Path) -> str:
    steps: list[str] = []
    while path is not None:
        path, step = path
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step[:STEP_CHARACTERS_MAX]}")
    return "".join(reversed(steps)).removeprefix(".") or "the body"
