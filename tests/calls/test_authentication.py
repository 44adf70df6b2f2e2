"""Who is rejected, for which reason first, and as whom."""

from dataclasses import replace

import pytest
from gateway import write_policies
from ledgers import NOON

from gateway_addon.calls.admission import Caller
from gateway_addon.calls.authentication import Rejected, authenticate
from gateway_addon.identity import tokens
from gateway_addon.ledger import Pause, Token, TokenLookup
from gateway_addon.policy import load

SECRET = tokens.mint()
TOKEN = Token(1, "app", "laptop", NOON, None, None)
REVOKED = replace(TOKEN, revoked_at=NOON)
PAUSE = Pause("team:night", NOON, None, "enough")
OUTSIDE, INSIDE = "192.0.2.1", "10.0.0.7"


async def no_identity(token, trust, now):
    raise AssertionError("what is no identity token is not verified as one")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    app = "team: night\nmodels: {allow: [claude-haiku-4-5]}\ncaps: unlimited\naddresses: [10.0.0.0/8]\n"
    return load(write_policies(tmp_path_factory.mktemp("policies"), "http://127.0.0.1:1", {"app": app}, "teams: {night: {caps: {day: $1}}}"))


@pytest.mark.parametrize(
    ("secret", "found", "address", "code", "known_as"),
    [
        (None, TokenLookup(None, (PAUSE,)), OUTSIDE, "token_missing", (False, False)),
        ("gwt_cut", TokenLookup(None, (PAUSE,)), OUTSIDE, "token_malformed", (False, False)),
        (SECRET, TokenLookup(None, (PAUSE,)), OUTSIDE, "token_unknown", (False, False)),
        (SECRET, TokenLookup(REVOKED, (PAUSE,)), OUTSIDE, "token_revoked", (False, False)),
        (SECRET, TokenLookup(replace(REVOKED, app="gone"), (PAUSE,)), OUTSIDE, "token_revoked", (False, False)),
        (SECRET, TokenLookup(replace(TOKEN, app="gone"), (PAUSE, replace(PAUSE, scope="total"))), OUTSIDE, "app_unknown", (True, False)),
        (SECRET, TokenLookup(TOKEN, (PAUSE,)), OUTSIDE, "app_paused", (True, True)),
        (SECRET, TokenLookup(TOKEN, (replace(PAUSE, scope="team:day"),)), OUTSIDE, "token_address", (True, True)),
        (SECRET, TokenLookup(TOKEN), INSIDE, None, (True, True)),
    ],
    ids=["none", "cut", "unknown", "revoked", "revoked, of no app", "of no app", "paused", "outside", "good"],
)
async def test_the_first_reason_is_token_app_pause_address(policy, secret, found, address, code, known_as):
    """Each case has the faults of the next one too, until none is left."""
    asked = []

    async def look_up(digest):
        asked.append(digest)
        return found

    headers = () if secret is None else (("x-api-key", secret),)
    caller = await authenticate(headers, None, address, "messages", policy, look_up, no_identity, NOON)
    assert (caller.refusal.code if isinstance(caller, Rejected) else None) == code
    assert (caller.token is not None, caller.app is not None) == known_as
    assert asked == ([tokens.digest(SECRET)] if secret == SECRET else []), "nobody asks the ledger about what is no token"
    if code is None:
        assert caller == Caller(policy.apps["app"], TOKEN, "messages", policy, frozenset(), NOON, tokens.digest(SECRET))


async def test_a_replayed_request_is_known_by_its_digest(policy):
    async def look_up(digest):
        return TokenLookup(TOKEN if digest == "kept" else None)

    assert isinstance(await authenticate((("x-api-key", "masked"),), "kept", INSIDE, "messages", policy, look_up, no_identity, NOON), Caller)
