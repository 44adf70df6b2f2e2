"""Message batches of the simulated API: what is asked for now, generated later, and fetched as a file of lines.

Promises the real one's objects: a batch is `in_progress`, perhaps `canceling`, then `ended`; its counts stand at `processing` until
then; results come as JSONL, in another order than the requests. What succeeded is billed at half price when the batch ends, the rest
costs nothing. A batch ends by itself; that is noticed whenever somebody looks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from .errors import ApiError
from .paging import page

DAY_S = 86_400
OUTCOMES = ("succeeded", "errored", "canceled", "expired")

type Generate = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Runs one request of a batch, by its place and its parameters: the message, billed. Raises ApiError."""


@dataclass(slots=True)
class Entry:
    custom_id: str
    params: dict[str, Any]
    wish: str
    """The result that it will have, unless the batch is cancelled before."""
    result: dict[str, Any] | None = None


@dataclass(slots=True)
class Batch:
    id: str
    entries: list[Entry]
    created_at: float
    ends_at: float
    cancelled_at: float | None = None
    ended_at: float | None = None

    def object(self, url: str) -> dict[str, Any]:
        """Return the batch as the API shows it."""
        ended = self.ended_at is not None
        counts = dict.fromkeys(("processing", *OUTCOMES), 0)
        for entry in self.entries:
            counts[entry.result["type"] if entry.result is not None else "processing"] += 1
        return {
            "id": self.id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "canceling" if self.cancelled_at is not None else "in_progress",
            "request_counts": counts,
            "created_at": _written(self.created_at),
            "expires_at": _written(self.created_at + DAY_S),
            "ended_at": _written(self.ended_at) if self.ended_at is not None else None,
            "cancel_initiated_at": _written(self.cancelled_at) if self.cancelled_at is not None else None,
            "archived_at": None,
            "results_url": f"{url}/v1/messages/batches/{self.id}/results" if ended else None,
        }


@dataclass(slots=True)
class Batches:
    """All batches of the workspace, no matter which app made them."""

    generate: Generate
    clock: Callable[[], float]
    made: dict[str, Batch] = field(default_factory=dict)

    def create(self, id: str, body: Any, wish: Callable[[dict[str, Any]], str], batch_s: float) -> Batch:
        """Take a batch. Raises ApiError."""
        entries = _entries(body)
        now = self.clock()
        found = [Entry(entry["custom_id"], entry["params"], wish(entry["params"])) for entry in entries]
        self.made[id] = Batch(id, found, now, now + batch_s)
        return self.made[id]

    def find(self, id: str) -> Batch:
        """Return the batch as it is now. Raises ApiError."""
        batch = self.made.get(id)
        if batch is None:
            raise ApiError("not_found_error", f"Message batch {id} not found")
        now = self.clock()
        if batch.ended_at is None and (now >= batch.ends_at or (batch.cancelled_at is not None and now > batch.cancelled_at)):
            batch.ended_at = now
            for entry in batch.entries:
                entry.result = self._result(batch, entry)
        return batch

    def cancel(self, id: str) -> Batch:
        """Cancel a batch: requests not generated yet will not be. Raises ApiError."""
        batch = self.find(id)
        if batch.ended_at is not None:
            raise ApiError("invalid_request_error", f"Message batch {id} has already ended")
        batch.cancelled_at = batch.cancelled_at or self.clock()
        return batch

    def delete(self, id: str) -> dict[str, Any]:
        """Delete a batch that has ended. Raises ApiError."""
        if self.find(id).ended_at is None:
            raise ApiError("invalid_request_error", f"Message batch {id} is still processing: cancel it first")
        del self.made[id]
        return {"id": id, "type": "message_batch_deleted"}

    def results(self, id: str) -> Sequence[bytes]:
        """Return the lines of the results file. Raises ApiError."""
        batch = self.find(id)
        if batch.ended_at is None:
            raise ApiError("not_found_error", f"Message batch {id} has no results yet")
        return [json.dumps({"custom_id": entry.custom_id, "result": entry.result}).encode() + b"\n" for entry in reversed(batch.entries)]

    def page(self, query: Mapping[str, Sequence[str]], url: str) -> dict[str, Any]:
        """Return a page of all batches, the newest first. Raises ApiError."""
        return page(list(reversed(self.made)), query, lambda id: self.find(id).object(url), "batch")

    def _result(self, batch: Batch, entry: Entry) -> dict[str, Any]:
        cancelled = batch.cancelled_at is not None and batch.cancelled_at < batch.ends_at
        if entry.wish in ("canceled", "expired") or (cancelled and entry.wish != "errored"):
            return {"type": "canceled" if cancelled else entry.wish}
        try:
            if entry.wish == "errored":
                raise ApiError("invalid_request_error", "The simulated API was asked to fail")
            return {"type": "succeeded", "message": self.generate(f"{batch.id}#{entry.custom_id}", entry.params)}
        except ApiError as error:
            return {"type": "errored", "error": json.loads(error.body(f"req_{batch.id[9:]}"))}


def _entries(body: Any) -> list[dict[str, Any]]:
    entries = body.get("requests") if isinstance(body, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ApiError("invalid_request_error", "requests: at least one is required")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("custom_id"), str) or not isinstance(entry.get("params"), dict):
            raise ApiError("invalid_request_error", "requests: custom_id and params are required")
    if len({entry["custom_id"] for entry in entries}) < len(entries):
        raise ApiError("invalid_request_error", "requests: custom_id must be unique")
    return entries


def _written(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
