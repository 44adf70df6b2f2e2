"""Keep balances of the parts of an app: one session, agent, user, model, token or label. Statements on a given connection.

A part has a balance only where a cap asks for one: `kept_parts` says which kinds and windows of which app, and from which call on.
What is booked there follows from a call's own row (`calls.app_parts`), as all balances do, so a cap that is added at noon is given its
morning by one statement. Names that clients choose are without end: so many new ones a day have a part of their own, and the calls under
further ones share one part, `OTHERS`.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from gateway_addon.ledger.scope import AppPart, app_scope, enclosing, part_of, part_scope
from gateway_addon.ledger.sql import Connection, named, numbers
from gateway_addon.ledger.store import balances
from gateway_addon.ledger.types import CapShape, LedgerUnavailable, NewCall
from gateway_addon.windows import Starts, Window

OTHERS = "others"
"""The value of the part in which the calls under too many new names count."""

type KeptPart = tuple[str, str, str]
"""An app, a kind of its parts, and the window of a cap."""

KEPT = 'SELECT kind, "window" FROM kept_parts WHERE app = $1'
KEPT_OF_ALL = 'SELECT app, kind, "window", since_id FROM kept_parts'
FIRST_SINCE = "SELECT coalesce(min(id), 0) FROM calls WHERE started_at >= $1"
NEXT_CALL = "SELECT coalesce(max(id), 0) + 1 FROM calls"
ONE_KEPT = """kept.app = $1 AND kept.kind = $2 AND kept."window" = $3"""
KEEP = 'INSERT INTO kept_parts (app, kind, "window", since_id) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING'
WITH_OWN_CAP = "SELECT DISTINCT app FROM tokens WHERE cap_nano IS NOT NULL"
OF_THE_DAY = "part_names.day_start BETWEEN {day} AND {day} + 90000"
"""Whether a number of new names is that of a day, or of the next: a call that waited past midnight counts among the new day's.

A day has 25 hours at most; what is further ahead was counted before the clock was set back.
"""
NAMED = named(f"""
INSERT INTO part_names (app, day_start, names) VALUES ($app, $day_start, $names)
ON CONFLICT (app) DO UPDATE SET
  names = CASE WHEN {OF_THE_DAY.format(day="excluded.day_start")} THEN part_names.names ELSE 0 END + excluded.names,
  day_start = CASE WHEN {OF_THE_DAY.format(day="excluded.day_start")} THEN part_names.day_start ELSE excluded.day_start END
""")
# A session or an agent rests once `gateway prune` has carried all its calls. What users, labels, models and tokens spent for ever stays.
FORGET = """
DELETE FROM part_balances WHERE "window" = 'ever' AND open = 0
  AND (substr(scope, {instr}(scope, ' ') + 1) LIKE 'session:%' OR substr(scope, {instr}(scope, ' ') + 1) LIKE 'agent:%')
  AND spent_nano = (SELECT spent_nano FROM carried_parts WHERE carried_parts.scope = part_balances.scope)
"""
FORGET_CARRIED = """
DELETE FROM carried_parts WHERE scope NOT IN (SELECT scope FROM part_balances WHERE "window" = 'ever')
"""
PASSED = """DELETE FROM part_balances WHERE "window" <> 'ever' AND window_start < $1 AND open = 0"""


_JSON = json.JSONEncoder(ensure_ascii=False).encode


class CountedCall(NamedTuple):
    """The parts in which a call is counted, and its caps as they stand for them."""

    parts: Sequence[AppPart]
    caps: Sequence[CapShape]
    new_names: int = 0


class _Cap(NamedTuple):
    scope: str
    window: str
    amount_nano: int


def looked_at(call: NewCall, caps: Iterable[CapShape]) -> dict[AppPart, str]:
    """Return the parts of a call whose names are looked at, with their scopes: those under one of these caps, and those with a balance."""
    asked = {cap.scope for cap in caps}
    scopes = ((part, part_scope(call.app, part)) for part in call.parts)
    return {part: scope for part, scope in scopes if scope in asked or part[0] in call.names.kept}


def counted(db: Connection, call: NewCall, caps: Sequence[CapShape], day_start: int) -> CountedCall:
    """Return the parts in which a call is to be counted today. Raises LedgerUnavailable where a part has a cap and no balance is kept."""
    found = looked_at(call, caps)
    if not found:
        return CountedCall(call.parts, caps)
    rows = db.execute(_look(len(found)), (call.app, day_start, *found.values())).fetchall()
    must_be_kept(caps, {(kind, window) for what, kind, window, _ in rows if what == "kept"})
    known = {scope for what, scope, *_ in rows if what == "known"}
    room = call.names.new_max - sum(names for what, _, _, names in rows if what == "names")
    new = [part for part, scope in found.items() if part[0] not in call.names.bounded and scope not in known]
    shared = {kind for kind, _ in new[max(0, room) :]}
    parts = tuple((kind, OTHERS if kind in shared else value) for kind, value in call.parts)
    return CountedCall(parts, placed(call.app, caps, dict(parts)), len(new) - len(shared))


def placed(app: str, caps: Sequence[CapShape], parts: dict[str, str]) -> Sequence[CapShape]:
    """Return the caps of a call with those of its parts where these are counted."""
    if OTHERS not in parts.values():
        return caps
    found: list[CapShape] = []
    for cap in caps:
        part = part_of(cap.scope)
        shared = part is not None and parts.get(part[0]) == OTHERS
        found.append(_Cap(part_scope(app, (part[0], OTHERS)), cap.window, cap.amount_nano) if part and shared else cap)
    return found


def placed_again(db: Connection, app: str, caps: Sequence[CapShape], app_parts: str | None) -> Sequence[CapShape]:
    """Return the caps of a running call where its row says that it is counted. Raises LedgerUnavailable as `counted` does."""
    if all(part_of(cap.scope) is None for cap in caps):
        return caps
    must_be_kept(caps, {(kind, window) for kind, window in db.execute(KEPT, (app,)).fetchall()})
    return placed(app, caps, json.loads(app_parts or "{}"))


def must_be_kept(caps: Iterable[CapShape], kept: Collection[tuple[str, str]]) -> None:
    """Refuse a cap on a part of which no balance is kept: nothing would be judged. Raises LedgerUnavailable."""
    for cap in caps:
        part = part_of(cap.scope)
        if part is not None and (part[0], cap.window) not in kept:
            raise LedgerUnavailable(
                f"the ledger keeps no balance of each {part[0]} of {enclosing(cap.scope)} for the window {cap.window}: another gateway with"
                " other policies uses it; give all of them the same, and reload this one"
            )


def named_today(db: Connection, call: NewCall, new_names: int, day_start: int) -> None:
    """Count the new names that a call brought."""
    if new_names:
        db.execute(NAMED, {"app": call.app, "day_start": day_start, "names": new_names})


def written(parts: Iterable[AppPart]) -> str:
    """Return a call's parts as its row keeps them."""
    return _JSON(dict(parts))


def wanted_too(db: Connection, wanted: Collection[KeptPart]) -> set[KeptPart]:
    """Return the kept parts that a policy asks for, and those that tokens with a cap of their own need."""
    return {*wanted, *((app, "token", "ever") for (app,) in db.execute(WITH_OWN_CAP).fetchall())}


def is_aligned(db: Connection, wanted: Collection[KeptPart]) -> bool:
    """Return whether balances are kept of these parts, since long enough, and of no others."""
    kept = _kept(db)
    return kept.keys() == wanted_too(db, wanted) and not any(kept[part] for part in wanted if part[2] == "ever")


def align(db: Connection, wanted: Collection[KeptPart], windows: Starts, *, moved: bool) -> None:
    """Keep balances of these parts and no others. A part that is new here is given what its present window has spent and holds.

    `moved`: the calendar is another than it was, so that days, weeks, months and cycles are computed anew.
    """
    kept = _kept(db)
    for app, kind, window in kept.keys() - wanted_too(db, wanted):
        _clear(db, (app, kind, window))
        if window == "ever":
            db.execute("DELETE FROM carried_parts WHERE app = $1 AND kind = $2", (app, kind))
    for app, kind, window in wanted:
        since_id = kept.get((app, kind, window))
        if since_id is None or (moved if window != "ever" else since_id > 0):
            _clear(db, (app, kind, window))
            db.execute(KEEP, (app, kind, window, _first_call(db, window, windows)))
            db.execute(balances.fill_parts(db.engine.json_value, ONE_KEPT), (app, kind, window))


def keep_tokens(db: Connection, app: str) -> None:
    """Keep what each token of an app spends from now on, where that is not kept yet: the app has a token with a cap of its own."""
    db.execute(KEEP, (app, "token", "ever", db.execute(NEXT_CALL).fetchone()[0]))


def forget_idle(db: Connection, before: float) -> None:
    """Let go of closed windows that began before a time, and of sessions and agents whose calls have all been carried."""
    db.execute(PASSED, (before,))
    db.execute(FORGET.format(instr=db.engine.instr))
    db.execute(FORGET_CARRIED)


def _kept(db: Connection) -> dict[KeptPart, int]:
    """Return the parts of which balances are kept, each with the first call that counts; 0: all do."""
    return {(app, kind, window): since_id for app, kind, window, since_id in db.execute(KEPT_OF_ALL).fetchall()}


def _first_call(db: Connection, window: Window, windows: Starts) -> int:
    """Return the first call that is to count in a window; 0 where there is none, or for `ever`."""
    return 0 if window == "ever" else int(db.execute(FIRST_SINCE, (windows.of(window),)).fetchone()[0])


def _clear(db: Connection, part: KeptPart) -> None:
    app, kind, window = part
    db.execute('DELETE FROM kept_parts WHERE app = $1 AND kind = $2 AND "window" = $3', part)
    begins = f"{app_scope(app)} {kind}:"
    db.execute('DELETE FROM part_balances WHERE substr(scope, 1, length($1)) = $1 AND "window" = $2', (begins, window))


@lru_cache
def _look(count: int) -> str:
    """Return the question of what is kept for an app, how many new names it has had today, and which of so many scopes are known."""
    return f"""
    SELECT 'kept' AS what, kind AS name, "window", 0 AS names FROM kept_parts WHERE app = $1
    UNION ALL SELECT 'names', '', '', names FROM part_names WHERE app = $1 AND {OF_THE_DAY.format(day="$2")}
    UNION ALL SELECT DISTINCT 'known', scope, '', 0 FROM part_balances WHERE scope IN ({numbers(count, 3)})
    """
