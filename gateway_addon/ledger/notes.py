"""Small facts beside the money: tokens, pauses, alerts, overruns, the upstream's limits. Statements on a given connection."""

import sqlite3
from collections.abc import Mapping

from gateway_addon.ledger.values import Pause, Standing, Token

TOKEN = "SELECT id, app, label, created_at, expires_at, revoked_at FROM tokens WHERE digest = ?"
PAUSES = "SELECT scope, since, until, why, cut FROM pauses WHERE until IS NULL OR until > ? ORDER BY scope"


def token(db: sqlite3.Connection, digest: str) -> Token | None:
    rows = db.execute(TOKEN, (digest,)).fetchall()
    return Token(*rows[0]) if rows else None


def pauses(db: sqlite3.Connection, now: float) -> tuple[Pause, ...]:
    rows = db.execute(PAUSES, (now,)).fetchall()
    return tuple(Pause(scope, since, until, why, bool(cut)) for scope, since, until, why, cut in rows)


def overruns(db: sqlite3.Connection) -> frozenset[str]:
    return frozenset(model for (model,) in db.execute("SELECT model FROM overruns").fetchall())


def keep_ratelimits(db: sqlite3.Connection, headers: Mapping[str, str], now: float) -> None:
    upsert = "INSERT INTO ratelimits VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value, at = excluded.at"
    db.executemany(upsert, [(name, value, now) for name, value in headers.items()])


def ratelimits(db: sqlite3.Connection) -> dict[str, tuple[str, float]]:
    return {name: (value, at) for name, value, at in db.execute("SELECT name, value, at FROM ratelimits").fetchall()}


def alert_delivered(db: sqlite3.Connection, standing: Standing, threshold_percent: int, now: float) -> None:
    key = (now, standing.scope, standing.window, standing.starts_at, threshold_percent)
    db.execute("UPDATE alerts SET delivered_at = ? WHERE scope = ? AND window = ? AND window_start = ? AND threshold_percent = ?", key)


def alert_once(db: sqlite3.Connection, standing: Standing, threshold_percent: int, now: float) -> bool:
    row = (standing.scope, standing.window, standing.starts_at, threshold_percent, now, standing.spent_nano, standing.cap_nano)
    return db.execute("INSERT INTO alerts VALUES (?, ?, ?, ?, ?, ?, ?, NULL) ON CONFLICT DO NOTHING", row).rowcount == 1
