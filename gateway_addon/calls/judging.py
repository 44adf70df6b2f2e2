"""Judge a request: read its body, apply the policy's edits, ask every rule, quote it. Pure.

Promises one judgement wherever it is made, in the process that holds the connection or in one of its own, and one that keeps
nothing of a body but what later steps look at. Knows nothing of the ledger: whether the money is there is asked afterwards.
"""

from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Any

from gateway_addon.calls.quote import TOOLS_FOUND_MAX, Quote, quote
from gateway_addon.calls.reservation_options import rewritten
from gateway_addon.calls.responses import edited_text
from gateway_addon.messages.request import ParsedRequest, Request, definition_bytes, edited, read
from gateway_addon.messages.scan import RequestScan
from gateway_addon.policy import AppPolicy, judge, observed
from gateway_addon.pricing import Prices
from gateway_addon.refusals import Refusal

PROMPT_FIELDS = frozenset({"messages", "system", "tools"})
"""Fields of any length; all the others are the settings of a request."""
KEPT_CHARACTERS_MAX = 1_000
KEPT_ITEMS_MAX = 100
KEPT_DEPTH_MAX = 4  # `fallbacks`, an attempt, its output_config, a field of that


@dataclass(frozen=True, slots=True)
class Judgement:
    """A request that could be parsed, and the policy's verdict on it."""

    asked: ParsedRequest
    """The request as received, without its prompt."""
    parsed: ParsedRequest
    """The request as it is to be sent, without its prompt."""
    verdict: Quote | Refusal | None
    """The quote of a call that generates, or why the policy refuses it; None for what costs nothing."""
    flags: tuple[str, ...] = ()
    """Flags for the call's row: `edited:FIELD`, `observed:CODE`."""
    body: bytes | None = None
    """The body to send where the policy rewrote it; None: as received."""
    edited: str = ""
    """The rewritten fields, as the header `x-gateway-edited` names them."""


def judge_request(
    app: AppPolicy, prices: Prices, endpoint: str, request: Request, overruns: frozenset[str], now: float
) -> Judgement | Refusal:
    """Return the judgement on a request, or the refusal of a body that could be read in two ways.

    `overruns`: models that are reserved in full. A batch's body is not looked into here (`batches.judge_batch` does).
    """
    asked = read(endpoint, request)
    if isinstance(asked, Refusal):
        return asked
    changes = {} if asked.shared else rewritten(app, prices, asked, overrun=asked.model in overruns, now=now)
    sent, parsed = edited(endpoint, request, changes) if changes else (request, asked)
    if isinstance(parsed, Refusal):
        return parsed
    verdict: Quote | Refusal | None = judge(app, parsed, prices)
    flags = (*(f"edited:{name}" for name in changes), *(f"observed:{code}" for code in observed(app, parsed, prices)))
    if verdict is None and parsed.endpoint == "messages":
        verdict = quote(parsed, app, prices, now)
    kept_asked = without_prompt(asked)
    kept = without_prompt(parsed) if changes else kept_asked
    if isinstance(verdict, Quote):
        verdict.keep(kept)
    body = sent.body if changes else None
    return Judgement(kept_asked, kept, verdict, flags, body, edited_text(changes, asked.body))


def without_prompt(parsed: ParsedRequest) -> ParsedRequest:
    """Return the request with its settings and without its prompt, so that a call in flight keeps no parsed body."""
    settings = {name: _short(value) for name, value in parsed.body.items() if name not in PROMPT_FIELDS}
    found = parsed.found
    if found.uses or found.definitions or len(found.unknown) > 1:
        uses = [replace(use, value=_short(use.value)) for use in found.uses]
        found = replace(found, uses=uses, unknown=found.unknown[:1], definitions=_looked_at_again(found))
    return replace(parsed, body=settings, found=found)


def _looked_at_again(found: RequestScan) -> dict[str, list[dict[str, Any]]]:
    """Return the definitions of tools as far as a quote looks at them again: which of those referred to are there, the largest to find."""
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in found.references if name in found.definitions}
    if any(use.feature == "tool_search" for use in found.uses):
        tools = (tool for same in found.definitions.values() for tool in same)
        for tool in nlargest(TOOLS_FOUND_MAX, tools, key=definition_bytes):
            kept.setdefault(tool["name"], []).append(tool)
    return kept


def _short(value: Any, depth: int = 0) -> Any:
    """Return a setting unchanged where it is as small as every known one is, else its beginning."""
    if isinstance(value, str):
        return value[:KEPT_CHARACTERS_MAX]
    if isinstance(value, dict):
        items = list(value.items())[:KEPT_ITEMS_MAX] if depth < KEPT_DEPTH_MAX else []
        return {key[:KEPT_CHARACTERS_MAX]: _short(each, depth + 1) for key, each in items}
    if isinstance(value, list):
        return [_short(each, depth + 1) for each in value[:KEPT_ITEMS_MAX]] if depth < KEPT_DEPTH_MAX else []
    return value
