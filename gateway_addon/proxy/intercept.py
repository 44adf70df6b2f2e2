"""Run an intercepting proxy, for apps whose address of the Claude API cannot be changed.

Promises that only tunnels to the policy's upstream are opened, with a certificate by mitmproxy's own authority, and that a
call in them is judged, capped, metered and recorded like any other, under the app whose token the proxy credentials carry:
three apps on one shared key cannot be told apart by the key. Every other tunnel passes sealed, and plain http to other hosts
passes as it is; neither can carry the real key, because nothing injects there. A company's proxy stays on the
way of all of them. This module starts a process with an environment of its own.
"""

import asyncio
import base64
import binascii
import os
import re
import shutil
import signal
import ssl
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import certifi  # brought by mitmproxy, whose own authorities these are
from mitmproxy import connection, ctx, http, tls
from mitmproxy.addons import tlsconfig
from mitmproxy.proxy import mode_specs, server_hooks
from mitmproxy.proxy.layer import NextLayer
from mitmproxy.proxy.layers import TCPLayer
from mitmproxy.proxy.layers.http import HttpLayer, HTTPMode
from mitmproxy.proxy.layers.http._upstream_proxy import HttpUpstreamProxy
from mitmproxy_rs.local import LocalRedirector

from gateway_addon.calls.admission import Caller
from gateway_addon.calls.exchange import ExchangeRequest
from gateway_addon.calls.responses import OwnResponse
from gateway_addon.http_client import STRAIGHT, Egress
from gateway_addon.names import PROGRAM
from gateway_addon.proxy import runtimes
from gateway_addon.proxy.hooks import GatewayAddon, guarded
from gateway_addon.proxy.server import on_signal, prepared
from gateway_addon.proxy.settings import Settings
from gateway_addon.refusals import Refusal
from gateway_addon.upstreams.egress import by_environment

ENDPOINT_PREFIX = "local/"
"""The prefix of the endpoint of every call that came through this proxy; `gateway cutover` lists their apps as stragglers."""

CA_FOLDER = Path.home() / ".mitmproxy"
CA_FILE = "mitmproxy-ca-cert.pem"
TOLD_A_BUNDLE = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Variables that *replace* a program's certificate authorities: OpenSSL and Python, requests, curl."""
NO_CREDENTIALS = (
    "No app's name came with this call. Put its gateway token into the proxy's address, HTTPS_PROXY=http://APP:TOKEN@{0}, "
    f"or start the program with: {PROGRAM} local --app APP -- COMMAND"
)


PASSED_BY = (
    "No call of {0} came by: it made none to {1}, or it reads neither HTTPS_PROXY nor what Node and Java are told, and called past the "
    f"gateway, unmetered. Point it at the gateway itself ({PROGRAM} token issue APP --for ...); --allow-none if it need not call."
)


class LocalAddon(GatewayAddon):
    """The gateway's addon in a forward proxy. `captured` is the token for programs captured from the system, which send no proxy
    credentials; `child` the token for a command that this gateway runs, whose runtime may be unable to send them."""

    def __init__(self, *arguments: Any, captured: str | None = None, child: str | None = None, **named: Any):
        super().__init__(*arguments, **named)
        self.captured = captured
        self.child = child
        self.calls = 0
        """Calls to the upstream so far, admitted or refused."""
        self.callers: dict[str, tuple[str, str]] = {}
        """By client connection: the app's name as given, and its token."""
        self.opens: dict[tuple[str, int], str | None] = {}
        """By the address of a proxy on some way out: the credentials that open it."""
        self.bystanders: set[str] = set()
        """Client connections that the gateway passes unread: sealed tunnels, plain http to other hosts."""

    # -- a connection

    @guarded("connection")
    def next_layer(self, data: NextLayer) -> None:
        """Inject only behind an opened tunnel: the outer layer of the proxy itself never gets the key."""
        ctx.master.addons.get("nextlayer").next_layer(data)
        if isinstance(data.layer, TCPLayer):
            self.bystanders.add(data.context.client.id)
            self._lead_through_proxy(data)
        elif isinstance(data.layer, HttpLayer) and data.layer.mode is HTTPMode.transparent:
            super().next_layer(data)

    def _lead_through_proxy(self, data: NextLayer) -> None:
        """Send a sealed tunnel through the proxy that is on the way to its host, if one is. A captured program has found its own way."""
        server = data.context.server
        if server.address is None or isinstance(data.context.client.proxy_mode, mode_specs.LocalMode):
            return
        way = self.way_to("https", *server.address[:2])
        if way.proxy is not None:
            server.via = "http", way.proxy
            stack = HttpUpstreamProxy.make(data.context, True)
            stack /= TCPLayer(data.context, ignore=True)
            data.layer = stack[0]

    def way_to(self, scheme: str, host: str, port: int) -> Egress:
        """Return the route to any host: the policy's proxy is on the way to all of them, the environment's as it says."""
        named = self.egress.named_by == "egress.proxy" or self._is_upstream(host, port)
        way = self.egress if named else by_environment(os.environ, scheme, host, port)
        if way.proxy is not None:
            self.opens[way.proxy] = way.authorization
        return way

    @guarded("connection")
    def http_connect_upstream(self, flow: http.HTTPFlow) -> None:
        """Authenticate at the proxy that is asked for a tunnel."""
        place = flow.server_conn.address
        opens = self.egress.authorization if place == self.egress.proxy else self.opens.get(place[:2]) if place else None
        if opens is not None:
            flow.request.headers["proxy-authorization"] = opens

    @guarded("connection")
    def tls_start_client(self, data: tls.TlsData) -> None:
        """Leave the certificate to mitmproxy's own authority: the policy's is for the gateway's name, not for the upstream's."""

    @guarded("request")
    def http_connect(self, flow: http.HTTPFlow) -> None:
        """Take the credentials off a request for a tunnel, and keep them if it leads to the API."""
        self.bystanders.discard(flow.client_conn.id)
        caller = _proxy_credentials(flow.request.headers)
        if not self._is_upstream(flow.request.host, flow.request.port):
            return
        if caller is None and self.child is not None:
            return  # its call has a token, or it is this user's own
        if caller is None:
            self.gateway.ledger.failed_authentication("token_proxy", now=self.clocks.now())
            self.answer(flow, Refusal("token_proxy", NO_CREDENTIALS.format(_address())))
            assert flow.response is not None
            flow.response.headers["proxy-authenticate"] = 'Basic realm="gateway"'
        else:
            self.callers[flow.client_conn.id] = caller

    @guarded("connection")
    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        if data.client.id not in self.bystanders:
            super().server_connect(data)

    @guarded("connection")
    async def client_disconnected(self, client: connection.Client) -> None:
        self.callers.pop(client.id, None)
        self.bystanders.discard(client.id)
        await super().client_disconnected(client)

    # -- a request

    @guarded("request")
    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        if flow.id in self.flow_states:
            self.calls += 1
            upstream = urlsplit(self.gateway.policy.upstream)
            if flow.request.host != upstream.hostname and upstream.hostname:  # captured: the program had resolved the name itself
                flow.request.host = upstream.hostname
            await super().requestheaders(flow)
            return
        _proxy_credentials(flow.request.headers)
        if self._is_upstream(flow.request.host, None):
            sentence = "The Claude API is called over https alone. Use an https address, so that the gateway can judge the call."
            self.answer(flow, Refusal("request", sentence))
        else:
            self.bystanders.add(flow.client_conn.id)
            flow.request.stream = True
            _plain_through(flow, self.way_to("http", flow.request.host, flow.request.port))

    async def _authenticate(
        self, flow: http.HTTPFlow, headers: tuple[tuple[str, str], ...]
    ) -> Caller | ExchangeRequest | OwnResponse | Refusal:
        """Authenticate by the tunnel's token, in place of the key that the app sends. In a command's tunnel without a token, the app's key
        may be one: the command has a token in its environment."""
        name, token = self._caller(flow.client_conn)
        own = [(key, value) for key, value in headers if key not in ("x-api-key", "authorization", "proxy-authorization")]
        if token or self.child is None:
            headers = (*own, ("x-api-key", token)) if token else tuple(own)
        caller = await super()._authenticate(flow, headers)
        if isinstance(caller, Caller) and name and name != caller.app.name:
            sentence = f"The proxy credentials name app {name}, but their token is {caller.app.name}'s. Put the right two together."
            return Refusal("token_conflict", sentence)
        return caller

    def _caller(self, client: connection.Client) -> tuple[str, str]:
        if isinstance(client.proxy_mode, mode_specs.LocalMode):
            return "", self.captured or ""
        if client.id not in self.callers and self.child is not None and is_of_this_user(client):
            return "", self.child
        return self.callers.get(client.id, ("", ""))

    @guarded("request")
    async def request(self, flow: http.HTTPFlow) -> None:
        if flow.id in self.flow_states:
            await super().request(flow)

    @guarded("response")
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.client_conn.id in self.bystanders and flow.response is not None:
            flow.response.stream = True
        super().responseheaders(flow)

    def _is_upstream(self, host: str, port: int | None) -> bool:
        upstream = urlsplit(self.gateway.policy.upstream)
        return host.lower() == upstream.hostname and port in (None, upstream.port or 443)


def _plain_through(flow: http.HTTPFlow, way: Egress) -> None:
    """Send plain http through a proxy, if one is on its way: as a proxy is asked for a page, or, where that one wants a password, in a
    tunnel: the password is then in no flow."""
    if way.proxy is None:
        return
    if way.authorization is not None:
        flow.server_conn.via = "http", way.proxy
        return
    url, host = flow.request.url, flow.request.headers.get("host")
    (flow.request.host, flow.request.port), flow.request.path = way.proxy, url
    if host is not None:
        flow.request.headers["host"] = host


def is_of_this_user(client: connection.Client) -> bool:
    """Return whether the other end of a loopback connection is held by this process's own user, who could read the token in the command's
    environment anyway. Known on Linux alone; elsewhere False."""
    ours, theirs = (f"{address[1]:04X}" for address in (client.sockname, client.peername))
    for table in map(Path, ("/proc/net/tcp", "/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, local, remote, state, _, _, _, user, *_ = line.split()
            if (local[-5:], remote[-5:], state) == (f":{theirs}", f":{ours}", "01"):
                return int(user) == os.getuid()
    return False


def _proxy_credentials(headers: http.Headers) -> tuple[str, str] | None:
    """Take `Proxy-Authorization: Basic` off: (app, token), where the name may be left out. None where there is none."""
    scheme, _, encoded = headers.pop("proxy-authorization", "").partition(" ")
    try:
        user, _, password = base64.b64decode(encoded.strip()).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    if scheme.lower() != "basic" or not user:
        return None
    return (user, password) if password else ("", user)


def _address() -> str:
    host, port, *_ = ctx.master.addons.get("proxyserver").listen_addrs()[0]
    return f"{host}:{port}"


# -- running it


def intercepting(master: Any, upstream: str, capture: str | None, ca_folder: Path) -> None:
    """Make a gateway's master a forward proxy that opens only what is meant for `upstream`."""
    master.addons.remove(master.addons.get("upstreamtls"))
    master.addons.add(tlsconfig.TlsConfig())  # with an authority: here clients are shown certificates of the proxy's making
    parts = urlsplit(upstream)
    port = master.options.listen_port  # of the proxy alone: a general one would count as the capture's too
    master.options.update(
        mode=[f"regular@{port}", *([f"local:{capture}"] if capture else [])],
        listen_port=None,
        allow_hosts=[rf"^{re.escape(parts.hostname or '')}:{parts.port or 443}$"],
        confdir=str(ca_folder),
        http3=False,
    )


async def run(
    settings: Settings,
    command: Sequence[str],
    *,
    app: str = "",
    token: str | None = None,
    capture: str | None = None,
    ca_folder: Path = CA_FOLDER,
    environment: Mapping[str, str] = os.environ,
    allow_none: bool = False,
) -> int:
    """Serve as an intercepting proxy until stopped, or until `command` ends; returns its exit code, or 0.

    `token` is the one that the command's calls, or the captured programs', are made under. A command that ended with 0 and none of
    whose calls came by is one that failed (1), unless `allow_none`.
    """
    make = partial(LocalAddon, captured=token, child=token if command else None)
    async with prepared(settings, make, ENDPOINT_PREFIX) as (policy, addon, master):
        intercepting(master, policy.upstream, capture, ca_folder)
        listening = asyncio.Event()
        addon.on_running = listening.set
        serving = asyncio.ensure_future(master.run())
        waiting = asyncio.ensure_future(listening.wait())
        await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not listening.is_set():
            await serving
            return 1
        host, port, *_ = master.addons.get("proxyserver").listen_addrs()[0]
        try:
            if not command:
                on_signal(master.shutdown)
                for line in greeting(f"{host}:{port}", policy.upstream, ca_folder, capture, addon.egress):
                    settings.emit(line)
                await serving
                return 0
            proxy = f"http://{app}:{token}@{host}:{port}"
            hidden, key = policy.secret_variables, addon.key()
            inherited = {name: value for name, value in environment.items() if name not in hidden and key not in value}
            code = await _command(command, child_environment(inherited, proxy, token or "", policy.upstream, ca_folder))
            assert isinstance(addon, LocalAddon)
            if addon.calls or allow_none:
                return code
            print(PASSED_BY.format(command[0], urlsplit(policy.upstream).hostname), file=sys.stderr)
            return code or 1
        finally:
            master.shutdown()
            await serving


async def _command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program to its end. Ctrl-C reaches it by the terminal, and it decides; SIGTERM is passed on."""
    try:
        process = await asyncio.create_subprocess_exec(*command, env=environment)
    except OSError as error:
        raise OSError(f"The command {command[0]} cannot be started ({error.strerror}).") from None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, process.terminate)
    try:
        code = await process.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return code if code >= 0 else 128 - code  # killed by a signal: as a shell says it


def child_environment(inherited: Mapping[str, str], proxy: str, token: str, upstream: str, ca_folder: Path) -> dict[str, str]:
    """Return the environment for a program that shall call `upstream` through `proxy`: the inherited one with its way and its trust.

    ANTHROPIC_API_KEY becomes the app's token: the SDKs refuse to start without one, and what they send is replaced anyway.
    """
    own = {name: value for name, value in inherited.items() if name.lower() not in ("all_proxy", "no_proxy")}
    proxies = {name: proxy for each in ("HTTPS_PROXY", "HTTP_PROXY") for name in (each, each.lower())}
    trusted = next((inherited[name] for name in TOLD_A_BUNDLE if inherited.get(name)), None)
    bundle = _bundle(ca_folder, trusted, inherited.get("NODE_EXTRA_CA_CERTS"))
    trust = dict.fromkeys((*TOLD_A_BUNDLE, "NODE_EXTRA_CA_CERTS"), str(bundle)) | {"NODE_USE_ENV_PROXY": "1"}
    return {**own, **proxies, **trust, **runtimes.options(own, proxy, upstream, bundle), "ANTHROPIC_API_KEY": token}


def _bundle(ca_folder: Path, trusted: str | None, extra: str | None) -> Path:
    """Write mitmproxy's authority and those trusted before into one file: the other tunnels are sealed, and show their own certificates."""
    before = trusted or ssl.get_default_verify_paths().cafile or certifi.where()
    parts = (Path(before), *([Path(extra)] if extra else []), ca_folder / CA_FILE)
    bundle = ca_folder / "gateway-bundle.pem"
    unfinished = bundle.with_name(f"{bundle.name}.{os.getpid()}")
    unfinished.write_bytes(b"\n".join(part.read_bytes() for part in parts if part.exists()))
    unfinished.replace(bundle)
    return bundle


def greeting(address: str, upstream: str, ca_folder: Path, capture: str | None, way: Egress) -> list[str]:
    """Return the lines that say how to use this proxy, and how to trust it."""
    ca = ca_folder / CA_FILE
    return [
        f"local    http://{address}  ->  {upstream}; every other host passes sealed",
        *([f"egress   {way}"] if way != STRAIGHT else []),
        *([f"capture  {capture}"] if capture else []),
        f"proxy    HTTPS_PROXY=http://APP:TOKEN@{address} (TOKEN from: {PROGRAM} token issue APP)",
        f"trust    {ca}",
        f"  Node       NODE_EXTRA_CA_CERTS={ca}",
        f"  curl       CURL_CA_BUNDLE={ca}",
        f"  Python     SSL_CERT_FILE={ca} (requests: REQUESTS_CA_BUNDLE); it replaces the other authorities",
        f"  Debian     cp {ca} /usr/local/share/ca-certificates/gateway.crt && update-ca-certificates",
        f"  macOS      security add-trusted-cert -d -k /Library/Keychains/System.keychain {ca}",
        f"  Or let the gateway set all of this for one program: {PROGRAM} local --app APP -- COMMAND",
    ]


def capture_problem() -> str | None:
    """Return why mitmproxy cannot capture programs on this machine, or None."""
    reason = LocalRedirector.unavailable_reason()
    if reason is None and sys.platform == "linux" and shutil.which("sudo") is None:
        reason = "on Linux mitmproxy starts its redirector by sudo, which is not installed"
    if reason is None:
        return None
    return f"This system cannot capture programs ({reason}). Start the program with: {PROGRAM} local --app APP -- COMMAND"
