"""Ask one question over HTTP: the gateway's own questions, to the Claude API, a webhook or another gateway.

Promises that nothing is sent but what the caller names (beside Host and a body's length); that a credential goes to its own host alone,
over TLS or inside this machine; that a redirect is an answer like any other and is not followed; that every address of a name is tried, and
a dead one costs `NEXT_ADDRESS_S`, once;
that a body which broke off is never taken for a whole one. An error holds neither the address nor a credential.
Does I/O: it opens connections and reads certificate authorities. It blocks: within an event loop, ask in a thread.
"""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

import certifi  # brought by mitmproxy, which trusts these where nobody says otherwise

BODY_BYTES_MAX = 64 * 2**20
PIECE_BYTES = 64 * 1024
NEXT_ADDRESS_S = 0.3  # until the next address of a name is tried
PORTS = {"https": 443, "http": 80}
METADATA = frozenset({"fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"})
"""Metadata services of clouds that are not at a link-local address (AWS over IPv6, Alibaba, Azure, Oracle)."""


@dataclass(frozen=True, slots=True)
class Egress:
    """A way out. `named_by`: the policy's key or the variable that the proxy comes from. Plain http takes no proxy."""

    proxy: tuple[str, int] | None = None
    named_by: str = ""
    authorization: str | None = field(default=None, repr=False)
    """The value of Proxy-Authorization."""
    ca_file: str | None = None
    ca_folder: str | None = None
    trusts_anyone: bool = False
    """Whether no certificate is checked: for a question that holds no secret."""

    def __str__(self) -> str:
        trusted = self.ca_file or self.ca_folder
        through = f"through {self.proxy[0]}:{self.proxy[1]} ({self.named_by})" if self.proxy else "straight"
        return through + (f", trusting {trusted}" if trusted else "")


STRAIGHT = Egress()


@dataclass(frozen=True, slots=True)
class Credential:
    """A header with a secret, and the scheme, host and port that alone may see it, as a URL."""

    origin: str
    header: str
    value: str = field(repr=False)


class Unanswered(Exception):
    """No whole answer came. The message begins with who was asked; `untrusted`: why the certificate is not trusted."""

    def __init__(self, sentence: str, untrusted: str | None = None):
        super().__init__(sentence)
        self.untrusted = untrusted


class Readable(Protocol):
    def read(self, size: int) -> bytes: ...


class Answer:
    """The status and the headers are here; the body is read piece by piece."""

    def __init__(self, response: http.client.HTTPResponse, whose: str):
        self.status = response.status
        self.encoding = response.getheader("content-encoding")
        self._response, self._whose = response, whose

    def header(self, name: str) -> str | None:
        return self._response.getheader(name)

    def read(self, size: int) -> bytes:
        """Return the next bytes; none at the end of a whole body. Raises Unanswered where it broke off, or where nobody can tell."""
        try:
            piece = self._response.read(size)
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(f"{self._whose} broke off the answer ({_kind(error)})") from None
        if not piece and not self._response.chunked and self._response.length != 0:
            raise Unanswered(f"{self._whose} broke off the answer before its announced length")
        return piece


def whole(answer: Readable) -> bytes:
    """Read a body to its end. Raises Unanswered, and where it is larger than any that is asked for."""
    body = bytearray()
    while piece := answer.read(PIECE_BYTES):
        body += piece
        if len(body) > BODY_BYTES_MAX:
            raise Unanswered(f"the answer has more than {BODY_BYTES_MAX:,} bytes")
    return bytes(body)


@contextmanager
def ask(
    url: str,
    whose: str,
    *,
    timeout_s: float,
    way: Egress = STRAIGHT,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    credential: Credential | None = None,
    body: bytes | None = None,
    inside: bool = False,
    guarded: bool = False,
) -> Iterator[Answer]:
    """Send one request; read the answer within the block. Raises Unanswered, whose sentence begins with `whose`.

    `timeout_s` limits each wait: for one address, for the answer, for more of it. `inside`: plain http reaches no public address.
    `guarded`, for an address that somebody else may have named: no metadata service of a cloud, and plain http inside this machine alone.
    """
    parts = _parts(url, whose)
    if credential is not None:
        _must_fit(credential, parts, way)
    with _unanswered(whose):
        if inside and parts.scheme == "http" and _is_public(parts):
            raise Unanswered(f"{whose} has a public address, and plain http can be read on the way there: use https")
        if guarded and parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            raise Unanswered(f"{whose} is plain http, which is for this machine alone: use https")
        if guarded and any(_is_metadata(each) for each in _addresses(parts, way)):
            raise Unanswered(f"{whose} is at the address of a cloud's metadata service, which is never asked")
        connection = _connection(parts, way, timeout_s)
    with closing(connection):
        with _unanswered(whose):
            connection.putrequest(method, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), skip_accept_encoding=True)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if credential is not None:
                connection.putheader(credential.header, credential.value)
            if body is not None:
                connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
        with closing(response):
            yield Answer(response, whose)


@contextmanager
def _unanswered(whose: str) -> Iterator[None]:
    """Raise Unanswered for whatever keeps an answer away."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise Unanswered(f"{whose} shows a certificate that is not trusted ({error.verify_message})", error.verify_message) from None
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(f"{whose} cannot be reached ({_kind(error)})") from None


def _parts(url: str, whose: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in PORTS and parts.hostname and parts.port != 0 and (parts.path + parts.query).isascii():
            return parts
    except ValueError:
        pass
    raise Unanswered(f"{whose} has an address that is not of the form https://HOST/PATH")


def _must_fit(credential: Credential, parts: SplitResult, way: Egress) -> None:
    """Raise ValueError unless a credential may be sent there: a mistake of the caller's, before anything is sent."""
    if _origin(urlsplit(credential.origin)) != _origin(parts):
        raise ValueError(f"the credential for {credential.origin} is not sent to another host")
    if way.trusts_anyone or (parts.scheme == "http" and not _is_loopback(parts.hostname or "")):
        raise ValueError(f"the credential for {credential.origin} is sent over trusted TLS, or inside this machine, alone")


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or PORTS.get(parts.scheme)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_public(parts: SplitResult) -> bool:
    """Return whether any address of the host is one of the internet's. Raises OSError where it has none."""
    return any(each.is_global for each in _addresses(parts, STRAIGHT))


def _addresses(parts: SplitResult, way: Egress) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return the addresses of a host, as far as they are known here: behind a proxy a name is not. Raises OSError where it has none."""
    flags = socket.AI_NUMERICHOST if way.proxy is not None else 0
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror:
        if way.proxy is not None:
            return []
        raise
    addresses = (ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found)
    return [getattr(each, "ipv4_mapped", None) or each for each in addresses]


def _is_metadata(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_link_local or str(address) in METADATA


def _connection(parts: SplitResult, way: Egress, timeout_s: float) -> http.client.HTTPConnection:
    """Return a connection that opens with its first request, to one address of the name after the other."""
    host, port = parts.hostname or "", parts.port
    if parts.scheme == "http":
        return _dialling(http.client.HTTPConnection(host, port, timeout=timeout_s))
    context = _trust(way)
    if way.proxy is None:
        return _dialling(http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context))
    connection = _dialling(http.client.HTTPSConnection(*way.proxy, timeout=timeout_s, context=context))
    connection.set_tunnel(host, port or PORTS["https"], {"Proxy-Authorization": way.authorization} if way.authorization else {})
    return connection


_answered: dict[tuple[str, int], str] = {}
"""By host and port: the address that a connection was made to last."""


def _dialling[C: http.client.HTTPConnection](connection: C) -> C:
    connection._create_connection = _dial  # type: ignore[attr-defined]
    return connection


def _dial(place: tuple[str, int], timeout_s: float, source: None = None) -> socket.socket:
    """Connect as `socket.create_connection` does, with a short time for each address first, that of the last answer before the others."""
    host, port = place
    addresses = list(dict.fromkeys(str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    last = _answered.get(place)
    for address in sorted(addresses, key=lambda each: each != last) if len(addresses) > 1 else ():
        with suppress(OSError):  # a timeout is one
            made = socket.create_connection((address, port), min(NEXT_ADDRESS_S, timeout_s))
            made.settimeout(timeout_s)
            _answered[place] = address
            return made
    return socket.create_connection(place, timeout_s)


def _trust(way: Egress) -> ssl.SSLContext:
    if way.trusts_anyone:
        context = ssl._create_unverified_context()
    else:
        context = ssl.create_default_context(cafile=way.ca_file or (None if way.ca_folder else certifi.where()), capath=way.ca_folder)
    context.keylog_filename = None  # type: ignore[assignment]  # whatever SSLKEYLOGFILE says: with that file a credential could be read off the network
    return context


def _kind(error: Exception) -> str:
    """Return what an error is, in a word or two: its own words can hold the address."""
    refused = str(error).partition("Tunnel connection failed: ")[2][:3]  # http.client's words for a proxy's status
    return f"the proxy answers {refused}" if refused.isdigit() else type(error).__name__
