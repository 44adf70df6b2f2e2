"""The 0.x generation of the official SDK: it sends `api_key` as `X-Api-Key`, where 2.x sends a bearer token."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from gateway import gateway
from rawhttp import split_answer

from gateway_addon.simulator import KEY, Simulator

LOCK = Path(__file__).parent / "sdk0" / "requirements.lock"
HELLO = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}

SCRIPT = """
import json, sys
import anthropic
url, form, token = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, max_retries=0, **{"api_key": None, "auth_token": None, form: token})
ask = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
plain = client.messages.create(**ask)
with client.messages.stream(**ask) as stream:
    streamed = stream.get_final_message()
try:
    client.messages.create(**ask | {"model": "claude-opus-4-6"})
except anthropic.PermissionDeniedError as error:
    refused = error.body["error"]["message"]
print(json.dumps([anthropic.__version__, plain.usage.output_tokens, streamed.usage.output_tokens, refused]))
"""


@pytest.mark.parametrize(
    "credential",
    ["X-Api-Key: {0}", "Authorization: Bearer {0}", "X-Api-Key: {0}\r\nAuthorization: Bearer {0}"],
    ids=["as 0.x sends api_key", "as auth_token", "both, equal"],
)
async def test_a_token_is_taken_in_either_header_and_never_passed_on(tmp_path, credential):
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        body = json.dumps(HELLO).encode()
        lines = ["POST /v1/messages HTTP/1.1", "Host: gateway", "Connection: close", "Anthropic-Version: 2023-06-01"]
        head = "\r\n".join([*lines, credential.format(gw.tokens["app"]), f"Content-Length: {len(body)}", "", ""])
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(head.encode() + body)
        status, _, answer = split_answer(await reader.read())
        writer.close()
        assert (status, json.loads(answer)["type"]) == (200, "message")
        arrived = (await api.settled()).messages()[0]
        assert (arrived.header("x-api-key"), arrived.header("authorization")) == (KEY, None)


@pytest.fixture(scope="session")
def python0(tmp_path_factory):
    """A Python that has the 0.x SDK, as its lock says."""
    folder = tmp_path_factory.mktemp("sdk0")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=60)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps", "-r", LOCK]
    subprocess.run([folder / "bin" / "python", *install], check=True, timeout=300)
    return folder / "bin" / "python"


@pytest.mark.sdk0
@pytest.mark.parametrize("form", ["api_key", "auth_token"])
async def test_the_0_x_sdk_calls_streams_and_reads_a_refusal(tmp_path, python0, form):
    async with Simulator() as api, gateway(tmp_path, api, {"app": "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $1}\n"}) as gw:
        command = [python0, "-W", "error", "-c", SCRIPT, gw.url, form, gw.tokens["app"]]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        printed, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0
        version, plain, streamed, refused = json.loads(printed)
        await gw.quiet()
        book = await api.settled()
        assert version.startswith("0.")
        assert [row.usage.output_tokens for row in book.messages()] == [plain, streamed]
        assert await gw.spent_nano() == sum(row.billed_nano for row in book.messages())
        assert "claude-opus-4-6" in refused
        assert {row.header("x-api-key") for row in book.messages()} == {KEY}
