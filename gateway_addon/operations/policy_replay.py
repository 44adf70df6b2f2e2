"""Judge yesterday's calls by tomorrow's policy: which would have been refused, why, and the money saved. Pure.

Judged is what the ledger keeps of a call: app, endpoint, model, `max_tokens`, what it held and what it cost. The bodies are not kept,
so features, betas, thinking and required fields are not judged, and neither are rates. Caps are judged as they are at an admission
(`denials.judge_caps`), by what was held to start the call, or by its cost where that was more, beside what the calls before cost: as
if each had ended before the next began, without the raises and limits of the time.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gateway_addon.calls.planning import fits_request_cap
from gateway_addon.calls.reservation_options import divided
from gateway_addon.ledger import Standing
from gateway_addon.ledger.denials import judge_caps
from gateway_addon.ledger.reports.entry_history import Recorded
from gateway_addon.messages.request import ParsedRequest
from gateway_addon.policy import AppPolicy, GatewayPolicy, caps, cycles, edits, trail
from gateway_addon.pricing import Prices
from gateway_addon.windows import Window, starts

JUDGED = frozenset(("endpoint", "model", "max_tokens"))
"""Refusals by the rules for which the ledger knows enough."""

type ReplayWindow = tuple[str, Window, int]
type ReplayRuling = tuple[str | None, str]


class ReplayVerdict(NamedTuple):
    """The verdict of the new policy on one call. `code` None: it would have passed."""

    call: Recorded
    code: str | None
    sentence: str


@dataclass(slots=True)
class Tally:
    """One app's calls under the new policy."""

    calls: int = 0
    refused: int = 0
    saved_nano: int = 0
    let_in: int = 0
    """Calls that were refused then, by a rule that would let them pass now. What they would have cost is not known."""


def replay(calls: Iterable[Recorded], policy: GatewayPolicy) -> Iterator[ReplayVerdict]:
    """Yield a verdict for each call, in the order of admission."""
    spent: defaultdict[ReplayWindow, int] = defaultdict(int)
    known: dict[tuple[str, str, str | None, int | None], ReplayRuling] = {}  # calls that look alike to the rules are judged once
    for call in calls:
        like = (call.app, call.endpoint, call.model, call.max_tokens)
        if like not in known:
            app = policy.apps.get(call.app)
            known[like] = _ruling(app, call, policy.prices) if app else ("app_unknown", f"app {call.app} has no policy")
        code, sentence = known[like]
        if code is None and not call.refusal:
            code, sentence = _capped(call, policy, spent)
        yield ReplayVerdict(call, code, sentence)


def tallied(verdicts: Iterable[ReplayVerdict]) -> tuple[dict[str, Tally], dict[tuple[str, str], Tally]]:
    """Sum the verdicts by app, and by app and reason."""
    apps: defaultdict[str, Tally] = defaultdict(Tally)
    reasons: defaultdict[tuple[str, str], Tally] = defaultdict(Tally)
    for call, code, sentence in verdicts:
        app = apps[call.app]
        if call.refusal:
            app.let_in += code is None and call.refusal in JUDGED
            continue
        app.calls += 1
        if code is None:
            continue
        for tally in (app, reasons[call.app, sentence]):
            tally.refused += 1
            tally.saved_nano += call.spent_nano
    return dict(apps), dict(reasons)


def _ruling(app: AppPolicy, call: Recorded, prices: Prices) -> ReplayRuling:
    read = ParsedRequest(call.endpoint, call.model or "", call.max_tokens or 0)
    changes = edits(app, read, prices)
    read = ParsedRequest(call.endpoint, changes.get("model", read.model), changes.get("max_tokens", read.max_tokens))
    refused = (verdict for verdict in trail(app, read, prices) if verdict.code in JUDGED and not app.observes(verdict.rule))
    return next(((verdict.code, verdict.sentence) for verdict in refused), (None, ""))


def _capped(call: Recorded, policy: GatewayPolicy, spent: defaultdict[ReplayWindow, int]) -> ReplayRuling:
    """Judge a call by the caps, with what the calls before cost; where every cap allows it, it counts in its windows."""
    app, asked_nano = policy.apps[call.app], max(call.grant_nano + call.quantum_nano, call.spent_nano)
    if not asked_nano:  # a call that costs nothing is asked of no cap
        return None, ""
    of_one_request = not call.endpoint.endswith("batches.create") and not app.observes("caps")
    if of_one_request and not fits_request_cap(app, max(call.grant_nano, call.spent_nano)):
        return "quote_over_cap", f"can cost more than the cap for one request of {app}"
    enforced, _ = divided(app, caps(policy, app, call.parts))
    windows = starts(call.started_at, policy.zone, cycles(policy))
    standings = [
        Standing(cap.scope, cap.window, at, None, cap.amount_nano, 0, spent[cap.scope, cap.window, at], 0, 0, 0)
        for cap in enforced if cap.window != "request"
        for at in [windows.of(cap.window)]
    ]  # fmt: skip
    denied = judge_caps(standings, asked_nano, 0, 0.0)
    if denied is None:
        for standing in standings:
            spent[standing.scope, standing.window, standing.starts_at] += call.spent_nano
        return None, ""
    assert denied.standing is not None
    cap = f"{denied.standing.window} cap of {denied.standing.scope.replace(':', ' ')}"
    return denied.reason, f"can cost more than the whole {cap}" if denied.reason == "quote_over_cap" else f"the {cap} was spent"
