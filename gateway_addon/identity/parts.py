"""Find out from which part of an app a request comes: its session, its agent, the agent that started that one, its end user. Pure.

All of it is the client's word. Claude Code 2.1.330 says it in headers, and in `metadata.user_id` as JSON; all agents of one run send one
session id, so that id is the root session's; an agent that the main one started names no parent.
Promises that each is bounded and printable (names.py), and that no account id is kept.
"""

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

from gateway_addon.names import safe_name

USER_ID_CHARACTERS_MAX = 2_000
"""Longer than any form of Claude Code's; a longer one is not parsed, and only its beginning is kept."""
_HEADERS = {f"x-claude-code-{part}-id": part for part in ("session", "agent", "parent-agent")}
_OLD_FORM = re.compile(r"user_([0-9a-f]{64})_account_[0-9a-f-]{0,36}_session_([0-9a-f-]{36})")
"""`metadata.user_id` of Claude Code before 2.1.78."""


class Parts(NamedTuple):
    """The parts that a request names. None: it names none."""

    session: str | None = None
    agent: str | None = None
    parent_agent: str | None = None
    user: str | None = None


def parts_of(headers: Iterable[tuple[str, str]], user_id: object = None) -> Parts:
    """Return the parts that a request names. `headers` have lower-case names; `user_id` is the body's `metadata.user_id`."""
    said: dict[str, str] = {}
    for name, value in headers:
        if (part := _HEADERS.get(name)) is not None and part not in said:
            said[part] = value.strip()
    session, user = _user(user_id) if isinstance(user_id, str) else ("", "")
    named = said.get("session") or session, said.get("agent"), said.get("parent-agent"), user
    return Parts(*[(text and safe_name(text)) or None for text in named])


def _user(user_id: str) -> tuple[str, str]:
    """Return the session and the user that a `metadata.user_id` names: the device, where Claude Code wrote it; "" for what it lacks."""
    if len(user_id) <= USER_ID_CHARACTERS_MAX:
        if (old := _OLD_FORM.fullmatch(user_id)) is not None:
            return old[2], old[1]
        if user_id.startswith("{"):
            try:
                found = json.loads(user_id)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict) and isinstance(device := found.get("device_id"), str):
                session = found.get("session_id")
                return session if isinstance(session, str) else "", device
    return "", user_id.strip()
