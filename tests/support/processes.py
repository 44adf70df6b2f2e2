"""Gateways as a user starts them: `gateway serve` processes on one ledger, in front of a simulated API in this process."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gateway import write_policies
from ledgers import new_file, rows, until, url, writing

from gateway_addon.identity import tokens as identity
from gateway_addon.ledger import ServerAddress, admin, connect
from gateway_addon.simulator import KEY

START_S = 180  # a start takes one; machines that are a hundred times too busy have been seen


@dataclass(slots=True)
class Ledgered:
    """A folder with policies, a ledger and a token per app."""

    folder: Path
    tokens: dict[str, str]
    server: ServerAddress | None = None
    """Where the ledger is, if not in the folder."""
    started: list[asyncio.subprocess.Process] = field(default_factory=list)

    @property
    def ledger(self) -> Path | ServerAddress:
        return self.server or self.folder / "gateway.db"

    async def serve(self, *options: str, **variables: str) -> tuple[asyncio.subprocess.Process, str]:
        """Start one gateway on a free port; returns it with its address."""
        where = ["--listen", "127.0.0.1:0", "--policies", str(self.folder / "policies"), "--ledger", url(self.ledger)]
        arguments = [sys.executable, "-O", "-u", "-m", "gateway_addon", "serve", "--workers", "1", *where, *options]
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        environment = os.environ | {"SIMULATED_KEY": KEY} | variables
        process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment)
        os.close(log)
        self.started.append(process)
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
            assert line.startswith(b"gateway"), (self.folder / "log").read_text()
        except BaseException:
            if process.returncode is None:
                process.kill()
            process._transport.close()
            raise
        return process, line.split()[1].decode()

    async def kill(self) -> None:
        """Kill what still runs of it: what a test that failed has left."""
        for process in self.started:
            if process.returncode is None:
                process.kill()
                await buried(process)

    @asynccontextmanager
    async def serving(self, count: int) -> AsyncIterator[list[str]]:
        """`count` gateways, stopped as an operator stops them; yields their addresses."""
        starting = [asyncio.ensure_future(self.serve()) for _ in range(count)]
        try:
            yield [url for _, url in await asyncio.gather(*starting)]
        finally:
            await asyncio.wait(starting)
            started = [each.result()[0] for each in starting if each.exception() is None]
            for process in started:
                process.send_signal(signal.SIGTERM)
            for process in started:
                await buried(process)


def ledgered(
    folder: Path, upstream: str, apps: Mapping[str, str], policy: str = "timeouts: {drain: 5s}\n", ledger: ServerAddress | None = None
) -> Ledgered:
    write_policies(folder / "policies", upstream, apps, policy)
    place = ledger or new_file(folder)
    tokens = {app: identity.mint() for app in apps}
    with connect.changing(place) as db:
        for app, token in tokens.items():
            admin.issue_token(db, app, identity.digest(token), who="test", now=time.time())
    return Ledgered(folder, tokens, ledger)


def children(pid: int) -> list[int]:
    """The processes that one has started: a supervisor's workers, a database server's backends."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # its thread has ended
            found += [int(child) for child in listing.read_text().split()]
    return found


OPEN_CALLS = "SELECT count(*) FROM calls WHERE state = 'open' AND owner LIKE $1"
"""How many calls of a process hold a reservation."""


async def in_flight(ledger: Path | ServerAddress, count: int, pid: int) -> None:
    """Wait until `count` calls of this process hold a reservation: on a busy machine no delay is long enough to promise it."""
    await until(lambda: rows(ledger, OPEN_CALLS, f"%-{pid}-%")[0][0] >= count, 60)


async def kill_in_mid_call(ledger: Path | ServerAddress, pid: int) -> None:
    """Stop a process wherever it is, and kill it there if it holds a call: a kill that hits nothing proves nothing.

    It is stopped for one look only: it may hold what others wait for.
    """
    with contextlib.closing(writing(ledger)) as db:

        def holds_a_call() -> bool:
            return db.execute(OPEN_CALLS, (f"%-{pid}-%",)).fetchall()[0][0] > 0

        async with asyncio.timeout(60):
            while True:
                if holds_a_call():
                    os.kill(pid, signal.SIGSTOP)
                    if holds_a_call():
                        return os.kill(pid, signal.SIGKILL)
                    os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(0.02)


async def buried(process: asyncio.subprocess.Process) -> None:
    """Wait for the end of a process that was killed or told to stop."""
    await asyncio.wait_for(process.wait(), 60)
    process._transport.close()
