"""The ledger alone, without a proxy: calls a second (reserve and settle, both durable) by engine, gateways and apps, as a Markdown table.

    .venv/bin/python tests/bench/ledgers.py [--seconds 5] [--url postgresql://...]

A gateway is a process with 32 callers. Without --url a PostgreSQL server is started for it (fsync on), from the distribution's package.
"""

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from ledgers import Cap, url
from postgresql import Postgres, binaries

from gateway_addon.ledger import Ledger, LedgerUnavailable, NewCall, ServerAddress, Settlement, admin, connect

CALLERS = 32
GATEWAYS = (1, 2, 4)
CASES = {"1 app": (1, False), "100 apps, each its own": (100, False), "100 apps and a total": (100, True)}
HUGE_NANO = 10**15


async def gateway(ledger_url: str, apps: int, total: bool, seconds: float) -> dict[str, list[float] | int]:
    """One gateway's callers; starts when it is told to on its standard input."""
    ledger = await Ledger.open(ledger_url)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    end, took, refused = time.monotonic() + seconds, [], 0

    async def caller() -> None:
        nonlocal refused
        while (began := time.monotonic()) < end:
            app = random.randrange(apps)
            caps = [Cap(f"app:app{app}", "day", HUGE_NANO), *([Cap("total", "day", HUGE_NANO)] if total else [])]
            try:
                held = await ledger.reserve(NewCall(f"app{app}", None, app + 1), 1000, caps, now=time.time())
                await ledger.settle(held, Settlement(700), now=time.time())
                took.append(time.monotonic() - began)
            except LedgerUnavailable:
                refused += 1

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    await ledger.close()
    return {"took": took, "refused": refused}


def measure(place: Path | ServerAddress, gateways: int, apps: int, total: bool, seconds: float) -> str:
    """A cell: calls a second over all gateways, and their 99th percentile."""
    with connect.changing(place) as db:
        for app in range(apps):
            admin.issue_token(db, f"app{app}", f"digest{app}", who="bench", now=time.time())
    command = [sys.executable, "-O", __file__, "--gateway", json.dumps([url(place), apps, total, seconds])]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(gateways)]
    for process in running:
        process.stdout.readline()
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [json.loads(process.communicate()[0]) for process in running]
    took = sorted(each for one in said for each in one["took"])
    refused = sum(one["refused"] for one in said)
    cell = f"{len(took) / seconds:,.0f} ({took[len(took) * 99 // 100] * 1000:.0f} ms)"
    return cell + (f", {refused} refused" if refused else "")


@click.command()
@click.option("--seconds", default=5.0)
@click.option("--url", "ledger_url", help="An empty ledger's address, instead of a server of its own.")
@click.option("--gateway", "told", hidden=True)
def main(seconds: float, ledger_url: str | None, told: str | None) -> None:
    if told:
        print(json.dumps(asyncio.run(gateway(*json.loads(told)))))
        return
    server = None if ledger_url else Postgres(binaries(), fsync=True)
    try:
        print("| caps | ledger | " + " | ".join(f"{count} gateway{'s' * (count > 1)}" for count in GATEWAYS) + " |\n|" + "---|" * (2 + len(GATEWAYS)))
        for name, (apps, total) in CASES.items():
            for engine in ("SQLite", "PostgreSQL"):
                cells = []
                for count in GATEWAYS:
                    with tempfile.TemporaryDirectory() as folder:
                        place = Path(folder) / "gateway.db" if engine == "SQLite" else server.ledger() if server else ServerAddress(ledger_url)
                        connect.create(place)
                        cells.append(measure(place, count, apps, total, seconds))
                print(f"| {name} | {engine} | {' | '.join(cells)} |", flush=True)
    finally:
        if server:
            server.remove()


if __name__ == "__main__":
    main()
