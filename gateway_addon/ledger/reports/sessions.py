"""Sum sessions: those that are at work, and one with the tree of its agents. Read-only; the connection yields rows by name.

A session is known by the id that its calls carry, beside the app that made them. Its spending is that of all its calls, from an index
that leads from a session to its calls: a session of an hour costs a look at its calls, however many others there are. `lately` and
`newest`, for pages that renew themselves, look at no more than LOOKED_MAX calls, and say which.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway_addon.ledger import sql
from gateway_addon.ledger.reports.call_sums import label_column
from gateway_addon.ledger.scope import AppPart
from gateway_addon.ledger.sql import Connection

RATE_S = 600
"""The time by whose bookings a session's rate is told."""
HOUR_S = 3600
CUT_CODES = ("cap_spent", "quote_over_cap", "app_paused")
"""Refusals after which a program that goes on as before is refused again."""
LOOKED_MAX = 600
"""Calls that one look at sessions sums, where it is bounded."""
LATEST = 100_000
"""Calls that are looked through for a name that no index has."""
NEAR_MAX = 5
"""Sessions that are named where a beginning of an id fits several."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session of an app, with the sums of its calls. Times are unix seconds."""

    app: str
    session: str
    user_id: str | None
    started_at: float
    last_at: float
    agents: int
    """Agents with an id: the main one has none."""
    calls: int
    open: int
    refused: int
    spent_nano: int
    held_nano: int
    recent_nano: int
    """Booked in the last RATE_S seconds."""
    hour_nano: int
    """Booked in the last hour."""

    @property
    def rate_nano(self) -> int:
        """Return what it would spend in an hour at the pace of the last RATE_S seconds."""
        return self.recent_nano * HOUR_S // RATE_S


@dataclass(frozen=True, slots=True)
class AgentLine:
    """One agent on one model: the sums of its calls in a session. `agent` None: the main one."""

    agent: str | None
    parent: str | None
    model: str
    calls: int
    refused: int
    spent_nano: int
    held_nano: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    app: str
    user_id: str | None
    started_at: float
    last_at: float
    open: int
    recent_nano: int
    hour_nano: int


@dataclass(frozen=True, slots=True)
class SessionStory:
    """A session with what each of its agents did on each model, the dearest first."""

    session: Session
    agents: tuple[AgentLine, ...]
    calls: tuple[int, ...] = ()
    """The numbers of the calls that were looked at, the newest first, where they are told."""
    has_older: bool = False
    """The session has calls before those, which the sums leave out."""


_CALLS = ", ".join(
    f"calls.{name}"
    for name in ("id", "app", "session_id", "user_id", "agent_id", "parent_agent_id", "model_asked", "state", "started_at", "ended_at")
)
_COUNTS = """
  max(user_id) AS user_id, min(started_at) AS started_at, max(coalesce(ended_at, started_at)) AS last_at,
  count(*) FILTER (WHERE state IN ('open', 'settled', 'voided')) AS calls, count(*) FILTER (WHERE state = 'open') AS open,
  count(*) FILTER (WHERE state = 'refused') AS refused"""
_MONEY = """
  sum(spent_nano) AS spent_nano, sum(entries.reserved_nano) AS held_nano,
  sum(CASE WHEN at >= $recent_since THEN spent_nano ELSE 0 END) AS recent_nano,
  sum(CASE WHEN at >= $hour_since THEN spent_nano ELSE 0 END) AS hour_nano"""
_AMOUNTS = ", ".join(f"coalesce({name}, 0) AS {name}" for name in ("spent_nano", "held_nano", "recent_nano", "hour_nano"))
_SESSIONS = f"""
WITH chosen AS MATERIALIZED ({{chosen}}),
seen AS (SELECT app, session_id, count(DISTINCT agent_id) AS agents, {_COUNTS} FROM chosen GROUP BY app, session_id),
money AS (
  SELECT app, session_id, {_MONEY} FROM chosen CROSS JOIN entries WHERE entries.call_id = chosen.id GROUP BY app, session_id)
SELECT seen.app AS app, seen.session_id AS session, user_id, started_at, last_at, agents, calls, open, refused, {_AMOUNTS}
FROM seen LEFT JOIN money ON money.app = seen.app AND money.session_id = seen.session_id
ORDER BY last_at DESC, seen.app, seen.session_id
"""
_SINCE = "session_id IS NOT NULL AND started_at >= $since"
_WHOLE = f"""
SELECT {_CALLS} FROM (SELECT DISTINCT app, session_id FROM calls WHERE {_SINCE}) AS live CROSS JOIN calls
WHERE calls.session_id = live.session_id AND calls.app = live.app"""
_LATELY = f"SELECT {_CALLS} FROM calls WHERE {_SINCE}"
_LOOK = "SELECT started_at FROM calls WHERE started_at >= $1 ORDER BY started_at DESC LIMIT 1 OFFSET $2"
_NEWEST = "SELECT id FROM calls WHERE session_id = $1 AND app = $2 AND id < $3 ORDER BY id DESC LIMIT $4"

_KEY = "app, agent_id, coalesce(model_asked, '(none)') AS model"
_AGENTS = f"""
WITH chosen AS MATERIALIZED (SELECT {_CALLS} FROM calls WHERE {{which}}),
seen AS (SELECT {_KEY}, max(parent_agent_id) AS parent, {_COUNTS} FROM chosen GROUP BY 1, 2, 3),
money AS (SELECT {_KEY}, {_MONEY} FROM chosen CROSS JOIN entries WHERE entries.call_id = chosen.id GROUP BY 1, 2, 3),
metered AS (
  SELECT app, agent_id, coalesce(model_asked, '(none)') AS asked, sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens,
    sum(cache_read_tokens) AS cache_read_tokens,
    sum(cache_write_5m_tokens + cache_write_1h_tokens + cache_write_unsplit_tokens) AS cache_write_tokens
  FROM chosen CROSS JOIN usage WHERE usage.call_id = chosen.id GROUP BY 1, 2, 3)
SELECT seen.app AS app, seen.agent_id AS agent, parent, seen.model AS model, user_id, started_at, last_at, calls, open, refused, {_AMOUNTS},
  coalesce(input_tokens, 0) AS input_tokens, coalesce(output_tokens, 0) AS output_tokens,
  coalesce(cache_read_tokens, 0) AS cache_read_tokens, coalesce(cache_write_tokens, 0) AS cache_write_tokens
FROM seen
  LEFT JOIN money ON money.app = seen.app AND money.agent_id IS NOT DISTINCT FROM seen.agent_id AND money.model = seen.model
  LEFT JOIN metered ON metered.app = seen.app AND metered.agent_id IS NOT DISTINCT FROM seen.agent_id AND metered.asked = seen.model
ORDER BY spent_nano DESC, seen.agent_id, seen.model
"""
_THERE = "SELECT 1 FROM calls WHERE session_id = $1 LIMIT 1"
_BEGINNING = """
SELECT DISTINCT session_id FROM calls WHERE session_id IS NOT NULL AND substr(session_id, 1, length(CAST($1 AS TEXT))) = $1
ORDER BY session_id LIMIT $2
"""


def active(db: Connection, *, since: float, now: float) -> list[Session]:
    """Return the sessions with a call admitted or refused since a time, the latest first, with the sums of all their calls."""
    return _sessions(db, _WHOLE, since, now)


def lately(db: Connection, *, since: float, now: float) -> tuple[list[Session], float]:
    """Return those sessions with the sums of their calls since that time alone, and the time.

    It is a later one where more than LOOKED_MAX calls came since.
    """
    looked = db.execute(_LOOK, (since, LOOKED_MAX - 1)).fetchone()
    since = looked[0] if looked else since
    return _sessions(db, _LATELY, since, now), since


def one(db: Connection, session: str, *, now: float) -> list[SessionStory]:
    """Return a session with all its calls, once for each app whose calls carry its id, the latest first."""
    by_app: dict[str, list[AgentLine]] = {}
    for line in _agents(db, "session_id = $session", {"session": session}, now):
        by_app.setdefault(line.app, []).append(line)
    stories = [SessionStory(_summed(session, lines), tuple(lines)) for lines in by_app.values()]
    return sorted(stories, key=lambda each: -each.session.last_at)


def newest(db: Connection, app: str, session: str, *, below: int, now: float) -> SessionStory | None:
    """Return a session of an app with its newest calls of a number below this, LOOKED_MAX of them; None where it has none."""
    ids = [row[0] for row in db.execute(_NEWEST, (session, app, below, LOOKED_MAX + 1)).fetchall()]
    looked = ids[:LOOKED_MAX]
    if not looked:
        return None
    which = "session_id = $session AND app = $app AND id >= $first AND id <= $last"
    lines = _agents(db, which, {"session": session, "app": app, "first": looked[-1], "last": looked[0]}, now)
    return SessionStory(_summed(session, lines), tuple(lines), tuple(looked), len(ids) > LOOKED_MAX)


def fast(db: Connection, app: str, over_nano: int, *, now: float) -> list[tuple[str, int]]:
    """Return the sessions of an app for which more than this was booked in the last hour, each with that amount."""
    booked = sql.named("""
    SELECT session_id, sum(spent_nano) FROM calls CROSS JOIN entries
    WHERE entries.call_id = calls.id AND started_at >= $since AND app = $app AND session_id IS NOT NULL AND at >= $hour_since
    GROUP BY session_id HAVING sum(spent_nano) > $over_nano ORDER BY session_id
    """)
    values = {"app": app, "since": now - 2 * HOUR_S, "hour_since": now - HOUR_S, "over_nano": over_nano}  # a call may take an hour
    return [(row[0], row[1]) for row in db.execute(booked, values).fetchall()]


def agents_of_token(db: Connection, token_id: int, *, since: float, now: float) -> list[AgentLine]:
    """Return what each agent did on each model by a token, since a time, the dearest first."""
    return _agents(db, "started_at >= $since AND token_id = $token", {"token": token_id, "since": since}, now)


def open_and_cut(db: Connection, token_id: int, *, since: float) -> tuple[int, int]:
    """Return how many calls of a token run still, and how many a cap or a pause ended or kept from beginning."""
    counted = sql.named(f"""
    SELECT count(*) FILTER (WHERE state = 'open'),
      count(*) FILTER (WHERE refusal IN ({", ".join(f"'{code}'" for code in CUT_CODES)}) OR {db.engine.instr}(flags, 'cut:') > 0)
    FROM calls WHERE started_at >= $since AND token_id = $token
    """)
    [(still_open, cut)] = db.execute(counted, {"since": since, "token": token_id}).fetchall()
    return still_open, cut


def is_known(db: Connection, session: str) -> bool:
    """Return whether a call carries this id of a session."""
    return bool(db.execute(_THERE, (session,)).fetchall())


def named(db: Connection, text: str) -> str:
    """Return the id of the one session that is called so, or whose id begins so. Raises ValueError where there is none, or are several."""
    if is_known(db, text):
        return text
    found = [row[0] for row in db.execute(_BEGINNING, (text, NEAR_MAX + 1)).fetchall()]
    if len(found) == 1:
        return str(found[0])
    if not found:
        raise ValueError(f"no session {text!r} in this ledger")
    more = " or another" if len(found) > NEAR_MAX else ""
    raise ValueError(f"session {text!r} may be {', '.join(found[:NEAR_MAX])}{more}; write more of its id")


def seen(db: Connection, part: AppPart) -> bool:
    """Return whether one of the latest calls belongs to a part of an app: an agent, a user, a label."""
    latest = f"SELECT 1 FROM calls WHERE id > (SELECT max(id) FROM calls) - {LATEST} AND {_column(db, part[0])} = $1 LIMIT 1"
    return bool(db.execute(latest, (part[1],)).fetchall())


def counted_as(db: Connection, app: str, part: AppPart) -> AppPart:
    """Return the part in which the latest call of this part was counted: itself, or the one that it shares with other new names."""
    kind, value = part
    if kind in ("model", "token"):
        return part
    since = "" if kind == "session" else f"AND id > (SELECT max(id) FROM calls) - {LATEST}"
    found = db.execute(f"""
    SELECT {db.engine.json_value.format("app_parts", f"'{kind}'")} FROM calls
    WHERE {_column(db, kind)} = $1 AND app = $2 AND app_parts IS NOT NULL {since} ORDER BY id DESC LIMIT 1
    """, (value, app)).fetchone()  # fmt: skip
    return kind, found[0] if found and found[0] else value


def _column(db: Connection, kind: str) -> str:
    """Return the column of the name of a part. Raises ValueError for a label that is no name."""
    columns = {"agent": "agent_id", "user": "user_id", "session": "session_id"}
    return columns[kind] if kind in columns else label_column(db.engine, kind.removeprefix("label."))


def tree(lines: Sequence[AgentLine]) -> Iterator[tuple[int, str | None, list[AgentLine]]]:
    """Yield each agent with its depth and its lines, below the agent that started it; the main agent first, at depth 0.

    An agent whose parent made no call in this session stands below the main one, and so does one of a circle.
    """
    by_agent: dict[str | None, list[AgentLine]] = {None: []}
    for line in lines:
        by_agent.setdefault(line.agent, []).append(line)
    parents = {agent: next((line.parent for line in own if line.parent in by_agent), None) for agent, own in by_agent.items()}
    said: set[str | None] = set()

    def below(agent: str | None, depth: int) -> Iterator[tuple[int, str | None, list[AgentLine]]]:
        if agent in said:
            return
        said.add(agent)
        yield depth, agent, by_agent[agent]
        for child, parent in parents.items():
            if parent == agent and child is not None:
                yield from below(child, depth + 1)

    yield from below(None, 0)
    for agent in by_agent:
        yield from below(agent, 1)


def _sessions(db: Connection, chosen: str, since: float, now: float) -> list[Session]:
    rows = db.execute(sql.named(_SESSIONS.format(chosen=chosen)), {"since": since} | _spans(now)).fetchall()
    return [Session(**{name: row[name] for name in Session.__slots__}) for row in rows]


def _agents(db: Connection, which: str, values: dict[str, object], now: float) -> list[AgentLine]:
    rows = db.execute(sql.named(_AGENTS.format(which=which)), values | _spans(now)).fetchall()
    return [AgentLine(**{name: row[name] for name in AgentLine.__slots__}) for row in rows]


def _spans(now: float) -> dict[str, float]:
    return {"recent_since": now - RATE_S, "hour_since": now - HOUR_S}


def _summed(session: str, lines: Sequence[AgentLine]) -> Session:
    """Return the session of an app's lines."""
    users = [line.user_id for line in lines if line.user_id is not None]
    agents = {line.agent for line in lines if line.agent is not None}
    names = ("calls", "open", "refused", "spent_nano", "held_nano", "recent_nano", "hour_nano")
    sums = {name: sum(getattr(line, name) for line in lines) for name in names}
    times = min(line.started_at for line in lines), max(line.last_at for line in lines)
    return Session(lines[0].app, session, max(users, default=None), *times, len(agents), **sums)
