"""A response's usage, as frozen values. Tokens and names only: no prices, no policy, no bytes."""

from dataclasses import dataclass, replace

EDGE_REFUSALS = frozenset({403, 413, 429, 521, 523, 525, 526, 530})
"""Statuses by which an edge in front of the API says, without the API's error envelope, that a request never reached it."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Token counts of one billed part, each kind disjoint from the others. `output_tokens` includes thinking."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    cache_write_unsplit_tokens: int = 0
    """Written to the cache, lifetime not reported: the split lags the total (recordings.md 4)."""

    @property
    def prompt_tokens(self) -> int:
        """Return the length of the prompt, which chooses the price tier: input, cache reads and cache writes."""
        writes = self.cache_write_5m_tokens + self.cache_write_1h_tokens + self.cache_write_unsplit_tokens
        return self.input_tokens + self.cache_read_tokens + writes


@dataclass(frozen=True, slots=True)
class UsagePart:
    """One entry of `usage.iterations`: a sampling run inside the request, with the model that it ran on."""

    kind: str
    """`message`, `compaction`, `advisor_message`, `fallback_message`, or a kind still unknown here."""
    model: str | None
    tokens: TokenCounts


@dataclass(frozen=True, slots=True)
class Usage:
    """The usage of one answer. Names are as the API spells them; None where the answer does not say."""

    model: str | None = None
    """The model that served (after a fallback: the one fallen back to)."""
    tokens: TokenCounts = TokenCounts()
    """The top-level counts. Where `iterations` is not empty those are the bill, and these are not."""
    iterations: tuple[UsagePart, ...] = ()
    web_search_requests: int = 0
    web_fetch_requests: int = 0
    code_execution_requests: int = 0
    service_tier: str | None = None
    speed: str | None = None
    inference_geo: str | None = None
    fallback_credit: str | None = None
    stop_reason: str | None = None
    error_type: str | None = None
    message_id: str | None = None
    readable: bool = False
    """Usage was found and understood."""
    complete: bool = False
    """The answer was whole: a stop reason was seen, or a whole JSON message or error envelope."""
    started: bool = False
    """The provider began to answer: a message_start or a JSON message was seen. Before that nothing is billed."""
    refused_before_output: bool = False
    """The model declined before a single piece of content: the usage is shown, and not charged."""
    fallback: bool = False
    """Another model than the asked one was tried in the same call."""
    code_executed: bool = False
    """Code ran in a container, whose hours are billed and appear nowhere in the answer."""
    estimated: bool = False
    """The output count is an assumption (`assuming_output`), not the provider's."""
    notes: tuple[str, ...] = ()

    @property
    def prompt_known(self) -> bool:
        """Return whether the prompt's tokens are known. Zero is unknown: some message_start leaves the counts to the end."""
        return self.readable and self.tokens.prompt_tokens > 0

    def unbilled(self, status: int | None) -> str | None:
        """Return why an answer with this status proves that the provider did no work, as a call's flag; None where it does not.

        Whatever the status: an error envelope that is the whole answer, or a stream's first event, before which only pings came.
        """
        if self.started:
            return None
        if self.error_type is not None:
            return f"upstream:{self.error_type}"
        return f"edge:{status}" if status in EDGE_REFUSALS else None

    def assuming_output(self, output_tokens: int) -> "Usage":
        """Return the usage with at least `output_tokens`, marked as estimated: a cut stream is settled at its grant."""
        missing = max(0, output_tokens - self.tokens.output_tokens)
        parts = self.iterations
        if parts:
            parts = (*parts[:-1], replace(parts[-1], tokens=_longer(parts[-1].tokens, missing)))
        return replace(self, tokens=_longer(self.tokens, missing), iterations=parts, estimated=True)


def _longer(tokens: TokenCounts, by: int) -> TokenCounts:
    return replace(tokens, output_tokens=tokens.output_tokens + by)
