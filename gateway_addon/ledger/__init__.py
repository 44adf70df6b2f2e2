"""The ledger: who spent what, and who may spend more. The only rooms that speak SQL."""

from gateway_addon.ledger.facade import Ledger
from gateway_addon.ledger.values import (
    Cap,
    Denied,
    LedgerUnavailable,
    NewCall,
    Outcome,
    Pause,
    RateLimits,
    Reserved,
    Resolution,
    Server,
    Settlement,
    Standing,
    Token,
    app_scope,
    scopes,
    team_scope,
)

__all__ = [
    "Cap",
    "Denied",
    "Ledger",
    "LedgerUnavailable",
    "NewCall",
    "Outcome",
    "Pause",
    "RateLimits",
    "Reserved",
    "Resolution",
    "Server",
    "Settlement",
    "Standing",
    "Token",
    "app_scope",
    "scopes",
    "team_scope",
]
