"""Send mitmweb's replays through the gateway's own layers: a replayed request meets every hook that a call of an app meets.

Promises that a replay can be sent only after admission (its layers inject nothing without a permission), that
it can be cut like any other call, and that one replay runs at a time. mitmproxy's own playback builds bare layers, which would send
the label in the place of the key.
"""

import logging
from typing import Any

from mitmproxy import ctx, http
from mitmproxy.addons.clientplayback import ClientPlayback, ReplayHandler
from mitmproxy.options import Options
from mitmproxy.proxy import server_hooks

from gateway_addon.proxy import inject
from gateway_addon.proxy.flows import FlowState

logger = logging.getLogger(__name__)


class GatedReplay(ReplayHandler):
    """One replay, on a client connection of its own."""

    undrained_s = 0.0  # nobody reads it, so nobody is slow
    flow_state: FlowState | None = None

    def __init__(self, flow: http.HTTPFlow, opts: Options, flows: inject.Flows) -> None:
        super().__init__(flow, opts)
        flow.client_conn = self.client
        inject.install(self.layer, flows)

    async def run(self) -> None:
        with ctx.master.addons.get("proxyserver").register_connection(self.client.id, self):  # so that it can be cut
            try:
                await self.replay()
            finally:
                await self.handle_hook(server_hooks.ClientDisconnectedHook(self.client))


class GatedPlayback(ClientPlayback):
    flows: inject.Flows

    async def playback(self) -> None:
        while True:
            self.inflight = await self.queue.get()
            try:
                await GatedReplay(self.inflight, self.options, self.flows).run()
            except Exception:
                logger.exception("A replay failed.")
            self.queue.task_done()
            self.inflight = None


def gate_replays(playback: Any, flows: inject.Flows) -> None:
    """Make mitmproxy's playback, with its commands, send through the gateway."""
    playback.__class__ = GatedPlayback
    playback.flows = flows
