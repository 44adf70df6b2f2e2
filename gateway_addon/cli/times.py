"""Times as people write and read them on a command line: in the gateway's zone, which each printed time names."""

import re
from datetime import UTC, datetime, tzinfo

from gateway_addon.windows import shown

WHEN = "A date's first moment in the gateway's zone (2026-12-01), or a while ago (7d, 12h)"
"""The help of an option whose value `since` reads."""

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def duration_s(text: str) -> float:
    """Return the seconds of `90s`, `15m`, `12h`, `30d`, `2w`. Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})\s*([smhdw])", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write one like 15m, 12h or 30d")
    return int(match[1]) * _UNITS_S[match[2]]


def moment(text: str, now: float, zone: tzinfo) -> float:
    """Return the unix seconds of a date (`2026-12-01`, its first instant in the zone), a time (`2026-12-01T18:00`), or a duration from now.

    Raises ValueError for anything else.
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        try:
            return now + duration_s(text)
        except ValueError:
            raise ValueError(f"{text!r} is neither a date like 2026-12-01 nor a duration like 12h or 30d") from None
    return (at if at.tzinfo else at.replace(tzinfo=zone)).timestamp()


def start_of_day(text: str) -> float:
    """Return the unix seconds at which a day of UTC begins, as `2026-12-01`. Raises ValueError for anything else."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except (TypeError, ValueError):
        raise ValueError(f"{text!r} is not a day; write YYYY-MM-DD") from None


def to_come(text: str, now: float, zone: tzinfo) -> float:
    """Return the unix seconds of an end that lies ahead. Raises ValueError for one that has passed, with what was probably meant."""
    at = moment(text, now, zone)
    if at > now:
        return at
    passed, today = datetime.fromtimestamp(at, zone), datetime.fromtimestamp(now, zone)
    for year in (today.year, today.year + 1, today.year + 4):  # four: the 29th of February
        try:
            meant = passed.replace(year=year)
        except ValueError:
            continue
        if meant > today:
            return _refuse(text, shown(now, zone), f"{meant:%Y-%m-%d}")
    return _refuse(text, shown(now, zone), "12h")


def _refuse(text: str, today: str, meant: str) -> float:
    raise ValueError(f"{text} is past, so it would have no effect (it is {today}); did you mean {meant}?")


def since(text: str, now: float, zone: tzinfo) -> float:
    """Return the unix seconds of a date, or of a while ago (`7d`). Raises ValueError for anything else."""
    try:
        return now - duration_s(text)
    except ValueError:
        return moment(text, now, zone)


def spell(text: str) -> str:
    """Return what `since` read as a sentence ends with it: `since 2026-12-01`, `in the last 7d`."""
    try:
        duration_s(text)
    except ValueError:
        return f"since {text}"
    return f"in the last {text}"


def shown_or_never(at: float | None, zone: tzinfo) -> str:
    """Return a time for people; "never" where there was none."""
    return "never" if at is None else shown(at, zone)
