"""Read prices.yaml, with the operator's `policies/prices.yaml` over it, into the table in force.

Promises that a table with a typo never comes into force: unknown or doubled keys, prices per token or per thousand instead
of per million, prices of nothing, dates out of order are each an error with file, line and key. Numbers are read as the
text that was written, straight into exact fractions.
"""

import hashlib
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from yaml.nodes import MappingNode, Node

from gateway_addon.pricing.table import LongPrompt, PriceError, PriceRow, Prices, Rates
from gateway_addon.yaml_file import FileError, Problems, Spot, compose, entries, items, scalar

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
    documents, problems = [], Problems()
    try:
        for file, content, known in files:
            spot = Spot(file)
            document = entries(compose(file, content.decode()), spot, known, problems)
            documents.append({key: _Entry(node, spot.at(key)) for key, (_, node) in document.items()})
            if known is _SHIPPED_KEYS and (missing := [key for key in known if key not in document]):
                raise spot.error(None, f"{missing[0]} is missing: the table itself needs it, an override does not")
        digest = hashlib.sha256(b"".join(content for _, content, _ in files)).hexdigest()
        return _table(documents[0], documents[1] if len(documents) > 1 else {}, upstream, digest, problems)
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


def _table(shipped: dict[str, _Entry], override: dict[str, _Entry], upstream: str, digest: str, problems: Problems) -> Prices:
    """Return the table of two files. Raises FileError with every problem of theirs, beside those noted before."""
    factors = _mapping(shipped["factors"], ("batch", "geo_us"), problems)
    assumed = _mapping(shipped["assumed"], _ASSUMED_KEYS, problems)
    multiplier = Fraction(1)
    with problems.noted():
        assumed |= _mapping(override["assumed"], _ASSUMED_KEYS, problems) if "assumed" in override else {}
    with problems.noted():
        multiplier = _multiplier(override["multiplier"], upstream) if "multiplier" in override else multiplier
    common = _Common(
        batch=_number(factors["batch"]),
        geo_us=_number(factors["geo_us"]),
        web_search_nano=_number(shipped["web_search"]) * 1_000_000,  # dollars per thousand
        multiplier=multiplier,
        assumed=assumed,
    )
    models = _models(shipped, problems)
    for model, (place, keys) in _models(override, problems).items():
        models[model] = (place, models[model][1] | keys if model in models else keys)
    rows: dict[str, tuple[PriceRow, ...]] = {}
    for model, (place, keys) in models.items():
        with problems.noted():
            rows[model] = _rows(model, place, keys, common)
    aliases = _aliases({model: keys for model, (_, keys) in models.items()}, problems)
    problems.say()
    starts = {model: tuple(_unix(row.since) for row in ordered) for model, ordered in rows.items()}
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
    problems = Problems()
    each = {name.rstrip("/"): _number(value) for name, value in _mapping(entry, None, problems).items()}
    problems.say()
    if upstream not in each:
        raise entry.spot.error(entry.node, f"has no line for {upstream}, the upstream in force; add one (1 for list prices)")
    return each[upstream]


def _models(document: dict[str, _Entry], problems: Problems) -> dict[str, tuple[_Entry, _Model]]:
    """Return the models of one file: where each is, and its keys."""
    found: dict[str, tuple[_Entry, _Model]] = {}
    with problems.noted():
        for model, entry in _mapping(document["models"], None, problems).items() if "models" in document else ():
            with problems.noted():
                found[model] = (entry, _mapping(entry, _MODEL_KEYS, problems))
    return found


def _aliases(models: dict[str, _Model], problems: Problems) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for model, keys in models.items():
        with problems.noted():
            for node in items(*keys["aliases"]) if "aliases" in keys else ():
                with problems.noted():
                    alias = scalar(node, keys["aliases"].spot)
                    if alias in models or alias in aliases:
                        raise keys["aliases"].spot.error(node, f"{alias} already names {aliases.get(alias, alias)}")
                    aliases[alias] = model
    return aliases


def _rows(model: str, place: _Entry, keys: _Model, common: _Common) -> tuple[PriceRow, ...]:
    """Return all rows of one model, in the order of their dates. Raises FileError with every problem."""
    problems, rows = Problems(), list[PriceRow]()
    missing = [name for name in ("source", "context_tokens", "output_tokens_max", "prices") if name not in keys]
    with problems.noted():
        if missing:
            are = "is" if len(missing) == 1 else "are"
            raise place.spot.error(place.node, f"{', '.join(missing)} {are} missing, and the shipped table has no such model")
    settings = _settings(keys, common, problems)
    nodes = []
    with problems.noted():
        nodes = items(*keys["prices"]) if "prices" in keys else []
        if "prices" in keys and not nodes:
            raise keys["prices"].spot.error(keys["prices"].node, "a model without a row has no price; write at least one")
    for index, node in enumerate(nodes):
        entry = _Entry(node, keys["prices"].spot.at(str(index)))
        with problems.noted():
            since, rates, long_prompt = _row(entry)
            if index and (since is None or (rows and _unix(since) <= _unix(rows[-1].since))):
                raise entry.spot.error(node, "`from:` must be later than that of the row above it")
            if settings is not None:
                rows.append(PriceRow(model=model, since=since, rates=rates, long_prompt=long_prompt, **settings))
    problems.say()
    return tuple(rows)


def _settings(keys: _Model, common: _Common, problems: Problems) -> dict[str, Any] | None:
    """Return what all rows of a model share; None where some of it is wrong, or missing, which is noted."""
    pace = common.assumed | {key: keys[key] for key in _ASSUMED_KEYS if key in keys}
    values: dict[str, Any] = {
        "fast": None, "batch": common.batch, "geo_us": common.geo_us, "web_search_nano": common.web_search_nano,
        "multiplier": common.multiplier, "geo": False, "high_resolution": False, "retired": None, "fast_retired": None,
        "assumed": "pace_source" not in keys,
    }  # fmt: skip
    for name, entry in (keys | pace).items():
        if name in _SETTINGS:
            with problems.noted():
                values[name] = _SETTINGS[name](entry)
    return values if values.keys() >= _SETTINGS.keys() else None


def _row(entry: _Entry) -> tuple[str | None, Rates, LongPrompt | None]:
    """Return the first day, the rates and the long prompt's rates of one row. Raises FileError with every problem."""
    problems, since, rates, long_prompt = Problems(), None, None, None
    row = _mapping(entry, ("from", *_KINDS, "long_prompt"), problems)
    with problems.noted():
        since = _day(row["from"]) if "from" in row else None
    with problems.noted():
        rates = _rates(entry, row)
    with problems.noted():
        long_prompt = _long_prompt(row["long_prompt"]) if "long_prompt" in row else None
    problems.say()
    assert rates is not None
    return since, rates, long_prompt


def _long_prompt(entry: _Entry) -> LongPrompt:
    problems, above, rates = Problems(), 0, None
    keys = _mapping(entry, ("above", *_KINDS), problems)
    with problems.noted():
        if "above" not in keys:
            raise entry.spot.error(entry.node, "`above` is missing: the prompt length in tokens over which these rates hold")
        above = _count(keys["above"])
    with problems.noted():
        rates = _rates(entry, keys)
    problems.say()
    assert rates is not None
    return LongPrompt(above, rates)


def _rates(entry: _Entry, keys: dict[str, _Entry]) -> Rates:
    """Return five checked prices, written in dollars per million tokens, as nano-dollars per token."""
    per_million: dict[str, Fraction] = {}
    problems = Problems()
    for kind in _KINDS:
        with problems.noted():
            if kind not in keys:
                raise entry.spot.error(entry.node, f"`{kind}` is missing: dollars per million tokens")
            price = _number(keys[kind])
            if not _DOLLARS_MIN[kind] <= price <= _DOLLARS_MAX:
                sentence = f"${scalar(*keys[kind])} per million tokens cannot be right; is it per token, or per thousand?"
                raise keys[kind].spot.error(keys[kind].node, sentence)
            per_million[kind] = price
    problems.say()
    for lower, higher in (("read", "input"), ("input", "output"), ("write_5m", "write_1h")):
        if per_million[lower] > per_million[higher]:
            raise keys[lower].spot.error(keys[lower].node, f"`{lower}` is dearer than `{higher}`; are the two swapped?")
    nano = {kind: price * _NANO_PER_TOKEN for kind, price in per_million.items()}
    return Rates(nano["input"], nano["output"], nano["read"], nano["write_5m"], nano["write_1h"])


def _mapping(entry: _Entry, known: tuple[str, ...] | None, problems: Problems) -> dict[str, _Entry]:
    return {key: _Entry(node, entry.spot.at(key)) for key, (_, node) in entries(*entry, known, problems).items()}


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


def _flag(entry: _Entry) -> bool:
    text = scalar(*entry)
    if text not in ("true", "false"):
        raise entry.spot.error(entry.node, f"{text!r} is neither true nor false")
    return text == "true"


def _end(entry: _Entry) -> str | None:
    """Read the day on which something ends; `true` stands for one long past, `false` for none."""
    text = scalar(*entry)
    if text in ("true", "false"):
        return "" if text == "true" else None
    return _day(entry, ", or true where it is long past")


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


def _seconds(entry: _Entry) -> float:
    return float(_number(entry))


_SETTINGS: dict[str, Callable[[_Entry], Any]] = {
    "source": lambda entry: scalar(*entry),
    "fast": _number,
    "geo": _flag,
    "high_resolution": _flag,
    "context_tokens": _count,
    "output_tokens_max": _count,
    "output_tokens_per_second_max": _count,
    "lag_s": _seconds,
    "turn_s_min": _seconds,
    "retired": _end,
    "fast_retired": _end,
}
"""How each key that holds for all rows of a model is read."""
