"""Read prices.yaml, with the operator's `policies/prices.yaml` over it, into the table in force.

Promises that a table with a typo never comes into force: unknown or doubled keys, prices per token or per thousand instead
of per million, prices of nothing, dates out of order are each an error with file, line and key. Numbers are read as the
text that was written, straight into exact fractions.
"""

import hashlib
import re
from datetime import UTC, date, datetime
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from yaml.nodes import MappingNode, Node

from gateway_addon.pricing.table import LongPrompt, PriceError, PriceRow, Prices, Rates
from gateway_addon.yaml_file import FileError, Spot, compose, entries, items, scalar

SHIPPED = Path(__file__).parent / "prices.yaml"
LISTED_BY = "https://api.anthropic.com"
"""The upstream whose list prices the shipped table holds."""

# The cheapest input ever sold is $0.10 per million, its cache reads $0.01; the dearest output $125. A price per token
# (0.000005) or per thousand (0.003) falls below these bounds, one in nano-dollars or cents of something above them.
_DOLLARS_MIN = {
    "input": Fraction("0.02"),
    "output": Fraction("0.05"),
    "write_5m": Fraction("0.01"),
    "write_1h": Fraction("0.01"),
    "read": Fraction("0.001"),
}
_DOLLARS_MAX = 1000
_NANO_PER_TOKEN = 1000  # $1 per million tokens

_KINDS = tuple(_DOLLARS_MIN)
_SHIPPED_KEYS = ("checked", "sources", "factors", "web_search", "assumed", "models")
_OVERRIDE_KEYS = ("multiplier", "assumed", "models")
_ASSUMED_KEYS = ("output_tokens_per_second_max", "lag_s", "turn_s_min")
_MODEL_KEYS = (
    "source", "aliases", "snapshot", "context_tokens", "output_tokens_max", "fast", "geo", "high_resolution", "retired",
    "fast_retired", *_ASSUMED_KEYS, "pace_source", "prices",
)  # fmt: skip


class _Entry(NamedTuple):
    """A value as written, with the file and path that an error about it names."""

    node: Node
    spot: Spot


type _Model = dict[str, _Entry]


class _Common(NamedTuple):
    """The settings that all models share."""

    batch: Fraction
    geo_us: Fraction
    web_search_nano: Fraction
    multiplier: Fraction
    assumed: dict[str, _Entry]


def load(path: Path | None = None, override_path: Path | None = None, upstream: str = LISTED_BY) -> Prices:
    """Read the price table: the shipped one unless `path` is given, and the operator's file over it if there is one.

    An override names models by the keys that it changes (`prices:` replaces all rows of the model); a model that the shipped
    table does not have needs all keys. `multiplier` (above 0) scales all that is billed, web searches too: one number, or one for each
    upstream, of which that of `upstream` holds. Raises PriceError.
    """
    files = [(path or SHIPPED, _SHIPPED_KEYS)] + ([(override_path, _OVERRIDE_KEYS)] if override_path else [])
    contents = tuple(("/".join(file.parts[-2:]), _content(file), known) for file, known in files)
    return _read(contents, upstream if override_path else LISTED_BY)


@lru_cache(maxsize=4)
def _read(files: tuple[tuple[str, bytes, tuple[str, ...]], ...], upstream: str) -> Prices:
    """Read these bytes into a table, once: a saved policy does not read them again."""
    documents = []
    try:
        for file, content, known in files:
            spot = Spot(file)
            document = entries(compose(file, content.decode()), spot, known)
            documents.append({key: _Entry(node, spot.at(key)) for key, (_, node) in document.items()})
            if known is _SHIPPED_KEYS and (missing := [key for key in known if key not in document]):
                raise spot.error(None, f"{missing[0]} is missing: the table itself needs it, an override does not")
        digest = hashlib.sha256(b"".join(content for _, content, _ in files)).hexdigest()
        return _table(documents[0], documents[1] if len(documents) > 1 else {}, upstream, digest)
    except FileError as error:
        raise PriceError(str(error)) from None


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        content.decode()
    except OSError as error:
        raise PriceError(f"{file.name}: not readable: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PriceError(f"{file.name}: not UTF-8") from None
    return content


def _table(shipped: dict[str, _Entry], override: dict[str, _Entry], upstream: str, digest: str) -> Prices:
    factors = _mapping(shipped["factors"], ("batch", "geo_us"))
    assumed = _mapping(shipped["assumed"], _ASSUMED_KEYS)
    if "assumed" in override:
        assumed |= _mapping(override["assumed"], _ASSUMED_KEYS)
    common = _Common(
        batch=_number(factors["batch"]),
        geo_us=_number(factors["geo_us"]),
        web_search_nano=_number(shipped["web_search"]) * 1_000_000,  # dollars per thousand
        multiplier=_multiplier(override["multiplier"], upstream) if "multiplier" in override else Fraction(1),
        assumed=assumed,
    )
    models = _models(shipped)
    for model, (place, keys) in _models(override).items():
        models[model] = (place, models[model][1] | keys if model in models else keys)
    rows = {model: _rows(model, place, keys, common) for model, (place, keys) in models.items()}
    starts = {model: tuple(_unix(row.since) for row in ordered) for model, ordered in rows.items()}
    aliases = _aliases({model: keys for model, (_, keys) in models.items()})
    snapshots = {model: scalar(*keys["snapshot"]) for model, (_, keys) in models.items() if "snapshot" in keys}
    checked = scalar(*shipped["checked"])
    return Prices(
        MappingProxyType(rows), MappingProxyType(starts), MappingProxyType(aliases), MappingProxyType(snapshots), checked, digest
    )  # fmt: skip


def _multiplier(entry: _Entry, upstream: str) -> Fraction:
    """Return the multiplier: one number, or the number of the upstream in force.

    An upstream that is not named is an error: it would silently be billed at list prices.
    """
    if not isinstance(entry.node, MappingNode):
        return _number(entry)
    each = {name.rstrip("/"): _number(value) for name, value in _mapping(entry, None).items()}
    if upstream not in each:
        raise entry.spot.error(entry.node, f"has no line for {upstream}, the upstream in force; add one (1 for list prices)")
    return each[upstream]


def _models(document: dict[str, _Entry]) -> dict[str, tuple[_Entry, _Model]]:
    """Return the models of one file: where each is, and its keys."""
    if "models" not in document:
        return {}
    return {model: (entry, _mapping(entry, _MODEL_KEYS)) for model, entry in _mapping(document["models"], None).items()}


def _aliases(models: dict[str, _Model]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for model, keys in models.items():
        for node in items(*keys["aliases"]) if "aliases" in keys else ():
            alias = scalar(node, keys["aliases"].spot)
            if alias in models or alias in aliases:
                raise keys["aliases"].spot.error(node, f"{alias} already names {aliases.get(alias, alias)}")
            aliases[alias] = model
    return aliases


def _rows(model: str, place: _Entry, keys: _Model, common: _Common) -> tuple[PriceRow, ...]:
    """Return all rows of one model, in the order of their dates."""
    for needed in ("source", "context_tokens", "output_tokens_max", "prices"):
        if needed not in keys:
            raise place.spot.error(place.node, f"{needed} is missing, and the shipped table has no such model")
    pace = common.assumed | {key: keys[key] for key in _ASSUMED_KEYS if key in keys}
    rows: list[PriceRow] = []
    for index, node in enumerate(items(*keys["prices"])):
        entry = _Entry(node, keys["prices"].spot.at(str(index)))
        row = _mapping(entry, ("from", *_KINDS, "long_prompt"))
        rows.append(
            PriceRow(
                model=model,
                since=_day(row["from"]) if "from" in row else None,
                rates=_rates(entry, row),
                long_prompt=_long_prompt(row["long_prompt"]) if "long_prompt" in row else None,
                fast=_number(keys["fast"]) if "fast" in keys else None,
                batch=common.batch,
                geo_us=common.geo_us,
                geo=_flag(keys, "geo"),
                web_search_nano=common.web_search_nano,
                multiplier=common.multiplier,
                context_tokens=_count(keys["context_tokens"]),
                output_tokens_max=_count(keys["output_tokens_max"]),
                high_resolution=_flag(keys, "high_resolution"),
                output_tokens_per_second_max=_count(pace["output_tokens_per_second_max"]),
                lag_s=float(_number(pace["lag_s"])),
                turn_s_min=float(_number(pace["turn_s_min"])),
                assumed="pace_source" not in keys,
                source=scalar(*keys["source"]),
                retired=_end(keys, "retired"),
                fast_retired=_end(keys, "fast_retired"),
            )
        )
        if index and (rows[-1].since is None or _unix(rows[-1].since) <= _unix(rows[-2].since)):
            raise entry.spot.error(node, "`from:` must be later than that of the row above it")
    if not rows:
        raise keys["prices"].spot.error(keys["prices"].node, "a model without a row has no price; write at least one")
    return tuple(rows)


def _long_prompt(entry: _Entry) -> LongPrompt:
    keys = _mapping(entry, ("above", *_KINDS))
    if "above" not in keys:
        raise entry.spot.error(entry.node, "`above` is missing: the prompt length in tokens over which these rates hold")
    return LongPrompt(_count(keys["above"]), _rates(entry, keys))


def _rates(entry: _Entry, keys: dict[str, _Entry]) -> Rates:
    """Return five checked prices, written in dollars per million tokens, as nano-dollars per token."""
    per_million: dict[str, Fraction] = {}
    for kind in _KINDS:
        if kind not in keys:
            raise entry.spot.error(entry.node, f"`{kind}` is missing: dollars per million tokens")
        price = _number(keys[kind])
        if not _DOLLARS_MIN[kind] <= price <= _DOLLARS_MAX:
            sentence = f"${scalar(*keys[kind])} per million tokens cannot be right; is it per token, or per thousand?"
            raise keys[kind].spot.error(keys[kind].node, sentence)
        per_million[kind] = price
    for lower, higher in (("read", "input"), ("input", "output"), ("write_5m", "write_1h")):
        if per_million[lower] > per_million[higher]:
            raise keys[lower].spot.error(keys[lower].node, f"`{lower}` is dearer than `{higher}`; are the two swapped?")
    nano = {kind: price * _NANO_PER_TOKEN for kind, price in per_million.items()}
    return Rates(nano["input"], nano["output"], nano["read"], nano["write_5m"], nano["write_1h"])


def _mapping(entry: _Entry, known: tuple[str, ...] | None) -> dict[str, _Entry]:
    return {key: _Entry(node, entry.spot.at(key)) for key, (_, node) in entries(*entry, known).items()}


def _number(entry: _Entry) -> Fraction:
    text = scalar(*entry)
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or Fraction(text) == 0:
        raise entry.spot.error(entry.node, f"{text!r} is not a number above 0; write it plainly, like 2.5")
    return Fraction(text)


def _count(entry: _Entry) -> int:
    text = scalar(*entry).replace("_", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise entry.spot.error(entry.node, f"{text!r} is not a whole number above 0; write one like 200_000")
    return int(text)


def _flag(keys: _Model, name: str) -> bool:
    if name not in keys:
        return False
    text = scalar(*keys[name])
    if text not in ("true", "false"):
        raise keys[name].spot.error(keys[name].node, f"{text!r} is neither true nor false")
    return text == "true"


def _end(keys: _Model, name: str) -> str | None:
    """Read the day on which something ends; `true` stands for one long past, `false` for none."""
    if name not in keys or scalar(*keys[name]) == "false":
        return None
    return "" if scalar(*keys[name]) == "true" else _day(keys[name], ", or true where it is long past")


def _day(entry: _Entry, else_: str = "") -> str:
    text = scalar(*entry)
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return date.fromisoformat(text).isoformat()
    except ValueError:
        pass
    raise entry.spot.error(entry.node, f"{text!r} is not a day; write YYYY-MM-DD{else_}")


def _unix(day: str | None) -> float:
    return float("-inf") if day is None else datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
