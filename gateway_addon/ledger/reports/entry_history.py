"""Tell the history of the ledger, call by call and moment by moment, from the entries alone. Read-only.

For a comparison of the ledger with other records: each forwarded call with its bill, and the highest level of each scope.
The connection yields rows by name (`connect.reading`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from gateway_addon.ledger.scope import AppPart
from gateway_addon.ledger.sql import Connection, named


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A call that went to the provider. `held_max_nano` is the most that was ever held for it."""

    call_id: int
    request_id: str | None
    app: str
    endpoint: str
    state: str
    flags: tuple[str, ...]
    quote_nano: int
    held_max_nano: int
    spent_nano: int

    @property
    def estimated(self) -> bool:
        """Return whether the cost could not be known, so that an upper bound was booked."""
        return any(flag.partition(":")[0] == "estimated" for flag in self.flags)


@dataclass(frozen=True, slots=True)
class HighWater:
    """The highest sum of spent and held that one scope and window ever had."""

    scope: str
    window: str
    window_start: int
    nano: int


_FORWARDED = """
WITH running AS (
  SELECT call_id, spent_nano, sum(reserved_nano) OVER (PARTITION BY call_id ORDER BY id) AS held_nano FROM entries)
SELECT calls.id AS call_id, request_id, app, endpoint, state, flags, quote_nano, coalesce(max(held_nano), 0) AS held_max_nano,
  coalesce(sum(spent_nano), 0) AS spent_nano
FROM calls LEFT JOIN running ON running.call_id = calls.id
WHERE state <> 'refused' AND carried IS NULL GROUP BY calls.id ORDER BY calls.id
"""

_HIGH_WATER = """
WITH level AS (
  SELECT scope, "window", window_start, sum(spent_nano + reserved_nano) OVER (
    PARTITION BY scope, "window", window_start ORDER BY entries.id) AS nano
  FROM entries JOIN (
    SELECT call_id, scope, "window", window_start FROM call_frames
    UNION ALL SELECT call_id, scope, "window", window_start FROM part_frames) AS frames USING (call_id))
SELECT scope, "window", window_start, max(nano) AS nano FROM level GROUP BY scope, "window", window_start
ORDER BY scope, "window", window_start
"""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A call as the ledger keeps it, refused ones too. `endpoint` without the entrance that it came by."""

    call_id: int
    app: str
    endpoint: str
    model: str | None
    max_tokens: int | None
    refusal: str | None
    grant_nano: int
    """The amount held to start it, and `quantum_nano`, kept free beside it for its first top-up; 0 where nothing was asked of a cap."""
    quantum_nano: int
    spent_nano: int
    started_at: float
    parts: tuple[AppPart, ...]
    """The parts of its app in which it counted, as far as they are known."""


_RECORDED = named("""
SELECT id, app, endpoint, model_asked, max_tokens, refusal, grant_nano, quantum_nano,
  (SELECT coalesce(sum(spent_nano), 0) FROM entries WHERE call_id = calls.id) AS spent_nano, started_at, app_parts
FROM calls WHERE started_at >= $since AND started_at < $until AND carried IS NULL ORDER BY id
""")


def recorded(db: Connection, *, since: float, until: float) -> Iterator[Recorded]:
    """Yield every call of the period with a valid token, in the order of admission; read as it is consumed."""
    rows = db.execute(_RECORDED, {"since": since, "until": until})
    for number, app, endpoint, model, max_tokens, refusal, grant, quantum, spent, started_at, app_parts in rows:
        parts = tuple(json.loads(app_parts or "{}").items())
        yield Recorded(number, app, endpoint.rpartition("/")[2], model, max_tokens, refusal, grant, quantum, spent, started_at, parts)


def forwarded(db: Connection) -> list[Forwarded]:
    """Return every forwarded call, in the order of admission: free and open ones too."""
    rows = [dict(row) for row in db.execute(_FORWARDED).fetchall()]
    return [Forwarded(**row | {"flags": tuple(row["flags"].split())}) for row in rows]


def high_water(db: Connection) -> list[HighWater]:
    """Return the highest level of each scope and window, by replaying every entry in the order of writing."""
    return [HighWater(**dict(row)) for row in db.execute(_HIGH_WATER).fetchall()]
