"""The line at the door, in front of a ledger that answers as it is told."""

import asyncio
from collections import deque
from dataclasses import replace

import pytest
from ledgers import CALL, NOON, Cap

from gateway_addon import door as room
from gateway_addon.door import Door, Offer
from gateway_addon.ledger import Denied, RateLimits, Reserved, Standing

DAY = Standing("app:reports", "day", 0, None, 1000, 0, 900, 100, 0, 1)
HELD = Denied("cap_held", standing=DAY)
SPENT = Denied("cap_spent", standing=DAY)
WHOLE, FIRST_STEP = Offer(100, 500), Offer(10, 50)


class Told:
    """A ledger that gives these answers in turn, and then the last one for ever."""

    def __init__(self, *answers):
        self.answers, self.asked = deque(answers), []

    async def reserve(self, call, hold_nano, limits, *, quantum_nano, rates, now):
        self.asked.append((call, hold_nano))
        self.limits, self.rates = list(limits), rates
        await asyncio.sleep(0)
        return self.answers.popleft() if len(self.answers) > 1 else self.answers[0]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(room, "WAIT_S", 0.2)
    monkeypatch.setattr(room, "LOOK_S", 0.01)


def come(door, *offers, call=CALL):
    return door.reserve(call, offers or (WHOLE,), (), RateLimits(), NOON)


def reserved(number):
    return Reserved(number, ())


async def test_the_first_offer_that_fits_is_taken():
    ledger = Told(HELD, reserved(1))
    assert await come(Door(ledger), WHOLE, FIRST_STEP) == (reserved(1), FIRST_STEP)
    assert [hold for _, hold in ledger.asked] == [500, 50]


@pytest.mark.parametrize("denied", [SPENT, Denied("rate"), Denied("paused"), Denied("quote_over_cap", standing=DAY)])
async def test_nobody_waits_for_what_no_settlement_brings_back(denied):
    ledger = Told(denied)
    assert (await come(Door(ledger)))[0] == denied
    assert len(ledger.asked) == 1


async def test_an_observed_app_is_held_by_the_caps_alone_that_it_shares_and_is_flagged():
    own, total = Cap("app:reports", "day", 5), Cap("total", "day", 9)
    ledger = Told(SPENT, reserved(1))
    rates = RateLimits(requests_per_minute=1)
    assert await Door(ledger).observe(CALL, (WHOLE,), (own, total), rates, NOON) == (reserved(1), WHOLE, ("observed:cap_spent",))
    assert (ledger.limits, ledger.rates) == ([total], RateLimits())
    ledger = Told(reserved(2))
    assert await Door(ledger).observe(CALL, (WHOLE,), (own, total), rates, NOON) == (reserved(2), WHOLE, ())
    assert (ledger.limits, ledger.rates) == ([own, total], rates)
    ledger = Told(SPENT, HELD)
    assert (await Door(ledger).observe(CALL, (WHOLE,), (own, total), rates, NOON))[0] == HELD, "what others share holds it, too"


async def test_whoever_waits_gets_what_a_settlement_frees():
    ledger = Told(HELD, HELD, reserved(1))
    door = Door(ledger)
    waiting = asyncio.ensure_future(come(door))
    await asyncio.sleep(0.005)
    door.settled()
    assert (await waiting)[0] == reserved(1)


async def test_the_wait_is_bounded_and_ends_with_one_last_look():
    ledger = Told(HELD)
    began = asyncio.get_running_loop().time()
    assert (await come(Door(ledger)))[0] == HELD
    assert asyncio.get_running_loop().time() - began >= room.WAIT_S
    assert len(ledger.asked) > 2


async def test_the_last_look_can_still_succeed(monkeypatch):
    monkeypatch.setattr(room, "WAIT_S", 0.0)
    assert (await come(Door(Told(HELD, reserved(1)))))[0] == reserved(1)


def asking_for(model):
    return replace(CALL, model_asked=model)


async def test_newcomers_do_not_overtake_whoever_waits_in_their_scope():
    first, second = CALL, asking_for("second")
    ledger = Told(HELD, HELD, HELD, reserved(1), reserved(2))
    door = Door(ledger)
    waiting = asyncio.ensure_future(come(door, call=first))
    await asyncio.sleep(0.002)
    newcomer = asyncio.ensure_future(come(door, call=second))
    assert [(await waiting)[0], (await newcomer)[0]] == [reserved(1), reserved(2)]
    assert [call.model_asked for call, _ in ledger.asked] == [first.model_asked] * 4 + ["second"]


async def test_another_scopes_line_is_not_ones_own():
    stranger = replace(CALL, app="other", team=None)
    ledger = Told(HELD)
    door = Door(ledger)
    waiting = asyncio.ensure_future(come(door))
    await asyncio.sleep(0.002)
    ledger.answers = deque([reserved(7)])
    assert (await asyncio.wait_for(come(door, call=stranger), 0.05))[0] == reserved(7)
    assert (await waiting)[0] == reserved(7)


async def test_whoever_leaves_the_line_leaves_nothing_behind():
    ledger = Told(HELD)
    door = Door(ledger)
    left = asyncio.ensure_future(come(door))
    await asyncio.sleep(0.005)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    ledger.answers = deque([HELD, reserved(1)])
    assert (await asyncio.wait_for(come(door), 0.1))[0] == reserved(1)
