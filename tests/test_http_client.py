"""Every question of the gateway's own, held against the same rules: trust, proxy, redirect, timeout, addresses, and what is sent."""

import asyncio
import os
import re
import socket
from contextlib import AsyncExitStack, ExitStack, suppress
from functools import partial

import pytest
from gateway import write_policies
from sealed import sealed
from tunnel import proxy
from upstreams import upstream

from gateway_addon import http_client
from gateway_addon.cli import check
from gateway_addon.http_client import Credential, Egress, Unanswered, ask, whole
from gateway_addon.operations import doctor, webhooks
from gateway_addon.policy import load
from gateway_addon.simulator import KEY
from gateway_addon.upstreams import client, usage_report
from gateway_addon.upstreams.egress import egress


def by_doctor(policies, url):
    return f"{doctor.check_all(policies, offline=False)}"


def by_batch_poller(policies, url):
    policy = load(policies)
    with client.ask(policy.upstream, "/v1/messages/batches/msgbatch_1", KEY, egress(policy, os.environ)) as answer:
        return f"answered {answer.status} {whole(answer)}"


def by_reconcile(policies, url):
    policy = load(policies)
    return f"{usage_report.AdminApi(policy.upstream, KEY, way=egress(policy, os.environ)).usage(0, None)}"


def by_webhook(policies, url):
    webhooks.post(f"{url}/secret-path", b"{}", partial(egress, load(policies), os.environ))
    return "delivered"


def by_check(policies, url):
    return f"{check.health(('localhost', int(url.rpartition(':')[2])))}"


API = {"host", "anthropic-version", "accept-encoding", "user-agent", "x-api-key"}
USERS = {
    # the question, how long it waits, the headers that it sends
    "doctor": (by_doctor, 10, API),
    "batch poller": (by_batch_poller, 15, API),
    "reconcile": (by_reconcile, 60, API),
    "webhook": (by_webhook, 4, {"host", "content-type", "content-length", "user-agent"}),
    "check": (by_check, 5, {"host"}),
}
ANSWERED = {
    # what each says where it was answered: by the simulated API, or with nothing
    "doctor": "answers in ",
    "batch poller": "answered ",
    "reconcile": "did not take the admin key|not in the shape",
    "webhook": "the webhook answered 401|delivered",
    "check": "None",
}


def everyone(words):
    """All commands have one outcome, but for `check`, which says only whether a gateway has answered."""
    return dict.fromkeys(USERS, words) | {"check": "None"}


async def serve_sealed(stack, folder, monkeypatch):
    """Yield the URL of an API behind TLS, what it was asked, and the policy that trusts it."""
    far = await stack.enter_async_context(sealed(folder))
    return far.url, lambda: far.api.book.requests, f"egress: {{ca: {far.ca}}}"


async def trusted(stack, folder, monkeypatch):
    """TLS's own keys, with which a credential could be read off the network, are written nowhere."""
    url, asked, policy = await serve_sealed(stack, folder, monkeypatch)
    keys = folder / "tls_keys"
    keys.touch()
    monkeypatch.setenv("SSLKEYLOGFILE", str(keys))
    return url, lambda: asked() + keys.read_bytes().count(b"_SECRET"), policy


async def untrusted(stack, folder, monkeypatch):
    url, asked, _ = await serve_sealed(stack, folder, monkeypatch)
    return url, asked, ""


async def proxied(stack, folder, monkeypatch):
    url, _, policy = await serve_sealed(stack, folder, monkeypatch)
    at, heads, _ = await stack.enter_async_context(proxy())
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:s3cret-of-the-proxy@{at}")
    return url, lambda: len(heads), policy


async def refusing_proxy(stack, folder, monkeypatch):
    url, asked, policy = await serve_sealed(stack, folder, monkeypatch)
    at, _, _ = await stack.enter_async_context(proxy())
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:wrong@{at}")
    return url, asked, policy


async def redirecting(stack, folder, monkeypatch):
    elsewhere = await stack.enter_async_context(upstream(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"))
    moved = await stack.enter_async_context(upstream(f"HTTP/1.1 302 Found\r\nlocation: {elsewhere.url}/\r\ncontent-length: 0\r\n\r\n".encode()))
    return moved.url, lambda: elsewhere.connections, ""


async def silent(stack, folder, monkeypatch):
    far = await stack.enter_async_context(upstream(then="silent"))
    return far.url, lambda: far.connections, ""


async def dead_first_address(stack, folder, monkeypatch):
    far = await stack.enter_async_context(upstream(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"))
    port = int(far.url.rpartition(":")[2])
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: found if host == "localhost" else resolve(host, *rest, **more))
    return f"http://localhost:{port}", lambda: far.connections, ""


CONDITIONS = [
    # what they meet, how often the far side counted a question, what each of them says of it
    (trusted, dict.fromkeys(USERS, 1), ANSWERED),
    (untrusted, dict.fromkeys(USERS, 0) | {"check": 1}, everyone("certificate (that )?is not trusted")),
    (proxied, dict.fromkeys(USERS, 1) | {"check": 0}, ANSWERED),
    (refusing_proxy, dict.fromkeys(USERS, 0) | {"check": 1}, everyone(r"cannot be reached \(the proxy answers 407\)")),
    (redirecting, dict.fromkeys(USERS, 0), everyone(" 302")),
    (silent, dict.fromkeys(USERS, 1) | {"check": 2}, everyone(r"cannot be reached \(TimeoutError\)")),
    (dead_first_address, dict.fromkeys(USERS, 1) | {"check": 2}, ANSWERED),
]


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(("condition", "counts", "said"), CONDITIONS, ids=[row[0].__name__ for row in CONDITIONS])
async def test_every_question_keeps_to_the_same_rules(tmp_path, monkeypatch, condition, counts, said, user):
    """`check` alone asks whoever answers: a gateway on this machine, without a secret, straight, first over http and then over TLS."""
    question, timeout_s, _ = USERS[user]
    waits_s = []

    def quick(*arguments, make=http_client._connection):
        made = make(*arguments)
        waits_s.append(made.timeout)
        made.timeout = 0.3 if condition is silent else 1 if user == "check" else 60  # `check` speaks TLS last, and is not understood
        return made

    monkeypatch.setattr(http_client, "_connection", quick)
    monkeypatch.setenv("SIMULATED_KEY", KEY)
    async with AsyncExitStack() as stack:
        url, count, policy = await condition(stack, tmp_path, monkeypatch)
        policies = write_policies(tmp_path / "policies", url, {}, policy)
        try:
            words = await asyncio.to_thread(question, policies, url)
        except (Unanswered, usage_report.ReportUnavailable) as error:
            words = f"{error}"
        assert re.search(said[user], words), words
        assert count() == counts[user]
    assert set(waits_s) == {timeout_s}
    assert KEY not in words
    assert "secret-path" not in words


@pytest.mark.parametrize("user", USERS)
async def test_nothing_is_sent_that_a_question_does_not_name(tmp_path, monkeypatch, user):
    """A webhook, and whoever answers where a gateway should, see no key."""
    question, _, headers = USERS[user]
    monkeypatch.setattr(check, "ANSWER_WITHIN_S", 1.0)
    monkeypatch.setenv("SIMULATED_KEY", KEY)
    async with upstream(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n") as far:
        policies = write_policies(tmp_path / "policies", far.url, {})
        with suppress(usage_report.ReportUnavailable):
            await asyncio.to_thread(question, policies, far.url)
        head = far.received.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert {line.partition(":")[0].lower() for line in head[1:]} == headers
    assert (KEY in "".join(head)) == ("x-api-key" in headers)


CREDENTIAL = Credential("https://api.anthropic.com", "x-api-key", KEY)
HERE = Credential("http://hooks.corp", "x-api-key", KEY)


@pytest.mark.parametrize(
    ("url", "credential", "way"),
    [
        ("https://api.anthropic.com.evil.org/v1/models", CREDENTIAL, Egress()),
        ("https://api.anthropic.com:8443/v1/models", CREDENTIAL, Egress()),
        ("http://api.anthropic.com/v1/models", CREDENTIAL, Egress()),
        ("https://api.anthropic.com@evil.org/v1/models", CREDENTIAL, Egress()),
        ("https://api.anthropic.com/v1/models", CREDENTIAL, Egress(trusts_anyone=True)),
        ("http://hooks.corp/v1/models", HERE, Egress()),
    ],
)
def test_a_credential_goes_to_its_own_host_alone_and_sealed(url, credential, way, monkeypatch):
    monkeypatch.setattr(http_client, "_connection", lambda *_: pytest.fail("something would be sent"))
    with pytest.raises(ValueError, match="the credential for") as refused, ask(url, "it", timeout_s=1, credential=credential, way=way):
        pass
    assert KEY not in f"{refused.value} {credential!r}"


ADDRESSES = [
    # where plain http would go, and whether it may
    ("127.0.0.1", True),
    ("10.1.2.3", True),
    ("192.168.1.2", True),
    ("100.64.0.7", True),
    ("fd00::1", True),
    ("fe80::1%1", True),
    ("::ffff:10.0.0.1", True),
    ("8.8.8.8", False),
    ("2606:4700::1111", False),
    ("::ffff:8.8.8.8", False),
]


@pytest.mark.parametrize(("address", "may"), ADDRESSES)
def test_plain_http_stays_inside_the_network(address, may, monkeypatch):
    """One public address among those of a name is enough to refuse it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = [(family, socket.SOCK_STREAM, 6, "", (each, 80)) for each in ("10.0.0.1", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(http_client, "_connection", lambda *_: (_ for _ in ()).throw(ConnectionRefusedError))
    with pytest.raises(Unanswered, match="ConnectionRefusedError" if may else "use https"):
        with ask("http://hooks.corp/secret-path", "the webhook", timeout_s=1, inside=True):
            pass


METADATA = ["169.254.169.254", "fe80::1%1", "::ffff:169.254.170.2", "fd00:ec2::254", "100.100.100.200"]


@pytest.mark.parametrize("address", METADATA)
def test_a_guarded_question_is_never_a_metadata_services(address, monkeypatch):
    """Whoever names an address in a document could else have the gateway ask there; one among those of a name is enough to refuse it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(family, socket.SOCK_STREAM, 6, "", (each, 443)) for each in ("10.0.0.1", address)])
    monkeypatch.setattr(http_client, "_connection", lambda *_: (_ for _ in ()).throw(ConnectionRefusedError))
    for guarded, said in ((True, "metadata service"), (False, "ConnectionRefusedError")):
        with pytest.raises(Unanswered, match=said):
            with ask("https://issuer.corp/keys", "the issuer", timeout_s=1, guarded=guarded):
                pass


@pytest.mark.parametrize(("host", "said"), [("10.0.0.1", "plain http, which is for this machine alone"), ("127.0.0.1", "ConnectionRefusedError")])
def test_a_guarded_question_in_plain_stays_on_this_machine(host, said, monkeypatch):
    monkeypatch.setattr(http_client, "_connection", lambda *_: (_ for _ in ()).throw(ConnectionRefusedError))
    with pytest.raises(Unanswered, match=said):
        with ask(f"http://{host}/keys", "the issuer", timeout_s=1, guarded=True):
            pass


def test_behind_a_proxy_a_name_is_the_proxys_to_resolve(monkeypatch):
    monkeypatch.setattr(http_client, "_connection", lambda *_: (_ for _ in ()).throw(ConnectionRefusedError))
    for host, said in (("issuer.invalid", "ConnectionRefusedError"), ("169.254.169.254", "metadata service")):
        with pytest.raises(Unanswered, match=said):
            with ask(f"https://{host}/keys", "the issuer", timeout_s=1, guarded=True, way=http_client.Egress(("proxy", 3128), "egress.proxy")):
                pass


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/", "https://", "https://[::1/", "https://x:port/", "https://x:0/", "https://x/é", "x"])
def test_an_address_that_is_none_is_said_without_showing_it(url):
    with pytest.raises(Unanswered, match=r"^the webhook has an address that is not of the form https://HOST/PATH$"):
        with ask(url, "the webhook", timeout_s=1):
            pass


async def test_a_body_without_an_end_is_not_read_to_it(monkeypatch):
    monkeypatch.setattr(http_client, "BODY_BYTES_MAX", 100_000)

    def read(url):
        with ask(url, "it", timeout_s=1) as answer:
            return len(whole(answer))

    async with upstream(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" + b"x" * 100_000) as far:
        assert await asyncio.to_thread(read, far.url) == 100_000
    async with upstream(b"HTTP/1.1 200 OK\r\ncontent-length: 100001\r\n\r\n" + b"x" * 100_001) as far:
        with pytest.raises(Unanswered, match="more than 100,000 bytes"):
            await asyncio.to_thread(read, far.url)


@pytest.mark.parametrize("head", ["content-length: 9\r\n\r\n", "\r\n", "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n"], ids=["length", "none", "chunks"])
async def test_a_body_that_broke_off_is_no_whole_one(head):
    def read(url):
        with ask(url, "it", timeout_s=1) as answer:
            return whole(answer)

    async with upstream(f"HTTP/1.1 200 OK\r\n{head}{{}}".encode()) as far:
        with pytest.raises(Unanswered, match=r"^it broke off the answer"):
            await asyncio.to_thread(read, far.url)


def test_a_dead_address_is_waited_for_once_and_briefly(monkeypatch):
    """It answers nobody: the queue of its socket is full, and nobody takes from it."""
    tried = []

    def connecting(address, *more, make=socket.create_connection):
        tried.append((address[0], *more))
        return make(address, *more)

    with ExitStack() as stack:
        dead = stack.enter_context(socket.create_server(("127.0.0.2", 0), backlog=0)).getsockname()
        alive = stack.enter_context(socket.create_server(("127.0.0.1", dead[1]))).getsockname()
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(dead)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in (dead, alive)]
        resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: found if host == "api.example" else resolve(host, *rest, **more))
        monkeypatch.setattr(socket, "create_connection", connecting)
        monkeypatch.setattr(http_client, "_answered", {})
        for _ in range(2):
            with http_client._dial(("api.example", dead[1]), 60.0) as made:
                assert (made.getpeername()[0], made.gettimeout()) == ("127.0.0.1", 60.0)
    assert tried == [("127.0.0.2", 0.3), ("127.0.0.1", 0.3), ("127.0.0.1", 0.3)]
