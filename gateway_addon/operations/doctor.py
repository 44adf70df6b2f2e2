"""Check all that a gateway needs besides its ledger: a policy that loads, issuers with keys, a key that the provider takes, an upstream
that answers over trusted TLS, a clock that agrees with it, a disk with room.

Promises that asking costs nothing (one list of models, which is free), that the key is sent to the policy's upstream alone (a redirect
is not followed) and is in no line. An edge: it reads files, the clock, the environment and the network.
"""

import os
import shutil
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from gateway_addon.clocks import monotonic_s
from gateway_addon.http_client import Egress, Unanswered
from gateway_addon.identity.key_cache import KeysUnavailable
from gateway_addon.ledger import access
from gateway_addon.operations import issuer_keys
from gateway_addon.operations.tables import counted
from gateway_addon.policy import GatewayPolicy, PolicyError, load, retiring
from gateway_addon.pricing import PriceError
from gateway_addon.upstreams.client import ask
from gateway_addon.upstreams.credentials import SecretUnavailable, WatchedSecret
from gateway_addon.upstreams.egress import egress

DISK_FREE_BYTES_MIN = 100 * 2**20
CLOCK_OFF_S_MAX = 60
TIMEOUT_S = 10.0


class Check(NamedTuple):
    """The result of one check. `findings` are sentences that name what is wrong and the way out; none: all is well."""

    name: str
    seen: list[str]
    findings: list[str]


class Answered(NamedTuple):
    """The upstream's answer to a list of models. `date`: its clock, unix seconds; None where it sends none."""

    status: int
    date: float | None


def check_all(policies: Path, *, offline: bool, clock: Callable[[], float] = time.time) -> list[Check]:
    """Check policy, key, upstream and clock, as far as each can be reached. `offline`: nothing is sent."""
    try:
        policy = load(policies)
    except (PolicyError, PriceError) as error:
        return [Check("policy", [str(policies)], [f"{error}"])]
    seen = f"{policies}: {counted(len(policy.apps), 'app')} ({policy.digest[:12]})"
    checks = [Check("policy", [seen], []), check_models(policy, clock())]
    checks += check_issuers(policy, offline=offline)
    secret = WatchedSecret(policy.key, withheld=policy.secret_variables)
    try:
        key = secret()
    except SecretUnavailable as error:
        return [*checks, Check("key", [_source(policy)], [f"{error} Run doctor where the gateway runs, with its environment."])]
    if offline:
        return [*checks, Check("key", [f"{_source(policy)}; not tried (--offline)"], [])]
    return [*checks, *_asked(policy, key, clock)]


def check_models(policy: GatewayPolicy, now: float) -> Check:
    """Check the models that apps may use for retirement: a coming one is shown, a past one is a finding."""
    found = retiring(policy, now)
    soon = [each.sentence(now) for each in found if not each.what.is_past(now)]
    seen = soon or [f"none that an app may use ends within a month (prices checked {policy.prices.checked})"]
    return Check("models", seen, [each.sentence(now) for each in found if each.what.is_past(now)])


def check_issuers(policy: GatewayPolicy, *, offline: bool) -> list[Check]:
    """Check that each issuer's keys can be fetched, in one check of all; none where the policy names no issuers."""
    seen, findings = [], []
    for issuer in policy.trust.issuers.values() if policy.trust is not None else ():
        if offline and issuer.keys.kind in ("discovery", "url"):
            seen.append(f"{issuer.name}: not asked (--offline)")
            continue
        try:
            keys = issuer_keys.fetched(issuer, None, lambda url: egress(policy, os.environ, url)).keys
            seen.append(f"{issuer.name}: {len(keys.keys)} keys that check signatures")
        except (KeysUnavailable, ValueError, SecretUnavailable) as error:
            findings.append(f"{issuer.name}: its keys cannot be fetched ({error}); its identity tokens are refused, or will be in a day")
    return [Check("issuers", seen or ["none has keys"], findings)] if seen or findings else []


def check_files(ledger: Path, policies: Path) -> Check:
    """Check who may open the ledger's files against the policy; against the strictest mode where the policy cannot be read."""
    try:
        mode = load(policies).ledger_mode
    except (PolicyError, PriceError):
        mode = access.PRIVATE
    return Check("files", [f"the ledger's have the mode {mode:04o} at most, as ledger_mode says"], access.exposed(ledger, mode))


def check_disk(ledger: Path) -> Check:
    """Check the free room on the ledger's disk."""
    free_bytes = shutil.disk_usage(ledger.absolute().parent).free
    low = [f"only {free_bytes // 2**20} MB are free on the ledger's disk: a full disk refuses every call"]
    return Check("disk", [f"{free_bytes // 2**20:,} MB free"], low if free_bytes < DISK_FREE_BYTES_MIN else [])


def _asked(policy: GatewayPolicy, key: str, clock: Callable[[], float]) -> list[Check]:
    began, began_monotonic_s = clock(), monotonic_s()
    try:
        answered = _list_models(policy.upstream, key, egress(policy, os.environ))
    except ValueError as error:
        return [Check("upstream", [policy.upstream], [f"{error}"])]
    except Unanswered as error:
        return [Check("upstream", [policy.upstream], [_unanswered(error)])]
    took_s = monotonic_s() - began_monotonic_s
    up = [] if answered.status < 500 else [f"it answers {answered.status}: see the provider's status page"]
    checks = [Check("upstream", [f"{policy.upstream} answers in {took_s * 1000:.0f} ms"], up)]
    if answered.status in (401, 403):
        checks.append(Check("key", [_source(policy)], [f"the provider does not take this key ({answered.status}): put a valid one there"]))
    elif answered.status < 300:
        checks.append(Check("key", [f"{_source(policy)}; the provider takes it"], []))
    else:
        checks.append(Check("key", [f"{_source(policy)}; not judged, the answer was {answered.status}"], []))
    if answered.date is not None:
        checks.append(_clock(answered.date, began + took_s / 2))
    return checks


def _unanswered(error: Unanswered) -> str:
    if error.untrusted is None:
        return f"{error}: see the network, a firewall, or `upstream` in gateway.yaml"
    return (
        f"its certificate is not trusted ({error.untrusted}), so nothing is sent there: who stands between? "
        "A company's own authority is named in gateway.yaml (egress.ca)"
    )


def _clock(theirs: float, ours: float) -> Check:
    off_s = ours - theirs
    way = "ahead of" if off_s > 0 else "behind"
    seen = f"{abs(off_s):.0f} s {way} the provider's" if abs(off_s) >= 2 else "agrees with the provider's"
    wrong = [f"days and months of the caps begin {abs(off_s):,.0f} s off: set it by NTP"] if abs(off_s) > CLOCK_OFF_S_MAX else []
    return Check("clock", [seen], wrong)


def _list_models(upstream: str, key: str, way: Egress) -> Answered:
    """List the models (GET /v1/models), which is free. Raises Unanswered."""
    with ask(upstream, "/v1/models?limit=1", key, way, timeout_s=TIMEOUT_S) as answer:
        status, date = answer.status, answer.header("date")
    try:
        return Answered(status, parsedate_to_datetime(date).timestamp() if date else None)
    except ValueError:
        return Answered(status, None)


def _source(policy: GatewayPolicy) -> str:
    kind, value = policy.key
    return f"from {kind} {value[0] if isinstance(value, tuple) else value}"
