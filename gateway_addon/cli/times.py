"""Times as people write and read them on a command line."""

import re
from datetime import UTC, datetime

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def duration_s(text: str) -> float:
    """Seconds of `90s`, `15m`, `12h`, `30d`, `2w`. Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})\s*([smhdw])", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write one like 15m, 12h or 30d")
    return int(match[1]) * _UNITS_S[match[2]]


def moment(text: str, now: float) -> float:
    """Unix seconds of a date (`2026-12-01`, its first instant in UTC), a time (`2026-12-01T18:00`), or a duration from now.

    Raises ValueError for anything else.
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        try:
            return now + duration_s(text)
        except ValueError:
            raise ValueError(f"{text!r} is neither a date like 2026-12-01 nor a duration like 12h or 30d") from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def since(text: str, now: float) -> float:
    """Unix seconds of a date, or of a while ago (`7d`). Raises ValueError for anything else."""
    try:
        return now - duration_s(text)
    except ValueError:
        return moment(text, now)


def day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
