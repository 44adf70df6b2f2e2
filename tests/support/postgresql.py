"""A PostgreSQL server for the tests: the distribution's binaries, a folder of its own, a socket in it, no network port.

Started once per test process, on the first use. `GATEWAY_TEST_POSTGRESQL=skip` leaves its tests out; without the binaries they fail in
CI and are skipped, saying so, elsewhere.
"""

import asyncio
import atexit
import os
import pwd
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Self

import psycopg
import pytest

from gateway_addon.ledger import ServerAddress
from gateway_addon.ledger.store import postgres

MISSING = "PostgreSQL is not installed: apt-get install postgresql (or your system's package), then run this again"

ROOM_BYTES = 8 * 2**30  # a suite fills two at most


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl, the newest version first."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]), reverse=True)
    on_path = shutil.which("initdb")
    return found[0].parent if found else Path(on_path).parent if on_path else None


def _lives(pid: int) -> bool:
    """Whether a process is there, and more than what nobody has asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def roomy_memory() -> Path | None:
    """Linux's folder in memory, where it has room for the databases of many servers: each is 300 files, and on a disk takes five times as long."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and shutil.disk_usage(folder).free >= ROOM_BYTES else None


AFTER_A_DEATH = """
read -r never
pid=$(head -n 1 "$0/data/postmaster.pid" 2>/dev/null) && kill -QUIT "$pid"
for _ in $(seq 200); do kill -0 "${pid:-none}" 2>/dev/null || break; sleep 0.05; done
rm -rf "$0"
"""


def removed_with_this_process(folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends the folder's server and removes the folder once its standard input ends: when this process dies, killed or not."""
    return subprocess.Popen(["/bin/sh", "-c", AFTER_A_DEATH, folder], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


class Postgres:
    """One server (`fsync` off: a test's machine does not crash, only the server does). Not as root: PostgreSQL refuses that, so root becomes the package's own user for it."""

    def __init__(self, bin_folder: Path, *, fsync: bool = False):
        self._bin = bin_folder
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir=None if fsync else roomy_memory()))
        self._user = pwd.getpwnam("postgres") if os.getuid() == 0 else None
        if self._user:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        self._run("initdb", "-D", self.data, "-U", "gateway", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        settings = ("listen_addresses = ''", f"unix_socket_directories = '{self.folder}'", "max_connections = 150", "shared_buffers = 32MB", *(["fsync = on"] if fsync else ["fsync = off", "max_wal_size = 64MB"]))
        with open(self.data / "postgresql.conf", "a") as file:
            file.write("\n".join(settings) + "\n")
        self._after_death = removed_with_this_process(self.folder)
        self.start()
        self._databases = 0

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def _run(self, program: str, *arguments: object) -> None:
        as_user = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []} if self._user else {}
        command = [str(self._bin / program), *(str(argument) for argument in arguments)]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **as_user)

    def start(self) -> None:
        self._run("pg_ctl", "-D", self.data, "-l", self.folder / "log", "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        """`immediate` is a crash: no checkpoint, the next start recovers from the log."""
        self._run("pg_ctl", "-D", self.data, "-m", mode, "-w", "stop")

    def kill(self) -> None:
        """SIGKILL to the server's first process alone: the others notice it one by one, some only after their commit."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)  # it starts no further one while they are counted
        others = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 60
        while any(map(_lives, (pid, *others))):  # the next server would find their shared memory in use
            assert time.monotonic() < until, f"processes of a killed server live on: {others}"
            time.sleep(0.02)
        for lock in (self.data / "postmaster.pid", self.folder / ".s.PGSQL.5432.lock"):  # nobody may have asked after its end, and its number lives on
            lock.unlink()

    @property
    def running(self) -> bool:
        return (self.data / "postmaster.pid").exists()

    def remove(self) -> None:
        if self.running:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._after_death.communicate()

    def url(self, database: str) -> str:
        return f"postgresql://gateway@/{database}?host={self.folder}"

    def database(self, like: str = "template1") -> str:
        """The address of a new database: an empty one, or a copy of another."""
        self._databases += 1
        name = f"test_{os.getpid()}_{self._databases}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            by_file = "STRATEGY FILE_COPY" if db.info.server_version >= 150_000 else ""  # a quarter of the time; older servers know no other way
            db.execute(f"CREATE DATABASE {name} TEMPLATE {like} {by_file}".encode())
        return self.url(name)

    @cached_property
    def empty_ledger(self) -> str:
        """The name of a database with an empty ledger, to be copied."""
        url = self.database()
        postgres.create(ServerAddress(url))
        return url.partition("@/")[2].partition("?")[0]

    def ledger(self) -> ServerAddress:
        return ServerAddress(self.database(self.empty_ledger))


@contextmanager
def crashing() -> Iterator[Postgres]:
    """The shared server for a test that stops it: nobody else in this process uses it meanwhile, and it runs again afterwards."""
    server = shared()
    try:
        yield server
    finally:
        if not server.running:
            server.start()


SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")


class Relay:
    """A way to a server by TCP, through the test's hands. While `silent` it takes what is sent and passes nothing on, as a dead switch
    does; a connection that met the silence stays mute for good. `cut_after("up", 5)`: once five more bytes have gone up to the server, the
    connection that brought the last of them is gone, both ways."""

    def __init__(self, server: Postgres, tls: ssl.SSLContext | None = None):
        """`tls`: it speaks TLS towards the clients, as a server with a certificate does."""
        self._server, self._tls = server, tls
        self.silent = False
        self.left: dict[str, int | None] = {"up": None, "down": None}
        self.cut = asyncio.Event()
        self.joined = self.sealed = 0
        self._ways: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Take no more connections and end those that are."""
        self._listener.close()
        for way in self._ways:
            way.cancel()
        await asyncio.gather(*self._ways, return_exceptions=True)

    def url(self, server: ServerAddress) -> str:
        port = self._listener.sockets[0].getsockname()[1]
        return server.url.partition("?")[0].replace("@/", f"@127.0.0.1:{port}/")

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.joined += 1
        if self._tls is not None:
            assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST
            writer.write(b"S")
            try:
                await writer.start_tls(self._tls)
            except (ssl.SSLError, ConnectionError):  # whoever called does not trust the certificate
                return writer.close()
            self.sealed += 1
        theirs, to_them = await asyncio.open_unix_connection(str(self._server.folder / ".s.PGSQL.5432"))
        for source, sink, back, direction in ((reader, to_them, writer, "up"), (theirs, writer, to_them, "down")):
            way = asyncio.ensure_future(self._pass(source, sink, back, direction))
            self._ways.add(way)
            way.add_done_callback(self._ways.discard)

    def cut_after(self, direction: str, count: int) -> None:
        self.cut.clear()
        self.left[direction] = count

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, back: asyncio.StreamWriter, direction: str) -> None:
        try:
            while data := await source.read(65536):
                if self.silent:
                    await asyncio.Event().wait()
                if (left := self.left[direction]) is not None and len(data) > left:
                    sink.write(data[:left])
                    self.left[direction] = None
                    back.transport.abort()
                    self.cut.set()
                    return
                self.left[direction] = None if left is None else left - len(data)
                sink.write(data)
        except ConnectionError:
            pass
        finally:
            sink.close()


@cache
def _shared() -> Postgres | None:
    where = binaries()
    if where is None:
        return None
    server = Postgres(where)
    atexit.register(server.remove)
    return server


def shared() -> Postgres:
    """The server that a test process shares. Skips the test where there is none, except in CI."""
    if os.environ.get("GATEWAY_TEST_POSTGRESQL") == "skip" and not os.environ.get("CI"):
        pytest.skip("GATEWAY_TEST_POSTGRESQL=skip")
    server = _shared()
    if server is None and os.environ.get("CI"):
        raise AssertionError(MISSING)
    if server is None:
        pytest.skip(MISSING)
    return server
