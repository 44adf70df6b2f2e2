"""Account for one admitted call while it runs: the amount held for it, the progress of its answer, the bounds of its cost.

Promises that the amount held never falls below what the provider can bill: the input's bound until the answer reports its exact
tokens, and output as granted, whole or in steps (progress.py). Knows nothing of mitmproxy, SQL or the clocks.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from gateway_addon.calls.admission import Admission, Hold
from gateway_addon.calls.progress import TICK_S, Pace, Progress, Seen, TurnProgress
from gateway_addon.messages import Meter, Usage
from gateway_addon.messages.request import is_fast
from gateway_addon.money import rounded_up
from gateway_addon.names import safe_name
from gateway_addon.pricing import cost, rates, retired


@dataclass(slots=True, eq=False)
class InFlightCall:
    """An admission with a reservation, and all that has been observed of its call since."""

    admission: Admission
    hold: Hold
    """The admission's own."""
    began_monotonic_s: float
    """The moment of its admission: before any of it was sent."""
    stalled_before_s: float = 0.0
    """How long the event loop had stood still before the admission, in all."""
    stalled_s: float = 0.0
    """How long it has stood still since: this call could not have been cut in that time."""
    ended_monotonic_s: float | None = None
    progress: Progress | None = None
    turns: TurnProgress | None = None
    """Set where a stream is held by turns."""
    granted_tokens: int = 0
    granted_turns: int = 1
    exact: tuple[int, Fraction] | None = None
    """Once known: the exact price of the input, and of a token of output at the tier of that prompt."""
    input_known: bool = False
    """Whether `message_start` was read, and the excess held for the input was released."""
    meter: Meter | None = None
    encoded: bool = False
    """The answer's bytes are compressed, so no event can be inserted."""
    status: int | None = None
    request_id: str | None = None
    first_byte_at: float | None = None
    """Unix seconds, for the call's row."""
    last_byte_monotonic_s: float = 0.0
    cut: str | None = None
    """The reason, once the gateway ends this call early: a key of `CUT_CODES`."""
    usage: Usage | None = None

    def __post_init__(self) -> None:
        bound, option = self.hold.quote, self.hold.option
        self.granted_tokens = option.granted_tokens
        self.granted_turns = bound.turns.count if option.granted_turns is None else option.granted_turns
        self.last_byte_monotonic_s = self.began_monotonic_s
        if option.pace is not None:
            thinking = self.admission.parsed.body.get("thinking")
            may_think = not (isinstance(thinking, dict) and thinking.get("type") == "disabled")
            self.progress = Progress(option.pace, bound.output_tokens, may_think, self.began_monotonic_s)
            self.turns = TurnProgress(option.pace, bound.turns.count, self.began_monotonic_s) if bound.turns.shown else None

    @property
    def held_nano(self) -> int:
        """Return the amount that the ledger holds for this call: exact or bounded input, and the output granted so far."""
        return self.bound_nano(self.granted_tokens, self.granted_turns)

    def bound_nano(self, tokens: int, turns: int) -> int:
        """Return the most that this call can cost with so many tokens of output, in so many turns."""
        if self.exact is None:
            return self.hold.quote.for_output(tokens, turns)
        input_nano, output_rate = self.exact
        return input_nano + rounded_up(output_rate, tokens)

    def answered(
        self, status: int, content_type: str, content_encoding: str | None, request_id: str | None, *, now: float, monotonic_s: float
    ) -> None:  # fmt: skip
        """Take the upstream's status and headers."""
        self.status, self.first_byte_at, self.last_byte_monotonic_s = status, now, monotonic_s
        self.request_id = safe_name(request_id) if request_id else None
        self.encoded = content_encoding not in (None, "", "identity")
        self.meter = Meter(content_type, content_encoding)

    def feed(self, chunk: bytes, monotonic_s: float, stalled_s: float = 0.0, paused_s: float = 0.0) -> None:
        """Take the next bytes of the answer's body, as sent. Never raises on content.

        `stalled_s`: how long the event loop has stood still until now, in all. `paused_s`: how long the stream was not read since it
        began, because its client was slow.
        """
        self.last_byte_monotonic_s, self.stalled_s = monotonic_s, stalled_s - self.stalled_before_s
        if self.meter is None:
            return
        self.meter.feed(chunk)
        if self.progress is not None:
            meter = self.meter
            seen = Seen(
                meter.seen_bytes, meter.blocks, meter.content_events, meter.visible_open, meter.reported_output_tokens, meter.tool_uses
            )
            self.progress.observe(seen, monotonic_s, self.stalled_s + paused_s)
            if self.turns is not None:
                self.turns.observe(seen, monotonic_s, self.stalled_s + paused_s)

    def ended(self, monotonic_s: float, stalled_s: float) -> None:
        """End the call: nothing more will arrive. The provider notices within its lag."""
        self.ended_monotonic_s, self.stalled_s = monotonic_s, stalled_s - self.stalled_before_s

    @property
    def in_steps(self) -> bool:
        """Tell whether less is granted than the call may write or run: it must then be topped up, or cut."""
        bound = self.hold.quote
        return self.granted_tokens < bound.output_tokens or self.granted_turns < bound.turns.count

    def output_tokens_max(self, *, left: bool = False) -> int:
        """Return the most output that can be billed: the grant, and what can have come while the loop stood still and could not cut.

        `left`: the stream broke off early, so that no more is billed than can have been generated by then. This is no bound where
        the provider may loop by itself.
        """
        if self.progress is None or self.ended_monotonic_s is None:
            return self.granted_tokens
        generated = self.progress.tokens_at(self.ended_monotonic_s)
        if not left or not self.hold.quote.releasable:
            generated = max(generated, self.granted_tokens)
        return min(generated, self.granted_tokens + self.progress.pace.tokens_in(self.stalled_s))

    @property
    def turns_max(self) -> int:
        """Return the most turns that can be billed: the grant, and those that ran while the loop stood still."""
        if self.turns is None or self.ended_monotonic_s is None:
            return self.granted_turns
        run = max(self.granted_turns, self.turns.turns_at(self.ended_monotonic_s))
        return min(run, self.granted_turns + math.ceil(self.stalled_s / self.turns.pace.turn_s_min))

    def finished(self) -> Usage | None:
        """Close the meter, and return the usage that the answer reported, whole or not. None if no answer began."""
        if self.meter is not None and self.usage is None:
            self.usage = self.meter.close()
        return self.usage

    def refused_as_retired(self) -> str | None:
        """Return why the provider refused this call, where its model, or its fast mode, is no more."""
        if self.status not in (400, 404):
            return None
        parsed, admitted_at = self.admission.parsed, self.admission.admitted_at
        return retired(self.admission.prices, parsed.model, admitted_at, fast=is_fast(parsed.body))

    @property
    def elapsed_s(self) -> float:
        """Return the time from the admission to the last byte of the answer."""
        return self.last_byte_monotonic_s - self.began_monotonic_s

    def declared(self) -> Pace | None:
        """Return the declared constants of the model that was asked for; None where the price table no longer has it."""
        row = self.admission.prices.row(self.admission.parsed.model, self.admission.admitted_at)
        return None if row is None else Pace(row.output_tokens_per_second_max, row.lag_s, row.turn_s_min)

    def unseen_nano(self) -> int | None:
        """Return the most that an answer without content can have cost by its last byte; None where only the whole hold is a bound."""
        pace = self.declared()
        if pace is None or not self.hold.quote.releasable or self.admission.app.reserve == "full":
            return None
        tokens = pace.tokens_in(self.elapsed_s + pace.lag_s)
        return self.bound_nano(min(tokens, self.granted_tokens), self.granted_turns)

    def release_nano(self) -> int:
        """Return the amount to release once `message_start` has reported the input: once, and only where the input cannot grow.

        The prompt's length also gives the price tier, so output already granted may become cheaper as well.
        """
        if self.input_known or not self.hold.quote.releasable or self.meter is None or not self.meter.started:
            return 0
        self.input_known = True
        if self.meter.complete:
            return 0  # the whole answer came at once: it is settled in a moment
        usage = self.meter.usage_so_far()
        if not usage.prompt_known:
            return 0
        row = self.admission.prices.row(usage.model or "", self.admission.admitted_at)
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
        """Return the output tokens to add to the grant now (0: it suffices)."""
        return self.progress.tokens_wanted(self.granted_tokens, monotonic_s) if self.progress is not None else 0

    def wanted_turns(self, monotonic_s: float) -> int:
        """Return the turns to add to the grant now (0: it suffices)."""
        return self.turns.turns_wanted(self.granted_turns, monotonic_s) if self.turns is not None else 0

    def runs_short(self, monotonic_s: float) -> bool:
        short = self.progress is not None and self.progress.runs_short(self.granted_tokens, monotonic_s)
        # two ticks, as far as a top-up looks: the next one comes a tick and its least distance from the last one later, not one tick
        return short or (self.turns is not None and self.turns.covered_until(self.granted_turns) < monotonic_s + 2 * TICK_S)

    def extension_nano(self, tokens: int, turns: int = 0) -> int:
        """Return the amount to hold for so much more output, or so many more turns."""
        return self.bound_nano(self.granted_tokens + tokens, self.granted_turns + turns) - self.held_nano

    def covers(self, monotonic_s: float) -> bool:
        """Tell whether the grant still covers all that can have been generated; once it does not, the call must be cut."""
        within = self.progress is None or self.progress.tokens_at(monotonic_s) <= self.granted_tokens
        return within and (self.turns is None or self.turns.turns_at(monotonic_s) <= self.granted_turns)

    def covered_until(self) -> float:
        """Return the moment at which the call must be cut if nothing more arrives."""
        output_s = math.inf if self.progress is None else self.progress.covered_until(self.granted_tokens)
        return output_s if self.turns is None else min(output_s, self.turns.covered_until(self.granted_turns))

    def _input_cost_nano(self, usage: Usage) -> int | None:
        """Return the exact price of the input that an answer reported."""
        bare = replace(usage, tokens=replace(usage.tokens, output_tokens=0), iterations=())
        hour_ttl = self.admission.parsed.hour_ttl
        return cost(self.admission.prices, bare, at=self.admission.admitted_at, hour_ttl_requested=hour_ttl).nano
