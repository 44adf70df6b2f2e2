"""A crowd on one ledger, without a proxy, under caps of an app's parts: a process is killed in the middle, and a cap is added there."""

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
import spenders
from ledgers import ENGINES, new_ledger, rows, url
from part_levels import part_levels, passed, refused_though_they_fit
from processes import in_flight, kill_in_mid_call

from gateway_addon.ledger import Ledger, ServerAddress, admin, connect, part_of
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.ledger.parts import OTHERS

ADDED = {("user", "day"): 330}


def keep(place, caps):
    with connect.changing(place) as db:
        admin.align(db, "UTC", {"reports": None}, (), spenders.kept(caps), who="test", now=time.time())


def bury(place, pid):
    """A server learns of a process's death by its lease: let its time pass."""
    if isinstance(place, ServerAddress):
        with connect.changing(place) as db:
            db.execute("UPDATE owners SET lease_until = 0 WHERE pid = $1", (pid,))


@pytest.fixture
def place(tmp_path, engine, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = new_ledger(tmp_path, engine)
    keep(made, spenders.EVER)
    return made


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("seed", "calls"), [(0, 3), *(pytest.param(seed, 40, marks=pytest.mark.soak) for seed in range(1, 21))])
async def test_no_parts_cap_is_passed_by_a_crowd_with_a_kill(place, seed, calls):
    """Three processes' worth of callers: one is killed in mid call, another begins; meanwhile each user is given a cap for the day."""
    chance, all_caps = random.Random(seed), spenders.EVER | ADDED
    process = subprocess.Popen([sys.executable, spenders.__file__, url(place), str(seed)])
    ledgers = [await Ledger.open(url(place)) for _ in range(2)]
    try:
        await in_flight(place, 1, process.pid)  # before the others fill the caps
        await asyncio.gather(*(spenders.crowd(ledger, chance, spenders.EVER, 6, calls) for ledger in ledgers), kill_in_mid_call(place, process.pid))
        process.wait()
        bury(place, process.pid)
        assert await ledgers[0].sweep(now=time.time()) > 0
        ledgers.append(await Ledger.open(url(place)))
        await asyncio.to_thread(keep, place, all_caps)
        [(known,)] = rows(place, "SELECT max(id) FROM calls")
        await asyncio.gather(*(spenders.crowd(ledger, chance, all_caps, 6, calls) for ledger in ledgers))
    finally:
        process.kill()
        process.wait()
        for ledger in ledgers:
            await ledger.close()
    with connect.reading(place) as db:
        assert findings(db) == []
    levels = part_levels(place)
    assert passed(levels, spenders.EVER) == []
    under_the_added = [level for level in levels if level.call_id > known and level.kind in ("reserve", "extend")]
    assert passed(under_the_added, ADDED) == []
    assert refused_though_they_fit(place, levels, all_caps) == []
    states = Counter(rows(place, "SELECT state, refusal FROM calls"))
    assert states["settled", None] > 5, states
    assert states["refused", "cap_spent"] + states["refused", "cap_held"] > 2, states
    assert states["open", None] == 0
    ends = rows(place, "SELECT count(*) FROM entries WHERE kind IN ('settle', 'void') GROUP BY call_id")
    assert ends == [(1,)] * (states["settled", None] + states["voided", None]), "each call is resolved once"
    [(spent_nano,)] = rows(place, "SELECT CAST(sum(spent_nano) AS BIGINT) FROM entries")
    sums = Counter()
    names = set()
    for scope, window, nano in rows(place, 'SELECT scope, "window", spent_nano FROM part_balances'):
        kind, value = part_of(scope)
        sums[kind, window] += nano
        names |= {(kind, value)} if kind in ("session", "user") and value != OTHERS else set()
    assert set(sums.values()) == {spent_nano}, "the parts of each kind sum to their app"
    assert set(sums) == set(all_caps)
    assert len(names) == spenders.NAMES.new_max, "names beyond the day's number share one part"
