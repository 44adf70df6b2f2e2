"""Define the settings of a launch as values, so that a supervisor can pass them on without loading the proxy."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Self

WORKER = "GATEWAY_WORKER"
"""The environment variable by which a worker gets its settings."""

FAST_PATH = ("connection", "dispatch", "relay", "whole")
"""Modules of proxy/fastpath that do mitmproxy's work in fewer steps, each of which may be left out."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that a command line gives: where to listen, and where ledger and policies are."""

    host: str
    port: int
    policies: Path
    ledger: str
    options: tuple[str, ...] = ()
    """`K=V` for mitmproxy."""
    web_port: int | None = None
    """The port of mitmweb's page; None: run without mitmweb."""
    web_password: str = ""
    """The argon2 hash of the page's password, so that no option shows the password."""
    web_link: str = ""
    """The address of that page with the password, shown when it can be opened."""
    left_out: tuple[str, ...] = ()
    """Parts of the fast path that are switched off."""
    log_json: bool = False
    """Log lines of JSON, one for each call among them."""
    otel: bool = False
    """Send a span for each call."""
    socket_fd: int | None = None
    """Set in a worker: the supervisor's listening socket."""
    parent_fd: int | None = None
    """Set in a worker: the pipe that tells when the supervisor has ended."""
    ready_fd: int | None = None
    """Set in the first worker: the pipe by which the supervisor learns that this one listens."""
    repeats: bool = False
    """Set in all workers but one, which logs what each of them sees."""
    emit: Callable[[str], None] = field(default=partial(print, flush=True))
    """Prints one line for the person who started it."""

    def written(self) -> str:
        """Return all but `emit` as a text, for `read` in another process. (As arguments everybody on the machine could read them.)"""
        said = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "emit"}
        return json.dumps(said | {"policies": str(self.policies)})

    @classmethod
    def read(cls, text: str) -> Self:
        said = json.loads(text)
        lists = {name: tuple(said[name]) for name in ("options", "left_out")}
        return cls(**said | lists | {"policies": Path(said["policies"])})
