"""gateway_addon: the control plane for people who run several apps on one Claude API key."""

__version__ = "0.1.0"
