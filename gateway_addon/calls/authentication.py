"""Authenticate a request: who calls, and whether that app may call now, and from there.

In one order, for the gateway and for `explain`: the token, the app's policy, pauses, the address. Judges nothing of what is asked
for, and keeps no count: who answers the refused does.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway_addon.calls.admission import Caller
from gateway_addon.calls.refusal_messages import elsewhere, in_force, paused
from gateway_addon.identity import tokens
from gateway_addon.identity.client_address import within
from gateway_addon.ledger import Token, TokenLookup, scopes
from gateway_addon.names import PROGRAM, app_named
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
    now: float,
) -> Caller | Rejected:
    """Authenticate by the credential in `headers`, or by `digest`, that of a replayed request's token. Raises what `look_up` raises."""
    if digest is None:
        secret = tokens.credential(headers)
        if isinstance(secret, Refusal):
            return Rejected(secret)
        digest = tokens.digest(secret)
    return judge_caller(await look_up(digest), address, headers, endpoint, policy, now)


def judge_caller(
    found: TokenLookup, address: str | None, headers: Headers, endpoint: str, policy: GatewayPolicy, now: float
) -> Caller | Rejected:
    """Judge what the ledger knows of a caller. Pure. `address` None: not known, and not judged."""
    token = in_force(found.token, now)
    if isinstance(token, Refusal):
        return Rejected(token)
    app = policy.apps.get(token.app)
    if app is None:
        sentence = f"{capitalised(app_named(token.app))} has a token but no policy ({policy.folder}/apps/{token.app}.yaml)."
        sentence += f" Write one: {PROGRAM} app add {token.app}."
        return Rejected(Refusal("app_unknown", sentence), token)
    pause = next((each for each in found.pauses if each.scope in scopes(app.name, app.team)), None)
    if pause is not None:
        return Rejected(paused(pause, policy.zone), token, app)
    if address is not None and app.addresses and not within(address, app.addresses):
        return Rejected(elsewhere(app, address, headers), token, app)
    return Caller(app, token, endpoint, policy, found.overruns, now)
