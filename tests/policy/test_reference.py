"""The schema and the reference of keys come from the table that validates: they cannot say something else."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from gateway_addon.cli.schema import schema
from gateway_addon.messages.schema import BODY_FEATURES
from gateway_addon.policy.keys import APP, FEATURES, GATEWAY
from gateway_addon.policy.kinds import REQUIRED, Key
from gateway_addon.policy.reference import reference

SHIPPED = Path(__file__).parents[2] / "policies" / "examples"


def printed(file: str) -> dict[str, Any]:
    result = CliRunner().invoke(schema, [file])
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.output)
    return found


def paths(keys: Mapping[str, Key], prefix: str = "") -> Iterator[tuple[str, Key]]:
    for name, key in keys.items():
        yield prefix + name, key
        yield from paths(key.keys or {}, f"{prefix}{name}.")


def faults(value: Any, rule: Mapping[str, Any], path: str = "") -> list[str]:
    """A validator of the few words of JSON Schema that the printed schemas use; any other word fails."""
    known = {"$schema", "title", "description", "type", "enum", "const", "pattern", "format", "minimum"}
    known |= {"items", "properties", "required", "additionalProperties", "anyOf", "oneOf"}
    assert set(rule) <= known
    for word in ("anyOf", "oneOf"):
        if word in rule:
            return [f"{path}: fits none of {word}"] if all(faults(value, option, path) for option in rule[word]) else []
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if "type" in rule and not isinstance(value, types[rule["type"]]):
        return [f"{path}: not {rule['type']}"]
    if value not in rule.get("enum", [value]) or value != rule.get("const", value):
        return [f"{path}: not one of the words"]
    found = [f"{path}.{name}: missing" for name in rule.get("required", []) if name not in value]
    if isinstance(value, dict):
        for name, inner in value.items():
            extra = rule.get("additionalProperties")
            inner_rule = rule.get("properties", {}).get(name, extra if isinstance(extra, dict) else None)
            found += faults(inner, inner_rule, f"{path}.{name}") if inner_rule is not None else [f"{path}.{name}: unknown"]
    if isinstance(value, list):
        found += [fault for item in value for fault in faults(item, rule["items"], path)]
    return found


@pytest.mark.parametrize("path", [SHIPPED / "gateway.yaml", *sorted((SHIPPED / "apps").glob("*.yaml"))], ids=lambda path: path.name)
def test_each_shipped_policy_fits_the_schema(path: Path):
    assert faults(yaml.safe_load(path.read_text()), printed("gateway" if path.name == "gateway.yaml" else "app")) == []


@pytest.mark.parametrize(
    "text",
    [
        "caps: unlimited",
        "models: {allow: [claude-haiku-4-5]}\ncaps: {mnth: 5}",
        "models: {allow: claude-haiku-4-5}\ncaps: unlimited",
        "models: {allow: [claude-haiku-4-5]}\ncaps: none",
        "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\nreserve: most",
        "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\nfeatures: {web_search: true}",
    ],
)
def test_what_the_gateway_refuses_the_schema_marks(text: str):
    assert faults(yaml.safe_load(text), printed("app")) != []


@pytest.mark.parametrize(("file", "keys"), [("app", APP), ("gateway", GATEWAY)])
def test_the_schema_has_every_key_with_its_help(file: str, keys: Mapping[str, Key]):
    found = printed(file)
    assert {name: rule["description"] for name, rule in found["properties"].items()} == {name: key.help for name, key in keys.items()}
    assert found["required"] == [name for name, key in keys.items() if key.default is REQUIRED]
    assert found["additionalProperties"] is False


def test_the_reference_has_a_row_for_every_key():
    rows = {line.split("|")[1].strip(" `") for line in reference().splitlines() if line.startswith("| `")}
    assert rows == {path for keys in (GATEWAY, APP) for path, _ in paths(keys)}


def test_every_feature_that_a_field_needs_can_be_named():
    assert set(BODY_FEATURES.values()) <= set(FEATURES)
