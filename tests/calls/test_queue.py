"""The line at the door, in front of a ledger that answers as it is told."""

import asyncio
from collections import deque
from dataclasses import replace

import pytest
from ledgers import CALL, NOON, Cap

from gateway_addon.calls import queue as room
from gateway_addon.calls.queue import Attempt, BudgetQueue
from gateway_addon.calls.reservation_options import ReservationOption, ReservationPlan
from gateway_addon.ledger import Denied, RateLimits, Reserved, Standing
from gateway_addon.refusals import Refusal

pytestmark = pytest.mark.usefixtures("idle_clock")

DAY = Standing("app:reports", "day", 0, None, 1000, 0, 900, 100, 0, 1)
HELD = Denied("cap_held", standing=DAY)
SPENT = Denied("cap_spent", standing=DAY)
WHOLE, FIRST_STEP = ReservationOption(100, 500), ReservationOption(10, 50)
SHORT = Refusal("headroom", "The shared key has little left.")


class Told:
    """A ledger that gives these answers in turn, and then the last one for ever."""

    def __init__(self, *answers, own=()):
        self.answers, self.asked, self.own = deque(answers), [], own

    async def observed(self, call, caps, *, now):
        assert list(caps) == [OWN]
        return self.own

    async def reserve(self, call, hold_nano, limits, *, quantum_nano, rates, now):
        self.asked.append((call, hold_nano))
        self.limits, self.rates = list(limits), rates
        await asyncio.sleep(0)
        return self.answers.popleft() if len(self.answers) > 1 else self.answers[0]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(room, "HELD_WAIT_S", 0.2)
    monkeypatch.setattr(room, "LOOK_S", 0.01)


def come(queue, *reservation_options, call=CALL, plan=None, wait_s=0.0):
    """Ask for a reservation by these options, or by a plan."""

    async def planned():
        return plan or ReservationPlan(reservation_options or (WHOLE,), (), RateLimits())

    return queue.reserve(call, planned, NOON, wait_s)


def reserved(number):
    return Reserved(number, (), "app", (), "me")


async def test_the_first_offer_that_fits_is_taken():
    ledger = Told(HELD, reserved(1))
    assert await come(BudgetQueue(ledger), WHOLE, FIRST_STEP) == Attempt(reserved(1), FIRST_STEP, ())
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
    attempt = await come(BudgetQueue(ledger), plan=ReservationPlan((WHOLE,), (TOTAL,), rates, (OWN,)))
    assert attempt == (Reserved(1, (own,), "app", (), "me"), WHOLE, codes)
    assert (ledger.limits, ledger.rates) == ([TOTAL], rates)


async def test_a_quote_above_an_observed_cap_is_said():
    ledger = Told(reserved(1), own=(DAY._replace(cap_nano=499),))
    assert (await come(BudgetQueue(ledger), plan=ReservationPlan((WHOLE,), (TOTAL,), RateLimits(), (OWN,)))).observed == ("quote_over_cap",)


async def test_what_an_observed_app_shares_with_others_holds_it_too():
    ledger = Told(SPENT, own=())
    assert (await come(BudgetQueue(ledger), plan=ReservationPlan((WHOLE,), (TOTAL,), RateLimits(), (OWN,), True))).result == SPENT


@pytest.mark.parametrize("denied", [Denied("rate"), Denied("concurrency", limit_max=1)])
@pytest.mark.parametrize("observed", [True, False])
async def test_a_rate_holds_unless_it_is_only_observed(observed, denied):
    """What is only observed is not waited for either."""
    ledger = Told(denied, reserved(1))
    plan = ReservationPlan((WHOLE,), (OWN,), RateLimits(1), observes_rates=observed)
    result, _, said = await come(BudgetQueue(ledger), plan=plan, wait_s=60.0 if observed else 0.0)
    outcome = (reserved(1), (denied.reason,)) if observed else (denied, ())
    assert (result, said) == outcome
    assert ledger.limits == [OWN]


async def test_whoever_waits_gets_what_a_settlement_frees():
    ledger = Told(HELD, HELD, reserved(1))
    queue = BudgetQueue(ledger)
    waiting = asyncio.ensure_future(come(queue))
    await asyncio.sleep(0.005)
    queue.settled(CALL)
    assert (await waiting)[0] == reserved(1)


async def test_the_wait_is_bounded_and_ends_with_one_last_look():
    ledger = Told(HELD)
    began = asyncio.get_running_loop().time()
    assert (await come(BudgetQueue(ledger)))[0] == HELD
    assert asyncio.get_running_loop().time() - began >= room.HELD_WAIT_S
    assert len(ledger.asked) > 2


async def test_the_last_look_can_still_succeed(monkeypatch):
    monkeypatch.setattr(room, "HELD_WAIT_S", 0.1)
    monkeypatch.setattr(room, "LOOK_S", 60.0)
    assert (await come(BudgetQueue(Told(HELD, HELD, reserved(1)))))[0] == reserved(1)


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


FULL = Denied("concurrency", limit="concurrent", limit_max=1, used=1)


class Places:
    """A ledger in which each app may have so many calls in flight, and no more money than that."""

    def __init__(self, **places):
        self.places, self.admitted, self.attempts = places, [], 0

    async def reserve(self, call, hold_nano, limits, *, quantum_nano, rates, now):
        self.attempts += 1
        await asyncio.sleep(0)
        if not self.places[call.app]:
            return FULL
        self.places[call.app] -= 1
        self.admitted.append(call.model_asked)
        return reserved(len(self.admitted))

    def end(self, queue, app="reports"):
        self.places[app] += 1
        queue.settled(replace(asking_for("ended"), app=app))


async def waiting(queue, *names, wait_s=5.0):
    """Calls that came in this order, each once the one before it waits."""
    tasks = []
    for name in names:
        call = asking_for(name) if isinstance(name, str) else name
        tasks.append(asyncio.ensure_future(come(queue, call=call, wait_s=wait_s)))
        await asyncio.sleep(0.002)
    return tasks


async def test_calls_beyond_the_concurrency_wait_in_their_order(monkeypatch):
    """A settlement wakes the first alone: the others make no attempt."""
    monkeypatch.setattr(room, "LOOK_S", 60.0)
    ledger = Places(reports=0)
    queue = BudgetQueue(ledger)
    tasks = await waiting(queue, "a", "b", "c")
    for _ in tasks:
        ledger.end(queue)
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    assert ledger.admitted == ["a", "b", "c"]
    assert ledger.attempts <= 8
    assert not queue._lines


async def test_an_app_that_waits_for_its_own_calls_is_in_no_ones_way():
    ledger = Places(reports=0, other=1)
    queue = BudgetQueue(ledger)
    tasks = await waiting(queue, "a")
    stranger = replace(asking_for("other"), app="other", team=None)
    assert (await asyncio.wait_for(come(queue, call=stranger), 0.05)).result == reserved(1)
    ledger.end(queue)
    assert (await tasks[0]).result == reserved(2)


async def test_a_session_that_waits_for_its_cap_is_in_no_others_way():
    """Its calls wait behind each other, in the order in which they came; other sessions of the app, and calls without one, pass."""

    class OneSession(Told):
        held = True

        async def reserve(self, call, hold_nano, limits, **options):
            await asyncio.sleep(0)
            if self.held and call.session_id == "s1":
                return Denied("cap_held", standing=DAY._replace(scope="app:reports session:s1"))
            admitted.append(call.model_asked)
            return reserved(1)

    admitted, ledger = [], OneSession()
    queue = BudgetQueue(ledger)
    first = await waiting(queue, *(replace(asking_for(name), session_id="s1") for name in "ab"))
    for session in ("s2", None):
        call = replace(asking_for("c"), session_id=session)
        assert (await asyncio.wait_for(come(queue, call=call), 0.05)).result == reserved(1)
    assert list(queue._lines) == ["app:reports session:s1"]
    ledger.held = False
    queue.settled(replace(asking_for("ended"), session_id="s2"))
    assert not queue._lines["app:reports session:s1"].freed.is_set(), "another session's settlement brings it nothing"
    queue.settled(replace(asking_for("ended"), session_id="s1"))
    await asyncio.gather(*first)
    assert admitted == ["c", "c", "a", "b"]
    assert not queue._lines


async def test_a_settlement_wakes_the_line_of_the_shared_part():
    """Sessions under too many new names count in one part: what any call of a session gives back may be that part's."""
    queue = BudgetQueue(Told(FULL))
    line = queue._lines["app:reports session:others"] = room._Line(0.0)
    queue.settled(replace(asking_for("ended"), session_id="s1"))
    assert line.freed.is_set()


async def test_a_call_that_leaves_the_line_lets_the_next_one_up():
    ledger = Places(reports=0)
    queue = BudgetQueue(ledger)
    first, second, third = await waiting(queue, "a", "b", "c")
    first.cancel()
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    ledger.end(queue)
    assert (await third).result == reserved(1)
    assert not queue._lines


@pytest.mark.parametrize(
    ("ends", "most_s", "expected_s"),
    [(0, 60, None), (1, 60, 2), (1, 1, 1)],  # one came through in 0.6 s, and three wait
)
async def test_the_wait_ends_with_a_denial_that_says_what_to_expect(ends, most_s, expected_s, monkeypatch):
    monkeypatch.setattr(room, "EXPECTED_MAX_S", most_s)
    ledger = Places(reports=0)
    queue = BudgetQueue(ledger)
    served = await waiting(queue, *"a"[:ends])
    refused = await waiting(queue, "b", wait_s=0.6)
    behind = await waiting(queue, "c", "d")
    for _ in served:
        ledger.end(queue)
    assert (await refused[0]).result == replace(FULL, retry_after_s=expected_s)
    for task in behind:
        task.cancel()
    await asyncio.gather(*behind, return_exceptions=True)


async def test_no_call_waits_where_none_may_be_in_flight():
    ledger = Told(Denied("concurrency", limit="concurrent", limit_max=0, used=0))
    await asyncio.wait_for(come(BudgetQueue(ledger), wait_s=60.0), 0.1)
    assert len(ledger.asked) == 1


async def test_budget_is_waited_for_anew_behind_a_wait_for_concurrency(monkeypatch):
    """The time in the app's line is no time in which budget was held."""
    monkeypatch.setattr(room, "LOOK_MAX_S", 0.01)
    ledger = Told(*[FULL] * 26, HELD, HELD, reserved(1))
    assert (await come(BudgetQueue(ledger), wait_s=60.0)).result == reserved(1)


async def test_a_call_that_has_waited_is_planned_anew():
    """Meanwhile its model may have passed a grant, and must be held whole; or the shared key has run short."""
    plans = [ReservationPlan((FIRST_STEP,), (), RateLimits()), ReservationPlan((WHOLE,), (), RateLimits()), SHORT]

    async def plan():
        return plans.pop(0)

    ledger = Told(FULL)
    assert await BudgetQueue(ledger).reserve(CALL, plan, NOON, 60.0) == SHORT
    assert [hold for _, hold in ledger.asked] == [50, 500]
