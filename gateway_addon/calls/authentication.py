"""Authenticate a request: who calls, and whether that app may call now, and from there.

In one order, for the gateway and for `explain`: the token (or the identity token, which is verified first), the app's policy, pauses,
the address. Judges nothing of what is asked for, and keeps no count of refusals: gateway.py does.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway_addon.calls.admission import Caller
from gateway_addon.calls.refusal_messages import elsewhere, in_force, paused, rule_gone
from gateway_addon.identity import tokens
from gateway_addon.identity.client_address import within
from gateway_addon.identity.trust import Trust
from gateway_addon.identity.workloads import rule_digest
from gateway_addon.ledger import Token, TokenLookup, scopes
from gateway_addon.names import PROGRAM, TOKEN_PREFIX, app_named
from gateway_addon.policy import AppPolicy, GatewayPolicy
from gateway_addon.refusals import Refusal, capitalised

type Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A caller that may not call, and as whom it is known: `token` None where none is in force, `app` None where it has no policy."""

    refusal: Refusal
    token: Token | None = None
    app: AppPolicy | None = None


async def authenticate(
    headers: Headers,
    digest: str | None,
    address: str,
    endpoint: str,
    policy: GatewayPolicy,
    look_up: Callable[[str], Awaitable[TokenLookup]],
    identify: Callable[[str, Trust | None, float], Awaitable[str | Refusal]],
    now: float,
) -> Caller | Rejected:
    """Authenticate by the credential in `headers`, or by `digest`, that of a replayed request's token.

    `look_up` returns what the ledger knows by a digest; `identify` verifies an identity token and returns its digest. Raises what
    these two raise.
    """
    if digest is None:
        secret = tokens.credential(headers)
        if isinstance(secret, Refusal):
            return Rejected(secret)
        known_by = tokens.digest(secret) if secret[:4] == TOKEN_PREFIX else await identify(secret, policy.trust, now)
        if isinstance(known_by, Refusal):
            return Rejected(known_by)
        digest = known_by
    return judge_caller(await look_up(digest), address, headers, endpoint, policy, now, digest)


def judge_caller(
    found: TokenLookup, address: str | None, headers: Headers, endpoint: str, policy: GatewayPolicy, now: float, digest: str = ""
) -> Caller | Rejected:
    """Judge what the ledger knows of a caller by a digest. Pure. `address` None: not known, and not judged."""
    token = in_force(found.token, now)
    if isinstance(token, Refusal):
        return Rejected(token)
    app = policy.apps.get(token.app)
    if app is None:
        sentence = f"{capitalised(app_named(token.app))} has a token but no policy ({policy.folder}/apps/{token.app}.yaml)."
        sentence += f" Write one: {PROGRAM} app add {token.app}."
        return Rejected(Refusal("app_unknown", sentence), token)
    if token.rule is not None and token.rule not in map(rule_digest, app.workloads):
        return Rejected(rule_gone(token, app), token, app)
    pause = next((each for each in found.pauses if each.scope in scopes(app.name, app.team)), None)
    if pause is not None:
        return Rejected(paused(pause, policy.zone), token, app)
    if address is not None and app.addresses and not within(address, app.addresses):
        return Rejected(elsewhere(app, address, headers), token, app)
    return Caller(app, token, endpoint, policy, found.overruns, now, digest)
