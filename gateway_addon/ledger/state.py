"""Keep the small facts besides money: tokens, pauses, alerts, overruns, the upstream's limits. Statements on a given connection."""

import json
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from gateway_addon.ledger.sql import Connection, named
from gateway_addon.ledger.types import Alert, DueAlert, Pause, Token, TokenLookup, labels_of

TOKEN = "id, app, label, created_at, expires_at, revoked_at, last_used_at, labels, cap_nano, issuer"
"""The columns that `token_of` takes."""
_ITS_SESSION = "tokens.id, app, label, created_at, sessions.expires_at, revoked_at, last_used_at, labels, cap_nano, issuer, rule"
IN_FORCE = "FROM pauses WHERE until IS NULL OR until > ${}"
# In one statement, because every request asks for all of it, and a look costs more by the statement than by the row.
KNOCK = f"""
SELECT 'token' AS what, {TOKEN}, NULL AS rule FROM tokens WHERE digest = $1
UNION ALL
SELECT 'token', {_ITS_SESSION} FROM sessions JOIN tokens ON tokens.id = token_id WHERE sessions.digest = $1
UNION ALL
SELECT 'pause', cut, scope, why, since, until, NULL, NULL, NULL, NULL, NULL, NULL {IN_FORCE.format(2)}
UNION ALL
SELECT 'overrun', NULL, model, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL FROM overruns
"""
PAUSES = f"SELECT scope, since, until, why, cut {IN_FORCE.format(1)} ORDER BY scope"


def look_up_token(db: Connection, digest: str, now: float) -> TokenLookup:
    token: Token | None = None
    pauses: list[Pause] = []
    models: list[str] = []
    for what, *row in db.execute(KNOCK, (digest, now)).fetchall():
        if what == "token":
            token = token_of(row)
        elif what == "pause":
            cut, scope, why, since, until, *_ = row
            pauses.append(Pause(scope, since, until, why, bool(cut)))
        else:
            models.append(row[1])
    return TokenLookup(token, tuple(sorted(pauses, key=attrgetter("scope"))), frozenset(models))


def token_of(row: Sequence[Any]) -> Token:
    """Return a token from its columns; the rule is a session's."""
    id, app, label, created_at, expires_at, revoked_at, last_used_at, labels, cap_nano, issuer, *rule = row
    return Token(id, app, label, created_at, expires_at, revoked_at, last_used_at, labels_of(labels), cap_nano, issuer, *rule)


def pauses(db: Connection, now: float) -> tuple[Pause, ...]:
    rows = db.execute(PAUSES, (now,)).fetchall()
    return tuple(Pause(scope, since, until, why, bool(cut)) for scope, since, until, why, cut in rows)


def overruns(db: Connection) -> frozenset[str]:
    return frozenset(model for (model,) in db.execute("SELECT model FROM overruns").fetchall())


def keep_ratelimits(db: Connection, headers: Mapping[str, str], now: float) -> None:
    upsert = "INSERT INTO ratelimits VALUES ($1, $2, $3) ON CONFLICT (name) DO UPDATE SET value = excluded.value, at = excluded.at"
    db.executemany(upsert, [(name, value, now) for name, value in headers.items()])


def ratelimits(db: Connection) -> dict[str, tuple[str, float]]:
    return {name: (value, at) for name, value, at in db.execute("SELECT name, value, at FROM ratelimits").fetchall()}


def alert_once(db: Connection, alert: Alert, send: bool, now: float) -> bool:
    """Write an alert, unless it was written before; return whether it is new. `send`: it is to be sent from now on."""
    row = (alert.kind, alert.scope, alert.once, now, alert.sentence, json.dumps(dict(alert.facts)), now if send else None)
    return db.execute(ALERT, row).rowcount == 1


ALERT = """
INSERT INTO alerts (kind, scope, once, at, sentence, facts, try_at) VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING
"""
LATER_TIMES = 128
"""The longest pause between two tries, in first pauses. A later try was planned before the clock was set back."""
DUE_ALERT = f"(try_at <= $now OR try_at > $now + $retry_s * {LATER_TIMES})"
IS_ALERT_DUE = named(f"SELECT EXISTS (SELECT 1 FROM alerts WHERE {DUE_ALERT})")


def is_alert_due(db: Connection, retry_s: float, now: float) -> bool:
    """Return whether an alert is due to be sent."""
    return bool(db.execute(IS_ALERT_DUE, {"now": now, "retry_s": retry_s}).fetchone()[0])


TAKE_ALERT = named(f"""
UPDATE alerts SET tries = tries + 1, try_at = CASE WHEN at + $give_up_s >= $now
  THEN $now + $retry_s * (1 << CASE WHEN tries < 7 THEN tries ELSE 7 END) END
WHERE id = (SELECT id FROM alerts WHERE {DUE_ALERT} ORDER BY try_at LIMIT 1)
RETURNING id, kind, scope, once, sentence, facts, at, tries
""")


def take_alert(db: Connection, retry_s: float, give_up_s: float, now: float) -> DueAlert | None:
    """Claim one alert that is due: for `retry_s`, twice that after the next try, and so on; given up after `give_up_s`."""
    rows = db.execute(TAKE_ALERT, {"now": now, "retry_s": retry_s, "give_up_s": give_up_s}).fetchall()
    if not rows:
        return None
    [(number, kind, scope, once, sentence, facts, at, tries)] = rows
    return DueAlert(number, Alert(kind, scope, once, sentence, json.loads(facts)), at, tries)


def alert_done(db: Connection, number: int, delivered_at: float | None) -> None:
    """End an alert: it was delivered (unix seconds), or is given up (None)."""
    db.execute("UPDATE alerts SET try_at = NULL, delivered_at = $1 WHERE id = $2", (delivered_at, number))
