"""Report the use of tokens: first and last call of each, apps that still use `gateway local`, refusals of the real key.

Read-only. The connection yields rows by name (`connect.reading`).
"""

from dataclasses import dataclass
from typing import Literal

from gateway_addon.ledger.sql import Connection, named


@dataclass(frozen=True, slots=True)
class Arrival:
    """One token and the calls made with it. Times are None while it has never been used."""

    token_id: int
    app: str
    label: str
    digest: str
    state: Literal["in force", "revoked", "expired"]
    calls: int
    refused: int
    """The number of `calls` that this gateway refused."""
    first_at: float | None
    last_at: float | None


@dataclass(frozen=True, slots=True)
class Straggler:
    """An app whose latest call came through the intercepting proxy: its code still has the provider's address."""

    app: str
    last_at: float


@dataclass(frozen=True, slots=True)
class ForwardedCalls:
    """Forwarded calls of a period, and those that the provider answered 401: it did not take the real key."""

    calls: int
    unauthorised: int
    last_unauthorised_at: float | None


_ARRIVALS = named("""
SELECT tokens.id AS token_id, tokens.app AS app, label, digest,
  CASE WHEN revoked_at <= $now THEN 'revoked' WHEN expires_at <= $now THEN 'expired' ELSE 'in force' END AS state,
  count(calls.id) + coalesce(sum(carried - 1), 0) AS calls,
  count(calls.id) FILTER (WHERE calls.state = 'refused') + coalesce(sum(carried - 1) FILTER (WHERE calls.state = 'refused'), 0) AS refused,
  min(started_at) AS first_at, max(started_at) AS last_at
FROM tokens LEFT JOIN calls ON calls.token_id = tokens.id
GROUP BY tokens.id, tokens.app, label, digest, revoked_at, expires_at ORDER BY tokens.app, tokens.id
""")

_STRAGGLERS = """
SELECT app, max(started_at) FILTER (WHERE endpoint LIKE 'local/%') AS last_at FROM calls GROUP BY app
HAVING max(started_at) FILTER (WHERE endpoint LIKE 'local/%') = max(started_at) ORDER BY app
"""

_PASSED = named("""
SELECT count(*) AS calls, count(*) FILTER (WHERE status = 401) AS unauthorised,
  max(ended_at) FILTER (WHERE status = 401) AS last_unauthorised_at
FROM calls WHERE state <> 'refused' AND state <> 'open' AND ended_at >= $since
""")


def arrivals(db: Connection, *, now: float) -> list[Arrival]:
    """Return every token ever issued, by app."""
    return [Arrival(**dict(row)) for row in db.execute(_ARRIVALS, {"now": now}).fetchall()]


def stragglers(db: Connection) -> list[Straggler]:
    return [Straggler(**dict(row)) for row in db.execute(_STRAGGLERS).fetchall()]


def passed(db: Connection, *, since: float) -> ForwardedCalls:
    """Count the calls that were forwarded and have ended since a time."""
    [row] = db.execute(_PASSED, {"since": since}).fetchall()
    return ForwardedCalls(**dict(row))
