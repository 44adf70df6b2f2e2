"""Judge a batch's body, read the API's object of it, and price the file of its results. Pure.

Promises that each request of a batch is judged and quoted like a call of its own, at the batch's rates; that the body that is judged is
the body that is sent; and that a result is priced by the table of the batch's admission, or not at all. Knows no ledger, socket or
clock.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from gateway_addon.calls.quote import quote
from gateway_addon.calls.refusal_messages import over_request_cap
from gateway_addon.ledger.batches import ResultRow
from gateway_addon.messages import BatchMeter, BatchResult, json_object
from gateway_addon.messages.request import DEEP, ParsedRequest, Request, Unreadable, few_files, json_body, message
from gateway_addon.names import safe_name
from gateway_addon.policy import AppPolicy, edits, judge, observed
from gateway_addon.pricing import Prices, cost
from gateway_addon.refusals import Refusal, stated

REQUESTS_MAX = 100_000
"""The API's own limit (platform documentation, "Batch processing")."""

_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}\Z")
_ID = re.compile(r"msgbatch_[A-Za-z0-9]{1,128}\Z")
_DIGEST_BYTES = 8
_FREE = ("errored", "canceled", "expired")


@dataclass(frozen=True, slots=True)
class AskedBatch:
    """A batch as judged. `quote_nano` is the sum of its requests' quotes at batch rates: one reservation."""

    requests: int
    quote_nano: int
    model: str | None
    """None where the requests name several."""
    hour_ttl: bool
    files: frozenset[str]
    """The ids of the files at the provider that its requests name."""
    flags: tuple[str, ...] = ()
    """Flags for the batch's row, as those of a call: `edited:FIELD`, `observed:CODE`."""
    body: bytes | None = None
    """The body to send where the policy rewrote some request; None: as received."""
    custom_ids: str = ""
    """The ids of its requests, packed."""

    @property
    def edited(self) -> list[str]:
        """Return the fields that the policy rewrote in some request."""
        return [flag.removeprefix("edited:") for flag in self.flags if flag.startswith("edited:")]


@dataclass(frozen=True, slots=True)
class BatchObject:
    """The API's own object of a batch, with a results address that leads through the gateway."""

    id: str
    status: str
    content: str


@dataclass(frozen=True, slots=True)
class _One:
    """One request of a batch, judged and quoted."""

    parsed: ParsedRequest
    quote_nano: int
    changes: dict[str, Any]
    """The parameters that the policy rewrites."""
    observed: tuple[str, ...] = ()


def judge_batch(app: AppPolicy, prices: Prices, request: Request, now: float) -> AskedBatch | Refusal:
    """Read, judge and quote a batch. The first request that would be refused as a call of its own refuses the batch, by its name."""
    quote_nano, hour_ttl, rewritten = 0, False, False
    models: set[str] = set()
    ids: list[str] = []
    files: set[str] = set()
    flags: dict[str, None] = {}
    try:
        entries = _entries(json_body(request))
        for where, entry in _named(entries):  # nothing is kept of a request but what adds up: there may be a hundred thousand
            one = _judge_entry(app, prices, where, entry["params"], request, now)
            if isinstance(one, Refusal):
                return one
            entry["params"] |= one.changes
            ids.append(entry["custom_id"])
            quote_nano, hour_ttl, rewritten = quote_nano + one.quote_nano, hour_ttl or one.parsed.hour_ttl, rewritten or bool(one.changes)
            models.add(one.parsed.model)
            files.update(one.parsed.found.files)
            few_files(len(files))
            flags |= dict.fromkeys((*(f"edited:{name}" for name in one.changes), *one.observed))
    except (Unreadable, ValueError) as error:
        return stated("body", f"{error}")
    except RecursionError:
        return stated("body", DEEP)
    body = json.dumps({"requests": entries}, ensure_ascii=False, separators=(",", ":")).encode() if rewritten else None
    model = models.pop() if len(models) == 1 else None
    return AskedBatch(len(entries), quote_nano, model, hour_ttl, frozenset(files), tuple(flags), body, packed(ids))


def object_of(body: bytes) -> BatchObject | None:
    """Return the batch that an answer shows; None where it shows none."""
    shown = json_object(body)
    if shown is None or not _ID.match(str(shown.get("id"))):
        return None
    if isinstance(address := shown.get("results_url"), str):
        shown["results_url"] = urlsplit(address).path  # as it came, it would lead the app past the gateway, token in hand
    return BatchObject(str(shown["id"]), safe_name(str(shown.get("processing_status"))), json.dumps(shown))


class PricedResults:
    """Price a results file as it passes. Holds one line at a time.

    A result that cannot be read or priced is left out: the batch then lacks it, and is not settled by its results. A result of a request
    that the batch does not have is left out too, and flagged.
    """

    def __init__(
        self, prices: Prices, at: float, *, hour_ttl: bool, custom_ids: str | None = None, content_encoding: str | None = None
    ):  # fmt: skip
        """Take the price table and the moment of admission.

        `custom_ids`: the packed ids of the batch's own requests; None: unknown, for a batch that an older gateway made."""
        self._prices, self._at, self._hour_ttl = prices, at, hour_ttl
        self._own = None if custom_ids is None else _unpacked(custom_ids)
        self.flags: tuple[str, ...] = ()
        """Flags for faults in the results so far."""
        self._meter = BatchMeter(content_encoding)

    def feed(self, chunk: bytes) -> list[ResultRow]:
        """Return the rows of the results that these bytes complete. Never raises on content."""
        return [row for result in self._meter.feed(chunk) for row in self._rows(result)]

    def close(self) -> list[ResultRow]:
        """Return the rows of a last line that has no line end."""
        return [row for result in self._meter.close() for row in self._rows(result)]

    def _rows(self, result: BatchResult) -> Iterable[ResultRow]:
        if not _CUSTOM_ID.match(result.custom_id) or (self._own is not None and _digest(result.custom_id) not in self._own):
            self.flags = ("results_foreign",)
            return []
        if result.kind in _FREE:
            return [ResultRow(result.custom_id, 0, result.kind, None, *(0,) * 7, 0, None, "")]
        if result.kind != "succeeded":
            return []
        bill = cost(self._prices, result.usage, at=self._at, hour_ttl_requested=self._hour_ttl)
        if bill.nano is None:
            return []
        return [
            ResultRow(
                result.custom_id, number, part.kind, part.model,
                part.tokens.input_tokens, part.tokens.output_tokens, part.tokens.cache_read_tokens,
                part.tokens.cache_write_5m_tokens, part.tokens.cache_write_1h_tokens, part.tokens.cache_write_unsplit_tokens,
                part.web_searches, part.nano, part.price_row, " ".join(bill.flags),
            )
            for number, part in enumerate(bill.parts)
        ]  # fmt: skip


def packed(custom_ids: Iterable[str]) -> str:
    """Pack ids into one text by which each can be recognised: eight bytes of a digest each, where an id has up to 64."""
    return base64.b64encode(b"".join(map(_digest, custom_ids))).decode()


def _unpacked(text: str) -> frozenset[bytes]:
    digests = base64.b64decode(text)
    return frozenset(digests[at : at + _DIGEST_BYTES] for at in range(0, len(digests), _DIGEST_BYTES))


def _digest(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(), digest_size=_DIGEST_BYTES).digest()


def _entries(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the requests of a batch. Raises Unreadable."""
    entries = body.get("requests")
    if body.keys() != {"requests"} or not isinstance(entries, list) or not entries:
        raise Unreadable("a batch is one object with requests, a list of at least one, and nothing else")
    if len(entries) > REQUESTS_MAX:
        raise Unreadable(f"the batch has {len(entries):,} requests, the API takes {REQUESTS_MAX:,}; send several batches")
    return entries


def _named(entries: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each entry with its place, once its shape is checked and no other has its id. Raises Unreadable."""
    known: set[str] = set()
    for i, entry in enumerate(entries):
        where = f"requests[{i}]"
        if not isinstance(entry, dict) or entry.keys() != {"custom_id", "params"} or not isinstance(entry["params"], dict):
            raise Unreadable(f"{where} must be an object with custom_id and params, and nothing else")
        custom_id = entry["custom_id"]
        if not isinstance(custom_id, str) or not _CUSTOM_ID.match(custom_id):
            raise Unreadable(f"{where}.custom_id must be 1 to 64 letters, digits, - or _")
        if custom_id in known:
            raise Unreadable(f"{where}.custom_id {custom_id!r} is given twice; results are told apart by it, so each needs its own")
        known.add(custom_id)
        yield f"{where} ({custom_id})", entry


def _judge_entry(app: AppPolicy, prices: Prices, where: str, params: dict[str, Any], request: Request, now: float) -> _One | Refusal:
    """Judge one request as if it came alone. Raises Unreadable, which names its place."""
    parsed = _read(where, params, request)
    if changes := edits(app, parsed, prices):
        parsed = _read(where, params | changes, request)
    refusal = judge(app, parsed, prices)
    if refusal is not None:
        return _at(where, refusal)
    bound = quote(parsed, app, prices, now, batch=True)
    if isinstance(bound, Refusal):
        return _at(where, bound)
    passed = observed(app, parsed, prices)
    cap_nano = app.caps.get("request")
    if cap_nano is not None and bound.total_nano > cap_nano:
        if not app.observes("caps"):
            return _at(where, over_request_cap(app, bound, cap_nano))
        passed += ("quote_over_cap",)
    return _One(parsed, bound.total_nano, changes, tuple(f"observed:{code}" for code in passed))


def _read(where: str, params: dict[str, Any], request: Request) -> ParsedRequest:
    try:
        parsed = message("batch_request", params, json.dumps(params, ensure_ascii=False).encode(), request)
    except UnicodeEncodeError:
        raise Unreadable(f"{where}.params holds half of a surrogate pair; send whole characters") from None
    except (Unreadable, ValueError) as error:
        raise Unreadable(f"{where}.params: {error}") from None
    if parsed.stream:
        raise Unreadable(f"{where}.params.stream must not be true: a batch is not streamed")
    return parsed


def _at(where: str, refusal: Refusal) -> Refusal:
    return replace(refusal, sentence=f"{where}: {refusal.sentence}")
