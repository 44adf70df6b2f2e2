"""The lines to paste so that an app calls the gateway instead of the provider, one form for each place where apps keep such things.

Pure: a form is text with the gateway's address and, where the place is private, the token. Source code and workflows are
committed, so those forms name a variable and never hold the token. Where a form sets variables they are the SDKs' own
(`ANTHROPIC_BASE_URL` with `ANTHROPIC_API_KEY`, or `ANTHROPIC_AUTH_TOKEN` for Claude Code, which asks a person to confirm
an API key); where code reads one it is `GATEWAY_TOKEN`, so that a forgotten real key in `ANTHROPIC_API_KEY` is not sent
to the gateway by mistake: the program stops and names what is missing.
"""

import re
from typing import NamedTuple


class Form(NamedTuple):
    where: str
    """One sentence: where the lines go, and what else has to be done there."""
    template: str
    """`@base_url@`, `@app@`, `@token@` and `@secret@` (the name of the app's secret in a CI) are put in."""


FORMS: dict[str, Form] = {
    "python": Form(
        "In the program, in place of its own client; GATEWAY_TOKEN in its environment holds the token.",
        """\
import os

from anthropic import Anthropic

client = Anthropic(base_url="@base_url@", api_key=os.environ["GATEWAY_TOKEN"])
""",
    ),
    "typescript": Form(
        "In the program, in place of its own client; GATEWAY_TOKEN in its environment holds the token.",
        """\
import Anthropic from "@anthropic-ai/sdk";

const token = process.env.GATEWAY_TOKEN;
if (!token) throw new Error("GATEWAY_TOKEN is not set: it holds the gateway token of @app@");
const client = new Anthropic({ baseURL: "@base_url@", apiKey: token, authToken: null });
""",
    ),
    "curl": Form(
        "In the script, or at the prompt to try the token.",
        """\
GATEWAY_TOKEN='@token@'
curl --silent --show-error '@base_url@/v1/messages' \\
  --header "x-api-key: $GATEWAY_TOKEN" --header 'anthropic-version: 2023-06-01' --header 'content-type: application/json' \\
  --data '{"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "Hello"}]}'
""",
    ),
    "claude-code": Form(
        "In ~/.claude/settings.json, or a project's .claude/settings.local.json (never the committed settings.json), "
        "in place of its apiKeyHelper.",
        """\
{
  "env": {
    "ANTHROPIC_BASE_URL": "@base_url@",
    "ANTHROPIC_AUTH_TOKEN": "@token@"
  }
}
""",
    ),
    "dotenv": Form(
        "In the app's .env (mode 600, in .gitignore), in place of its key.",
        """\
ANTHROPIC_BASE_URL=@base_url@
ANTHROPIC_API_KEY=@token@
""",
    ),
    "systemd": Form(
        "By `systemctl edit UNIT`, then `systemctl restart UNIT`. Every local user can read a unit's Environment=: on a machine "
        "that is not yours alone put the dotenv form in a file of mode 600 and name it by EnvironmentFile=.",
        """\
[Service]
Environment="ANTHROPIC_BASE_URL=@base_url@"
Environment="ANTHROPIC_API_KEY=@token@"
""",
    ),
    "cron": Form(
        "By `crontab -e`, on lines of their own above the jobs of this app (they hold for every job below them).",
        """\
ANTHROPIC_BASE_URL=@base_url@
ANTHROPIC_API_KEY=@token@
""",
    ),
    "github-actions": Form(
        "In the workflow, at its top or under the job; `gh secret set @secret@` asks for the token. The runner must reach the gateway.",
        """\
env:
  ANTHROPIC_BASE_URL: @base_url@
  ANTHROPIC_API_KEY: ${{ secrets.@secret@ }}
""",
    ),
}
KINDS = tuple(FORMS)

_BASE_URL = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/-]*)?")
_PLAIN = re.compile(r"[A-Za-z0-9._<>…-]+")


def lines(kind: str, *, base_url: str, app: str, token_placeholder: str) -> str:
    """The exact lines of one form, ending in a newline; `token_placeholder` is the token itself or what stands for it.

    Raises ValueError for a kind that is not one of KINDS, and where a value could not be pasted as it is into every form
    (white space, quotes, `$`).
    """
    if not _BASE_URL.fullmatch(base_url):
        raise ValueError(f"{base_url!r} is not the gateway's address; write it like http://127.0.0.1:8080")
    for value in (app, token_placeholder):
        if not _PLAIN.fullmatch(value):
            raise ValueError(f"{value!r} cannot be pasted everywhere; use letters, digits, dots, dashes and underscores")
    # the SDKs append /v1/messages themselves, and to a gateway that takes paths literally a double slash is another path
    values = {"base_url": base_url.rstrip("/"), "app": app, "token": token_placeholder, "secret": _secret(app)}
    return re.sub("@([a-z_]+)@", lambda match: values[match[1]], _form(kind).template)


def where(kind: str, *, app: str) -> str:
    """One sentence on where the lines go. Raises ValueError for a kind that is not one of KINDS."""
    return _form(kind).where.replace("@secret@", _secret(app))


def _form(kind: str) -> Form:
    if kind not in FORMS:
        raise ValueError(f"no form for {kind!r}; there is one for {', '.join(KINDS)}")
    return FORMS[kind]


def _secret(app: str) -> str:
    """A name that GitHub takes: letters, digits and underscores, not beginning with a digit or `GITHUB_`."""
    return f"GATEWAY_TOKEN_{re.sub('[^A-Z0-9]', '_', app.upper())}"
