"""What a launcher is told, as values: a supervisor hands it on and need not load what serves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

FAST_PATH = ("connection", "dispatch", "relay", "whole")
"""Modules of proxy/fastpath that do mitmproxy's work in fewer steps, each of which may be left out."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a command line says about where to listen and where things are."""

    host: str
    port: int
    policies: Path
    ledger: str
    options: tuple[str, ...] = ()
    """`K=V` for mitmproxy."""
    web_port: int | None = None
    """With a port for its page: run under mitmweb."""
    web_password: str = ""
    """Its argon2 hash, so that no option shows it."""
    left_out: tuple[str, ...] = ()
    """Parts of the fast path, for which mitmproxy's own way stays."""
    log_json: bool = False
    """Log lines of JSON, one for each call among them."""
    otel: bool = False
    """Send a span for each call."""
    parent_fd: int | None = None
    """Set in a worker: the pipe that tells when the supervisor has ended."""
    ready_fd: int | None = None
    """Set in the first worker: the pipe by which the supervisor learns that this one listens."""
    emit: Callable[[str], None] = field(default=partial(print, flush=True))
    """Says one line to the person who started it."""
