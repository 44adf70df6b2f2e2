"""The token of one command: nobody sees it, and it is revoked when the command ends, however that is."""

import getpass
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from gateway_addon.identity import tokens
from gateway_addon.ledger import LedgerUnavailable, admin, connect
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.ledger.types import Labels

RUN_TOKEN_S = 30 * 86400  # a run's own token ends by itself where even its guard is killed
GUARD = 'cat > /dev/null; for pause_s in 0 10 60 600 3600; do sleep $pause_s; "$@" && exit; done'
"""Waits until nobody holds the other end of its input; then runs a command until it succeeds."""


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
    """Issue a token for as long as the block runs. A guard revokes it where this process cannot: it is killed, or the ledger is locked."""
    secret, who, place, now = tokens.mint(), getpass.getuser(), ledger_path(ledger), time.time()
    expires_at = now + (RUN_TOKEN_S if until_s is None else until_s)
    with connect.changing(place) as db:
        issued = admin.issue_token(
            db, app, tokens.digest(secret), label=name, expires_at=expires_at, labels=labels, cap_nano=cap_nano, who=who, why=why, now=now
        )  # fmt: skip

    def revoke() -> None:
        with connect.changing(place) as db:
            admin.revoke_tokens(db, app, token_id=issued.id, who=who, why=f"{why} ended", now=time.time())

    try:
        guard, held = _guard(app, issued.id, policies, ledger)
    except OSError:
        revoke()
        raise
    try:
        yield RunToken(issued.id, secret, now, expires_at)
    finally:
        try:
            revoke()
            guard.kill()  # before its input ends: what it is for is done here
            guard.wait()
        except LedgerUnavailable as error:
            raise LedgerUnavailable(f"the token of the command is revoked as soon as the ledger allows it: {error}") from error
        finally:
            held.close()


def _guard(app: str, token_id: int, policies: Path, ledger: str) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """Start the process that revokes a token when the file returned beside it is closed, if it is not killed before."""
    revoke = [sys.executable, "-m", "gateway_addon", "token", "revoke", app, "--id", str(token_id)]
    environment = os.environ | {"GATEWAY_LEDGER": ledger, "GATEWAY_POLICIES": str(policies)}  # not arguments: one may hold a password
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, "sh", *revoke], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    assert guard.stdin is not None
    return guard, guard.stdin
