"""What fails in the proxy's layers, and not in a hook: a caller is answered at once, and nothing is left behind."""

import json

import anthropic
import httpx2
import pytest
from gateway import gateway
from ledgers import rows

from gateway_addon.calls import judging
from gateway_addon.proxy import inject
from gateway_addon.proxy.fastpath import relay
from gateway_addon.proxy.inject import InjectStream
from gateway_addon.simulator import Behaviour, Simulator

pytestmark = pytest.mark.usefixtures("either_dispatch")

ASK = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
REQUEST = {"WholeRequest", "RequestEndOfMessage"}
ANSWER = {"WholeAnswer", "ResponseHeaders"}


def fail_at(monkeypatch, events: set[str], error: Exception) -> None:
    """Have a stream fail at the first of these events, as it does where there is no room for one more copy of a body."""
    real = InjectStream._handle_event

    def handle(self, event):
        if type(event).__name__ in events:
            raise error
        return real(self, event)

    monkeypatch.setattr(InjectStream, "_handle_event", handle)


@pytest.mark.parametrize(
    ("events", "error", "code", "retried", "states"),
    [
        (REQUEST, MemoryError(), "crowded", True, []),
        (REQUEST, KeyError("a bug"), "internal", False, []),
        (ANSWER, MemoryError(), "crowded", True, [("settled", "estimated:no_status")]),
    ],
    ids=["memory for a request", "a bug", "memory for an answer"],
)
async def test_a_failing_layer_answers_at_once_and_settles(tmp_path, monkeypatch, caplog, events, error, code, retried, states):
    """mitmproxy logs such a failure and goes on: caller and upstream waited for each other until some timeout came."""
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        fail_at(monkeypatch, events, error)
        with pytest.raises(anthropic.InternalServerError) as refused:
            await gw.client(timeout=60).messages.create(**ASK)
        said = refused.value.response
        assert (said.status_code, said.headers["x-gateway-refusal"], "x-should-retry" not in said.headers) == (503, code, retried)
        await gw.quiet()
        assert (gw.addon.flow_states, await gw.held_nano()) == ({}, 0)
        monkeypatch.undo()
        await gw.client().messages.create(**ASK)
        await gw.quiet()
    kept = rows(tmp_path / "gateway.db", "SELECT state, flags FROM calls ORDER BY id")
    assert [(state, flags.removesuffix(" estimated")) for state, flags in kept[:-1]] == states
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert bool(tracebacks) == (not isinstance(error, MemoryError))


async def test_a_judgement_without_memory_is_a_503_to_come_again(tmp_path, monkeypatch, caplog):
    def read(*arguments):
        raise MemoryError

    async with Simulator() as api, gateway(tmp_path, api) as gw:
        monkeypatch.setattr(judging, "read", read)
        with pytest.raises(anthropic.InternalServerError, match="has no memory for this request") as refused:
            await gw.client().messages.create(**ASK)
        assert (refused.value.response.headers["retry-after"], json.loads(refused.value.response.content)["type"]) == ("1", "error")
        assert api.book.all() == []
    assert [record.exc_info for record in caplog.records if "Out of memory" in record.getMessage()] == [None]


async def read_until_it_fails(gw, monkeypatch) -> None:
    async with gw.client(timeout=60).messages.stream(**ASK | {"max_tokens": 400}) as answer:
        async for _ in answer:
            monkeypatch.setattr(inject.InjectLayer, "event_to_child", lambda *arguments: 1 / 0)
            monkeypatch.setattr(relay.RelayClient, "at_once", lambda *arguments: 1 / 0)


async def test_stream_that_fails_midway_is_charged_its_grant(tmp_path, monkeypatch):
    """A stream that fails midway ends, and is charged its grant."""
    async with Simulator(behaviour=Behaviour(delay_ms=20, output_tokens=200)) as api, gateway(tmp_path, api) as gw:
        with pytest.raises(httpx2.RemoteProtocolError, match="incomplete chunked read"):
            await read_until_it_fails(gw, monkeypatch)
        await gw.quiet()
        billed_nano = (await api.settled()).billed_nano
        assert (gw.addon.flow_states, await gw.held_nano()) == ({}, 0)
        assert await gw.spent_nano() >= billed_nano
