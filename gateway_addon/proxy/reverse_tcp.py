"""Define mitmproxy's reverse mode on TCP alone: `reversetcp:https://api.anthropic.com`.

In front of an https upstream, mitmproxy's own reverse mode opens the port for UDP as well, to speak QUIC: nobody asked for that, and
workers cannot share it. Everything else is as in the original mode.
"""

from mitmproxy.proxy import layers, mode_servers, mode_specs
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layer import Layer


class ReverseTcpMode(mode_specs.ReverseMode):
    """mitmproxy finds it by its name, `reversetcp`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.transport_protocol = mode_specs.TCP


class ReverseTcpInstance(mode_servers.AsyncioServerInstance[ReverseTcpMode]):
    """mitmproxy finds it by its mode."""

    def make_top_layer(self, context: Context) -> Layer:
        return layers.modes.ReverseProxy(context)


def reverse(upstream: str) -> str:
    """Return the mode for mitmproxy's options."""
    return f"{ReverseTcpMode.type_name}:{upstream}"
