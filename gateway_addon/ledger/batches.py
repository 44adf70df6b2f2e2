"""Keep message batches: reservations that outlive their process, and the results that settle them. Statements only.

Promises that no sweep settles the reservation of a known batch, that the cost of each request is booked once, however often and by
whichever process the results are read, and that a batch is settled once: at the sum of its results when all are there, else at the
held amount when the caller says that they will never come. Knows nothing of HTTP, policies or prices.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from gateway_addon.ledger import ownership, reservations
from gateway_addon.ledger.orphans import BATCHES
from gateway_addon.ledger.ownership import OwnedObject
from gateway_addon.ledger.sql import Connection, Row, named, numbers
from gateway_addon.ledger.types import NewCall, Outcome, Resolution, Settlement, labels_of
from gateway_addon.names import safe_name

PAUSE_MAX_S = 900.0  # between two looks at a batch: one that is further ahead was arranged before the clock was set back
TURN_S = 60.0  # how long a batch is one process's to look at, unless it says that it needs longer: so long a process that dies delays it


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch that the provider has taken. `flags`: what the policy changed in it."""

    id: str
    call_id: int
    app: str
    made_at: float
    requests: int
    hour_ttl: bool
    """True if a request asked for a cache of an hour: it prices the writes whose lifetime a result does not say."""
    prices_digest: str
    prices: str
    """The price table of its admission, as text."""
    content: str
    """The API's JSON object."""
    status: str
    look_at: float
    request_id: str | None = None
    flags: tuple[str, ...] = ()
    custom_ids: str | None = None
    """The ids of the batch's own requests, packed."""


class Batch(NamedTuple):
    """A batch as the ledger knows it. `look_at` None: it is settled."""

    id: str
    call_id: int
    app: str
    made_at: float
    requests: int
    hour_ttl: bool
    prices_digest: str
    status: str
    look_at: float | None
    failures: int
    lost_since: float | None = None
    """Since when the API has answered every poll that the batch, or some of its results, is gone."""

    @property
    def open(self) -> bool:
        return self.look_at is not None


class ResultRow(NamedTuple):
    """One billed part of one request's result, or the one row of a request that cost nothing."""

    custom_id: str
    part: int
    kind: str
    """The part's kind (`message`, ...), or `errored`, `canceled`, `expired`."""
    model: str | None
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int
    cache_write_unsplit_tokens: int
    web_searches: int
    nano: int
    price_row: str | None
    flags: str


class OpenBatch(NamedTuple):
    """A line of `gateway batches`."""

    id: str
    call_id: int
    app: str
    requests: int
    status: str
    held_nano: int
    made_at: float
    results: int
    """Requests whose result was read so far."""
    look_at: float
    failures: int


@dataclass(frozen=True, slots=True)
class _Sum:
    """The sum of the results of one kind, model and price row, in the shape of a billed part and its tokens."""

    kind: str
    model: str | None
    price_row: str | None
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int
    cache_write_unsplit_tokens: int
    web_searches: int
    nano: int

    @property
    def tokens(self) -> "_Sum":
        return self


class SettledBatch(NamedTuple):
    """The call of a settled batch, as traces and logs report it."""

    call: NewCall
    started_at: float
    outcome: Outcome
    parts: tuple[_Sum, ...]


_COLUMNS = "id, call_id, app, made_at, requests, hour_ttl, prices, status, look_at, failures, lost_since"
ADOPT = """
INSERT INTO batches (id, call_id, app, made_at, requests, hour_ttl, prices, flags, custom_ids, status, look_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT DO NOTHING
"""
KEEP_PRICES = "INSERT INTO price_tables VALUES ($1, $2) ON CONFLICT DO NOTHING"
HOLD = "UPDATE calls SET owner = $1, status = 200, request_id = $2 WHERE id = $3 AND state = 'open'"
FIND = f"SELECT {_COLUMNS} FROM batches WHERE id = $1"
DUE = "(look_at <= $now OR look_at > $now + $ahead_s)"
WAITS = named(f"SELECT EXISTS (SELECT 1 FROM batches WHERE {DUE})")
TAKE = named(f"""
UPDATE batches SET look_at = $until
WHERE id = (SELECT id FROM batches WHERE {DUE} ORDER BY look_at LIMIT 1)
RETURNING {_COLUMNS}
""")
LOOKED = "UPDATE batches SET status = $1, look_at = $2, failures = $3, lost_since = $4 WHERE id = $5 AND look_at IS NOT NULL"
# Results never change, so the first reading stands. Where one errs and succeeds as well, the success does, and says so.
BOOK = f"""
INSERT INTO batch_usage VALUES ({numbers(15)}) ON CONFLICT (call_id, custom_id, part) DO UPDATE SET kind = excluded.kind,
  model = excluded.model, input_tokens = excluded.input_tokens, output_tokens = excluded.output_tokens,
  cache_read_tokens = excluded.cache_read_tokens, cache_write_5m_tokens = excluded.cache_write_5m_tokens,
  cache_write_1h_tokens = excluded.cache_write_1h_tokens, cache_write_unsplit_tokens = excluded.cache_write_unsplit_tokens,
  web_search_requests = excluded.web_search_requests, nano = excluded.nano, price_row = excluded.price_row,
  flags = trim(excluded.flags || ' results_contradict')
WHERE batch_usage.kind IN ('errored', 'canceled', 'expired') AND excluded.nano > 0
"""
CLOSING = """
SELECT call_id, requests, batches.flags, request_id, look_at IS NOT NULL FROM batches LEFT JOIN calls ON calls.id = call_id
WHERE batches.id = $1
"""
LOST = ("batch_gone", "results_unreadable", "results_gone")
"""Reasons to settle a batch at its held amount, without its results."""
SETTLED_AT = """
SELECT flags, (SELECT spent_nano FROM entries WHERE call_id = calls.id AND kind = 'settle'),
  (SELECT sum(spent_nano) FROM entries WHERE call_id = calls.id)
FROM calls WHERE id = $1 AND state = 'settled' AND carried IS NULL
"""
CORRECT = "INSERT INTO entries (call_id, at, kind, spent_nano, note) VALUES ($1, $2, 'adjust', $3, 'the results of the batch came')"
CORRECTED = "UPDATE calls SET flags = $1, model_served = $2, price_rows = $3, complete = 1, service_tier = 'batch' WHERE id = $4"
READ = "SELECT count(DISTINCT custom_id) FROM batch_usage WHERE call_id = $1"
SUMS = """
SELECT kind, model, price_row, sum(input_tokens), sum(output_tokens), sum(cache_read_tokens), sum(cache_write_5m_tokens),
  sum(cache_write_1h_tokens), sum(cache_write_unsplit_tokens), sum(web_search_requests), sum(nano)
FROM batch_usage WHERE call_id = $1 AND kind NOT IN ('errored', 'canceled', 'expired')
GROUP BY kind, model, price_row ORDER BY kind, model, price_row
"""
FLAGS = "SELECT DISTINCT flags FROM batch_usage WHERE call_id = $1 AND flags <> '' ORDER BY flags"
CALL = """
SELECT app, team, token_id, endpoint, model_asked, quote_nano, session_id, agent_id, parent_agent_id, user_id, labels, started_at,
  status, model_served, request_id, complete, price_rows, flags, service_tier FROM calls WHERE id = $1
"""
PARTS = """
SELECT kind, model, price_row, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens,
  cache_write_1h_tokens, cache_write_unsplit_tokens, web_search_requests, nano
FROM usage WHERE call_id = $1 ORDER BY part
"""
CLOSE = "UPDATE batches SET look_at = NULL, status = 'ended' WHERE id = $1"
FORGET_IDS = "UPDATE batches SET custom_ids = NULL WHERE id = $1"  # up to a megabyte
OPEN = """
SELECT batches.id, batches.call_id, batches.app, requests, batches.status,
  (SELECT coalesce(sum(reserved_nano), 0) FROM entries WHERE call_id = batches.call_id),
  made_at, (SELECT count(DISTINCT custom_id) FROM batch_usage WHERE call_id = batches.call_id), look_at, failures
FROM batches WHERE look_at IS NOT NULL ORDER BY made_at, batches.id
"""


def adopt(db: Connection, new: NewBatch) -> bool:
    """Enter a batch that the provider has taken as the app's; no process holds its reservation any more.

    False where the id was known before.
    """
    if not ownership.own(db, OwnedObject(new.id, "batch", new.app, new.made_at, new.content)):
        return False
    db.execute(KEEP_PRICES, (new.prices_digest, new.prices))
    facts = (new.id, new.call_id, new.app, new.made_at, new.requests, new.hour_ttl, new.prices_digest, " ".join(new.flags))
    db.execute(ADOPT, (*facts, new.custom_ids, new.status, new.look_at))
    db.execute(HOLD, (BATCHES, new.request_id, new.call_id))
    return True


def find(db: Connection, id: str) -> Batch | None:
    rows = db.execute(FIND, (id,)).fetchall()
    return _batch(rows[0]) if rows else None


def prices(db: Connection, digest: str) -> str:
    """Return the price table of this digest, as text."""
    return str(db.execute("SELECT content FROM price_tables WHERE digest = $1", (digest,)).fetchone()[0])


def custom_ids(db: Connection, id: str) -> str | None:
    """Return the packed ids of a batch's own requests, None where they were not kept."""
    [(packed,)] = db.execute("SELECT custom_ids FROM batches WHERE id = $1", (id,)).fetchall()
    return None if packed is None else str(packed)


def lacks_results(db: Connection, batch: Batch) -> bool:
    """Return whether a batch is open, or was settled without its results: then they are worth reading."""
    return batch.open or any(_is_lost(flags) for flags, *_ in db.execute(SETTLED_AT, (batch.call_id,)).fetchall())


def is_due(db: Connection, now: float) -> bool:
    """Return whether a batch is due to be polled."""
    return bool(db.execute(WAITS, {"now": now, "ahead_s": PAUSE_MAX_S}).fetchone()[0])


def claim_due(db: Connection, now: float) -> Batch | None:
    """Claim a batch that is due: of all processes on the ledger, only the caller polls it this time."""
    rows = db.execute(TAKE, {"now": now, "ahead_s": PAUSE_MAX_S, "until": now + TURN_S}).fetchall()
    return _batch(rows[0]) if rows else None


def record_poll(db: Connection, id: str, status: str, *, look_at: float, failures: int, lost_since: float | None = None) -> None:
    """Record a poll of an open batch, and when to poll again."""
    db.execute(LOOKED, (status, look_at, failures, lost_since, id))


def book_results(db: Connection, call_id: int, rows: Iterable[ResultRow]) -> None:
    """Keep results as they are read. An existing row stays as it is, unless it says that nothing was billed."""
    db.executemany(BOOK, [(call_id, *row) for row in rows])


def close(db: Connection, id: str, *, anyway: str | None = None, flags: tuple[str, ...] = (), now: float) -> Resolution | None:
    """Settle a batch at the sum of its results; None where some are missing. Correct one that was settled without them.

    `anyway`: the reason (of `LOST`) why they will never come: settle at the held amount, `estimated`. `flags`: oddities in them.
    """
    call_id, requests, flags_before, request_id, is_open = db.execute(CLOSING, (id,)).fetchone()
    flags = tuple(dict.fromkeys((*str(flags_before).split(), *flags)))
    whole = db.execute(READ, (call_id,)).fetchone()[0] == requests
    if not whole and anyway is None:
        return None
    estimate = Settlement(None, (), Outcome(200, request_id=request_id, flags=(*flags, f"estimated:{anyway}")))
    settlement = _summed(db, call_id, request_id, flags) if whole else estimate
    if whole:
        db.execute(FORGET_IDS, (id,))
    if not is_open:
        if whole:
            _correct(db, call_id, settlement, now)
        return Resolution(first=False)
    resolution = reservations.settle(db, call_id, settlement, now=now)
    db.execute(CLOSE, (id,))
    return resolution


def _correct(db: Connection, call_id: int, settlement: Settlement, now: float) -> None:
    """Correct a call that was settled at its held amount to the sum of its results, by an extra entry, once."""
    for flags_before, settled_nano, spent_nano in db.execute(SETTLED_AT, (call_id,)).fetchall():
        if not _is_lost(flags_before) or settlement.cost_nano is None:
            return
        db.execute(CORRECT, (call_id, now, settlement.cost_nano - spent_nano))
        outcome = settlement.outcome
        kept = (flag for flag in flags_before.split() if not flag.startswith("estimated"))
        flags = " ".join(dict.fromkeys((*kept, *outcome.flags, "corrected")))
        db.execute(CORRECTED, (flags, outcome.model_served, outcome.price_rows, call_id))
        db.execute("DELETE FROM usage WHERE call_id = $1", (call_id,))
        db.executemany(reservations.PART, reservations.usage_rows(call_id, settlement.parts, settled_nano))


def _is_lost(flags: str) -> bool:
    return any(f"estimated:{reason}" in flags.split() for reason in LOST)


def settled(db: Connection, call_id: int) -> SettledBatch:
    """Return the call of a settled batch."""
    row = db.execute(CALL, (call_id,)).fetchone()
    app, team, token_id, endpoint, model, quote_nano, session, agent, parent, user, labels, started_at, *ended = row
    status, served, request_id, complete, price_rows, flags, tier = ended
    call = NewCall(
        app, team, token_id, endpoint, model, quote_nano=quote_nano, session_id=session, agent_id=agent, parent_agent_id=parent,
        user_id=user, labels=labels_of(labels),
    )  # fmt: skip
    outcome = Outcome(status, served, None, request_id, None, bool(complete), price_rows, tuple(flags.split()), tier)
    return SettledBatch(call, started_at, outcome, tuple(_Sum(*row) for row in db.execute(PARTS, (call_id,)).fetchall()))


def open_batches(db: Connection) -> list[OpenBatch]:
    """Return every batch that is not settled, the oldest first."""
    return [OpenBatch(*row) for row in db.execute(OPEN).fetchall()]


def _summed(db: Connection, call_id: int, request_id: str | None, flags: tuple[str, ...]) -> Settlement:
    sums = [_Sum(*row) for row in db.execute(SUMS, (call_id,)).fetchall()]
    more = [flag for (each,) in db.execute(FLAGS, (call_id,)).fetchall() for flag in str(each).split()]
    served = safe_name(", ".join(dict.fromkeys(each.model for each in sums if each.model))) or None
    price_rows = ", ".join(dict.fromkeys(each.price_row for each in sums if each.price_row)) or None
    flags = tuple(dict.fromkeys((*flags, *more)))
    outcome = Outcome(200, served, None, request_id, None, True, price_rows, flags, service_tier="batch")
    return Settlement(sum(each.nano for each in sums), tuple(sums), outcome)


def _batch(row: Row) -> Batch:
    id, call_id, app, made_at, requests, hour_ttl, prices_digest, status, look_at, failures, lost_since = row
    return Batch(id, call_id, app, made_at, requests, bool(hour_ttl), prices_digest, status, look_at, failures, lost_since)
