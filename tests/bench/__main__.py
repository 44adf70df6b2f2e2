"""`./run.sh bench`: the gateway against nothing, bare mitmdump, nginx, LiteLLM and the official gateway, in interleaved rounds on this machine.

Each peer is started for itself and measured alone, pinned to the last core while the simulated API and the callers share the first; rounds
go through all peers before the next begins, so that a slow minute of the machine meets all of them. A program that is not installed is left
out, and said to be. `--peer NAME=PORT` measures a proxy that you have started yourself in front of `--api-port`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))

import official
import peers
import table
from api import api

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Case:
    body: str
    callers: int
    connections: str = "kept"
    https: bool = False
    peers: tuple[str, ...] = ("direct", "nginx", "mitmdump", "gateway", peers.ON_POSTGRESQL, "litellm", "official")
    pinned: bool = True


OWN = ("mitmdump", "gateway", peers.ON_POSTGRESQL, "official")
CASES = {
    "JSON small, 64 connections": Case("json", 64),
    "JSON small, 1 connection": Case("json", 1),
    "JSON small in two pieces, 64 connections": Case("two", 64, peers=OWN),
    "JSON small by its length, 64 connections": Case("length", 64, peers=OWN),
    "JSON small, 64 new connections at once": Case("json", 64, connections="at once"),
    "JSON small, 256 new connections at once": Case("json", 256, connections="at once", peers=OWN),
    "JSON 100 KB, 1 connection": Case("json100k", 1),
    "burst SSE, 16 connections": Case("burst", 16),
    "paced SSE, 64 connections": Case("paced", 64),
    "paced SSE, 1 connection": Case("paced", 1),
    "connection per call, 16 callers": Case("json", 16, connections="each"),
    "https upstream, JSON small, 16 connections": Case("json", 16, https=True, peers=OWN[:3]),
    "JSON small, 64 connections, nothing pinned": Case("json", 64, peers=("mitmdump", "gateway", "gatewayx2"), pinned=False),
}


def measure(peer: peers.Peer, case: Case, seconds: float, core: int | None) -> dict[str, Any]:
    """One run. The first half second warms the peer up and is not counted."""
    for length in (min(0.5, seconds), seconds):
        settings = {"port": peer.port, "credential": peer.credential, "body": case.body, "callers": case.callers, "seconds": length, "connections": case.connections}
        before = peer.cpu_s()
        command = [sys.executable, str(HERE / "load.py"), json.dumps(settings)]
        if core is not None:
            command = ["taskset", "-c", str(core), *command]
        seen: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    cpu_ms = 1000 * (peer.cpu_s() - before) / max(1, seen["calls"])
    return seen | {"cpu_ms": cpu_ms, "memory_mb": peer.memory_mb()}


def run(case: Case, rounds: int, seconds: float, programs: Mapping[str, str], others: list[peers.Peer], api_port: int) -> dict[str, list[dict[str, Any]]]:
    cores = sorted(os.sched_getaffinity(0))
    pinned = case.pinned and len(cores) > 1 and shutil.which("taskset") is not None
    callers_core, peer_core = (cores[0], cores[-1]) if pinned else (None, None)
    seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="gateway-bench-", dir=Path.cwd()) as name, api(Path(name), callers_core, api_port, https=case.https) as upstream:
        for turn in range(rounds):
            for peer_name in case.peers:
                missing = peer_name in peers.PROGRAMS and peer_name not in programs
                if missing or (peer_name == peers.ON_POSTGRESQL and not official.possible()):
                    continue
                with peers.started(peer_name, Path(name) / f"{peer_name}-{turn}", upstream, peer_core, programs.get(peer_name, "")) as peer:
                    seen[peer_name].append(measure(peer, case, seconds, callers_core))
            for peer in others if not case.https and case.pinned else ():
                seen[peer.name].append(measure(peer, case, seconds, callers_core))
    return seen


def pairs(_: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    if wrong := [value for value in values if "=" not in value]:
        raise click.BadParameter(f"{wrong[0]!r} is not {option.metavar}.")
    return dict(value.split("=", 1) for value in values)


def credential(token: str) -> str:
    return f"{'authorization' if token.startswith('Bearer ') else 'x-api-key'}: {token}"


@click.command()
@click.option("--case", "wanted", multiple=True, metavar="TEXT", help="Only cases whose name holds TEXT.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 20))
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(0.2, 60), help="Of each run.")
@click.option("--program", "said", multiple=True, metavar="NAME=PATH", callback=pairs, help=f"Where one of {', '.join(peers.PROGRAMS)} is, if not on the PATH; with no path it is left out.")
@click.option("--peer", "others", multiple=True, metavar="NAME=PORT", callback=pairs, help="A proxy on 127.0.0.1 that you started yourself.")
@click.option("--token", "tokens", multiple=True, metavar="NAME=TOKEN", callback=pairs, help="Its credential: x-api-key, or authorization if it begins with `Bearer `.")
@click.option("--api-port", default=0, help="The simulated API's port, for those to forward to; free by default.")
def main(
    wanted: tuple[str, ...], rounds: int, seconds: float, said: dict[str, str], others: dict[str, str], tokens: dict[str, str], api_port: int
) -> None:
    """Measure the gateway beside bare mitmdump, in interleaved rounds, and print a table."""
    named = [peers.Peer(name, int(port), credential=credential(tokens.get(name, "none"))) for name, port in others.items()]
    programs = peers.programs(said)
    if missing := peers.PROGRAMS.keys() - programs:
        click.echo(f"Not installed or left out, and so not measured: {', '.join(sorted(missing))}.", err=True)
    rows, faults = [], []
    cases = {name: case for name, case in CASES.items() if not wanted or any(text in name for text in wanted)}
    for number, (name, case) in enumerate(cases.items(), 1):
        click.echo(f"[{number}/{len(cases)}] {name} ...", err=True)
        seen = run(case, rounds, seconds, programs, named, api_port)
        rows += [table.row(name, seen, peer) for peer in seen]
        faults += [f"{name}, {peer}: {each['fault']}" for peer, runs in seen.items() for each in runs if each["faults"]]
    click.echo(table.markdown(rows))
    click.echo(f"\n{table.machine(Path.cwd())}; {rounds} interleaved rounds of {seconds:g} s, medians.")
    for fault in faults:
        click.echo(f"fault: {fault}", err=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
