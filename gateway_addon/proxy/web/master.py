"""Run mitmweb for a gateway: replays go through the gateway's layers, admission comes last, the page is limited (lockdown.py)."""

import os

from mitmproxy import options
from mitmproxy.tools.web.master import WebMaster

from gateway_addon.proxy.web.addon import DebugAddon, LastAdmission
from gateway_addon.proxy.web.lockdown import kept
from gateway_addon.proxy.web.replays import gate_replays


class DebugMaster(WebMaster):
    def __init__(self, opts: options.Options, addon: DebugAddon) -> None:
        super().__init__(opts)
        gate_replays(self.addons.get("clientplayback"), addon)
        self.addons.add(LastAdmission(addon))
        known = self.commands.commands
        for name in set(known) - kept(known):
            del known[name]

    async def running(self) -> None:
        try:
            await super().running()  # type: ignore[no-untyped-call]
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise OSError(f"The page cannot be opened on port {self.options.web_port} ({why}). Choose another: --web-port PORT") from None
