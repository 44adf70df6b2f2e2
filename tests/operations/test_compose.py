"""Two gateways behind nginx, as `gateway init --nginx` and `--compose` set them up: streams, drains, deaths, and whose address counts."""

import asyncio
import ipaddress
import re
import signal
import subprocess
import tomllib
from contextlib import asynccontextmanager
from pathlib import Path

import anthropic
import click
import httpx2
import postgresql
import pytest
import yaml
from click.testing import CliRunner
from gateway import APP
from ledgers import rows, until
from nginx import WAYS, front
from ports import free_port
from processes import buried, ledgered

from gateway_addon.cli import main
from gateway_addon.cli.init import init
from gateway_addon.operations import deploy
from gateway_addon.simulator import Behaviour, Simulator

ASK = {"model": "claude-haiku-4-5", "max_tokens": 200, "messages": [{"role": "user", "content": "hello"}]}
OUTPUT = 15
PROXIED = "timeouts: {drain: 20s}\ntrusted_proxies: [127.0.0.1/32]\n"


@asynccontextmanager
async def deployed(folder, api, apps=None, ledger=None):
    """Yields (nginx, the two gateways as (process, url), all of them)."""
    gateways = ledgered(folder, api.url, apps or {"app": APP}, PROXIED, ledger)
    places = [f"127.0.0.1:{free_port()}" for _ in WAYS]  # one is started again where it was
    running = list(await asyncio.gather(*(gateways.serve("--listen", place) for place in places)))
    try:
        with front(folder, *(url for _, url in running)) as nginx:
            yield nginx, running, gateways
    finally:
        for process, _ in running:
            if process.returncode is None:
                process.kill()  # a drain would wait for the answers that a test has left
        for process, _ in running:
            await buried(process)


def client(nginx, token, **options):
    http = anthropic.DefaultAsyncHttpxClient(verify=nginx.trusting)
    return anthropic.AsyncAnthropic(base_url=nginx.url, api_key=token, http_client=http, **options)


def billed(api):
    return len(api.book.messages())


async def a_stream_comes_through_while_the_api_is_still_sending(nginx, gateways, api):
    quick, api.behaviour = api.behaviour, Behaviour(delay_ms=80, output_tokens=200)  # two seconds: a loaded machine takes its time to look
    async with client(nginx, gateways.tokens["app"], max_retries=0) as app, app.messages.stream(**ASK) as stream:
        async for _ in stream:
            assert api.book.in_flight == 1, "the first event is here, the last is not yet made"
            break
        assert (await stream.get_final_message()).usage.output_tokens == 200
    api.behaviour = quick


async def an_apps_addresses_are_its_callers_and_not_nginxs(nginx, gateways):
    said = []
    for address in ("127.0.0.5", "127.0.0.6"):
        transport = httpx2.AsyncHTTPTransport(verify=nginx.trusting, local_address=address)
        async with httpx2.AsyncClient(base_url=nginx.url, transport=transport) as http:
            headers = {"x-api-key": gateways.tokens["bound"], "x-forwarded-for": "127.0.0.5"}
            said.append(await http.get("/v1/models", headers=headers))
            assert (await http.get("/gateway/readyz")).status_code == 200
    assert [answer.status_code for answer in said] == [200, 401]
    assert "may not call from 127.0.0.6 " in said[1].json()["error"]["message"]


async def a_gateway_is_replaced_under_load_and_no_call_is_dropped_or_billed_twice(nginx, running, gateways, api, announced):
    """With the word to nginx nobody is even refused; without it, the SDK's own retry finds the other gateway."""
    before, enough, done = billed(api), asyncio.Event(), []
    old, address = running[0]
    place = address.removeprefix("http://")

    async def call_on(app):
        while not enough.is_set():
            if len(done) % 2:
                async with app.messages.stream(**ASK) as stream:
                    done.append(await stream.get_final_message())
            else:
                done.append(await app.messages.create(**ASK))

    async with client(nginx, gateways.tokens["app"]) as app:
        callers = [asyncio.ensure_future(call_on(app)) for _ in range(6)]
        await asyncio.sleep(0.3)
        if announced:
            nginx.reload(place)
        old.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(old.wait(), 60) == 0
        old._transport.close()
        running[0] = await gateways.serve("--listen", place)
        if announced:
            nginx.reload()
        await until(lambda: rows(gateways.ledger, "SELECT 1 FROM calls WHERE state = 'settled' AND owner LIKE $1", f"%-{running[0][0].pid}-%"))
        enough.set()
        await asyncio.gather(*callers)
    await api.settled()
    assert {answer.usage.output_tokens for answer in done} == {OUTPUT}
    assert billed(api) - before == len(done), "each call reached the API once"
    refused = rows(gateways.ledger, "SELECT refusal FROM calls WHERE state = 'refused' AND app = 'app'")
    assert refused == [] or not announced


async def a_call_that_a_gateway_died_with_is_not_sent_again_and_its_stream_does_not_look_whole(nginx, running, gateways, api):
    before, quick, api.behaviour = billed(api), api.behaviour, Behaviour(delay_ms=50, output_tokens=2000)
    long = ASK | {"max_tokens": 2000}

    async def streamed(app):
        async with app.messages.stream(**long) as stream:
            await stream.get_final_message()

    async with client(nginx, gateways.tokens["app"], max_retries=0) as app:
        calls = []
        for start in (streamed, streamed, lambda app: app.messages.create(**long), lambda app: app.messages.create(**long)):
            calls.append(asyncio.ensure_future(start(app)))  # nginx gives each gateway one of a kind
            await until(lambda: api.book.in_flight >= len(calls))
        running[0][0].kill()
        await until(lambda: sum(call.done() for call in calls) >= 2)
        ended = [call.exception() for call in calls if call.done()]
        for call in calls:
            call.cancel()
        api.behaviour = quick
        for _ in range(4):
            await app.messages.create(**ASK)
    cut, lost = ended
    assert isinstance(cut, httpx2.RemoteProtocolError | anthropic.APIConnectionError), cut
    assert (lost.status_code, lost.body["error"]["type"]) == (502, "api_error")
    assert billed(api) - before == 4 + 4


@pytest.mark.longest
@pytest.mark.xdist_group("postgresql")
async def test_two_gateways_behind_nginx_are_one(tmp_path):
    server = postgresql.shared().ledger()
    apps = {"app": APP, "bound": APP + "addresses: [127.0.0.5/32]\n"}
    async with Simulator(behaviour=Behaviour(delay_ms=10, output_tokens=OUTPUT)) as api:
        async with deployed(tmp_path, api, apps, server) as (nginx, running, gateways):
            await a_stream_comes_through_while_the_api_is_still_sending(nginx, gateways, api)
            await an_apps_addresses_are_its_callers_and_not_nginxs(nginx, gateways)
            await a_gateway_is_replaced_under_load_and_no_call_is_dropped_or_billed_twice(nginx, running, gateways, api, announced=True)
            await until(lambda: not rows(server, "SELECT 1 FROM calls WHERE state = 'open'"))
            assert rows(server, "SELECT sum(spent_nano), sum(reserved_nano) FROM entries") == [((await api.settled()).billed_nano, 0)]
            await a_call_that_a_gateway_died_with_is_not_sent_again_and_its_stream_does_not_look_whole(nginx, running, gateways, api)


@pytest.mark.soak
async def test_gateway_stopped_behind_nginx_drops_no_sdk_call(tmp_path):
    """A gateway that is stopped without a word to nginx drops no call of an SDK."""
    async with Simulator(behaviour=Behaviour(delay_ms=10, output_tokens=OUTPUT)) as api:
        async with deployed(tmp_path, api, {"app": APP}) as (nginx, running, gateways):
            for _ in range(5):
                await a_gateway_is_replaced_under_load_and_no_call_is_dropped_or_billed_twice(nginx, running, gateways, api, announced=False)


# --- the compose file

NGINX, COMPOSE_YAML = deploy.text("nginx.conf"), deploy.text("compose.yaml")
COMPOSE = yaml.safe_load(COMPOSE_YAML)
SERVICES = COMPOSE["services"]
KNOWN = {  # the keys of the Compose Specification that are used here, each with the form of its value
    "image": str, "build": dict, "user": str, "environment": dict, "entrypoint": list, "command": list, "secrets": list, "tmpfs": list, "volumes": list,
    "networks": (list, dict), "ports": list, "healthcheck": dict, "depends_on": (list, dict), "restart": str, "stop_grace_period": str,
    "read_only": bool, "cap_drop": list, "security_opt": list,
}  # fmt: skip
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
DURATION = re.compile(r"\d+(ms|s|m|h)")


def test_compose_file_has_known_keys_and_declared_names():
    """The compose file has only keys that exist, and names only what it declares."""
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"name", "services", "networks", "volumes", "secrets"}
    for name, service in SERVICES.items():
        assert {key for key, value in service.items() if key not in KNOWN or not isinstance(value, KNOWN[key])} == set(), name
        assert all(isinstance(word, str) for key in ("entrypoint", "command", "secrets", "tmpfs") for word in service.get(key, [])), name
        assert set(service.get("build", {})) <= {"context", "dockerfile", "args"}
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"]), name
        assert set(service["networks"]) <= set(COMPOSE["networks"]), name
        assert {place for place in (volume.split(":")[0] for volume in service.get("volumes", [])) if place[0] != "."} <= set(COMPOSE["volumes"]), name
        needs = service.get("depends_on", [])
        assert set(needs) <= set(SERVICES), name
        assert {each["condition"] for each in needs.values()} <= CONDITIONS if isinstance(needs, dict) else True
        check = service["healthcheck"]
        assert set(check) <= {"test", "interval", "timeout", "retries", "start_period", "disable"}
        assert check.get("disable") or check["test"][0] == "CMD", name
        spans = [check.get(key, "1s") for key in ("interval", "timeout", "start_period")] + [service.get("stop_grace_period", "1s")]
        assert all(DURATION.fullmatch(span) for span in spans), name
    assert {tuple(secret) for secret in COMPOSE["secrets"].values()} == {("file",)}
    assert {key for network in COMPOSE["networks"].values() for key in network} <= {"internal", "ipam"}


@pytest.mark.parametrize("name", SERVICES)
def test_each_container_is_unprivileged_and_watched(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert ("ports" in service) == (name == "front"), "one door"
    assert service["healthcheck"] == {"disable": True} if name == "commands" else "test" in service["healthcheck"]
    assert {key for key in service.get("environment", {}) if "PASSWORD" in key or "KEY" in key} <= {"POSTGRES_PASSWORD_FILE"}, "secrets are files"


def test_only_gateways_reach_the_world_the_ledger_is_inside():
    """Only the gateways reach the world, and the ledger is on the inner network alone."""
    assert SERVICES["ledger"]["networks"] == ["inside"]
    assert COMPOSE["networks"]["inside"]["internal"] is True
    assert {name for name, service in SERVICES.items() if "outside" in service["networks"]} == {"gateway-1", "gateway-2"}


def test_nginx_finds_gateways_where_the_compose_file_puts_them():
    """Nginx looks for the gateways where the compose file puts them."""
    [subnet] = COMPOSE["networks"]["inside"]["ipam"]["config"]
    places = {name: service["networks"]["inside"]["ipv4_address"] for name, service in SERVICES.items() if isinstance(service["networks"], dict)}
    assert all(ipaddress.ip_address(place) in ipaddress.ip_network(subnet["subnet"]) for place in places.values())
    assert re.findall(r"^ +server ([\d.]+):8080 ", NGINX, re.MULTILINE) == [places["gateway-1"], places["gateway-2"]] == [way.split(":")[0] for way in WAYS]
    assert f"trusted_proxies: [{places['front']}]" in COMPOSE_YAML
    assert re.findall(r"listen (\d+) ssl", NGINX) == [SERVICES["front"]["ports"][0].split(":")[1]]
    mounted = {f"/run/secrets/{secret}" for secret in SERVICES["front"]["secrets"]}
    assert set(re.findall(r"/run/secrets/\w+", NGINX)) == mounted


@pytest.mark.parametrize("name", ["gateway-1", "gateway-2", "commands"])
def test_container_runs_a_known_command_with_its_password_file(name, tmp_path):
    """A gateway's container runs a command that exists, with the password from its file."""
    service = SERVICES[name]
    command, *arguments = service["command"]
    with main.get_command(click.Context(main), command).make_context(command, arguments):
        pass
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PGPASSWORD" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    shell = [word.replace("$$", "$").replace("/run/secrets/ledger_password", str(tmp_path / "password")) for word in service["entrypoint"]]
    done = subprocess.run([*shell, *service["command"]], env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout == f"secret -O -m gateway_addon {' '.join(service['command'])}\n"


def test_the_image_gets_the_driver_that_the_package_asks_for():
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [extra] = re.fullmatch(r"\[(\w+)\]", SERVICES["gateway-1"]["build"]["args"]["EXTRAS"]).groups()
    assert any(package.startswith("psycopg") for package in extras[extra])
    assert "ARG EXTRAS" in deploy.text("Containerfile")


@pytest.mark.parametrize(("option", "text"), [("--compose", COMPOSE_YAML), ("--nginx", NGINX)])
def test_init_prints_them(option, text):
    assert CliRunner().invoke(init, [option], catch_exceptions=False).stdout == text
    both = CliRunner().invoke(init, [option, "--systemd"])
    assert (both.exit_code, both.stdout) == (2, "")
