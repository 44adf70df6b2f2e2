"""A simulated API behind TLS at https://localhost:PORT, signed by an authority of the test's own."""

import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway_addon.simulator import Simulator


@dataclass(frozen=True, slots=True)
class Sealed:
    api: Simulator
    url: str
    ca: Path


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate, and a server's context that shows it."""
    cert, key = folder / "upstream.pem", folder / "upstream.key"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run([*command, "-keyout", key, "-out", cert, *subject], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    return cert, context


@asynccontextmanager
async def sealed(folder: Path, **options: Any) -> AsyncIterator[Sealed]:
    cert, context = certificate(folder)
    async with Simulator(tls=context, **options) as api:
        yield Sealed(api, api.url.replace("127.0.0.1", "localhost"), cert)
