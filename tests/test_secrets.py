"""The real key and the tokens, hunted for in everything that shows, stores or passes flows on."""

import asyncio
import logging
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx2
import pytest
from gateway import APP, gateway
from issuers import AUDIENCE, ISSUER, claims, jwks, token
from processes import buried, ledgered
from secret_hunt import found_in, of_family

from gateway_addon.calls.exchange import GRANT_TYPE
from gateway_addon.clocks import monotonic_s
from gateway_addon.console.app import build
from gateway_addon.console.login import Login
from gateway_addon.console.pages import Console, Policies
from gateway_addon.ledger.maintenance import backup
from gateway_addon.proxy.hooks import GatewayAddon
from gateway_addon.proxy.web.addon import DebugAddon
from gateway_addon.simulator import KEY, Behaviour, Simulator

HELLO = {"model": "claude-haiku-4-5", "max_tokens": 200, "messages": [{"role": "user", "content": "hi"}]}


def workload_policy() -> dict[str, object]:
    """An app with a workload, whose issuer's keys stand in the policy."""
    issuers = f"audience: {AUDIENCE}\nissuers: {{here: {{url: {ISSUER}, keys: {{inline: '{jwks().decode()}'}}}}}}\n"
    return {"apps": {"app": APP + "workloads:\n  - {issuer: here, claims: {repository_id: 456}}\n"}, "policy": issuers}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def one_of_each(gw):
    """A JSON call, a stream, a refused call and a call with the token in the wrong place; and a workload, by its identity token and by
    sessions, and with identity tokens that are refused, cut off, and sent elsewhere. Returns its secrets."""
    client = gw.client()
    await client.messages.create(**HELLO)
    async with client.messages.stream(**HELLO) as stream:
        await stream.get_final_message()
    async with httpx2.AsyncClient(base_url=gw.url) as http:
        await http.post("/v1/files", headers={"x-api-key": gw.tokens["app"]})
        await http.post("/v1/messages", headers={"authorization": f"Bearer {gw.tokens['app']}", "x-api-key": KEY}, json=HELLO)
        jwt, bad = token(claims()), token(claims(aud="account"))
        grant = {"grant_type": GRANT_TYPE, "assertion": jwt}
        session = (await http.post("/v1/oauth/token", json=grant)).json()["access_token"]
        other = (await http.post("/v1/oauth/token", data=grant)).json()["access_token"]
        assert session.startswith("gwt_")
        assert "*" not in session + other
        for credential in (jwt, session, bad):
            headers = {"authorization": f"Bearer {credential}", "x-api-key": credential, "anthropic-version": "2023-06-01"}
            assert (await http.post("/v1/messages", headers=headers, json=HELLO)).status_code == (401 if credential == bad else 200)
        for assertion in (bad, bad + "x" * 100_000):
            with suppress(httpx2.TransportError):  # a long one is answered before it is read
                await http.post("/v1/oauth/token", json=grant | {"assertion": assertion})
        await http.post("/v1/oauth/token", content=f'{{"assertion": "{bad}"'.encode())
        await http.post("/v1/oauth/token", json=grant, headers={"upgrade": "websocket"})  # refused at its headers
    _reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(f'POST /v1/oauth/token HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\n\r\n{{"assertion": "{jwt}"'.encode())
    await asyncio.sleep(0.05)
    writer.close()
    return (jwt, jwt.rpartition(".")[2], bad, bad.rpartition(".")[2], session, other)


@pytest.mark.parametrize("web", [False, True], ids=["mitmdump", "mitmweb"])
async def test_neither_key_nor_token_is_in_any_flow_log_or_file(tmp_path, caplog, web):
    settings = {"web_port": 0, "web_password": "x" * 32} if web else {}
    make = partial(DebugAddon, place=tmp_path / "gateway.db") if web else GatewayAddon

    def keep_flows(master):
        if web:
            master.options.update(save_stream_file=str(tmp_path / "flows"), hardump=str(tmp_path / "flows.har"))

    options = {"settings": settings, "make": make, "prepare": keep_flows} | workload_policy()
    async with Simulator(behaviour=Behaviour(delay_ms=10)) as api, gateway(tmp_path, api, **options) as gw:
        shown = [b""]
        if web:
            gw.master.view.sig_view_add.connect(_watch := (lambda flow: shown.append(repr(flow.get_state()).encode())))
            gw.master.view.sig_view_update.connect(_watch)
        with caplog.at_level(logging.DEBUG):
            logging.getLogger("hpack").setLevel(logging.INFO)
            of_workload = await one_of_each(gw)
            reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
            writer.write(b"POST /v1/messages HTTP/1.1\r\nnot a header\r\n\r\n")
            await reader.read()
            writer.close()
            await gw.quiet()
        if web:
            shown += [repr(flow.get_state()).encode() for flow in gw.master.view]
            assert len(shown) > 4, "the flows were looked at"
        assert (await api.settled()).messages()[0].header("x-api-key") == KEY, "the key was used"
        secrets, running = (KEY, gw.tokens["app"], *of_workload), contents(tmp_path)
        assert running["gateway.db-wal"], "what is not yet in the ledger's main file was looked at"
    for secret in secrets:
        assert not any(found_in(where, secret) for where in [*shown, *running.values(), *contents(tmp_path).values(), caplog.text.encode()])


async def test_no_secret_is_in_the_process_table_or_in_serves_output(tmp_path):
    """Neither in the arguments of the gateway's processes nor in their environment, where its key is in a file."""
    async with Simulator() as api:
        gateways = ledgered(tmp_path, api.url, {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n"})
        (tmp_path / "key").write_text(KEY)
        policy = tmp_path / "policies" / "gateway.yaml"
        policy.write_text(policy.read_text().replace("{env: SIMULATED_KEY}", f"{{file: {tmp_path / 'key'}}}"))
        process, url = await gateways.serve("--workers", "2", SIMULATED_KEY="")
        async with httpx2.AsyncClient(base_url=url) as http:
            headers = {"x-api-key": gateways.tokens["app"], "anthropic-version": "2023-06-01"}
            assert (await http.post("/v1/messages", headers=headers, json=HELLO)).status_code == 200
            await http.post("/v1/messages", headers={"x-api-key": gateways.tokens["app"][:-3]}, json=HELLO)
        lines = [*of_family("cmdline", process.pid), *(around := of_family("environ", process.pid))]
        process.terminate()
        printed = await process.stdout.read()
        await buried(process)
    for secret in (KEY, gateways.tokens["app"]):
        assert not any(found_in(where, secret) for where in [*lines, printed, (tmp_path / "log").read_bytes()])
    assert len(around) > 1, "a supervisor and its workers"


async def test_no_secret_is_on_the_console_in_metrics_or_in_a_backup(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, **workload_policy()) as gw:
        secrets = (KEY, gw.tokens["app"], *await one_of_each(gw))
        await gw.quiet()
        backup.backup(tmp_path / "gateway.db", tmp_path / "copy.db")
        console = Console(tmp_path / "gateway.db", Policies(tmp_path / "policies"), Login(monotonic_s()), metrics_token="scraper")
        link, client = console.login.link, build(console).test_client()
        client.get(f"/login/{link}")
        shown = [client.get(path) for path in ("/", "/calls", "/calls/1", "/calls/2")]
        shown.append(client.get("/gateway/metrics", headers={"Authorization": "Bearer scraper"}))
        assert {answer.status_code for answer in shown} == {200}
        texts = [answer.data for answer in shown] + [(tmp_path / "copy.db").read_bytes()]
    assert not [secret for secret in secrets for text in texts if found_in(text, secret)]


def test_a_missing_key_is_a_sentence_that_points_to_the_demo(tmp_path):
    gateways = ledgered(tmp_path, "http://127.0.0.1:9", {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n"})
    where = ["--policies", str(tmp_path / "policies"), "--ledger", f"sqlite:///{gateways.ledger}", "--listen", "127.0.0.1:0"]
    done = subprocess.run([sys.executable, "-m", "gateway_addon", "serve", *where], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith("The environment variable SIMULATED_KEY is not set.")
    assert "gateway demo" in done.stderr
