"""Recognise a consumer of the Claude API in a file: a table of kinds of file, and the patterns of each.

Promises data and nothing else: a new language or a new place is a new row. Knows nothing of the disk. The names and
hosts are those of the official SDKs and of Claude Code (`apiKeyHelper`, `ANTHROPIC_*`, `claude -p`); a comment that says
why stands where a row is not obvious.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from gateway_addon.identity.fingerprint import API_KEY, GATEWAY_TOKEN
from gateway_addon.names import PROGRAM

WORDS = (b"nthropic", b"NTHROPIC_", b"sk-ant-", b"c2stYW50", b"Z3d0X", b"claude", b"LAUDE_", b"gwt_", b"apiKeyHelper")
"""A file without any of these holds no consumer, whatever its kind. Substring searches, not one regex: measured twice as
fast, and this is all that happens to nearly every file. (`nthropic` serves both spellings; `c2stYW50` is base64 of `sk-ant`,
`Z3d0X` of `gwt_`.)"""


class FileKind(NamedTuple):
    name: str
    path: str
    """Searched in the absolute path, `/` between folders; the first row that matches is the kind."""
    text: str
    """How to read it: "code" and "settings" by all rules, "other" by unmistakable ones, "prose" for keys alone."""
    switch: str
    """How to move it, for the person who reads the row."""
    comment: str = r"#[^\n]*"
    """A comment, from the beginning of its line: code in it uses nothing (a key in it is still a key)."""
    section: str | None = None
    """Where one file holds several consumers: the line on which the next one begins."""
    secret: bool = False
    """Listed in .gitignore *because* it holds keys, so it is read even where .gitignore names it."""


def _issue(form: str, then: str) -> str:
    return f"{PROGRAM} token issue APP --for {form}; {then}"


_C = r"//[^\n]*|/\*.*?\*/"
_PYTHON_TEXT = r"#[^\n]*|[rR]?\"\"\".*?\"\"\"|[rR]?'''.*?'''"  # a docstring shows examples, it does not run them

KINDS = (
    FileKind("gateway", r"/policies/gateway\.ya?ml$", "settings", "stays: this is the gateway's own policy"),
    FileKind("recording", r"/(?:cassettes|__snapshots__)/", "prose", "take the key out of the recording"),
    FileKind(
        "example", r"[.-](?:example|sample|template|dist|tmpl)(?:\.\w+)?$", "prose", "take the key out: an example is read by everyone"
    ),
    FileKind(
        "claude-code",
        r"/\.claude/settings[^/]*\.json$|/managed-settings\.json$|/\.claude\.json$",
        "settings",
        _issue("claude-code", "its env block in place of the key or apiKeyHelper"),
        secret=True,
    ),
    FileKind("notebook", r"\.ipynb$", "code", _issue("python", "its client in the cell; clear outputs that show the key"), r'"#[^\n]*'),
    FileKind(
        "crontab",
        r"/crontab$|\.cron(?:tab)?$|/cron\.d/[^/]+$|/spool/cron/",
        "settings",
        _issue("cron", "its lines above the job, the key out of the job"),
        section=r"^[ \t]*[\d*@]",
    ),
    FileKind(
        "systemd",
        r"\.(?:service|timer)$|\.service\.d/[^/]+\.conf$|/environment\.d/",
        "settings",
        _issue("systemd", "its drop-in in place of the key, then daemon-reload and restart"),
        r"[#;][^\n]*",
    ),
    FileKind(
        "compose",
        r"/(?:docker-)?compose[^/]*\.ya?ml$",
        "settings",
        _issue("dotenv", "its lines in the service's env_file, the key out of environment"),
        section=r"^  [\w.-]+:[ \t]*(?:#.*)?$",
    ),
    FileKind(
        "github-actions",
        r"/\.github/(?:workflows|actions)/.+\.ya?ml$",
        "settings",
        _issue("github-actions", "its env block, the token as a repository secret"),
    ),
    FileKind(
        "ci",
        r"/(?:\.gitlab-ci|\.travis|\.drone|\.woodpecker|azure-pipelines|bitbucket-pipelines)\.ya?ml$"
        r"|/\.(?:circleci|buildkite)/|/Jenkinsfile$",
        "settings",
        _issue("dotenv", "its lines as the CI's masked variables"),
        r"(?:#|//)[^\n]*",
    ),
    FileKind(
        "history",
        r"/\.?(?:bash|zsh|fish|sh|python|node_repl)_history$|/\.histfile$",
        "settings",
        "delete the lines that hold a key; what they started is listed where it lives",
    ),
    FileKind(
        "dotenv", r"/\.env[^/]*$|\.env$|^/etc/environment$", "settings", _issue("dotenv", "its lines in place of the key"), secret=True
    ),
    FileKind(
        "dockerfile",
        r"/(?:Dockerfile|Containerfile)[^/]*$|\.[Dd]ockerfile$",
        "settings",
        _issue("dotenv", "given when the container starts: an image keeps every key it was built with"),
    ),
    FileKind(
        "document",
        r"\.(?:md|mdx|rst|txt|adoc|org|tex|html?|log|csv|tsv|jsonl|ndjson|har|po|svg)$"
        r"|/(?:README|CHANGELOG|LICENSE|NOTICE)[^/]*$",
        "prose",
        "take the key out of the text",
    ),
    FileKind("python", r"\.pyw?$", "code", _issue("python", "its client in place of this one"), _PYTHON_TEXT),
    FileKind("javascript", r"\.[cm]?[jt]sx?$|\.(?:vue|svelte|astro)$", "code", _issue("typescript", "its client in place of this one"), _C),
    FileKind("go", r"\.go$", "code", _issue("dotenv", "its lines in the environment, no WithBaseURL or WithAPIKey in the code"), _C),
    FileKind("ruby", r"\.(?:rb|rake|ru)$|/Rakefile$", "code", _issue("dotenv", "its lines in the environment, no key or URL in the code")),
    FileKind(
        "java", r"\.(?:java|kts?|scala|groovy)$", "code", _issue("dotenv", "its lines in the environment, and fromEnv() in the code"), _C
    ),
    FileKind("csharp", r"\.cs$", "code", _issue("dotenv", "its lines in the environment, no key or URL in the code"), _C),
    FileKind("php", r"\.php$", "code", _issue("dotenv", "its lines in the environment, no key or URL in the code"), r"#[^\n]*|" + _C),
    FileKind(
        "shell",
        r"\.(?:ba|z|k|da|fi)?sh$|/\.(?:bashrc|bash_profile|bash_login|profile|zshrc|zshenv|zprofile|zlogin)$"
        r"|/config\.fish$|/[Mm]akefile$|\.mk$|/[Jj]ustfile$",
        "settings",
        _issue("curl", "its URL and token in place of these"),
    ),
    FileKind(
        "configuration",
        r"\.(?:ya?ml|json5?|jsonc|toml|ini|cfg|conf|config|tf|tfvars|hcl|properties|xml|plist|nix|ps1|bat|cmd|pkrvars)$",
        "settings",
        _issue("dotenv", "its two values in place of the key"),
        r"(?:[#;]|//|REM\b)[^\n]*|<!--.*?-->",
    ),
    FileKind("other", r"", "other", _issue("dotenv", "its two values in place of the key")),
)

INTERPRETERS = (
    # a script without an extension says on its first line what it is
    (re.compile(r"^#!.*\bpython"), "python"),
    (re.compile(r"^#!.*\b(?:node|deno|bun|tsx)\b"), "javascript"),
    (re.compile(r"^#!.*\bruby\b"), "ruby"),
    (re.compile(r"^#!.*sh\b"), "shell"),
)


class Pattern(NamedTuple):
    """A regex, and words of which a text must hold one to match: looking for a word costs a hundredth of the regex."""

    words: tuple[str, ...]
    regex: re.Pattern[str]

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        return self.regex.finditer(text) if any(word in text for word in self.words) else iter(())


KEY = Pattern(("sk-ant-",), API_KEY)
ENCODED_KEY = Pattern(("c2stYW50L",), re.compile(r"(?<![A-Za-z0-9+/])c2stYW50L[A-Za-z0-9+/]+={0,2}"))
"""base64 of a whole key: how a Kubernetes Secret holds one."""
NOT_A_KEY = re.compile(r"your|example|placeholder|replace|redacted|change-?me|x{4}|\*{3}", re.IGNORECASE)
TOKEN = Pattern(("gwt_",), GATEWAY_TOKEN)
ENCODED_TOKEN = Pattern(("Z3d0X",), re.compile(r"(?<![A-Za-z0-9+/])Z3d0X[A-Za-z0-9+/]+={0,2}"))
"""base64 of a whole gateway token: the Kubernetes Secret after the move."""

NAME = Pattern(
    ("ANTHROPIC_", "CLAUDE_", "anthropic_api_key", "anthropicApiKey", "claude_api_key", "claudeApiKey"),
    re.compile(
        r"(?P<name>\b\w*(?:ANTHROPIC|CLAUDE)_(?:(?:API|ADMIN|AUTH|OAUTH)_)?(?:KEY|TOKEN)(?:_\w+)?\b|\bCLAUDE_CODE_OAUTH_TOKEN\b"
        r"|\b(?:anthropic|claude)(?:_api_key|ApiKey)\b|\bANTHROPIC_BASE_URL\b)"
        r"(?P<assigned>[\"']?\]?[ \t]*(?P<sign>[:=])(?!=)[ \t]*(?P<value>[^\s#,;]*))?"
    ),
)
PLACEHOLDER = re.compile(r"[\"']*(?:<.*|\.\.\.|…|x{3,}|change.?me|your[^a-z].*|sk-ant-(?:\.\.\.|x{3,}|your).*)?[\"'},]*", re.IGNORECASE)
ASSIGNMENT_BEFORE = re.compile(r"[ \t]*(?:export[ \t]+|set[ \t]+|setx[ \t]+|ENV[ \t]+)?[\"']?\Z")

_HOST = "api.anthropic.com"
DIRECT_URL = Pattern((_HOST,), re.compile(r"(?<![\w.-])(?:https?://)?(api\.anthropic\.com)(?![\w-]|\.\w)"))
DIRECT_CALL = Pattern((_HOST,), re.compile(r"https?://(api\.anthropic\.com)/v1/"))
"""The only form that counts in a file of unknown kind: a bare host may be anything there."""
_URL = r"(https?://[\w.\[\]:-]+)"
BASE_URL = Pattern(
    ("ANTHROPIC_BASE_URL", "Anthropic", "WithBaseURL", ".baseUrl"),
    re.compile(
        # the variable; the SDKs' constructors with at most one level of parentheses inside; Go's and Java's setters. Another
        # library's `base_url=` must not make a consumer look switched, so the bare word never counts.
        rf"ANTHROPIC_BASE_URL[\"']?\]?[ \t]*[:=,]?[ \t]*[\"']?{_URL}"
        rf"|Anthropic\w*(?:::Client\.new)?\((?:[^()]|\([^()]*\)){{0,400}}?base_?(?:url|URL|Url)[\"']?\s*[:=]\s*\\?[\"']{_URL}"
        rf"|(?:WithBaseURL|\.baseUrl)\(\s*\"{_URL}"
    ),
)

_PYTHON = (
    r"(?:import[ \t]+(?:[\w.]+(?:[ \t]+as[ \t]+\w+)?[ \t]*,[ \t]*)*|from[ \t]+)"
    r"(anthropic|claude_agent_sdk|claude_code_sdk|langchain_anthropic|llm_anthropic|llama_index\.llms\.anthropic"
    r"|pydantic_ai\.(?:models|providers)\.anthropic)\b"
)
_PYTHON_WORDS = ("anthropic", "claude_")
SDK = {
    # kind of file: what brings in a client of the API
    "python": Pattern(_PYTHON_WORDS, re.compile(r"^[ \t]*" + _PYTHON, re.MULTILINE)),
    "notebook": Pattern(_PYTHON_WORDS, re.compile(r"(?:\"|\\n)[ \t]*" + _PYTHON)),  # cells are JSON strings, one a line or all in one
    "javascript": Pattern(
        ("anthropic",),
        re.compile(r"(?:\bfrom|\bimport|\brequire)[\s(]*[\"'](?:npm:)?(@anthropic-ai/[\w-]+|@ai-sdk/anthropic|@langchain/anthropic)(?=[\"'/@])"),
    ),
    "go": Pattern(
        ("anthropic-sdk-go", "go-anthropic"),
        re.compile(
            r"^[ \t]*(?:import[ \t]+)?(?:[\w.]+[ \t]+)?\"(github\.com/(?:anthropics/anthropic-sdk-go|liushuangls/go-anthropic))",
            re.MULTILINE,
        ),
    ),
    "ruby": Pattern(("anthropic",), re.compile(r"^[ \t]*require[ \t(]*[\"'](anthropic)[\"']", re.MULTILINE)),
    "java": Pattern(("com.anthropic",), re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?(com\.anthropic)\.", re.MULTILINE)),
    "csharp": Pattern(("Anthropic",), re.compile(r"^[ \t]*(?:global[ \t]+)?using[ \t]+(Anthropic)[.; \t]", re.MULTILINE)),
    "php": Pattern(("Anthropic",), re.compile(r"^[ \t]*use[ \t]+\\?(Anthropic)\\", re.MULTILINE)),
}

# Claude Code, run by a script or a job, or told where its key comes from; from code as a list of arguments. The look behind
# stands after the word so that the search can jump from one `claude` to the next.
RUNS = Pattern(("claude ", "claude\t"), re.compile(r"(claude)(?<![\w.@-]claude)[ \t]+(?:[-\"'$][^|;&\n]*[ \t])?(?:-p|--print)(?![\w-])"))
RUNS_IN_CI = Pattern(("anthropics/claude-code-action",), re.compile(r"(anthropics/claude-code-action)\b"))
RUNS_WITH_HELPER = Pattern(("apiKeyHelper",), re.compile(r"\"(apiKeyHelper)\"\s*:"))
RUNS_FROM_CODE = Pattern(("claude",), re.compile(r"[\"'](claude)[\"'],\s*[\"'](?:-p|--print)[\"']"))
