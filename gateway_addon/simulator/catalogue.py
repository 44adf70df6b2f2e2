"""GET /v1/models: what there is to ask for, in pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ApiError
from .paging import page
from .prices import MODELS, served_by


def model_info(asked: str) -> dict[str, Any]:
    """Return one model, also by its alias. Raises ApiError where there is none."""
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
    """Return a page of the list, newest first: after `after_id`, or before `before_id`. Raises ApiError for a query that makes no sense."""
    return page(list(MODELS), query, model_info, "model")


def _display_name(model: str) -> str:
    """Return a model's name for people: `claude-opus-4-5-20251101` is Claude Opus 4.5."""
    family, *numbers = model.removeprefix("claude-").split("-")
    return f"Claude {family.capitalize()} {'.'.join(number for number in numbers if len(number) < 8)}"
