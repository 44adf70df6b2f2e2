"""The types of the ledger's interface.

Amounts are whole nano-dollars, times are unix seconds (UTC), scopes are those of scope.py. Knows nothing of SQL; caps and priced parts
come from other packages and are described here by their shape only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

from gateway_addon.ledger.scope import AppPart, part_scope, part_within, scopes
from gateway_addon.windows import Window

type Labels = tuple[tuple[str, str], ...]
"""Labels of a call or of a token, name and value, by name."""


def labels_text(labels: Labels) -> str | None:
    """Return labels as the ledger writes them: a JSON object, None for none."""
    return json.dumps(dict(labels), ensure_ascii=False, sort_keys=True) if labels else None


def labels_of(text: str | None) -> Labels:
    """Return the labels that a row holds."""
    return tuple(json.loads(text).items()) if text else ()


class LedgerUnavailable(Exception):
    """The ledger cannot be written or read: nothing may be forwarded. The message is a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The address of a ledger on a PostgreSQL server. As a string it shows neither password nor options."""

    url: str

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"


class CapShape(Protocol):
    """A cap of a policy. The window `request` is judged by the gateway and ignored here."""

    @property
    def scope(self) -> str: ...
    @property
    def window(self) -> str: ...
    @property
    def amount_nano(self) -> int: ...


class TokenShape(Protocol):
    """Billed tokens by kind; `input_tokens` excludes everything cached."""

    @property
    def input_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def cache_read_tokens(self) -> int: ...
    @property
    def cache_write_5m_tokens(self) -> int: ...
    @property
    def cache_write_1h_tokens(self) -> int: ...
    @property
    def cache_write_unsplit_tokens(self) -> int: ...


class PartShape(Protocol):
    """One billed part of an answer: the message itself, a compaction, an advisor's turn, a fallback."""

    @property
    def kind(self) -> str: ...
    @property
    def model(self) -> str | None: ...
    @property
    def tokens(self) -> TokenShape: ...
    @property
    def web_searches(self) -> int: ...
    @property
    def nano(self) -> int: ...
    @property
    def price_row(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class NameLimit:
    """How many new names of parts a day may bring for an app; `bounded` kinds have the operator's names, and are not counted."""

    new_max: int = 10_000
    bounded: frozenset[str] = frozenset(("model", "token"))
    kept: frozenset[str] = frozenset()
    """Kinds whose parts have balances, also where a call is not held to their caps because these are only observed."""


@dataclass(frozen=True, slots=True)
class NewCall:
    """A request as admitted or refused. `input_tokens` is the quote's bound, counted against the app's tokens per minute."""

    app: str
    team: str | None
    token_id: int
    endpoint: str = "messages"
    model_asked: str | None = None
    stream: bool = False
    max_tokens: int | None = None
    input_tokens: int = 0
    quote_nano: int = 0
    session_id: str | None = None
    agent_id: str | None = None
    parent_agent_id: str | None = None
    """The agent that started this one; None for one that the session's main agent started."""
    user_id: str | None = None
    labels: Labels = ()
    model: str | None = None
    """The model as it is counted: by its canonical id, whatever name was asked for."""
    names: NameLimit = NameLimit()
    token_cap_nano: int | None = None
    """The cap of the token itself, where it was issued with one."""
    last_call: bool = False
    """The client says that it ends with this call: the shares of caps that are kept for that are open to it."""
    traceparent: str | None = None
    """The client's own span (W3C trace context): for the span of this call, and never written to the ledger."""

    scopes: tuple[str, ...] = field(init=False, repr=False, compare=False)
    parts: tuple[AppPart, ...] = field(init=False, repr=False, compare=False)
    """The parts of its app in which the call counts, as far as they are known."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scopes", scopes(self.app, self.team))
        known = (
            ("session", self.session_id), ("agent", self.agent_id), ("user", self.user_id), ("model", self.model),
            ("token", str(self.token_id)), *((f"label.{name}", value) for name, value in self.labels),
        )  # fmt: skip
        object.__setattr__(self, "parts", tuple([(kind, value) for kind, value in known if value]))

    def counted_in(self, parts: Sequence[AppPart]) -> "NewCall":
        """Return the call with the names of these parts in the place of its own: some of them may be shared with other calls."""
        named = dict(parts)
        labels = tuple((name, named.get(f"label.{name}", value)) for name, value in self.labels)
        return replace(
            self, session_id=named.get("session"), agent_id=named.get("agent"), user_id=named.get("user"), labels=labels
        )  # fmt: skip

    @property
    def part_scopes(self) -> tuple[str, ...]:
        return tuple([part_scope(self.app, part) for part in self.parts])

    @property
    def pause_scopes(self) -> tuple[str, ...]:
        """Return every scope whose pause refuses the call: its parts too, within its app and within all, and the agent that started its."""
        named = (*self.parts, ("agent", self.parent_agent_id)) if self.parent_agent_id else self.parts
        return (*self.scopes, *[part_within(scope, part) for scope in self.scopes[:2] for part in named])


@dataclass(frozen=True, slots=True)
class RateLimits:
    """An app's limits per minute, over every process on the ledger; None means no limit."""

    requests_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    concurrent: int | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """A reservation as it is asked for. `quantum_nano` is to be kept free for the call's next top-up."""

    call: NewCall
    grant_nano: int
    caps: Sequence[CapShape]
    quantum_nano: int = 0
    rates: RateLimits = RateLimits()
    now: float = 0.0

    def __post_init__(self) -> None:
        if self.grant_nano < 0 or self.quantum_nano < 0:
            raise ValueError(f"a reservation holds no negative amount, not {min(self.grant_nano, self.quantum_nano)}")


class Standing(NamedTuple):
    """How one scope stands in one window. `cap_nano` is in force: min(policy + `raised_nano`, `limit_nano`); None: no cap asked.

    `quantum_nano` is kept free for the next top-ups of running streams: counted at admissions, not held.
    """

    scope: str
    window: Window
    starts_at: int
    resets_at: int | None
    cap_nano: int | None
    raised_nano: int
    spent_nano: int
    reserved_nano: int
    quantum_nano: int
    open: int
    limit_nano: int | None = None

    @property
    def is_limited(self) -> bool:
        """Tell whether an operator's limit is what binds: no raise changes that."""
        return self.limit_nano is not None and self.cap_nano == self.limit_nano


class Raise(NamedTuple):
    """An amount on top of a cap until a time (unix seconds)."""

    id: int
    scope: str
    window: str
    amount_nano: int
    since: float
    until: float
    who: str
    why: str


class Limit(NamedTuple):
    """The amount that a cap is lowered to, until the limit is lifted."""

    scope: str
    window: str
    amount_nano: int
    since: float
    who: str
    why: str


@dataclass(frozen=True, slots=True)
class Reserved:
    call_id: int
    standings: tuple[Standing, ...]
    """One for each cap checked, this call's own reservation included."""
    app: str
    caps: Sequence[CapShape]
    """Those that its top-ups are judged by."""
    owner: str
    """The name of the process that holds it."""


Reason = Literal[
    "token_unknown", "token_revoked", "token_expired", "paused",
    "quote_over_cap", "cap_spent", "cap_held", "rate", "concurrency",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Denied:
    """Why a reservation was not written.

    `cap_held` means that the call would fit if everything in flight came back; `cap_spent` that it would not; `quote_over_cap`
    that it would not fit an untouched window either. `standing` names the cap; `limit`, `limit_max` and `used` name a rate or the
    concurrency.
    """

    reason: Reason
    standing: Standing | None = None
    limit: str | None = None
    limit_max: int | None = None
    used: int | None = None
    pause: "Pause | None" = None
    retry_after_s: int | None = None
    token: "Token | None" = field(default=None, compare=False, repr=False)
    """The token that is not in force; None where there is none."""
    standings: tuple[Standing, ...] = field(default=(), compare=False, repr=False)
    """How each cap stands that the call is under: no part of the reason."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The facts of an answer when its call ends."""

    status: int | None = None
    model_served: str | None = None
    stop_reason: str | None = None
    request_id: str | None = None
    first_byte_at: float | None = None
    complete: bool = False
    price_rows: str | None = None
    flags: tuple[str, ...] = ()
    service_tier: str | None = None
    speed: str | None = None
    inference_geo: str | None = None


@dataclass(frozen=True, slots=True)
class Settlement:
    """The cost of a call. `cost_nano` None: it is unknown; the whole held amount is spent and flagged `estimated`."""

    cost_nano: int | None
    parts: tuple[PartShape, ...] = ()
    outcome: Outcome = Outcome()


@dataclass(frozen=True, slots=True)
class RecordedEnd:
    """The end of a call, for its own process or a later one to resolve it. `owner` and `call_id` name the call."""

    kind: Literal["settle", "void"]
    call_id: int
    owner: str
    settlement: Settlement
    at: float


@dataclass(frozen=True, slots=True)
class Resolution:
    """The result of a settle or a void. `first` is False when the call was resolved before: then nothing was written."""

    first: bool
    spent_nano: int = 0
    held_nano: int = 0
    overrun: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """An app's internal token as stored, or a workload's row: never the token itself, only the SHA-256 by which it is found."""

    id: int
    app: str
    label: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None = None
    """Unix seconds, to the minute."""
    labels: Labels = ()
    """The labels of all its calls."""
    cap_nano: int | None = None
    """The most that may ever be spent with it, beside the caps of the policy."""
    issuer: str | None = None
    """The issuer of the identity tokens that this row stands for: it is a workload's. None: it is a token's own."""
    rule: str | None = None
    """The digest of the rule that let a workload's session in; `expires_at` is then the session's end."""

    def refusal(self, now: float) -> Literal["token_revoked", "token_expired"] | None:
        """Return the code by which this token is refused at `now`, None while it is in force."""
        if self.revoked_at is not None and self.revoked_at <= now:
            return "token_revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "token_expired"
        return None


@dataclass(frozen=True, slots=True)
class Pause:
    scope: str
    since: float
    until: float | None
    why: str
    cut: bool = False
    """Calls in flight are ended too."""


class MinuteCount(NamedTuple):
    """An app's admitted requests or tokens in this calendar minute, and in the one before."""

    recent: int = 0
    before: int = 0


class CallFacts(NamedTuple):
    """All that the ledger knows at one moment that decides about a call."""

    token: Token | None
    """The call's, if it is one of the app's; revoked and expired ones too."""
    pauses: tuple[Pause, ...] = ()
    """Those in force in the call's scopes."""
    standings: tuple[Standing, ...] = ()
    """One for each cap that it stands under."""
    open: int = 0
    """The app's calls in flight."""
    requests: MinuteCount = MinuteCount()
    input_tokens: MinuteCount = MinuteCount()


@dataclass(frozen=True, slots=True)
class TokenLookup:
    """The ledger's facts about a request before its admission: token, pauses, overruns."""

    token: Token | None = None
    """The token, revoked and expired ones too; None: no such token."""
    pauses: tuple[Pause, ...] = ()
    """All that are in force."""
    overruns: frozenset[str] = frozenset()
    """Models that passed a grant and are reserved in full until cleared."""


type Facts = Mapping[str, str | int | float | None]

AlertKind = Literal["threshold", "overrun", "drift", "key_refused", "redirect", "policy", "issuer", "retirement", "forecast", "speed"]


@dataclass(frozen=True, slots=True)
class Alert:
    """A notice for a person, once for each `kind`, `scope` and `once`, over all processes."""

    kind: AlertKind
    scope: str
    once: str
    sentence: str
    facts: Facts = field(default_factory=dict)
    """For programs; amounts are `..._nano`."""


@dataclass(frozen=True, slots=True)
class DueAlert:
    """An alert that this process is to send. `tries` counts this one."""

    id: int
    alert: Alert
    at: float
    tries: int
