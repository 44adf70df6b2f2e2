"""Launch the gateway: mitmproxy with the addon built in, hardened, drained at the end; or mitmweb, for looking at flows.

Promises that the gateway is in the proxy before the first connection and stays there: it is built in, not a script that a
watcher reloads or a failed edit unloads. This module reads files, the clock and the environment.
"""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from mitmproxy import exceptions, http, options, tls, version
from mitmproxy.addons import core, errorcheck, next_layer, proxyserver, tlsconfig
from mitmproxy.master import Master
from mitmproxy.net import tls as tls_contexts
from OpenSSL import SSL

from gateway_addon.calls import top_ups
from gateway_addon.calls.gateway import Gateway
from gateway_addon.calls.record import CallRecord, OnCall, Scrape
from gateway_addon.clocks import SYSTEM
from gateway_addon.http_client import STRAIGHT, Egress
from gateway_addon.identity.key_cache import IssuerKeys
from gateway_addon.ledger import Ledger, ServerAddress, background
from gateway_addon.ledger.store.sqlite_files import ledger_path, state_folder
from gateway_addon.names import PROGRAM
from gateway_addon.operations import batch_poller, daily_totals_job, issuer_keys, jobs, reload, tracing, webhooks
from gateway_addon.operations.batch_poller import BatchPoller
from gateway_addon.operations.daily_totals_job import DailyTotalsJob
from gateway_addon.operations.issuer_keys import KeyRefresher
from gateway_addon.operations.logs import call_line, say_plainly
from gateway_addon.operations.reload import PolicyWatcher, align, audit_key, must_agree, saved_by
from gateway_addon.operations.webhooks import AlertDelivery
from gateway_addon.policy import GatewayPolicy, Source, load
from gateway_addon.proxy.certificate import Certificate
from gateway_addon.proxy.fastpath import connection, dispatch, relay, whole
from gateway_addon.proxy.hooks import BODY_BYTES_MAX, REQUIRED_OPTIONS, GatewayAddon
from gateway_addon.proxy.lean_import import load_all_addons
from gateway_addon.proxy.reverse_tcp import reverse
from gateway_addon.proxy.settings import Settings
from gateway_addon.proxy.supervisor import ListeningLoop, stop_signals, when_the_parent_ends
from gateway_addon.upstreams import credentials
from gateway_addon.upstreams.client import ask
from gateway_addon.upstreams.credentials import WatchedSecret
from gateway_addon.upstreams.egress import egress

logger = logging.getLogger(__name__)

DECIDED = frozenset(["mode", "server", "listen_host", "listen_port", "allow_hosts", "ignore_hosts", "tcp_hosts", "udp_hosts"])
"""Options that would make it listen elsewhere, or pass calls unread: it would start, and serve no call."""
FAST_PATH: dict[str, Any] = {"connection": connection, "dispatch": dispatch, "relay": relay, "whole": whole}
TLS_TO_PLAIN = (
    "A client began with TLS, and the gateway listens with plain http: write http:// in the client's base URL, or give the gateway a"
    " certificate (`tls` in gateway.yaml)."
)
STOPPING = "Stopping: no new calls; calls in flight may finish. Once more to end them now."
COLLECT_AFTER = 20_000  # objects made and not yet gone: those of a hundred calls in flight


class UpstreamTls(tlsconfig.TlsConfig):
    """Do TLS towards the upstream alone. Clients get the policy's certificate or none, so mitmproxy's own authority is not made:
    a key on the disk that may sign for any name, half of the start's time, and a race between gateways that start together."""

    def configure(self, updated: set[str]) -> None:
        super().configure(updated - {"certs", "confdir", "key_size", "cert_passphrase"})  # type: ignore[no-untyped-call]

    def running(self) -> None:
        """Do nothing: there is no authority to load."""

    def tls_start_client(self, tls_start: tls.TlsData) -> None:
        """Generate no certificate: where the policy has none, the handshake of a client that begins with TLS fails at once."""
        if tls_start.ssl_conn is None:
            tls_start.ssl_conn = SSL.Connection(SSL.Context(SSL.TLS_SERVER_METHOD))
            tls_start.ssl_conn.set_accept_state()
            logger.warning(TLS_TO_PLAIN)

    def request(self, flow: http.HTTPFlow) -> None:
        """Do nothing: without an authority there is no revocation list to serve."""


class LeanMaster(Master):
    """mitmproxy with the few addons that a reverse proxy needs: the others cost half of a call's time and do nothing here."""

    def __init__(self, opts: options.Options):
        super().__init__(opts)
        if dispatch.FITS:
            self.addons = dispatch.Dispatch(self)
        if unknown := [name for name, part in FAST_PATH.items() if not part.fits()]:
            sentence = "mitmproxy %s works in another way than is known here, so that its own stays in place of %s: as safe, but slower."
            logger.warning(sentence, version.VERSION, ", ".join(unknown))
        self.addons.add(
            core.Core(),
            proxyserver.Proxyserver(),
            next_layer.NextLayer(),
            UpstreamTls(),
            errorcheck.ErrorCheck(repeat_errors_on_stderr=True),
            connection.QuickHandlers(),
        )


def run(settings: Settings, listener: socket.socket) -> int:
    """Serve on a bound socket until SIGTERM or SIGINT. Returns the exit code."""
    for name in settings.left_out:
        FAST_PATH[name].FITS = False
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a call holds two sockets, and many shells begin with 1,024
    with asyncio.Runner(loop_factory=lambda: ListeningLoop(listener, shared=settings.parent_fd is not None)) as runner:
        return runner.run(_run(settings))


async def _run(settings: Settings) -> int:
    async with prepared(settings, chosen(settings)) as (policy, addon, master):
        on_signal(master.shutdown)
        if settings.parent_fd is not None:
            when_the_parent_ends(settings.parent_fd, master.shutdown)

        def listening() -> None:
            for line in greeting(settings, policy, addon.egress):
                settings.emit(line)
            if settings.ready_fd is not None:
                with suppress(BrokenPipeError):
                    os.write(settings.ready_fd, b"1")

        addon.on_running = listening
        spare_the_collector()
        await master.run()
    return 0


def chosen(settings: Settings) -> Callable[..., GatewayAddon]:
    """Return the function that makes the addon. mitmweb and its web server (8 MB in each worker) are loaded only where asked for."""
    if settings.web_port is None:
        return GatewayAddon
    from gateway_addon.proxy.web.addon import DebugAddon

    return partial(DebugAddon, place=ledger_path(settings.ledger))


def spare_the_collector() -> None:
    """Run the garbage collector rarely: it took a sixth of a call's processor time, and found nothing.

    An ended call leaves no cycles behind (inject.py breaks mitmproxy's), unless mitmproxy's own checks are on (`python` without -O):
    they make cycles of their own.
    """
    gc.collect()
    gc.freeze()  # all that is loaded now stays, and need not be scanned again
    if not __debug__:
        gc.set_threshold(COLLECT_AFTER, 20, 20)


@asynccontextmanager
async def prepared(
    settings: Settings, make: Callable[..., GatewayAddon] = GatewayAddon, endpoint_prefix: str = ""
) -> AsyncIterator[tuple[GatewayPolicy, GatewayAddon, Master]]:
    """Make all that a gateway needs, ready to run: an addon (`assembled`), in a master built for it."""
    async with (
        call_listeners(settings) as on_call,
        assembled(settings.policies, settings.ledger, make, endpoint_prefix, on_call) as (policy, key, addon),
    ):
        if policy.metrics_token is not None:
            count(settings, policy.metrics_token, addon.gateway)
        master = build(settings, policy, addon)
        say_plainly(key, as_json=settings.log_json, repeats=settings.repeats)
        yield policy, addon, master


def count(settings: Settings, token: Source, gateway: Gateway) -> None:
    """Count the gateway's calls for Prometheus, and serve the page to requests with its token. Raises SecretUnavailable."""
    from gateway_addon.operations import metrics  # here: 3 MB that most gateways do without

    secret = WatchedSecret(token, withheld=gateway.policy.secret_variables)
    secret()  # a missing token is reported now, not to the first scraper
    first = settings.parent_fd is None or settings.ready_fd is not None
    folder = state_folder(ledger_path(settings.ledger)) / f"metrics-{settings.port}"
    on_call, measures, exposition = metrics.start(folder, lambda: gateway.policy.prices, fresh=first)
    also = gateway.on_call

    def both(call: CallRecord) -> None:
        if also is not None:
            also(call)
        on_call(call)

    gateway.on_call, gateway.measures, gateway.scrape = both, measures, Scrape(secret, exposition)
    gateway.streams.on_top_up = measures.on_top_up


@asynccontextmanager
async def call_listeners(settings: Settings) -> AsyncIterator[OnCall | None]:
    """Make the function that receives each call's record, as the command line asks; None where nothing does. Raises OtelMissing."""
    listeners: list[OnCall] = [call_line] if settings.log_json else []

    def emit(call: CallRecord) -> None:
        for listener in listeners:
            listener(call)

    if not settings.otel:
        yield emit if listeners else None
        return
    send, stop = tracing.start()
    listeners.append(send)
    try:
        yield emit
    finally:
        await asyncio.to_thread(stop)


@asynccontextmanager
async def assembled(
    policies: Path,
    ledger_url: str,
    make: Callable[..., GatewayAddon] = GatewayAddon,
    endpoint_prefix: str = "",
    on_call: OnCall | None = None,
) -> AsyncIterator[tuple[GatewayPolicy, WatchedSecret, GatewayAddon]]:
    """Make an addon and all that it needs: the policy loaded and watched, the key read, the ledger open, the jobs running."""
    policy = load(policies)
    write_no_tls_keys()
    key = WatchedSecret(policy.key, withheld=policy.secret_variables)
    if policy.tls is not None:
        Certificate().context(policy.tls)
    key()  # a missing key is reported now, not to the first caller
    ledger = await Ledger.open(ledger_url)
    try:
        await must_agree(ledger, policy)
        await align(ledger, policy, saved_by(policies))
        await audit_key(ledger, key)

        def webhook(source: Source) -> str:
            return WatchedSecret(source, withheld=policy.secret_variables)()

        alert_delivery = AlertDelivery(ledger, webhook, time.time, partial(egress, policy, os.environ))

        def way(url: str) -> Egress:
            return egress(gateway.policy, os.environ, url)

        keys = IssuerKeys(partial(issuer_keys.fetch, way=way), SYSTEM.monotonic_s)
        gateway = Gateway(ledger, policy, SYSTEM, alert_delivery.emit, endpoint_prefix, on_call, keys)
        refused = asyncio.Event()
        addon = make(gateway, key, key_refused=refused.set)
        addon.egress = egress(policy, os.environ)
        watcher = PolicyWatcher(policies, gateway, key)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, watcher.read_again)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        poller = BatchPoller(
            ledger, lambda: gateway.policy, lambda path: ask(policy.upstream, path, key(), addon.egress), gateway.batch_closed
        )
        async with jobs.running(
            (top_ups.LOOK_AT_LEASE_S, "streams without a ledger", gateway.streams.keep_to_the_lease),
            (top_ups.TOP_UP_EVERY_S, "running streams", gateway.streams.keep_topped_up),
            (reload.LOOK_EVERY_S, "the policy", watcher.watch),
            (credentials.ASK_AGAIN_S, "the key", partial(credentials.renew_when_due, key, refused)),
            (issuer_keys.LOOK_EVERY_S, "the issuers' keys", KeyRefresher(gateway).look),
            (batch_poller.LOOK_EVERY_S, "open batches", poller.catch_up),
            (daily_totals_job.LOOK_EVERY_S, "closed days", DailyTotalsJob(ledger, time.time).catch_up),
            (webhooks.LOOK_EVERY_S, "alerts", lambda: alert_delivery.look(gateway.policy)),
            (webhooks.LOOK_EVERY_S, "webhooks", lambda: alert_delivery.deliver(gateway.policy)),
        ):
            yield policy, key, addon
    finally:
        await background.ended()
        await ledger.close()


def write_no_tls_keys() -> None:
    """Keep the keys of TLS connections off the disk: with them anybody who records the network could read the real key."""
    if tls_contexts.log_master_secret is not None:
        tls_contexts.log_master_secret = None
        logger.warning("SSLKEYLOGFILE is not heeded: with the file that it names the real API key could be read off the network.")


def build(settings: Settings, policy: GatewayPolicy, addon: GatewayAddon) -> Master:
    """Build a hardened master with the addon before all others (none may see a flow before its credential is removed).

    Raises ValueError for an option that mitmproxy does not have, or that would let calls bypass the gateway.
    """
    opts: options.Options = connection.QuickOptions()
    own = {
        "confdir": str(state_folder(ledger_path(settings.ledger))),  # where it keeps its certificate authority
        "mode": [reverse(policy.upstream)],
        "listen_host": settings.host,
        "listen_port": settings.port,
    }
    if settings.web_port is None:
        master: Master = LeanMaster(opts)
    else:
        load_all_addons()
        from gateway_addon.proxy.web import lockdown
        from gateway_addon.proxy.web.addon import DebugAddon
        from gateway_addon.proxy.web.master import DebugMaster

        assert isinstance(addon, DebugAddon), "chosen() makes one for these settings"
        master = DebugMaster(opts, addon)
        master.addons.get("tlsconfig").__class__ = UpstreamTls
        logging.getLogger("mitmproxy.tools.web.webaddons").setLevel(logging.ERROR)  # its advice on passwords that last longer than ours
        own |= lockdown.OPTIONS | {"web_port": settings.web_port, "web_password": settings.web_password}
    master.addons.chain.insert(0, master.addons.register(addon))
    opts.update(**hardened(opts, policy, addon.egress), **own)
    for name in (option.partition("=")[0].strip() for option in settings.options):
        if name in DECIDED:
            raise ValueError(f"--set: {name} is the gateway's to decide, from --listen and the policy's upstream; leave it out.")
    try:
        opts.set(*settings.options)
    except exceptions.OptionsError as error:
        raise ValueError(f"--set: {error}" if str(error).endswith(".") else f"--set: {error}.") from error
    return master


def hardened(opts: options.Options, policy: GatewayPolicy, way: Egress) -> dict[str, Any]:
    """Return mitmproxy's options as every gateway needs them, of those that this master has: bounds, timeouts, whom to trust."""
    longest_s = max(policy.timeouts.first_byte_s, policy.timeouts.silence_s) + 60
    wanted = REQUIRED_OPTIONS | {"body_size_limit": str(BODY_BYTES_MAX), "tcp_timeout": int(longest_s)}
    trust = {"ssl_verify_upstream_trusted_ca": way.ca_file, "ssl_verify_upstream_trusted_confdir": way.ca_folder}
    wanted |= {name: place for name, place in trust.items() if place is not None}
    return {name: value for name, value in wanted.items() if name in opts}


def on_signal(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def stopping() -> None:
        logger.info(STOPPING)
        for number in numbers:
            loop.remove_signal_handler(number)
        stop()

    numbers = stop_signals()
    for number in numbers:
        loop.add_signal_handler(number, stopping)


def greeting(settings: Settings, policy: GatewayPolicy, way: Egress) -> list[str]:
    """Return the lines for a person at the start: where it listens, and which policy is in force."""
    scheme = "https" if policy.tls else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return [
        *([f"mitmweb  {settings.web_link}"] if settings.web_link else []),
        f"gateway  {scheme}://{host}:{settings.port}  ->  {policy.upstream}",
        *([f"egress   {way}"] if way != STRAIGHT else []),
        f"policy   {settings.policies} ({policy.digest[:12]})",
        f"ledger   {ledger if isinstance(ledger := ledger_path(settings.ledger), ServerAddress) else settings.ledger}",
        f"apps     {', '.join(sorted(policy.apps)) or f'none yet: {PROGRAM} init'}",
    ]
