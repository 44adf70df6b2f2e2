"""A real OpenID provider, from npm, that gives identity tokens to two jobs; started again it has a new key."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2

VERSION = "9.13.3"
PACKAGE = f"oidc-provider@{VERSION}"
CACHE = Path("~/.cache/gateway-clients").expanduser() / f"oidc-provider-{VERSION}"
PROGRAM = Path(__file__).with_name("oidc_provider.mjs")


def installed() -> Path:
    """The folder with the package, installed where the cache has none of this version."""
    if not CACHE.exists():
        unfinished = CACHE.with_name(f".{CACHE.name}-{os.getpid()}")
        unfinished.mkdir(parents=True)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", unfinished, PACKAGE], check=True, capture_output=True, timeout=300)
        unfinished.rename(CACHE)
    return CACHE


def _laid_out(folder: Path) -> None:
    """Put the program where it finds its package."""
    folder.mkdir(exist_ok=True)
    shutil.copy(PROGRAM, folder)
    if not (modules := folder / "node_modules").exists():
        modules.symlink_to(installed() / "node_modules")


@asynccontextmanager
async def provider(folder: Path, port: int, key_id: str, audience: str) -> AsyncIterator[str]:
    """Run the provider until the block ends. Yields its address, which is its `iss`."""
    await asyncio.to_thread(_laid_out, folder)
    process = await asyncio.create_subprocess_exec(
        "node", PROGRAM.name, str(port), key_id, audience, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"listening\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()
        process._transport.close()


async def identity(url: str, job: str) -> str:
    """Return an identity token of a job, as the provider gives it out."""
    async with httpx2.AsyncClient() as http:
        answer = await http.post(f"{url}/token", data={"grant_type": "client_credentials"}, auth=(job, f"secret-of-{job}"))
    return str(answer.json()["access_token"])
