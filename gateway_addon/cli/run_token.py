"""The token of one command: nobody sees it, and it is revoked when the command ends, however that is."""

import getpass
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gateway_addon.identity import tokens
from gateway_addon.ledger import admin, connect
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.ledger.types import Labels

RUN_TOKEN_S = 30 * 86400  # a run's own token ends by itself where even its guard is killed
GUARD = 'cat > /dev/null; exec "$@"'
"""Waits until nobody holds the other end of its input."""


class RunToken(NamedTuple):
    id: int
    secret: str
    issued_at: float
    expires_at: float


@contextmanager
def token_of_a_run(
    app: str, policies: Path, ledger: str, *, name: str, why: str, labels: Labels = (), cap_nano: int | None = None,
    until_s: float | None = None,
) -> Iterator[RunToken]:  # fmt: skip
    """Issue a token for as long as the block runs. A guard revokes it where this process is killed before it can."""
    secret, who, place, now = tokens.mint(), getpass.getuser(), ledger_path(ledger), time.time()
    expires_at = now + (RUN_TOKEN_S if until_s is None else until_s)
    with connect.changing(place) as db:
        issued = admin.issue_token(
            db, app, tokens.digest(secret), label=name, expires_at=expires_at, labels=labels, cap_nano=cap_nano, who=who, why=why, now=now
        )  # fmt: skip
    try:
        with _guard(app, issued.id, policies, ledger):
            yield RunToken(issued.id, secret, now, expires_at)
    finally:
        with connect.changing(place) as db:
            admin.revoke_tokens(db, app, token_id=issued.id, who=who, why=f"{why} ended", now=time.time())


@contextmanager
def _guard(app: str, token_id: int, policies: Path, ledger: str) -> Iterator[None]:
    revoke = [sys.executable, "-m", "gateway_addon", "token", "revoke", app, "--id", str(token_id)]
    environment = os.environ | {"GATEWAY_LEDGER": ledger, "GATEWAY_POLICIES": str(policies)}  # not arguments: one may hold a password
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, "sh", *revoke], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        guard.kill()  # before its input ends: what it is for is done here
        guard.wait()
        assert guard.stdin is not None
        guard.stdin.close()
