"""GET /v1/models: what there is to ask for, in pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ApiError
from .prices import MODELS, served_by

PAGE_DEFAULT = 20
PAGE_MAX = 1_000


def model_info(asked: str) -> dict[str, Any]:
    """One model, also by its alias. Raises ApiError where there is none."""
    served = served_by(asked)
    if served is None:
        raise ApiError("not_found_error", f"model: {asked}")
    model = MODELS[served]
    return {
        "type": "model",
        "id": served,
        "display_name": _display_name(served),
        "created_at": f"{model.released}T00:00:00Z",
        "max_input_tokens": model.context_tokens,
        "max_tokens": model.output_tokens_max,
        "lifecycle": "active",
    }


def model_page(query: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A page of the list, newest first: after `after_id`, or before `before_id`. Raises ApiError for a query that makes no sense."""
    ids = list(MODELS)
    limit = _limit(query)
    after, before = (_position(ids, query, name) for name in ("after_id", "before_id"))
    if before is not None:
        page, more = ids[max(0, before - limit) : before], before > limit
    else:
        first = 0 if after is None else after + 1
        page, more = ids[first : first + limit], first + limit < len(ids)
    ends = {"first_id": page[0], "last_id": page[-1]} if page else {"first_id": None, "last_id": None}
    return {"data": [model_info(model) for model in page], "has_more": more, **ends}


def _limit(query: Mapping[str, Sequence[str]]) -> int:
    said = query.get("limit", [str(PAGE_DEFAULT)])[-1]
    if not said.isascii() or not said.isdigit() or not 1 <= int(said) <= PAGE_MAX:
        raise ApiError("invalid_request_error", f"limit: Input should be a whole number from 1 to {PAGE_MAX}")
    return int(said)


def _position(ids: list[str], query: Mapping[str, Sequence[str]], name: str) -> int | None:
    if name not in query:
        return None
    if query[name][-1] not in ids:
        raise ApiError("invalid_request_error", f"{name}: no such model")
    return ids.index(query[name][-1])


def _display_name(model: str) -> str:
    """`claude-opus-4-5-20251101` is Claude Opus 4.5."""
    family, *numbers = model.removeprefix("claude-").split("-")
    return f"Claude {family.capitalize()} {'.'.join(number for number in numbers if len(number) < 8)}"
