"""Let workloads in: by an identity token as it is, or by a session that one is exchanged for.

Promises that nobody is entered in the ledger, and no session minted, before the token is verified and a rule of one app matches it;
that where the ledger cannot be written nothing is minted; that a session's token is returned to its one caller and kept nowhere.
"""

from functools import partial

from gateway_addon.calls.refusal_messages import in_force
from gateway_addon.identity import tokens, workloads
from gateway_addon.identity.key_cache import IssuerKeys
from gateway_addon.identity.trust import Trust
from gateway_addon.identity.workloads import Workload
from gateway_addon.ledger import Ledger
from gateway_addon.ledger import workloads as entered
from gateway_addon.names import PROGRAM
from gateway_addon.refusals import Refusal

LIFE_S_MIN, LIFE_S_MAX = 180, 3600
"""The SDKs renew a session 120 s before its end: one of less than the lower bound would be exchanged again at every call."""
KNOWN_MAX = 10_000
NO_ISSUERS = Refusal(
    "token_malformed",
    "This is an identity token (JWT), and this gateway believes no issuer: it takes tokens of its own. Name the issuer in gateway.yaml "
    f"(issuers; {PROGRAM} docs workloads), or use a token. {tokens.ISSUE}.",
)


class WorkloadIdentities:
    """Verify identity tokens, and enter whom they stand for in the ledger."""

    def __init__(self, ledger: Ledger, keys: IssuerKeys):
        self._ledger = ledger
        self.keys = keys
        self._known: set[str] = set()
        """Digests of the workloads that this process knows to have a row, so that a look-up stays one read."""

    async def digest(self, token: str, trust: Trust | None, now: float) -> str | Refusal:
        """Return the digest of the token row of an identity token's workload, entered at its first use. Raises LedgerUnavailable."""
        workload = await self._verified(token, trust, now)
        if isinstance(workload, Refusal):
            return workload
        digest = workload.digest
        if digest not in self._known:
            enter = partial(entered.enter, app=workload.app, issuer=workload.issuer, subject=workload.subject, digest=digest, now=now)
            await self._ledger.write(enter, "workloads")
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known.add(digest)
        return digest

    async def session(self, token: str, trust: Trust | None, now: float) -> tuple[str, int] | Refusal:
        """Mint a session for an identity token: its token, and the seconds that it lives. Raises LedgerUnavailable."""
        workload = await self._verified(token, trust, now)
        if isinstance(workload, Refusal):
            return workload
        minted, life_s = tokens.mint(), int(max(LIFE_S_MIN, min(LIFE_S_MAX, workload.expires_at - now)))
        open_session = partial(
            entered.open_session, app=workload.app, issuer=workload.issuer, subject=workload.subject, digest=workload.digest,
            session=tokens.digest(minted), rule=workload.rule, expires_at=now + life_s, now=now,
        )  # fmt: skip
        row = in_force(await self._ledger.write(open_session, "workloads"), now)
        return row if isinstance(row, Refusal) else (minted, life_s)

    async def _verified(self, token: str, trust: Trust | None, now: float) -> Workload | Refusal:
        if trust is None:
            return NO_ISSUERS
        found = workloads.read(token, trust)
        if isinstance(found, Refusal):
            return found
        assertion, issuer = found
        keys = await self.keys.of(issuer).keys(assertion.key_id)
        return keys if isinstance(keys, Refusal) else workloads.judge(assertion, issuer, keys, trust, now)
