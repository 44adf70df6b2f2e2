"""One admitted call while it runs: what is held for it, what its answer has shown, and what it must be settled at.

Promises that what is held never falls below what the provider can bill: the input's bound until the answer reports its exact
tokens, and output as granted, whole or in steps (grants.py). Knows nothing of mitmproxy, SQL or the clocks.
"""

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

from gateway_addon.bounds import Quote
from gateway_addon.grants import Pace, Progress, Seen
from gateway_addon.ledger import NewCall, Standing, scopes
from gateway_addon.money import rounded_up
from gateway_addon.names import safe_name
from gateway_addon.policy import AppPolicy
from gateway_addon.pricing import Prices, cost, rates
from gateway_addon.reading import Reading
from gateway_addon.usage import Meter, Usage


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission to forward one call: what is reserved for it, and the snapshot that it was judged and is priced by."""

    call_id: int
    call: NewCall
    app: AppPolicy
    prices: Prices
    reading: Reading
    quote: Quote
    granted_tokens: int
    """Output tokens covered by the reservation: all that its turns may write, unless the call runs on a progressive one."""
    pace: Pace | None
    """None: reserved whole."""
    admitted_at: float
    standings: tuple[Standing, ...] = ()
    """How each of the call's caps stands, its own reservation included."""
    flags: tuple[str, ...] = ()
    """What was done to the call beside admitting it: `edited:FIELD` and `observed:CODE` by the policy, `replayed` by a person."""
    body: bytes | None = None
    """The body to send where the policy rewrote it (an alias, a clamp); None: as it came."""
    edited: str = ""
    """What was rewritten, as its answer says (answers.py)."""

    @property
    def scopes(self) -> tuple[str, ...]:
        return scopes(self.app.name, self.app.team)


@dataclass(slots=True, eq=False)
class Running:
    """A ticket and everything that has happened to it since."""

    ticket: Ticket
    began_monotonic_s: float
    """When it was admitted: before anything of it was sent."""
    lost_before_s: float = 0.0
    """How long the event loop had stood still until then, in all."""
    lost_s: float = 0.0
    """The same since then: nobody could have cut this call in that time."""
    ended_monotonic_s: float | None = None
    progress: Progress | None = None
    granted_tokens: int = 0
    exact: tuple[int, Fraction] | None = None
    """The exact price of the input, once it is known, and of a token of output at the tier that the prompt then has."""
    input_known: bool = False
    """`message_start` has been looked at: what was held for the input in excess has gone back, if there was any."""
    meter: Meter | None = None
    encoded: bool = False
    """The answer's bytes are compressed: nothing can be put between them."""
    status: int | None = None
    request_id: str | None = None
    first_byte_at: float | None = None
    """In unix seconds, for its row."""
    last_byte_monotonic_s: float = 0.0
    cut: str | None = None
    """Why the gateway itself ends this call, once it does."""
    usage: Usage | None = field(default=None)

    def __post_init__(self) -> None:
        ticket = self.ticket
        self.granted_tokens = ticket.granted_tokens
        self.last_byte_monotonic_s = self.began_monotonic_s
        if ticket.pace is not None:
            thinking = ticket.reading.body.get("thinking")
            may_think = not (isinstance(thinking, dict) and thinking.get("type") == "disabled")
            self.progress = Progress(ticket.pace, ticket.quote.output_tokens, may_think, self.began_monotonic_s)

    @property
    def held_nano(self) -> int:
        """What the ledger holds for this call: exact or bounded input, and the output granted so far."""
        return self.bound_nano(self.granted_tokens)

    def bound_nano(self, tokens: int) -> int:
        """What this call can cost with so many tokens of output."""
        if self.exact is None:
            return self.ticket.quote.for_output(tokens)
        input_nano, output_rate = self.exact
        return input_nano + rounded_up(output_rate, tokens)

    def answered(
        self, status: int, content_type: str, content_encoding: str | None, request_id: str | None, *, now: float, monotonic_s: float
    ) -> None:  # fmt: skip
        """The upstream's status and headers arrived."""
        self.status, self.first_byte_at, self.last_byte_monotonic_s = status, now, monotonic_s
        self.request_id = safe_name(request_id) if request_id else None
        self.encoded = content_encoding not in (None, "", "identity")
        self.meter = Meter(content_type, content_encoding)

    def feed(self, chunk: bytes, monotonic_s: float, lost_s: float = 0.0) -> None:
        """Some of the answer's body arrived, as sent. Never raises on what it contains.

        `lost_s`: how long the event loop has stood still until now, in all.
        """
        self.last_byte_monotonic_s, self.lost_s = monotonic_s, lost_s - self.lost_before_s
        if self.meter is None:
            return
        self.meter.feed(chunk)
        if self.progress is not None:
            meter = self.meter
            seen = Seen(meter.seen_bytes, meter.blocks, meter.content_events, meter.visible_open, meter.reported_output_tokens)
            self.progress.observe(seen, monotonic_s, self.lost_s)

    def ended(self, monotonic_s: float, lost_s: float) -> None:
        """Nothing more will arrive, and the provider will notice within its lag."""
        self.ended_monotonic_s, self.lost_s = monotonic_s, lost_s - self.lost_before_s

    @property
    def output_tokens_max(self) -> int:
        """Return the most output that can be billed: the grant, and what came while the loop stood still and nobody could cut."""
        if self.progress is None or self.ended_monotonic_s is None:
            return self.granted_tokens
        generated = max(self.granted_tokens, self.progress.tokens_at(self.ended_monotonic_s))
        return min(generated, self.granted_tokens + self.progress.pace.tokens_in(self.lost_s))

    def finished(self) -> Usage | None:
        """Close the meter: what the answer reported, whole or not. None if no answer began."""
        if self.meter is not None and self.usage is None:
            self.usage = self.meter.close()
        return self.usage

    @property
    def elapsed_s(self) -> float:
        """How long after it was let go the last of the answer arrived."""
        return self.last_byte_monotonic_s - self.began_monotonic_s

    def declared(self) -> Pace | None:
        """Return the declared constants of the model that was asked; None where the table has lost it."""
        row = self.ticket.prices.row(self.ticket.reading.model, self.ticket.admitted_at)
        return None if row is None else Pace(row.output_tokens_per_second_max, row.lag_s)

    def unseen_nano(self) -> int | None:
        """Return what an answer that showed nothing can have cost by its last byte; None where only all that is held is a bound."""
        pace = self.declared()
        if pace is None or not self.ticket.quote.releasable or self.ticket.app.reserve == "full":
            return None
        tokens = pace.tokens_in(self.elapsed_s + pace.lag_s)
        return self.bound_nano(min(tokens, self.granted_tokens))

    def release_nano(self) -> int:
        """What can go back now that `message_start` has reported the input: once, and only for a request whose input cannot grow.

        With the prompt's length known its price tier is known too, so output already granted may turn out cheaper as well.
        """
        if self.input_known or not self.ticket.quote.releasable or self.meter is None or not self.meter.started:
            return 0
        self.input_known = True
        if self.meter.complete:
            return 0  # the whole answer came at once: it is settled in a moment
        usage = self.meter.usage_so_far()
        if not usage.prompt_known:
            return 0
        row = self.ticket.prices.row(usage.model or "", self.ticket.admitted_at)
        exact = self._input_cost_nano(usage)
        if row is None or exact is None:
            return 0
        per_token = rates(row, prompt_tokens=usage.tokens.prompt_tokens, speed=usage.speed, inference_geo=usage.inference_geo, batch=False)
        held_nano = self.held_nano
        if exact + rounded_up(per_token.output, self.granted_tokens) >= held_nano:
            return 0
        self.exact = exact, per_token.output
        return held_nano - self.held_nano

    def wanted_tokens(self, monotonic_s: float) -> int:
        """Output tokens that the grant should grow by now (0: it suffices)."""
        return self.progress.tokens_wanted(self.granted_tokens, monotonic_s) if self.progress is not None else 0

    def runs_short(self, monotonic_s: float) -> bool:
        return self.progress is not None and self.progress.runs_short(self.granted_tokens, monotonic_s)

    def extension_nano(self, tokens: int) -> int:
        """What `tokens` more of output cost to hold."""
        return self.bound_nano(self.granted_tokens + tokens) - self.held_nano

    def covers(self, monotonic_s: float) -> bool:
        """False once the provider may have generated more than is held: the call must be cut now."""
        return self.progress is None or self.progress.tokens_at(monotonic_s) <= self.granted_tokens

    def covered_until(self) -> float:
        """The moment at which the call must be cut if nothing more arrives."""
        return math.inf if self.progress is None else self.progress.covered_until(self.granted_tokens)

    def _input_cost_nano(self, usage: Usage) -> int | None:
        """The exact price of the input that an answer reported, its output left out."""
        bare = replace(usage, tokens=replace(usage.tokens, output_tokens=0), iterations=())
        hour_ttl = self.ticket.reading.hour_ttl
        return cost(self.ticket.prices, bare, at=self.ticket.admitted_at, hour_ttl_requested=hour_ttl).nano
