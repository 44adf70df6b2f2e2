"""Write the lines to paste so that an app calls the gateway: one form for each place where apps keep settings.

Pure: a form is text with the gateway's address and, where the place is private, the token. Source code and workflows are
committed, so those forms name a variable and never hold the token. Where a form sets variables they are the SDKs' own
(`ANTHROPIC_BASE_URL` with `ANTHROPIC_API_KEY`, or `ANTHROPIC_AUTH_TOKEN` for Claude Code, which asks a person to confirm
an API key); where code reads one it is `GATEWAY_TOKEN`, so that a forgotten real key in `ANTHROPIC_API_KEY` is not sent
to the gateway by mistake: the program stops and names what is missing.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from gateway_addon.names import PROGRAM


class Form(NamedTuple):
    where: str
    """One sentence: where the lines go, and what else has to be done there."""
    template: str
    """Put in are `@base_url@`, `@app@`, `@token@`, `@secret@` (the name of the app's secret in a CI), `@model@` (the first that the app may
    use) and `@small_model@` (the first of its small ones)."""


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
    "langchain": Form(
        "In the program, in place of its own model; GATEWAY_TOKEN in its environment holds the token.",
        """\
import os

from langchain_anthropic import ChatAnthropic

model = ChatAnthropic(model="claude-haiku-4-5", base_url="@base_url@", api_key=os.environ["GATEWAY_TOKEN"])
""",
    ),
    "pydantic-ai": Form(
        "In the program, in place of its own agent; GATEWAY_TOKEN in its environment holds the token.",
        """\
import os

from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.providers.anthropic import AnthropicProvider

provider = AnthropicProvider(base_url="@base_url@", api_key=os.environ["GATEWAY_TOKEN"])
agent = Agent(AnthropicModel("claude-haiku-4-5", provider=provider))
""",
    ),
    "litellm": Form(
        "In the program, as arguments of its calls; GATEWAY_TOKEN in its environment holds the token.",
        """\
import os

import litellm

gateway = {"model": "anthropic/claude-haiku-4-5", "api_base": "@base_url@", "api_key": os.environ["GATEWAY_TOKEN"]}
answer = litellm.completion(**gateway, messages=[{"role": "user", "content": "Hello"}])
""",
    ),
    "instructor": Form(
        "In the program, in place of its own client; GATEWAY_TOKEN in its environment holds the token.",
        """\
import os

import instructor
from anthropic import Anthropic

client = instructor.from_anthropic(Anthropic(base_url="@base_url@", api_key=os.environ["GATEWAY_TOKEN"]))
""",
    ),
    "dspy": Form(
        "In the program, in place of its own model; GATEWAY_TOKEN in its environment holds the token. (Its base URL ends in /v1.)",
        """\
import os

import dspy

dspy.configure(lm=dspy.LM("anthropic/claude-haiku-4-5", api_base="@base_url@/v1", api_key=os.environ["GATEWAY_TOKEN"]))
""",
    ),
    "smolagents": Form(
        "In the program, in place of its own model; GATEWAY_TOKEN in its environment holds the token.",
        """\
import os

from smolagents import LiteLLMModel

model = LiteLLMModel("anthropic/claude-haiku-4-5", api_base="@base_url@", api_key=os.environ["GATEWAY_TOKEN"])
""",
    ),
    "crewai": Form(
        "In the program, in place of its own model; GATEWAY_TOKEN in its environment holds the token.",
        """\
import os

from crewai import LLM

llm = LLM(model="anthropic/claude-haiku-4-5", base_url="@base_url@", api_key=os.environ["GATEWAY_TOKEN"])
""",
    ),
    "llama-index": Form(
        "In the program, in place of its own model; GATEWAY_TOKEN in its environment holds the token.",
        """\
import os

from llama_index.llms.anthropic import Anthropic

llm = Anthropic(model="claude-haiku-4-5", base_url="@base_url@", api_key=os.environ["GATEWAY_TOKEN"])
""",
    ),
    "vercel-ai": Form(
        "In the program, in place of its own provider; GATEWAY_TOKEN in its environment holds the token. (Its base URL ends in /v1.)",
        """\
import { createAnthropic } from "@ai-sdk/anthropic";

const token = process.env.GATEWAY_TOKEN;
if (!token) throw new Error("GATEWAY_TOKEN is not set: it holds the gateway token of @app@");
const anthropic = createAnthropic({ baseURL: "@base_url@/v1", apiKey: token });
""",
    ),
    "agent-sdk": Form(
        "In the program, as the options of its queries; GATEWAY_TOKEN in its environment holds the token.",
        """\
import os

from claude_agent_sdk import ClaudeAgentOptions

gateway = {"ANTHROPIC_BASE_URL": "@base_url@", "ANTHROPIC_AUTH_TOKEN": os.environ["GATEWAY_TOKEN"]}
options = ClaudeAgentOptions(env=gateway)
""",
    ),
    "java": Form(
        "In the program; GATEWAY_TOKEN in its environment holds the token. (The SDK for Java reads the dotenv form's variables itself.)",
        """\
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;

class Gateway {
    static final HttpClient CLIENT = HttpClient.newHttpClient();

    static HttpRequest.Builder messages() {
        return HttpRequest.newBuilder(URI.create("@base_url@/v1/messages"))
                .header("x-api-key", System.getenv("GATEWAY_TOKEN"))
                .header("anthropic-version", "2023-06-01")
                .header("content-type", "application/json");
    }
}
""",
    ),
    "llm": Form(
        "In the shell's profile (llm's own key for anthropic goes first: `llm keys set anthropic` with the token, if there is one).",
        """\
export ANTHROPIC_BASE_URL='@base_url@'
export ANTHROPIC_API_KEY='@token@'
""",
    ),
    "aider": Form(
        "In the project's .env, which aider reads (mode 600, in .gitignore).",
        """\
ANTHROPIC_API_BASE=@base_url@
ANTHROPIC_API_KEY=@token@
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
    "claude-code-caps": Form(
        "In ~/.claude/settings.json, or a project's .claude/settings.local.json. Claude Code then warns at 75 % and 95 % of the app's cap "
        f"and shows dollars in /usage; it leaves out some features for it ({PROGRAM} doctor claude-code names them).",
        """\
{
  "env": {
    "ANTHROPIC_BASE_URL": "@base_url@",
    "ANTHROPIC_AUTH_TOKEN": "@token@",
    "CLAUDE_CODE_USE_GATEWAY": "1",
    "ANTHROPIC_MODEL": "@model@",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": "@small_model@"
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


def lines(kind: str, *, base_url: str, app: str, token_placeholder: str, models: Sequence[str] = ("MODEL",)) -> str:
    """Return the exact lines of one form, ending in a newline; `token_placeholder` is the token or a stand-in.

    `models`: those that the app may use, for the forms that name one.

    Raises ValueError for a kind that is not one of KINDS, and where a value could not be pasted as it is into every form
    (white space, quotes, `$`).
    """
    if not _BASE_URL.fullmatch(base_url):
        raise ValueError(f"{base_url!r} is not the gateway's address; write it like http://127.0.0.1:8080")
    for value in (app, token_placeholder, *models):
        if not _PLAIN.fullmatch(value):
            raise ValueError(f"{value!r} cannot be pasted everywhere; use letters, digits, dots, dashes and underscores")
    # the SDKs append /v1/messages themselves, and to a gateway that takes paths literally a double slash is another path
    small = next((model for model in models if "haiku" in model), models[0])
    values = {
        "base_url": base_url.rstrip("/"), "app": app, "token": token_placeholder, "secret": _secret(app), "model": models[0],
        "small_model": small,
    }  # fmt: skip
    return re.sub("@([a-z_]+)@", lambda match: values[match[1]], _form(kind).template)


def where(kind: str, *, app: str) -> str:
    """Return one sentence on where the lines go. Raises ValueError for a kind that is not one of KINDS."""
    return _form(kind).where.replace("@secret@", _secret(app))


def _form(kind: str) -> Form:
    if kind not in FORMS:
        raise ValueError(f"no form for {kind!r}; there is one for {', '.join(KINDS)}")
    return FORMS[kind]


def _secret(app: str) -> str:
    """Return a name that GitHub takes: letters, digits and underscores, not beginning with a digit or `GITHUB_`."""
    return f"GATEWAY_TOKEN_{re.sub('[^A-Z0-9]', '_', app.upper())}"
