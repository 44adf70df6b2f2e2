"""Choose the way from here to the Claude API: straight, or through a company's proxy; and whose certificates are trusted there.

Promises one way for an app's calls and for the gateway's own questions alike: as `egress` in gateway.yaml says, else as HTTPS_PROXY,
NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR do. A proxy opens a tunnel (CONNECT); the key and TLS go inside it. A proxy's password is in no
repr and in no sentence. Does I/O: it opens connections and reads the files that the policy names.
"""

import base64
import http.client
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import certifi  # brought by mitmproxy, which trusts these where nobody says otherwise

from gateway_addon.policy import GatewayPolicy, Source
from gateway_addon.upstreams.credentials import WatchedSecret


@dataclass(frozen=True, slots=True)
class Egress:
    """A way to the upstream. `named_by`: the policy's key or the variable that the proxy comes from."""

    proxy: tuple[str, int] | None = None
    named_by: str = ""
    authorization: str | None = field(default=None, repr=False)
    """The value of Proxy-Authorization."""
    ca_file: str | None = None
    ca_folder: str | None = None

    def __str__(self) -> str:
        trusted = self.ca_file or self.ca_folder
        through = f"through {self.proxy[0]}:{self.proxy[1]} ({self.named_by})" if self.proxy else "straight"
        return through + (f", trusting {trusted}" if trusted else "")


STRAIGHT = Egress()


def egress(policy: GatewayPolicy, environment: Mapping[str, str]) -> Egress:
    """Return the way that the policy names, or the environment. Raises ValueError for a proxy that cannot be used, SecretUnavailable."""
    upstream, asked = urlsplit(policy.upstream), policy.egress
    ca_file = asked.ca or environment.get("SSL_CERT_FILE") or None
    ca_folder = None if asked.ca else environment.get("SSL_CERT_DIR") or None
    if upstream.scheme != "https":
        return STRAIGHT
    try:
        ssl.create_default_context(cafile=ca_file, capath=ca_folder)
    except OSError as error:
        named = "egress.ca" if asked.ca else "SSL_CERT_FILE"
        raise ValueError(f"{named} names {ca_file}, which holds no certificates that can be read ({error.strerror or 'no PEM'}).") from None
    if asked.proxy is not None:
        url = WatchedSecret(asked.proxy)() if isinstance(asked.proxy, Source) else asked.proxy
        return Egress(*_proxy("egress.proxy", url), ca_file, ca_folder)
    if "GATEWAY_LOCAL_UPSTREAM" in environment:  # by `gateway local`, for its command: its proxy leads back to a gateway
        return Egress(None, "", None, ca_file, ca_folder)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        if environment.get(name) and not _is_exempt(upstream.hostname or "", upstream.port or 443, environment):
            return Egress(*_proxy(name, environment[name]), ca_file, ca_folder)
    return Egress(None, "", None, ca_file, ca_folder)


def connect(upstream: str, way: Egress, timeout_s: float) -> http.client.HTTPConnection:
    """Return a connection of the gateway's own to the upstream, which opens with the first request."""
    parts = urlsplit(upstream)
    host, port = parts.hostname or "", parts.port
    if parts.scheme != "https":
        return http.client.HTTPConnection(host, port, timeout=timeout_s)
    ca_file = way.ca_file or (None if way.ca_folder else certifi.where())
    trusted = ssl.create_default_context(cafile=ca_file, capath=way.ca_folder)
    if way.proxy is None:
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=trusted)
    connection = http.client.HTTPSConnection(*way.proxy, timeout=timeout_s, context=trusted)
    connection.set_tunnel(host, port or 443, {"Proxy-Authorization": way.authorization} if way.authorization else {})
    return connection


def _proxy(name: str, url: str) -> tuple[tuple[str, int], str, str | None]:
    """Read a proxy's address: where it is, who named it, and what opens it. Raises ValueError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if parts.scheme != "http" or not host:
        shown = parts.scheme if parts.scheme.isalnum() else "no known kind"
        raise ValueError(f"{name} names a proxy of the kind {shown}; the gateway goes through http://HOST:PORT (by CONNECT) alone.")
    credentials = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    opens = f"Basic {base64.b64encode(credentials.encode()).decode()}" if parts.username else None
    return (host, port), name, opens


def _is_exempt(host: str, port: int, environment: Mapping[str, str]) -> bool:
    """Return whether NO_PROXY names a host: itself, a domain that it is in, or `*`."""
    for each in (environment.get("NO_PROXY") or environment.get("no_proxy") or "").split(","):
        name, _, its_port = each.strip().lower().partition(":")
        name = name.removeprefix("*").lstrip(".")
        if each.strip() == "*" or (name and (host == name or host.endswith(f".{name}")) and its_port in ("", f"{port}")):
            return True
    return False
