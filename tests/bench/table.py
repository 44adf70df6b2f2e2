"""Medians, ratios to bare mitmdump of the same round, and the machine they were taken on, as a Markdown table."""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

type Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""By peer: what each round measured."""

REFERENCE = "mitmdump"


def median(rounds: Sequence[Mapping[str, Any]], what: str) -> float:
    return statistics.median(each[what] for each in rounds)


def row(case: str, rounds: Rounds, peer: str) -> list[str]:
    """One peer in one case. Ratios and differences are taken within a round, then their median."""
    own = rounds[peer]

    def beside(other: str, form: Callable[[Mapping[str, Any], Mapping[str, Any]], float]) -> float | None:
        pairs = zip(own, rounds.get(other, ()), strict=False)
        return statistics.median([form(mine, theirs) for mine, theirs in pairs] or [float("nan")]) if other in rounds else None

    ratio = beside(REFERENCE, lambda mine, theirs: mine["per_second"] / theirs["per_second"] if theirs["per_second"] else float("nan"))
    added = beside("direct", lambda mine, theirs: mine["p50_ms"] - theirs["p50_ms"])
    first = beside("direct", lambda mine, theirs: mine["first_ms"] - theirs["first_ms"])
    return [
        case,
        peer,
        f"{median(own, 'per_second'):,.0f}",
        "" if ratio is None else f"{ratio:.2f}x",
        f"{median(own, 'p50_ms'):.1f} / {median(own, 'p99_ms'):.1f}",
        "" if added is None or peer == "direct" else f"{added:+.2f}",
        "" if first is None or peer == "direct" else f"{first:+.2f}",
        "" if peer == "direct" else f"{median(own, 'cpu_ms'):.2f}",
        "" if peer == "direct" else f"{median(own, 'memory_mb'):.0f}",
        f"{sum(each['faults'] for each in own)}",
    ]


HEADER = ["case", "peer", "calls/s", "of bare", "p50 / p99 ms", "added p50 ms", "first byte ms", "CPU ms a call", "MB", "faults"]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [HEADER, ["---", "---", *["--:"] * (len(HEADER) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(folder: Path) -> str:
    """Return what the figures depend on: cores, Python, and how long the disk takes to make 4 KB durable."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    times = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(50):
            file.write(bytes(4096))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    disk = f"fdatasync p50 {1000 * statistics.median(times):.2f} ms"
    return f"{os.cpu_count()} cores ({model or platform.machine()}), {memory_gb:.0f} GB, Python {platform.python_version()}, {disk}"
