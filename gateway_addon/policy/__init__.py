"""Policy: who may ask for what. Files become frozen values (`load`), values judge a parsed request (`judge`, `trail`).

    kinds    the kinds of value, and their schema      keys    every key: kind, default, help
    model    what the operator decided                 loading a folder of files -> GatewayPolicy
    rules    what that means for one request           reference  the keys as the handbook shows them
    retiring which apps the end of a model concerns
"""

from gateway_addon.policy.loading import Outline, load, load_prices, outline
from gateway_addon.policy.model import (
    Alerts,
    AppPolicy,
    Cap,
    Feature,
    GatewayPolicy,
    PartCaps,
    Source,
    Tls,
    all_caps,
    capped_parts,
    caps,
    caps_by_model,
    caps_of_part,
    cycles,
    last_call_share,
    name_limit,
    part_caps,
    still_kept,
    token_cap,
)
from gateway_addon.policy.retiring import Retiring, retiring
from gateway_addon.policy.rules import CLAMPED, RuleVerdict, edits, judge, may_use, model_sent, observed, trail
from gateway_addon.yaml_file import FileError as PolicyError

__all__ = [
    "CLAMPED",
    "Alerts",
    "AppPolicy",
    "Cap",
    "Feature",
    "GatewayPolicy",
    "Outline",
    "PartCaps",
    "PolicyError",
    "Retiring",
    "RuleVerdict",
    "Source",
    "Tls",
    "all_caps",
    "capped_parts",
    "caps",
    "caps_by_model",
    "caps_of_part",
    "cycles",
    "edits",
    "judge",
    "last_call_share",
    "load",
    "load_prices",
    "may_use",
    "model_sent",
    "name_limit",
    "observed",
    "outline",
    "part_caps",
    "retiring",
    "still_kept",
    "token_cap",
    "trail",
]
