"""Sum what to charge on for a month: each app's spending, or each user's or customer's, by model and kind of token. Read-only.

Promises to sum to the balances to the nano. A bill's parts sum to its settlement; what was corrected later is a line of its own. What
calls in flight hold is not charged.
"""

from typing import NamedTuple

from gateway_addon.ledger.reports.call_sums import EVERY, Key, Only, column
from gateway_addon.ledger.sql import Connection, named

CORRECTIONS = "(corrections)"
ESTIMATES = "(estimated)"
"""The part of a settlement that no answer explains: calls booked at what they held."""


class InvoiceLine(NamedTuple):
    """One model's part of the month of one app, or of whatever the invoice is by."""

    key: str
    model: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int
    cache_write_unsplit_tokens: int
    web_searches: int
    spent_nano: int


_KINDS = InvoiceLine._fields[2:-2]
_LINES = f"""
SELECT {{key}} AS key, coalesce(usage.model, '{ESTIMATES}') AS model, {", ".join(f"sum({name}) AS {name}" for name in _KINDS)},
  sum(web_search_requests) AS web_searches, sum(nano) AS spent_nano
FROM calls CROSS JOIN usage WHERE usage.call_id = calls.id AND started_at >= $since AND started_at < $until {{only}} GROUP BY 1, 2
UNION ALL
SELECT {{key}}, '{CORRECTIONS}', {", ".join("0" for _ in _KINDS)}, 0, sum(spent_nano)
FROM calls CROSS JOIN entries
WHERE entries.call_id = calls.id AND started_at >= $since AND started_at < $until AND kind = 'adjust' {{only}} GROUP BY 1
ORDER BY 1, spent_nano DESC, 2
"""


def invoice(db: Connection, *, since: float, until: float, by: Key = "app", only: Only = EVERY) -> list[InvoiceLine]:
    """Return the lines of the calls admitted from `since` to before `until`, the dearest model of each app or other key first."""
    query = named(_LINES.format(key=column(db.engine, by), only=only.text(db.engine)))
    rows = db.execute(query, only.values | {"since": since, "until": until}).fetchall()
    return [InvoiceLine(*row) for row in rows if row["spent_nano"] or any(row[name] for name in _KINDS)]
