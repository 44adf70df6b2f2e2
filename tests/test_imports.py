"""Who may know whom: rooms import downwards only, and each outside library, clock and file has its rooms."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "gateway_addon"

FLOORS = """
    __main__
    cli addon
    demo
    proxy console
    operations onboarding
    calls
    upstreams
    policy
    pricing
    ledger identity messages
    money windows clocks refusals names yaml_file http_client __init__
"""
"""From the top down: a room imports rooms of lower floors, and none of its own floor beside it."""

ALONE = {"simulator": set(), "demo": {"simulator"}, "identity": {"names", "refusals"}, "messages": {"names", "refusals"}, "proxy.fastpath": {"proxy.backpressure", "proxy.bounded_http1"}}
"""Rooms that know less than their floor allows; the simulated API stands for another machine, and knows nothing of ours."""

LIBRARIES = {
    # an outside library, or a module of it: the rooms and modules that may import it
    "mitmproxy": {"addon", "proxy"},
    "psycopg": {"ledger"}, "sqlite3": {"ledger"}, "sqlite_utils": {"ledger"},
    "yaml": {"policy", "pricing", "yaml_file"},
    "click": {"cli", "simulator"}, "jwt": {"identity.key_set"}, "flask": {"console"}, "werkzeug": {"console"},
    # who asks over the network: the one client, and those who speak to a database, to callers, or to a process of their own
    "http.client": {"http_client"}, "urllib.request": set(), "urllib3": set(),
    "socket": {"http_client", "ledger.store", "proxy", "calls.judging_process", "cli.serve", "console.app"},
}  # fmt: skip
EDGES = {"addon", "cli", "console", "demo", "operations", "onboarding", "proxy", "upstreams", "simulator", "ledger", "clocks"}
"""Rooms with modules that may read the clock, the environment and files."""
OUTSIDE = {"time", "os", "pathlib", "io", "tempfile", "shutil", "socket", "subprocess"}
MAY_LOOK_OUTSIDE = {"names", "policy.loading", "pricing.loading", "calls.judging_process", "http_client"}
"""Modules of pure rooms that load files, start a process or ask over the network, and do nothing else."""


@cache
def modules() -> dict[str, ast.Module]:
    """Each module's dotted name below the package, with its tree."""
    return {dotted(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(name: str, *, when_run: bool = False) -> Iterator[str]:
    """The dotted names that a module imports; `when_run`: without those that only a type checker sees."""
    tree = modules()[name]
    skipped: set[ast.AST] = set()
    if when_run:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped.update(each for part in node.body for each in ast.walk(part))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(PACKAGE.name, *above(name))[: -node.level or None], *([node.module] if node.module else [])]) if node.level else str(node.module)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if not base.startswith(PACKAGE.name) or inner.removeprefix("gateway_addon.") in modules() else base


def above(name: str) -> tuple[str, ...]:
    """The parts of a module's name from which its relative imports count."""
    parts = name.split(".")
    return (*parts, "") if (PACKAGE / "/".join(parts)).is_dir() else tuple(parts)


def own(name: str, **options: bool) -> set[str]:
    """The modules of this package that a module imports."""
    found = (each.partition("gateway_addon")[2].lstrip(".") or "__init__" for each in imported(name, **options) if each.startswith("gateway_addon"))
    return set(found)


def room(name: str) -> str:
    return name.partition(".")[0]


def test_a_room_imports_only_rooms_of_lower_floors():
    """The table is the design's. A room that stands on no floor may be imported by `ALONE` alone."""
    floors = {each: height for height, row in enumerate(reversed(FLOORS.strip().splitlines())) for each in row.split()}
    assert {room(name) for name in modules()} == set(floors) | {"simulator"}
    climbs = [
        f"{name} imports {target}"
        for name in modules()
        for target in own(name)
        if room(target) != room(name)
        and room(name) != "simulator"
        and (floors.get(room(target), -1) >= floors[room(name)])
        and not (room(name) == "demo" and room(target) == "simulator")
    ]
    assert climbs == []


def test_a_room_that_stands_alone_knows_no_more_than_it_may():
    beyond = [
        f"{name} imports {target}"
        for alone, allowed in ALONE.items()
        for name in modules()
        if f"{name}.".startswith(f"{alone}.")
        for target in own(name)
        if alone != "demo" and not f"{target}.".startswith(f"{alone}.") and not {room(target), target} & allowed
    ]
    assert beyond == []


def test_modules_import_each_other_in_one_direction():
    graph = {name: own(name, when_run=True) - {name} for name in modules()}
    inside = {
        # a package's own __init__ gathers its modules: it is no way back
        name: {target for target in targets if not name.startswith(f"{target}.") or target == "__init__"}
        for name, targets in graph.items()
    }
    assert list(TopologicalSorter(inside).static_order())


def test_an_outside_library_is_imported_by_its_rooms_alone():
    strangers = [
        f"{name} imports {target}"
        for name in modules()
        for target in imported(name)
        for library, rooms in LIBRARIES.items()
        if f"{target}.".startswith(f"{library}.") and not any(f"{name}.".startswith(f"{each}.") for each in rooms)
    ]
    assert strangers == []


def test_only_edges_read_clocks_files_and_the_environment():
    strangers = [
        f"{name} imports {target}"
        for name in modules()
        for target in imported(name)
        if target.partition(".")[0] in OUTSIDE and room(name) not in EDGES and name not in MAY_LOOK_OUTSIDE
    ]
    assert strangers == []


def test_the_root_holds_few_modules():
    assert len([name for name in modules() if "." not in name and not (PACKAGE / name).is_dir() and not name.startswith("__")]) <= 8


def test_a_class_name_has_one_meaning():
    """Outside the simulated API and the demo, which stand for other programs."""
    where = defaultdict(list)
    for name, tree in modules().items():
        if room(name) not in ("simulator", "demo"):
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    where[node.name].append(name)
                elif isinstance(node, ast.TypeAlias) and isinstance(node.name, ast.Name):
                    where[node.name.id].append(name)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


LOADED = """
import sys
from gateway_addon.cli.serve import serve_here
print(*sys.modules)
try:
    serve_here(None, None)
except AttributeError:  # these are no settings to serve by
    print(*sys.modules)
"""


def test_a_gateway_loads_no_page_and_its_supervisor_no_proxy():
    """Nor what the addons of mitmproxy that it does not run would load: Flask, an LDAP client."""
    lines = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True).stdout.splitlines()
    supervisor, gateway = (line.split() for line in lines)
    assert "mitmproxy" not in supervisor
    assert "gateway_addon.proxy.server" in gateway
    assert {"tornado", "mitmproxy.tools", "gateway_addon.proxy.web", "jwt", "flask", "ldap3"} & set(gateway) == set()
