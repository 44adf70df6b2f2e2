"""Read pasted lines as programs do: each reader returns the variables that its format sets."""

import json
import os
import re
import shlex
import subprocess

import yaml

from gateway_addon.identity import tokens

TOKEN = tokens.mint()


def dotenv(text: str) -> dict[str, str]:
    """As a shell reads it, which is stricter than the dotenv libraries."""
    script = f"set -a\n{text}\nenv -0"
    out = subprocess.run(["sh", "-euc", script], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True).stdout
    return dict(line.split("=", 1) for line in out.decode().split("\0") if line)


def systemd(text: str) -> dict[str, str]:
    """A drop-in: a section, then settings of which a repeated one adds up; values are quoted as in a shell."""
    section, *settings = text.splitlines()
    assert section == "[Service]"
    return dict(value.split("=", 1) for setting in settings for value in shlex.split(setting.removeprefix("Environment=")))


def cron(text: str) -> dict[str, str]:
    """As cron's own reader takes them: NAME = VALUE, matching quotes removed, and `%` never special in them."""
    matches = [re.fullmatch(r"\s*(\w+)\s*=\s*(['\"]?)(.*)\2\s*", line) for line in text.splitlines()]
    return {match[1]: match[3] for match in matches if match}


def github_actions(text: str) -> dict[str, str]:
    workflow = yaml.safe_load(text)
    secrets = {"GATEWAY_TOKEN_REVIEW_REPLIES": TOKEN}
    return {name: re.sub(r"\$\{\{ secrets\.(\w+) \}\}", lambda match: secrets[match[1]], value) for name, value in workflow["env"].items()}


def claude_code(text: str) -> dict[str, str]:
    return json.loads(text)["env"]
