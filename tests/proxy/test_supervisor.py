"""`gateway serve --workers 2` as a user runs it: one port, one ledger, processes that come and go."""

import asyncio
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import anthropic
import pytest
from gateway import APP, write_policies
from ledgers import until

from gateway_addon.identity import tokens
from gateway_addon.ledger import admin, connect
from gateway_addon.ledger.store import sqlite_files
from gateway_addon.proxy.supervisor import SHARED_ACCEPTS, ListeningLoop, bind, cores, stop_signals
from gateway_addon.simulator import KEY, Behaviour, Simulator

HELLO = [{"role": "user", "content": "hello"}]


@contextmanager
def serving(folder: Path, upstream: str, *options: str):
    """A gateway with more options, and without a standard input, as some programs start others; yields (process, url, token)."""
    policies = write_policies(folder / "policies", upstream, {"app": APP})
    path = folder / "gateway.db"
    sqlite_files.create(path)
    token = tokens.mint()
    with connect.changing(path) as db:
        admin.issue_token(db, "app", tokens.digest(token), who="test", now=time.time())
    where = ["--listen", "127.0.0.1:0", "--policies", str(policies), "--ledger", f"sqlite:///{path}", *options]
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-u", "-m", "gateway_addon", "serve", *where]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"SIMULATED_KEY": KEY})
    try:
        url = process.stdout.readline().split()[1]
        yield process, url, token
    finally:
        process.stdout.close()
        process.terminate()
        process.wait(60)


def workers(process) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes through /proc")
async def test_a_dead_worker_is_replaced_and_its_call_is_settled(tmp_path):
    async with Simulator(behaviour=Behaviour(delay_ms=50, output_tokens=2000)) as api:
        with serving(tmp_path, api.url, "--workers", "2") as (process, url, token):
            await until(lambda: len(workers(process)) == 2)
            before = workers(process)
            client = anthropic.AsyncAnthropic(base_url=url, api_key=token, max_retries=0)
            call = asyncio.ensure_future(client.messages.create(model="claude-haiku-4-5", max_tokens=4000, messages=HELLO))
            await until(lambda: api.book.in_flight == 1)
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(anthropic.APIConnectionError):
                await call
            await until(lambda: len([pid for pid in workers(process) if pid not in before and alive(pid)]) == 2)
            api.behaviour = Behaviour()

            async def answers() -> bool:
                try:
                    await client.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO)
                    return True
                except anthropic.APIError:
                    return False

            assert any([await answers() or await asyncio.sleep(0.3) for _ in range(20)])
            await client.close()
            book = await api.settled()
    db = sqlite3.connect(tmp_path / "gateway.db")
    spent_nano, held_nano = db.execute("SELECT sum(spent_nano), sum(reserved_nano) FROM entries").fetchone()
    db.close()
    assert held_nano == 0
    assert spent_nano >= book.billed_nano


async def test_workers_end_with_their_supervisor_however_it_ends(tmp_path):
    async with Simulator() as api:
        with serving(tmp_path, api.url, "--workers", "2") as (process, _, _):
            await until(lambda: len(workers(process)) == 2)
            pids = workers(process)
            process.kill()
            await until(lambda: not any(alive(pid) for pid in pids))


async def test_each_core_has_a_worker_and_calls_outlive_the_signal(tmp_path):
    """By default each core has a worker, and a call in flight outlives the signal."""
    async with Simulator(behaviour=Behaviour(delay_ms=100, output_tokens=20)) as api:
        with serving(tmp_path, api.url) as (process, url, token):
            if (count := min(cores(), 4)) > 1:
                await until(lambda: len(workers(process)) == count)
            async with anthropic.AsyncAnthropic(base_url=url, api_key=token, max_retries=0) as client:
                calls = [asyncio.ensure_future(client.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO)) for _ in range(8)]
                await until(lambda: api.book.in_flight == 8)
                process.terminate()
                assert [answer.usage.output_tokens for answer in await asyncio.gather(*calls)] == [20] * 8
            assert await asyncio.to_thread(process.wait, 15) == 0
        billed_nano = (await api.settled()).billed_nano
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        assert db.execute("SELECT sum(spent_nano), sum(reserved_nano) FROM entries").fetchone() == (billed_nano, 0)


async def test_a_hang_up_reads_the_policies_again_and_ends_nothing(tmp_path):
    """SIGHUP to the supervisor, which is how `systemctl reload` and a closed terminal come, ended every call in flight."""
    async with Simulator(behaviour=Behaviour(delay_ms=100, output_tokens=20)) as api:
        with serving(tmp_path, api.url, "--workers", "2") as (process, url, token):
            await until(lambda: len(workers(process)) == 2)
            before = workers(process)
            async with anthropic.AsyncAnthropic(base_url=url, api_key=token, max_retries=0) as client:
                ask = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": HELLO}
                calls = [asyncio.ensure_future(client.messages.create(**ask)) for _ in range(4)]
                await until(lambda: api.book.in_flight == 4)
                process.send_signal(signal.SIGHUP)
                assert [answer.usage.output_tokens for answer in await asyncio.gather(*calls)] == [20] * 4
                await until(lambda: (tmp_path / "log").read_text().count("SIGHUP: the policies and the key are read again"))
                assert (await client.messages.create(**ask)).usage.output_tokens == 20
            assert (process.poll(), workers(process)) == (None, before)
            (tmp_path / "policies" / "apps" / "app.yaml").write_text("caps: [what\n")
            await until(lambda: (tmp_path / "log").read_text().count("The policy in force stays"))
    lines = [line.split(" ", 2)[-1] for line in (tmp_path / "log").read_text().splitlines()]
    assert {line: lines.count(line) for line in lines if lines.count(line) > 1} == {}, "no worker repeats another"
    assert sum("Stopping" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("stdin", "before", "ends"),
    [("tty", signal.SIG_DFL, True), ("tty", signal.SIG_IGN, False), ("file", signal.SIG_DFL, False), ("none", signal.SIG_DFL, False)],
)
def test_a_hang_up_ends_what_was_started_from_the_terminal(monkeypatch, stdin, before, ends):
    """Unless it was started by nohup."""
    given = {"tty": SimpleNamespace(isatty=lambda: True), "file": SimpleNamespace(isatty=lambda: False), "none": None}[stdin]
    monkeypatch.setattr(sys, "stdin", given)
    monkeypatch.setattr(signal, "getsignal", lambda number: before)
    assert (signal.SIGHUP in stop_signals()) == ends
    assert {signal.SIGTERM, signal.SIGINT} <= set(stop_signals())


def test_without_descriptors_one_line_says_so_and_callers_wait(caplog, monkeypatch):
    """Not a traceback for each try: and what was not taken is, once there are some again."""
    monkeypatch.setattr(asyncio.constants, "ACCEPT_RETRY_DELAY", 0.05)
    listener, limits = bind("127.0.0.1", 0), resource.getrlimit(resource.RLIMIT_NOFILE)
    callers = [socket.socket() for _ in range(4)]
    answered = []

    async def serve(reader, writer):
        writer.close()
        answered.append(1)

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), limits[1]))
        try:
            await asyncio.sleep(0.3)  # several tries
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert not answered
        assert sum(1 for each in asyncio.get_running_loop()._scheduled if each._callback.__name__ == "_accept_again") <= 1
        await until(lambda: len(answered) >= len(callers))
        server.close()

    with asyncio.Runner(loop_factory=lambda: ListeningLoop(listener)) as runner:
        runner.run(run())
    for caller in callers:
        caller.close()
    [line] = caplog.records
    assert (line.getMessage(), line.exc_info) == (
        "No more connections are taken for now (Too many open files): raise `ulimit -n`, or start more workers.", None,
    )  # fmt: skip


def open_for_udp(port: int) -> bool:
    return f":{port:04X} " in Path("/proc/net/udp").read_text()


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes and sockets through /proc")
async def test_workers_share_one_port_and_open_no_other(tmp_path):
    """In front of an https upstream workers share the one port, and no other is opened."""
    with serving(tmp_path, "https://localhost:1", "--workers", "2") as (process, url, token):
        await until(lambda: len(workers(process)) == 2)
        pids = workers(process)
        assert not open_for_udp(int(url.rpartition(":")[2])), "QUIC is not served"
        async with anthropic.AsyncAnthropic(base_url=url, api_key=token, max_retries=0) as client:
            for _ in range(20):
                with pytest.raises(anthropic.InternalServerError, match="could not reach"):
                    await client.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO)
        assert workers(process) == pids
    assert "ended with" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes through /proc")
async def test_a_second_signal_ends_what_is_still_in_flight(tmp_path):
    async with Simulator(behaviour=Behaviour(delay_ms=50, output_tokens=4000)) as api:
        with serving(tmp_path, api.url, "--workers", "2") as (process, url, token):
            async with anthropic.AsyncAnthropic(base_url=url, api_key=token, max_retries=0) as client:
                call = asyncio.ensure_future(client.messages.create(model="claude-haiku-4-5", max_tokens=4000, messages=HELLO))
                await until(lambda: api.book.in_flight == 1)
                process.terminate()
                await asyncio.sleep(0.5)
                assert process.poll() is None, "the call in flight may finish"
                with pytest.raises(ConnectionRefusedError):  # so that a proxy in front tries another gateway
                    await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                process.terminate()
                with pytest.raises(anthropic.APIConnectionError):
                    await call
            assert await asyncio.to_thread(process.wait, 15) != 0


def test_a_gateway_that_cannot_start_says_why_once(tmp_path):
    policies = write_policies(tmp_path / "policies", "https://api.anthropic.com", {"app": APP})
    sqlite_files.create(tmp_path / "gateway.db")
    where = ["--listen", "127.0.0.1:0", "--policies", str(policies), "--ledger", f"sqlite:///{tmp_path / 'gateway.db'}", "--workers", "3"]
    environment = {name: value for name, value in os.environ.items() if name != "SIMULATED_KEY"}
    command = [sys.executable, "-m", "gateway_addon", "serve", *where]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("SIMULATED_KEY")) == (2, "", 1), done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_is_said_is_sent_at_once(host):
    """A head and its body are two pieces: the second must not wait until the client has acknowledged the first."""
    seen = []

    async def accepted(_, writer):
        seen.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def meet(listener):
        server = await asyncio.start_server(accepted, host, 0)
        reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        await reader.read()
        writer.close()
        server.close()

    with bind(host, 0) as listener, asyncio.Runner(loop_factory=lambda: ListeningLoop(listener)) as runner:
        runner.run(meet(listener))
    assert seen == [1]


async def test_a_taken_port_is_said_in_a_sentence(tmp_path):
    async with Simulator() as api:
        policies = write_policies(tmp_path / "policies", api.url, {"app": APP})
        sqlite_files.create(tmp_path / "gateway.db")
        listen = api.url.removeprefix("http://")
        where = ["--listen", listen, "--policies", str(policies), "--ledger", f"sqlite:///{tmp_path / 'gateway.db'}"]
        command = [sys.executable, "-m", "gateway_addon", "serve", *where]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, env=os.environ | {"SIMULATED_KEY": KEY})
        assert done.returncode == 2
        assert done.stderr.startswith(f"Cannot listen on {listen} (Address already in use). Is another gateway running? Choose")


@pytest.mark.parametrize(("shared", "most"), [(False, 64), (True, SHARED_ACCEPTS)])
def test_of_many_that_come_at_once_a_lone_worker_takes_all(shared, most):
    """Counted in turns of the loop: at one caller a turn, the last of 64 waited for several calls of each of the others.

    One of several workers takes a few: the first to wake would take them all, and keep them, for clients hold on to their connections.
    """
    listener = bind("127.0.0.1", 0)
    taken: list[int] = []

    async def run(clients: list[socket.socket]) -> list[int]:
        server = await asyncio.get_running_loop().create_server(lambda: taken.append(1) or asyncio.Protocol(), "ignored", 1)
        for client in clients:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        counts = [0]
        async with asyncio.timeout(0.9):  # a connection that the queue has no room for tries again after a second
            while len(taken) < len(clients):
                await asyncio.sleep(0)
                counts.append(len(taken))
        for client in clients:
            client.close()
        server.close()
        await asyncio.sleep(0.05)
        return counts

    with ExitStack() as stack, asyncio.Runner(loop_factory=lambda: ListeningLoop(listener, shared=shared)) as runner:
        counts = runner.run(run([stack.enter_context(socket.socket()) for _ in range(64)]))
    assert max(after - before for before, after in pairwise(counts)) == most
