"""The simulated API as a process: prints its URL and serves until it is told to stop.

The key comes from a file and never from an option: other people on the machine can read a process's arguments.
"""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import click

from .behaviour import Behaviour, overridden
from .server import KEY, Simulator


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=0, help="0 takes a free one.")
@click.option("--key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The key it accepts; else a fixed one.")
@click.option("--behaviour", default="{}", metavar="JSON", help='Such as {"hostile": true, "tokens_per_s": 80}.')
def main(host: str, port: int, key_file: Path | None, behaviour: str) -> None:
    """Run a simulated Claude API. Its book is at /_simulator/book."""
    key = key_file.read_text().strip() if key_file else KEY
    try:
        asyncio.run(_serve(Simulator(key=key, behaviour=_read(behaviour), host=host, port=port)))
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _read(text: str) -> Behaviour:
    try:
        wishes: dict[str, Any] = json.loads(text)
        return overridden(Behaviour(), {"metadata": {"user_id": json.dumps({"simulate": wishes})}})
    except ValueError as error:
        raise click.UsageError(f"--behaviour: {error}") from error


async def _serve(simulator: Simulator) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with simulator:
        click.echo(simulator.url)
        await stop.wait()


if __name__ == "__main__":
    main()
