"""Read the sums of days again and again: kept ones as they are kept, the others from what was summed of them before. Read-only.

Promises the same figures as `daily_totals.days`, which sums each call of such a day anew; of a kept day with very many tokens, by all
that a line tells but the token. While a day is young, quarters of an hour that may still change are summed again, and no others, once
anything has happened; all are when a person has corrected, pruned or moved calls.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from gateway_addon.ledger.reports.call_sums import Day, summed, together
from gateway_addon.ledger.reports.daily_totals import SETTLED_DOWN_S, Span, calendar_days, first_at, kept
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.sql import Connection, named

SLICE_S = 900

_CHANGED = "SELECT max(id), max(id) FILTER (WHERE action IN ('adjust', 'prune', 'align')) FROM audit WHERE id > $1"
_OPEN = "SELECT started_at FROM calls WHERE state = 'open'"
_VERSION = named("""
SELECT (SELECT max(id) FROM calls), (SELECT coalesce(sum(calls), 0) FROM noise WHERE minute >= $since),
  spent_nano, reserved_nano, open
FROM (SELECT 1 AS one) AS always LEFT JOIN balances ON scope = 'total' AND "window" = 'day' AND window_start = $since
""")


@dataclass(slots=True)
class DayReader:
    """One reader's memory of the days that nobody keeps."""

    _summed: defaultdict[Span, dict[Span, Day]] = field(default_factory=lambda: defaultdict(dict))
    """By day: its parts that change no more."""
    _young: dict[Span, tuple[object, Day]] = field(default_factory=dict)
    """By day: how the ledger stood when all of it was summed last."""
    _audited: int = 0
    """The newest row of the audit that was looked at."""

    def between(self, db: Connection, since: float, until: float, now: float) -> list[Day]:
        """Return every day from the one that holds `since` to the one before `until`; none that is still to come."""
        newest, changed = db.execute(_CHANGED, (self._audited,)).fetchone()
        if changed is not None:
            self._summed.clear()
            self._young.clear()
        self._audited = newest or self._audited
        first, known = first_at(db), {day.start: day for day in kept(db, since, until) if "asked" not in day.folded}
        open_at = [at for (at,) in db.execute(_OPEN).fetchall()]
        found = []
        for span in calendar_days(since, min(until, now + 1), zone(db)):
            if span.start in known:
                self._young.pop(span, None)
                self._summed.pop(span, None)  # a change of the day strikes it off, and it is summed anew then
            is_empty = first is None or span.end <= first
            found.append(Day(*span) if is_empty else known.get(span.start) or self._of_calls(db, span, now, open_at))
        return found

    def _of_calls(self, db: Connection, day: Span, now: float, open_at: list[float]) -> Day:
        known, parts = self._summed[day], []
        may_change = now < day.end + SETTLED_DOWN_S or any(day.start <= at < day.end for at in open_at)
        version = tuple(db.execute(_VERSION, {"since": day.start}).fetchone()) if may_change else None
        if version is not None and (seen := self._young.get(day)) is not None and seen[0] == version:
            return seen[1]
        step = SLICE_S if may_change else day.end - day.start
        for start in range(day.start, min(day.end, int(now) + 1), step):
            span = Span(start, min(day.end, start + step))
            part = known.get(span) or summed(db, *span)
            if span.end + SETTLED_DOWN_S <= now and not any(start <= at < span.end for at in open_at):
                known[span] = part
            parts.append(part)
        found = together(parts)
        if version is not None:
            self._young[day] = version, found
        return found
