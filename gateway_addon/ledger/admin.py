"""Write the changes that people make: tokens, raises of caps, pauses, corrections. Each is one transaction with its audit row.

Every function takes a connection inside a write transaction: `with connect.changing(path) as db` from a command,
`ledger.change(partial(...))` inside a running gateway. All are in force for the next call in every process, because calls
are judged by these rows.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from gateway_addon.ledger import parts, reservations, state
from gateway_addon.ledger.scope import TOTAL, app_scope
from gateway_addon.ledger.sql import Connection, named
from gateway_addon.ledger.store import balances, sqlite_files
from gateway_addon.ledger.types import Labels, Limit, Raise, Token, labels_text
from gateway_addon.money import AMOUNT_NANO_MAX, dollars
from gateway_addon.names import PROGRAM
from gateway_addon.windows import Window, next_start, shown, starts

ADJUST = "INSERT INTO entries (call_id, at, kind, spent_nano, note) VALUES ($1, $2, 'adjust', $3, $4)"
EVER_CALLED = "SELECT 1 FROM tokens WHERE app = $1 AND last_used_at IS NOT NULL"  # by refused calls too, of which no balance tells
EVER_SPENT = """FROM balances WHERE scope = $1 AND "window" = 'ever' AND window_start = 0"""
LIMITS = 'SELECT scope, "window", amount_nano, since, who, why FROM limits'
RAISES = 'SELECT id, scope, "window", amount_nano, since, until, who, why FROM raises'
TOKENS = f"SELECT {state.TOKEN} FROM tokens"

PRUNED = "pruned_before"  # a setting: the time before which calls have become sums (prune.py)

ISSUE = """
INSERT INTO tokens (app, label, digest, created_at, expires_at, labels, cap_nano) VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT DO NOTHING RETURNING id
"""


class PolicyChange(NamedTuple):
    """A policy, or a real key, that came into force: when (unix seconds), from whose files, and the difference.

    `digest` is the policy's, or the key's fingerprint.
    """

    at: float
    who: str
    digest: str
    diff: str


def issue_token(
    db: Connection, app: str, digest: str, *, label: str = "", expires_at: float | None = None, labels: Labels = (),
    cap_nano: int | None = None, who: str, why: str = "", now: float
) -> Token:  # fmt: skip
    """Enter a token by its SHA-256 (hexadecimal). Raises ValueError if it is there already.

    `cap_nano`: the most that may ever be spent with it, beside the caps of the policy.
    """
    found = db.execute(ISSUE, (app, label, digest, now, expires_at, labels_text(labels), cap_nano)).fetchall()
    if not found:
        raise ValueError(f"the ledger has this token of {app} already: mint another one")
    token = Token(found[0][0], app, label, now, expires_at, None, labels=labels, cap_nano=cap_nano)
    if cap_nano is not None:
        parts.keep_tokens(db, app)
    audit(db, who, "token issue", app_scope(app), None, token_facts(token), why, now)
    return token


def revoke_tokens(
    db: Connection, app: str, *, token_id: int | None = None, at: float | None = None, workloads: bool = True, who: str, why: str = "",
    now: float
) -> list[Token]:  # fmt: skip
    """Revoke an app's good tokens, or the one of this id, from now or from `at` on; returns them. Running calls still settle.

    `workloads`: whether the workloads that it lets in are revoked too, and their sessions with them.
    """
    candidates = (token for token in tokens(db, app) if workloads or token.issuer is None)
    good = [token for token in candidates if token.refusal(now) is None and token_id in (None, token.id)]
    for token in good:
        db.execute("UPDATE tokens SET revoked_at = $1 WHERE id = $2", (now if at is None else at, token.id))
    revoked = [token for token in tokens(db, app) if token.id in {each.id for each in good}]
    for before, after in zip(good, revoked, strict=True):
        audit(db, who, "token revoke", app_scope(app), token_facts(before), token_facts(after), why, now)
    return revoked


def rotate_token(
    db: Connection, app: str, digest: str, *, label: str = "", keep_old_s: float = 0, who: str, now: float
) -> Token:  # fmt: skip
    """Issue a new token and revoke the app's others, at once or after `keep_old_s` seconds of grace. It keeps the labels that all had.

    Workloads hold no token that could be rotated, and stay.
    """
    before = {token.labels for token in revoke_tokens(db, app, at=now + keep_old_s, workloads=False, who=who, now=now)}
    labels = before.pop() if len(before) == 1 else ()
    return issue_token(db, app, digest, label=label, labels=labels, who=who, now=now)


def tokens(db: Connection, app: str | None = None) -> list[Token]:
    """Return the tokens of one app or of all, in the order of issue."""
    rows = db.execute(f"{TOKENS} WHERE app = coalesce($1, app) ORDER BY id", (app,)).fetchall()
    return [state.token_of(row) for row in rows]


def apps(db: Connection) -> list[str]:
    """Return every app that the ledger knows: those with a token, and those that ever had a call reserved."""
    rows = db.execute("SELECT DISTINCT app FROM tokens UNION SELECT substr(scope, 5) FROM balances WHERE scope LIKE 'app:%'").fetchall()
    return sorted(app for (app,) in rows)


def booked_apps(db: Connection) -> list[str]:
    """Return every app that ever had a call reserved."""
    rows = db.execute("""SELECT substr(scope, 5) FROM balances WHERE scope LIKE 'app:%' AND "window" = 'ever' ORDER BY scope""").fetchall()
    return [app for (app,) in rows]


def team_of(db: Connection, app: str) -> str | None:
    """Return the team of an app under the policy last in force."""
    return _settings(db).get(f"team:{app}") or None


def teams(db: Connection) -> list[str]:
    """Return every team that an app of the policy last in force belongs to."""
    rows = db.execute("SELECT DISTINCT value FROM settings WHERE name LIKE 'team:%' AND value <> ''").fetchall()
    return sorted(team for (team,) in rows)


_AUDIT = named("""
SELECT id, at, who, action, subject, before, after, why FROM audit
WHERE at >= $since AND (CAST($app AS TEXT) IS NULL OR subject = 'app:' || $app
  OR substr(subject, 1, length('app:' || $app) + 1) = 'app:' || $app || ' '
  OR CASE WHEN subject LIKE 'call:%' THEN (SELECT app FROM calls WHERE id = CAST(substr(subject, 6) AS BIGINT)) END = $app)
ORDER BY id
""")


def audit_trail(db: Connection, app: str | None, *, since: float) -> list[dict[str, Any]]:
    """Return the changes since a time, of one app (its tokens, caps, pauses, corrections) or of all, in their order."""
    names = ("id", "at", "who", "action", "subject", "before", "after", "why")
    found = [dict(zip(names, row, strict=True)) for row in db.execute(_AUDIT, {"since": since, "app": app}).fetchall()]
    return [row | {name: row[name] and json.loads(row[name]) for name in ("before", "after")} for row in found]


def raise_cap(db: Connection, scope: str, window: str, amount_nano: int, *, until: float, who: str, why: str = "", now: float) -> Raise:
    """Add `amount_nano` on top of a scope's cap for this window, until a date. Raises have an end so that none is forgotten."""
    if amount_nano <= 0 or until <= now:
        raise ValueError(f"a cap is raised by more than $0 and until a time to come; {PROGRAM} cap limit lowers one")
    before = sum(each.amount_nano for each in raises(db, now=now) if (each.scope, each.window) == (scope, window))
    insert = 'INSERT INTO raises (scope, "window", amount_nano, since, until, who, why) VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id'
    [(number,)] = db.execute(insert, (scope, window, amount_nano, now, until, who, why)).fetchall()
    after = {"raised_nano": before + amount_nano, "until": until}
    audit(db, who, "cap raise", f"{scope} {window}", {"raised_nano": before}, after, why, now)
    return Raise(number, scope, window, amount_nano, now, until, who, why)


def raises(db: Connection, *, now: float) -> list[Raise]:
    """Return the raises in force, in the order in which they were made."""
    return [Raise(*row) for row in db.execute(f"{RAISES} WHERE until > $1 ORDER BY id", (now,)).fetchall()]


def withdraw_raise(db: Connection, number: int, *, who: str, why: str = "", now: float) -> Raise:
    """End a raise at once; returns it as it was. Raises ValueError where none of this number is in force."""
    found = next((each for each in raises(db, now=now) if each.id == number), None)
    if found is None:
        raise ValueError(f"no raise {number} is in force; {PROGRAM} cap list shows those that are")
    db.execute("UPDATE raises SET until = since WHERE id = $1", (number,))  # not deleted: its number must never mean another raise
    audit(db, who, "cap withdraw", f"{found.scope} {found.window}", found._asdict(), None, why, now)
    return found


def limit_cap(db: Connection, scope: str, window: str, amount_nano: int, *, who: str, why: str = "", now: float) -> Limit | None:
    """Lower a scope's cap for this window to `amount_nano` until the limit is lifted; returns the limit that stood before."""
    if amount_nano < 0:
        raise ValueError("a limit is $0 or more")
    before = _lift(db, scope, window)
    db.execute("INSERT INTO limits VALUES ($1, $2, $3, $4, $5, $6)", (scope, window, amount_nano, now, who, why))
    audit(db, who, "cap limit", f"{scope} {window}", before and before._asdict(), {"amount_nano": amount_nano}, why, now)
    return before


def lift_limit(db: Connection, scope: str, window: str, *, who: str, why: str = "", now: float) -> Limit | None:
    """Take a limit away; returns it, None where there was none."""
    before = _lift(db, scope, window)
    if before is not None:
        audit(db, who, "cap limit lift", f"{scope} {window}", before._asdict(), None, why, now)
    return before


def limits(db: Connection) -> list[Limit]:
    """Return the limits in force, by scope and window."""
    return [Limit(*row) for row in db.execute(f"{LIMITS} ORDER BY scope, window").fetchall()]


def pause(db: Connection, scope: str, *, until: float | None = None, cut: bool = False, who: str, why: str = "", now: float) -> None:
    """Refuse every further call of `total`, a team or an app, until a time or until `resume`; `cut`: end those in flight too."""
    before = _pause(db, scope)
    db.execute("DELETE FROM pauses WHERE scope = $1", (scope,))
    db.execute("INSERT INTO pauses VALUES ($1, $2, $3, $4, $5)", (scope, now, until, why, cut))
    audit(db, who, "pause", scope, before, {"until": until, "cut": cut}, why, now)


def resume(db: Connection, scope: str, *, who: str, why: str = "", now: float) -> bool:
    """End a pause; False where there was none."""
    before = _pause(db, scope)
    if before is None:
        return False
    db.execute("DELETE FROM pauses WHERE scope = $1", (scope,))
    audit(db, who, "resume", scope, before, None, why, now)
    return True


def adjust(db: Connection, call_id: int, delta_nano: int, *, who: str, why: str, now: float) -> int:
    """Correct what a resolved call cost, by an entry of its own; returns what it has cost since. No call costs less than nothing."""
    rows = db.execute("SELECT state, carried FROM calls WHERE id = $1", (call_id,)).fetchall()
    if rows and rows[0][1] is not None:
        raise ValueError(f"call {call_id} is the sum of {rows[0][1]} calls that `{PROGRAM} prune` carried; only single calls are corrected")
    if not rows and (pruned := _pruned_until(db, call_id)):
        raise ValueError(f"call {call_id} is gone: `{PROGRAM} prune` made sums of the calls before {pruned}, and a sum is not corrected")
    if not rows or rows[0][0] not in ("settled", "voided"):
        raise ValueError(f"call {call_id} is {rows[0][0] if rows else 'not in the ledger'}: only a settled or voided call is adjusted")
    [(spent_nano,)] = db.execute("SELECT sum(spent_nano) FROM entries WHERE call_id = $1", (call_id,)).fetchall()
    if spent_nano + delta_nano < 0:
        raise ValueError(f"call {call_id} cost {dollars(spent_nano)}: {dollars(-delta_nano)} cannot be taken off")
    [(all_nano,)] = db.execute(f"SELECT coalesce(sum(spent_nano), 0) {EVER_SPENT}", (TOTAL,)).fetchall()
    if all_nano + delta_nano > AMOUNT_NANO_MAX:
        raise ValueError(f"all calls together would come to more than the ledger can hold ({dollars(AMOUNT_NANO_MAX)})")
    db.execute(ADJUST, (call_id, now, delta_nano, why))
    after = spent_nano + delta_nano
    audit(db, who, "adjust", f"call:{call_id}", {"spent_nano": spent_nano}, {"spent_nano": after}, why, now)
    return int(after)


def clear_overrun(db: Connection, model: str, *, who: str, why: str = "", now: float) -> bool:
    """Let a model reserve progressively again; False where it was not held back."""
    rows = db.execute("SELECT call_id, over_nano FROM overruns WHERE model = $1", (model,)).fetchall()
    if not rows:
        return False
    db.execute("DELETE FROM overruns WHERE model = $1", (model,))
    audit(db, who, "overrun clear", f"model:{model}", {"call_id": rows[0][0], "over_nano": rows[0][1]}, None, why, now)
    return True


def is_aligned(
    db: Connection,
    zone: str,
    teams: Mapping[str, str | None],
    cycles: Collection[Window] = (),
    capped_parts: Collection[parts.KeptPart] = (),
) -> bool:
    """Return whether the ledger's calendar, the apps' teams and the parts with balances are those of the policy."""
    settings = _settings(db)
    as_before = settings["zone"] == zone and not _moved(settings, teams)
    return as_before and _kept_cycles(db) == set(cycles) and parts.is_aligned(db, capped_parts)


def align(
    db: Connection,
    zone: str,
    teams: Mapping[str, str | None],
    cycles: Collection[Window] = (),
    capped_parts: Collection[parts.KeptPart] = (),
    *,
    who: str,
    now: float,
) -> bool:
    """Make the ledger's calendar, the apps' teams and the parts with balances those of the policy; True if anything changed.

    Past calls move with their app and their day: windows are computed anew and the balances from the entries, in this one
    transaction. It reads the whole ledger, so it runs when a policy comes into force, never on a call, and in a running gateway apart
    from its loop (background.py); for an app that is new, whose calls could move nothing, it reads none of it.
    """
    if is_aligned(db, zone, teams, cycles, capped_parts):
        return False
    settings, cycles_before = _settings(db), _kept_cycles(db)
    zone_before, moved = settings["zone"], _moved(settings, teams)
    windows = starts(now, ZoneInfo(zone), cycles)
    booked = {app for app in moved if db.execute(reservations.EVER_BOOKED, (app_scope(app),)).fetchall()}
    for app, team in moved.items():
        keep_setting(db, f"team:{app}", team or "")
        if app in booked or db.execute(EVER_CALLED, (app,)).fetchall():
            db.execute("UPDATE calls SET team = $1 WHERE app = $2 AND team IS DISTINCT FROM $3", (team, app, team))
            db.execute("DELETE FROM kept_days")  # they were sums of the other team
    db.execute("DELETE FROM kept_cycles")
    db.executemany("INSERT INTO kept_cycles VALUES ($1)", [(cycle,) for cycle in cycles])
    if zone_before != zone:
        db.execute("UPDATE settings SET value = $1 WHERE name = 'zone'", (zone,))
        _move_windows(db, ZoneInfo(zone), cycles)
        db.execute("DELETE FROM kept_days")  # they were days of the other calendar
    elif new := set(cycles) - cycles_before:
        _move_windows(db, ZoneInfo(zone), cycles, since=min(windows.of(cycle) for cycle in new))
    if booked or zone_before != zone or set(cycles) != cycles_before:
        balances.rebuild(db)
    parts.align(db, capped_parts, windows, moved=zone_before != zone)
    before = {"zone": zone_before, "teams": {app: settings.get(f"team:{app}") for app in moved}}
    why = "the policy's time zone, an app's team, a billing cycle or the caps of an app's parts"
    audit(db, who, "align", "ledger", before, {"zone": zone, "teams": moved}, why, now)
    return True


def moved(db: Connection, source: str, target: str | None, *, who: str, now: float) -> None:
    """Note on either side where a ledger was moved from and, on the side that it leaves (`target`), to."""
    if target is not None:
        keep_setting(db, sqlite_files.MOVED_TO, target)
    audit(db, who, "migrate", "ledger", {"ledger": source}, {"ledger": target or "here"}, "gateway migrate", now)


def keep_policy(db: Connection, digest: str, texts: Mapping[str, str], *, who: str, now: float) -> bool:
    """Audit how the policy differs from the one last in force: a diff, once, however many processes load it; True if it does.

    The last texts are kept with it, so a change made while no gateway ran is audited at the next start.
    """
    rows = db.execute("SELECT value FROM settings WHERE name = 'policy'").fetchall()
    before: dict[str, Any] = json.loads(rows[0][0]) if rows else {"digest": None, "texts": {}}
    if before["digest"] == digest:
        return False
    keep_setting(db, "policy", json.dumps({"digest": digest, "texts": dict(texts)}))
    changes = "".join(_diff(name, before["texts"].get(name, ""), texts.get(name, "")) for name in sorted({*before["texts"], *texts}))
    audit(db, who, "policy", "policies", {"digest": before["digest"]}, {"digest": digest, "diff": changes}, "saved files", now)
    return True


def keep_key(db: Connection, fingerprint: str, place: str, *, who: str, now: float) -> bool:
    """Audit that another real key is in use than the one before, once, however many processes notice; True if it is another."""
    rows = db.execute("SELECT value FROM settings WHERE name = 'key'").fetchall()
    before = rows[0][0] if rows else None
    if before == fingerprint:
        return False
    keep_setting(db, "key", fingerprint)
    change = ("" if before is None else f"-key {before}\n") + f"+key {fingerprint} from {place}\n"
    audit(db, who, "key", "key", before, {"digest": fingerprint, "diff": change}, "read anew", now)
    return True


def policy_changes(db: Connection, limit: int) -> list[PolicyChange]:
    """Return the latest changes of the policy and of the real key, the newest first."""
    rows = db.execute(
        "SELECT at, who, after FROM audit WHERE action IN ('policy', 'key') ORDER BY id DESC LIMIT $1", (limit,)
    ).fetchall()  # fmt: skip
    return [PolicyChange(at, who, **json.loads(after)) for at, who, after in rows]


def _diff(name: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), f"{name} before", f"{name} after", n=1, lineterm="")
    return "".join(f"{line}\n" for line in lines)


def _settings(db: Connection) -> dict[str, str]:
    return dict(db.execute("SELECT name, value FROM settings").fetchall())


def _moved(settings: Mapping[str, str], teams: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the apps whose team has changed, with the new team."""
    return {app: team for app, team in teams.items() if settings.get(f"team:{app}") != (team or "")}


def keep_setting(db: Connection, name: str, value: str) -> None:
    db.execute("INSERT INTO settings VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value))


_SPAN = "SELECT (SELECT min(started_at) FROM calls), (SELECT max(started_at) FROM calls)"
_MOVE = """
UPDATE calls SET day_start = $1, week_start = $2, month_start = $3, cycles = $4 WHERE started_at >= $1 AND started_at < $5
"""


def _kept_cycles(db: Connection) -> set[Window]:
    return {cycle for (cycle,) in db.execute('SELECT "window" FROM kept_cycles').fetchall()}


def _move_windows(db: Connection, zone: ZoneInfo, cycles: Collection[Window], since: float | None = None) -> None:
    """Compute the windows of all calls anew, or of those `since` a time: one statement for each day of the zone, from an index."""
    [(at, last)] = db.execute(_SPAN).fetchall()
    at = at if at is None or since is None else max(at, since)
    while at is not None and at <= last:
        windows = starts(at, zone, cycles)
        end = next_start("day", at, zone)
        db.execute(_MOVE, (windows.day, windows.week, windows.month, reservations.written_cycles(windows), end))
        at = end


def _pruned_until(db: Connection, call_id: int) -> str | None:
    """Return the time before which calls were pruned, if this call may have been one of them."""
    rows = db.execute("SELECT value FROM settings WHERE name = $1 AND $2 < (SELECT max(id) FROM calls)", (PRUNED, call_id)).fetchall()
    return shown(float(rows[0][0]), reservations.zone(db)) if rows else None


def _lift(db: Connection, scope: str, window: str) -> Limit | None:
    rows = db.execute(f'{LIMITS} WHERE scope = $1 AND "window" = $2', (scope, window)).fetchall()
    db.execute('DELETE FROM limits WHERE scope = $1 AND "window" = $2', (scope, window))
    return Limit(*rows[0]) if rows else None


def _pause(db: Connection, scope: str) -> dict[str, object] | None:
    rows = db.execute("SELECT since, until, why, cut FROM pauses WHERE scope = $1", (scope,)).fetchall()
    return dict(zip(("since", "until", "why", "cut"), rows[0], strict=True)) if rows else None


def token_facts(token: Token) -> dict[str, object]:
    facts: dict[str, object] = {"id": token.id, "label": token.label, "expires_at": token.expires_at, "revoked_at": token.revoked_at}
    return facts | ({"labels": dict(token.labels)} if token.labels else {})


def audit(db: Connection, who: str, action: str, subject: str, before: object, after: object, why: str, now: float) -> None:
    as_json = [None if value is None else json.dumps(value) for value in (before, after)]
    row = (now, who, action, subject, *as_json, why)
    db.execute("INSERT INTO audit (at, who, action, subject, before, after, why) VALUES ($1, $2, $3, $4, $5, $6, $7)", row)
