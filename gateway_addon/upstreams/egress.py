"""Choose the way from here to the Claude API: straight, or through a company's proxy; and whose certificates are trusted there.

Promises one way for an app's calls and for the gateway's own questions alike: as `egress` in gateway.yaml says, else as HTTPS_PROXY,
NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR do. A proxy opens a tunnel (CONNECT); the key and TLS go inside it. A proxy's password is in no
repr and in no sentence. Does I/O: it reads the files that the policy names.
"""

import base64
import ssl
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import unquote, urlsplit

from gateway_addon.http_client import STRAIGHT, Egress
from gateway_addon.policy import GatewayPolicy, Source
from gateway_addon.upstreams.credentials import WatchedSecret


def egress(policy: GatewayPolicy, environment: Mapping[str, str], url: str | None = None) -> Egress:
    """Return the way that the policy names, or the environment, to the upstream or another `url`.

    Raises ValueError for a proxy that cannot be used, SecretUnavailable.
    """
    target, asked = urlsplit(url or policy.upstream), policy.egress
    ca_file = asked.ca or environment.get("SSL_CERT_FILE") or None
    ca_folder = None if asked.ca else environment.get("SSL_CERT_DIR") or None
    if target.scheme != "https":
        return STRAIGHT
    try:
        ssl.create_default_context(cafile=ca_file, capath=ca_folder)
    except OSError as error:
        named = "egress.ca" if asked.ca else "SSL_CERT_FILE"
        raise ValueError(f"{named} names {ca_file}, which holds no certificates that can be read ({error.strerror or 'no PEM'}).") from None
    if asked.proxy is not None:
        url = WatchedSecret(asked.proxy)() if isinstance(asked.proxy, Source) else asked.proxy
        return Egress(*proxy_at("egress.proxy", url), ca_file, ca_folder)
    way = by_environment(environment, "https", target.hostname or "", target.port or 443)
    return replace(way, ca_file=ca_file, ca_folder=ca_folder)


def by_environment(environment: Mapping[str, str], scheme: str, host: str, port: int) -> Egress:
    """Return the way to a host as HTTPS_PROXY (HTTP_PROXY for plain http), ALL_PROXY and NO_PROXY say. Raises ValueError."""
    if "GATEWAY_LOCAL_UPSTREAM" in environment:  # by `gateway local`, for its command: its proxy leads back to a gateway
        return STRAIGHT
    for name in (f"{scheme.upper()}_PROXY", f"{scheme}_proxy", "ALL_PROXY", "all_proxy"):
        if environment.get(name) and not _is_exempt(host, port, environment):
            return Egress(*proxy_at(name, environment[name]))
    return STRAIGHT


def proxy_at(name: str, url: str) -> tuple[tuple[str, int], str, str | None]:
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
