"""The table of request fields knows what the official SDK sends: an SDK update that adds a field turns red with its name."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NotRequired, Required, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params
from typing_extensions import is_typeddict as is_extended_typeddict

from gateway_addon.messages.schema import BODY_FEATURES, BY_FIELD, MAPS, TYPES, UNTYPED

SENT = (
    message_create_params.MessageCreateParamsStreaming,
    message_create_params.MessageCreateParamsNonStreaming,
    message_count_tokens_params.MessageCountTokensParams,
    beta_create_params.MessageCreateParamsStreaming,
    beta_create_params.MessageCreateParamsNonStreaming,
    beta_count_tokens_params.MessageCountTokensParams,
)

HEADERS = {"betas", "user_profile_id", "workspace_id"}
"""Parameters of the SDK's methods that it sends as headers, not in the body."""

OLDER = {"temperature", "top_p", "top_k", "output_format"}
"""Body fields of anthropic-version 2023-06-01 that SDK 2.x no longer sends."""


def plain(hint: Any) -> Any:
    while get_origin(hint) in (Required, NotRequired, Annotated) or "Required" in str(get_origin(hint)):
        hint = get_args(hint)[0]
    return hint


def objects(hint: Any, name: str, seen: set[tuple[Any, str]]) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Every TypedDict that can be sent, with the field that holds it: (type, field, its own fields)."""
    hint = plain(hint)
    if not (is_typeddict(hint) or is_extended_typeddict(hint)):
        for inner in get_args(hint):
            if not isinstance(inner, str):
                yield from objects(inner, name, seen)
    elif (hint, name) not in seen:
        seen.add((hint, name))
        fields = {field: plain(value) for field, value in get_type_hints(hint).items()}
        yield hint, name, fields
        for field, value in fields.items():
            yield from objects(value, name if name in MAPS else field, seen)


def words(hint: Any) -> set[str]:
    """The literal strings of a `type` field."""
    if get_origin(hint) is Literal:
        return {word for word in get_args(hint) if isinstance(word, str)}
    return {word for inner in get_args(hint) for word in words(plain(inner))}


def sent_by_the_sdk() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """(fields by type, fields by the field that holds an object without a type)."""
    typed: dict[str, set[str]] = defaultdict(set)
    untyped: dict[str, set[str]] = defaultdict(set)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        seen: set[tuple[Any, str]] = set()
        found = [entry for params in SENT for entry in objects(params, "", seen)]
    for kind, name, fields in found:
        if name == "input_schema" or (name in MAPS and "Configs" in kind.__name__):  # a free zone; names of the app's choosing
            continue
        type_names = words(fields["type"]) if "type" in fields and name not in BY_FIELD else set()
        for type_name in type_names:
            typed[type_name] |= fields.keys() - {"type"}
        if not type_names or "custom" in type_names:  # a custom tool may leave its type out
            untyped[name] |= fields.keys() - ({"type"} if type_names else set())
    untyped[""] -= HEADERS
    return typed, untyped


TYPED, WITHOUT_TYPE = sent_by_the_sdk()


@pytest.mark.parametrize("type_name", sorted(TYPED))
def test_the_table_knows_each_type_of_the_sdk_and_its_fields(type_name: str):
    assert type_name in TYPES
    assert TYPED[type_name] - TYPES[type_name].fields == set()


@pytest.mark.parametrize("name", sorted(WITHOUT_TYPE))
def test_the_table_knows_each_object_without_a_type(name: str):
    assert WITHOUT_TYPE[name] - UNTYPED.get(name, frozenset()) == set()


def test_the_table_holds_nothing_that_no_client_sends():
    assert set(TYPES) - set(TYPED) == set()
    assert set(UNTYPED) - set(WITHOUT_TYPE) == set()
    assert UNTYPED[""] - WITHOUT_TYPE[""] == OLDER
    assert {name: kind.fields - TYPED[name] for name, kind in TYPES.items() if kind.fields - TYPED[name]} == {}


def test_the_table_knows_what_claude_code_sends():
    claude_code = "model max_tokens messages stream thinking system tools metadata context_management output_config"
    assert set(claude_code.split()) <= UNTYPED[""]


def test_a_field_that_spends_is_a_field():
    assert BODY_FEATURES.keys() <= UNTYPED[""]
