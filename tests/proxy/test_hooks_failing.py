"""Nothing passes undecided: whichever hook of the addon fails, nothing is forwarded, or nothing of its bill is lost.

The hooks are found by reflection, so that a new one cannot be forgotten. Each failing body stands behind the hook's own guard.
"""

import asyncio
import functools
import inspect
import json

import anthropic
import pytest
from gateway import gateway
from ledgers import until
from mitmproxy import exceptions, hooks
from mitmproxy.addons.clientplayback import ClientPlayback

from gateway_addon.calls.gateway import Gateway
from gateway_addon.proxy.flows import FlowState
from gateway_addon.proxy.hooks import REQUIRED_OPTIONS, GatewayAddon
from gateway_addon.simulator import Behaviour, Simulator

HELLO = [{"role": "user", "content": "Say hello."}]
ASK = {"model": "claude-haiku-4-5", "max_tokens": 100, "messages": HELLO}
APP = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $100}\n"

HOOKS = {name for name, _ in inspect.getmembers(GatewayAddon, callable) if name in hooks.all_hooks}
GUARDED = {name for name in HOOKS if hasattr(getattr(GatewayAddon, name), "guard")}
UNGUARDED = {
    "configure": "raising is how it refuses an option",
    "running": "the proxy does not start without it",
    "done": "no flow goes on after it",
}
BEFORE_THE_API = ("next_layer", "requestheaders", "request", "server_connect")
AFTER = ("responseheaders", "response", "error", "client_disconnected")


class Bug(Exception):
    pass


def broken(name: str, when: str):
    """The addon's hook with a body that fails at once, or after its work is done, behind the guard of the real one."""
    hook = getattr(GatewayAddon, name)
    work = hook.__wrapped__

    @functools.wraps(work)
    def fails(self, data):
        if when == "after":
            work(self, data)
        raise Bug(name)

    @functools.wraps(work)
    async def fails_later(self, data):
        if when == "after":
            await work(self, data)
        await asyncio.sleep(0)
        raise Bug(name)

    return hook.guard(fails_later if inspect.iscoroutinefunction(work) else fails)


async def ask(gw, *, stream: bool, **more) -> bytes | Exception:
    """What a client gets: the bytes of an answer, or the exception."""
    try:
        async with gw.client().messages.with_streaming_response.create(**ASK, stream=stream, **more) as answer:
            return b"".join([chunk async for chunk in answer.iter_bytes()])
    except (anthropic.APIError, anthropic.APIConnectionError) as error:
        return error
    except Exception as error:  # the body broke off: whatever the HTTP library calls that
        return error


def test_every_hook_is_guarded_or_has_a_reason_not_to_be():
    assert set(UNGUARDED) == HOOKS - GUARDED
    over_tls = {"tls_start_client"}  # where it fails the client meets a certificate that it does not trust, and sends nothing
    at_a_proxy = {"http_connect_upstream"}  # where it fails the proxy is not told who asks, and opens no tunnel
    assert {*BEFORE_THE_API, *AFTER, *over_tls, *at_a_proxy} == GUARDED, "a new hook: say in this test what its failure must do"


@pytest.mark.usefixtures("either_dispatch")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", BEFORE_THE_API)
async def test_a_failure_on_the_way_in_sends_nothing(tmp_path, monkeypatch, caplog, name, when):
    monkeypatch.setattr(GatewayAddon, name, broken(name, when))
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP}) as gw:
        for stream in (False, True):
            said = await ask(gw, stream=stream)
            assert isinstance(said, anthropic.APIError)
            if name in ("requestheaders", "request"):
                assert (said.status_code, said.body["error"]["type"]) == (503, "api_error")
                assert said.response.headers["x-should-retry"] == "false"
        await gw.quiet()
        assert (api.book.requests, api.book.bytes_received) == (0, 0)
        assert (await gw.spent_nano(), await gw.held_nano()) == (0, 0)
    assert f"failed in its {name} hook" in caplog.text


@pytest.mark.usefixtures("either_dispatch")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", AFTER)
async def test_a_failure_on_the_way_out_forgets_nothing_of_the_bill(tmp_path, monkeypatch, caplog, name, when):
    monkeypatch.setattr(GatewayAddon, name, broken(name, when))
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP}) as gw:
        for stream in (False, True):
            cut = Behaviour(cut_after_events=4) if stream else Behaviour(cut_after_bytes=40)
            api.behaviour = cut if name == "error" else Behaviour()
            said = await ask(gw, stream=stream)
            assert name == "error" or isinstance(said, bytes)
            if isinstance(said, bytes) and name != "error":
                assert ("message_stop" if stream else "end_turn") in said.decode()
        await gw.clients.aclose()
        await gw.quiet()
        billed = (await api.settled()).billed_nano
        assert len(api.book.messages()) == 2
        assert billed > 0
        assert await gw.spent_nano() >= billed
        assert await gw.held_nano() == 0
        await until(lambda: f"failed in its {name} hook" in caplog.text)


@pytest.mark.parametrize("reserve", ["full", "progressive"])
async def test_a_failing_tap_drops_no_byte_and_forgets_no_bill(tmp_path, monkeypatch, caplog, reserve):
    def fails(self: FlowState, chunk: bytes) -> bytes:
        raise Bug

    monkeypatch.setattr(FlowState, "chunk", fails)
    app = f"models: {{allow: [claude-haiku-4-5]}}\ncaps: {{day: $100}}\nreserve: {reserve}\n"
    async with Simulator(behaviour=Behaviour(delay_ms=1)) as api, gateway(tmp_path, api, {"app": app}) as gw:
        said = await ask(gw, stream=True, **({"extra_body": {"max_tokens": 60_000}} if reserve == "progressive" else {}))
        await gw.quiet()
        assert await gw.spent_nano() >= (await api.settled()).billed_nano > 0
        assert await gw.held_nano() == 0
        if reserve == "full":
            assert b"message_stop" in said
        else:
            assert isinstance(said, Exception), "nobody tops the grant up any more, so the stream is cut"
    assert "failed in its stream tap" in caplog.text


async def test_a_failure_while_settling_leaves_the_call_held(tmp_path, monkeypatch, caplog):
    def fails(self, running, **facts):
        raise Bug

    async with Simulator() as api, gateway(tmp_path, api, {"app": APP}) as gw:
        monkeypatch.setattr(Gateway, "close", fails)
        assert b"end_turn" in await ask(gw, stream=False)
        assert await gw.held_nano() > 0, "the next start settles it at its grant"
    assert "failed in its after_response hook" in caplog.text


async def test_failure_while_handling_a_failure_sends_nothing(tmp_path, monkeypatch):
    """A failure while a failure is handled sends nothing either."""
    def fails(self, running, **facts):
        raise Bug

    monkeypatch.setattr(GatewayAddon, "request", broken("request", "after"))
    monkeypatch.setattr(Gateway, "close", fails)
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP}) as gw:
        said = await ask(gw, stream=False)
        assert isinstance(said, anthropic.APIStatusError)
        assert said.status_code == 503
        assert (api.book.requests, api.book.connections) == (0, 0)


@pytest.mark.parametrize("name", REQUIRED_OPTIONS)
async def test_a_dangerous_option_is_refused_while_running(tmp_path, name):
    other = {"proxy_debug": True, "stream_large_bodies": "1m", "connection_strategy": "eager"}
    required = REQUIRED_OPTIONS[name]
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP}) as gw:
        with pytest.raises(exceptions.OptionsError, match=name):
            gw.master.options.update(**{name: other.get(name, not required)})
        assert getattr(gw.master.options, name) == required


async def test_a_dangerous_option_is_refused_at_the_start(tmp_path):
    async with Simulator() as api:
        with pytest.raises(ValueError, match="proxy_debug"):
            async with gateway(tmp_path, api, {"app": APP}, settings={"options": ("proxy_debug=true",)}):
                pass


async def test_flow_edited_after_its_admission_is_not_sent(tmp_path, monkeypatch):
    """mitmweb can intercept and edit a flow when every hook has run: the wire takes only what was judged."""

    class Editor:
        def __init__(self, edit):
            self.edit = edit

        def request(self, flow):
            if not flow.response:
                self.edit(flow.request)

    def dearer(request):
        request.text = json.dumps(json.loads(request.text) | {"model": "claude-opus-5-5"})

    def elsewhere(request):
        request.port += 1

    def other_path(request):
        request.path = "/v1/complete"

    def header(request):
        request.headers["anthropic-beta"] = "dear-feature"

    for edit in (dearer, elsewhere, other_path, header):
        folder = tmp_path / edit.__name__
        folder.mkdir()
        async with Simulator() as api, gateway(folder, api, {"app": APP}) as gw:
            gw.master.addons.add(Editor(edit))
            said = await ask(gw, stream=False)
            assert isinstance(said, anthropic.APIError)
            await gw.quiet()
            assert (api.book.requests, await gw.spent_nano(), await gw.held_nano()) == (0, 0, 0)


async def test_a_replayed_flow_is_refused(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": APP}) as gw:
        caught = []

        class Keeper:
            def response(self, flow):
                caught.append(flow)

        gw.master.addons.add(Keeper())
        await ask(gw, stream=False)
        replayer = ClientPlayback()
        gw.master.addons.add(replayer)
        replayer.running()
        flow = caught[0].copy()
        flow.is_replay = "request"
        flow.response = None
        replayer.start_replay([flow])
        await until(lambda: len(caught) > 1)
        assert caught[1].response.headers["x-gateway-refusal"] == "replay"
        assert api.book.requests == 1
        await replayer.done()
