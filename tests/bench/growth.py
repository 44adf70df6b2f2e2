"""Growth: 1, 2 and 4 gateways on one PostgreSQL server, with 1 app and with 100, through HTTP; in interleaved rounds, as a Markdown table.

    .venv/bin/python tests/bench/growth.py [--rounds 3] [--seconds 3] [--callers 64]

The callers stay as many however many gateways they share. Of the processor's time that of the gateways and that of the server are told
apart; the callers and the simulated API have theirs beside it, so on few cores calls a second say less than the milliseconds a call.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import table
from api import api
from peers import Peer
from postgresql import Postgres, binaries

from gateway_addon.identity import tokens
from gateway_addon.ledger import ServerAddress, admin, connect

HERE = Path(__file__).parent
GATEWAYS = (1, 2, 4)
APPS = (1, 100)
START_S = 120
APP = "models: {allow: ['claude-*']}\ncaps: {day: $1000000, month: $1000000}\n"
COLUMNS = ["apps", "gateways", "calls/s", "of one", "p50 / p99 ms", "gateways' CPU ms a call", "server's CPU ms a call", "faults"]


def credentials(place: ServerAddress, folder: Path, apps: int, upstream: str) -> list[str]:
    """Write the policies of so many apps and issue each a token; return the headers' lines."""
    (folder / "apps").mkdir(parents=True)
    (folder / "gateway.yaml").write_text(f"upstream: {upstream}\nkey: {{env: BENCH_KEY}}\n")
    minted = {f"app{number}": tokens.mint() for number in range(apps)}
    with connect.changing(place) as db:
        for app, token in minted.items():
            (folder / "apps" / f"{app}.yaml").write_text(APP)
            admin.issue_token(db, app, tokens.digest(token), who="bench", now=time.time())
    return [f"x-api-key: {token}" for token in minted.values()]


@contextmanager
def gateways(count: int, place: ServerAddress, folder: Path) -> Iterator[list[Peer]]:
    """So many gateways on one ledger, on ports of their own."""
    command = [sys.executable, "-O", "-u", "-m", "gateway_addon", "serve", "--listen", "127.0.0.1:0", "--policies", str(folder), "--ledger", place.url, "--workers", "1"]
    with ExitStack() as stack:
        started = []
        for number in range(count):
            log = stack.enter_context(open(folder.with_suffix(f".{number}.log"), "wb"))
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"BENCH_KEY": "bench-key"})
            stack.callback(process.wait, START_S)
            stack.callback(process.terminate)
            started.append(process)
        yield [Peer("gateway", int(process.stdout.readline().split()[1].rpartition(":")[2]), process.pid) for process in started]


def measure(fleet: list[Peer], server: Peer, credentials: list[str], callers: int, seconds: float) -> dict[str, Any]:
    """One run over all gateways. The first half second warms them up and is not counted."""
    for length in (min(0.5, seconds), seconds):
        before = sum(peer.cpu_s() for peer in fleet), server.cpu_s()
        running = []
        for peer in fleet:
            settings = {"port": peer.port, "credential": credentials, "body": "json", "callers": callers // len(fleet), "seconds": length, "connections": "kept"}
            running.append(subprocess.Popen([sys.executable, str(HERE / "load.py"), json.dumps(settings)], stdout=subprocess.PIPE, text=True))
        seen = [json.loads(process.communicate()[0]) for process in running]
    calls = max(1, sum(one["calls"] for one in seen))
    return {
        "per_second": sum(one["per_second"] for one in seen),
        "p50_ms": max(one["p50_ms"] for one in seen),
        "p99_ms": max(one["p99_ms"] for one in seen),
        "cpu_ms": 1000 * (sum(peer.cpu_s() for peer in fleet) - before[0]) / calls,
        "server_ms": 1000 * (server.cpu_s() - before[1]) / calls,
        "faults": sum(one["faults"] for one in seen),
        "fault": next((one["fault"] for one in seen if one["faults"]), ""),
    }


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 20))
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(0.2, 60), help="Of each run.")
@click.option("--callers", default=64, show_default=True, type=click.IntRange(4, 512), help="Over all gateways.")
def main(rounds: int, seconds: float, callers: int) -> None:
    """Measure gateways on one PostgreSQL server, and print a table."""
    if (bin_folder := binaries()) is None:
        raise click.ClickException("PostgreSQL is not installed: apt-get install postgresql (or your system's package), then run this again")
    seen: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    server = Postgres(bin_folder, fsync=True)
    try:
        with tempfile.TemporaryDirectory(prefix="gateway-bench-") as name, api(Path(name)) as upstream:
            for turn in range(rounds):
                for apps in APPS:
                    for count in GATEWAYS:
                        click.echo(f"[{turn + 1}/{rounds}] {apps} apps, {count} gateways ...", err=True)
                        place, folder = server.ledger(), Path(name) / f"{turn}-{apps}-{count}"
                        lines = credentials(place, folder, apps, upstream)
                        with gateways(count, place, folder) as fleet:
                            seen[apps, count].append(measure(fleet, Peer("server", 0, database=server.pid), lines, callers, seconds))
    finally:
        server.remove()
    click.echo("\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ["--:"] * len(COLUMNS), *(row(seen, *key) for key in seen))))
    click.echo(f"\n{table.machine(Path.cwd())}; {callers} callers, {rounds} interleaved rounds of {seconds:g} s, medians.")
    faults = [each["fault"] for runs in seen.values() for each in runs if each["faults"]]
    for fault in faults:
        click.echo(f"fault: {fault}", err=True)
    sys.exit(1 if faults else 0)


def row(seen: dict[tuple[int, int], list[dict[str, Any]]], apps: int, count: int) -> list[str]:
    """A line of the table. The ratio to one gateway is taken within a round, then the median of the rounds."""
    own, one = seen[apps, count], seen[apps, 1]
    ratio = table.median([{"of_one": mine["per_second"] / alone["per_second"]} for mine, alone in zip(own, one, strict=True)], "of_one")
    figures = [f"{table.median(own, name):.2f}" for name in ("cpu_ms", "server_ms")]
    waits = f"{table.median(own, 'p50_ms'):.1f} / {table.median(own, 'p99_ms'):.1f}"
    return [f"{apps}", f"{count}", f"{table.median(own, 'per_second'):,.0f}", f"{ratio:.2f}x", waits, *figures, f"{sum(each['faults'] for each in own)}"]


if __name__ == "__main__":
    main()
