"""Lists as the API shows them, in pages: after `after_id`, or before `before_id`, at most `limit` at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import ApiError

PAGE_DEFAULT = 20
PAGE_MAX = 1_000

type Query = Mapping[str, Sequence[str]]


def page(ids: Sequence[str], query: Query, show: Callable[[str], dict[str, Any]], what: str) -> dict[str, Any]:
    """Return a page of `ids`, in their order. Raises ApiError for a query that makes no sense."""
    limit = limit_of(query)
    after, before = (_position(ids, query, name, what) for name in ("after_id", "before_id"))
    if before is not None:
        chosen, more = ids[max(0, before - limit) : before], before > limit
    else:
        first = 0 if after is None else after + 1
        chosen, more = ids[first : first + limit], first + limit < len(ids)
    ends = {"first_id": chosen[0], "last_id": chosen[-1]} if chosen else {"first_id": None, "last_id": None}
    return {"data": [show(id) for id in chosen], "has_more": more, **ends}


def limit_of(query: Query) -> int:
    """Return how many a page may have. Raises ApiError."""
    said = query.get("limit", [str(PAGE_DEFAULT)])[-1]
    if not said.isascii() or not said.isdigit() or not 1 <= int(said) <= PAGE_MAX:
        raise ApiError("invalid_request_error", f"limit: Input should be a whole number from 1 to {PAGE_MAX}")
    return int(said)


def _position(ids: Sequence[str], query: Query, name: str, what: str) -> int | None:
    if name not in query:
        return None
    if query[name][-1] not in ids:
        raise ApiError("invalid_request_error", f"{name}: no such {what}")
    return list(ids).index(query[name][-1])
