"""Change caps, pauses and tokens from the console, as the commands do: read a form, say what it would do, do it.

Promises that a change is done as it was shown: the page that asks for a confirmation keeps it under a word of its own, and only that
word, once, comes back. Each is one transaction with its audit row, by the commands' own functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway_addon.ledger import TOTAL, ServerAddress, admin, connect
from gateway_addon.ledger.reports import sessions
from gateway_addon.ledger.reservations import zone
from gateway_addon.ledger.scope import named as named_by_commands
from gateway_addon.ledger.scope import part_within, typed
from gateway_addon.ledger.sql import Connection
from gateway_addon.money import dollars, parse_nano
from gateway_addon.operations import changes
from gateway_addon.operations.changes import scope_of
from gateway_addon.policy import outline
from gateway_addon.windows import WINDOWS, per, shown

HOURS = (1, 4, 8, 24, 72, 168)


@dataclass(frozen=True, slots=True)
class ChangeForm:
    """A filled-in form, as it was sent."""

    action: str
    fields: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        return self.fields.get(name, "").strip()

    def flag(self, name: str) -> bool:
        return self[name] == "yes"


@dataclass(frozen=True, slots=True)
class AskedChange:
    """A change as it is to be confirmed. `back`: the scope whose page shows it."""

    action: str
    sentence: str
    button: str
    back: str
    run: Callable[[Connection, str, float], object]
    """Do it, inside a write transaction: by whom, and when. Raises ValueError."""

    is_grave: bool = False
    """It takes something away from apps that run."""


def prepare(form: ChangeForm, db: Connection, policies: Path, now: float) -> AskedChange:
    """Return the change that a form asks for, nothing of it done. Raises ValueError with a sentence for what makes no sense."""
    if form.action not in ACTIONS:
        raise ValueError(f"There is no change {form.action[:40]!r}; there are {', '.join(ACTIONS)}.")
    return ACTIONS[form.action](form, db, policies, now)


def run(ledger: Path | ServerAddress, change: AskedChange, who: str, now: float) -> None:
    """Do a change that was confirmed. Raises ValueError where it has no effect any more."""
    with connect.changing(ledger) as db:
        change.run(db, who, now)


def _pause(form: ChangeForm, db: Connection, policies: Path, now: float) -> AskedChange:
    scope, hours, cut, why = _scope(form, db, policies), form["hours"], form.flag("cut"), form["why"]
    until = None if hours == "" else _until(hours, now)
    ending = "until it is resumed" if until is None else f"until {shown(until, zone(db))}"
    sentence = f"Refuse every further call of {named(scope)} {ending}. Calls in flight {'are cut' if cut else 'may finish'}."

    def run(db: Connection, who: str, now: float) -> None:
        admin.pause(db, scope, until=until, cut=cut, who=who, why=why, now=now)

    return AskedChange("pause", sentence, f"Pause {named(scope)}", scope, run, is_grave=True)


def _resume(form: ChangeForm, db: Connection, policies: Path, _now: float) -> AskedChange:
    scope, why = _scope(form, db, policies), form["why"]

    def run(db: Connection, who: str, now: float) -> None:
        if not admin.resume(db, scope, who=who, why=why, now=now):
            raise ValueError(f"{named(scope)} is not paused.")

    return AskedChange("resume", f"Let {named(scope)} call again.", f"Resume {named(scope)}", scope, run)


def _scope(form: ChangeForm, db: Connection, policies: Path) -> str:
    """Return the scope of the form, or of a session within it."""
    scope, session = scope_of(form["scope"], db, outline(policies)), form["session"]
    if session and not sessions.is_known(db, session):
        raise ValueError(f"No call carries the session {session[:40]!r}.")
    return part_within(scope, ("session", session)) if session else scope


def _raise(form: ChangeForm, db: Connection, policies: Path, now: float) -> AskedChange:
    found, window, lift, why = outline(policies), _window(form), form.flag("lift"), form["why"]
    scope, amount_nano, until = _scope(form, db, policies), parse_nano(form["amount"]), _until(form["hours"], now)
    base_nano = changes.base_nano(db, found, scope, window)
    above = "its cap" if base_nano is None else f"its {dollars(base_nano)}"
    sentence = f"Let {named(scope)} spend {dollars(amount_nano)} above {above} {per(window)}, until {shown(until, zone(db))}."
    beside = [each for each in admin.raises(db, now=now) if (each.scope, each.window) == (scope, window)]
    if beside:
        sentence += f" It adds to {dollars(sum(each.amount_nano for each in beside))} of earlier raises."

    def run(db: Connection, who: str, now: float) -> None:
        changes.raise_cap(db, found, scope, window, amount_nano, until=until, lift_limit=lift, who=who, why=why, now=now)

    return AskedChange("raise", sentence, f"Raise by {dollars(amount_nano)}", scope, run)


def _limit(form: ChangeForm, db: Connection, policies: Path, _now: float) -> AskedChange:
    found, window = outline(policies), _window(form)
    scope, amount_nano, why = _scope(form, db, policies), parse_nano(form["amount"]), form["why"]
    changes.base_nano(db, found, scope, window)

    def run(db: Connection, who: str, now: float) -> None:
        changes.limit_cap(db, found, scope, window, amount_nano, who=who, why=why, now=now)

    most = f"{dollars(amount_nano)} {per(window)}"
    sentence = f"Let {named(scope)} spend no more than {most}, whatever its raises, until the limit is lifted."
    return AskedChange("limit", sentence, f"Limit to {dollars(amount_nano)}", scope, run, is_grave=True)


def _lift(form: ChangeForm, db: Connection, policies: Path, _now: float) -> AskedChange:
    scope, window, why = _scope(form, db, policies), _window(form), form["why"]

    def run(db: Connection, who: str, now: float) -> None:
        if admin.lift_limit(db, scope, window, who=who, why=why, now=now) is None:
            raise ValueError(f"{named(scope)} has no limit {per(window)}.")

    sentence = f"Lift the limit: {named(scope)} may spend up to its cap {per(window)} again, raises included."
    return AskedChange("lift", sentence, "Lift the limit", scope, run)


def _withdraw(form: ChangeForm, db: Connection, _policies: Path, now: float) -> AskedChange:
    number, why = _number(form["id"], "raise"), form["why"]
    found = next((each for each in admin.raises(db, now=now) if each.id == number), None)
    if found is None:
        raise ValueError(f"No raise {number} is in force.")

    def run(db: Connection, who: str, now: float) -> None:
        admin.withdraw_raise(db, number, who=who, why=why, now=now)

    more = f"{dollars(found.amount_nano)} above its cap {per(found.window)}"
    sentence = f"Take raise {number} back: {named(found.scope)} may no longer spend {more}."
    return AskedChange("withdraw", sentence, "Withdraw the raise", found.scope, run, is_grave=True)


def _revoke(form: ChangeForm, db: Connection, policies: Path, now: float) -> AskedChange:
    scope, number, why = scope_of(form["scope"], db, outline(policies)), _number(form["id"], "token"), form["why"]
    app = typed(scope)
    token = next((each for each in admin.tokens(db, app) if each.id == number and each.refusal(now) is None), None)
    if token is None:
        raise ValueError(f"{app} has no token {number} in force.")

    def run(db: Connection, who: str, now: float) -> None:
        if not admin.revoke_tokens(db, app, token_id=number, who=who, why=why, now=now):
            raise ValueError(f"{app} has no token {number} in force.")

    sentence = f"Revoke token #{number} {token.label} of {app} for good. It holds from the next request on; calls in flight finish."
    return AskedChange("revoke", " ".join(sentence.split()), f"Revoke token #{number}", scope, run, is_grave=True)


ACTIONS: dict[str, Callable[[ChangeForm, Connection, Path, float], AskedChange]] = {
    "pause": _pause,
    "resume": _resume,
    "raise": _raise,
    "limit": _limit,
    "lift": _lift,
    "withdraw": _withdraw,
    "revoke": _revoke,
}


def named(scope: str) -> str:
    """Return a scope as the console's sentences call it."""
    return "all apps" if scope == TOTAL else named_by_commands(scope)


def _window(form: ChangeForm) -> str:
    if form["window"] not in WINDOWS:
        raise ValueError(f"{form['window'][:40]!r} is no window of a cap; there are {', '.join(WINDOWS)}.")
    return form["window"]


def _until(text: str, now: float) -> float:
    hours = _number(text, "hours")
    if not 1 <= hours <= 24 * 366:
        raise ValueError("Say for how many hours: 1 to 8,784.")
    return now + hours * 3600


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ValueError(f"{text[:40]!r} is no number of {'a ' * (what != 'hours')}{what}.")
    return int(text)
