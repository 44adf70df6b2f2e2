"""Policy as frozen values: what the operator decided, ready to be judged by. No YAML, no files, no decisions."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from types import MappingProxyType
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

from gateway_addon.identity.trust import Trust, WorkloadRule
from gateway_addon.ledger import TOTAL, AppPart, CapShape, NameLimit, NewCall, app_scope, part_of, part_scope, team_scope
from gateway_addon.names import app_named
from gateway_addon.pricing import Prices
from gateway_addon.windows import Window, is_cycle

OBSERVABLE = ("endpoints", "models", "unknown_fields", "features", "betas", "max_tokens", "thinking", "require", "labels", "caps", "rates")
"""The rules of an app's policy that may be observed instead of enforced, by the keys that hold them."""

NO_CAPS: Mapping[Window, int] = MappingProxyType({})


class Cap(NamedTuple):
    """A limit in force: at most `amount_nano` in each `window` for everything in `scope` (a scope of the ledger)."""

    scope: str
    window: Window
    amount_nano: int


@dataclass(frozen=True, slots=True)
class PartCaps:
    """Caps on each part of one kind (each session, each user), or on one part alone."""

    caps: Mapping[Window, int]
    last_call_percent: int | None = None
    """The last share of each cap is kept for requests that say that they are the last."""
    per_hour_nano: int | None = None
    """A session that spends more than this in an hour raises an alert."""


NO_PART_CAPS = PartCaps(NO_CAPS)


class Source(NamedTuple):
    """Where a secret is read from: `env` NAME, `file` PATH, `command` ARGV or `keyring` SERVICE/USER. upstreams/credentials.py reads it."""

    kind: Literal["env", "file", "command", "keyring"]
    value: str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Models:
    allow: tuple[str, ...]
    deny: tuple[str, ...] = ()
    aliases: Mapping[str, str] = MappingProxyType({})
    """Models by the app's own name for them: a request for such a name is sent with the model's id."""
    moving: Literal["pass", "refuse", "pin"] = "pass"
    """Pass, refuse or pin a name that the provider may point at another snapshot."""
    caps: Mapping[str, PartCaps] = MappingProxyType({})
    """Caps on single models, by canonical id."""


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature that the app may use, with the limits that the operator set. Each applies to some features only."""

    max_uses: int | None = None
    tokens_per_use: int | None = None
    """How much one use can bring into the prompt, as the operator says; None: up to the context window."""
    default: tuple[str, ...] = ()
    """The models that `fallbacks: "default"` may reach."""
    servers: tuple[str, ...] = ()
    """Patterns of the MCP servers' addresses; empty: any."""


@dataclass(frozen=True, slots=True)
class MaxTokens:
    limit: int
    over: Literal["refuse", "clamp"] = "refuse"


@dataclass(frozen=True, slots=True)
class Thinking:
    budget_tokens: int | None = None
    effort: tuple[str, ...] = ()
    """The levels allowed; empty: any."""


@dataclass(frozen=True, slots=True)
class Betas:
    allow: tuple[str, ...] = ("*",)
    deny: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelPolicy:
    """A label that the app's calls may carry. A token's own labels are the operator's word, and need no declaration."""

    sources: tuple[Literal["header", "path", "token"], ...] = ("header", "path")
    values: tuple[str, ...] = ("*",)
    """Patterns, each of which matches whole values."""
    required: bool = False


@dataclass(frozen=True, slots=True)
class RatePolicy:
    requests_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    concurrent: int | None = None
    wait_s: float = 30.0
    """How long a call waits in line for one of the app's calls in flight to end."""
    headroom_percent: int | None = None
    """Keep this share of the shared key's own limits free for the other apps."""


@dataclass(frozen=True, slots=True)
class Alerts:
    at_percent: tuple[int, ...] = ()
    webhook: Source | None = None
    format: Literal["json", "slack"] | None = None
    """The format that the webhook takes; None: as its host suggests."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    connect_s: float
    first_byte_s: float
    silence_s: float
    drain_s: float
    batch_poll_s: float


@dataclass(frozen=True, slots=True)
class Tls:
    cert: str
    key: str


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """How calls leave: `proxy` is an address without a password, or where one with a password is read from."""

    proxy: str | Source | None = None
    ca: str | None = None


@dataclass(frozen=True, slots=True)
class Team:
    caps: Mapping[Window, int]


@dataclass(frozen=True, slots=True)
class AppPolicy:
    """The policy of one app. `file` is the policy file as people know it, for sentences."""

    name: str
    file: str
    models: Models
    caps: Mapping[Window, int]
    each: Mapping[str, PartCaps]
    """Caps on each part of the app, by the part's kind (see `ledger.types.AppPart`)."""
    parts_max: int
    """How many new names of parts its clients may bring in a day. Calls under further ones count together."""
    team: str | None
    endpoints: tuple[str, ...]
    features: Mapping[str, Feature]
    unknown_fields: Literal["refuse", "pass"]
    betas: Betas
    max_tokens: MaxTokens | None
    thinking: Thinking
    require: tuple[str, ...]
    labels: Mapping[str, LabelPolicy]
    undeclared_labels: Literal["refuse", "drop"]
    reserve: Literal["full", "progressive", "auto"]
    abandoned: Literal["finish", "close"]
    rates: RatePolicy
    alerts: Alerts
    mode: Literal["enforce", "observe"]
    observe: tuple[str, ...]
    """Rules (of OBSERVABLE) that only record what they would refuse; the other rules are enforced."""
    served: Literal["exact", "any"]
    addresses: tuple[IPv4Network | IPv6Network, ...]
    workloads: tuple[WorkloadRule, ...]
    """Whose identity tokens are this app's."""
    workspace_geo: Literal["global", "us", "unknown"]
    """The gateway's setting, repeated here because the quote of a request depends on it."""

    def __str__(self) -> str:
        """Return the app as sentences name it."""
        return app_named(self.name)

    def beside(self, file: str) -> str:
        """Return another file of the same folder as people know it."""
        return f"{self.file.rpartition('/apps/')[0]}/{file}"

    def observes(self, rule: str) -> bool:
        """Return whether a rule only records what it would refuse. Caps shared with other apps are always enforced."""
        return self.mode == "observe" or rule in self.observe


@dataclass(frozen=True, slots=True)
class GatewayPolicy:
    """Everything in force at one moment: a call is judged and priced by the snapshot taken at its admission."""

    upstream: str
    key: Source
    admin_key: Source | None
    metrics_token: Source | None
    timezone: str
    caps: Mapping[Window, int]
    teams: Mapping[str, Team]
    timeouts: Timeouts
    bodies_in_flight: int
    """Bytes. This limit keeps many large requests at once from taking all of the machine's memory."""
    ledger_mode: int
    """Permission bits of a ledger's files."""
    tls: Tls | None
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...]
    egress: EgressPolicy
    pass_headers: tuple[str, ...]
    """Request headers that leave beside those that the API knows, in lower case."""
    alerts: Alerts
    workspace_geo: Literal["global", "us", "unknown"]
    apps: Mapping[str, AppPolicy]
    trust: Trust | None
    """The issuers whose identity tokens are believed, and the workloads that these stand for; None: no identity token is believed."""
    prices: Prices
    folder: str
    """The folder of its files as people know it, for sentences."""
    digest: str
    """SHA-256 over the files' names and bytes and the prices' digest."""
    texts: Mapping[str, str]
    """The files as they were read, by their path in the folder: what an audit compares. They name secrets' places, never secrets."""

    @property
    def zone(self) -> ZoneInfo:
        """Return the zone in which days begin and times are written."""
        return ZoneInfo(self.timezone)

    @property
    def secret_variables(self) -> frozenset[str]:
        """Return the environment variables that hold secrets: no program that the gateway starts may inherit them."""
        alerts = (self.alerts, *(app.alerts for app in self.apps.values()))
        proxy = self.egress.proxy if isinstance(self.egress.proxy, Source) else None
        sources = (self.key, self.admin_key, self.metrics_token, proxy, *(each.webhook for each in alerts))
        return frozenset(str(source.value) for source in sources if source is not None and source.kind == "env")


def caps(policy: GatewayPolicy, app: AppPolicy, parts: Iterable[AppPart] = (), *, last_call: bool = False) -> tuple[Cap, ...]:
    """Return every cap that limits a call of this app: the total's, its team's, its own, and those of the parts that it belongs to."""
    scopes = [(TOTAL, policy.caps), (app_scope(app.name), app.caps)]
    if app.team is not None:
        scopes.insert(1, (team_scope(app.team), policy.teams[app.team].caps))
    shared = (Cap(scope, window, amount_nano) for scope, limits in scopes for window, amount_nano in limits.items())
    return (*shared, *part_caps(app, parts, last_call=last_call))


def part_caps(app: AppPolicy, parts: Iterable[AppPart], *, last_call: bool) -> Iterator[Cap]:
    """Yield the caps of parts of an app, without the shares that are kept for last calls unless this is one."""
    for kind, value in parts if app.each or app.models.caps else ():
        found = caps_of_part(app, kind, value)
        for window, whole_nano in found.caps.items():
            kept_nano = 0 if last_call else last_call_share(whole_nano, found)
            yield Cap(part_scope(app.name, (kind, value)), window, whole_nano - kept_nano)


def last_call_share(whole_nano: int, found: PartCaps) -> int:
    """Return the share of a cap that is kept for last calls."""
    return whole_nano * (found.last_call_percent or 0) // 100


def caps_by_model(app: AppPolicy) -> bool:
    """Return whether an app has caps on its models one by one."""
    return "model" in app.each or bool(app.models.caps)


def name_limit(app: AppPolicy) -> NameLimit:
    """Return how many names of parts an app's clients may bring, and the kinds of parts whose names are the operator's own."""
    if not app.each:
        return NameLimit(app.parts_max)
    free = {name for name, rule in app.labels.items() if rule.sources != ("token",) and re.search(r"[*?[]", "".join(rule.values))}
    bounded = {kind for kind in app.each if kind.startswith("label.") and kind.removeprefix("label.") not in free}
    kept = frozenset(kind for kind, each in app.each.items() if each.caps)
    return NameLimit(app.parts_max, frozenset({"model", "token", *bounded}), kept)


def token_cap(call: NewCall) -> tuple[Cap, ...]:
    """Return the cap that a call's token was issued with, if any. No policy file knows of it, so none observes or lifts it."""
    return () if call.token_cap_nano is None else (Cap(part_scope(call.app, ("token", str(call.token_id))), "ever", call.token_cap_nano),)


def caps_of_part(app: AppPolicy, kind: str, value: str) -> PartCaps:
    """Return what one part may spend: as each of its kind, and where a model has caps of its own, those instead."""
    return caps_of_one(app.each, app.models.caps, kind, value)


def caps_of_one(of_each: Mapping[str, PartCaps], of_models: Mapping[str, PartCaps], kind: str, value: str) -> PartCaps:
    """Return what one part may spend by the caps of each part, by kind, and those of single models, by canonical id."""
    each = of_each.get(kind, NO_PART_CAPS)
    own = of_models.get(value) if kind == "model" else None
    return each if own is None else PartCaps({**each.caps, **own.caps}, own.last_call_percent or each.last_call_percent)


def all_caps(policy: GatewayPolicy) -> tuple[Cap, ...]:
    """Return every cap of the apps, of the teams and of the total, once each; those of an app's parts are without number."""
    shared = ((TOTAL, policy.caps), *((team_scope(name), team.caps) for name, team in policy.teams.items()))
    own = ((app_scope(app.name), app.caps) for app in policy.apps.values())
    return tuple(Cap(scope, window, nano) for scope, limits in (*shared, *own) for window, nano in limits.items())


def capped_parts(policy: GatewayPolicy) -> frozenset[tuple[str, str, Window]]:
    """Return the app, kind and window of every cap on parts: of these the ledger keeps balances."""
    return frozenset(
        (app.name, kind, window)
        for app in policy.apps.values()
        for kind, each in (*app.each.items(), *(("model", own) for own in app.models.caps.values()))
        for window in each.caps
    )


def still_kept(policy: GatewayPolicy, call: NewCall, caps: Iterable[CapShape]) -> tuple[CapShape, ...]:
    """Return those of a running call's caps of which the ledger keeps balances under a policy that came into force since.

    The others are on parts and cycles that the policy has dropped: nothing can be judged by them any more.
    """
    parts, of_cycles = capped_parts(policy), cycles(policy)
    own = {(cap.scope, cap.window) for cap in token_cap(call)}

    def is_kept(cap: CapShape) -> bool:
        part = part_of(cap.scope)
        return (part is None or (call.app, part[0], cap.window) in parts) and (not is_cycle(cap.window) or cap.window in of_cycles)

    return tuple(cap for cap in caps if (cap.scope, cap.window) in own or is_kept(cap))


def cycles(policy: GatewayPolicy) -> frozenset[Window]:
    """Return every billing cycle that a cap names."""
    windows = {cap.window for cap in all_caps(policy)} | {window for _, _, window in capped_parts(policy)}
    return frozenset(window for window in windows if is_cycle(window))
