"""The simulated API's book: what arrived, what was generated, what it costs.

Promises a row for every request received, the refused ones too, so that a test can say "no byte of it reached the API",
and on each row the credential as it came. Counts what was *generated*: what the client saw of it is another column.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .prices import billed_nano


@dataclass(frozen=True, slots=True)
class Usage:
    """The usage of one answer, as the provider knows it (the wire shows less: a stream's cache split may lag)."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    thinking_tokens: int = 0
    """A part of `output_tokens`, whether the client sees the thinking or not."""
    web_searches: int = 0
    service_tier: str = "standard"
    inference_geo: str = "global"
    speed: str = "standard"

    @property
    def prompt_tokens(self) -> int:
        return self.input_tokens + self.cache_read_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens


@dataclass(frozen=True, slots=True)
class Iteration:
    """A part of an answer with a bill of its own: a compaction, an advisor's turn, a fallback attempt."""

    kind: str
    model: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Row:
    """One request, from its last byte to the end of its answer. `status` is None until the answer began."""

    request_id: str
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    """As received, names in lower case: which credential arrived stands here."""
    body_bytes: int
    body_sha256: str
    at: float
    """When it arrived (unix seconds)."""
    status: int | None = None
    answer_sha256: str | None = None
    """The digest of the answer's body as it was sent, encoded or not; None until it ended."""
    message_id: str | None = None
    model_asked: str | None = None
    model_served: str | None = None
    stream: bool = False
    stop_reason: str | None = None
    usage: Usage = Usage()
    iterations: tuple[Iteration, ...] = ()
    billed_nano: int = 0
    in_flight: bool = True
    delivered: bool = False
    """The answer was sent to its end before anybody hung up."""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


@dataclass(slots=True)
class Book:
    """The rows by request id, in the order of arrival, and the counters of the door.

    `bytes_received` counts every byte of every connection, those that ask for this book too.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    connections: int = 0
    bytes_received: int = 0

    def open(self, row: Row) -> None:
        self.rows[row.request_id] = row

    def note(self, request_id: str, **facts: Any) -> None:
        """Add what became known of a request."""
        self.rows[request_id] = replace(self.rows[request_id], **facts)

    def bill(self, request_id: str, usage: Usage, iterations: tuple[Iteration, ...] = ()) -> None:
        """Charge what was generated. A refusal before any output shows its usage and costs nothing."""
        row = self.rows[request_id]
        assert row.model_served is not None, f"{request_id} is billed before its model is known"
        free = row.stop_reason == "refusal" and usage.output_tokens == 0
        nano = 0 if free else billed_nano(row.model_served, usage) + sum(billed_nano(part.model, part.usage) for part in iterations)
        self.note(request_id, usage=usage, iterations=iterations, billed_nano=nano)

    def all(self) -> list[Row]:
        """Return a copy of all rows, so that another thread may read while calls arrive."""
        return list(self.rows.values())

    @property
    def requests(self) -> int:
        return len(self.rows)

    @property
    def in_flight(self) -> int:
        return sum(row.in_flight for row in self.all())

    @property
    def billed_nano(self) -> int:
        return sum(row.billed_nano for row in self.all())

    def messages(self) -> list[Row]:
        """Return the rows that reached a model: those that can cost money."""
        return [row for row in self.all() if row.message_id is not None]

    def as_dict(self) -> dict[str, Any]:
        """Return the whole book for `GET /_simulator/book`."""
        return {
            "connections": self.connections,
            "bytes_received": self.bytes_received,
            "requests": self.requests,
            "in_flight": self.in_flight,
            "billed_nano": self.billed_nano,
            "rows": [asdict(row) for row in self.all()],
        }
