"""The simulated Claude API: who may ask, what for, and what goes into the book.

    async with Simulator(behaviour=Behaviour(hostile=True)) as api:
        client = anthropic.AsyncAnthropic(base_url=api.url, api_key=api.key)
        ...
        api.book.billed_nano

Promises the shapes of the real one: paths, error envelopes, headers, JSON and events. Its book and its prices are its own.
"""

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import json
import ssl
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote

from . import admin
from .batches import Batches
from .behaviour import Behaviour, overridden
from .book import Book, Row
from .catalogue import model_info, model_page
from .delivery import Clock, billed, deliver_json, deliver_page, deliver_stream
from .errors import ApiError
from .files import Files
from .http import Exchange, Headers, HungUp, Request, serve
from .messages import Made
from .model import answer as generate
from .prompt import Cache, tokens
from .reading import check_message, read_json, read_prompt, served_model

HONEST = Behaviour()
KEY = "sk-ant-api03-simulated-key-for-tests-and-the-demo"
ADMIN_KEY = "sk-ant-admin01-simulated-admin-key-for-tests"
ORGANIZATION_ID = "0e1d5b1c-0000-4000-8000-51301a7ed000"
WORKSPACE_ID = "wrkspc_01SimulatedWorkspace"
JSON = ("content-type", "application/json")
EDGE_HEADERS = [
    ("server", "cloudflare"), ("cf-ray", "87084f286b44103c-LAX"), ("cf-cache-status", "DYNAMIC"), ("via", "1.1 google"),
    ("x-robots-tag", "none"), ("vary", "Accept-Encoding"), ("strict-transport-security", "max-age=31536000; includeSubDomains; preload"),
]  # fmt: skip
"""Headers that the edge in front of the real API adds to its answers, by the recorded ones."""
LIMITS_PER_MINUTE = {"requests": 4_000, "input-tokens": 2_000_000, "output-tokens": 400_000, "tokens": 2_400_000}


class Simulator:
    """A server on its own loopback port. `behaviour` and `key` may be replaced at any time; they hold from the next request on."""

    def __init__(
        self,
        *,
        key: str = KEY,
        behaviour: Behaviour = HONEST,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.key = key
        self.also: set[str] = set()
        """Further keys in force: while a key is rotated there are two."""
        self.behaviour = behaviour
        self.book = Book()
        self._host, self._port, self._tls = host, port, tls
        self._cache = Cache()
        self._run = uuid.uuid4().hex[:12]
        self._numbers = itertools.count(1)
        self._lost = itertools.count()
        """The calls that an edge lost late."""
        self.batches = Batches(self._generate, time.time)
        self.files = Files(time.time)
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, self._host, self._port, ssl=self._tls, backlog=1024)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop listening and drop every connection; what was in flight is billed as if its client had left."""
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._host}:{self._port}"

    async def settled(self) -> Book:
        """Return the book once nothing is in flight: a client that hung up is noticed after a moment. Bound it with asyncio.timeout."""
        while self.book.in_flight:
            await asyncio.sleep(0.002)
        return self.book

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.book.connections += 1
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await serve(reader, writer, self._answer, self._received)
        finally:
            self._connections.discard(task)

    def _received(self, count: int) -> None:
        self.book.bytes_received += count

    async def _answer(self, exchange: Exchange) -> None:
        """Answer one request: into the book, to its endpoint, and its end into the book again."""
        request = exchange.request
        if request.target.startswith("/_simulator/"):
            await self._private(exchange)
            return
        request_id = f"req_{self._run}{next(self._numbers):012d}"
        self.book.open(_row(request_id, request))
        delivered = False
        try:
            try:
                await self._endpoint(exchange, request_id)
            except ApiError as refused:
                await self._reply(exchange, request_id, refused.status, refused.body(request_id), refused.headers)
            delivered = True
        finally:
            answered = exchange.sent_sha256.hexdigest()
            self.book.note(request_id, status=exchange.status, in_flight=False, delivered=delivered, answer_sha256=answered)

    async def _private(self, exchange: Exchange) -> None:
        """Return the book to the process that started the simulation. This is no call of the API, so it is not in the book."""
        known = exchange.request.target == "/_simulator/book"
        body = json.dumps(self.book.as_dict() if known else None).encode()
        await exchange.answer(200 if known else 404, [JSON], body)

    async def _endpoint(self, exchange: Exchange, request_id: str) -> None:
        """Answer a request by its path. Raises ApiError."""
        request = exchange.request
        path, _, query = request.target.partition("?")
        if path == "/api/hello" and request.method in ("GET", "HEAD"):
            await self._reply(exchange, request_id, 200, b"{}")
            return
        if request.too_large:
            raise ApiError("request_too_large", "Request exceeds the maximum size")
        if path.startswith("/v1/organizations/"):
            _authenticate(request, {ADMIN_KEY})
            await self._reply(exchange, request_id, 200, json.dumps(self._report(request.method, path, parse_qs(query))).encode())
            return
        _authenticate(request, {self.key, *self.also})
        match request.method, path.split("/")[1:]:
            case "POST", ["v1", "messages"]:
                await self._messages(exchange, request_id)
            case "POST", ["v1", "messages", "count_tokens"]:
                body, _ = read_prompt(request)
                counted = tokens(body, len(request.body), hostile=_behaviour(self.behaviour, body).hostile)
                await self._reply(exchange, request_id, 200, json.dumps({"input_tokens": counted}).encode())
            case "GET", ["v1", "models"]:
                await self._reply(exchange, request_id, 200, json.dumps(model_page(parse_qs(query))).encode())
            case "GET", ["v1", "models", model]:
                await self._reply(exchange, request_id, 200, json.dumps(model_info(unquote(model))).encode())
            case "GET", ["v1", "messages", "batches", id, "results"]:
                await self._results(exchange, request_id, id)
            case "GET", ["v1", "files", id, "content"]:
                file = self.files.find(id)
                await exchange.answer(200, [("content-type", file.mime_type), *self._headers(request_id, self.behaviour)], file.content)
            case method, ["v1", "messages", "batches", *rest]:
                await self._reply(exchange, request_id, 200, json.dumps(self._batch(method, rest, request, parse_qs(query))).encode())
            case method, ["v1", "files", *rest]:
                await self._reply(exchange, request_id, 200, json.dumps(self._file(method, rest, request, parse_qs(query))).encode())
            case _:
                raise ApiError("not_found_error", f"Not found: {request.method} {path}")

    def _batch(self, method: str, rest: list[str], request: Request, query: dict[str, list[str]]) -> dict[str, Any]:
        """Answer a request about batches, as JSON."""
        match method, rest:
            case "POST", []:
                id, server = f"msgbatch_{self._run}{next(self._numbers):012d}", self.behaviour
                made = self.batches.create(id, read_json(request), lambda params: _behaviour(server, params).batch_result, server.batch_s)
                return made.object(self.url)
            case "GET", []:
                return self.batches.page(query, self.url)
            case "GET", [id]:
                return self.batches.find(id).object(self.url)
            case "DELETE", [id]:
                return self.batches.delete(id)
            case "POST", [id, "cancel"]:
                return self.batches.cancel(id).object(self.url)
            case _:
                raise ApiError("not_found_error", f"Not found: {method} {request.target}")

    def _file(self, method: str, rest: list[str], request: Request, query: dict[str, list[str]]) -> dict[str, Any]:
        """Answer a request about files, as JSON."""
        match method, rest:
            case "POST", []:
                return self.files.upload(f"file_{self._run}{next(self._numbers):012d}", request)
            case "GET", []:
                return self.files.page(query)
            case "GET", [id]:
                return self.files.find(id).object
            case "DELETE", [id]:
                return self.files.delete(id)
            case _:
                raise ApiError("not_found_error", f"Not found: {method} {request.target}")

    async def _results(self, exchange: Exchange, request_id: str, id: str) -> None:
        """Send the file of a batch's results, line by line."""
        lines = self.batches.results(id)
        exchange.cut_after_bytes = self.behaviour.cut_after_bytes
        headers = [("content-type", "application/x-jsonl"), *self._headers(request_id, self.behaviour)]
        await exchange.start(200, headers, encoding=_encoding(exchange.request, self.behaviour))
        for line in lines:
            await exchange.send(line)
        await exchange.finish()

    def _generate(self, place: str, params: dict[str, Any]) -> dict[str, Any]:
        """Generate one request of a batch, as a row of its own in the book."""
        served = served_model(params)
        behaviour = replace(_behaviour(self.behaviour, params), service_tier="batch")
        size = len(json.dumps(params))
        check_message(size, params, served, hostile=behaviour.hostile)
        request_id = f"req_{self._run}{next(self._numbers):012d}"
        self.book.open(Row(request_id, "BATCH", place, (("x-api-key", self.key),), size, "", time.time(), 200, in_flight=False))
        answer = generate(f"msg_{request_id[4:]}", behaviour.served_model or served, params, size, behaviour, self._cache)
        self.book.note(request_id, message_id=answer.message_id, model_asked=params["model"], model_served=answer.model)
        self.book.note(request_id, stop_reason=answer.stop_reason, delivered=True)
        self.book.bill(request_id, answer.final, answer.iterations)
        return answer.json()

    def _report(self, method: str, path: str, query: dict[str, list[str]]) -> dict[str, Any]:
        """Answer a request of the organisation's administrators."""
        match method, path.split("/")[3:]:
            case "GET", ["usage_report", "messages"]:
                return admin.usage_report(self.book.all(), query, WORKSPACE_ID, time.time())
            case "GET", ["cost_report"]:
                return admin.cost_report(self.book.all(), query, WORKSPACE_ID, time.time())
            case _:
                raise ApiError("not_found_error", f"Not found: {method} {path}")

    async def _messages(self, exchange: Exchange, request_id: str) -> None:
        clock = Clock()
        request = exchange.request
        body, model = read_prompt(request)
        stream = body.get("stream") is True
        self.book.note(request_id, model_asked=body["model"], stream=stream)
        behaviour = _behaviour(self.behaviour, body)
        check_message(len(request.body), body, model, hostile=behaviour.hostile)
        await _refuse_as_told(exchange, behaviour, stream)
        answer = generate(f"msg_{request_id[4:]}", behaviour.served_model or model, body, len(request.body), behaviour, self._cache)
        self.book.note(request_id, message_id=answer.message_id, model_served=answer.model, stop_reason=answer.stop_reason)
        exchange.cut_after_bytes = behaviour.cut_after_bytes
        headers, encoding = self._headers(request_id, behaviour), _encoding(request, behaviour)
        deliver = deliver_stream if stream else deliver_json
        used: Made | None = None
        try:
            if behaviour.edge is None:
                used = await deliver(exchange, answer, behaviour, headers, encoding, clock)
            elif await deliver_page(exchange, behaviour, clock) and next(self._lost) % 3 == 0:
                used = billed(answer, behaviour, clock.elapsed_s())
        except (HungUp, asyncio.CancelledError):
            used = billed(answer, behaviour, clock.elapsed_s())
            raise
        finally:
            if used is not None:
                self.book.bill(request_id, answer.used(used), answer.iterations)

    async def _reply(self, exchange: Exchange, request_id: str, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Send an answer without a model in it: nothing of it is billed."""
        send = exchange.answer if exchange.request.method == "HEAD" else exchange.answer_in_chunks
        said = [JSON, *self._headers(request_id, self.behaviour), *(headers or [])]
        await send(status, said, body, encoding=_encoding(exchange.request, self.behaviour))

    def _headers(self, request_id: str, behaviour: Behaviour) -> Headers:
        """Return the headers in which the real API describes the request and the shared account."""
        reset = (datetime.now(UTC) + timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        headers = [("date", formatdate(usegmt=True)), ("connection", "keep-alive"), ("request-id", request_id), *EDGE_HEADERS]
        headers += [("anthropic-organization-id", ORGANIZATION_ID), ("anthropic-workspace-id", WORKSPACE_ID)]
        for kind, limit in LIMITS_PER_MINUTE.items():
            remaining = limit * behaviour.ratelimit_remaining_percent // 100
            said = {"limit": str(limit), "remaining": str(remaining), "reset": reset}
            headers += [(f"anthropic-ratelimit-{kind}-{name}", value) for name, value in said.items()]
        return headers


def _row(request_id: str, request: Request) -> Row:
    digest = hashlib.sha256(request.body).hexdigest()
    return Row(request_id, request.method, request.target, request.headers, len(request.body), digest, time.time())


def _authenticate(request: Request, keys: set[str]) -> None:
    """Check the key, which may come in either header. Where both come, both have to be right."""
    right = {"x-api-key": keys, "authorization": {f"Bearer {key}" for key in keys}}
    given = [(name, value) for name, value in request.headers if name in right]
    if not given or not all(any(hmac.compare_digest(value.encode(), key.encode()) for key in right[name]) for name, value in given):
        raise ApiError("authentication_error", "invalid x-api-key")


def _behaviour(server: Behaviour, body: dict[str, Any]) -> Behaviour:
    try:
        return overridden(server, body)
    except ValueError as error:
        raise ApiError("invalid_request_error", str(error)) from error


async def _refuse_as_told(exchange: Exchange, behaviour: Behaviour, stream: bool) -> None:
    """Raise the error that is to come before any work. A stream's own `error` comes in its middle instead."""
    if behaviour.status is not None:
        await exchange.pause(behaviour.delay_headers_s)
        raise ApiError.of_status(behaviour.status, behaviour.retry_after_s, behaviour.error)
    if behaviour.error is not None and not stream:
        raise ApiError(behaviour.error, "The simulated API was asked to fail", retry_after_s=behaviour.retry_after_s)


def _encoding(request: Request, behaviour: Behaviour) -> str:
    """Return gzip where the client offers it, as the real API does, on errors and events too."""
    offered = [part.strip() for part in (request.header("accept-encoding") or "").split(",")]
    return behaviour.encoding or ("gzip" if "gzip" in offered else "identity")
