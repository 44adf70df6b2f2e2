"""Read a folder of policy files into one GatewayPolicy, or raise a PolicyError that names file, line and key.

Promises all or nothing: no app is ever in force with half a file, and a file that would be ignored (a wrong ending, an app
name that cannot be one) is an error, because nobody enforces an ignored file.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gateway_addon import pricing
from gateway_addon.identity.trust import Issuer
from gateway_addon.ledger import TOTAL, app_scope, enclosing, part_of, team_scope
from gateway_addon.names import NAME_FORM, PROGRAM
from gateway_addon.policy import trusting
from gateway_addon.policy.keys import APP, GATEWAY
from gateway_addon.policy.kinds import REQUIRED, Key, record
from gateway_addon.policy.model import AppPolicy, Cap, GatewayPolicy, Models, PartCaps, caps_of_one
from gateway_addon.policy.rules import matching
from gateway_addon.policy.values import NAME
from gateway_addon.pricing import LISTED_BY, PriceError, Prices
from gateway_addon.windows import Window
from gateway_addon.yaml_file import FileError as PolicyError
from gateway_addon.yaml_file import Problems, Spot, compose, entries, items, suggestion

_APP_FILE = re.compile(rf"{NAME}\.yaml")


class _File(NamedTuple):
    shown: str
    content: bytes


def load(directory: Path) -> GatewayPolicy:
    """Read `gateway.yaml`, `apps/*.yaml` and, where it is there, `prices.yaml` of a folder.

    Raises PolicyError, which names every problem of every file.
    """
    problems = Problems()
    files = _files(directory, problems)
    general, prices = None, None
    with problems.noted():
        general = parse_gateway(files["gateway.yaml"].shown, _text(files["gateway.yaml"])) if "gateway.yaml" in files else None
    with problems.noted():
        prices = _prices(directory, general["upstream"] if general else LISTED_BY)
    apps = {}
    for name, file in files.items():
        if name == "gateway.yaml":
            continue
        with problems.noted():
            apps[Path(name).stem] = parse_app(
                file.shown, _text(file), prices or pricing.load(), general and general["teams"],
                workspace_geo=general["workspace_geo"] if general else "unknown", issuers=general and general["issuers"],
            )  # fmt: skip
    problems.say()
    assert general is not None
    assert prices is not None
    trust = trusting.trust(general.pop("audience"), general.pop("issuers"), apps)
    digest = hashlib.sha256(prices.digest.encode())
    for name, file in files.items():
        digest.update(f"\0{name}\0{len(file.content)}\0".encode() + file.content)
    texts = {name: _text(file) for name, file in files.items()}
    if (directory / "prices.yaml").exists():
        texts["prices.yaml"] = _text(_File("prices.yaml", _bytes(directory, directory / "prices.yaml")))
    return GatewayPolicy(
        **general, apps=MappingProxyType(apps), trust=trust, prices=prices, folder=_shown(directory, directory),
        digest=digest.hexdigest(), texts=MappingProxyType(texts),
    )  # fmt: skip


class Outline(NamedTuple):
    """The caps in a folder of policy files as far as they can be read, even where other parts are wrong.

    `caps`: by scope (`total`, `team:NAME`, `app:NAME`) the caps of its file; None where that cannot be read. A file's name makes an app.
    """

    caps: Mapping[str, Mapping[Window, int] | None]
    tls: bool
    parts: Mapping[str, tuple[Mapping[str, PartCaps], Mapping[str, PartCaps]] | None] = MappingProxyType({})
    """By app's scope the caps of each of its parts, by kind, and of single models; None where these cannot be read."""
    issuers: tuple[str, ...] = ()
    """The addresses of the issuers of identity tokens."""
    audience: str | None = None

    @property
    def apps(self) -> list[str]:
        return [scope.removeprefix("app:") for scope in self.caps if scope.startswith("app:")]

    def caps_of(self, scope: str) -> Mapping[Window, int] | None:
        """Return the caps of a scope, a part's too; None where its file cannot be read."""
        if (part := part_of(scope)) is None:
            return self.caps.get(scope)
        found = self.parts.get(enclosing(scope))
        return None if found is None else caps_of_one(*found, *part).caps

    @property
    def windowed(self) -> tuple[Cap, ...]:
        """Return the caps of every window that can be read: a single request's are not counted in one."""
        found = ((scope, window, nano) for scope, caps in self.caps.items() for window, nano in (caps or {}).items())
        return tuple(Cap(*each) for each in found if each[1] != "request")


def outline(directory: Path) -> Outline:
    """Read apps and caps alone, for commands that must work while a file is broken. Never raises."""
    general = _read_keys(directory / "gateway.yaml", GATEWAY, ("caps", "teams", "tls", "issuers", "audience"))
    found = {TOTAL: general["caps"]} | {team_scope(name): team.caps for name, team in (general["teams"] or {}).items()}
    parts: dict[str, tuple[Mapping[str, PartCaps], Mapping[str, PartCaps]] | None] = {}
    for path in sorted((directory / "apps").glob("*.yaml")):
        if _APP_FILE.fullmatch(path.name):
            values, scope = _read_keys(path, APP, ("caps", "each", "models")), app_scope(path.stem)
            found[scope], each, models = values.values()
            parts[scope] = None if each is None or models is None else (each, _by_canonical_id(models.caps, directory))
    issuers = tuple(each.url for each in (general["issuers"] or {}).values())
    return Outline(MappingProxyType(found), general["tls"] is not None, MappingProxyType(parts), issuers, general["audience"])


def _by_canonical_id(caps: Mapping[str, PartCaps], directory: Path) -> Mapping[str, PartCaps]:
    """Return caps of single models by canonical id; by the names as they are written where the prices cannot be read."""
    try:
        prices = load_prices(directory) if caps else None
    except PolicyError:
        prices = None
    return caps if prices is None else {prices.canonical(name) or name: each for name, each in caps.items()}


def _read_keys(path: Path, keys: Mapping[str, Key], names: Sequence[str]) -> dict[str, Any]:
    """Return these keys' values in a file, whatever is wrong with the others; None for one that is wrong itself or cannot be read."""
    try:
        spot = Spot(path.name)
        found = entries(compose(path.name, path.read_text(encoding="utf-8")), spot)
    except (OSError, ValueError, PolicyError):
        return dict.fromkeys(names)
    values: dict[str, Any] = {}
    for name in names:
        try:
            values[name] = keys[name].kind.read(found[name][1], spot.at(name)) if name in found else keys[name].default
        except PolicyError:
            values[name] = None
        if values[name] is REQUIRED:
            values[name] = None
    return values


def parse_gateway(file: str, text: str) -> dict[str, Any]:
    """Return the values of a gateway.yaml, by name. Raises PolicyError."""
    values: dict[str, Any] = record(dict, GATEWAY).read(compose(file, text), Spot(file))
    return values | {"issuers": trusting.named_issuers(file, values["issuers"], values["audience"], NAME)}


def parse_app(
    file: str, text: str, prices: Prices, teams: Mapping[str, Any] | None, *, workspace_geo: str = "unknown",
    issuers: Mapping[str, Issuer] | None = None,
) -> AppPolicy:  # fmt: skip
    """Return the policy of the app that the file is named after. Every model it names must have a price. Raises PolicyError.

    `teams` and `issuers` None: they are unknown, because gateway.yaml cannot be read.
    """
    node, spot, problems = compose(file, text), Spot(file), Problems()
    values: dict[str, Any] = {}
    with problems.noted():
        values = record(dict, APP).read(node, spot)
    found = entries(node, spot, problems=problems)

    def value(name: str) -> Any:
        """Return one key's value, even where other keys are wrong. Raises PolicyError."""
        return APP[name].kind.read(found[name][1], spot.at(name)) if name in found else APP[name].default

    with problems.noted():
        if (team := value("team")) is not None and teams is not None and team not in teams:
            raise spot.at("team").error(found["team"][1], f"no team {team!r} in gateway.yaml{suggestion(team, teams)}")
    with problems.noted():
        if "models" in found:
            _check_models(found["models"][1], spot.at("models"), value("models"), prices)
    with problems.noted():
        fallbacks = value("features").get("fallbacks")
        for model in fallbacks.default if fallbacks else ():
            if prices.canonical(model) is None:
                raise spot.at("features.fallbacks.default").error(found["features"][1], f"{model} has no price{_near(model, prices)}")
    with problems.noted():
        if "workloads" in found and issuers is not None:
            node = found["workloads"][1]
            values["workloads"] = trusting.workload_rules(node, spot.at("workloads"), value("workloads"), issuers)
    problems.say()
    models = values["models"]
    values["models"] = replace(models, caps=MappingProxyType({prices.canonical(name): caps for name, caps in models.caps.items()}))
    return AppPolicy(name=Path(file).stem, file=file, workspace_geo=workspace_geo, **values)  # type: ignore[arg-type]


def _check_models(node: Any, spot: Spot, models: Models, prices: Prices) -> None:
    """Check that every pattern matches a model with a price, that aliases lead to one, and that a model's caps are written once."""
    lines, problems = entries(node, spot), Problems()
    for name in ("allow", "deny"):
        for item in items(lines[name][1], spot) if name in lines else []:
            with problems.noted():
                if not matching(item.value, prices):
                    raise spot.at(name).error(item, f"{item.value} matches no model that has a price{_near(item.value, prices)}")
    aliases = entries(lines["aliases"][1], spot) if "aliases" in lines else {}
    for alias, (key, value) in aliases.items():
        with problems.noted():
            if prices.canonical(alias) is not None:
                raise spot.at(f"aliases.{alias}").error(key, "is a model's own name; an alias must not hide one")
            if prices.canonical(models.aliases[alias]) is None:
                raise spot.at(f"aliases.{alias}").error(value, f"{value.value} has no price{_near(value.value, prices)}")
    capped: dict[str, str] = {}
    for name, (key, value) in (entries(lines["caps"][1], spot) if "caps" in lines else {}).items():
        with problems.noted():
            if (model := prices.canonical(name)) is None:
                raise spot.at(f"caps.{name}").error(key, f"{name} has no price{_near(name, prices)}")
            if (other := capped.setdefault(model, name)) != name:
                raise spot.at(f"caps.{name}").error(key, f"{name} and {other} are one model; write its caps once")
            if not models.caps[name].caps:
                raise spot.at(f"caps.{name}").error(value, "names no window; write one like {day: $5}")
    problems.say()


def _near(model: str, prices: Prices) -> str:
    return suggestion(model.replace("*", ""), prices.models())


def _files(directory: Path, problems: Problems) -> dict[str, _File]:
    """Return every policy file by its path in the folder: gateway.yaml first, then the apps by name. What is no such file is noted."""
    apps = directory / "apps"
    paths = [directory / "gateway.yaml"]
    with problems.noted():
        try:
            paths += sorted(apps.iterdir()) if apps.is_dir() else []
        except OSError as error:
            raise PolicyError(f"{_shown(directory, apps)}: not readable: {error.strerror}") from None
    files = {}
    for path in paths:
        if path.name.startswith(".") or path.name.endswith("~") or path.suffix not in (".yaml", ".yml", ".json"):
            continue
        with problems.noted():
            if path.parent == apps and _APP_FILE.fullmatch(path.name) is None:
                raise PolicyError(f"{_shown(directory, path)}: an app's file is named APP.yaml, in {NAME_FORM}")
            files[str(path.relative_to(directory))] = _File(_shown(directory, path), _bytes(directory, path))
    return files


def _bytes(directory: Path, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PolicyError(f"{_shown(directory, path)}: no such file; `{PROGRAM} init` writes a first policy") from None
    except OSError as error:
        raise PolicyError(f"{_shown(directory, path)}: not readable: {error.strerror}") from None


def _text(file: _File) -> str:
    try:
        return file.content.decode()
    except UnicodeDecodeError as error:
        line = file.content[: error.start].count(b"\n") + 1
        raise PolicyError(f"{file.shown}:{line}: not UTF-8") from None


def _shown(directory: Path, path: Path) -> str:
    """Return the path as sentences show it: from the policy folder on, because callers need not know the machine."""
    return (Path(directory.resolve().name) / path.relative_to(directory)).as_posix()


def load_prices(directory: Path) -> Prices:
    """Return the prices that a policy folder puts in force: the shipped table where it names none. Raises PolicyError."""
    path = directory / "gateway.yaml"
    file = _File(_shown(directory, path), _bytes(directory, path) if path.exists() else b"{}")
    return _prices(directory, parse_gateway(file.shown, _text(file))["upstream"])


def _prices(directory: Path, upstream: str) -> Prices:
    override = directory / "prices.yaml"
    try:
        return pricing.load(None, override if override.exists() else None, upstream)
    except PriceError as error:
        raise PolicyError(str(error)) from None
