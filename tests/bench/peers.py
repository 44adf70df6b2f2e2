"""What stands between the callers and the API: nothing, bare mitmdump, the gateway, nginx where it is installed."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway_addon import identity
from gateway_addon.ledger import admin, files

APP = "models: {allow: ['claude-*']}\ncaps: {day: $1000000, month: $1000000}\n"
NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 10000000; client_body_buffer_size 1m; upstream api {{ server 127.0.0.1:{upstream}; keepalive 256; }}
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{ listen 127.0.0.1:{port}; client_max_body_size 33m;
    location / {{ proxy_pass http://api; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }} }}
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A proxy that listens, with all of its processes."""

    name: str
    port: int
    pid: int | None = None
    token: str = "none"
    gateway: bool = False

    def pids(self) -> list[int]:
        """The process and its children's children."""
        if self.pid is None:
            return []
        found = [self.pid]
        for pid in found:
            for listing in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in listing.read_text().split()]
        return found

    def cpu_s(self) -> float:
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.pids()]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids()) * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def started(name: str, folder: Path, upstream: str, core: int | None) -> Iterator[Peer]:
    """A peer by its name, on one core (None: wherever it likes), in front of an upstream's address, until the block ends."""
    folder.mkdir(parents=True)
    port, token, workers = _free_port(), "none", 0
    bin_folder = Path(sys.executable).parent
    if name == "direct":
        yield Peer(name, int(upstream.rpartition(":")[2]))
        return
    environment = os.environ | {"BENCH_KEY": "bench-key"}
    if name == "mitmdump":
        command = [str(bin_folder / "mitmdump"), "--mode", f"reverse:{upstream}", "--listen-host", "127.0.0.1", "-p", str(port), "-q", "--set", f"confdir={folder}"]
        command += ["--set", "ssl_insecure=true"]
    elif name == "nginx":
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, upstream=upstream.rpartition(":")[2]))
        command = [shutil.which("nginx") or "nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    else:
        workers = int(name.partition("x")[2] or 1)
        token = _policies(folder, upstream)
        where = ["--listen", f"127.0.0.1:{port}", "--policies", str(folder / "policies"), "--ledger", f"sqlite:///{folder / 'gateway.db'}"]
        command = [sys.executable, "-O", "-m", "gateway_addon", "serve", *where, "--workers", str(workers)]
        if upstream.startswith("https:"):
            command += ["--set", f"ssl_verify_upstream_trusted_ca={folder.parent / 'upstream.pem'}"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        # A gateway's first worker listens before the others have begun.
        _wait(lambda: _listens(port) and len(list(folder.glob("gateway.db-locks/owner-*"))) >= workers, folder / "log")
        yield Peer(name, port, process.pid, token, gateway=name.startswith("gateway"))
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _policies(folder: Path, upstream: str) -> str:
    (folder / "policies" / "apps").mkdir(parents=True)
    (folder / "policies" / "gateway.yaml").write_text(f"upstream: {upstream}\nkey: {{env: BENCH_KEY}}\n")
    (folder / "policies" / "apps" / "bench.yaml").write_text(APP)
    files.create(folder / "gateway.db")
    token = identity.mint()
    with admin.changing(folder / "gateway.db") as db:
        admin.issue_token(db, "bench", identity.digest(token), who="bench", now=time.time())
    return token


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(ready: Callable[[], bool], log: Path) -> None:
    for _ in range(200):
        if ready():
            return
        time.sleep(0.1)
    raise SystemExit(f"A peer of the benchmark did not start:\n{log.read_text()}")
