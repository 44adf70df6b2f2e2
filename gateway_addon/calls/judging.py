"""Judge a request: read its body, apply the policy's edits, ask every rule, quote it. Pure.

Promises one judgement wherever it is made, in the process that holds the connection or in one of its own, and one that keeps
nothing of a body but what later steps look at. Knows nothing of the ledger: whether the money is there is asked afterwards.
"""

from dataclasses import dataclass, replace
from typing import Any

from gateway_addon.calls.quote import Quote, quote
from gateway_addon.calls.reservation_options import rewritten
from gateway_addon.calls.responses import edited_text
from gateway_addon.messages import request as reading
from gateway_addon.messages.request import ParsedRequest, Request
from gateway_addon.policy import AppPolicy, judge, observed
from gateway_addon.pricing import Prices
from gateway_addon.refusals import Refusal

PROMPT_FIELDS = frozenset({"messages", "system", "tools"})
"""Where a request is as long as it likes; the settings of a request are all the others."""
KEPT_CHARACTERS_MAX = 1_000
KEPT_ITEMS_MAX = 100
KEPT_DEPTH_MAX = 4  # `fallbacks`, an attempt, its output_config, a field of that


@dataclass(frozen=True, slots=True)
class Judged:
    """A request that could be read, and what the policy says to it."""

    asked: ParsedRequest
    """As it came, without its prompt."""
    reading: ParsedRequest
    """As it is to be sent, without its prompt."""
    verdict: Quote | Refusal | None
    """The quote of a call that generates, or why the policy refuses it; None for what costs nothing."""
    flags: tuple[str, ...] = ()
    """What the policy did beside judging."""
    body: bytes | None = None
    """The body to send where the policy rewrote it; None: as it came."""
    edited: str = ""
    """What was rewritten, as the answer's header says it."""


def judge_request(
    app: AppPolicy, prices: Prices, endpoint: str, request: Request, overruns: frozenset[str], now: float
) -> Judged | Refusal:
    """Return what the policy makes of a request, or the refusal of one that has no single reading.

    `overruns`: models that are reserved in full. A batch's body is not looked into here (`batches.judged` does).
    """
    asked = reading.read(endpoint, request)
    if isinstance(asked, Refusal):
        return asked
    changes = {} if asked.shared else rewritten(app, prices, asked, overrun=asked.model in overruns, now=now)
    sent, read = reading.edited(endpoint, request, changes) if changes else (request, asked)
    if isinstance(read, Refusal):
        return read
    verdict: Quote | Refusal | None = judge(app, read, prices)
    flags = (*(f"edited:{name}" for name in changes), *(f"observed:{code}" for code in observed(app, read, prices)))
    if verdict is None and read.endpoint == "messages":
        verdict = quote(read, app, prices, now)
    kept = without_prompt(read)
    if isinstance(verdict, Quote):
        verdict = replace(verdict, terms=replace(verdict.terms, reading=kept))
    body = sent.body if changes else None
    return Judged(without_prompt(asked), kept, verdict, flags, body, edited_text(changes, asked.body))


def without_prompt(read: ParsedRequest) -> ParsedRequest:
    """Return a reading that holds the settings of a request and nothing of its prompt: a call in flight is to keep no parsed body."""
    settings = {name: _short(value) for name, value in read.body.items() if name not in PROMPT_FIELDS}
    uses = [replace(use, value=_short(use.value)) for use in read.found.uses]
    return replace(read, body=settings, found=replace(read.found, uses=uses, unknown=read.found.unknown[:1]))


def _short(value: Any, depth: int = 0) -> Any:
    """A setting as it is, for every setting that means something; of anything larger, its beginning."""
    if isinstance(value, str):
        return value[:KEPT_CHARACTERS_MAX]
    if isinstance(value, dict):
        items = list(value.items())[:KEPT_ITEMS_MAX] if depth < KEPT_DEPTH_MAX else []
        return {key[:KEPT_CHARACTERS_MAX]: _short(each, depth + 1) for key, each in items}
    if isinstance(value, list):
        return [_short(each, depth + 1) for each in value[:KEPT_ITEMS_MAX]] if depth < KEPT_DEPTH_MAX else []
    return value
