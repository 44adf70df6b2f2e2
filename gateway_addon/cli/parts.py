"""The options that name a part of an app (`--session 3f2a`, `--label client=acme`), as every command that has them takes them."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from gateway_addon.cli.common import ROW_NUMBER, stop
from gateway_addon.cli.labels import label_option
from gateway_addon.ledger import ServerAddress, connect
from gateway_addon.ledger.reports import sessions
from gateway_addon.ledger.scope import AppPart
from gateway_addon.names import safe_name
from gateway_addon.policy import PolicyError, load_prices

_OPTIONS = (
    click.option("--session", metavar="ID", help="Calls of this session, by its id or the beginning of it."),
    click.option("--agent", metavar="ID", help="Calls of this agent."),
    click.option("--user", metavar="ID", help="Calls for this end user."),
    label_option("Calls with this label."),
)
_CAPPED_OPTIONS = (
    click.option("--model", metavar="NAME", help="Calls to this model."),
    click.option("--token", metavar="NUMBER", type=ROW_NUMBER, help="Calls with this token (see token list)."),
)


def part_option[F: Callable[..., Any]](*, capped: bool = False) -> Callable[[F], F]:
    """Return the options, of which one may be given; the command gets `part`, None without one. `capped`: of all that caps know."""

    def with_options(command: F) -> F:
        @wraps(command)
        def with_part(*args: Any, session: str | None, agent: str | None, user: str | None, labels: Any, **others: Any) -> Any:
            model, token = others.pop("model", None), others.pop("token", None)
            texts = {"session": session, "agent": agent, "user": user, "model": model, "token": token and str(token)}
            found = [(kind, safe_name(text.strip())) for kind, text in texts.items() if text is not None]
            found += [(f"label.{name}", text) for name, text in labels]
            if not all(text for _, text in found):  # an empty variable of a shell must not mean the whole app
                stop("The name of a session, an agent, a user or a model is empty.")
            if len(found) > 1:
                stop(f"Name one part of an app: a session, an agent, a user{', a model, a token' * capped} or a label.")
            return command(*args, part=found[0] if found else None, **others)

        decorated: Any = with_part
        for option in reversed((*_OPTIONS, *_CAPPED_OPTIONS) if capped else _OPTIONS):
            decorated = option(decorated)
        return decorated  # type: ignore[no-any-return]

    return with_options


def meant(part: AppPart | None, ledger: Path | ServerAddress, policies: Path) -> tuple[AppPart | None, bool]:
    """Return the part that was meant (the whole id of a session, a model's own name), and whether a late call had it.

    Raises ValueError for a session that is not known, and for a model without a price.
    """
    if part is None:
        return None, True
    kind, text = part
    if kind == "model":
        return (kind, _canonical(text, policies)), True
    if kind == "token":
        return part, True
    with connect.reading(ledger) as db:
        if kind == "session":
            return (kind, sessions.named(db, text)), True
        return part, sessions.seen(db, part)


def _canonical(model: str, policies: Path) -> str:
    """Return the name under which calls to a model count; the name itself where the prices cannot be read now."""
    try:
        found = load_prices(policies).canonical(model)
    except PolicyError:
        return model
    if found is None:
        raise ValueError(f"no model {model!r} has a price")
    return found
