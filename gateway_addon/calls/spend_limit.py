"""Say how an app's caps stand in the words that Claude Code heeds: `anthropic-ratelimit-unified-*` headers and `GET /api/oauth/usage`.

Promises the official gateway's figures (its version 2.1.332, recorded): thresholds are passed strictly and judged on the unrounded
share, shares are rounded half up to hundredths, and an allowed answer never says that a cap is used up. Pure; decides nothing. Amounts
are what is *spent* over the cap in force: what calls in flight hold comes back.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from gateway_addon.ledger import Standing, app_scope, enclosing
from gateway_addon.ledger.denials import amount_nano

PERIODS = {"day": "daily", "week": "weekly", "month": "monthly"}
"""The names of windows there. A cap for ever has none, and no reset: the client shows it without them."""
THRESHOLDS_PERCENT = (95, 75)
NANO_PER_CENT = 10**7

type UnifiedHeaders = tuple[tuple[str, str], ...]


def allowed_headers(app: str, standings: Sequence[Standing]) -> UnifiedHeaders:
    """Return the headers of an answer to an app with caps of its own; none for an app without."""
    own = own_caps(app, standings)
    if not own:
        return ()
    cap = speaking(own)
    passed = _passed_percent(cap)
    status = "allowed" if passed is None else "allowed_warning"
    threshold = () if passed is None else (("overage-surpassed-threshold", _number(passed)),)
    return _named(
        ("status", status), *_resets(cap), ("overage-utilization", _number(min(99, share_percent(cap)))), *threshold,
        ("representative-claim", "overage"), ("overage-status", status),
    )  # fmt: skip


def rejected_headers(app: str, cap: Standing) -> UnifiedHeaders:
    """Return the headers of a refusal by a cap that is spent: the client then shows the refusal's sentence alone, and does not retry."""
    period = (("overage-period", PERIODS[cap.window]),) if cap.window in PERIODS else ()
    pool = () if enclosing(cap.scope) == app_scope(app) else (("overage-scope", "group_pool"),)
    return _named(
        ("status", "rejected"), *_resets(cap), ("overage-utilization", _number(max(100, share_percent(cap)))),
        ("overage-surpassed-threshold", "1"), *period, *pool, ("overage-disabled-reason", "org_spend_cap_reached"),
    )  # fmt: skip


def usage(app: str, standings: Sequence[Standing]) -> dict[str, Any]:
    """Return the body of `GET /api/oauth/usage`: what Claude Code's `/usage` and its status line show, in whole cents."""
    own = own_caps(app, standings)
    if not own:
        none = {"limit": None, "used_credits": 0, "utilization": None}
        extra = {"is_enabled": True, "monthly_limit": None, "used_credits": 0, "utilization": None, "currency": "USD"}
        return {"extra_usage": extra | {"daily": none, "weekly": none}, "limits": []}
    binding = speaking(own)
    extra = {
        "is_enabled": True,
        "monthly_limit": amount_nano(binding) // NANO_PER_CENT,  # whatever its window: the field's name is the client's
        "used_credits": binding.spent_nano // NANO_PER_CENT,
        "utilization": _shown_percent(binding),
        "currency": "USD",
    }
    return {"extra_usage": extra, "limits": [_limit(cap, active=cap is binding) for cap in own]}


def own_caps(app: str, standings: Sequence[Standing]) -> list[Standing]:
    """Return an app's own caps: its team's and the total are other people's affair until they are used up."""
    scope = app_scope(app)
    return [each for each in standings if each.scope == scope and each.cap_nano is not None]


def speaking(caps: Sequence[Standing]) -> Standing:
    """Return the cap that speaks for all: the one that resets last of those used up, else the fullest."""
    if used_up := [cap for cap in caps if cap.spent_nano >= amount_nano(cap)]:
        return max(used_up, key=lambda cap: math.inf if cap.resets_at is None else cap.resets_at)
    return max(caps, key=lambda cap: cap.spent_nano / amount_nano(cap))


def share_percent(cap: Standing) -> int:
    """Return the spent share of a cap, rounded half up; 100 for a cap of nothing."""
    whole_nano = amount_nano(cap)
    return (200 * cap.spent_nano + whole_nano) // (2 * whole_nano) if whole_nano else 100


def _passed_percent(cap: Standing) -> int | None:
    return next((each for each in THRESHOLDS_PERCENT if 100 * cap.spent_nano > each * amount_nano(cap)), None)


def _shown_percent(cap: Standing) -> int:
    return share_percent(cap) if cap.spent_nano >= amount_nano(cap) else min(99, share_percent(cap))


def _limit(cap: Standing, *, active: bool) -> dict[str, Any]:
    severity = {None: "normal", 75: "warning", 95: "critical"}[_passed_percent(cap)]
    at = None if cap.resets_at is None else datetime.fromtimestamp(cap.resets_at, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return {
        "kind": "spend", "group": PERIODS.get(cap.window, cap.window), "percent": _shown_percent(cap), "resets_at": at,
        "severity": severity, "is_active": active,
    }  # fmt: skip


def _resets(cap: Standing) -> UnifiedHeaders:
    return () if cap.resets_at is None else (("reset", str(cap.resets_at)), ("overage-reset", str(cap.resets_at)))


def _named(*fields: tuple[str, str]) -> UnifiedHeaders:
    return tuple([(f"anthropic-ratelimit-unified-{name}", value) for name, value in fields])


def _number(percent: int) -> str:
    """Return hundredths as JSON writes the number: `0.5`, not `0.50`."""
    whole, rest = divmod(percent, 100)
    return f"{whole}.{rest:02}".rstrip("0").rstrip(".")
