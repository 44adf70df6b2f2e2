"""Refuse what the API refuses before any work: the checks on a request's body, in the order in which the real one complains.

Every refusal is an ApiError in the API's own wording where a client is known to match on it.
"""

import json
from typing import Any

from .errors import ApiError
from .http import Request
from .prices import MODELS, served_by
from .prompt import tokens


def read_json(request: Request) -> dict[str, Any]:
    """Return the body, which is a JSON object."""
    if request.header("anthropic-version") is None:
        raise _invalid("anthropic-version: header is required")
    if request.header("content-encoding") not in (None, "identity"):
        raise _invalid("Request body encoding is not supported", code="request_body_encoding_unsupported")
    try:
        body = json.loads(request.body)
    except (ValueError, RecursionError):
        raise _invalid("The request body is not valid JSON") from None
    if not isinstance(body, dict):
        raise _invalid("The request body must be an object")
    return body


def read_prompt(request: Request) -> tuple[dict[str, Any], str]:
    """Return the body and the id of the model that serves it, for a message or a count of tokens."""
    body = read_json(request)
    return body, served_model(body)


def served_model(body: dict[str, Any]) -> str:
    """Return the id of the model that serves a body whose prompt can be read."""
    asked = body.get("model")
    if not isinstance(asked, str) or not asked:
        raise _invalid("model: Field required" if asked is None else "model: Input should be a valid string")
    served = served_by(asked)
    if served is None:
        raise ApiError("not_found_error", f"model: {asked}")
    _check_messages(body)
    return served


def check_message(size: int, body: dict[str, Any], served: str, *, hostile: bool) -> None:
    """Check that a message to be generated, of so many bytes, fits its model."""
    model = MODELS[served]
    asked_tokens = body.get("max_tokens")
    if not isinstance(asked_tokens, int) or isinstance(asked_tokens, bool):
        raise _invalid("max_tokens: Field required" if asked_tokens is None else "max_tokens: Input should be a valid integer")
    if asked_tokens < 0:
        raise _invalid("max_tokens: Input should be greater than or equal to 0")
    if asked_tokens > model.output_tokens_max:
        limit = f"{asked_tokens} > {model.output_tokens_max}, which is the maximum allowed number of output tokens for {served}"
        raise _invalid(f"max_tokens: {limit}")
    prompt_tokens = tokens(body, size, hostile=hostile)
    if prompt_tokens > model.context_tokens:
        raise _invalid(f"prompt is too long: {prompt_tokens} tokens > {model.context_tokens} maximum")
    if body.get("speed") == "fast" and not model.fast and served != "claude-opus-4-6":
        raise _invalid(f"speed: fast is not supported by {served}")  # opus-4-6 serves it at standard speed, and says so
    if body.get("inference_geo") and not model.regional:
        raise _invalid(f"inference_geo: not supported by {served}")


def _check_messages(body: dict[str, Any]) -> None:
    """Check the nesting that the rest of the simulation relies on. Fields that it does not know pass."""
    messages = body.get("messages")
    if messages is None:
        raise _invalid("messages: Field required")
    if not _objects(messages) or not messages:
        raise _invalid("messages: at least one message is required")
    for index, message in enumerate(messages):
        if not isinstance(message.get("content"), str) and not _objects(message.get("content")):
            raise _invalid(f"messages.{index}.content: Input should be a valid string or list")
    if not isinstance(body.get("system") or "", str) and not _objects(body["system"]):
        raise _invalid("system: Input should be a valid string or list")
    if not _objects(body.get("tools") or []):
        raise _invalid("tools: Input should be a valid list")
    for key in ("thinking", "tool_choice"):
        if not isinstance(body.get(key) or {}, dict):
            raise _invalid(f"{key}: Input should be a valid dictionary")


def _objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _invalid(message: str, *, code: str | None = None) -> ApiError:
    return ApiError("invalid_request_error", message, code=code)
