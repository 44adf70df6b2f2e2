"""The simulated Usage & Cost Admin API: the book, summed as the provider sums it for an organisation's bill.

Pure: rows and a query in, the wire's JSON out. Promises the real one's shapes (buckets, `results`, `has_more` with `next_page`,
amounts as decimal strings of cents) and counts what was billed, by whatever path it came: calls that never saw the gateway too.
"""

import hashlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from .book import Row, Usage
from .errors import ApiError
from .prices import nano_by_kind

WIDTHS_S = {"1m": (60, 60, 1440), "1h": (3600, 24, 168), "1d": (86400, 7, 31)}
"""`bucket_width`: its seconds, and how many buckets a page has by default and at most."""
USAGE_GROUPS = ("api_key_id", "workspace_id", "model", "service_tier", "context_window", "inference_geo", "speed")
COST_GROUPS = ("workspace_id", "description")
TOKEN_TYPES = {
    "input_tokens": "uncached_input_tokens",
    "cache_read_tokens": "cache_read_input_tokens",
    "cache_write_5m_tokens": "cache_creation.ephemeral_5m_input_tokens",
    "cache_write_1h_tokens": "cache_creation.ephemeral_1h_input_tokens",
    "output_tokens": "output_tokens",
}
NANO_PER_CENT = 10_000_000

type Query = dict[str, list[str]]
type Billed = tuple[Row, str, Usage]
"""One billed part: its request, the model, what it used."""


def usage_report(rows: Iterable[Row], query: Query, workspace_id: str, now: float) -> dict[str, Any]:
    """Answer `GET /v1/organizations/usage_report/messages`. Raises ApiError for a query that the API would not take."""
    groups = _groups(query, USAGE_GROUPS)

    def results(parts: list[Billed]) -> list[dict[str, Any]]:
        summed: dict[tuple[str, ...], list[Usage]] = {}
        for row, model, usage in parts:
            facts = {
                "api_key_id": key_id(row), "workspace_id": workspace_id, "model": model, "service_tier": usage.service_tier,
                "context_window": "0-200k" if usage.prompt_tokens <= 200_000 else "200k-1M",
                "inference_geo": usage.inference_geo, "speed": usage.speed,
            }  # fmt: skip
            if all(facts[name] in wanted for name, wanted in _filters(query).items()):
                summed.setdefault(tuple(facts[name] for name in groups), []).append(usage)
        return [dict.fromkeys(USAGE_GROUPS) | dict(zip(groups, key, strict=True)) | _counted(used) for key, used in sorted(summed.items())]

    return _paged(rows, query, now, results)


def cost_report(rows: Iterable[Row], query: Query, workspace_id: str, now: float) -> dict[str, Any]:
    """Answer `GET /v1/organizations/cost_report`, by day only. Raises ApiError for a query that the API would not take."""
    groups = _groups(query, COST_GROUPS)
    if query.get("bucket_width", ["1d"]) != ["1d"]:
        raise ApiError("invalid_request_error", "bucket_width: cost is reported by 1d only")

    def results(parts: list[Billed]) -> list[dict[str, Any]]:
        summed: dict[tuple[str | None, ...], Decimal] = {}
        for _, model, usage in parts:
            for kind, nano in nano_by_kind(model, usage).items():
                described: tuple[str | None, ...] = (None, None, None)
                if "description" in groups:
                    described = ("tokens", model, TOKEN_TYPES[kind]) if kind in TOKEN_TYPES else ("web_search", None, None)
                if nano:
                    summed[described] = summed.get(described, Decimal(0)) + Decimal(nano.numerator) / nano.denominator
        return [
            {
                "amount": f"{nano / NANO_PER_CENT:f}", "currency": "USD", "cost_type": cost_type, "model": model, "token_type": token_type,
                "workspace_id": workspace_id if "workspace_id" in groups else None,
                "description": f"{model} Usage - {token_type}" if model else cost_type,
                "service_tier": None, "context_window": None, "inference_geo": None,
            }
            for (cost_type, model, token_type), nano in sorted(summed.items(), key=str)
        ]  # fmt: skip

    return _paged(rows, query, now, results)


def key_id(row: Row) -> str:
    """Return the provider's name for the key that a request came with."""
    credential = row.header("x-api-key") or (row.header("authorization") or "").removeprefix("Bearer ")
    return f"apikey_01{hashlib.sha256(credential.encode()).hexdigest()[:16]}"


def _counted(used: list[Usage]) -> dict[str, Any]:
    return {
        "uncached_input_tokens": sum(usage.input_tokens for usage in used),
        "cache_creation": {
            "ephemeral_1h_input_tokens": sum(usage.cache_write_1h_tokens for usage in used),
            "ephemeral_5m_input_tokens": sum(usage.cache_write_5m_tokens for usage in used),
        },
        "cache_read_input_tokens": sum(usage.cache_read_tokens for usage in used),
        "output_tokens": sum(usage.output_tokens for usage in used),
        "server_tool_use": {"web_search_requests": sum(usage.web_searches for usage in used)},
    }


def _paged(rows: Iterable[Row], query: Query, now: float, results: Any) -> dict[str, Any]:
    width_s, default, most = _width(query)
    since = _moment(query, "starting_at") // width_s * width_s
    until = _moment(query, "ending_at") if "ending_at" in query else int(now) // width_s * width_s + width_s
    limit = int(query.get("limit", [str(default)])[0])
    if not 1 <= limit <= most:
        raise ApiError("invalid_request_error", f"limit: from 1 to {most}")
    starts = list(range(since, until, width_s))
    first = int(query.get("page", ["page_0"])[0].removeprefix("page_"))
    parts = list(_billed(rows))
    data = [
        {
            "starting_at": _written(start),
            "ending_at": _written(start + width_s),
            "results": results([part for part in parts if start <= part[0].at < start + width_s]),
        }
        for start in starts[first : first + limit]
    ]
    more = first + limit < len(starts)
    return {"data": data, "has_more": more, "next_page": f"page_{first + limit}" if more else None}


def _billed(rows: Iterable[Row]) -> Iterator[Billed]:
    for row in rows:
        if row.billed_nano and row.model_served is not None:
            yield row, row.model_served, row.usage
            yield from ((row, part.model, part.usage) for part in row.iterations)


def _groups(query: Query, known: tuple[str, ...]) -> list[str]:
    groups = query.get("group_by[]", [])
    if unknown := set(groups) - set(known):
        raise ApiError("invalid_request_error", f"group_by: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    return groups


def _filters(query: Query) -> dict[str, list[str]]:
    """Return the query's filters (`workspace_ids[]=...`) by the field that they narrow."""
    return {name: query[f"{name}s[]"] for name in USAGE_GROUPS if f"{name}s[]" in query}


def _width(query: Query) -> tuple[int, int, int]:
    width = query.get("bucket_width", ["1d"])[0]
    if width not in WIDTHS_S:
        raise ApiError("invalid_request_error", f"bucket_width: one of {', '.join(WIDTHS_S)}")
    return WIDTHS_S[width]


def _moment(query: Query, name: str) -> int:
    try:
        return int(datetime.fromisoformat(query[name][0]).timestamp())
    except (KeyError, ValueError):
        raise ApiError("invalid_request_error", f"{name}: an RFC 3339 time is required") from None


def _written(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
