"""Every key that a policy file may have: its kind, its default, what it does.

The one source of validation, of `gateway schema` and of the reference of keys. Adding a key is adding a row here and the
field that carries it in `model`.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from yaml.nodes import Node

from gateway_addon.identity.trust import ALGORITHMS, KeySource
from gateway_addon.names import LABEL_NAME
from gateway_addon.policy import trusting
from gateway_addon.policy.kinds import (
    AMOUNT,
    BOOLEAN,
    COUNT,
    PERCENT,
    REQUIRED,
    SECONDS,
    Key,
    ValueKind,
    either,
    listing,
    mapping,
    one_of,
    one_or_more,
    parsed,
    record,
    text,
    word,
)
from gateway_addon.policy.model import (
    NO_CAPS,
    OBSERVABLE,
    Alerts,
    Betas,
    EgressPolicy,
    Feature,
    LabelPolicy,
    MaxTokens,
    Models,
    PartCaps,
    RatePolicy,
    Source,
    Team,
    Thinking,
    Timeouts,
    Tls,
)
from gateway_addon.policy.values import (
    DAY_OF_MONTH,
    HEADER,
    MODE,
    NAME,
    NAME_VALUE,
    NETWORK,
    PATTERN,
    PROXY_ADDRESS,
    SOURCE,
    TRUSTED_PROXY,
    UPSTREAM,
    WAIT,
    ZONE,
)
from gateway_addon.pricing import LISTED_BY
from gateway_addon.windows import cycle
from gateway_addon.yaml_file import Problems, Spot, entries, suggestion


def _group(make: Any, keys: Mapping[str, Key], help: str, default: Any = REQUIRED) -> Key:
    return Key(record(make, keys), help, default, keys)


_CYCLE = {
    "amount": Key(AMOUNT, "how much"),
    "from": Key(DAY_OF_MONTH, "the day it begins on"),
}
_WINDOWS = {
    "day": Key(AMOUNT, "at most this much in a calendar day", None),
    "week": Key(AMOUNT, "at most this much in a week, from Monday", None),
    "month": Key(AMOUNT, "at most this much in a calendar month", None),
    "cycle": _group(dict, _CYCLE, "at most this much in a month that begins on a day, as bills do", None),
    "ever": Key(AMOUNT, "at most this much in all", None),
}


def _amounts(**found: Any) -> Mapping[str, int]:
    """Return the amounts by window, in the order of their length."""
    given = {name: found[name] for name in ("request", *_WINDOWS) if found.get(name) is not None}
    amounts = {cycle(one["from"]) if name == "cycle" else name: one["amount"] if name == "cycle" else one for name, one in given.items()}
    return MappingProxyType(amounts)


def _caps(windows: Mapping[str, Key], help: str, default: Any = REQUIRED) -> Key:
    unlimited = ValueKind(lambda node, spot: NO_CAPS if word("unlimited").read(node, spot) else None, {"const": "unlimited"}, "`unlimited`")
    return Key(either(unlimited, record(_amounts, windows)), help, default, windows)


_LAST_CALL = {
    "last_call": Key(PERCENT, "keep this last share for requests that say `x-gateway-last-call: 1`, so that an agent can end well", None)
}


def _part_caps(last_call: int | None, per_hour: int | None = None, **amounts: Any) -> PartCaps:
    return PartCaps(_amounts(**amounts), last_call, per_hour)


_PART_CAPS = record(_part_caps, _WINDOWS | _LAST_CALL)
PART_CAPS = ValueKind(_PART_CAPS.read, _PART_CAPS.schema, "caps: `{day: $5}`, with `week`, `month`, `cycle`, `ever`, `last_call`")
_PER_HOUR = {"per_hour": Key(AMOUNT, "an alert is raised where a session spends more than this within an hour; it refuses nothing", None)}
_SESSION_CAPS = record(_part_caps, _WINDOWS | _LAST_CALL | _PER_HOUR)
SESSION_CAPS = ValueKind(_SESSION_CAPS.read, _SESSION_CAPS.schema, "caps, as of each part, and `per_hour`")
PARTS = {
    "session": "each session (`x-claude-code-session-id`): the client's word",
    "agent": "each agent (`x-claude-code-agent-id`): the client's word",
    "user": "each end user (`metadata.user_id`): the client's word",
    "model": "each model; one alone under `models.caps`",
    "token": "each token",
}
_LABEL_PART = rf"label\.{NAME}"


def _kind(part: str) -> ValueKind:
    return SESSION_CAPS if part == "session" else PART_CAPS


def _each() -> ValueKind:
    """Read caps by the kind of part, labels among them."""
    keys = {kind: Key(_kind(kind), help, None) for kind, help in PARTS.items()}

    def read(node: Node, spot: Spot) -> Mapping[str, PartCaps]:
        found, problems = {}, Problems()
        for name, (key_node, value) in entries(node, spot).items():
            with problems.noted():
                if name not in keys and re.fullmatch(_LABEL_PART, name) is None:
                    raise spot.at(name).error(key_node, f"unknown key{suggestion(name, (*keys, 'label.NAME'))}")
                found[name] = _kind(name).read(value, spot.at(name))
                if not found[name].caps:
                    raise spot.at(name).error(value, "names no window; write one like {day: $5}")
        problems.say()
        return MappingProxyType(found)

    labels = {"patternProperties": {f"^(?:{_LABEL_PART})$": PART_CAPS.schema}}
    return ValueKind(read, {**record(dict, keys).schema, **labels}, "keys")


_EACH = {kind: Key(_kind(kind), help, None) for kind, help in (PARTS | {"label.NAME": "each value of a label"}).items()}

def _alerts(at: tuple[int, ...], webhook: Source | None, format: Any) -> Alerts:
    return Alerts(at_percent=at, webhook=webhook, format=format)


def _rates(wait: float, headroom: int | None, **limits: int | None) -> RatePolicy:
    return RatePolicy(**limits, wait_s=wait, headroom_percent=headroom)


ALERTS = _group(
    _alerts,
    {
        "at": Key(listing(PERCENT), "tell when this share of a cap is spent; unless given, as in gateway.yaml, else 50, 80, 95, 100%", ()),
        "webhook": Key(
            SOURCE,
            "where to send alerts: its address (https, or http inside the network) is read from there, since such addresses are secrets; "
            "without it, gateway.yaml's",
            None,
        ),
        "format": Key(word("json", "slack"), "what the webhook takes; unless given, `slack` for hooks.slack.com, else `json`", None),
    },
    "who hears of a cap before it is reached",
    Alerts(),
)

_USES = {"max_uses": Key(COUNT, "a request must state its own `max_uses`, and no more than this")}
_PER_USE = {"tokens_per_use": Key(COUNT, "your word for what one use adds to the prompt; without it the context window is quoted", None)}


def _feature(help: str, keys: Mapping[str, Key] | None = None) -> Key:
    """Return the key of a feature: off unless named; `true` names it, where it has no key that must be given."""
    if keys is None:
        return Key(BOOLEAN, help, False)
    named, needed = record(Feature, keys), [name for name, key in keys.items() if key.default is REQUIRED]

    def off(value: str) -> bool:
        if value != "false":
            raise ValueError(f"{' and '.join(needed)} must be given, like {{{needed[0]}: 5}}; nothing else limits what a request may spend")
        return False

    plain = parsed(off, {"const": False}, "`false`") if needed else BOOLEAN
    return Key(either(plain, named), help, False, keys)


FEATURES: dict[str, Key] = {
    "web_search": _feature("web search at the provider ($10 per 1,000 searches, and what it finds is read as input)", _USES | _PER_USE),
    "web_fetch": _feature("fetching web pages at the provider", _USES | _PER_USE),
    "code_execution": _feature("running code at the provider", _PER_USE),
    "tool_search": _feature("searching deferred tools at the provider (the prompt is read again after each search)"),
    "mcp": _feature(
        "MCP servers called by the provider",
        {"servers": Key(listing(text()), "patterns of the servers' addresses; without it any server", ())} | _PER_USE,
    ),
    "files": _feature("images and documents given by url, or by the id of a file that the app uploaded (their size is not in the body)"),
    "container": _feature("containers, uploads into them and skills"),
    "compaction": _feature("compaction: the provider summarises the conversation and bills that beside the answer"),
    "thread": _feature("threads: the provider keeps the conversation, so the body no longer shows the prompt"),
    "advisor": _feature("an advisor model asked by the model (its model must be allowed too)", _USES),
    "fallbacks": _feature(
        "other models tried when one declines (each must be allowed too)",
        {"default": Key(listing(PATTERN), 'the models that `fallbacks: "default"` may reach; without it "default" is refused', ())},
    ),
    "fast": _feature("`speed: fast`, at the model's fast price"),
    "service_tier": _feature("a `service_tier` other than auto and standard_only"),
    "inference_geo": _feature("an `inference_geo` other than global (1.1 times the price)"),
    "user_profile": _feature("billing to a user profile (`billing_policy`, `anthropic-user-profile-id`)"),
    "workspace": _feature("choosing a workspace with `anthropic-workspace-id`"),
    "hour_ttl": Key(BOOLEAN, "prompt caching for an hour: allowed unless `false`, because its whole price is in the quote", True),
}
"""The features that an app may use beyond plain messages: off unless named, but for one that the body bounds (`hour_ttl`)."""


def _features(**named: bool | Feature) -> Mapping[str, Feature]:
    return MappingProxyType({name: Feature() if value is True else value for name, value in named.items() if value is not False})


_LIMIT = {
    "limit": Key(COUNT, "the largest `max_tokens` that a request may ask for"),
    "over": Key(
        word("refuse", "clamp"),
        "what happens to a request that asks for more; `clamp` rewrites its body (`x-gateway-edited` on its answer says so), but for a "
        "stream that is held in steps",
        "refuse",
    ),
}
_MAX_TOKENS = either(
    ValueKind(lambda node, spot: MaxTokens(COUNT.read(node, spot)), COUNT.schema, COUNT.written), record(MaxTokens, _LIMIT)
)

_KEYS_OF_ISSUER = one_of(
    KeySource,
    {
        "url": parsed(trusting.web_address, {"type": "string", "format": "uri"}, "an https address"),
        "file": text(what="a path"),
        "inline": parsed(trusting.inline_keys, {"type": "string"}, "a JWK set (JSON)"),
    },
)
_ISSUER = {
    "url": Key(
        parsed(trusting.issuer_address, {"type": "string"}, "an https address"),
        "its `iss`, to the letter; `spiffe://DOMAIN` for a trust domain whose tokens have none",
    ),
    "keys": Key(
        _KEYS_OF_ISSUER, "where its public keys (JWK set) are; unless given, where its discovery document says", KeySource("discovery")
    ),
    "algorithms": Key(listing(word(*ALGORITHMS)), "by which it signs; `RS256, ES256` unless given", ("RS256", "ES256")),
    "lifetime": Key(SECONDS, "the longest life of a token, from `iat` to `exp`; an hour unless given", 3600.0),
    "skew": Key(SECONDS, "by how much its clock and ours may differ; 60 s unless given", 60.0),
}
_WORKLOAD = {
    "issuer": Key(NAME_VALUE, "the name of an issuer in gateway.yaml"),
    "subject": Key(text(), "the token's `sub`, to the letter; a beginning ends in `*` and stands beside a claim that is an id", None),
    "claims": Key(mapping(text(what="a text")), "further claims, to the letter: `{repository_id: 456}`", MappingProxyType({})),
}
_SOURCES = word("header", "path", "token")
_LABEL_VALUE = text(r"\S(?:[^\x00-\x1f]{0,198}\S)?", "a value of a label, or a pattern like cust-*")


def _label(**keys: Any) -> LabelPolicy:
    return LabelPolicy(sources=keys.pop("from"), **keys)


_LABEL = {
    "from": Key(
        one_or_more(_SOURCES),
        "where a call may say it: `header` (`x-gateway-label-NAME`), `path` (`/l/NAME=VALUE/v1/messages`), or `token`: nowhere else than "
        "on its token, where it always may stand and always wins; `[header, path]` unless given",
        ("header", "path"),
    ),
    "values": Key(one_or_more(_LABEL_VALUE), "the values that it may have, or patterns of them; any unless given", ("*",)),
    "required": Key(BOOLEAN, "a call that may cost something is refused without it", False),
}

APP: dict[str, Key] = {
    "models": _group(
        Models,
        {
            "allow": Key(listing(PATTERN), "models this app may use: ids, or patterns that match whole ids"),
            "deny": Key(listing(PATTERN), "models it may not use, whatever `allow` says", ()),
            "aliases": Key(mapping(PATTERN), "names of its own for models; rewrites the body", MappingProxyType({})),
            "moving": Key(
                word("pass", "refuse", "pin"),
                "names that the provider may point at another snapshot (`claude-haiku-4-5`): pass, refuse, or pin to the dated id",
                "pass",
            ),
            "caps": Key(
                mapping(PART_CAPS, "models"), "what the app may spend on one model, whatever `each.model` says", MappingProxyType({})
            ),
        },
        "which models the app may use",
    ),
    "caps": _caps(
        {"request": Key(AMOUNT, "at most this much for one call, before it is made", None)} | _WINDOWS,
        "what the app may spend; an app without limits says `caps: unlimited`",
    ),
    "each": Key(
        _each(), "what each part of the app may spend, within its caps: one session, agent, user, model, token or label",
        MappingProxyType({}), _EACH,
    ),
    "parts_max": Key(
        COUNT, "how many new sessions, agents, users and labels a day may bring, where each has a cap; calls under further names share the "
        "caps of one part, `others` (`10k` unless given)", 10_000,
    ),
    "team": Key(NAME_VALUE, "the team whose caps it shares (see `teams` in gateway.yaml)", None),
    "endpoints": Key(
        listing(word("messages", "count_tokens", "models", "batches", "files")),
        "what it may call: `batches` (each request of one is judged like a call of its own) and `files` only where named, "
        "and of them only what the app made itself; `messages, count_tokens, models` unless given",
        ("messages", "count_tokens", "models"),
    ),
    "features": Key(record(_features, FEATURES), "what it may use beyond plain messages", _features(hour_ttl=True), FEATURES),
    "unknown_fields": Key(word("refuse", "pass"), "request fields and types not known here (new ones may spend)", "refuse"),
    "betas": _group(
        Betas,
        {
            "allow": Key(listing(text()), "patterns of `anthropic-beta` values", ("*",)),
            "deny": Key(listing(text()), "patterns refused, whatever `allow` says", ()),
        },
        "which `anthropic-beta` values it may send; all unless given",
        Betas(),
    ),
    "max_tokens": Key(_MAX_TOKENS, "a ceiling for the request's own `max_tokens`", None, _LIMIT),
    "thinking": _group(
        Thinking,
        {
            "budget_tokens": Key(COUNT, "the largest thinking budget", None),
            "effort": Key(listing(word("low", "medium", "high", "xhigh", "max")), "the effort levels it may ask for; all unless given", ()),
        },
        "how much it may think (thinking is part of `max_tokens` and quoted with it)",
        Thinking(),
    ),
    "require": Key(listing(word("metadata.user_id", "system")), "what each request must carry", ()),
    "labels": Key(
        mapping(record(_label, _LABEL), pattern=LABEL_NAME),
        "labels by which reports, invoices and caps tell the app's calls apart: a customer, a project, a branch",
        MappingProxyType({}),
        {"NAME": Key(record(_label, _LABEL), "one label", REQUIRED, _LABEL)},
    ),
    "undeclared_labels": Key(
        word("refuse", "drop"), "what becomes of a call with a label that is not under `labels`; `drop` forgets the label", "refuse"
    ),
    "reserve": Key(word("auto", "full", "progressive"), "how much of a stream's worst case is held while it runs", "auto"),
    "abandoned": Key(
        word("finish", "close"),
        "what becomes of a call that does not stream when its client leaves: read to its end and booked exactly, or closed and booked at "
        "what it held",
        "finish",
    ),
    "rates": _group(
        _rates,
        {
            "requests_per_minute": Key(COUNT, "requests a minute; as many of `count_tokens` beside them", None),
            "input_tokens_per_minute": Key(COUNT, "quoted input tokens a minute", None),
            "concurrent": Key(COUNT, "calls in flight at once; a batch is one until it is settled", None),
            "wait": Key(
                WAIT,
                "how long a call beyond them waits in line before it is refused: `30s` unless given, at most `5m`, `0s` for not at all",
                RatePolicy().wait_s,
            ),
            "headroom": Key(PERCENT, "stay out of this last share of the shared key's own rate limits", None),
        },
        "how fast it may call",
        RatePolicy(),
    ),
    "alerts": ALERTS,
    "mode": Key(word("enforce", "observe"), "`observe` lets everything pass and records what would have been refused", "enforce"),
    "observe": Key(listing(word(*OBSERVABLE)), "rules that are only observed while the others are enforced", ()),
    "served": Key(word("any", "exact"), "`exact` raises an alert when another model answers than the one asked", "any"),
    "addresses": Key(listing(NETWORK), "networks its tokens may be used from; anywhere unless given", ()),
    "workloads": Key(
        listing(record(trusting.rule, _WORKLOAD)), "whose identity tokens are this app's, beside its own tokens; nobody's unless given", (),
        _WORKLOAD,
    ),
}

_TIMEOUTS = {
    "connect": Key(SECONDS, "to reach the upstream", 10.0),
    "first_byte": Key(SECONDS, "until the answer begins", 600.0),
    "silence": Key(SECONDS, "between two pieces of an answer", 300.0),
    "drain": Key(SECONDS, "for running calls to end when the gateway is told to stop", 60.0),
    "batch_poll": Key(SECONDS, "before an open batch is looked at, to be closed where nobody fetches it; longer for older ones", 60.0),
}


def _timeouts(connect: float, first_byte: float, silence: float, drain: float, batch_poll: float) -> Timeouts:
    return Timeouts(connect_s=connect, first_byte_s=first_byte, silence_s=silence, drain_s=drain, batch_poll_s=batch_poll)


_DEFAULT_TIMEOUTS = {name: key.default for name, key in _TIMEOUTS.items()}
_TEAM = {"caps": _caps(_WINDOWS, "what the team's apps may spend together")}
_TEAM_KEY = _group(Team, _TEAM, "one team")

GATEWAY: dict[str, Key] = {
    "upstream": Key(UPSTREAM, "where admitted calls go; to change it, restart the gateway", LISTED_BY),
    "key": Key(SOURCE, "where the real API key is read from, again when it changes", Source("env", "ANTHROPIC_API_KEY")),
    "admin_key": Key(SOURCE, "where `gateway reconcile` reads an admin key from; nothing else reads it, and it calls no model", None),
    "metrics_token": Key(
        SOURCE, "the bearer token that opens `/gateway/metrics`; without it there is no such page; to change it, restart", None
    ),
    "timezone": Key(ZONE, "in which days, weeks and months begin", "UTC"),
    "workspace_geo": Key(
        word("global", "us", "unknown"),
        "the workspace's `default_inference_geo`; while unknown, requests that name none are quoted at the dearer one",
        "unknown",
    ),
    "caps": _caps(_WINDOWS, "what all apps together may spend, beside each app's own caps", NO_CAPS),
    "teams": Key(
        mapping(record(Team, _TEAM), pattern=NAME), "apps that share caps, by the team's name", MappingProxyType({}), {"NAME": _TEAM_KEY}
    ),
    "timeouts": _group(_timeouts, _TIMEOUTS, "how long to wait for the upstream", _timeouts(**_DEFAULT_TIMEOUTS)),
    "bodies_in_flight": Key(
        COUNT,
        "bytes of request bodies that each process holds at once; a large one beyond them is told to come again (`256M` unless given)",
        256_000_000,
    ),
    "tls": _group(
        Tls,
        {"cert": Key(text(), "path of the certificate chain (PEM)"), "key": Key(text(), "path of its private key (PEM)")},
        "certificate of the listener, for apps on other machines",
        None,
    ),
    "trusted_proxies": Key(
        listing(TRUSTED_PROXY),
        "proxies in front: the address that they saw (X-Forwarded-For) is taken for the caller's; no proxy is believed unless given", (),
    ),
    "egress": _group(
        EgressPolicy,
        {
            "proxy": Key(
                either(PROXY_ADDRESS, SOURCE),
                "a proxy to go through; one with a password is a secret, so name where it is read from",
                None,
            ),
            "ca": Key(text(), "path of the certificate authorities (PEM) to trust there instead of the usual ones", None),
        },
        "the way to the upstream and to webhooks; unless given, as HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR say; "
        "to change it, restart the gateway",
        EgressPolicy(),
    ),
    "pass_headers": Key(
        listing(HEADER),
        "request headers that are sent on beside those that the Claude API knows; no others unless given",
        (),
    ),
    "issuers": Key(
        mapping(record(trusting.issuer, _ISSUER)), "whose identity tokens (OpenID Connect) are believed, by a name of yours",
        MappingProxyType({}), {"NAME": _group(trusting.issuer, _ISSUER, "one issuer")},
    ),
    "audience": Key(text(), "whom an identity token must be for (its `aud`); must be given where issuers are", None),
    "ledger_mode": Key(
        MODE, "who may open a ledger that is a file: `0640` lets its group read it while a gateway runs, `0600` unless given", 0o600
    ),
    "alerts": ALERTS,
}
