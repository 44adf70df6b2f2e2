"""A gateway for tests: the real addon in a real mitmproxy, in this event loop, in front of the simulated API."""

import asyncio
import os
import ssl
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
from ledgers import new_file, until
from mitmproxy.master import Master

from gateway_addon.calls import top_ups
from gateway_addon.calls.gateway import Gateway
from gateway_addon.cli import init
from gateway_addon.clocks import SYSTEM, Clocks
from gateway_addon.http_client import STRAIGHT
from gateway_addon.identity import tokens as identity
from gateway_addon.identity.key_cache import IssuerKeys
from gateway_addon.ledger import Ledger, admin
from gateway_addon.operations import issuer_keys, jobs
from gateway_addon.operations.reload import align
from gateway_addon.policy import GatewayPolicy, Source, capped_parts, cycles, load
from gateway_addon.proxy.hooks import GatewayAddon
from gateway_addon.proxy.server import build
from gateway_addon.proxy.settings import Settings
from gateway_addon.simulator import KEY, Simulator
from gateway_addon.upstreams.credentials import WatchedSecret
from gateway_addon.upstreams.egress import egress

AUTHORITIES = ssl.create_default_context()
"""For every client: reading them costs as much as a gateway's start."""

APP = """
models: {allow: [claude-haiku-4-5, claude-sonnet-5, claude-opus-5-5]}
caps: {day: $100}
"""

FIRST = init.APP.format(app="app", day="$2", month="$20")
"""The policy that `gateway init --yes` writes."""


def write_policies(folder: Path, upstream: str, apps: Mapping[str, str], gateway: str = "") -> Path:
    """Policy files as people write them: a text for gateway.yaml beside `upstream`, and one per app."""
    (folder / "apps").mkdir(parents=True, exist_ok=True)
    lines = (f"upstream: {upstream}", "key: {env: SIMULATED_KEY}", "workspace_geo: global", textwrap.dedent(gateway))
    (folder / "gateway.yaml").write_text("\n".join(lines))
    for name, text in apps.items():
        (folder / "apps" / f"{name}.yaml").write_text(textwrap.dedent(text))
    return folder


def with_lag(policy: GatewayPolicy, lag_s: float) -> GatewayPolicy:
    """The policy with another declared lag of all models."""
    rows = {model: tuple(replace(row, lag_s=lag_s) for row in dated) for model, dated in policy.prices.rows.items()}
    return replace(policy, prices=replace(policy.prices, rows=rows))


@dataclass(slots=True)
class Running:
    """A gateway that runs, and what a test needs to look at it from all sides."""

    url: str
    api: Simulator
    gateway: Gateway
    addon: GatewayAddon
    master: Master
    folder: Path
    tokens: dict[str, str]
    clients: AsyncExitStack

    def client(self, app: str = "app", **options: Any) -> anthropic.AsyncAnthropic:
        http = {} if "http_client" in options else {"http_client": anthropic.DefaultAsyncHttpxClient(verify=AUTHORITIES)}
        client = anthropic.AsyncAnthropic(**{"base_url": self.url, "api_key": self.tokens[app], "max_retries": 0, **http, **options})
        self.clients.push_async_callback(client.close)
        return client

    def sync_client(self, app: str = "app", **options: Any) -> anthropic.Anthropic:
        http = {} if "http_client" in options else {"http_client": anthropic.DefaultHttpxClient(verify=AUTHORITIES)}
        client = anthropic.Anthropic(base_url=self.url, api_key=self.tokens[app], **{"max_retries": 0, **http, **options})
        self.clients.callback(client.close)
        return client

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def quiet(self) -> None:
        """Wait until every call has ended and every settlement is written."""

        async def ended() -> bool:
            return not self.addon.flow_states and await self.open_calls() == 0

        await until(ended)

    async def open_calls(self) -> int:
        total = await self.gateway.ledger.standing(["total"], (), now=time.time())
        return next(standing.open for standing in total if standing.window == "ever")

    async def spent_nano(self, scope: str = "total", window: str = "ever") -> int:
        standings = await self.gateway.ledger.standing([scope], (), now=time.time())
        return next(standing.spent_nano for standing in standings if standing.window == window)

    async def held_nano(self) -> int:
        standings = await self.gateway.ledger.standing(["total"], (), now=time.time())
        return next(standing.reserved_nano for standing in standings if standing.window == "ever")


@asynccontextmanager
async def gateway(
    folder: Path,
    api: Simulator,
    apps: Mapping[str, str] | None = None,
    policy: str = "",
    *,
    upstream: str | None = None,
    settings: Mapping[str, Any] | None = None,
    make: Callable[..., GatewayAddon] = GatewayAddon,
    endpoint_prefix: str = "",
    prepare: Callable[[Master], None] = lambda master: None,
    on_call: Callable[[dict[str, Any]], None] | None = None,
    ledger_url: str | None = None,
    clocks: Clocks | None = None,
    lag_s: float | None = None,
) -> AsyncIterator[Running]:
    """Run a gateway with these apps (policy texts by name) until the block ends. `prepare` may change its options first.

    `lag_s` takes the place of that of all models, so that a stream runs out of its grant in a second.
    """
    apps = {"app": APP} if apps is None else apps
    policies = write_policies(folder / "policies", upstream or api.url, apps, policy)
    url = ledger_url or f"sqlite:///{new_file(folder)}"
    ledger = await Ledger.open(url)
    tokens = {}
    for app in apps:
        tokens[app] = identity.mint()
        digest = identity.digest(tokens[app])
        await ledger.change(partial(admin.issue_token, app=app, digest=digest, label="test", who="test", now=time.time()))
    loaded = load(policies) if lag_s is None else with_lag(load(policies), lag_s)
    if capped_parts(loaded) or cycles(loaded):
        await align(ledger, loaded, "test")
    clocks = clocks or SYSTEM
    keys = IssuerKeys(partial(issuer_keys.fetch, way=lambda url: STRAIGHT), clocks.monotonic_s)
    gateway = Gateway(ledger, loaded, clocks, endpoint_prefix=endpoint_prefix, on_call=on_call, issuer_keys=keys)
    addon = make(gateway, WatchedSecret(Source("env", "SIMULATED_KEY"), {"SIMULATED_KEY": KEY}), clocks)
    addon.egress = egress(loaded, os.environ)
    master = build(Settings("127.0.0.1", 0, policies, url, **(settings or {})), loaded, addon)
    prepare(master)
    streams = (top_ups.LOOK_AT_LEASE_S, "lease", gateway.streams.keep_to_the_lease), (top_ups.TOP_UP_EVERY_S, "top-ups", gateway.streams.keep_topped_up)
    running = asyncio.Event()
    addon.on_running = running.set
    task = asyncio.ensure_future(master.run())
    await asyncio.wait([task, asyncio.ensure_future(running.wait())], return_when=asyncio.FIRST_COMPLETED)
    port = master.addons.get("proxyserver").listen_addrs()[0][1]
    proxy = master.addons.get("proxyserver")
    try:
        async with jobs.running(*streams), AsyncExitStack() as clients:
            yield Running(f"http://127.0.0.1:{port}", api, gateway, addon, master, folder, tokens, clients)
    finally:
        master.shutdown()
        await task
        await ledger.close()
        await until(lambda: not proxy.connections)
