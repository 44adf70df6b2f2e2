"""Start what is between the callers and the API: nothing, bare mitmdump, the gateway, or an installed peer."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import official
from postgresql import Postgres, binaries

from gateway_addon.identity import tokens
from gateway_addon.ledger import ServerAddress, admin, connect

PROGRAMS = {"nginx": "nginx", "litellm": "litellm", "official": "claude"}
"""The peers that are not the project's own, by their programs' names."""

ON_POSTGRESQL = "gateway-postgresql"
START_S = 120  # LiteLLM takes seven seconds of a core of its own, and several times that of one that is shared
NONE = "x-api-key: none"
APP = "models: {allow: ['claude-*']}\ncaps: {day: $1000000, month: $1000000}\n"
NGINX = """
daemon off; worker_processes 1; pid "{folder}/nginx.pid"; error_log "{folder}/error.log";
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 10000000; client_body_buffer_size 1m; upstream api {{ server 127.0.0.1:{upstream}; keepalive 256; }}
  client_body_temp_path "{folder}/a"; proxy_temp_path "{folder}/b"; fastcgi_temp_path "{folder}/c"; uwsgi_temp_path "{folder}/d"; scgi_temp_path "{folder}/e";
  server {{ listen 127.0.0.1:{port}; client_max_body_size 33m;
    location / {{ proxy_pass http://api; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }} }}
"""
LITELLM = """
model_list: [{{model_name: claude-sonnet-4-5, litellm_params: {{model: anthropic/claude-sonnet-4-5, api_key: bench-key, api_base: "{upstream}"}}}}]
general_settings: {{master_key: sk-bench}}
litellm_settings: {{json_logs: true, request_timeout: 600}}
"""
# As its guide for production says; and its prices are those that it came with, not fetched.
LITELLM_VARIABLES = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@dataclass(frozen=True, slots=True)
class Peer:
    """A proxy that listens, with all of its processes."""

    name: str
    port: int
    pid: int | None = None
    credential: str = NONE
    """A header's line."""
    database: int | None = None
    """Run a peer's database server, which works for nobody else."""

    def cpu_s(self) -> float:
        return sum(_ticks(pid) for pid in [*_family(self.pid), *_family(self.database)]) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Without the database server's: its processes share most of theirs, and each would count it."""
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in _family(self.pid)) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _family(pid: int | None) -> list[int]:
    """The process and its children's children."""
    found = [] if pid is None else [pid]
    for each in found:
        for listing in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):  # it has ended
                found += [int(child) for child in listing.read_text().split()]
    return found


def _pin(pid: int | None, core: int) -> None:
    for each in _family(pid):
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(each, {core})


def _ticks(pid: int) -> int:
    """With those of the children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0  # it has ended, and its parent's hold its own
    return sum(int(field) for field in fields[11:15])


def programs(said: Mapping[str, str]) -> dict[str, str]:
    """By peer: the program of each that can be started, where it was said to be or on the PATH."""
    found = {name: shutil.which(said.get(name, program)) for name, program in PROGRAMS.items()}
    return {name: path for name, path in found.items() if path and (name != "official" or official.possible())}


@contextmanager
def started(name: str, folder: Path, upstream: str, core: int | None, program: str = "") -> Iterator[Peer]:
    """A peer by its name, on one core (None: wherever it likes), in front of an upstream's address, until the block ends."""
    folder.mkdir(parents=True)
    if name == "direct":
        yield Peer(name, int(upstream.rpartition(":")[2]))
        return
    port, database = _free_port(), None
    with ExitStack() as stack:
        environment = os.environ | {"BENCH_KEY": "bench-key"}
        if name == "litellm":
            environment |= LITELLM_VARIABLES
        elif name == "official":
            environment |= official.variables(folder)
            database = stack.enter_context(official.surroundings(folder, port, upstream))
        place: Path | ServerAddress = folder / "gateway.db"
        if name == ON_POSTGRESQL:
            server = Postgres(binaries(), fsync=True)
            stack.callback(server.remove)
            place, database = server.ledger(), server.pid
        command, credential = _command(name, folder, place, port, upstream, program)
        log = stack.enter_context(open(folder / "log", "wb"))
        process = subprocess.Popen(command if core is None else ["taskset", "-c", str(core), *command], stdout=log, stderr=log, env=environment)
        stack.callback(_stop, process)
        if core is not None:
            _pin(database, core)
        _wait(process, lambda: _listens(port) and (database is not None or _workers(folder) >= _wanted(name)), folder / "log")
        if name == "official":
            official.cap(port)
        yield Peer(name, port, process.pid, credential, database)


def _command(name: str, folder: Path, place: Path | ServerAddress, port: int, upstream: str, program: str) -> tuple[list[str], str]:
    """How a peer is started, its files being written, and its credential."""
    bin_folder = Path(sys.executable).parent
    if name == "mitmdump":
        command = [str(bin_folder / "mitmdump"), "--mode", f"reverse:{upstream}", "--listen-host", "127.0.0.1", "-p", str(port), "-q", "--set", f"confdir={folder}"]
        return [*command, "--set", "ssl_insecure=true"], NONE
    if name == "nginx":
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, upstream=upstream.rpartition(":")[2]))
        return [program, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")], NONE
    if name == "litellm":
        (folder / "litellm.yaml").write_text(LITELLM.format(upstream=upstream))
        where = ["--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
        return [program, *where, "--num_workers", "1", "--telemetry", "False"], "x-api-key: sk-bench"
    if name == "official":
        return [program, "gateway", "--config", str(folder / "official.yaml")], official.credential(port)
    token = _policies(folder, place, upstream)
    where = ["--listen", f"127.0.0.1:{port}", "--policies", str(folder / "policies"), "--ledger", place.url if isinstance(place, ServerAddress) else f"sqlite:///{place}"]
    command = [sys.executable, "-O", "-m", "gateway_addon", "serve", *where, "--workers", str(_wanted(name))]
    if upstream.startswith("https:"):
        command += ["--set", f"ssl_verify_upstream_trusted_ca={folder.parent / 'upstream.pem'}"]
    return command, f"x-api-key: {token}"


def _policies(folder: Path, place: Path | ServerAddress, upstream: str) -> str:
    (folder / "policies" / "apps").mkdir(parents=True)
    (folder / "policies" / "gateway.yaml").write_text(f"upstream: {upstream}\nkey: {{env: BENCH_KEY}}\n")
    (folder / "policies" / "apps" / "bench.yaml").write_text(APP)
    connect.create(place)
    token = tokens.mint()
    with connect.changing(place) as db:
        admin.issue_token(db, "bench", tokens.digest(token), who="bench", now=time.time())
    return token


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wanted(name: str) -> int:
    """The workers in a gateway's name: `gatewayx2`."""
    return int(name.partition("x")[2] or 1) if name.startswith("gateway") else 0


def _workers(folder: Path) -> int:
    """A gateway's first worker listens before the others have begun."""
    return len(list(folder.glob("gateway.db-locks/owner-*")))


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path) -> None:
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        if ready():
            return
        time.sleep(0.1)
    raise SystemExit(f"A peer of the benchmark did not start:\n{log.read_text()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
