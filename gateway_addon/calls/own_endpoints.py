"""Answer the endpoints that are the gateway's own: its health, its metrics, how an app's caps stand.

Promises that an app is shown its own caps alone, and that the metrics open by their own token alone. Forwards nothing. Knows the ledger
and the policy; LedgerUnavailable is the caller's to answer.
"""

import asyncio
import hmac
from collections.abc import Mapping
from urllib.parse import parse_qs

from gateway_addon.calls.authentication import Headers, Rejected
from gateway_addon.calls.record import METRICS_TYPE, Scrape
from gateway_addon.calls.responses import OwnResponse, me
from gateway_addon.calls.spend_limit import usage
from gateway_addon.ledger import TOTAL, Ledger, NewCall, Token, app_scope, team_scope
from gateway_addon.names import safe_name
from gateway_addon.policy import AppPolicy, GatewayPolicy, all_caps, caps, name_limit, part_caps, token_cap
from gateway_addon.pricing import Prices
from gateway_addon.refusals import Refusal

NO_METRICS = Refusal(
    "not_found", "This gateway serves no metrics: name a token for them in gateway.yaml (metrics_token: {file: ...}), and restart it."
)
NOT_THE_SCRAPER = Refusal(
    "token_unknown",
    "The metrics have a token of their own (gateway.yaml: metrics_token). Send it as a bearer; an app's token does not open them.",
)


def health(policy: GatewayPolicy, problems: Mapping[str, str | None]) -> OwnResponse:
    """Return what anybody may know: which policy is in force, and each of these problems that there is."""
    found = {name: problem for name, problem in problems.items() if problem is not None}
    return OwnResponse({"status": "ok", "policy": policy.digest[:12], "apps": len(policy.apps)} | found)


async def metrics(
    scrape: Scrape | None, ledger: Ledger, policy: GatewayPolicy, policy_broken: bool, headers: Headers, now: float
) -> OwnResponse | Refusal | Rejected:
    """Return the metrics page for a scraper that has the page's token. Raises LedgerUnavailable. `scrape` None: there is no page."""
    if scrape is None:
        return NO_METRICS
    given = next((value for name, value in headers if name == "authorization"), "")
    if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), f"Bearer {scrape.token()}".encode()):
        return Rejected(NOT_THE_SCRAPER)
    scopes = (TOTAL, *map(team_scope, policy.teams), *map(app_scope, policy.apps))
    standings = await ledger.standing(scopes, all_caps(policy), now=now)
    return OwnResponse(await asyncio.to_thread(scrape.exposition, standings, policy_broken), content_type=METRICS_TYPE)


async def standing(
    ledger: Ledger, policy: GatewayPolicy, app: AppPolicy, token: Token, endpoint: str, target: str, now: float
) -> OwnResponse:
    """Return how an app's own caps stand: in this gateway's words (`me`) or in those of Claude Code (`usage`).

    `me` shows those of its token too, and of the parts that the query names (`?session=3f2a&user=u1`), where a call of theirs would
    count now: too many new names share one part. Raises LedgerUnavailable.
    """
    limits = tuple(cap for cap in caps(policy, app) if cap.scope == app_scope(app.name))
    standings = await ledger.standing([app_scope(app.name)], limits, now=now)
    if endpoint == "usage":
        return OwnResponse(usage(app.name, standings))
    call = _named_call(app, token, target, policy.prices)
    call = await ledger.counted_now(call, tuple(part_caps(app, call.parts, last_call=True)), now=now)
    of_parts = (*part_caps(app, call.parts, last_call=True), *token_cap(call))
    coming = await ledger.forecasts(standings, now=now)
    return me(app, standings, coming, await ledger.capped(of_parts, now=now))


def _named_call(app: AppPolicy, token: Token, target: str, prices: Prices) -> NewCall:
    """Return a call of the parts that a query names: `?session=3f2a&model=fast&label.client=acme`."""
    named = {kind: safe_name(values[-1]) for kind, values in parse_qs(target.partition("?")[2]).items()}
    labels = tuple((kind.removeprefix("label."), value) for kind, value in sorted(named.items()) if kind.startswith("label."))
    asked = app.models.aliases.get(model, model) if (model := named.get("model")) else None
    return NewCall(
        app.name, app.team, token.id, session_id=named.get("session"), agent_id=named.get("agent"), user_id=named.get("user"),
        labels=labels, model=asked and (prices.canonical(asked) or asked), names=name_limit(app), token_cap_nano=token.cap_nano,
    )  # fmt: skip
