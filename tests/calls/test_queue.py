"""The line at the door, in front of a ledger that answers as it is told."""

import asyncio
from collections import deque
from dataclasses import replace

import pytest
from ledgers import CALL, NOON, Cap

from gateway_addon.calls import queue as room
from gateway_addon.calls.queue import BudgetQueue
from gateway_addon.calls.reservation_options import ReservationOption, ReservationPlan
from gateway_addon.ledger import Denied, RateLimits, Reserved, Standing

DAY = Standing("app:reports", "day", 0, None, 1000, 0, 900, 100, 0, 1)
HELD = Denied("cap_held", standing=DAY)
SPENT = Denied("cap_spent", standing=DAY)
WHOLE, FIRST_STEP = ReservationOption(100, 500), ReservationOption(10, 50)


class Told:
    """A ledger that gives these answers in turn, and then the last one for ever."""

    def __init__(self, *answers, own=()):
        self.answers, self.asked, self.own = deque(answers), [], own

    async def capped(self, caps, *, now):
        assert list(caps) == [OWN]
        return self.own

    async def reserve(self, call, hold_nano, limits, *, quantum_nano, rates, now):
        self.asked.append((call, hold_nano))
        self.limits, self.rates = list(limits), rates
        await asyncio.sleep(0)
        return self.answers.popleft() if len(self.answers) > 1 else self.answers[0]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(room, "WAIT_S", 0.2)
    monkeypatch.setattr(room, "LOOK_S", 0.01)


def come(queue, *reservation_options, call=CALL):
    return queue.reserve(call, reservation_options or (WHOLE,), (), RateLimits(), NOON)


def reserved(number):
    return Reserved(number, ())


async def test_the_first_offer_that_fits_is_taken():
    ledger = Told(HELD, reserved(1))
    assert await come(BudgetQueue(ledger), WHOLE, FIRST_STEP) == (reserved(1), FIRST_STEP)
    assert [hold for _, hold in ledger.asked] == [500, 50]


@pytest.mark.parametrize("denied", [SPENT, Denied("rate"), Denied("paused"), Denied("quote_over_cap", standing=DAY)])
async def test_nobody_waits_for_what_no_settlement_brings_back(denied):
    ledger = Told(denied)
    assert (await come(BudgetQueue(ledger)))[0] == denied
    assert len(ledger.asked) == 1


OWN, TOTAL = Cap("app:reports", "day", 1000), Cap("total", "day", 9)


@pytest.mark.parametrize(
    ("spent_nano", "held_nano", "codes"),
    [(400, 100, ()), (400, 200, ("cap_held",)), (501, 0, ("cap_spent",)), (0, 0, ())],
)
async def test_own_caps_in_observe_mode_are_reported_and_hold_nothing(spent_nano, held_nano, codes):
    """An app's own caps in observe mode are reported, and refuse nothing."""
    own = DAY._replace(spent_nano=spent_nano, reserved_nano=held_nano)
    ledger = Told(reserved(1), own=(own,))
    rates = RateLimits(requests_per_minute=1)
    result, option, said = await BudgetQueue(ledger).observe(CALL, ReservationPlan((WHOLE,), (TOTAL,), rates, (OWN,)), NOON)
    assert (result, option, said) == (Reserved(1, (own,)), WHOLE, codes)
    assert (ledger.limits, ledger.rates) == ([TOTAL], rates)


async def test_a_quote_above_an_observed_cap_is_said():
    ledger = Told(reserved(1), own=(DAY._replace(cap_nano=499),))
    assert (await BudgetQueue(ledger).observe(CALL, ReservationPlan((WHOLE,), (TOTAL,), RateLimits(), (OWN,)), NOON))[2] == ("quote_over_cap",)


async def test_what_an_observed_app_shares_with_others_holds_it_too():
    ledger = Told(SPENT, own=())
    assert (await BudgetQueue(ledger).observe(CALL, ReservationPlan((WHOLE,), (TOTAL,), RateLimits(), (OWN,), True), NOON))[0] == SPENT


@pytest.mark.parametrize(("observe_rates", "outcome"), [(True, (Reserved(1, ()), ("rate",))), (False, (Denied("rate"), ()))])
async def test_a_rate_holds_unless_it_is_only_observed(observe_rates, outcome):
    ledger = Told(Denied("rate"), reserved(1))
    result, _, said = await BudgetQueue(ledger).observe(CALL, ReservationPlan((WHOLE,), (OWN,), RateLimits(1), observes_rates=observe_rates), NOON)
    assert (result, said) == outcome
    assert ledger.limits == [OWN]


async def test_whoever_waits_gets_what_a_settlement_frees():
    ledger = Told(HELD, HELD, reserved(1))
    queue = BudgetQueue(ledger)
    waiting = asyncio.ensure_future(come(queue))
    await asyncio.sleep(0.005)
    queue.settled()
    assert (await waiting)[0] == reserved(1)


async def test_the_wait_is_bounded_and_ends_with_one_last_look():
    ledger = Told(HELD)
    began = asyncio.get_running_loop().time()
    assert (await come(BudgetQueue(ledger)))[0] == HELD
    assert asyncio.get_running_loop().time() - began >= room.WAIT_S
    assert len(ledger.asked) > 2


async def test_the_last_look_can_still_succeed(monkeypatch):
    monkeypatch.setattr(room, "WAIT_S", 0.0)
    assert (await come(BudgetQueue(Told(HELD, reserved(1)))))[0] == reserved(1)


def asking_for(model):
    return replace(CALL, model_asked=model)


async def test_newcomers_do_not_overtake_whoever_waits_in_their_scope():
    first, second = CALL, asking_for("second")
    ledger = Told(HELD, HELD, HELD, reserved(1), reserved(2))
    queue = BudgetQueue(ledger)
    waiting = asyncio.ensure_future(come(queue, call=first))
    await asyncio.sleep(0.002)
    newcomer = asyncio.ensure_future(come(queue, call=second))
    assert [(await waiting)[0], (await newcomer)[0]] == [reserved(1), reserved(2)]
    assert [call.model_asked for call, _ in ledger.asked] == [first.model_asked] * 4 + ["second"]


async def test_another_scopes_line_is_not_ones_own():
    stranger = replace(CALL, app="other", team=None)
    ledger = Told(HELD)
    queue = BudgetQueue(ledger)
    waiting = asyncio.ensure_future(come(queue))
    await asyncio.sleep(0.002)
    ledger.answers = deque([reserved(7)])
    assert (await asyncio.wait_for(come(queue, call=stranger), 0.05))[0] == reserved(7)
    assert (await waiting)[0] == reserved(7)


async def test_whoever_leaves_the_line_leaves_nothing_behind():
    ledger = Told(HELD)
    queue = BudgetQueue(ledger)
    left = asyncio.ensure_future(come(queue))
    await asyncio.sleep(0.005)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    ledger.answers = deque([HELD, reserved(1)])
    assert (await asyncio.wait_for(come(queue), 0.1))[0] == reserved(1)
