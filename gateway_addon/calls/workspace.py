"""Keep apart, in the workspace that all apps share at the provider, each app's own batches and files.

Promises that an app sees, fetches, cancels and deletes only what it made itself. What another app made, or what was made outside this
gateway, does not exist for it: not one byte of such a request goes out. Lists are answered from the ledger, so no
page of them shows what others have. A batch is reserved whole before it is sent, and is the app's, durably, before the app hears of it.

A creation whose answer is lost is settled at what it holds: nobody knows its id, so nobody will ever read its results.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from gateway_addon.calls import batches
from gateway_addon.calls.admission import Admission, Caller, EndedBy, ResponseHook
from gateway_addon.calls.batch_booking import BatchBooking, OnBatchClosed, pricing
from gateway_addon.calls.files import file_of, upload_problem
from gateway_addon.calls.judging import Judgement
from gateway_addon.calls.judging_process import JudgingProcess
from gateway_addon.calls.queue import BudgetQueue
from gateway_addon.calls.refusal_messages import BatchQuote, denied
from gateway_addon.calls.reservation_options import ReservationOption, ReservationPlan, planned
from gateway_addon.calls.responses import OwnResponse, cap_headers
from gateway_addon.ledger import Denied, Ledger, NewCall, Outcome, RateLimits, Reserved, Settlement, ownership
from gateway_addon.ledger import batches as book
from gateway_addon.ledger.batches import Batch, NewBatch
from gateway_addon.ledger.ownership import Kind, OwnedObject
from gateway_addon.messages import Meter
from gateway_addon.messages.request import ParsedRequest, Request
from gateway_addon.policy import AppPolicy, caps, caps_by_model
from gateway_addon.pricing import kept
from gateway_addon.refusals import Refusal, stated

logger = logging.getLogger(__name__)

ANSWER_WITHIN_S = 5.0  # how long the app's answer waits for the ledger to have what it says
PAGE_DEFAULT = 20
PAGE_MAX = 1_000
IDS_MAX = 100
LIST_QUERY = {"after_id", "before_id", "beta", "ids", "ids[]", "limit", "page"}
NAMES: dict[str, tuple[Kind, str]] = {"batches": ("batch", "message batch"), "files": ("file", "file")}

type Resolve = Callable[[Reserved, NewCall, float, Settlement | Outcome, float], object]
"""Settles a call, or voids it (given an outcome alone), and reports it."""


@dataclass(slots=True)
class Workspace:
    """Admit the requests of one process that concern batches and files. `clock` returns unix seconds."""

    ledger: Ledger
    queue: BudgetQueue
    clock: Callable[[], float]
    closed: OnBatchClosed
    resolve: Resolve
    judging: JudgingProcess

    async def admit(
        self, caller: Caller, judged: Judgement, request: Request, call: NewCall, now: float
    ) -> Admission | OwnResponse | Refusal:
        """Decide about a request that the app's policy lets through. Raises LedgerUnavailable."""
        parsed = judged.parsed
        match parsed.endpoint:
            case "batches.create":
                return await self._create_batch(caller, judged, request, call, now)
            case "files.upload":
                uploaded = ResponseHook(whole=partial(self._uploaded, caller.app.name, now))
                return upload_problem(request) or Admission(caller, call, parsed, now, judged.flags, response_hook=uploaded)
            case "batches.list" | "files.list":
                return await self._page(caller.app, parsed, request)
        owned = await self.ledger.look(partial(ownership.find, id=parsed.item))
        if owned is None or owned.gone or owned.app != caller.app.name:
            return _not_here(caller.app, parsed)
        response_hook = await self._response_hook(caller, parsed, owned, now)
        if isinstance(response_hook, Refusal):
            return response_hook
        return Admission(caller, call, parsed, now, judged.flags, response_hook=response_hook)

    async def foreign_file(self, app: AppPolicy, file_ids: Iterable[str]) -> Refusal | None:
        """Return the refusal for a file that a request names and the app does not own, else None. Raises LedgerUnavailable.

        In observe mode an app may also use a file that nobody made through the gateway, but no file of another app.
        """
        wanted = set(file_ids)
        owners = await self.ledger.look(partial(ownership.owners, ids=wanted)) if wanted else {}
        return foreign_file(app, wanted, owners)

    # -- batches

    async def _create_batch(
        self, caller: Caller, judged: Judgement, request: Request, call: NewCall, now: float
    ) -> Admission | Refusal:
        app, policy = caller.app, caller.policy
        asked = await self.judging.judge(caller.endpoint, request.body, batches.judge_batch, app, policy.prices, request, now)
        if isinstance(asked, Refusal):
            return asked
        if (foreign := await self.foreign_file(app, asked.files)) is not None:
            return foreign
        call = replace(
            call, model_asked=asked.model, model=policy.prices.canonical(asked.model) if asked.model else None, quote_nano=asked.quote_nano
        )
        if call.model is None and caps_by_model(app):
            sentence = f"app {app.name} has caps on each model, and a batch counts under one: send one batch for each model"
            return stated("model", f"{sentence} ({app.file} each.model, models.caps)")
        # Tokens a minute do not count here: the provider takes its time with a batch, and has other limits for it.
        rates = RateLimits(app.rates.requests_per_minute, None, app.rates.concurrent)

        limits = caps(policy, app, call.parts, last_call=call.last_call)
        whole = planned(app, limits, call, [ReservationOption(0, asked.quote_nano)], rates)

        async def plan() -> ReservationPlan:
            return whole

        attempt = await self.queue.reserve(call, plan, now, app.rates.wait_s)
        if isinstance(attempt, Refusal):
            return attempt
        result, option, observed = attempt
        asked = replace(asked, flags=tuple(dict.fromkeys((*asked.flags, *(f"observed:{code}" for code in observed)))))
        if isinstance(result, Denied):
            return denied(result, app, BatchQuote(asked.requests, asked.quote_nano), option, policy.zone)
        creation = _Creation(self, caller, call, asked, result, now)
        stands = tuple(cap_headers(app, result.standings))
        response_hook = ResponseHook(whole=creation.answered, ended=creation.ended, headers=stands)
        return Admission(
            caller, call, judged.parsed, now, judged.flags, asked.body, ", ".join(asked.edited), response_hook=response_hook,
            settled_by_hook=True,
        )  # fmt: skip

    async def _response_hook(
        self, caller: Caller, parsed: ParsedRequest, owned: OwnedObject, now: float
    ) -> ResponseHook | Refusal:
        """Return what to do with the answer about a batch or file that the app owns."""
        match parsed.endpoint:
            case "batches.get" | "batches.cancel":
                return ResponseHook(whole=partial(self._seen, owned))
            case "batches.results":
                return await self._results(caller, parsed.item)
            case "batches.delete":
                batch = await self.ledger.look(partial(book.find, id=parsed.item))
                if batch is not None and batch.open:
                    sentence = f"batch {parsed.item} is not settled yet; fetch its results first, or wait until the gateway has read them"
                    return replace(stated("unsettled", sentence), retry_after_s=60)
                return ResponseHook(whole=partial(self._deleted, parsed.item, now))
            case "files.delete":
                return ResponseHook(whole=partial(self._deleted, parsed.item, now))
            case "files.content":
                return ResponseHook(streamed=True)
        return ResponseHook()

    async def _results(self, caller: Caller, batch_id: str) -> ResponseHook:
        batch: Batch | None = await self.ledger.look(partial(book.find, id=batch_id))
        if batch is None or not await self.ledger.look(partial(book.lacks_results, batch=batch)):
            return ResponseHook(streamed=True)
        results = await pricing(self.ledger, batch, caller.policy.prices)
        booking = BatchBooking(self.ledger, batch, results, self.closed, self.clock)

        def ended(sent: bool, ended_by: EndedBy, status: int | None) -> None:
            booking.ended(whole=ended_by == "whole" and status == 200)

        return ResponseHook(streamed=True, tap=booking.tap, ended=ended)

    async def _seen(self, batch: OwnedObject, status: int, body: bytes) -> bytes:
        """Return the API's object of a batch, as the app may see it, and record its state."""
        shown = batches.object_of(body) if status == 200 else None
        if shown is None or shown.id != batch.id:
            return body
        if shown.content != batch.content:
            await self.keep(partial(ownership.seen, id=batch.id, content=shown.content))
        return shown.content.encode()

    async def _deleted(self, item: str, now: float, status: int, body: bytes) -> bytes:
        if status == 200:
            await self.keep(partial(ownership.gone, id=item, now=now))
        return body

    # -- files

    async def _uploaded(self, app: str, now: float, status: int, body: bytes) -> bytes:
        made = file_of(body) if status == 200 else None
        if made is not None:
            await self.keep(partial(ownership.own, belonging=OwnedObject(made.id, "file", app, now, made.content)))
        return body

    # -- lists

    async def _page(self, app: AppPolicy, parsed: ParsedRequest, request: Request) -> OwnResponse | Refusal:
        """Return a page of the objects that the app owns, in the API's shape."""
        kind, _ = NAMES[parsed.endpoint.partition(".")[0]]
        query = parse_qs(request.target.partition("?")[2], keep_blank_values=True)
        if unknown := query.keys() - LIST_QUERY:
            return stated("body", f"the query {sorted(unknown)[0]} is not known here, and cannot be left out of account; leave it out")
        limit = query.get("limit", [str(PAGE_DEFAULT)])[-1]
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= PAGE_MAX:
            return stated("body", f"limit must be a whole number from 1 to {PAGE_MAX:,}")
        if "ids[]" in query or "ids" in query:
            ids = (query.get("ids[]", []) + query.get("ids", []))[:IDS_MAX]
            own = await self.ledger.look(partial(ownership.chosen, app=app.name, kind=kind, ids=ids))
            return OwnResponse({"data": [json.loads(each.content) for each in own], "next_page": None})
        after = before = None
        for name in ("after_id", "before_id", "page"):
            if name in query:
                cursor = query[name][-1].removeprefix("page_")
                found = await self.ledger.look(partial(ownership.find, id=cursor))
                if found is None or found.app != app.name or found.kind != kind:
                    return _not_here(app, replace(parsed, item=cursor[:140]))
                after, before = (after, found) if name == "before_id" else (found, before)
        page = await self.ledger.look(partial(ownership.page, app=app.name, kind=kind, limit=int(limit), after=after, before=before))
        data = [json.loads(each.content) for each in page.items]
        if kind == "file":
            more = page.more and bool(page.items)
            return OwnResponse({"data": data, "next_page": f"page_{page.items[-1].id}" if more else None})
        ends = {"first_id": page.items[0].id, "last_id": page.items[-1].id} if page.items else {"first_id": None, "last_id": None}
        return OwnResponse({"data": data, "has_more": page.more, **ends})

    async def keep(self, write: Callable[[Any], Any]) -> Any:
        """Write to the ledger before the app is answered; a ledger that does not answer in time gets it later."""
        try:
            return await asyncio.wait_for(asyncio.shield(self.ledger.keep(write, "workspace")), ANSWER_WITHIN_S)
        except TimeoutError:
            logger.error("The ledger is behind: what an app made or deleted is written as soon as the ledger answers.")
            return None


def foreign_file(app: AppPolicy, wanted: Iterable[str], owners: Mapping[str, str]) -> Refusal | None:
    """Return the refusal for the first file that is not the app's, by the owners that the ledger knows. Pure."""
    for file_id in sorted(wanted):
        owner = owners.get(file_id)
        if owner != app.name and (owner is not None or app.mode == "enforce"):
            sentence = f"{app} has no file {file_id[:100]!r} here; it may use those that it uploaded through this gateway"
            return stated("not_found", sentence)
    return None


class _Creation:
    """Follow the creation of a batch from its reservation to the provider's answer."""

    def __init__(
        self, workspace: Workspace, caller: Caller, call: NewCall, asked: batches.AskedBatch, reserved: Reserved, now: float
    ):
        self._workspace, self._caller, self._call, self._asked = workspace, caller, call, asked
        self._held, self._admitted_at = reserved, now
        self._handed_over = False
        self._unbilled: str | None = None

    async def answered(self, status: int, body: bytes) -> bytes:
        """Record the app as the owner of the batch that a whole answer shows."""
        shown = batches.object_of(body) if status == 200 else None
        if shown is None:
            self._unbilled = _unbilled(status, body)
            return body
        policy, asked, admitted_at = self._caller.policy, self._asked, self._admitted_at
        look_at = admitted_at + min(policy.timeouts.batch_poll_s, book.PAUSE_MAX_S)
        new = NewBatch(
            shown.id, self._held.call_id, self._caller.app.name, admitted_at, asked.requests, asked.hour_ttl, policy.prices.digest,
            kept(policy.prices), shown.content, shown.status, look_at, flags=asked.flags, custom_ids=asked.custom_ids,
        )  # fmt: skip
        self._handed_over = True
        if await self._workspace.keep(partial(book.adopt, new=new)) is False:
            logger.error("The provider gave a new batch the id %s, which it gave before.", shown.id)
            self._handed_over = False
        return shown.content.encode()

    def ended(self, sent: bool, ended_by: EndedBy, status: int | None) -> None:
        """Resolve the reservation, unless a batch holds it now."""
        if self._handed_over:
            return
        end: Settlement | Outcome
        flags = self._asked.flags
        if not sent:
            end = Outcome(status, flags=(*flags, "not_sent"))
        elif status is not None and 300 <= status < 400:
            end = Outcome(status, flags=(*flags, "upstream:redirect"))
        elif self._unbilled is not None:
            end = Outcome(status, flags=(*flags, self._unbilled), complete=True)
        else:
            lost = "no_status" if status is None else "error_unreadable" if status >= 400 else "batch_unknown"
            end = Settlement(None, (), Outcome(status, flags=(*flags, f"estimated:{lost}")))
        self._workspace.resolve(self._held, self._call, self._admitted_at, end, self._workspace.clock())


def _unbilled(status: int, body: bytes) -> str | None:
    """Return why an answer proves that no batch was made, as a call's flag; None where it does not."""
    meter = Meter("application/json")
    meter.feed(body)
    return meter.close().unbilled(status)


def _not_here(app: AppPolicy, parsed: ParsedRequest) -> Refusal:
    """Refuse an object in one sentence, whether another app made it, somebody outside, or nobody: it must not tell which."""
    _, what = NAMES[parsed.endpoint.partition(".")[0]]
    return stated("not_found", f"{app} has no {what} {parsed.item!r} here; it sees those that it made through this gateway")
