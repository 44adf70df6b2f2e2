"""The listener's own certificate."""

import asyncio
import json
import os
import socket
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest
from gateway import gateway
from ledgers import until

from gateway_addon.policy import Tls
from gateway_addon.proxy.certificate import Certificate, TlsUnavailable
from gateway_addon.simulator import Behaviour, Simulator

HELLO = {"model": "claude-haiku-4-5", "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]}
VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture
def tls(tmp_path) -> Tls:
    pair = Tls(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run([*command, "-keyout", pair.key, "-out", pair.cert, *subject], check=True, capture_output=True)
    return pair


async def test_with_a_certificate_https_works_and_plain_http_does_not(tmp_path, tls):
    """A client that trusts the certificate calls over https, and nobody calls in clear."""
    policy = f"tls: {{cert: {tls.cert}, key: {tls.key}}}\n"
    async with Simulator() as api, gateway(tmp_path, api, policy=policy) as gw:
        headers = {"x-api-key": gw.tokens["app"], **VERSION}
        trusting = ssl.create_default_context(cafile=tls.cert)
        async with httpx2.AsyncClient(verify=trusting) as client:
            assert (await client.post(f"https://127.0.0.1:{gw.port}/v1/messages", headers=headers, json=HELLO)).status_code == 200
            refused = await client.post(f"http://127.0.0.1:{gw.port}/v1/messages", headers=headers, json=HELLO)
        assert refused.status_code == 400
        assert "over https alone" in refused.json()["error"]["message"]
        await gw.quiet()


@pytest.mark.parametrize("half", [False, True], ids=["closed", "half closed"])
async def test_who_leaves_over_https_is_settled_exactly(tmp_path, tls, half):
    policy = f"tls: {{cert: {tls.cert}, key: {tls.key}}}\n"
    async with Simulator(behaviour=Behaviour(output_tokens=40, tokens_per_s=200)) as api, gateway(tmp_path, api, policy=policy) as gw:
        trusting = ssl.create_default_context(cafile=tls.cert)
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port, ssl=trusting, server_hostname="localhost")
        body = json.dumps(HELLO).encode()
        head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {gw.tokens['app']}\r\nanthropic-version: 2023-06-01"
        writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(60):
            await until(lambda: api.book.in_flight)
            if half:
                writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
                assert b'"usage"' in await reader.read(-1)
        writer.close()
        await gw.quiet()
        assert await gw.spent_nano() == (await api.settled()).billed_nano > 0


def test_renewed_certificate_is_used_a_broken_one_is_a_sentence(tls):
    """A renewed certificate is taken, and a broken one is reported in a sentence."""
    certificate = Certificate()
    first = certificate.context(tls)
    assert certificate.context(tls) is first
    os.utime(tls.cert, (1, 1))
    assert certificate.context(tls) is not first
    Path(tls.cert).write_text("nothing")
    with pytest.raises(TlsUnavailable, match="are not a certificate chain and its private key"):
        certificate.context(tls)
    with pytest.raises(TlsUnavailable, match="cannot be read"):
        certificate.context(Tls("/nowhere", tls.key))


async def test_without_a_policy_certificate_there_is_no_tls(tmp_path, caplog):
    """Without a certificate in the policy there is no TLS, and no certificate is generated."""
    untrusting = ssl.create_default_context()
    untrusting.check_hostname, untrusting.verify_mode = False, ssl.CERT_NONE
    async with Simulator() as api, gateway(tmp_path, api) as gw:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", gw.port, ssl=untrusting)
        await gw.client().messages.create(**HELLO)
        await gw.quiet()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pem", ".p12", ".cer")]
    assert "write http:// in the client's base URL" in caplog.text
