"""Small facts beside the money: tokens, pauses, alerts, overruns, the upstream's limits. Statements on a given connection."""

import sqlite3
from collections.abc import Iterable, Mapping

from gateway_addon.ledger.values import Pause, Standing, Token

TOKEN = "SELECT id, app, label, created_at, expires_at, revoked_at FROM tokens WHERE digest = ?"
PAUSED = "SELECT scope, since, until, why FROM pauses WHERE scope = ? AND (until IS NULL OR until > ?)"


def token(db: sqlite3.Connection, digest: str) -> Token | None:
    rows = db.execute(TOKEN, (digest,)).fetchall()
    return Token(*rows[0]) if rows else None


def paused(db: sqlite3.Connection, scopes: Iterable[str], now: float) -> Pause | None:
    for scope in scopes:
        rows = db.execute(PAUSED, (scope, now)).fetchall()
        if rows:
            return Pause(*rows[0])
    return None


def overruns(db: sqlite3.Connection) -> frozenset[str]:
    return frozenset(model for (model,) in db.execute("SELECT model FROM overruns").fetchall())


def keep_ratelimits(db: sqlite3.Connection, headers: Mapping[str, str], now: float) -> None:
    upsert = "INSERT INTO ratelimits VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value, at = excluded.at"
    db.executemany(upsert, [(name, value, now) for name, value in headers.items()])


def ratelimits(db: sqlite3.Connection) -> dict[str, tuple[str, float]]:
    return {name: (value, at) for name, value, at in db.execute("SELECT name, value, at FROM ratelimits").fetchall()}


def alert_once(db: sqlite3.Connection, standing: Standing, threshold_percent: int, now: float) -> bool:
    row = (standing.scope, standing.window, standing.starts_at, threshold_percent, now, standing.spent_nano, standing.cap_nano)
    return db.execute("INSERT INTO alerts VALUES (?, ?, ?, ?, ?, ?, ?, NULL) ON CONFLICT DO NOTHING", row).rowcount == 1
