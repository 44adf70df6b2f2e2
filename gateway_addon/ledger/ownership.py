"""Keep which app owns a batch or a file, in the workspace that all apps share at the provider. Statements on a given connection.

Promises that an id belongs for good to the app that made it through the gateway: no second app takes it over.
"""

from collections.abc import Iterable
from itertools import batched
from typing import Literal, NamedTuple

from gateway_addon.ledger.sql import Connection, Row, named, numbers

Kind = Literal["batch", "file"]


class OwnedObject(NamedTuple):
    """An app's batch or file. `content` is the API's JSON object, as last seen. Gone: the app had it deleted."""

    id: str
    kind: Kind
    app: str
    made_at: float
    content: str
    gone: bool = False


class OwnedPage(NamedTuple):
    """A part of an app's list, the newest first."""

    items: tuple[OwnedObject, ...]
    more: bool


_COLUMNS = "id, kind, app, made_at, object, gone_at IS NOT NULL"
OWN = "INSERT INTO belongings (id, kind, app, made_at, object) VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING"
FIND = f"SELECT {_COLUMNS} FROM belongings WHERE id = $1"
OWNERS = "SELECT id, app FROM belongings WHERE gone_at IS NULL AND id IN ({})"
AT_ONCE = 500  # ids in a statement
NEWEST = named(f"""
SELECT {_COLUMNS} FROM belongings WHERE app = $app AND kind = $kind AND gone_at IS NULL
ORDER BY made_at DESC, id DESC LIMIT $limit
""")
AFTER = named(f"""
SELECT {_COLUMNS} FROM belongings WHERE app = $app AND kind = $kind AND gone_at IS NULL
  AND (made_at < $made_at OR (made_at = $made_at AND id < $id))
ORDER BY made_at DESC, id DESC LIMIT $limit
""")
BEFORE = named(f"""
SELECT {_COLUMNS} FROM belongings WHERE app = $app AND kind = $kind AND gone_at IS NULL
  AND (made_at > $made_at OR (made_at = $made_at AND id > $id))
ORDER BY made_at, id LIMIT $limit
""")


def own(db: Connection, belonging: OwnedObject) -> bool:
    """Enter an object that an app has made; False where the id has an owner already."""
    return db.execute(OWN, belonging[:5]).rowcount == 1


def find(db: Connection, id: str) -> OwnedObject | None:
    rows = db.execute(FIND, (id,)).fetchall()
    return _belonging(rows[0]) if rows else None


def owners(db: Connection, ids: Iterable[str]) -> dict[str, str]:
    """Return, by id, the apps that own these ids; unknown and deleted ones are left out."""
    found: dict[str, str] = {}
    for some in batched(sorted(set(ids)), AT_ONCE):
        found.update(dict(db.execute(OWNERS.format(numbers(len(some))), some).fetchall()))
    return found


def chosen(db: Connection, app: str, kind: Kind, ids: Iterable[str]) -> tuple[OwnedObject, ...]:
    """Return the objects of these ids that an app owns, in their order."""
    found = (find(db, id) for id in dict.fromkeys(ids))
    return tuple(each for each in found if each is not None and (each.app, each.kind, each.gone) == (app, kind, False))


def page(
    db: Connection, app: str, kind: Kind, limit: int, *, after: OwnedObject | None = None, before: OwnedObject | None = None
) -> OwnedPage:
    """Return at most `limit` of an app's objects: the newest, or those next to one of them."""
    cursor = after or before
    values = {"app": app, "kind": kind, "limit": limit + 1}
    if cursor is not None:
        values |= {"made_at": cursor.made_at, "id": cursor.id}
    rows = db.execute(NEWEST if cursor is None else AFTER if after else BEFORE, values).fetchall()
    items = [_belonging(row) for row in rows[:limit]]
    return OwnedPage(tuple(reversed(items)) if before else tuple(items), len(rows) > limit)


def seen(db: Connection, id: str, content: str) -> None:
    """Keep an object as it was just seen."""
    db.execute("UPDATE belongings SET object = $1 WHERE id = $2", (content, id))


def gone(db: Connection, id: str, now: float) -> None:
    """Mark an object as deleted. Its id stays taken."""
    db.execute("UPDATE belongings SET gone_at = $1 WHERE id = $2 AND gone_at IS NULL", (now, id))


def _belonging(row: Row) -> OwnedObject:
    id, kind, app, made_at, content, gone = row
    return OwnedObject(id, kind, app, made_at, content, bool(gone))
