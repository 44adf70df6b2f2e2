"""The gateway for people who run their own `mitmdump`: a script for its `-s` that is as safe as `gateway serve`.

Promises that no upstream connection is opened before the addon is in place, ahead of every other; that nothing starts with
options which would open a way around it; and that from then on the script's file is of no consequence: mitmdump runs on
*without* a script that it was told to reload and cannot. An edge: it reads the environment, files and the clock.
"""

import asyncio
import logging
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

from mitmproxy import connection, ctx, exceptions
from mitmproxy.addonmanager import Loader
from mitmproxy.proxy import server_hooks

from gateway_addon.ledger import LedgerUnavailable
from gateway_addon.operations.logs import mask
from gateway_addon.operations.places import PlacesUnclear, places
from gateway_addon.policy import GatewayPolicy, PolicyError
from gateway_addon.policy import load as load_policy  # `load` would be a hook of this script: mitmproxy calls it
from gateway_addon.pricing import PriceError
from gateway_addon.proxy.certificate import TlsUnavailable
from gateway_addon.proxy.hooks import REQUIRED_OPTIONS, GatewayAddon
from gateway_addon.proxy.server import DECIDED, STOPPING, assembled, hardened
from gateway_addon.proxy.supervisor import is_loopback, stop_signals
from gateway_addon.upstreams.credentials import SecretUnavailable
from gateway_addon.upstreams.egress import egress

logger = logging.getLogger(__name__)

MODE = "The policy's upstream is {0}: start mitmdump with --mode reverse:{0} and nothing else there."
IN_CLEAR = "Tokens would cross the network in clear: start mitmdump with --listen-host 127.0.0.1, or set tls: in policies/gateway.yaml."
PAST = "{0} would keep calls away from the gateway, so that it serves none: leave it out."
FIXED = "{0} cannot be changed while the gateway runs: that could open a way around it. Start again with the value that you want."
SAID = (PolicyError, PriceError, LedgerUnavailable, TlsUnavailable, SecretUnavailable, PlacesUnclear, OSError, ValueError)


class ScriptAddon(GatewayAddon):
    """The gateway's addon in a proxy whose other addons, and a page or a console, may change options."""

    def configure(self, updated: set[str]) -> None:
        super().configure(updated)
        for name in sorted(updated & (DECIDED | {"scripts"})):
            raise exceptions.OptionsError(FIXED.format(name))

    async def done(self) -> None:
        """Let calls in flight finish, as `gateway serve` does. mitmproxy heeds no second signal: here it ends them."""
        if self.flow_states:
            logger.info(STOPPING)
        for number in stop_signals():
            asyncio.get_running_loop().add_signal_handler(number, self.end_all)
        await super().done()


class Shim:
    """Put the gateway into a mitmdump that somebody else configured. It takes `GATEWAY_POLICIES` and `GATEWAY_LEDGER`."""

    def __init__(self) -> None:
        self.policies = Path()
        self.ledger = ""
        self.in_place = False
        self._open = AsyncExitStack()

    def load(self, loader: Loader) -> None:
        """Harden the options. Whatever is wrong is logged as an error, upon which mitmdump does not start."""
        try:
            self.policies = Path(os.environ.get("GATEWAY_POLICIES") or places().policies)
            self.ledger = os.environ.get("GATEWAY_LEDGER") or f"sqlite:///{places().ledger}"
            policy = load_policy(self.policies)
            ctx.options.update(**hardened(ctx.options, policy, egress(policy, os.environ)))
        except SAID as error:
            logger.error("%s", error)

    async def running(self) -> None:
        """Put the addon ahead of all others, for good. (mitmdump calls this once, before it says that it is ready.)"""
        close_udp()
        for script in ctx.master.addons.get("scriptloader").addons:
            if script.reloadtask is not None:
                script.reloadtask.cancel()
        try:
            policy, key, addon = await self._open.enter_async_context(assembled(self.policies, self.ledger, ScriptAddon))
            self._safe(policy)
            addon.configure(set(REQUIRED_OPTIONS))  # a script beside this one may have changed them since they were hardened
        except (*SAID, exceptions.OptionsError) as error:
            logger.error("%s", error)
            return
        mask(key)
        addons = ctx.master.addons
        # A new list: mitmproxy is walking the old one, and an insertion would make it meet this script a second time.
        addons.chain = [addons.register(addon), *addons.chain]
        addon.running()
        self.in_place = True
        if signal.SIGHUP in stop_signals():  # it runs on a terminal, which has been closed then
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, ctx.master.shutdown)

    def _safe(self, policy: GatewayPolicy) -> None:
        if list(ctx.options.mode) != [f"reverse:{policy.upstream}"]:
            raise exceptions.OptionsError(MODE.format(policy.upstream))
        if not policy.tls and not is_loopback(ctx.options.listen_host):
            raise exceptions.OptionsError(IN_CLEAR)
        for name in sorted(DECIDED - {"mode", "listen_host", "listen_port"}):
            if ctx.options.has_changed(name):
                raise exceptions.OptionsError(PAST.format(name))

    def client_connected(self, client: connection.Client) -> None:
        """Close a connection that came too early: one that lasted would never be governed, and each call on it would be refused."""
        if not self.in_place:
            client.error = "the gateway is not in place yet"

    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        if not self.in_place:
            data.server.error = "the gateway is not in place"

    async def done(self) -> None:
        await self._open.aclose()


def close_udp() -> None:
    """Close the UDP port that mitmproxy's reverse mode opens for QUIC: nobody asked for it.

    And closed by mitmproxy as its last act, it ends the process by a segmentation fault: the port's thread lets Python objects
    go when Python is no more.
    """
    for instance in ctx.master.addons.get("proxyserver").servers:
        for server in [each for each in instance._servers if not isinstance(each, asyncio.Server)]:
            instance._servers.remove(server)
            server.close()


addons = [Shim()]
