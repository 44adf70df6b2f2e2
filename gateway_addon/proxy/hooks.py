"""Handle mitmproxy's hooks, in the order in which a flow meets them: connection, request, answer, end.

Promises that nothing passes undecided. mitmproxy lets a flow go on when a hook raises, so every hook is guarded: a failure
is a refusal on the way in, a conservative settlement on the way out. Decides nothing: gateway.py does. inject.py puts the
real key on the wire; this module carries values between mitmproxy and those two.
"""

import asyncio
import functools
import json
import logging
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from types import CoroutineType
from typing import Any, Literal

from mitmproxy import connection, ctx, exceptions, http, tls
from mitmproxy.proxy import server_hooks
from mitmproxy.proxy.layer import NextLayer
from OpenSSL import SSL

from gateway_addon.calls import exchange
from gateway_addon.calls.admission import Caller, EndedBy
from gateway_addon.calls.exchange import ExchangeRequest
from gateway_addon.calls.gateway import Gateway
from gateway_addon.calls.responses import OwnResponse, cap_headers, edited_header, note_header
from gateway_addon.clocks import SYSTEM, Clocks
from gateway_addon.http_client import STRAIGHT
from gateway_addon.messages import header_filter, labels
from gateway_addon.messages.request import Request
from gateway_addon.proxy import backpressure, inject, request_head
from gateway_addon.proxy.certificate import Certificate
from gateway_addon.proxy.flow_values import base_url_of, body_bytes_announced, encoded_headers, lowered_headers, method_of, request_of
from gateway_addon.proxy.flows import FlowState, SendPermission, close_forgotten
from gateway_addon.refusals import Refusal, new_request_id

logger = logging.getLogger(__name__)

UNREAD_BODY_MAX = 64 * 1024  # a body whose answer is already decided is read up to this; beyond it the connection is closed
BODY_BYTES_MAX = 33 * 1024 * 1024  # a little above the API's own 32 MB, so that its limit is refused with its own sentence
PATH_LABELS = labels.PATH_HEADER.encode()
REPLACED = frozenset({b"x-api-key", b"authorization", b"proxy-authorization", b"accept-encoding", b"x-forwarded-for", PATH_LABELS})
"""Request headers that no flow shows as they came: credentials, addresses in the operator's own network, what is the gateway's to say."""
IDENTITY = (b"accept-encoding", b"identity")  # compression would delay the first tokens of a stream
LOGGED_DROPS_MAX = 1_000  # header names whose first drop is logged: an app can invent names without end
REQUIRED_OPTIONS: dict[str, Any] = {
    "proxy_debug": False,  # prints the bytes of the wire, the key among them
    "ssl_insecure": False,  # would hand the key to anybody who answers
    "stream_large_bodies": None,  # would send a body before it is judged
    "keep_host_header": False,
    "validate_inbound_headers": True,  # mitmproxy's guard against request smuggling
    "connection_strategy": "lazy",  # eager opens an upstream connection for refused calls too
    "http2": False,  # a graceful GOAWAY would kill the streams in flight
    "websocket": False,
    "rawtcp": False,
}
REDIRECT = (
    "The Claude API answered with a redirect ({}), which the gateway does not hand on: your client would send the whole prompt there, past "
    "the gateway. The call cost nothing. The operator can name the API's own address in gateway.yaml (upstream)."
)
LEFT = Refusal("draining", "The client left before the call was admitted.")

type Side = Literal["connection", "request", "response"]


def guarded(side: Side) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a hook that cannot raise: mitmproxy would only log the exception and let the flow go on.

    The hook keeps its guard as `hook.guard`, so that a test can put a failing body behind the same guard.
    """

    def guard(hook: Callable[..., Any]) -> Callable[..., Any]:
        def failed(self: "GatewayAddon", data: Any, error: Exception) -> None:
            inject.log_failure(f"its {hook.__name__} hook", error)
            self.fail(side, data, inject.failed(error))

        @functools.wraps(hook)
        def call(self: "GatewayAddon", data: Any) -> Any:
            try:
                result = hook(self, data)
            except Exception as error:
                return failed(self, data, error)
            return finish(self, result, data) if isinstance(result, CoroutineType) else None

        async def finish(self: "GatewayAddon", result: Any, data: Any) -> None:
            try:
                await result
            except Exception as error:
                failed(self, data, error)

        call.guard = guard  # type: ignore[attr-defined]
        return call

    return guard


class GatewayAddon:
    """Carry a flow's values between mitmproxy and the gateway."""

    def __init__(self, gateway: Gateway, key: Callable[[], str], clocks: Clocks = SYSTEM, key_refused: Callable[[], None] = lambda: None):
        """Take the gateway. `key` returns the real API key, the new one after a rotation; `key_refused` is called at a 401."""
        self.gateway = gateway
        self.key = key
        self.clocks = clocks
        self.key_refused = key_refused
        self.certificate = Certificate()
        self.draining = False
        self.on_running: Callable[[], None] = lambda: None
        self.egress = STRAIGHT
        """The route to the upstream."""
        self.logged_drops: set[bytes] = set()
        self.flow_states: dict[str, FlowState] = {}
        """All flows whose calls have not ended, by their ids. The first to end one removes it, and with it all that is known of it."""
        gateway.streams.flows = self.flow_states

    # -- the proxy's own life

    def configure(self, updated: set[str]) -> None:
        """Refuse options that would let calls bypass the gateway, at start-up and while running (mitmweb can set them)."""
        for name, required in REQUIRED_OPTIONS.items():
            if name in updated and getattr(ctx.options, name) != required:
                raise exceptions.OptionsError(f"The gateway needs {name}={json.dumps(required)}; {name} cannot be changed while it runs.")

    def running(self) -> None:
        self.on_running()

    async def done(self) -> None:
        """Stop listening, let calls in flight finish, then settle the rest."""
        self.draining = True
        await ctx.master.addons.get("proxyserver").servers.update([])
        deadline_monotonic_s = self.clocks.monotonic_s() + self.gateway.policy.timeouts.drain_s
        while self.flow_states and self.clocks.monotonic_s() < deadline_monotonic_s:
            await asyncio.sleep(0.05)
        self.end_all()
        self.gateway.stop()

    def end_all(self) -> None:
        """End and settle every call in flight."""
        for flow_id in list(self.flow_states):
            self.finish(flow_id, "gateway")

    # -- a connection

    @guarded("connection")
    def next_layer(self, data: NextLayer) -> None:
        """Put the injecting layer and the timed handler in place."""
        ctx.master.addons.get("nextlayer").next_layer(data)
        backpressure.install(data.context.client)
        inject.install(data.layer, self)

    @guarded("connection")
    def tls_start_client(self, data: tls.TlsData) -> None:
        """Answer with the operator's certificate, where the policy names one."""
        if self.gateway.policy.tls is not None:
            data.ssl_conn = SSL.Connection(self.certificate.context(self.gateway.policy.tls))
            data.ssl_conn.set_accept_state()

    @guarded("connection")
    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Open a connection to the upstream for an admitted call alone, and keep it, so that the call can be cut."""
        flow_state = self._under_way(data.client)
        if flow_state is None or flow_state.admission is None:
            data.server.error = "no admitted call asks for this connection"
        else:
            flow_state.server = data.server

    @guarded("connection")
    async def client_disconnected(self, client: connection.Client) -> None:
        """Stop waiting for budget for a client that has left; read an answer that does not stream to its end.

        mitmproxy closes the connection to the upstream when this hook returns.
        """
        flow_state = self._under_way(client)
        close_forgotten(client)
        if flow_state is not None:
            flow_state.left = True
            flow_state.stop_waiting()
            await flow_state.finished()

    def _under_way(self, client: connection.Client) -> FlowState | None:
        """Return the state of the flow under way on a client's connection."""
        handler = backpressure.handler_of(client)
        return None if handler is None else handler.flow_state

    @guarded("connection")
    def http_connect_upstream(self, flow: http.HTTPFlow) -> None:
        """Authenticate at a proxy on the route to the upstream."""
        if self.egress.authorization is not None:
            flow.request.headers["proxy-authorization"] = self.egress.authorization

    # -- a request

    @guarded("request")
    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Take the credential off the flow before anything can show it, and labels off its path, and authenticate the caller."""
        shown = flow.request.headers
        headers = lowered_headers(shown)
        kept = [field for field in shown.fields if field[0].lower() not in REPLACED]
        in_path, path = labels.split_path(flow.request.path)
        if in_path:
            flow.request.path = path
            kept.append((PATH_LABELS, in_path.encode()))
        shown.fields = (*header_filter.without_credential_betas(kept), IDENTITY)
        flow_state = self.flow_states.get(flow.id)
        caller = await self._authenticate(flow, headers)
        announced_bytes = body_bytes_announced(headers)
        if isinstance(caller, Caller):
            caller = self._overloaded(flow, caller, announced_bytes or 0) or caller
        if isinstance(caller, ExchangeRequest) and flow_state is not None and (announced_bytes or 0) <= exchange.BODY_BYTES_MAX:
            flow_state.exchange = caller
            return None
        if not isinstance(caller, Caller):
            if flow_state is not None:
                long = announced_bytes is None or announced_bytes > UNREAD_BODY_MAX
                flow_state.close_unread = not flow.is_replay and (long or _is_exchange(flow))
            return self.answer(flow, exchange.TOO_LARGE if isinstance(caller, ExchangeRequest) else caller)
        assert flow_state is not None
        flow_state.caller, flow_state.hold_open = caller, caller.app.abandoned == "finish"
        label = (b"x-api-key", f"app:{caller.app.name}".encode())  # for people; the wire copy gets the key
        shown.fields = (*shown.fields, label)
        return None

    def begin(self, flow: http.HTTPFlow) -> FlowState:
        """Remember a flow, before its first hook (called by its stream, inject.py)."""
        handler = backpressure.handler_of(flow.client_conn)
        flow_state = self.flow_states[flow.id] = FlowState(flow, self.gateway, self.clocks, handler)
        if handler is not None:
            handler.flow_state = flow_state
        return flow_state

    def body_grew(self, flow_state: FlowState) -> bool:
        """Refuse a body without an announced length once it has grown beyond the memory that is left (called by its stream)."""
        if flow_state.flow.response:
            return False
        if flow_state.exchange is not None:
            refusal = exchange.TOO_LARGE if flow_state.body_bytes > exchange.BODY_BYTES_MAX else None
        elif flow_state.caller is not None:
            refusal = self._overloaded(flow_state.flow, flow_state.caller, flow_state.body_bytes)
        else:
            return False
        if refusal is not None:
            self.answer(flow_state.flow, refusal)
        return refusal is not None

    def _overloaded(self, flow: http.HTTPFlow, caller: Caller, body_bytes: int) -> Refusal | None:
        """Refuse a body for which there is no memory beside those in flight, None where there is."""

        def held_bytes() -> int:
            return sum(each.body_bytes for each in self.flow_states.values() if each.flow is not flow)

        return self.gateway.overloaded(caller, body_bytes, held_bytes, self.clocks.now())

    async def _authenticate(
        self, flow: http.HTTPFlow, headers: tuple[tuple[str, str], ...]
    ) -> Caller | ExchangeRequest | OwnResponse | Refusal:
        if flow.is_replay:
            return Refusal("replay", "A replayed flow carries no token. Send the call again from its app.")
        return await self._authenticate_with(flow, headers)

    async def _authenticate_with(
        self, flow: http.HTTPFlow, headers: tuple[tuple[str, str], ...], digest: str | None = None
    ) -> Caller | ExchangeRequest | OwnResponse | Refusal:
        """Authenticate a request by its token, or, where it carries none, by the `digest` of one that was verified before."""
        if self.draining:
            return Refusal("draining", "This gateway is shutting down; send the call again.", retry_after_s=1)
        if flow.id not in self.flow_states:
            return Refusal("internal", inject.FAILED)  # its `next_layer` hook has failed, so no layer injects
        if (wrong := request_head.problem(flow.request.http_version, headers)) is not None:
            return Refusal("request", wrong)
        if flow.request.authority:
            return Refusal("request", "The request names another host in its first line. Use the gateway as the base URL, not as a proxy.")
        if flow.request.scheme not in ("http", "https"):  # mitmproxy has found something, and tells nobody what
            return Refusal("request", request_head.NOT_WELL_FORMED)
        if [name for name, value in headers if name == "upgrade" and "websocket" in value.lower()]:  # any other is an offer: not taken up
            return Refusal("upgrade", "The gateway speaks no websockets. Send the call as plain HTTP/1.1, without an Upgrade header.")
        if self.gateway.policy.tls and not flow.client_conn.tls:
            return Refusal("request", "This gateway takes calls over https alone, so that tokens do not cross the network in clear.")
        peer = flow.client_conn.peername[0] if flow.client_conn.peername else ""
        method, base_url = method_of(flow.request), functools.partial(base_url_of, flow.client_conn, headers)
        return await self.gateway.authenticate(method, flow.request.path, headers, peer, self.clocks.now(), digest, base_url)

    @guarded("request")
    async def request(self, flow: http.HTTPFlow) -> None:
        """Have the call admitted, now that its body is complete, or answer it here."""
        if flow.response or flow.error:
            return
        flow_state = self.flow_states[flow.id]
        if flow_state.exchange is not None:
            return await self._exchange(flow, flow_state.exchange)
        assert flow_state.caller is not None
        request, as_judged = request_of(flow), (flow.request.headers.fields, flow.request.raw_content)
        flow_state.body_bytes = len(request.body)
        task = flow_state.admitting = asyncio.current_task()
        assert task is not None
        try:
            decision = await self.gateway.admit(flow_state.caller, request, self.clocks.now())
        except asyncio.CancelledError:
            if not flow_state.left:
                raise
            task.uncancel()
            return self.answer(flow, LEFT)
        finally:
            flow_state.admitting = None
        if isinstance(decision, OwnResponse | Refusal):
            return self.answer(flow, decision)
        flow_state.began(decision, self.clocks.monotonic_s())
        if flow_state.left or (flow_state.client_closed and not flow_state.hold_open):
            self.finish(flow.id, "client")
            return self.answer(flow, LEFT)
        if decision.body is not None:
            flow.request.headers.fields = as_judged[0]
            flow.request.content = decision.body
            as_judged = (flow.request.headers.fields, flow.request.raw_content)
        if self.egress.proxy is not None:
            flow.server_conn.via = "http", self.egress.proxy
        flow_state.grant = self._grant(flow_state.caller, request, *as_judged)
        flow_state.watch()

    async def _exchange(self, flow: http.HTTPFlow, asked: ExchangeRequest) -> None:
        """Answer an exchange, whose body is a credential: it is off the flow before anything can show it."""
        body, flow.request.raw_content = flow.request.raw_content or b"", b""
        self.answer(flow, await self.gateway.exchange(asked, body, flow.request.headers.get("content-type", ""), self.clocks.now()))

    def _grant(
        self, caller: Caller, request: Request, fields: tuple[tuple[bytes, bytes], ...], body: bytes | None
    ) -> SendPermission:
        """Permit the request to be sent as it was judged: under mitmweb a person may have edited the flow meanwhile."""
        address, secure = inject.address(caller.policy.upstream)
        leaving, dropped = header_filter.leaving(fields, caller.policy.pass_headers)
        self._log_drops(caller.app.name, dropped)
        return SendPermission(address, secure, request.method, request.target, fields, leaving, body, ("x-api-key", self.key()))

    def _log_drops(self, app: str, names: Iterable[bytes]) -> None:
        """Log the first drop of each header name, for a person who misses it upstream."""
        for name in names:
            if name not in self.logged_drops and len(self.logged_drops) < LOGGED_DROPS_MAX:
                self.logged_drops.add(name)
                shown = name[:100].decode("ascii", "backslashreplace")
                logger.info(
                    "The request header %s (app %s) is not sent on: the Claude API does not know it. "
                    "If it shall leave all the same: pass_headers: [%s] in gateway.yaml.", shown, app, shown,
                )  # fmt: skip

    # -- the answer

    @guarded("response")
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """Start to meter the answer, or replace it. A stream passes chunk by chunk, unchanged."""
        flow_state, response = self.flow_states.get(flow.id), flow.response
        if flow_state is None or response is None or flow_state.caller is None or flow_state.admission is None:
            return
        running, status, shown = flow_state.running, response.status_code, response.headers
        flow_state.status, lowered = status, lowered_headers(shown)
        self.gateway.upstream_headers(flow_state.caller, status, lowered, self.clocks.now())
        if status == 401:
            self.key_refused()
        if (refusal := not_handed_on(status)) is not None:
            if running is not None:
                running.status = status
            flow_state.refusal = refusal
            flow.kill()
            return
        own = [*edited_header(flow_state.admission.edited), *flow_state.admission.response_hook.headers]
        response.data.reason = header_filter.plain_reason(response.data.reason)
        if running is not None:
            known = dict(lowered)
            content_type = known.get("content-type", "")
            running.answered(
                status, content_type, known.get("content-encoding"), known.get("request-id"),
                now=self.clocks.now(), monotonic_s=self.clocks.monotonic_s(),
            )  # fmt: skip
            streamed = status == 200 and "json" not in content_type
            flow_state.watch()
            own += [*note_header(running.refused_as_retired()), *cap_headers(flow_state.caller.app, running.hold.reserved.standings)]
        elif (streamed := flow_state.admission.response_hook.streamed and status == 200):
            flow_state.last_byte_monotonic_s = self.clocks.monotonic_s()
            flow_state.watch()
        if streamed:
            response.stream = functools.partial(self._chunk, weakref.ref(flow_state))
        shown.fields = header_filter.coming_in(shown.fields) + encoded_headers(own)

    def _chunk(self, state_ref: weakref.ref[FlowState], chunk: bytes) -> bytes:
        """Meter one chunk of a stream. Must not raise: mitmproxy would drop the chunk.

        The flow refers to this function, and the state to its flow: a strong reference would keep both alive.
        """
        flow_state = state_ref()
        if flow_state is None:
            return chunk
        try:
            return flow_state.chunk(chunk)
        except Exception as error:
            inject.log_failure("its stream tap", error)
            self.fail("response", flow_state.flow, inject.failed(error))
            return chunk

    @guarded("response")
    def response(self, flow: http.HTTPFlow) -> Coroutine[Any, Any, None] | None:
        """End a call whose answer is complete. (The gateway's own answers come here too, and have nothing to settle.)"""
        flow_state, response = self.flow_states.get(flow.id), flow.response
        if flow_state is None or response is None:
            return None
        body = response.raw_content
        if flow_state.running is not None and body is not None and response.stream is False:
            monotonic_s = self.clocks.monotonic_s()
            flow_state.running.feed(body, monotonic_s, self.gateway.streams.stalled_s(monotonic_s))
        whole = flow_state.admission.response_hook.whole if flow_state.admission is not None else None
        if whole is not None and response.stream is False:
            return self._run_response_hook(flow, response, whole)
        # The call is settled while the client reads its answer, and before any later event.
        asyncio.get_running_loop().call_soon(self.after_response, flow)
        return None

    @guarded("response")
    def after_response(self, flow: http.HTTPFlow) -> None:
        self.finish(flow.id, "whole")

    async def _run_response_hook(
        self, flow: http.HTTPFlow, response: http.Response, response_hook: Callable[[int, bytes], Awaitable[bytes]]
    ) -> None:
        content = response.content or b""
        changed = await response_hook(response.status_code, content)
        if changed != content:
            response.headers.pop("content-encoding", None)
            response.content = changed
        self.finish(flow.id, "whole")

    @guarded("response")
    def error(self, flow: http.HTTPFlow) -> None:
        """End a call whose exchange broke, on either side, or was never possible."""
        flow_state = self.flow_states.get(flow.id)
        self.finish(flow.id, (flow_state and flow_state.broken_by) or "upstream")

    # -- endings

    def answer(self, flow: http.HTTPFlow, answer: OwnResponse | Refusal) -> None:
        """Answer a flow here. A refused call opens no connection, and looks no name up."""
        request_id = new_request_id()
        if isinstance(answer, Refusal):
            status, headers, body = answer.status, answer.headers(request_id), answer.body(request_id)
        else:
            headers = {"content-type": answer.content_type, "cache-control": "no-store", "request-id": request_id} | dict(answer.headers)
            status, body = answer.status, answer.content()
        flow.response = http.Response.make(status, body, headers)
        if flow.request.method == "HEAD":
            flow.response.raw_content = b""  # with the length of what a GET would get; bytes would be taken for the next answer
        if (flow_state := self.flow_states.pop(flow.id, None)) is not None:
            if isinstance(answer, OwnResponse) and answer.secret is not None:
                flow_state.unmasked = exchange.mask(answer.secret).encode(), answer.secret.encode()
            flow_state.end()

    def finish(self, flow_id: str, ended_by: EndedBy) -> None:
        """Resolve the flow's reservation, once: a second call does nothing."""
        flow_state = self.flow_states.pop(flow_id, None)
        if flow_state is None:
            return
        flow_state.end()
        now = self.clocks.now()
        if flow_state.running is not None:
            self.gateway.close(flow_state.running, sent=flow_state.sent, ended_by=ended_by, now=now)
        elif flow_state.admission is not None:
            self.gateway.close_unmetered(flow_state.admission, flow_state.status, sent=flow_state.sent, ended_by=ended_by, now=now)

    def fail(self, side: Side, data: Any, refusal: Refusal) -> None:
        """End a flow whose hook failed: nothing unjudged passes, and nothing that may have been billed goes unsettled."""
        if isinstance(data, http.HTTPFlow) and side == "request":
            try:
                self.finish(data.id, "gateway")
            finally:
                self.answer(data, refusal)
        elif isinstance(data, http.HTTPFlow):
            flow_state = self.flow_states.get(data.id)
            if flow_state is not None and flow_state.running is not None and flow_state.running.in_steps:
                flow_state.close_upstream()  # nothing tops up its grant any more
            self.finish(data.id, "gateway")
        elif isinstance(data, NextLayer):
            inject.uninstall(data.layer)
        elif isinstance(data, server_hooks.ServerConnectionHookData):
            data.server.error = "the gateway failed before the connection was opened"


def _is_exchange(flow: http.HTTPFlow) -> bool:
    return flow.request.path.partition("?")[0] == exchange.PATH


def not_handed_on(status: int) -> Refusal | None:
    """Return the refusal that replaces an answer which no client of the API should act on, or None."""
    if 300 <= status < 400:
        return Refusal("upstream_redirect", REDIRECT.format(status))
    if not 200 <= status < 600:
        return Refusal("upstream_unreachable", f"The Claude API answered with status {status}, which ends no call. Try again.")
    return None
