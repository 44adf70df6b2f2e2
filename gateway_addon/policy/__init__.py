"""Policy: who may ask for what. Files become frozen values (`load`), values judge a reading (`judge`, `trail`).

    source   YAML nodes that remember their lines      keys    every key: kind, default, help
    kinds    the kinds of value, and their schema      loading a folder of files -> GatewayPolicy
    values   what the operator decided                 rules   what that means for one request
"""

from gateway_addon.policy.loading import load, load_prices
from gateway_addon.policy.rules import Verdict, edits, judge, may_use, observed, trail
from gateway_addon.policy.source import PolicyError
from gateway_addon.policy.values import Alerts, AppPolicy, Cap, Feature, GatewayPolicy, Source, Tls, all_caps, caps

__all__ = [
    "Alerts",
    "AppPolicy",
    "Cap",
    "Feature",
    "GatewayPolicy",
    "PolicyError",
    "Source",
    "Tls",
    "Verdict",
    "all_caps",
    "caps",
    "edits",
    "judge",
    "load",
    "load_prices",
    "may_use",
    "observed",
    "trail",
]
