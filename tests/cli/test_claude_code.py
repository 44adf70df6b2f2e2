"""`gateway statusline` beside a real gateway, and `gateway doctor claude-code` over a machine's settings."""

import asyncio
import json
import os

import pytest
from click.testing import CliRunner
from gateway import gateway

from gateway_addon.cli import main
from gateway_addon.cli.token import token
from gateway_addon.simulator import Simulator

ODD = ("ANTHROPIC_", "CLAUDE_", "GATEWAY_")


@pytest.fixture(autouse=True)
def nothing_inherited(monkeypatch, tmp_path):
    for name in os.environ:
        if name.startswith(ODD) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


async def line(environment, told="{}"):
    ran = await asyncio.to_thread(CliRunner().invoke, main, ["statusline"], input=told, env=environment)
    assert ran.exit_code == 0, ran.output
    return ran.output.strip()


async def test_the_status_line_tells_what_the_app_has_left(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $5}\n"}) as gw:
        here = {"ANTHROPIC_BASE_URL": f"{gw.url}/", "ANTHROPIC_AUTH_TOKEN": gw.tokens["app"]}
        told = json.dumps({"session_id": "3f2a", "model": {"id": "claude-haiku-4-5"}})
        assert await line(here, told) == "app: $0.00 of $5.00 today (0 %), $5.00 left"
        assert "The token was cut or mistyped" in await line(here | {"ANTHROPIC_AUTH_TOKEN": "gwt_nobodys"})


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "gateway: ANTHROPIC_BASE_URL is not set, so these calls go past it"),
        ({"GATEWAY_LOCAL_UPSTREAM": "api.anthropic.com:443"}, "gateway: HTTPS_PROXY names a proxy of"),
        ({"ANTHROPIC_BASE_URL": "http://127.0.0.1:9", "ANTHROPIC_AUTH_TOKEN": "gwt_x"}, "gateway: the gateway cannot be reached"),
    ],
)
async def test_a_status_line_without_a_gateway_says_so(environment, said):
    assert (await line(environment, "no JSON")).startswith(said)


def test_the_doctor_reads_the_settings_of_this_folder(tmp_path):
    (tmp_path / ".claude").mkdir()
    (tmp_path / ".claude" / "settings.json").write_text(
        json.dumps({"env": {"ANTHROPIC_BASE_URL": "http://gw:8080/v1"}, "apiKeyHelper": "./key.sh"})
    )
    (tmp_path / ".claude" / "settings.local.json").write_text("{broken")
    ran = CliRunner().invoke(main, ["doctor", "claude-code"])
    assert ran.exit_code == 1
    assert "settings.local.json cannot be read" in ran.output
    assert "make it http://gw:8080" in ran.output
    assert "no token is set" not in ran.output


def test_the_form_with_caps_names_the_models_of_the_app(tmp_path):
    (tmp_path / "apps").mkdir()
    (tmp_path / "gateway.yaml").write_text("key: {env: K}\n")
    (tmp_path / "apps" / "app.yaml").write_text("models: {allow: [claude-sonnet-5, claude-haiku-4-5]}\ncaps: unlimited\n")
    shown = json.loads(CliRunner().invoke(token, ["forms", "claude-code-caps", "--policies", str(tmp_path)]).stdout)["env"]
    assert (shown["ANTHROPIC_MODEL"], shown["ANTHROPIC_DEFAULT_HAIKU_MODEL"]) == ("claude-sonnet-5", "claude-haiku-4-5")
