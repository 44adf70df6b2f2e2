"""`gateway statusline`: one line for Claude Code's status line; and what `gateway doctor claude-code` reads on this machine."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from gateway_addon.http_client import Credential, Egress, Unanswered, ask, whole
from gateway_addon.names import PROGRAM
from gateway_addon.onboarding.claude_code import diagnose, settings, status_line
from gateway_addon.operations.doctor import Check
from gateway_addon.upstreams.egress import proxy_at

TIMEOUT_S = 2.0
MANAGED = (Path("/etc/claude-code/managed-settings.json"), Path("/Library/Application Support/ClaudeCode/managed-settings.json"))


@click.command(epilog=f"Example: {PROGRAM} statusline")
def statusline() -> None:
    """Print what the app of this Claude Code has spent and has left, for its status line.

    In ~/.claude/settings.json: "statusLine": {"type": "command", "command": "gateway statusline"}.
    In a clone, write the path of its run.sh in place of `gateway`.

    Asks the gateway that Claude Code calls: the one at ANTHROPIC_BASE_URL, or `gateway local` around it. Without an answer in two
    seconds the line says so, and the exit code stays 0: a status line is no reason to stop.
    """
    session = _session()
    try:
        click.echo(status_line(_me(session)))
    except (Unanswered, ValueError) as error:
        click.echo(f"gateway: {error}")


def claude_code_check() -> Check:
    """Look at the settings with which Claude Code would start in this folder."""
    files, broken = [], []
    for path in (*MANAGED, Path(".claude/settings.local.json"), Path(".claude/settings.json"), Path.home() / ".claude" / "settings.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            broken.append(f"{path} cannot be read, and Claude Code leaves it out: {error}")
            continue
        files.append((str(path), content if isinstance(content, dict) else {}))
    named = {name for _, content in files for name in content}
    found = diagnose(settings(os.environ, files), has_key_helper="apiKeyHelper" in named, has_model="model" in named)
    return Check("claude-code", found.seen, [*broken, *found.findings])


def _session() -> str:
    """Return the id of the session that Claude Code tells on stdin; "" where a person runs the command."""
    if sys.stdin.isatty():
        return ""
    try:
        told = json.loads(sys.stdin.read() or "{}")
    except ValueError:
        return ""
    return str(told.get("session_id", "")) if isinstance(told, dict) else ""


def _me(session: str) -> dict[str, Any]:
    """Ask the gateway for `/gateway/me`. Raises Unanswered, and ValueError where nothing leads there or the answer is none."""
    base_url, local = os.environ.get("ANTHROPIC_BASE_URL", "").rstrip("/"), os.environ.get("GATEWAY_LOCAL_UPSTREAM", "")
    if not base_url and not local:
        raise ValueError("ANTHROPIC_BASE_URL is not set, so these calls go past it")
    token = os.environ.get("ANTHROPIC_AUTH_TOKEN") or os.environ.get("ANTHROPIC_API_KEY") or ""
    origin = base_url or f"https://{local}"
    way = Egress() if base_url else Egress(*proxy_at("HTTPS_PROXY", os.environ.get("HTTPS_PROXY", "")), os.environ.get("SSL_CERT_FILE"))
    credential = Credential(origin, "x-api-key", token) if base_url else None
    query = f"?session={session}" if session.replace("-", "").isalnum() else ""
    with ask(f"{origin}/gateway/me{query}", "the gateway", timeout_s=TIMEOUT_S, way=way, credential=credential) as answer:
        said = json.loads(whole(answer))
    if answer.status != 200:
        raise ValueError(said.get("error", {}).get("message", f"it answers {answer.status}"))
    return dict(said)
