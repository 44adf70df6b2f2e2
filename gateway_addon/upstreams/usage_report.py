"""Ask the provider's Usage & Cost Admin API about the whole organisation, by day.

Promises values or one sentence, never the key, which goes to the policy's upstream alone (a redirect is an error, not followed).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Self
from urllib.parse import urlencode

from gateway_addon.http_client import STRAIGHT, Egress, Unanswered, whole
from gateway_addon.upstreams.client import ask

TIMEOUT_S = 60.0
DAYS_A_PAGE = 31
USAGE = "/v1/organizations/usage_report/messages"
COST = "/v1/organizations/cost_report"
PAGES_MAX = 1000
NANO_PER_CENT = 10_000_000


@dataclass(frozen=True, slots=True)
class Counts:
    """Billed tokens by kind, and last the searches, of several calls."""

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    web_searches: int = 0

    def __add__(self, other: Self) -> "Counts":
        return Counts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def without(self, other: Self) -> "Counts":
        """Subtract other counts, kind by kind, nothing below zero."""
        return Counts(*(max(0, mine - theirs) for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def tokens(self) -> int:
        tokens: tuple[int, ...] = astuple(self)[:-1]
        return sum(tokens)

    def covers(self, other: Self) -> bool:
        return all(mine >= theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))


KINDS = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True, slots=True)
class Reported:
    """The provider's count for a day, one model, key, speed and region."""

    day: int
    model: str
    key_id: str
    speed: str | None
    inference_geo: str | None
    counts: Counts


@dataclass(frozen=True, slots=True)
class Charged:
    """The provider's charge for a day, or a part of it."""

    day: int
    nano: int


class ReportUnavailable(Exception):
    """The provider's report cannot be fetched. The message is a sentence for the operator."""


class AdminApi:
    """A client of the Admin API. `emit` is called with the number of pages read so far."""

    def __init__(self, upstream: str, key: str, emit: Callable[[int], None] = lambda pages: None, way: Egress = STRAIGHT):
        self._upstream, self._key, self._tell, self._way = upstream, key, emit, way
        self._pages = 0

    def usage(self, since: float, until: float | None, workspaces: tuple[str, ...] = ()) -> list[Reported]:
        """Return tokens by day, model, key, speed and region. Raises ReportUnavailable."""
        groups = ("model", "api_key_id", "speed", "inference_geo")
        query = _query(since, until, groups) + [("workspace_ids[]", name) for name in workspaces]
        return [_reported(day, result) for day, result in self._results(USAGE, query)]

    def cost(self, since: float, until: float | None, workspaces: tuple[str, ...] = ()) -> list[Charged]:
        """Return money by day. (The API cannot narrow it by key, nor by workspace before the fact.) Raises ReportUnavailable."""
        found = self._results(COST, _query(since, until, ("workspace_id", "description")))
        return [_charged(day, result) for day, result in found if not workspaces or result.get("workspace_id") in workspaces]

    def _results(self, path: str, query: list[tuple[str, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
        page: list[tuple[str, str]] = []
        for _ in range(PAGES_MAX):
            answer = self._get(f"{path}?{urlencode([*query, *page])}")
            self._pages += 1
            self._tell(self._pages)
            for bucket in answer["data"]:
                day = int(datetime.fromisoformat(bucket["starting_at"]).timestamp()) // 86400
                yield from ((day, result) for result in bucket["results"])
            if not answer["has_more"]:
                return
            page = [("page", str(answer["next_page"]))]
        raise ReportUnavailable(f"The provider's report {path} does not end. Choose a shorter period.")

    def _get(self, target: str) -> dict[str, Any]:
        try:
            with ask(self._upstream, target, self._key, self._way, timeout_s=TIMEOUT_S) as answered:
                if answered.status != 200:
                    raise ReportUnavailable(_refused(answered.status))
                body = whole(answered)
        except Unanswered as error:
            raise ReportUnavailable(f"The provider's reports cannot be fetched: {error}. Try again later.") from None
        try:
            answer = json.loads(body)
            if isinstance(answer["data"], list) and isinstance(answer["has_more"], bool):
                return dict(answer)
        except (ValueError, KeyError, TypeError):
            pass
        raise ReportUnavailable(f"The provider's report {target.partition('?')[0]} is not in the shape that is known here.")


def _refused(status: int) -> str:
    if status in (401, 403):
        return f"The provider did not take the admin key ({status}): it must be an admin key (sk-ant-admin...) of the same organisation."
    if status == 429:
        return "The provider asks to be polled less often (429). Try again in some minutes."
    return f"The provider's reports answered {status}. Try again later."


def _query(since: float, until: float | None, groups: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the query for the time from `since` to `until`, or to now."""
    period = [("starting_at", _written(since)), ("bucket_width", "1d"), ("limit", str(DAYS_A_PAGE))]
    if until is not None:
        period.append(("ending_at", _written(until)))
    return period + [("group_by[]", name) for name in groups]


def _reported(day: int, result: dict[str, Any]) -> Reported:
    writes, tools = result.get("cache_creation") or {}, result.get("server_tool_use") or {}
    counts = Counts(
        input_tokens=result.get("uncached_input_tokens") or 0,
        cache_read_tokens=result.get("cache_read_input_tokens") or 0,
        cache_write_5m_tokens=writes.get("ephemeral_5m_input_tokens") or 0,
        cache_write_1h_tokens=writes.get("ephemeral_1h_input_tokens") or 0,
        output_tokens=result.get("output_tokens") or 0,
        web_searches=tools.get("web_search_requests") or 0,
    )
    model, key_id = result.get("model") or "(none)", result.get("api_key_id") or "(no key)"
    return Reported(day, model, key_id, result.get("speed"), result.get("inference_geo"), counts)


def _charged(day: int, result: dict[str, Any]) -> Charged:
    try:
        return Charged(day, int(Decimal(result["amount"]) * NANO_PER_CENT))
    except (KeyError, InvalidOperation, TypeError):
        raise ReportUnavailable("The provider's cost report holds an amount that is not a number of cents.") from None


def _written(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
