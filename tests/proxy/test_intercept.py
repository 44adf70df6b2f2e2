"""The intercepting proxy: real SDK clients with the API's own address, through a real tunnel, to a simulated API behind TLS."""

import asyncio
import base64
import json
import logging
import os
import shutil
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from authority import ready_authority
from click.testing import CliRunner
from client_tier import node24
from gateway import APP, Running, gateway, write_policies
from ledgers import rows
from processes import START_S, ledgered
from sealed import Sealed, sealed
from tunnel import PASSWORD
from tunnel import proxy as company

from gateway_addon.calls.gateway import Gateway
from gateway_addon.cli import local as command
from gateway_addon.cli.claude_code import statusline
from gateway_addon.ledger import admin
from gateway_addon.policy import load
from gateway_addon.proxy import intercept
from gateway_addon.proxy.intercept import CA_FILE, ENDPOINT_PREFIX, LocalAddon, intercepting
from gateway_addon.proxy.server import build
from gateway_addon.proxy.settings import Settings
from gateway_addon.simulator import KEY, Simulator

HELLO = {"model": "claude-haiku-4-5", "max_tokens": 40, "messages": [{"role": "user", "content": "Say hello."}]}
FORGOTTEN = "sk-ant-api03-the-app-s-own-copy-of-the-shared-key"
TIGHT = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $0.0001}\n"


class Local:
    """An intercepting proxy in this process, and clients that come through it."""

    def __init__(self, gw: Running, far: Sealed):
        self.gw, self.far = gw, far
        self.ca = ssl.create_default_context(cafile=gw.folder / "ca" / CA_FILE)

    def proxy(self, credentials: str) -> str:
        return f"http://{credentials}@127.0.0.1:{self.gw.port}" if credentials else self.gw.url

    def client(self, credentials: str) -> anthropic.AsyncAnthropic:
        through = anthropic.DefaultAsyncHttpxClient(proxy=self.proxy(credentials), verify=self.ca)
        made = anthropic.AsyncAnthropic(base_url=self.far.url, api_key=FORGOTTEN, http_client=through, max_retries=0)
        self.gw.clients.push_async_callback(made.close)
        return made

    async def rows(self) -> list[tuple[Any, ...]]:
        await self.gw.quiet()
        await asyncio.sleep(0.1)  # refused and free calls are written after their answers
        return rows(self.gw.folder / "gateway.db", "SELECT app, endpoint, state, refusal FROM calls ORDER BY id")


@asynccontextmanager
async def proxied(folder: Path, apps: dict[str, str] | None = None, captured: str | None = None, policy: str = "") -> AsyncIterator[Local]:
    async with sealed(folder) as far:
        prepare = partial(intercepting, upstream=far.url, capture=None, ca_folder=ready_authority(folder / "ca"))
        settings = {"options": (f"ssl_verify_upstream_trusted_ca={far.ca}",)}
        make = partial(LocalAddon, captured=captured)
        async with gateway(
            folder, far.api, apps, policy, upstream=far.url, settings=settings, make=make, endpoint_prefix=ENDPOINT_PREFIX, prepare=prepare
        ) as gw:  # fmt: skip
            yield Local(gw, far)


@pytest.mark.parametrize("form", ["app:{}", "{}", "{}:"], ids=["app and token", "token as the user", "token and no password"])
async def test_intercepted_app_is_metered_by_its_proxy_credentials(tmp_path, form):
    """An app with the API's own address is metered under its proxy credentials."""
    async with proxied(tmp_path) as proxy:
        answer = await proxy.client(form.format(proxy.gw.tokens["app"])).messages.create(**HELLO)
        assert answer.content[0].text
        [arrived] = (await proxy.far.api.settled()).messages()
        assert (arrived.header("x-api-key"), arrived.header("authorization"), arrived.header("proxy-authorization")) == (KEY, None, None)
        assert await proxy.rows() == [("app", "local/messages", "settled", None)]
        assert await proxy.gw.spent_nano("app:app") == arrived.billed_nano > 0


async def test_a_stream_passes_event_by_event(tmp_path):
    async with proxied(tmp_path) as proxy:
        async with proxy.client(f"app:{proxy.gw.tokens['app']}").messages.stream(**HELLO) as stream:
            assert (await stream.get_final_message()).usage.output_tokens > 0
        assert await proxy.rows() == [("app", "local/messages", "settled", None)]


async def test_apps_on_one_shared_key_are_capped_each_by_its_own(tmp_path):
    """Apps on one shared key are told apart, and each is capped by its own caps."""
    async with proxied(tmp_path, {"app": APP, "tight": TIGHT}) as proxy:
        await proxy.client(f"app:{proxy.gw.tokens['app']}").messages.create(**HELLO)
        with pytest.raises(anthropic.RateLimitError, match="cap"):
            await proxy.client(f"tight:{proxy.gw.tokens['tight']}").messages.create(**HELLO)
        assert len(proxy.far.api.book.messages()) == 1
        assert await proxy.rows() == [("app", "local/messages", "settled", None), ("tight", "local/messages", "refused", "quote_over_cap")]


@pytest.mark.parametrize(
    ("credentials", "code", "said"),
    [
        ("app:gwt_cut", "token_malformed", "cut or mistyped"),
        (f"app:{FORGOTTEN}", "token_malformed", "This is a Claude API key"),
        ("other:{}", "token_conflict", "name app other, but their token is app's"),
    ],
)
async def test_wrong_credentials_are_refused_in_the_api_shape(tmp_path, credentials, code, said):
    """Credentials that are not right are refused in the API's shape."""
    async with proxied(tmp_path) as proxy:
        with pytest.raises(anthropic.AuthenticationError, match=said) as refused:
            await proxy.client(credentials.format(proxy.gw.tokens["app"])).messages.create(**HELLO)
        assert refused.value.response.headers["x-gateway-refusal"] == code
        assert proxy.far.api.book.requests == 0


async def test_a_tunnel_without_credentials_is_asked_for_them(tmp_path):
    async with proxied(tmp_path) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.gw.port)
        place = proxy.far.url.removeprefix("https://")
        writer.write(f"CONNECT {place} HTTP/1.1\r\nhost: {place}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 407 " in head.splitlines()[0]
        assert b'proxy-authenticate: Basic realm="gateway"' in head
        assert proxy.far.api.book.connections == 0
        writer.close()


async def test_token_revoked_within_its_tunnel_is_refused_next_call(tmp_path):
    """A token revoked while its tunnel stands is refused at the next call."""
    async with proxied(tmp_path) as proxy:
        client = proxy.client(f"app:{proxy.gw.tokens['app']}")
        await client.messages.create(**HELLO)
        await proxy.gw.gateway.ledger.change(partial(_revoke, app="app"))
        with pytest.raises(anthropic.AuthenticationError, match="revoked"):
            await client.messages.create(**HELLO)


def _revoke(db: Any, app: str) -> None:
    admin.revoke_tokens(db, app, who="test", now=1.0)


async def test_every_other_host_passes_sealed_with_its_own_certificate(tmp_path):
    """127.0.0.1 is another host than localhost: the client trusts the far end's own authority alone, and sees it."""
    async with proxied(tmp_path) as proxy:
        trusting = ssl.create_default_context(cafile=proxy.far.ca)
        async with httpx2.AsyncClient(proxy=proxy.gw.url, verify=trusting) as client:
            answer = await client.post(
                proxy.far.api.url + "/v1/messages", headers={"x-api-key": KEY, "anthropic-version": "2023-06-01"}, json=HELLO
            )  # fmt: skip
        assert answer.status_code == 200
        [arrived] = (await proxy.far.api.settled()).messages()
        assert arrived.header("x-api-key") == KEY  # the client's own
        assert await proxy.rows() == []


@pytest.mark.parametrize("where", ["policy", "environment", "exempt"])
async def test_a_companys_proxy_is_on_the_way_of_every_tunnel(tmp_path, monkeypatch, where):
    """The API's, which is opened, and the sealed ones; NO_PROXY holds for each host by itself. (localhost and 127.0.0.1 are two hosts.)"""
    for name in [each for each in os.environ if each.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    async with company() as (address, heads, passed):
        monkeypatch.setenv("WAY_OUT" if where == "policy" else "HTTPS_PROXY", f"http://user:{PASSWORD}@{address}")
        if where == "exempt":
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        policy = "egress: {proxy: {env: WAY_OUT}}" if where == "policy" else ""
        async with proxied(tmp_path, policy=policy) as proxy:
            await proxy.client(f"app:{proxy.gw.tokens['app']}").messages.create(**HELLO)
            trusting = ssl.create_default_context(cafile=proxy.far.ca)
            async with httpx2.AsyncClient(proxy=proxy.gw.url, verify=trusting, trust_env=False) as client:
                answer = await client.get(proxy.far.api.url + "/api/hello")
            assert answer.status_code == 200
            asked = [head.split()[1].partition(":")[0] for head in heads]
            assert asked == (["localhost"] if where == "exempt" else ["localhost", "127.0.0.1"])
            assert [row[2] for row in await proxy.rows()] == ["settled"]
            assert KEY.encode() not in passed


@pytest.mark.parametrize("secret", ["", f"user:{PASSWORD}@"])
async def test_plain_http_elsewhere_goes_through_a_companys_proxy(tmp_path, monkeypatch, secret):
    """It is asked for the page; where it wants a password, in a tunnel."""
    async with company() as (address, heads, _), proxied(tmp_path) as proxy, Simulator() as other:
        monkeypatch.setenv("HTTP_PROXY", f"http://{secret}{address}")
        async with httpx2.AsyncClient(proxy=proxy.gw.url, trust_env=False) as client:
            answer = await client.get(other.url + "/api/hello")
        place = other.url.removeprefix("http://")
        first, host = heads[0].split("\r\n")[0], f"host: {place}"
        assert first == (f"CONNECT {place} HTTP/1.1" if secret else f"GET {other.url}/api/hello HTTP/1.1")
        assert answer.status_code == (200 if secret else 407), "the stand-in opens tunnels alone"
        assert secret or host in heads[0].lower()


async def test_plain_http_elsewhere_passes_without_proxy_credentials(tmp_path):
    """Plain http to another host passes as it is, and without the proxy's credentials."""
    async with proxied(tmp_path) as proxy, Simulator() as other:
        credentials = proxy.proxy(f"app:{proxy.gw.tokens['app']}")
        async with httpx2.AsyncClient(proxy=credentials) as client:
            answer = await client.get(other.url + "/api/hello", headers={"authorization": "Bearer for-the-other-host"})
        assert (answer.status_code, answer.json()) == (200, {})
        [arrived] = other.book.all()
        assert (arrived.header("authorization"), arrived.header("proxy-authorization")) == ("Bearer for-the-other-host", None)
        assert await proxy.rows() == []


async def test_the_api_in_plain_http_is_refused(tmp_path):
    async with proxied(tmp_path) as proxy:
        async with httpx2.AsyncClient(proxy=proxy.proxy(f"app:{proxy.gw.tokens['app']}")) as client:
            answer = await client.post(proxy.far.url.replace("https", "http") + "/v1/messages", json=HELLO)
        assert (answer.status_code, answer.headers["x-gateway-refusal"]) == (400, "request")
        assert proxy.far.api.book.connections == 0


async def test_a_plain_call_in_a_tunnel_to_the_api_never_leaves(tmp_path):
    async with proxied(tmp_path) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.gw.port)
        place, basic = proxy.far.url.removeprefix("https://"), base64.b64encode(f"app:{proxy.gw.tokens['app']}".encode()).decode()
        writer.write(f"CONNECT {place} HTTP/1.1\r\nhost: {place}\r\nproxy-authorization: Basic {basic}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps(HELLO)
        writer.write(f"POST /v1/messages HTTP/1.1\r\nhost: {place}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        answer = await reader.read()
        writer.close()
        assert b" 200 " not in answer
        assert proxy.far.api.book.bytes_received == 0
        await proxy.gw.quiet()


async def test_no_secret_is_in_a_flow_a_log_or_the_ledger(tmp_path, caplog):
    shown: list[bytes] = []

    class Sink:
        def __getattr__(self, name: str) -> Any:
            if name in ("http_connect", "requestheaders", "request", "responseheaders", "response", "error", "http_connected"):
                return lambda flow: shown.append(repr(flow.get_state()).encode())
            raise AttributeError(name)

    async with proxied(tmp_path) as proxy:
        proxy.gw.master.addons.add(Sink())
        with caplog.at_level(logging.DEBUG):
            logging.getLogger("hpack").setLevel(logging.INFO)
            await proxy.client(f"app:{proxy.gw.tokens['app']}").messages.create(**HELLO)
            await proxy.gw.quiet()
        token = proxy.gw.tokens["app"]
    assert len(shown) > 4
    stored = [path.read_bytes() for path in tmp_path.glob("gateway.db*") if path.is_file()]
    for secret in (KEY, FORGOTTEN, token, base64.b64encode(f"app:{token}".encode()).decode()):
        assert not [text for text in (*shown, caplog.text.encode(), *stored) if secret.encode() in text]


async def test_a_captured_program_calls_under_the_token_of_the_run(tmp_path, monkeypatch):
    """The operating system's part is played: the connection says that it was captured."""
    async with proxied(tmp_path) as proxy:
        addon = proxy.gw.addon
        assert isinstance(addon, LocalAddon)
        addon.captured = proxy.gw.tokens["app"]
        monkeypatch.setattr(intercept.mode_specs, "LocalMode", intercept.mode_specs.RegularMode)
        await proxy.client("whoever:whatever").messages.create(**HELLO)
        assert await proxy.rows() == [("app", "local/messages", "settled", None)]


async def test_capture_runs_beside_the_proxy_without_its_own_port(tmp_path):
    """A capture runs beside the proxy, and takes no port of its own."""
    policies = write_policies(tmp_path / "policies", "https://localhost:1", {"app": APP})
    policy = load(policies)
    master = build(Settings("127.0.0.1", 8082, policies, f"sqlite:///{tmp_path / 'gateway.db'}"), policy, LocalAddon(Gateway(None, policy), str))
    intercepting(master, policy.upstream, "curl", tmp_path / "ca")
    assert (master.options.mode, master.options.listen_port) == (["regular@8082", "local:curl"], None)


# The command


PROGRAM = """
import anthropic, os, sys
client = anthropic.Anthropic(base_url=sys.argv[1], max_retries=0)  # the address in the code, the key from the environment
print(client.messages.create(model="claude-haiku-4-5", max_tokens=9, messages=[{"role": "user", "content": "hi"}]).model)
print(sorted(name for name, value in os.environ.items() if sys.argv[2] in value))
sys.exit(7)
"""


@asynccontextmanager
async def started(folder: Path, far: Sealed, *words: str, **more: str) -> AsyncIterator[asyncio.subprocess.Process]:
    home = folder / "home"
    ready_authority(home / ".mitmproxy")
    where = ["--policies", str(folder / "policies"), "--ledger", f"sqlite:///{folder / 'gateway.db'}"]
    options = ["--set", f"ssl_verify_upstream_trusted_ca={far.ca}", *where]
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "SIMULATED_KEY": KEY, "ANOTHER_COPY": f"the key is {KEY}", **more}
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    arguments = [sys.executable, "-u", "-m", "gateway_addon", "local", *options, *words]
    process = await asyncio.create_subprocess_exec(*arguments, env=environment, **pipes)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_command_runs_without_the_real_key_and_keeps_its_code(tmp_path):
    """A command runs through the proxy without the real key, and its exit code passes."""
    async with sealed(tmp_path) as far:
        place = ledgered(tmp_path, far.url, {"app": APP})
        async with started(tmp_path, far, "--app", "app", "--", sys.executable, "-c", PROGRAM, far.url, KEY) as process:
            out, errors = await asyncio.wait_for(process.communicate(), 60)
        assert (process.returncode, out.decode().splitlines()) == (7, ["claude-haiku-4-5-20251001", "[]"]), errors.decode()
        assert rows(place.ledger, "SELECT app, endpoint, state FROM calls") == [("app", "local/messages", "settled")]
        [(revoked,)] = rows(place.ledger, "SELECT revoked_at IS NOT NULL FROM tokens WHERE label = 'local run'")
        assert revoked == 1


async def test_a_status_line_behind_the_proxy_knows_its_app(tmp_path, monkeypatch):
    """With what `gateway local` gives its command: Claude Code then has no base URL and no token."""
    monkeypatch.delenv("ANTHROPIC_BASE_URL", raising=False)
    async with proxied(tmp_path) as proxy:
        given = {"HTTPS_PROXY": proxy.proxy(f"app:{proxy.gw.tokens['app']}"), "GATEWAY_LOCAL_UPSTREAM": proxy.far.url.removeprefix("https://"), "SSL_CERT_FILE": str(proxy.gw.folder / "ca" / CA_FILE)}
        ran = await asyncio.to_thread(CliRunner().invoke, statusline, input="{}", env=given)
    assert ran.output == "app: $0.00 of $100.00 today (0 %), $100.00 left\n"


async def test_a_command_that_cannot_be_started_is_a_sentence(tmp_path):
    async with sealed(tmp_path) as far:
        ledgered(tmp_path, far.url, {"app": APP})
        async with started(tmp_path, far, "--app", "app", "--", "no-such-program") as process:
            _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, errors.decode().strip()) == (2, "The command no-such-program cannot be started (No such file or directory).")


async def exit_code(folder: Path, *words: str) -> int | None:
    """Of a program that is run through the proxy; `{}` in its words is the far end's address."""
    async with sealed(folder) as far:
        ledgered(folder, far.url, {"app": APP})
        async with started(folder, far, "--app", "app", "--", *(word.replace("{}", far.url) for word in words)) as process:
            await asyncio.wait_for(process.communicate(), 60)
        assert far.api.book.requests == 0  # /api/hello is answered by the gateway itself
    return process.returncode


async def metered(folder: Path, *words: str, **environment: str) -> tuple[int | None, list[str], int]:
    """The exit code of a program that is run through the proxy, the lines that it printed, and how many calls of it were settled."""
    async with sealed(folder) as far:
        place = ledgered(folder, far.url, {"app": APP})
        command = ("--app", "app", "--", *(word.replace("{}", far.url) for word in words))
        async with started(folder, far, *command, **environment) as process:
            out, errors = await asyncio.wait_for(process.communicate(), 60)
        settled = rows(place.ledger, "SELECT count(*) FROM calls WHERE app = 'app' AND endpoint = 'local/messages' AND state = 'settled'")
        assert len(far.api.book.messages()) == settled[0][0]
        print(errors.decode())  # shown where the test fails
    return process.returncode, out.decode().splitlines(), settled[0][0]


async def test_curl_trusts_it(tmp_path):
    assert await exit_code(tmp_path, "curl", "--silent", "--fail", "--head", "{}/api/hello") == 0


NODE = """
const https = require("node:https"), other = require("node:http").createServer((_, answer) => answer.end("other"));
const far = process.argv[1] + "/v1/messages", method = "POST";
const headers = { "content-type": "application/json", "anthropic-version": "2023-06-01", "x-api-key": process.env.ANTHROPIC_API_KEY };
const body = JSON.stringify({ model: "claude-haiku-4-5", max_tokens: 9, messages: [{ role: "user", content: "hi" }] });
const asked = (options) => new Promise((done, failed) =>
  https.request(far, { method, headers, ...options }, (answer) => { answer.resume(); answer.on("end", () => done(answer.statusCode)); })
    .on("error", failed).end(body));
other.listen(0, "127.0.0.1", async () => {
  const own = new https.Agent({ keepAlive: true });
  const fetched = async () => { const answer = await fetch(far, { method, headers, body }); await answer.text(); return answer.status; };
  console.log(await asked({ }), await asked({ agent: own }), await asked({ agent: own }), await asked({ agent: false }));
  console.log(await fetched(), await fetched(), await (await fetch(`http://127.0.0.1:${other.address().port}`)).text());
  process.exit(process.env.NODE_OPTIONS.startsWith("--no-warnings ") ? 7 : 1);
});
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node here")
@pytest.mark.parametrize("version", ["", pytest.param("24", marks=pytest.mark.clients)])
async def test_node_calls_through_it(tmp_path, version):
    """By its https and by its fetch, which take HTTPS_PROXY from the environment only since 22.21 and 24.5."""
    node = str(node24()) if version else "node"
    assert await metered(tmp_path, node, "-e", NODE, "{}", NODE_OPTIONS="--no-warnings") == (7, ["200 200 200 200", "200 200 other"], 6)


JAVA = """
import java.net.URI;
import java.net.http.*;

public class Call {
    public static void main(String[] arguments) throws Exception {
        String body = "{\\"model\\": \\"claude-haiku-4-5\\", \\"max_tokens\\": 9, \\"messages\\": [{\\"role\\": \\"user\\", \\"content\\": \\"hi\\"}]}";
        for (String key : new String[] {System.getenv("ANTHROPIC_API_KEY"), "sk-ant-in-the-code"}) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0] + "/v1/messages")).header("x-api-key", key)
                .header("anthropic-version", "2023-06-01").header("content-type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString(body)).build();
            System.out.println(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
        }
    }
}
"""


@pytest.mark.skipif(shutil.which("javac") is None, reason="no JDK here")
async def test_java_calls_through_it(tmp_path):
    """It has no words for a proxy's credentials: its calls are known by the token in its environment, or by whose process it is."""
    (tmp_path / "Call.java").write_text(JAVA)
    code, printed, calls = await metered(tmp_path, "java", "-XX:TieredStopAtLevel=1", str(tmp_path / "Call.java"), "{}")
    by_process = sys.platform == "linux"
    assert (code, printed, calls) == (0, ["200", "200" if by_process else "401"], 1 + by_process)


PAST = ("env", "-u", "HTTPS_PROXY", "-u", "https_proxy", "curl", "-s", "--insecure", "--head", "{}/api/hello")


@pytest.mark.parametrize(("before", "words", "code"), [((), PAST, 1), (("--allow-none",), ("true",), 0), ((), ("sh", "-c", "exit 3"), 3)])
async def test_a_command_whose_calls_do_not_come_by_fails(tmp_path, before, words, code):
    async with sealed(tmp_path) as far:
        ledgered(tmp_path, far.url, {"app": APP})
        async with started(tmp_path, far, "--app", "app", *before, "--", *(word.replace("{}", far.url) for word in words)) as process:
            _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, f"No call of {words[0]} came by" in errors.decode()) == (code, not before), errors


async def test_proxy_without_command_says_how_to_use_it_ends_on_ctrl_c(tmp_path):
    """A proxy without a command says how to use it, and ends on Ctrl-C."""
    async with sealed(tmp_path) as far:
        ledgered(tmp_path, far.url, {"app": APP})
        async with started(tmp_path, far, "--listen", "127.0.0.1:0") as process:
            lines = [(await asyncio.wait_for(process.stdout.readline(), START_S)).decode() for _ in range(4)]
            process.send_signal(signal.SIGINT)
            _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0
        assert "Traceback" not in errors.decode()
        assert lines[0].startswith("local    http://127.0.0.1:")
        assert str(tmp_path / "home/.mitmproxy" / CA_FILE) in "".join(lines)


def child_of(pid: int) -> int:
    """The command that a gateway runs: its other child guards the token, in a session of its own."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return next(child for child in found if os.getsid(child) == os.getsid(pid))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the command by /proc")
async def test_ctrl_c_reaches_the_command_which_decides(tmp_path):
    code = "import signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(5))\nprint('up', flush=True)\ntime.sleep(30)"
    async with sealed(tmp_path) as far:
        ledgered(tmp_path, far.url, {"app": APP})
        async with started(tmp_path, far, "--app", "app", "--", sys.executable, "-c", code) as process:
            assert await asyncio.wait_for(process.stdout.readline(), START_S) == b"up\n"
            for each in (process.pid, child_of(process.pid)):  # a terminal sends it to the whole group
                os.kill(each, signal.SIGINT)
            await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 5


@pytest.mark.parametrize(
    ("words", "upstream", "said"),
    [
        (["--listen", "0.0.0.0:0"], "https://localhost:1", "on this machine alone"),
        ([], "http://127.0.0.1:1", "only calls over https are intercepted"),
        (["--", "true"], "https://localhost:1", "Say whose calls these are by --app, one of: app, other."),
        (["--app", "nobody", "--", "true"], "https://localhost:1", "one of: app, other."),
        (["--capture", "curl", "--app", "app"], "https://localhost:1", "cannot capture programs (not on a Tuesday)"),
    ],
)
def test_what_cannot_be_run_is_a_sentence(tmp_path, monkeypatch, words, upstream, said):
    ledgered(tmp_path, upstream, {"app": APP, "other": APP})
    monkeypatch.setenv("SIMULATED_KEY", KEY)
    monkeypatch.setattr(intercept, "LocalRedirector", type("None_", (), {"unavailable_reason": staticmethod(lambda: "not on a Tuesday")}))
    where = ["--policies", str(tmp_path / "policies"), "--ledger", f"sqlite:///{tmp_path / 'gateway.db'}"]
    result = CliRunner().invoke(command.local, [*where, *words])
    assert (result.exit_code, said in result.output) == (2, True), result.output
