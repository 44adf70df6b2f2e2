"""Put a saved policy in force within a second, a broken one never; audit each change of the real key.

Promises that a reload is all or nothing: files are read once they have rested for two looks (half of a file may well be valid
YAML, and several saved together belong together), every one of them is validated before the gateway sees any, and calls in flight
keep the policy that they came under. Only the fingerprint of a key is kept. This module reads files.
"""

import asyncio
import logging
import time
from functools import partial
from pathlib import Path

from gateway_addon.calls.alerts import policy_broken
from gateway_addon.calls.gateway import Gateway
from gateway_addon.identity.fingerprint import fingerprint
from gateway_addon.ledger import Ledger, LedgerUnavailable, ServerAddress, access, admin, background, reservations
from gateway_addon.policy import GatewayPolicy, PolicyError, capped_parts, cycles, load
from gateway_addon.pricing import PriceError
from gateway_addon.upstreams.credentials import SecretUnavailable, WatchedSecret

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
KEY_PROBLEM = "The real key cannot be read again where `key:` points; the one that was read before stays in use. The log says why."

type Fingerprint = tuple[tuple[str, int, int, int], ...]


class PolicyWatcher:
    """Watch the folder of policies for one gateway, and the key that its calls are sent with."""

    def __init__(self, folder: Path, gateway: Gateway, key: WatchedSecret):
        self._folder, self._gateway, self._key = folder, gateway, key
        self._seen = self._resting = files_now(folder)
        self._key_problem: str | None = None
        self._audited = fingerprint(key())
        self._reading: asyncio.Future[None] | None = None

    async def watch(self) -> None:
        """Look for changes of the files and of the key, and keep what cannot be read or written as the policy's problem."""
        try:
            await self.look()
            await self.look_at_the_key()
        except OSError as error:
            self._problem(f"The policies in {self._folder} cannot be read ({error}).")
        except LedgerUnavailable as error:
            self._problem(f"A changed policy waits for the ledger: {error}.")
            self._seen = ()  # look again

    def read_again(self) -> None:
        """Read policies and key at the next look, whether they look changed or not: an operator has sent SIGHUP."""
        logger.info("SIGHUP: the policies and the key are read again.")
        self._seen = ()
        self._reading = asyncio.ensure_future(self._renew())

    async def _renew(self) -> None:
        try:
            await asyncio.to_thread(self._key.renew)
        except SecretUnavailable as error:
            logger.warning("%s The key that was read before stays in use.", error)

    async def look(self) -> None:
        """Put changed files in force once they rest, or say why not and keep what was."""
        before = files_now(self._folder)
        if before == self._seen:
            return
        if before != self._resting:
            self._resting = before
            return
        try:
            policy = await asyncio.to_thread(load, self._folder)
            self._refuse_another_upstream(policy)
            await asyncio.to_thread(self._key.follow, policy.key, policy.secret_variables)
        except (PolicyError, PriceError, SecretUnavailable) as error:
            if files_now(self._folder) == before:  # else somebody is still saving: look again
                self._seen = before
                self._problem(str(error))
            return
        if files_now(self._folder) != before:
            return
        self._seen = before
        await align(self._gateway.ledger, policy, await asyncio.to_thread(saved_by, self._folder))
        if policy.digest != self._gateway.policy.digest:
            logger.info("Policy %s is in force (it was %s).", policy.digest[:12], self._gateway.policy.digest[:12])
        self._gateway.policy, self._gateway.policy_problem = policy, None

    def _refuse_another_upstream(self, policy: GatewayPolicy) -> None:
        """Refuse a policy with another upstream: this process's calls to it would all be refused. Raises PolicyError."""
        before = self._gateway.policy.upstream
        if policy.upstream != before:
            moved = f"restart the gateway to move it from {before} to {policy.upstream}"
            raise PolicyError(f"{self._folder.name}/gateway.yaml: upstream: {moved}")

    async def look_at_the_key(self) -> None:
        """Audit a key that has changed, and say so where it cannot be read again. Raises LedgerUnavailable."""
        shown, problem = fingerprint(self._key()), self._key.problem
        if problem is not None and problem != self._key_problem:
            logger.error("%s The key that was read before stays in use.", problem)
        self._key_problem = problem
        self._gateway.key_problem = problem and KEY_PROBLEM
        if shown != self._audited:
            await audit_key(self._gateway.ledger, self._key)
            self._audited = shown

    def _problem(self, sentence: str) -> None:
        if sentence != self._gateway.policy_problem:
            logger.error("The policy in force stays %s. What was saved is wrong:\n%s", self._gateway.policy.digest[:12], sentence)
            self._gateway.emit(policy_broken(sentence, self._gateway.policy.digest, time.time()))
        self._gateway.policy_problem = sentence


async def must_agree(ledger: Ledger, policy: GatewayPolicy) -> None:
    """Refuse a calendar that other gateways on the ledger do not keep: each would move all past calls to its own days, in turn.

    Raises LedgerUnavailable.
    """
    others = await ledger.others()
    zone = str(await ledger.look(reservations.zone))
    if others and zone != policy.timezone:
        raise LedgerUnavailable(
            f"the days of this ledger begin by {zone}, and {len(others)} other gateway(s) use it ({', '.join(others)}); `timezone` in"
            f" gateway.yaml says {policy.timezone}: write the same one for all, or stop the others first"
        )


async def align(ledger: Ledger, policy: GatewayPolicy, who: str) -> None:
    """Bring the ledger's files, its calendar and the apps' teams in line with a policy that comes into force; audit the changes by `who`.

    Where past calls move, that may take minutes: it is waited for apart, and this gateway goes on by the policy that it has.
    Raises LedgerUnavailable.
    """
    if not isinstance(ledger.place, ServerAddress):
        for sentence in access.restrict(ledger.place, policy.ledger_mode):
            logger.warning("%s.", sentence)
    teams, now = {name: app.team for name, app in policy.apps.items()}, time.time()
    wanted = (policy.timezone, teams, cycles(policy), capped_parts(policy))
    if not await ledger.look(lambda db: admin.is_aligned(db, *wanted)):
        await background.change(ledger.place, lambda db: admin.align(db, *wanted, who=who, now=now))
    await ledger.change(partial(admin.keep_policy, digest=policy.digest, texts=policy.texts, who=who, now=now))


async def audit_key(ledger: Ledger, key: WatchedSecret) -> None:
    """Keep which key is in use, by its fingerprint, once for all processes. Raises LedgerUnavailable."""
    shown, who = fingerprint(key()), await asyncio.to_thread(_saved_the_key, key)
    await ledger.change(partial(admin.keep_key, fingerprint=shown, place=key.place, who=who, now=time.time()))


def _saved_the_key(key: WatchedSecret) -> str:
    kind, _, place = key.place.partition(" ")
    try:
        return Path(place).owner() if kind == "file" else "unknown"
    except (OSError, KeyError):
        return "unknown"


def saved_by(folder: Path) -> str:
    """Return who changed the policy, as far as files tell: the owner of the one that was saved last."""
    try:
        newest = max(_files(folder), key=lambda path: path.stat().st_mtime_ns)
        return newest.owner()
    except (OSError, KeyError, ValueError):  # gone meanwhile, a user without a name, no file at all
        return "unknown"


def files_now(folder: Path) -> Fingerprint:
    """Return the names, times, sizes and inodes of the policy files, by which one state differs from another."""
    return tuple((str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino) for path in _files(folder) if (stat := path.stat()))


def _files(folder: Path) -> list[Path]:
    """Return every file that `load` may read. `apps` may be a symbolic link, into which `rglob` does not go."""
    apps = folder / "apps"
    found = [*folder.iterdir(), *(apps.iterdir() if apps.is_dir() else ())]
    return sorted(path for path in found if path.suffix in (".yaml", ".yml", ".json") and path.is_file())
