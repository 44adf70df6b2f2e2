"""Report for the comparison with the provider: metered tokens by day and model, and the estimated calls.

Days are UTC days (whole days since 1970), whatever the ledger's zone: the provider's buckets are. Read-only but for the note of
when the provider was last asked. The connection yields rows by name (`connect.reading`).
"""

from dataclasses import dataclass

from gateway_addon.ledger.admin import keep_setting
from gateway_addon.ledger.sql import Connection, Statement, named

DAY_S = 86400
POLL_EVERY_S = 60
"""Seconds between two requests for the provider's reports, at least, as the provider wants it."""


@dataclass(frozen=True, slots=True)
class Metered:
    """Billed tokens of one model, of the calls admitted on `day` that ended on `ended_day`."""

    day: int
    ended_day: int
    model: str
    estimated: bool
    input_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    """Writes of unreported lifetime are among them."""
    cache_write_1h_tokens: int
    output_tokens: int
    web_searches: int
    nano: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A call whose cost could not be known: an upper bound is booked. `metered_nano` is the part with metered tokens
    (exact input, granted output); 0: nothing is known but the grant."""

    call_id: int
    day: int
    ended_day: int
    model: str
    spent_nano: int
    metered_nano: int
    output_tokens: int
    left: bool = False
    """True if the answer broke off: its output is bounded by the declared pace of its model."""


_DAYS = f"{{started}} / {DAY_S} AS day, {{ended}} / {DAY_S} AS ended_day"
_CHOSEN = "started_at >= $since AND started_at < $until"
_ESTIMATED = "' ' || flags LIKE '% estimated%'"
_LEFT = " OR ".join(f"' ' || flags LIKE '% estimated:{reason}%'" for reason in ("cut", "no_status", "stream_error"))
_MODEL = "coalesce(model_served, model_asked, '(none)')"

# An answer that was refused before any output shows tokens and bills none: `nano > 0` leaves it out, as the provider does.
# A part of kind `estimate` is the rest of an upper bound: money without tokens.
_METERED = f"""
SELECT {_DAYS}, coalesce(usage.model, {_MODEL}) AS model, {_ESTIMATED} AS estimated,
  sum(input_tokens) AS input_tokens, sum(cache_read_tokens) AS cache_read_tokens,
  sum(cache_write_5m_tokens + cache_write_unsplit_tokens) AS cache_write_5m_tokens,
  sum(cache_write_1h_tokens) AS cache_write_1h_tokens, sum(output_tokens) AS output_tokens,
  sum(web_search_requests) AS web_searches, sum(nano) AS nano
FROM calls CROSS JOIN usage WHERE usage.call_id = calls.id AND {_CHOSEN} AND nano > 0 AND usage.kind <> 'estimate' GROUP BY 1, 2, 3, 4
"""

_ESTIMATES = f"""
SELECT id AS call_id, {_DAYS}, {_MODEL} AS model,
  (SELECT sum(spent_nano) FROM entries WHERE call_id = calls.id) AS spent_nano,
  (SELECT coalesce(sum(nano), 0) FROM usage WHERE call_id = calls.id AND kind <> 'estimate') AS metered_nano,
  (SELECT coalesce(sum(output_tokens), 0) FROM usage WHERE call_id = calls.id) AS output_tokens,
  {_LEFT} AS "left"
FROM calls WHERE {_CHOSEN} AND carried IS NULL AND state = 'settled' AND {_ESTIMATED} ORDER BY id
"""


def metered(db: Connection, *, since: float, until: float) -> list[Metered]:
    """Return the calls admitted from `since` to before `until`, by day and model, exact and estimated ones apart."""
    rows = db.execute(_by_day(db, _METERED), {"since": since, "until": until}).fetchall()
    return [Metered(**{**dict(row), "estimated": bool(row["estimated"])}) for row in rows]


def estimates(db: Connection, *, since: float, until: float) -> list[Estimate]:
    """Return every estimated call of the period at its present amount, corrections included."""
    rows = db.execute(_by_day(db, _ESTIMATES), {"since": since, "until": until}).fetchall()
    return [Estimate(**{**dict(row), "left": bool(row["left"])}) for row in rows]


def claim_poll(db: Connection, *, now: float) -> float:
    """Claim a poll of the provider, in a write transaction: 0 if it may be asked now, else the seconds to wait."""
    rows = db.execute("SELECT value FROM settings WHERE name = 'reports_polled_at'").fetchall()
    wait_s = float(rows[0][0]) + POLL_EVERY_S - now if rows else 0.0
    if 0 < wait_s <= POLL_EVERY_S:
        return wait_s
    keep_setting(db, "reports_polled_at", str(now))
    return 0.0


def _by_day(db: Connection, statement: str) -> Statement:
    whole = db.engine.whole
    return named(statement.format(started=whole.format("started_at"), ended=whole.format("coalesce(ended_at, started_at)")))
