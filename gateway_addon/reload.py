"""Hot reload: a saved policy is in force within a second, a broken one never is.

Promises that a reload is all or nothing: every file is read and validated before the gate sees any of it, files that change
while they are read are read again, and calls in flight keep the policy that they came under. An edge: it reads files.
"""

import asyncio
import logging
import time
from functools import partial
from pathlib import Path

from gateway_addon.alerts import policy_broken
from gateway_addon.gate import Gate
from gateway_addon.ledger import Ledger, LedgerUnavailable, admin
from gateway_addon.policy import GatewayPolicy, PolicyError, load
from gateway_addon.pricing import PriceError

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25

type Fingerprint = tuple[tuple[str, int, int, int], ...]


class Watcher:
    """Watches the folder of policies for one gate."""

    def __init__(self, folder: Path, gate: Gate):
        self._folder, self._gate = folder, gate
        self._seen = fingerprint(folder)

    async def watch(self) -> None:
        """Look for changes until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look()
            except OSError as error:
                self._problem(f"The policies in {self._folder} cannot be read ({error}).")
            except LedgerUnavailable as error:
                self._problem(f"A changed policy waits for the ledger: {error}.")
                self._seen = ()  # look again

    async def look(self) -> None:
        """Put changed files in force, or say why not and keep what was."""
        before = fingerprint(self._folder)
        if before == self._seen:
            return
        try:
            policy = await asyncio.to_thread(load, self._folder)
        except (PolicyError, PriceError) as error:
            if fingerprint(self._folder) == before:  # else somebody is still saving: look again
                self._seen = before
                self._problem(str(error))
            return
        if fingerprint(self._folder) != before:
            return
        self._seen = before
        await align(self._gate.ledger, policy, await asyncio.to_thread(saved_by, self._folder))
        if policy.digest != self._gate.policy.digest:
            logger.info("Policy %s is in force (it was %s).", policy.digest[:12], self._gate.policy.digest[:12])
        self._gate.policy, self._gate.policy_problem = policy, None

    def _problem(self, sentence: str) -> None:
        if sentence != self._gate.policy_problem:
            logger.error("%s The policy in force stays %s.", sentence, self._gate.policy.digest[:12])
            self._gate.tell(policy_broken(sentence, self._gate.policy.digest, time.time()))
        self._gate.policy_problem = sentence


async def align(ledger: Ledger, policy: GatewayPolicy, who: str) -> None:
    """A policy comes into force: bring the ledger's calendar and the apps' teams in line, and audit what changed, by `who`.

    Raises LedgerUnavailable.
    """
    teams, now = {name: app.team for name, app in policy.apps.items()}, time.time()
    await ledger.change(partial(admin.align, zone=policy.timezone, teams=teams, who=who, now=now))
    await ledger.change(partial(admin.keep_policy, digest=policy.digest, texts=policy.texts, who=who, now=now))


def saved_by(folder: Path) -> str:
    """Who changed the policy, as far as files tell: the owner of the one that was saved last."""
    try:
        newest = max(folder.rglob("*.y*ml"), key=lambda path: path.stat().st_mtime_ns)
        return newest.owner()
    except (OSError, KeyError, ValueError):  # gone meanwhile, a user without a name, no file at all
        return "unknown"


def fingerprint(folder: Path) -> Fingerprint:
    """What tells one state of the policy files from another: names, times, sizes, inodes."""
    files = sorted(folder.rglob("*.y*ml"))
    return tuple((str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino) for path in files if (stat := path.stat()))
