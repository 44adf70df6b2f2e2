"""Every refusal as the official SDK's user meets it: the class that it raises, the status, the advice, and the sentence."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import anthropic
import pytest
from gateway import Running, gateway
from ledgers import until
from upstreams import upstream

from gateway_addon.identity import tokens
from gateway_addon.ledger import admin
from gateway_addon.refusals import TABLE, stated
from gateway_addon.simulator import KEY, Behaviour, Simulator

ASK: dict[str, Any] = {"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": "Say hello."}]}
LEAST = "models: {allow: [claude-haiku-4-5]}\n"
RICH = LEAST + "caps: {day: $100}\n"

type Act = Callable[[Running], Awaitable[Any]]


def ask(**more: Any) -> Act:
    """One call; what is None is left out of it."""
    body = {name: value for name, value in (ASK | more).items() if value is not None}
    return lambda gw: gw.client().messages.create(**body)


def ask_with(token: str) -> Act:
    async def act(gw: Running) -> Any:
        gw.tokens["app"] = token
        return await ask()(gw)

    return act


def after(change: Callable[..., Any], **facts: Any) -> Act:
    """A call after the operator did something to the ledger."""

    async def act(gw: Running) -> Any:
        await gw.gateway.ledger.change(partial(change, who="test", now=time.time(), **facts))
        return await ask()(gw)

    return act


def twice(*, in_flight: bool = False) -> Act:
    """A second call, behind a first one that has ended or is still in flight."""

    async def act(gw: Running) -> Any:
        first = asyncio.ensure_future(ask()(gw))
        if in_flight:
            await until(lambda: gw.api.book.requests)
        else:
            await first
            await gw.quiet()
        try:
            return await ask()(gw)
        finally:
            await first

    return act


async def expired(gw: Running) -> Any:
    gw.tokens["app"], past = tokens.mint(), time.time() - 60
    issue = partial(admin.issue_token, app="app", digest=tokens.digest(gw.tokens["app"]), label="old", expires_at=past, who="test", now=past - 60)
    await gw.gateway.ledger.change(issue)
    return await ask()(gw)


async def of_no_app(gw: Running) -> Any:
    gw.tokens["app"] = tokens.mint()
    await gw.gateway.ledger.change(
        partial(admin.issue_token, app="ghost", digest=tokens.digest(gw.tokens["app"]), who="test", now=time.time())
    )
    return await ask()(gw)


async def two_credentials(gw: Running) -> Any:
    return await gw.client(default_headers={"x-api-key": "one", "authorization": "Bearer two"}).messages.create(**ASK)


async def without_ledger(gw: Running) -> Any:
    path = gw.folder / "gateway.db"
    path.rename(gw.folder / "away.db")
    try:
        return await ask()(gw)
    finally:
        (gw.folder / "away.db").rename(path)


async def with_a_bug(gw: Running) -> Any:
    gw.gateway.admit = None
    return await ask()(gw)


async def while_draining(gw: Running) -> Any:
    gw.addon.draining = True
    return await ask()(gw)


SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 2}
AUTH, DENIED, BAD, RATE = anthropic.AuthenticationError, anthropic.PermissionDeniedError, anthropic.BadRequestError, anthropic.RateLimitError


class Case(NamedTuple):
    code: str
    raises: type[anthropic.APIStatusError]
    act: Act
    sentence: str
    """What it must name: the thing, the limit, the way out."""
    app: str = RICH
    retry_after: bool = False
    behaviour: Behaviour = Behaviour()
    policy: str = ""


CASES = [
    Case("token_malformed", AUTH, ask_with("gwt_cut"), r"cut or mistyped: it has 7 of 53 characters.*Paste it again"),
    Case("token_malformed", AUTH, ask_with(KEY), r"is a Claude API key.*gateway token issue APP"),
    Case("token_unknown", AUTH, ask_with(tokens.mint()), r"No app has this token.*gateway token issue APP"),
    Case("token_revoked", AUTH, after(admin.revoke_tokens, app="app"), r"Token test of the app 'app' is revoked\..*gateway token issue APP"),
    Case("token_expired", AUTH, expired, r"Token old of the app 'app' is expired\..*gateway token issue APP"),
    Case("token_conflict", AUTH, two_credentials, r"different credentials\. Send the app's gateway token in one"),
    Case("token_address", AUTH, ask(), r"The app 'app' may not call from 127\.0\.0\.1 \(.*app\.yaml: addresses\)\.", RICH + "addresses: [10.0.0.0/8]\n"),
    Case("app_unknown", DENIED, of_no_app, r"App ghost has a token but no policy \(policies/apps/ghost\.yaml\)\. Write one: gateway app add ghost\."),
    Case("app_paused", DENIED, after(admin.pause, scope="app:app", why="runaway loop"), r"The app 'app' is paused until it is resumed \(runaway loop\).*gateway resume"),
    Case("endpoint", DENIED, lambda gw: gw.client().beta.agents.list(), r"GET /v1/agents.* is not served here; .*POST /v1/messages"),
    Case("endpoint", DENIED, lambda gw: gw.client().messages.batches.list(), r"The app 'app' may not call batches; allowed: messages, count_tokens, models \(.*app\.yaml endpoints\)"),
    Case("not_found", anthropic.NotFoundError, lambda gw: gw.client().messages.batches.retrieve("msgbatch_01"), r"The app 'app' has no message batch 'msgbatch_01' here; it sees those that it made", RICH + "endpoints: [batches]\n"),
    Case("model", DENIED, ask(model="claude-opus-5-5"), r"The app 'app' may not use claude-opus-5-5; allowed: claude-haiku-4-5 \(.*app\.yaml models\.allow\)"),
    Case("model", DENIED, ask(model="gpt-9"), r"asks for 'gpt-9' \(model\), which is no known model; allowed: claude-haiku-4-5"),
    Case("feature", DENIED, ask(tools=[SEARCH]), r"may not use web_search \(tools\[0\]\); allowed features: none \(.*app\.yaml features\)"),
    Case("thread", DENIED, ask(extra_body={"thread": {"type": "create"}}), r"may not use thread \(thread\); allowed features: none \(.*app\.yaml features\)"),
    Case("unknown_field", DENIED, ask(extra_body={"turbo": True}), r"The app 'app' sends turbo, which .* cannot bound; leave it out, or allow it with"),
    Case("max_tokens", DENIED, ask(), r"The app 'app' may ask for at most 99 tokens of output, not 100 \(max_tokens\); lower it", RICH + "max_tokens: 99\n"),
    Case("requirement", DENIED, ask(), r"The app 'app' must send metadata\.user_id with each request", RICH + "require: [metadata.user_id]\n"),
    Case("label", DENIED, ask(), r"The app 'app' must say its label client with each call, .*app\.yaml labels\.client\)", RICH + "labels: {client: {values: [acme], required: true}}\n"),
    Case("body", BAD, ask(model=""), r"^model must be one non-empty string"),
    Case("body", BAD, ask(max_tokens=True), r"max_tokens must be a whole number"),
    Case("too_large", anthropic.RequestTooLargeError, ask(system="x" * 32_000_000), r"The body has 32,\d+,\d+ bytes, the API takes 32,000,000; send less"),
    Case("cap_spent", RATE, twice(), r"The cap for today of the app 'app' would be passed: \$0\.0002 spent of \$0\.0017; this call needs \$0\.0017\. It resets at .* UTC\. The largest max_tokens that still fits is \d+\. .*gateway cap raise app day", LEAST + "caps: {day: $0.0017}\n", True),
    Case("quote_over_cap", RATE, ask(), r"can cost up to \$.*, more than the cap for one request of the app 'app' \(\$0\.0015, .*caps\).*largest max_tokens that fits is \d+", RICH.replace("day", "request: $0.0015, day")),
    Case("quote_over_cap", RATE, ask(), r"can cost up to \$.*, more than the cap for today of the app 'app' .*send less", LEAST + "caps: {day: $0.0001}\n"),
    Case("cap_held", RATE, twice(in_flight=True), r"Of the cap for today of the app 'app' \(\$0\.0025\) \$0\.00 is spent, \$0\.0017 held by calls in flight; this call needs \$0\.0017\. Try again", LEAST + "caps: {day: $0.0025}\n", True, Behaviour(delay_headers_s=4)),
    Case("rate", RATE, twice(), r"The app 'app' is at its limit of 1 request per minute \(.*rates\)", RICH + "rates: {requests_per_minute: 1}\n", True),
    Case("concurrency", RATE, twice(in_flight=True), r"The app 'app' has 1 call in flight, as many as it may have at once \(.*rates\.concurrent\), .* within 0\.2 s \(rates\.wait\)\. Make fewer", RICH + "rates: {concurrent: 1, wait: 0.2s}\n", True, Behaviour(delay_headers_s=0.8)),
    Case("headroom", RATE, twice(), r"The shared key has .* left for now, and the app 'app' keeps 20 % of them free", RICH + "rates: {headroom: 20%}\n", True, Behaviour(ratelimit_remaining_percent=10)),
    Case("ledger", anthropic.ServiceUnavailableError, without_ledger, r"cannot reach its ledger.*Try again shortly", retry_after=True),
    Case("internal", anthropic.ServiceUnavailableError, with_a_bug, r"The gateway failed while judging this request, so it was not sent"),
    Case("draining", anthropic.ServiceUnavailableError, while_draining, r"shutting down; send the call again", retry_after=True),
    Case("upstream_timeout", anthropic.APIStatusError, ask(), r"The Claude API began no answer within 0\.2 s.*Try again", behaviour=Behaviour(delay_headers_s=3), policy="timeouts: {first_byte: 0.2s}"),
]  # fmt: skip

ELSEWHERE = {
    # a code that the SDK cannot provoke here: where it is shown
    "token_missing": "the SDK sends a credential with every call: tests/test_wire.py",
    "crowded": "memory is the limit: tests/test_scale.py",
    "token_noise": "sixty refusals come before it: tests/test_noise.py",
    "token_proxy": "gateway local alone: tests/test_local.py",
    **dict.fromkeys(
        ("identity_invalid", "identity_expired", "identity_unknown", "identity_ambiguous", "identity_unavailable"),
        "needs an issuer: tests/calls/test_identities.py",
    ),
    "upgrade": "the SDK does not upgrade: tests/test_upgrade.py",
    "browser": "the SDK sends no OPTIONS: tests/test_wrong_paths.py",
    "request": "the SDK's HTTP is well-formed: tests/test_wire.py",
    "replay": "a click in mitmweb: tests/test_addon.py",
    "model_unpriced": "a known model always has a price: tests/test_bounds.py",
    "unsettled": "a batch has to end first: tests/test_workspace.py",
    "upstream_unreachable": "needs an upstream that is gone: tests/test_endings.py",
    "upstream_redirect": "needs an upstream that redirects: tests/test_upstream_wire.py",
}


def test_every_code_is_shown_here_or_has_a_reason_not_to_be():
    assert {case.code for case in CASES} | set(ELSEWHERE) == set(TABLE)
    assert not {case.code for case in CASES} & set(ELSEWHERE)


@pytest.fixture
def clock(case, request):
    """For an API that takes its time: the others' time is that of a process which judges a large body."""
    if case.behaviour != Behaviour():
        request.getfixturevalue("idle_clock")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("case", CASES, ids=[f"{case.code}-{index}" for index, case in enumerate(CASES)])
async def test_refusal_raises_the_sdk_class_with_a_helpful_sentence(tmp_path, case):
    """A refusal raises the SDK's own class, with a sentence that helps."""
    async with Simulator(behaviour=case.behaviour) as api, gateway(tmp_path, api, {"app": case.app}, case.policy) as gw:
        with pytest.raises(case.raises) as raised:
            await case.act(gw)
        error, row = raised.value, TABLE[case.code]
        headers, body = error.response.headers, error.body
        assert (error.status_code, body["error"]["type"], headers["x-gateway-refusal"]) == (row.status, row.error_type, case.code)
        assert (body["type"], body["request_id"], error.request_id) == ("error", headers["request-id"], headers["request-id"])
        assert headers.get("x-should-retry") == (None if row.may_retry else "false")
        assert ("retry-after" in headers) is case.retry_after
        sentence = body["error"]["message"]
        assert re.search(case.sentence, sentence, re.DOTALL), sentence
        assert sentence.endswith((".", ")")), sentence
        assert sentence in str(error), "what a developer sees in the traceback"
        if case.code not in ("draining",):
            await gw.quiet()
            assert await gw.held_nano() == 0


@pytest.mark.parametrize(
    ("clause", "sentence"),
    [
        ("app reports may not", "App reports may not."),
        ("max_tokens must be", "max_tokens must be."),
        ("tools must be a list", "tools must be a list."),
        ("messages[0] must be", "messages[0] must be."),
        ("'x' is", "'x' is."),
    ],
)
def test_clause_becomes_a_sentence_and_field_names_keep_case(clause, sentence):
    """A clause becomes a sentence; a field name at its beginning keeps its spelling."""
    assert stated("body", clause).sentence == sentence


async def test_an_upstream_that_is_gone_is_said_as_such(tmp_path):
    async with upstream() as api:
        nowhere = api.url
    async with gateway(tmp_path, None, {"app": RICH}, upstream=nowhere) as gw:
        with pytest.raises(anthropic.InternalServerError, match="could not reach the Claude API"):
            await ask()(gw)
