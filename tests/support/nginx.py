"""nginx in front of gateways, by the configuration that `gateway init --nginx` prints: with other ports and paths, and not a word more.

Without nginx its tests fail in CI and are skipped, saying so, elsewhere.
"""

import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from ports import free_port

from gateway_addon.operations import deploy

MISSING = "nginx is not installed: apt-get install nginx-light (or your system's package), then run this again"
WAYS = ("172.30.80.11:8080", "172.30.80.12:8080")
"""The gateways' addresses in the printed text."""


def program() -> str:
    found = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None and os.environ.get("CI"):
        raise AssertionError(MISSING)
    if found is None:
        pytest.skip(MISSING)
    return found


@dataclass(slots=True)
class Front:
    url: str
    trusting: ssl.SSLContext
    process: subprocess.Popen[bytes]
    file: Path
    text: str

    def reload(self, *down: str) -> None:
        """Take gateways out, as the head of the printed text says; returns once the new workers have begun."""
        text = self.text
        for address in down:
            assert f"server {address} " in text
            text = text.replace(f"server {address} ", f"server {address} down ")
        self.file.write_text(text)
        before = workers(self.process.pid)
        self.process.send_signal(1)  # SIGHUP, as `nginx -s reload` sends it
        for _ in range(3000):
            if workers(self.process.pid) - before:
                return
            time.sleep(0.02)
        raise AssertionError("nginx did not reload")


def workers(master: int) -> set[str]:
    return set(Path(f"/proc/{master}/task/{master}/children").read_text().split())


@contextmanager
def front(folder: Path, *gateways: str) -> Iterator[Front]:
    """nginx on a free port of this machine, with a certificate of its own, before the gateways of these URLs."""
    nginx, (cert, key) = program(), (folder / "tls_cert", folder / "tls_key")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-keyout", key, "-out", cert]
    subprocess.run([*made, *subject], check=True, capture_output=True)
    port = free_port()
    text = deploy.text("nginx.conf").replace("listen 8443 ", f"listen 127.0.0.1:{port} ").replace(" /tmp/", f" {folder}/nginx-").replace("/run/secrets/", f"{folder}/")
    for theirs, ours in zip(WAYS, gateways, strict=True):
        text = text.replace(theirs, ours.removeprefix("http://"))
    file = folder / "nginx.conf"
    file.write_text(text)
    own = "daemon off;" + (" user root;" if os.getuid() == 0 else "")  # root's nginx would become a user that cannot enter this folder
    with open(folder / "nginx.log", "wb") as log:
        process = subprocess.Popen([nginx, "-c", file, "-g", own], stdout=log, stderr=log)
    try:
        _reachable(port, folder / "nginx.log", process)
        yield Front(f"https://127.0.0.1:{port}", ssl.create_default_context(cafile=cert), process, file, text)
    finally:
        process.terminate()
        process.wait(60)


def _reachable(port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(3000):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nginx does not listen: {log.read_text()}")
