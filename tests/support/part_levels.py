"""What stood against the caps of an app's parts at each moment of a crowd, from the entries alone, and what that says of the refusals."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ledgers import rows

from gateway_addon.ledger import ServerAddress, part_of, part_scope
from gateway_addon.ledger.parts import OTHERS

WAITED_S = 3.0
"""A call that is refused for what others hold has waited for it; its row bears the time at which it came."""

type PartCaps = Mapping[tuple[str, str], int]
"""By the kind of a part and a window: the cap in nano-dollars, the same for each part."""

_LEVELS = """
SELECT scope, "window", call_id, kind, at, spent_nano, taken_nano, kept_nano FROM (
  SELECT scope, "window", call_id, entries.id, entries.kind, at, sum(spent_nano) OVER its AS spent_nano,
    sum(spent_nano + reserved_nano) OVER its AS taken_nano, sum(spent_nano + reserved_nano + entries.quantum_nano) OVER its AS kept_nano
  FROM entries JOIN part_frames USING (call_id) WINDOW its AS (PARTITION BY scope, "window", window_start ORDER BY entries.id)) AS levels
ORDER BY id
"""
_REFUSED = """
SELECT refusal, started_at, quote_nano, app, session_id, user_id, model_asked, token_id, labels FROM calls WHERE state = 'refused'
"""


class Level(NamedTuple):
    """How a part stood after an entry. `kept_nano`: with what running streams keep free for their next step."""

    scope: str
    window: str
    call_id: int
    kind: str
    at: float
    spent_nano: int
    taken_nano: int
    kept_nano: int


def part_levels(place: Path | ServerAddress) -> list[Level]:
    return [Level(*row) for row in rows(place, _LEVELS)]


def passed(levels: list[Level], caps: PartCaps) -> list[Level]:
    """The levels above a cap."""
    return [level for level in levels if level.taken_nano > caps.get((part_of(level.scope)[0], level.window), level.taken_nano)]


def refused_though_they_fit(place: Path | ServerAddress, levels: list[Level], caps: PartCaps) -> list[tuple]:
    """The refusals by a cap that no cap explains: what was asked for fits in every part of the call, at any time around its refusal."""
    by_part = defaultdict(list)
    for level in levels:
        by_part[level.scope, level.window].append(level)
    wrong = []
    for refusal, at, asked_nano, app, session, user, model, token, labels in rows(place, _REFUSED):
        named = {"session": session, "user": user, "model": model, "token": str(token)}
        named |= {f"label.{name}": value for name, value in json.loads(labels or "{}").items()}
        taken_nano = {"quote_over_cap": lambda its, at: 0, "cap_spent": _spent_nano, "cap_held": _highest_nano}.get(refusal)
        if taken_nano is None:
            continue
        rooms = [
            cap_nano - max(taken_nano(by_part[part_scope(app, (kind, value)), window], at) for value in (named[kind], OTHERS))
            for (kind, window), cap_nano in caps.items()
        ]
        if asked_nano <= min(rooms):
            wrong.append((refusal, at, asked_nano, named, rooms))
    return wrong


def _spent_nano(levels: list[Level], at: float) -> int:
    """What was spent in the end: it only grows."""
    return max((level.spent_nano for level in levels), default=0)


def _highest_nano(levels: list[Level], at: float) -> int:
    """The highest level around a time, the last one before it too."""
    before = [level.kept_nano for level in levels if level.at < at - WAITED_S]
    return max([*before[-1:], *(level.kept_nano for level in levels if abs(level.at - at) <= WAITED_S)], default=0)
