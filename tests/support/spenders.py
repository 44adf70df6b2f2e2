"""Callers of a ledger without a proxy, who spend under caps of an app's parts: in a test's own process, or in one that it can kill,
`python spenders.py URL SEED`, which calls until it is killed."""

import asyncio
import random
import sys
import time
from dataclasses import replace

from ledgers import Cap

from gateway_addon.ledger import Denied, Ledger, LedgerUnavailable, NameLimit, NewCall, Settlement, part_scope

MODEL = "claude-haiku-4-5"
EVER = {("session", "ever"): 160, ("user", "ever"): 420, ("label.client", "ever"): 380, ("model", "ever"): 1_100, ("token", "ever"): 1_150}
NAMES = NameLimit(9, frozenset(("model", "token", "label.client")))
"""Eight sessions and three users are two names too many."""


def kept(caps):
    """The parts of which a ledger has to keep balances for these caps."""
    return frozenset(("reports", kind, window) for kind, window in caps)


def asking(session: str, user: str, client: str, quote_nano: int) -> NewCall:
    named = NewCall("reports", None, 1, session_id=session, user_id=user, labels=(("client", client),), names=NAMES)
    return replace(named, model_asked=MODEL, model=MODEL, quote_nano=quote_nano)


def judging(asked: NewCall, caps) -> list[Cap]:
    values = dict(asked.parts)
    return [Cap(part_scope("reports", (kind, values[kind])), window, nano) for (kind, window), nano in caps.items()]


async def call(ledger: Ledger, chance: random.Random, caps) -> None:
    """One call, which waits a moment for what others hold, grows, gives back, and ends in one of the ways."""
    asked = asking(f"s{chance.randrange(8)}", f"u{chance.randrange(3)}", chance.choice("abc"), chance.randint(4, 30))
    mine, quantum_nano = judging(asked, caps), chance.choice((0, 0, 3))
    for wait_s in (0.02, 0.04, 0.08, None):
        answer = await ledger.reserve(asked, asked.quote_nano, mine, quantum_nano=quantum_nano, now=time.time())
        if not isinstance(answer, Denied):
            break
        if wait_s is None or answer.reason != "cap_held":
            return ledger.refused(replace(asked, quote_nano=asked.quote_nano + quantum_nano), answer.reason, now=time.time())
        await asyncio.sleep(wait_s)
    held_nano = asked.quote_nano
    if quantum_nano:
        for more_nano in (3, 12):  # the first is kept free for it, the second is not
            [grown] = await ledger.extend([(answer, more_nano)], now=time.time())
            held_nano += more_nano * grown
    if chance.random() < 0.2:
        ledger.release(answer, 2, now=time.time())
        held_nano -= 2
    await asyncio.sleep(chance.uniform(0, 0.02))
    if chance.random() < 0.15:
        await ledger.void(answer, now=time.time())
    else:
        await ledger.settle(answer, Settlement(chance.choice((None, chance.randint(0, held_nano)))), now=time.time())


async def crowd(ledger: Ledger, chance: random.Random, caps, callers: int, calls: int) -> None:
    async def caller() -> None:
        for _ in range(calls):
            try:
                await call(ledger, chance, caps)
            except LedgerUnavailable:  # a busy machine; the call was not admitted
                await asyncio.sleep(0.05)

    await asyncio.gather(*(caller() for _ in range(callers)))


async def main(url: str, seed: str) -> None:
    ledger = await Ledger.open(url)
    held = asking("s0", "u0", "a", 4)  # never ended, so that a kill finds it when all caps are full
    await ledger.reserve(held, held.quote_nano, judging(held, EVER), now=time.time())
    await crowd(ledger, random.Random(seed), EVER, 6, 1_000_000)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
