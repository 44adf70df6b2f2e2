"""Consoles for tests: over a made month of calls, and served to a browser."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import month

from gateway_addon.clocks import monotonic_s
from gateway_addon.console.app import server
from gateway_addon.console.login import Login
from gateway_addon.console.pages import Console, Policies
from gateway_addon.proxy.supervisor import bind

GATEWAY = "upstream: https://api.anthropic.com\nkey: {env: ANTHROPIC_API_KEY}\ncaps: {month: $2000}\n"
APP = "models: {allow: [claude-*]}\ncaps: {day: $40, month: $400}\n"


def new_desk(folder: Path, calls: int, days: int = 30) -> Console:
    (folder / "policies" / "apps").mkdir(parents=True)
    (folder / "policies" / "gateway.yaml").write_text(GATEWAY)
    for app in month.APPS:
        (folder / "policies" / "apps" / f"{app}.yaml").write_text(APP)
    month.make(folder / "gateway.db", calls, until=time.time(), days=days)
    return Console(folder / "gateway.db", Policies(folder / "policies"), Login(monotonic_s()))


@contextmanager
def served(desk: Console) -> Iterator[str]:
    """Yield the address of a server of this console, with a new link."""
    desk.login = Login(monotonic_s())
    with bind("127.0.0.1", 0) as listener:
        serving = server(desk, listener)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{serving.port}"
    finally:
        serving.shutdown()
        thread.join(10)
        serving.server_close()
