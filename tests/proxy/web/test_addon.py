"""`gateway web` in this process: what a person sees on a flow, what they send again, and what the page may not do."""

import asyncio
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anthropic
import httpx2
import pytest
from gateway import Running, gateway
from ledgers import until
from tornado import netutil, tcpserver
from tornado.ioloop import IOLoop

from gateway_addon.ledger import admin, connect
from gateway_addon.proxy.web.addon import CALLER, DebugAddon
from gateway_addon.proxy.web.lockdown import kept
from gateway_addon.simulator import KEY, Behaviour, Simulator

APP = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n"
ASK = {"model": "claude-haiku-4-5", "max_tokens": 40, "messages": [{"role": "user", "content": "say hi"}]}
PASSWORD = "x" * 32

pytestmark = pytest.mark.filterwarnings("ignore::pyparsing.warnings.PyparsingDeprecationWarning")  # in mitmproxy's own filters


@dataclass
class Desk:
    """A gateway under mitmweb, and a client of its page."""

    gw: Running
    page: httpx2.AsyncClient

    async def flows(self, count: int) -> list[dict]:
        """The flows, once there are so many and all their comments are final."""
        for _ in range(300):
            await self.gw.quiet()
            found = (await self.page.get("/flows")).json()
            if len(found) >= count and not any(" at most" in flow["comment"] or not flow["comment"] for flow in found):
                return found
            await asyncio.sleep(0.01)
        raise AssertionError(found)

    async def text(self, flow: dict, message: str, view: str = "Auto") -> dict:
        return (await self.page.get(f"/flows/{flow['id']}/{message}/content/{view}")).json()

    async def command(self, name: str, *arguments: str) -> dict:
        return (await self.page.post(f"/commands/{name}", json={"arguments": arguments})).json()

    async def replay(self, flow: dict) -> None:
        """Send a flow again, to its end."""
        assert (await self.page.post(f"/flows/{flow['id']}/replay")).status_code == 200

        async def ended() -> bool:
            return not (await self.command("replay.client.count"))["value"]

        await until(ended)

    async def edit(self, flow: dict, **request: object) -> None:
        assert (await self.page.put(f"/flows/{flow['id']}", json={"request": request})).status_code == 200


@pytest.fixture
def sockets(monkeypatch):
    """Those of mitmweb's page, which leaves their closing to the end of its process."""
    made = []

    def listen(*arguments, **named):
        made.extend(netutil.bind_sockets(*arguments, **named))
        return made

    monkeypatch.setattr(tcpserver, "bind_sockets", listen)
    return made


@pytest.fixture
def desk(sockets, tmp_path):
    @asynccontextmanager
    async def opened(api, apps=None):
        make = partial(DebugAddon, place=tmp_path / "gateway.db")
        settings = {"web_port": 0, "web_password": PASSWORD}
        async with gateway(tmp_path, api, apps or {"app": APP}, settings=settings, make=make) as gw:
            address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
            allowed = {"authorization": f"Bearer {PASSWORD}", "x-xsrftoken": "0" * 32}
            async with httpx2.AsyncClient(base_url=address, headers=allowed) as page:
                page.cookies.set("_mitmproxy_xsrf", "0" * 32)
                yield Desk(gw, page)
            for each in sockets:
                IOLoop.current().remove_handler(each)
                each.close()

    return opened


# what a person sees


@pytest.mark.parametrize(
    ("caps", "left"),
    [("{day: $1}", "left today"), ("{day: $5, month: $1}", "left this month"), ("{week: $1}", "left this week"), ("{ever: $1}", "left in all")],
)
async def test_a_flow_says_whose_it_is_what_it_cost_and_what_is_left(desk, caps, left):
    """The tightest cap counts, and its window is named."""
    async with Simulator() as api, desk(api, {"app": f"models: {{allow: [claude-haiku-4-5]}}\ncaps: {caps}\n"}) as seen:
        await seen.gw.client().messages.create(**ASK)
        (flow,) = await seen.flows(1)
        nano = (await api.settled()).billed_nano
    assert flow["comment"] == f"app · ${nano / 1e9:.4f} · claude-haiku-4-5 · ${1 - nano / 1e9:.4f} {left}"
    assert flow["marked"] == ""


async def test_a_refused_flow_is_marked_with_its_refusal(desk):
    table = [
        (ASK | {"model": "claude-opus-5-5"}, {}, "app · refused, model · claude-opus-5-5 · "),
        (ASK | {"extra_body": {"inference_geo": "us"}}, {}, "app · refused, feature · claude-haiku-4-5 · "),
        (ASK, {"api_key": "gwt_nobodys"}, "refused, token_malformed · "),
    ]
    async with Simulator() as api, desk(api) as seen:
        for ask, client, comment in table:
            with pytest.raises(anthropic.APIStatusError):
                await seen.gw.client(**client).messages.create(**ask)
            flow = (await seen.page.get("/flows")).json()[-1]
            assert (flow["marked"], flow["comment"][: len(comment)]) == ("⛔", comment)
        assert (await api.settled()).messages() == []


async def test_stream_is_shown_as_its_message_with_its_cost(desk):
    """A stream is shown as its message with its cost, and its request by name."""
    tools = [{"name": "look_up", "description": "Looks it up", "input_schema": {"type": "object", "properties": {"word": {}}}}]
    ask = ASK | {"system": "Be terse.", "tools": tools, "max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    behaviour = Behaviour(output_tokens=60, thinking_tokens=20, thinking="full", tool_use=True)
    async with Simulator(behaviour=behaviour) as api, desk(api) as seen:
        async with seen.gw.client().messages.stream(**ask) as stream:
            message = await stream.get_final_message()
        await seen.gw.client().messages.create(**ask | {"stream": False})
        streamed, whole = await seen.flows(2)
        asked, told, json_told = [
            await seen.text(flow, side) for flow, side in ((streamed, "request"), (streamed, "response"), (whole, "response"))
        ]
        raw = await seen.text(streamed, "response", "Raw")
    assert raw["text"].startswith("event: message_start"), "mitmweb stores the stream"
    for shown in (asked, told, json_told):
        assert shown["view_name"] == "Claude"
    for line in ("model       claude-haiku-4-5", "max_tokens  2000", "look_up(word?)", "Looks it up", "Be terse.", "[1] user", "  say hi"):
        assert line in asked["text"]
    assert "event:" not in told["text"]
    for block in message.content:
        for said in (block.thinking, ) if block.type == "thinking" else (block.text,) if block.type == "text" else (block.name,):
            assert " ".join(said.split()) in " ".join(told["text"].split())
    nano = [line for line in told["text"].splitlines() if line.startswith("cost")]
    assert "booked as call 1" in nano[0]
    assert "tool_use  look_up" in json_told["text"]


async def test_commands_show_spending_and_explain_a_flow(desk):
    """The commands say what is spent, and what would happen to a flow."""
    async with Simulator() as api, desk(api, {"app": APP, "other": APP}) as seen:
        await seen.gw.client().messages.create(**ASK)
        (flow,) = await seen.flows(1)
        spent = (await seen.command("gateway.spend", "app"))["value"]
        everything = (await seen.command("gateway.spend"))["value"]
        nobody = (await seen.command("gateway.spend", "nobody"))["value"]
        explained = (await seen.command("gateway.explain", f"@{flow['id']}"))["value"]
        listed = (await seen.page.get("/commands")).json()
    assert [line.split(": ")[0] for line in spent] == [
        f"{scope} {window}" for scope in ("total", "app:app") for window in ("day", "month")
    ]
    assert spent[2].endswith(" left of $1.00")
    assert any(line.startswith("app:other day: $0.00 spent, $0.00 held, $1.00 left") for line in everything)
    assert nobody == ["No app 'nobody'; there: app, other."]
    assert explained[-1] == "allowed by the policy"
    assert any(line.startswith("app:app day") for line in explained)
    assert [each["type"] for each in listed["gateway.explain"]["parameters"]] == ["flow"]
    assert [each["type"] for each in listed["gateway.spend"]["parameters"]] == ["str"]


# what a person sends again


async def test_replay_is_admitted_and_billed_to_its_app_once(desk, tmp_path):
    """A replay is admitted, sent with the key, and billed to its app once."""
    async with Simulator() as api, desk(api) as seen:
        await seen.gw.client().messages.create(**ASK)
        async for _ in await seen.gw.client().messages.create(**ASK | {"stream": True}):
            pass
        for flow in await seen.flows(2):
            await seen.replay(flow)
        again = await seen.flows(2)
        shown = [(await seen.page.get(path)).content for path in ("/flows", "/flows/dump", "/events", "/options")]
        book = await api.settled()
        assert await seen.gw.spent_nano("app:app") == book.billed_nano > 0
        with connect.reading(tmp_path / "gateway.db") as db:
            rows = [tuple(row) for row in db.execute("SELECT app, state, token_id, flags FROM calls ORDER BY id")]
    assert [row.header("x-api-key") for row in book.messages()] == [KEY] * 4
    assert [(flow["is_replay"], flow["comment"].startswith("app · $")) for flow in again] == [("request", True)] * 2
    assert rows == [("app", "settled", 1, "")] * 2 + [("app", "settled", 1, "replayed")] * 2
    assert not any(secret.encode() in text for secret in (KEY, seen.gw.tokens["app"]) for text in shown)


async def test_edited_copy_of_a_flow_is_judged_as_it_is_sent(desk):
    """An edited copy of a flow is judged as it is when it is sent."""
    async with Simulator() as api, desk(api) as seen:
        await seen.gw.client().messages.create(**ASK)
        (flow,) = await seen.flows(1)
        flow = {"id": (await seen.page.post(f"/flows/{flow['id']}/duplicate")).text}
        for model, sent in (("claude-opus-5-5", 1), ("claude-haiku-4-5", 2)):
            await seen.edit(flow, content=json.dumps(ASK | {"model": model, "max_tokens": 7}))
            await seen.replay(flow)
            await seen.gw.quiet()
            assert len((await api.settled()).messages()) == sent, model
        found = next(each for each in await seen.flows(1) if each["id"] == flow["id"])
        book = await api.settled()
        assert book.messages()[1].body_bytes == len(json.dumps(ASK | {"max_tokens": 7}))
        assert found["comment"].startswith("app · $")
        assert found["marked"] == ""
        await seen.edit(flow, host="127.0.0.9")
        await seen.replay(flow)
        found = next(each for each in await seen.flows(1) if each["id"] == flow["id"])
        assert "$0.00 (replayed, not_sent)" in found["comment"], "nothing of the time before is taken for this one's"
        assert await seen.gw.spent_nano("app:app") == book.billed_nano


async def test_replay_needs_a_token_in_force_and_room_under_the_cap(desk):
    """A replay needs a token that is in force and a cap that has room."""
    async with Simulator() as api, desk(api, {"app": APP, "other": APP}) as seen:
        await seen.gw.client().messages.create(**ASK)
        await seen.gw.client("other").messages.create(**ASK)
        mine, other = await seen.flows(2)
        change, now = seen.gw.gateway.ledger.change, time.time()
        await change(partial(admin.revoke_tokens, app="app", who="test", now=now))
        await change(partial(admin.pause, scope="app:other", who="test", now=now))
        for flow, code in ((mine, "token_revoked"), (other, "app_paused")):
            await seen.replay(flow)
            found = next(each for each in (await seen.page.get("/flows")).json() if each["id"] == flow["id"])
            assert (f"refused, {code} · " in found["comment"], found["marked"]) == (True, "⛔")
            assert code in (await seen.text(found, "response"))["text"] or found["response"]["status_code"] in (401, 403)
        assert len((await api.settled()).messages()) == 2


async def test_a_flow_that_came_from_elsewhere_is_nobodys(desk):
    """Whatever it says of itself: a flow file may name any app."""
    async with Simulator() as api, desk(api) as seen:
        await seen.gw.client().messages.create(**ASK)
        (flow,) = await seen.flows(1)
        stored = seen.gw.master.view.get_by_id(flow["id"])
        word = stored.metadata[CALLER]
        seen.gw.addon.callers[word[::-1]] = seen.gw.addon.callers.pop(word)  # as after a restart
        stored.metadata["app"] = "app"
        await seen.replay(flow)
        (found,) = (await seen.page.get("/flows")).json()
        explained = (await seen.command("gateway.explain", f"@{flow['id']}"))["value"]
        assert len((await api.settled()).messages()) == 1
    assert found["comment"].startswith("refused, replay · claude-haiku-4-5 · A replayed flow carries no token.")
    assert explained[0].startswith("No app's token came with this flow")


async def test_a_replay_can_be_cut_like_any_call(desk):
    async with Simulator() as api, desk(api) as seen:
        ask = ASK | {"max_tokens": 400, "stream": True}
        async for _ in await seen.gw.client().messages.create(**ask):
            pass
        (flow,) = await seen.flows(1)
        api.behaviour = Behaviour(output_tokens=400, delay_ms=100)
        await seen.page.post(f"/flows/{flow['id']}/replay")
        await until(lambda: any(flow_state.running and flow_state.running.meter for flow_state in seen.gw.addon.flow_states.values()))
        await seen.gw.gateway.ledger.change(partial(admin.pause, scope="app:app", cut=True, who="test", now=time.time()))
        (found,) = await seen.flows(1)
        (_, cut) = (await api.settled()).messages()
        assert not cut.delivered
    assert "cut:paused" in found["comment"]


async def intercepted(seen):
    async with asyncio.timeout(60):
        while True:
            for flow in (await seen.page.get("/flows")).json():
                if flow["intercepted"]:
                    return flow
            await asyncio.sleep(0.01)


async def test_request_edited_while_held_is_judged_as_it_is_released(desk):
    """A call that costs nothing may become one that does: were its endpoint judged at its arrival alone, an edit would make it free."""
    free, paid = "/v1/messages/count_tokens", "/v1/messages"
    table = [
        (paid, {}, 1, "app · $"),
        (paid, {"content": json.dumps(ASK | {"max_tokens": 9})}, 1, "app · $"),
        (paid, {"content": json.dumps(ASK | {"model": "claude-opus-5-5"})}, 0, "app · refused, model · claude-opus-5-5 · "),
        (free, {"path": paid}, 1, "app · $"),
        (paid, {"path": "/v1/files"}, 0, "app · refused, endpoint · claude-haiku-4-5 · "),
        (paid, {"host": "127.0.0.9"}, 0, "app · $0.00 (not_sent) · claude-haiku-4-5"),
    ]
    async with Simulator() as api, desk(api) as seen:
        assert (await seen.page.put("/options", json={"intercept": "~q"})).status_code == 200
        headers = {"x-api-key": seen.gw.tokens["app"], "anthropic-version": "2023-06-01"}
        expected = 0
        async with httpx2.AsyncClient(base_url=seen.gw.url, headers=headers) as app:
            for number, (path, edits, sent, comment) in enumerate(table, 1):
                call = asyncio.ensure_future(app.post(path, json=ASK))
                flow = await intercepted(seen)
                if edits:
                    await seen.edit(flow, **edits)
                assert await seen.gw.open_calls() == 0, "nothing is held for a request that a person looks at"
                await seen.page.post(f"/flows/{flow['id']}/resume")
                await call
                found = (await seen.flows(number))[-1]
                expected += sent
                assert found["comment"].startswith(comment), edits
                assert len((await api.settled()).messages()) == expected, edits
        assert await seen.gw.spent_nano("app:app") == (await api.settled()).billed_nano


async def test_a_request_edited_while_it_waits_at_the_door_is_not_sent(desk):
    """Judged was what came; what a person made of it meanwhile was not."""
    async with Simulator(behaviour=Behaviour(delay_headers_s=1.5)) as api, desk(
        api, {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $0.0018}\nreserve: full\n"}
    ) as seen:
        first = asyncio.ensure_future(seen.gw.client().messages.create(**ASK))
        await until(lambda: any(flow_state.running for flow_state in seen.gw.addon.flow_states.values()))
        second = asyncio.ensure_future(seen.gw.client().messages.create(**ASK))
        await until(lambda: [flow_state for flow_state in seen.gw.addon.flow_states.values() if flow_state.admitting])
        waiting = next(flow_state.flow for flow_state in seen.gw.addon.flow_states.values() if flow_state.admitting)
        await seen.edit({"id": waiting.id}, content=json.dumps(ASK | {"max_tokens": 4000}))
        await first
        with pytest.raises(anthropic.APIStatusError, match="changed after it was admitted"):
            await second
        await seen.gw.quiet()
        assert len((await api.settled()).messages()) == 1


# what the page may not do


async def test_page_changes_no_option_that_bypasses_the_gateway(desk):
    """The page changes no option that leads around the gateway."""
    table = {
        "scripts": ["/tmp/any.py"], "mode": ["regular@0"], "save_stream_file": "/tmp/flows", "web_host": "0.0.0.0", "map_remote": ["|//a|//b"],
        "ssl_verify_upstream_trusted_ca": "/tmp/ca.pem", "modify_headers": ["/~q/x/@/etc/hostname"], "proxy_debug": True,
    }  # fmt: skip
    async with Simulator() as api, desk(api) as seen:
        before = (await seen.page.get("/options")).json()
        for name, value in table.items():
            assert (await seen.page.put("/options", json={name: value})).status_code == 400, name
            assert (await seen.command("set", name, str(value)))["error"], name
        assert (await seen.page.get("/options")).json() == before
        assert (await seen.page.put("/options", json={"anticache": True})).status_code == 200, "how flows are looked at may change"
        await seen.gw.client().messages.create(**ASK)
        await seen.flows(1)
        assert await seen.gw.spent_nano("app:app") > 0, "the gateway is in place"


async def test_a_script_is_refused_at_the_start_too(tmp_path):
    with pytest.raises(ValueError, match="real key"):
        async with Simulator() as api, gateway(
            tmp_path, api, settings={"web_port": 0, "web_password": PASSWORD, "options": ("scripts=/tmp/any.py",)},
            make=partial(DebugAddon, place=tmp_path / "gateway.db"),
        ):  # fmt: skip
            pass


async def test_commands_that_run_code_or_move_files_are_gone(desk):
    async with Simulator() as api, desk(api) as seen:
        names = set((await seen.page.get("/commands")).json())
        assert (await seen.command("script.run", "@all", "/tmp/any.py"))["error"] == "Unknown command: script.run"
    gone = {"script.run", "save.file", "save.har", "export.file", "cut.save", "options.load", "options.save", "replay.client.file", "view.flows.load", "browser.start"}
    assert names & gone == set()
    assert names == kept(names)
    assert {"gateway.spend", "gateway.explain", "replay.client", "flow.mark", "export"} <= names
