"""Keep the workloads that identity tokens stand for: a token row for each app, issuer and subject, and sessions in its name.

Promises that a workload which the operator has revoked stays so, whichever identity token it comes with, and its sessions with it; that
nothing is stored of an identity token, and of a session only its SHA-256; that ended sessions are swept by those that begin, so that
their number is that of an hour's jobs. Each function runs in a transaction of the caller's.
"""

from gateway_addon.ledger.admin import TOKENS, audit, token_facts
from gateway_addon.ledger.scope import app_scope
from gateway_addon.ledger.sql import Connection
from gateway_addon.ledger.state import token_of
from gateway_addon.ledger.types import Token
from gateway_addon.names import PROGRAM, app_named, safe_name

KEPT_S = 3600.0
"""How long an ended session is kept, so that who still uses it is told that it has ended."""
SWEPT_AT_ONCE = 100

_ENTER = """
INSERT INTO tokens (app, label, digest, created_at, issuer, subject) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT DO NOTHING RETURNING id
"""
_OPEN = "INSERT INTO sessions (digest, token_id, rule, issued_at, expires_at) VALUES ($1, $2, $3, $4, $5)"
_SWEEP = f"""
DELETE FROM sessions WHERE digest IN (SELECT digest FROM sessions WHERE expires_at < $1 ORDER BY expires_at LIMIT {SWEPT_AT_ONCE})
"""


def enter(db: Connection, app: str, issuer: str, subject: str, digest: str, *, who: str = "gateway", now: float) -> Token:
    """Return a workload's token row, by its digest: an own one from its first use on."""
    new = db.execute(_ENTER, (app, safe_name(subject), digest, now, issuer, subject)).fetchall()
    [row] = db.execute(f"{TOKENS} WHERE digest = $1", (digest,)).fetchall()
    token = token_of(row)
    if new:
        audit(db, who, "workload first seen", app_scope(app), None, {"id": token.id, "issuer": issuer, "subject": subject}, "", now)
    return token


def open_session(
    db: Connection, app: str, issuer: str, subject: str, digest: str, *, session: str, rule: str, expires_at: float, now: float
) -> Token:
    """Open a session in a workload's name, by the session's SHA-256; return the workload's token row. None is opened for a revoked one."""
    token = enter(db, app, issuer, subject, digest, now=now)
    if token.refusal(now) is None:
        db.execute(_SWEEP, (now - KEPT_S,))
        db.execute(_OPEN, (session, token.id, rule, now, expires_at))
    return token


def bar(db: Connection, app: str, issuer: str, subject: str, digest: str, *, who: str, why: str = "", now: float) -> Token | None:
    """Revoke a workload, one that was never seen too; None where it is revoked already."""
    before = enter(db, app, issuer, subject, digest, who=who, now=now)
    if before.refusal(now) is not None:
        return None
    db.execute("UPDATE tokens SET revoked_at = $1 WHERE id = $2", (now, before.id))
    [row] = db.execute(f"{TOKENS} WHERE id = $1", (before.id,)).fetchall()
    after = token_of(row)
    audit(db, who, "token revoke", app_scope(app), token_facts(before), token_facts(after), why, now)
    return after


def restore(db: Connection, app: str, token_id: int, *, who: str, why: str = "", now: float) -> Token:
    """Let a revoked workload in again. Raises ValueError for anything else: a token that was revoked may be known to anybody."""
    rows = db.execute(f"{TOKENS} WHERE id = $1 AND app = $2", (token_id, app)).fetchall()
    before = token_of(rows[0]) if rows else None
    if before is None or before.issuer is None:
        raise ValueError(f"{app_named(app)} has no workload {token_id} ({PROGRAM} token list {app}); a revoked token is issued anew")
    if before.refusal(now) is None:
        raise ValueError(f"workload {token_id} of {app_named(app)} is not revoked")
    db.execute("UPDATE tokens SET revoked_at = NULL WHERE id = $1", (token_id,))
    [row] = db.execute(f"{TOKENS} WHERE id = $1", (token_id,)).fetchall()
    after = token_of(row)
    audit(db, who, "token restore", app_scope(app), token_facts(before), token_facts(after), why, now)
    return after


def of_subject(db: Connection, app: str, subject: str) -> list[Token]:
    """Return the app's workloads of this subject, of whatever issuer."""
    return [token_of(row) for row in db.execute(f"{TOKENS} WHERE app = $1 AND subject = $2 ORDER BY id", (app, subject)).fetchall()]
