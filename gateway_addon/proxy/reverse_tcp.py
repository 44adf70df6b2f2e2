"""mitmproxy's reverse mode on TCP alone: `reversetcp:https://api.anthropic.com`.

Its own reverse mode, in front of an https upstream, opens the port for UDP as well, to speak QUIC: a door that nobody asked for, and
one that workers cannot share. Everything else is as in its own mode.
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
    """The mode for mitmproxy's options."""
    return f"{ReverseTcpMode.type_name}:{upstream}"
