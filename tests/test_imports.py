"""Who may know whom: the rooms of gateway_addon/ import each other in one direction, and each outside library has its rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gateway_addon"

OWN = {
    # room: the rooms that it may import. A room that is not here is an edge (commands, launchers), checked by EDGES below.
    "addon": {"answers", "clocks", "gate", "header_filter", "inject", "listener", "lives", "passes", "reading", "refusals", "running", "settlement"},
    "debugging": {
        "addon", "answers", "calls", "explanation", "gate", "identity", "inject", "ledger", "lives", "money", "passes", "policy", "pricing", "refusals",
        "settlement", "sse", "usage",
    },
    "explanation": {"bounds", "ledger", "money", "offers", "policy", "reading", "refusals"},
    "lives": {"answers", "clocks", "gate", "inject", "passes", "refusals", "running", "streams"},
    "inject": {"bounded", "refusals", "relay", "whole"},
    "listener": {"policy"},
    "modes": set(),
    "dispatch": set(),
    "handling": {"dispatch"},
    "header_filter": set(),
    "bounded": set(),
    "relay": {"bounded", "dispatch", "whole"},
    "whole": {"bounded", "dispatch"},
    "gate": {
        "alerts", "answers", "bounds", "calls", "clocks", "door", "herald", "identity", "ledger", "money", "names", "noise", "offers", "origin",
        "passes", "policy", "pricing", "rates", "reading", "refusals", "running", "sentences", "settlement", "streams", "workspace",
        "wrong_paths",
    },
    "streams": {"clocks", "grants", "ledger", "refusals", "running", "sentences"},
    "workspace": {
        "answers", "batches", "booking", "door", "files", "ledger", "passes", "policy", "pricing", "reading", "refusals", "sentences", "usage",
    },
    "keeper": {"batches", "booking", "clocks", "ledger", "policy"},
    "daybook": {"ledger"},
    "booking": {"batches", "ledger", "pricing"},
    "batches": {"bounds", "ledger", "names", "policy", "pricing", "reading", "refusals", "sentences", "usage"},
    "files": {"reading", "refusals", "usage"},
    "passes": {"ledger", "names", "policy", "reading", "settlement"},
    "offers": {"bounds", "door", "grants", "policy", "pricing", "reading"},
    "alerts": {"ledger", "money", "policy"},
    "herald": {"alerts", "ledger", "policy"},
    "replay": {"ledger", "policy", "pricing", "reading", "windows"},
    "answers": {"ledger", "money", "names", "policy", "pricing"},
    "calls": {"ledger"},
    "door": {"grants", "ledger"},
    "settlement": {"ledger", "pricing", "running", "usage"},
    "running": {"bounds", "grants", "ledger", "money", "names", "policy", "pricing", "reading", "usage"},
    "sentences": {"bounds", "identity", "ledger", "money", "noise", "origin", "policy", "rates", "refusals", "running"},
    "bounds": {"fields", "money", "policy", "pricing", "reading", "refusals", "survey"},
    "policy": {"header_filter", "money", "pricing", "reading", "refusals", "survey", "yamlfile"},
    "pricing": {"money", "usage", "yamlfile"},
    "moving": {"inventory", "ledger"},
    "reconcile": {"ledger", "money", "pricing", "usage"},
    "wrong_paths": {"reading", "refusals"},
    "reading": {"fields", "nfkc", "refusals", "survey"},
    "survey": {"fields"},
    "usage": {"encodings", "names", "sse"},
    "ledger": {"clocks", "money", "names", "windows"},
    "names": {"identity"},
    "identity": {"refusals"},
    "simulator": set(),
    **{key: set() for key in ("clocks", "deployment", "encodings", "fields", "forms", "grants", "money", "nfkc", "noise", "origin", "rates", "refusals", "services", "sse", "windows", "yamlfile")},
}  # fmt: skip
EDGES = {"__init__", "__main__", "checkup", "cli", "console", "demo", "inventory", "local", "logs", "otel", "provider", "reload", "secret", "serve", "settings", "shim", "upstream", "workers"}
"""Rooms that may read the clock, the environment and files; nothing of the core imports them."""

ROOMS_OF = {
    # an outside library: the rooms that may import it
    "inject": {"bounded", "refusals", "relay", "whole"},
    "psycopg": {"ledger"},
    "psycopg_pool": {"ledger"},
    "sqlite3": {"ledger"},
    "sqlite_utils": {"ledger"},
    "yaml": {"policy", "pricing", "yamlfile"},
    "click": {"cli", "simulator"},
    "flask": {"console"},
    "werkzeug": {"console"},
    "tabulate": {"cli", "demo", "explanation"},
}
CLOCKS_AND_FILES = {"time", "os", "pathlib", "io", "tempfile", "shutil", "socket", "subprocess"}
MAY_LOOK_OUTSIDE = {
    # not an edge, and why it may touch the clock or files all the same
    "clocks": "is the clocks, which others are given",
    "whole": "takes the time at which a message came, as mitmproxy does",
    "listener": "looks whether the certificate's files have changed",
    "debugging": "is given the ledger's place and hands it on",
    "explanation": "is given the ledger's place and hands it on",
    "ledger": "keeps a file of its own",
    "policy": "loads a folder of files, in `loading` alone",
    "pricing": "loads prices.yaml, in `loading` alone",
    "simulator": "stands for another machine",
}


def modules() -> Iterator[tuple[Path, str]]:
    """Each module with the name of its room: the module itself, or the package under gateway_addon/ that it is in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path, *, when_run: bool = False) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it (`when_run`: without those that only a type checker sees).

    `from gateway_addon import a` is gateway_addon.a.
    """
    inside = [*path.relative_to(PACKAGE.parent).parts[:-1]]
    body = parsed(path).body
    if when_run:
        body = [node for node in body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in chain.from_iterable(map(ast.walk, body)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(inside[: len(inside) - node.level + 1] if node.level else []), *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rooms_of(path: Path, room: str) -> set[str]:
    """The other rooms that a module imports."""
    own = (name.split(".") for name in imported(path) if name.startswith("gateway_addon."))
    return {parts[1] for parts in own} - {room, "__version__"}


ALL = [pytest.param(path, room, id=path.relative_to(PACKAGE).with_suffix("").as_posix()) for path, room in modules()]


@pytest.mark.parametrize(("path", "room"), ALL)
def test_a_room_imports_only_the_rooms_below_it(path, room):
    assert room in OWN or room in EDGES, "a new room: say in this test whom it may import"
    if room in OWN:
        assert rooms_of(path, room) <= OWN[room]
    else:
        assert "simulator" not in rooms_of(path, room) or room in ("cli", "demo")


def test_the_rooms_form_no_circle():
    graph: dict[str, set[str]] = {}
    for path, room in modules():
        graph.setdefault(room, set()).update(rooms_of(path, room))
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)  # raises CycleError


def test_the_modules_of_one_room_form_no_circle_either():
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path, _ in modules()}
    graph = {}
    for name, path in names.items():
        # `from package import module` leans on the module; `from package import value` on the package's face.
        graph[name] = {each if each in names else each.rpartition(".")[0] for each in imported(path, when_run=True)} & set(names) - {name}
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)


@pytest.mark.parametrize(("path", "room"), ALL)
def test_a_library_is_known_only_in_its_own_rooms(path, room):
    outside = {name.split(".")[0] for name in imported(path)}
    assert {library for library in outside & set(ROOMS_OF) if room not in ROOMS_OF[library]} == set()


@pytest.mark.parametrize(("path", "room"), [param for param in ALL if param.values[1] not in EDGES])
def test_the_core_takes_the_time_and_values_as_arguments(path, room):
    outside = {name.split(".")[0] for name in imported(path)} & CLOCKS_AND_FILES
    if room in ("policy", "pricing"):
        assert outside <= ({"pathlib"} if path.stem == "loading" else set())
    elif room not in MAY_LOOK_OUTSIDE:
        assert outside == set()


def test_the_simulated_api_shares_nothing_with_what_it_checks():
    """Its book and its prices are its own: only so does their agreement with the ledger mean something."""
    for path, room in modules():
        if room == "simulator":
            assert rooms_of(path, room) == set()


def test_a_gateway_in_production_loads_nothing_that_only_looks_at_flows_and_its_supervisor_nothing_that_serves():
    code = "import sys, gateway_addon.cli.serve; print(*sys.modules); import gateway_addon.serve; print(*sys.modules)"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    supervisor, gateway = (line.split() for line in lines)
    assert "mitmproxy" not in supervisor
    assert "gateway_addon.serve" in gateway
    assert {"tornado", "mitmproxy.tools", "gateway_addon.debugging", "tabulate"} & set(gateway) == set()
