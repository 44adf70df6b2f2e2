"""Tell what Claude Code loses by the way in which it is started, and what this machine's settings make of it. Pure.

How it is started decides which features it sends (its `anthropic-beta` header): captured with version 2.1.332 and 60 MCP tools, and held
against the real program by tests/clients/test_claude_code.py. Knows nothing of files and commands: it takes the environment and the
settings as values, and returns lines and findings.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from gateway_addon.money import cents
from gateway_addon.names import PROGRAM, TOKEN_PREFIX

API_HOST = "api.anthropic.com"
NAMES = (
    "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY", "ANTHROPIC_MODEL", "CLAUDE_CODE_USE_GATEWAY", "HTTPS_PROXY",
    "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY",
)  # fmt: skip
"""The variables that decide where its calls go and under whose name."""
SECRET = frozenset({"ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY", "HTTPS_PROXY"})
OFF = frozenset({"", "0", "false", "no", "off"})

type Start = Literal["proxy", "base_url", "gateway_mode", "past"]

NOT_BY_BASE_URL: Mapping[str, str] = {
    "prompt-caching-scope-2026-01-05": "the global cache scope",
    "cache-diagnosis-2026-04-07": "cache diagnostics",
    "mid-conversation-system-clear-at-2026-08-21": "clearing of system messages",
    "thinking-binding-controls-2026-08-01": "thinking controls",
}
"""Features, by their beta's name, that it leaves out with a base URL of another host."""
NOT_IN_GATEWAY_MODE: Mapping[str, str] = {
    **NOT_BY_BASE_URL,
    "context-management-2025-06-27": "context management",
    "per-turn-control-2026-07-01": "per-turn control",
    "mid-conversation-tool-changes-2026-07-01": "tool changes in mid-conversation",
    "advanced-tool-use-2025-11-20": "advanced tool use",
}
"""Features that it leaves out with CLAUDE_CODE_USE_GATEWAY=1."""
LOST: Mapping[Start, Mapping[str, str]] = {"proxy": {}, "base_url": NOT_BY_BASE_URL, "gateway_mode": NOT_IN_GATEWAY_MODE, "past": {}}
SAID: Mapping[Start, str] = {
    "proxy": "its calls go through a proxy: no feature is lost",
    "base_url": "its calls go to a base URL",
    "gateway_mode": "its calls go to a base URL in gateway mode: it shows your caps",
    "past": "its calls go to the API itself",
}


class Setting(NamedTuple):
    """A variable's value, and where it is set: a settings file, or the environment."""

    value: str
    where: str


class Diagnosis(NamedTuple):
    start: Start
    seen: list[str]
    findings: list[str]


def settings(environment: Mapping[str, str], files: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Setting]:
    """Return each variable of NAMES that is set, from the strongest place. `files`: the settings files read, the strongest first.

    A file's `env` goes before the environment of the shell.
    """
    found: dict[str, Setting] = {}
    for where, content in files:
        block = content.get("env")
        for name, value in block.items() if isinstance(block, Mapping) else ():
            if name in NAMES and name not in found:
                found[name] = Setting(str(value), where)
    for name in NAMES:
        if name not in found and (value := environment.get(name)):
            found[name] = Setting(value, "the environment")
    return found


def diagnose(found: Mapping[str, Setting], *, has_key_helper: bool, has_model: bool) -> Diagnosis:
    """Say how Claude Code starts here, what that loses, and what is wrong with it.

    `has_key_helper`, `has_model`: a settings file names `apiKeyHelper`, or `model`.
    """
    start = start_of(found)
    seen = [SAID[start]]
    if lost := LOST[start]:
        seen.append(f"lost by it: {', '.join(lost.values())}; `{PROGRAM} local --app APP -- claude` loses nothing")
    seen += [f"{name}={_shown(name, each.value)} (from {each.where})" for name, each in found.items()]
    return Diagnosis(start, seen, _findings(start, found, has_key_helper, has_model))


def start_of(found: Mapping[str, Setting]) -> Start:
    """Return how Claude Code starts with these settings."""
    base_url = found.get("ANTHROPIC_BASE_URL")
    if base_url is None or urlsplit(base_url.value).hostname == API_HOST:
        return "proxy" if "HTTPS_PROXY" in found else "past"
    mode = found.get("CLAUDE_CODE_USE_GATEWAY")
    return "gateway_mode" if mode is not None and mode.value.lower() not in OFF else "base_url"


def _findings(start: Start, found: Mapping[str, Setting], has_key_helper: bool, has_model: bool) -> list[str]:
    findings = [
        f"{name} is set ({found[name].where}): it calls a cloud, past the gateway. Take the variable away"
        for name in ("CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY")
        if name in found and found[name].value.lower() not in OFF
    ]
    if start == "past":
        findings.append(
            f"nothing leads its calls to the gateway: none is capped or recorded. Start it with `{PROGRAM} local --app APP -- claude`, "
            f"or paste what `{PROGRAM} token issue APP --for claude-code` prints"
        )
    if start in ("past", "proxy"):
        return findings
    base_url = found["ANTHROPIC_BASE_URL"]
    if (path := urlsplit(base_url.value).path.rstrip("/")) and not path.startswith("/l/"):
        root = base_url.value.removesuffix(urlsplit(base_url.value).path)
        findings.append(f"ANTHROPIC_BASE_URL has a path ({base_url.where}), and Claude Code adds /v1/messages to it: make it {root}")
    credentials = [name for name in ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY") if name in found]
    if not credentials and not has_key_helper:
        findings.append(f"no token is set: ANTHROPIC_AUTH_TOKEN holds what `{PROGRAM} token issue APP` prints")
    for name in credentials:
        if not found[name].value.startswith(TOKEN_PREFIX):
            findings.append(f"{name} ({found[name].where}) holds no gateway token, and it is sent to the gateway: replace it by one")
    if start == "gateway_mode" and "ANTHROPIC_MODEL" not in found and not has_model:
        findings.append("in gateway mode it starts on a model of its own choice: name one that the app may use in ANTHROPIC_MODEL")
    return findings


def _shown(name: str, value: str) -> str:
    if name not in SECRET:
        return value[:100]
    return f"{TOKEN_PREFIX}..." if value.startswith(TOKEN_PREFIX) else "..."


def status_line(me: Mapping[str, Any]) -> str:
    """Return the status line of an app by its `/gateway/me`: the app, and its fullest cap."""
    windows: Sequence[Mapping[str, Any]] = [each for each in me.get("windows", ()) if each.get("cap_nano")]
    if not windows:
        return f"{me['app']}: no cap"
    fullest = max(windows, key=lambda each: float(each["spent_nano"] / each["cap_nano"]))
    when = {"day": " today", "week": " this week", "month": " this month"}.get(fullest["window"], "")
    share = 100 * fullest["spent_nano"] // fullest["cap_nano"]
    left = cents(max(0, fullest["cap_nano"] - fullest["spent_nano"]))
    return f"{me['app']}: {cents(fullest['spent_nano'])} of {cents(fullest['cap_nano'])}{when} ({share} %), {left} left"
