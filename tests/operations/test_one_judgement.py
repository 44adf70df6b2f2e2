"""`explain` and the gateway: over random policies, standings, clocks and requests they say the same, to the letter."""

import json
import time
from collections import Counter
from datetime import UTC, datetime
from random import Random

import pytest
from gateway import write_policies
from ledgers import new_file

from gateway_addon.calls import queue
from gateway_addon.calls.gateway import Gateway
from gateway_addon.identity import tokens
from gateway_addon.identity.client_address import origin
from gateway_addon.ledger import Ledger, NewCall, Outcome, RateLimits, Settlement, admin, connect, ownership, reservations, state
from gateway_addon.messages.request import Request
from gateway_addon.operations.explain import explain
from gateway_addon.policy import load
from gateway_addon.refusals import Refusal
from gateway_addon.windows import WINDOWS

MODELS = ("claude-haiku-4-5", "claude-sonnet-5", "claude-opus-5-5", "fast", "claude-unheard-of")
CASES = 60
AMOUNTS = ("$0.02", "$0.1", "$0.2", "$0.3", "$0.4", "$0.6", "$1", "$50")
ADDRESSES = ("127.0.0.1", "10.1.2.3", "192.0.2.9")


@pytest.fixture
def waited(monkeypatch):
    """The gateway's calls that waited in line, where a wait is over at once."""
    calls = []

    async def over(place, most_s):
        calls.append(place)
        raise TimeoutError

    monkeypatch.setattr(queue._Place, "_freed", over)
    return calls


def caps_of(random: Random, windows, most: int) -> str:
    chosen = random.sample(windows, random.randrange(most + 1))
    return "{" + ", ".join(f"{window}: {random.choice(AMOUNTS)}" for window in chosen) + "}" if chosen else "unlimited"


def policies_of(random: Random) -> tuple[str, str]:
    """Texts for gateway.yaml and for the app."""
    some = random.random
    common = "teams: {night: {caps: " + caps_of(random, WINDOWS, 1).replace("unlimited", "{day: $40}") + "}}\n"
    if some() < 0.4:
        common += f"caps: {{month: {random.choice(AMOUNTS)}}}\n"
    if some() < 0.3:
        common += "trusted_proxies: [127.0.0.1]\n"
    lines = ["models: {allow: [claude-haiku-4-5, claude-sonnet-5], aliases: {fast: claude-haiku-4-5}}"]
    lines.append(f"caps: {caps_of(random, ('request', *WINDOWS), 3)}")
    if some() < 0.4:
        lines.append("team: night")
    if some() < 0.2:
        lines.append(f"max_tokens: {{limit: {random.choice((500, 5000))}, over: {random.choice(('clamp', 'refuse'))}}}")
    if some() < 0.5:
        rates = {"requests_per_minute": (0, 2, 6), "input_tokens_per_minute": (900, 5000), "concurrent": (0, 1, 4)}
        named = [f"{name}: {random.choice(rates[name])}" for name in random.sample(sorted(rates), random.randrange(1, 4))]
        lines.append(f"rates: {{{', '.join([*named, *(['headroom: 50%'] if some() < 0.4 else []), *(['wait: 0s'] if some() < 0.3 else [])])}}}")
    lines.append(f"reserve: {random.choice(('full', 'progressive', 'auto'))}")
    if some() < 0.12:
        lines.append("addresses: [10.0.0.0/8, 127.0.0.0/8]")
    if some() < 0.3:
        lines.append(random.choice(("mode: observe", "observe: [caps]", "observe: [rates]", "observe: [max_tokens, models]")))
    return common, "\n".join(lines) + "\n"


def fill(random: Random, db, owner: str, app, now: float, digest: str) -> None:
    """Bring the ledger to some standing: what was spent, is held and kept free, who was admitted, what is paused, revoked, raised, limited."""
    expires_at = now + random.choice((-1, 0, 60)) if random.random() < 0.08 else None
    token = admin.issue_token(db, "app", digest, expires_at=expires_at, who="test", now=now - 100)
    other = admin.issue_token(db, "other", "another's", who="test", now=now - 100)
    for _ in range(random.randrange(9)):
        mine = random.random() < 0.7
        call = NewCall("app" if mine else "other", app.team if mine else None, token.id if mine and expires_at is None else other.id)
        call = call if mine and expires_at is None else NewCall("other", None, other.id)
        at, nano = now - random.choice((0, 1, 30, 59, 90)), random.choice((0, 19_000_000, 50_000_000, 90_000_000, 290_000_000))
        quantum_nano = random.choice((0, 5_000_000, 30_000_000))
        held = reservations.reserve(db, owner, call, nano, (), quantum_nano=quantum_nano, rates=RateLimits(), now=at)
        if random.random() < 0.4:
            reservations.settle(db, held.call_id, Settlement(random.randrange(nano + 1), (), Outcome()), now=at)
    if random.random() < 0.05:
        admin.revoke_tokens(db, "app", who="test", now=now - random.choice((0, 1)))
    if random.random() < 0.12:
        scope = random.choice(("total", "team:night", "app:app", "app:other"))
        admin.pause(db, scope, until=random.choice((None, now + 5, now)), why=random.choice(("", "night")), who="test", now=now - 9)
    scopes = ("app:app", "app:app", "team:night", "total")
    for _ in range(random.choice((0, 0, 1, 2))):
        nano, until = random.choice((10_000_000, 50_000_000, 10**12)), now + random.choice((0, 60))
        admin.raise_cap(db, random.choice(scopes), random.choice(WINDOWS), nano, until=until, who="test", now=now - 9)
    for _ in range(random.choice((0, 0, 1, 2))):
        nano = random.choice((0, 20_000_000, 100_000_000, 300_000_000, 10**12))
        admin.limit_cap(db, random.choice(scopes), random.choice(WINDOWS), nano, who="test", now=now - 9)
    if random.random() < 0.2:
        db.execute("INSERT INTO overruns VALUES ('claude-haiku-4-5', 1, $1, 5)", (now,))
    if random.random() < 0.5:
        reset = datetime.fromtimestamp(now + random.choice((-1, 20)), UTC).isoformat()
        limits = {"requests-limit": "100", "requests-remaining": random.choice(("90", "3")), "requests-reset": reset}
        state.keep_ratelimits(db, {f"anthropic-ratelimit-{name}": value for name, value in limits.items()}, now)
    ownership.own(db, ownership.OwnedObject("file_mine", "file", "app", now, "{}"))
    ownership.own(db, ownership.OwnedObject("file_theirs", "file", "other", now, "{}"))


def request_of(random: Random) -> Request:
    body = {"model": random.choice(MODELS[: random.choice((1, 1, 1, 2, 2, 5))]), "max_tokens": random.choice((400, 4000, 10_000, 60_000))}
    content: object = "hello " * random.choice((1, 200))
    if random.random() < 0.1:
        file_id = random.choice(("file_mine", "file_theirs", "file_nobodys"))
        content = [{"type": "image", "source": {"type": "file", "file_id": file_id}}]
    body |= {"stream": random.random() < 0.6, "messages": [{"role": "user", "content": content}]}
    if random.random() < 0.05:
        body["tools"] = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]
    raw = json.dumps(body).encode()
    return Request("POST", "/v1/messages", (), raw if random.random() < 0.95 else raw[:-1])


async def both(folder, seed: int) -> tuple[dict, Refusal | None]:
    """What `explain` and the gateway say to one request, by one ledger."""
    random = Random(seed)
    now = float(int(time.time()) // 86_400 * 86_400 + random.randrange(86_400)) + 0.25
    common, text = policies_of(random)
    policy = load(write_policies(folder / "policies", "https://127.0.0.1:1", {"app": text}, common))
    path, secret = new_file(folder), tokens.mint()
    ledger = await Ledger.open(f"sqlite:///{path}", now=now)
    with connect.changing(path) as db:
        fill(random, db, ledger.owner, policy.apps["app"], now, tokens.digest(secret))
    request, peer = request_of(random), random.choice(ADDRESSES)
    headers = (("x-api-key", secret), *((("x-forwarded-for", random.choice(ADDRESSES)),) if random.random() < 0.3 else ()))
    request = Request(request.method, request.target, headers, request.body)
    try:
        gateway = Gateway(ledger, policy)
        address = origin(peer, headers, policy.trusted_proxies)

        def find_token(db):
            return state.look_up_token(db, tokens.digest(secret), now).token

        told = explain(policy, policy.apps["app"], request, path, now, find_token, address)
        arrived = await gateway.authenticate(request.method, request.target, headers, peer, now)
        answer = arrived if isinstance(arrived, Refusal) else await gateway.admit(arrived, request, now)
        observed = () if isinstance(answer, Refusal) else answer.flags
        gateway.stop()
    finally:
        await ledger.close()
    if not isinstance(answer, Refusal):
        flagged = {flag.removeprefix("observed:") for flag in observed if flag.startswith("observed:")}
        assert {each["code"] for each in told["observed"]} == flagged
    return told, answer if isinstance(answer, Refusal) else None


@pytest.mark.parametrize("start", [pytest.param(at, marks=[pytest.mark.soak] if at else []) for at in range(0, 50 * CASES, CASES)])
async def test_explain_and_the_gateway_give_one_verdict(tmp_path, waited, start):
    said = Counter()
    for seed in range(start, start + CASES):
        (folder := tmp_path / str(seed)).mkdir()
        told, refused = await both(folder, seed)
        assert told["refused"] == (refused and {"code": refused.code, "sentence": refused.sentence}), f"seed {seed}"
        assert (told["waits_s"] > 0) == bool(waited), f"seed {seed}"
        said[refused and refused.code] += 1
        said["waited"] += len(waited)
        waited.clear()
    assert len(said) >= 7, f"too little was tried: {said}"
    assert said["waited"] >= (1 if start else 3), f"too little was tried: {said}"  # by chance two of the sixty from 1,320 on
