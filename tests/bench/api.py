"""Start the simulated API of the benchmarks (upstream.py) as a process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def api(folder: Path, core: int | None = None, port: int = 0, *, https: bool = False) -> Iterator[str]:
    """Run it, on a core of its own where one is named, and yield its address. `folder` keeps its certificate."""
    certificate = folder / "upstream.pem"
    if https and not certificate.exists():
        _certificate(certificate)
    process = subprocess.Popen([sys.executable, Path(__file__).with_name("upstream.py"), str(certificate) if https else "", str(port)], stdout=subprocess.PIPE, text=True)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    try:
        assert process.stdout is not None
        yield f"{'https' if https else 'http'}://{'localhost' if https else '127.0.0.1'}:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait()


def _certificate(path: Path) -> None:
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
